"""The engine: histories in, lists of real items out; prompts in, text out. Batches by length, one program a shape.

Parameters are arguments of every program, so a new checkpoint (`engine.params = ...`) compiles nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count, product
from typing import Any, Unpack

import jax
import numpy as np
import xxhash
from flax import nnx

from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.decoding.beam import Normalise, check_normalise, lanes_of
from m6rec_jax.decoding.devices import Devices
from m6rec_jax.decoding.gather import Gatherer
from m6rec_jax.decoding.lists import Lists
from m6rec_jax.decoding.programs import Settings
from m6rec_jax.decoding.prompts import Parts, Prompts, Queries
from m6rec_jax.decoding.requests import Requests
from m6rec_jax.decoding.reuse import PrefixCache
from m6rec_jax.decoding.scorer import Scorer
from m6rec_jax.decoding.shapes import prefix_width
from m6rec_jax.decoding.texts import MOST, Asked, Desk, Setting, Text
from m6rec_jax.decoding.trie import allowed_under, build_trie
from m6rec_jax.decoding.wave import Wave
from m6rec_jax.decoding.writer import SLOTS, Checkpoint, Writer
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.quantised import check_weights, kept_as
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.vocab import BOS, Vocab

BEAMS = 20
CACHE_TOKENS = 1 << 16

_NO_ROWS = np.zeros(0, np.int32)
_VERSIONS = count()  # one for every parameters that an engine of this process was given


class Engine(Scorer):
    """A model with its catalogue, ready to decode.

    `codes [C, L]`, `content [C, Dc]`, `seen [C]` are the dataset's; `spellings`: more ways to spell an item, (catalogue
    rows `[E]`, codes `[E, L]`), those of `codes` being canonical: histories and memory speak them; `timed` and `n_kinds` say how its histories are
    spelled; `length` is the longest prefix read, <s> included; `cache_tokens` of known users are kept on the device, from
    the first request that names one. `tokenizer`: of the model's texts, without which none are written; `slots` of them
    are written at a time. `devices` of this process share each batch of users, with the parameters on all of them (None:
    one device), and what `Scorer` is asked, none exchanging anything with another; the prefixes of known users and texts
    stay on the first. `weights`: as what parameters are kept on the device, full or int8 (`model.quantised`). Raises
    InputError when codes, tokenizer and model disagree, or weights cannot be kept so.
    """

    def __init__(self, model: Transformer, codes: np.ndarray, content: np.ndarray, seen: np.ndarray, *,
                 timed: bool = False, n_kinds: int = 0, length: int = 256, cache_tokens: int = CACHE_TOKENS,
                 tokenizer: Tokenizer | None = None, slots: int = SLOTS,
                 spellings: tuple[np.ndarray, np.ndarray] | None = None,
                 devices: Sequence[jax.Device] | None = None, weights: str = "full") -> None:  # fmt: skip
        check_weights(weights)
        self.weights = weights
        self.vocab: Vocab = model.vocab
        self.codes = np.asarray(codes)
        _check_codes(self.codes, self.vocab)
        self.prompts = Prompts(self.vocab, self.codes, timed, n_kinds, length)
        self.devices = Devices(devices)
        self._dtype = model.config.dtype
        self._define, self.params = nnx.split(model)
        self._width = model.config.width
        self._trie_host = build_trie(*_spelled(self.codes, spellings, self.vocab))
        self.trie = self.devices.everywhere(self._trie_host)
        self._all_under = self.devices.everywhere(allowed_under(self._trie_host))
        self.cache = PrefixCache(model.config, cache_tokens, self.devices.one)
        self.queue: Gatherer[tuple, dict[str, Any], Lists] = Gatherer(self._answer)
        self.items: ItemTable = self.devices.everywhere(item_table(content, seen))
        self.texts: Writer | None = None
        if tokenizer is not None:
            _check_tokenizer(tokenizer, self.vocab)
            desk = Desk(self.vocab, tokenizer, self.catalogue, length)
            self.texts = Writer(self._define, model.config, desk, slots=slots)

    @property
    def catalogue(self) -> int:
        return len(self.codes)

    @property
    def params(self) -> nnx.State:
        """The model's parameters, on the device, kept as `weights` says; assign those of another checkpoint, in full, to
        swap it."""
        return self._current[1]

    @params.setter
    def params(self, params: nnx.State) -> None:
        self._current = next(_VERSIONS), self.devices.everywhere(kept_as(params, self.weights, self._dtype))

    def recommend(
        self,
        histories: Sequence[np.ndarray],
        *,
        users: Sequence[Hashable] | None = None,
        times: Parts = None,
        kinds: Parts = None,
        queries: Sequence[Queries | None] | None = None,
        memory: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None = None,
        gate: np.ndarray | None = None,
        temperature: float | np.ndarray = 1.0,
        exclude: Sequence[np.ndarray] | None = None,
        allowed: np.ndarray | None = None,
        k: int = 10,
        beams: int | None = None,
        widen: int = 0,
        normalise: Normalise = "level",
    ) -> Lists:
        """The k best items after each history of catalogue rows, oldest first (-1 = an event without an item).

        `times`, `kinds`, `queries`: as `spell_history` takes them, one a user. `memory`: rows and mass `[U, J]` of
        each user's support (-1 pads), mixed in with weight `gate [U]`; `temperature`, one for
        all or `[U]`, divides the model's logits. `exclude`: rows a user shall not get; `allowed` bool `[C]` filters for
        all. Histories are cut to the newest whole events that fit.

        `users`: who is asking, so that what was read of a user is kept and only new events are read (None: nobody
        known). `beams` too few for k items count as enough. `widen`: lists that are not proven exact are searched again with twice the
        beams, and again, up to so many (0: never). `normalise`: see `beam.Normalise`.
        Raises ValueError when arrays disagree in shape or a row is outside the catalogue.
        """
        if k < 1:
            raise ValueError(f"k={k}: must be at least 1")
        if users is not None and len(users) != len(histories):
            raise ValueError(f"{len(histories)} histories, {len(users)} users: name one a history, None for a stranger")
        prompts = self.prompts(histories, times, kinds, queries)
        requests = Requests.of(prompts, self.catalogue, exclude, memory, gate, temperature)
        wave = self._wave(k, beams, normalise, allowed)
        lists = Lists.empty(len(histories), k)
        lists.put(wave.search(requests, np.arange(len(histories)), users))
        while len(unproven := np.flatnonzero(~lists.exact)):
            lanes = lanes_of(self.trie, min(2 * wave.settings.lanes, widen), wave.settings.k)
            if lanes <= wave.settings.lanes:
                break
            wave = replace(wave, settings=wave.settings._replace(lanes=lanes))
            lists.put(wave.search(requests, unproven, users))
        return lists

    def submit(
        self,
        history: np.ndarray,
        *,
        user: Hashable | None = None,
        times: np.ndarray | None = None,
        kinds: np.ndarray | None = None,
        queries: Queries | None = None,
        memory: tuple[np.ndarray, np.ndarray] | None = None,
        gate: float = 0.0,
        temperature: float = 1.0,
        exclude: np.ndarray | None = None,
        allowed: np.ndarray | None = None,
        k: int = 10,
        beams: int | None = None,
        widen: int = 0,
        normalise: Normalise = "level",
    ) -> Future[Lists]:
        """`recommend` for one user, answered in one batch with others who ask at the same time: lists of one.

        Requests alike in `k`, `beams`, `widen`, `normalise` and the filter ride together; the answer is that of a
        request alone. How long one waits, and how many: `engine.queue`. Raises `gather.Busy` when too many wait and
        RuntimeError after `close`; what `recommend` raises comes through the future.
        """
        taken = lambda x: None if x is None else np.array(x, order="C")  # noqa: E731  the caller may write into its own
        allowed = taken(allowed)
        shared = k, beams, widen, normalise, None if allowed is None else xxhash.xxh3_128_digest(allowed)
        own = {
            "histories": taken(history), "users": user, "times": taken(times), "kinds": taken(kinds), "queries": queries,
            "memory": (_NO_ROWS, _NO_ROWS) if memory is None else tuple(map(taken, memory)), "gate": gate,
            "temperature": temperature, "exclude": _NO_ROWS if exclude is None else taken(exclude),
        }  # fmt: skip
        return self.queue.submit(shared, own | {"allowed": allowed})

    def close(self) -> None:
        """Answer what was submitted and take no more, write no more texts either; `recommend` goes on."""
        self.queue.close()
        if self.texts is not None:
            self.texts.close()

    def _answer(self, shared: tuple, asked: list[dict[str, Any]]) -> list[Lists]:
        """Requests that differ in their own parts only, as one call."""
        k, beams, widen, normalise, _ = shared
        own = {name: [one[name] for one in asked] for name in asked[0]}
        allowed, memory = own.pop("allowed")[0], tuple(zip(*own.pop("memory"), strict=True))
        heat = np.array(own.pop("temperature"), np.float32)
        lists = self.recommend(
            **own, memory=memory, temperature=heat, allowed=allowed, k=k, beams=beams, widen=widen, normalise=normalise
        )
        return [lists.of(u) for u in range(len(asked))]

    def compile(
        self,
        *,
        k: int = 10,
        beams: int | None = None,
        batches: Sequence[int] = (1,),
        lengths: Sequence[int] | None = None,
        excludes: Sequence[int] = (0,),
        supports: Sequence[int] = (0,),
        normalise: Normalise = "level",
        users: bool = False,
        texts: bool = False,
    ) -> list[tuple[int, int]]:
        """Compile what `recommend` runs with these settings, so that no request waits for it; the shapes (B, T) made.

        `batches`: users at once; `lengths`: tokens of their prefixes (None: every length up to `prompts.length`);
        `excludes`, `supports`: rows excluded and rows in the memory's support of a user. Each number stands for the
        smallest shape that holds it. `users`: also the programs that keep prefixes and append an event to them.
        `texts`: also those that read prompts of these lengths and write.
        Where jax has a persistent compilation cache (JAX_COMPILATION_CACHE_DIR), the next process finds them there.
        """
        wave = self._wave(k, beams, normalise, None)
        widths = sorted({prefix_width(n) for n in (range(1, self.prompts.length + 1) if lengths is None else lengths)})
        made: set[tuple[int, int]] = set()
        for known in (False, True) if users and self.cache.size else (False,):
            shapes = {wave.shape(B, T, known) for B in batches for T in widths}
            for (B, T), excluded, supported in product(sorted(shapes), excludes, supports):
                wave.warm_up(B, T, excluded, supported, known)
            made |= shapes
        if texts:
            self.write([[BOS] * min(T, self.prompts.length) for T in widths], most=1)
        return sorted(made)

    def _wave(self, k: int, beams: int | None, normalise: Normalise, allowed: np.ndarray | None) -> Wave:
        check_normalise(normalise)  # before a program is given what is kept of users
        under = self._all_under if allowed is None else self.devices.everywhere(allowed_under(self._trie_host, allowed))
        k = min(k, self.catalogue)
        settings = Settings(k, lanes_of(self.trie, beams or BEAMS, k), normalise)
        version, params = self._current
        return Wave(
            self._define, params, version, self.items, self.trie, under, settings, self.cache, self.prompts.event,
            self.devices,
        )  # fmt: skip

    def write(
        self,
        prompts: Sequence[Asked],
        *,
        item_rows: Sequence[np.ndarray] | None = None,
        most: int | Sequence[int] = MOST,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        repetition: float | Sequence[float] = 1.0,
        seeds: int | Sequence[int] = 0,
        items: bool | Sequence[bool] = False,
        stop: str | Sequence[str] | Sequence[Sequence[str]] = (),
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Text]:
        """Continue each prompt (text, or token ids from <s> on) by at most `most` tokens, or up to what the model reads.

        Settings are one for all or one a prompt (see `Sampling`); `stop`: strings that end a text, before them, for all
        or a list a prompt. `item_rows`: where a prompt completes a spelling whose features shall be read; `items`: a text may open an item, which ends it. `on_text(i,
        piece)` is called with what is final of text i as it comes, by the thread that writes. A prompt gets the same
        tokens in any company. Raises InputError for what cannot be asked, and what `on_text` raises.
        """
        requests = self._writer.desk.requests(
            prompts, most=most, temperature=temperature, top_k=top_k, top_p=top_p, repetition=repetition, seed=seeds,
            items=items, stop=stop, item_rows=item_rows,
        )  # fmt: skip
        return self._writer.write(requests, self._checkpoint(), on_text)

    def spell(self, prompts: Sequence[Asked], k: int = 1, *, item_rows: Sequence[np.ndarray] | None = None,
              exclude: Sequence[np.ndarray] | None = None, allowed: np.ndarray | None = None,
              both_ways: bool = False) -> Lists:  # fmt: skip
        """The k likeliest items that are spelled right after each prompt (token ids from any on, as `write` takes them),
        of those `allowed` bool `[C]` and not in `exclude`. `both_ways`: tokens of the prompt see each other, as in the
        source of a translation. Raises InputError for what cannot be asked."""
        desk = self._writer.desk
        rows = [None] * len(prompts) if item_rows is None else item_rows
        asked = [
            desk.request(p, f"prompt {i}", item_rows=own) for i, (p, own) in enumerate(zip(prompts, rows, strict=True))
        ]
        read = [(one.tokens, one.item_rows) for one in asked]
        requests = Requests.of(read, self.catalogue, exclude, None, None, 1.0)
        wave = replace(self._wave(k, None, "level", allowed), both_ways=both_ways)
        lists = Lists.empty(len(prompts), k)
        lists.put(wave.search(requests, np.arange(len(prompts)), None))
        return lists

    def stream(self, prompt: Asked, **setting: Unpack[Setting]) -> Iterator[str]:
        """`write` for one prompt, piece by piece: never half a character, nor what a stop string may still take back.

        The pieces together are the text. Closing the iterator ends the text. Raises as `submit_text`.
        """
        return self._writer.stream(self._writer.desk.request(prompt, **setting), self._checkpoint())

    def submit_text(
        self, prompt: Asked, *, on_text: Callable[[str], None] | None = None, **setting: Unpack[Setting]
    ) -> Future[Text]:
        """`write` for one prompt, at once: it joins the texts that are being written. Cancel the future to end it.

        Raises InputError for what cannot be asked, `gather.Busy` when too many wait and RuntimeError after `close`; what
        `on_text` raises comes through the future.
        """
        request = self._writer.desk.request(prompt, **setting)
        return self._writer.submit([request], self._checkpoint(), [on_text])[0]

    @property
    def _writer(self) -> Writer:
        if self.texts is None:
            raise InputError("this engine writes no text: give it the model's tokenizer (Engine(..., tokenizer=...))")
        return self.texts

    def _checkpoint(self) -> Checkpoint:
        version, params = self._current
        return Checkpoint(version, *self.devices.first((params, self.items)))


def _check_tokenizer(tokenizer: Tokenizer, vocab: Vocab) -> None:
    if tokenizer.size != vocab.text.size:
        raise InputError(
            f"the tokenizer has {tokenizer.size} pieces and the model {vocab.text.size}: take the one it was trained with"
        )


def _spelled(
    codes: np.ndarray, more: tuple[np.ndarray, np.ndarray] | None, vocab: Vocab
) -> tuple[np.ndarray, np.ndarray | None]:
    """Codes of all spellings and the catalogue row of each, the canonical ones first."""
    if more is None:
        return codes, None
    if any(s.atomic for s in vocab.levels):
        raise InputError("spellings: with one code level a code is an item, its row and its features; take more levels")
    rows, others = (np.asarray(part) for part in more)
    _check_codes(others, vocab)
    if rows.shape != (len(others),) or (rows < 0).any() or (rows >= len(codes)).any():
        raise InputError(
            f"spellings: rows {list(rows.shape)} for codes {list(others.shape)}; each needs one row of 0..{len(codes) - 1}"
        )
    return np.concatenate([codes, others]), np.concatenate([np.arange(len(codes)), rows])


def _check_codes(codes: np.ndarray, vocab: Vocab) -> None:
    sizes = [s.size for s in vocab.levels]
    if codes.ndim != 2 or codes.shape[1] != len(sizes) or (codes >= sizes).any():
        raise InputError(
            f"codes {list(codes.shape)} do not fit the model's code levels {sizes}; "
            "take the catalogue it was trained on, or one made with `prepare --like RUN`"
        )
