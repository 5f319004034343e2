"""The Transformer: rows of packed examples in training, a causal prefix and its beams in decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import applied, interaction, sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.block import Block, close, first, project, remat, unrolled, vectors
from m6rec_jax.model.experts import Routing
from m6rec_jax.model.items import Catalogues, Embeddings
from m6rec_jax.model.kernels import attend, attend_prefix
from m6rec_jax.model.layers import Turns, dropout, rms_norm, rope_turns, scale, weight
from m6rec_jax.model.pipeline import pipelined
from m6rec_jax.model.quantised import dense
from m6rec_jax.vocab import TARGET, Vocab

# Of prefixes. Heads lie outside of positions, as products over positions read them: each is read by every token to come.
KeyValues = tuple[Float[Array, "N B K S h"], Float[Array, "N B K S h"]]


class View(NamedTuple):
    """Who sees whom in packed rows: positions for RoPE and, a query, the visible range of keys (all `[B, T]`)."""

    positions: Int[Array, "B T"]
    k_start: Int[Array, "B T"]
    k_end: Int[Array, "B T"]


def causal(shape: tuple[int, int], lengths: Int[Array, " B"]) -> View:
    """Rows `[B, T]` of one right-padded sequence each, in which no token sees a later one."""
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return View(positions, jnp.zeros_like(positions), jnp.minimum(positions + 1, lengths[:, None]))


DEPTH = 0.2  # share of last states in retrieval vectors at first, beside what went in
MOST_COUNTED = 4.0  # log of how much more or less than another a token may count in them


def framed(shape: tuple[int, int], opens: Int[Array, " B"], lengths: Int[Array, " B"]) -> View:
    """Rows `[B, T]` of one right-padded instance each: the first `opens` tokens see each other, those behind them, the
    request, read on left to right (objectives/scoring)."""
    at = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    ends = jnp.where(at < opens[:, None], opens[:, None], at + 1)
    return View(at, jnp.zeros_like(at), jnp.where(at < lengths[:, None], ends, 0))


def asked(tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> View:
    """Rows of one right-padded prompt each, `framed` as pretraining arranges it (objectives/scoring): all before the last
    `<target>` see each other; without one, all do."""
    at = jnp.arange(tokens.shape[1])
    request = jnp.max(jnp.where((tokens == TARGET) & (at < lengths[:, None]), at, -1), axis=1)
    return framed(tokens.shape, jnp.where(request < 0, lengths, request), lengths)


class Transformer(nnx.Module):
    """Embeddings, N layers, a final norm; every mode (GPT, BERT, T5 order) is a `View`."""

    def __init__(
        self,
        config: ModelConfig,
        vocab: Vocab,
        content_width: int,
        more_widths: tuple[int, ...] = (),
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.vocab = config, vocab
        self.embeddings = Embeddings(config, vocab, content_width, more_widths, rngs=rngs)
        self.block = Block(config, rngs=rngs)
        self.final_norm = scale((config.width,), (None,))
        if config.late:
            shape = (interaction.MOST_PARTS, config.width)
            self.part = nnx.Param(jnp.zeros(shape, jnp.float32), axes=(None, "embed"))
        if config.vectors:
            # Of queries and of items: M6-Rec's two projections, alike at first, so that like lies near like.
            axes, key = ("embed", None), rngs.params()
            project = lambda: weight(nnx.Rngs(key), (config.width, config.vectors), axes, config.width**-0.5)  # noqa: E731
            plain = lambda value: nnx.Param(value.astype(jnp.float32), axes=(None,))  # noqa: E731
            self.vectors = nnx.Dict(
                {"query": project(), "item": project(), "depth": plain(jnp.full(1, DEPTH)), "salience": plain(jnp.zeros(config.width))}
            )  # fmt: skip

    def projections(self) -> dict[str, Float[Array, "D V"]]:
        """The projections of `query` and `item` states to retrieval vectors, ready for use; ValueError without any."""
        if not self.config.vectors:
            raise ValueError("model.vectors=0: this model has no retrieval vectors")
        return {side: sharding.gather_weight(self.vectors[side][...], "embed", None) for side in ("query", "item")}

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        item_rows: Int[Array, "B T"],
        view: View,
        items: Catalogues,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Last hidden states of packed rows. `key` turns dropout on (training)."""
        return self.routed(tokens, item_rows, view, items, key)[0]

    def routed(
        self,
        tokens: Int[Array, "B T"],
        item_rows: Int[Array, "B T"],
        view: View,
        items: Catalogues,
        key: jax.Array | None = None,
        tuned: applied.Applied | None = None,
        every: bool = False,
    ) -> tuple[Float[Array, "*N B T D"], Routing | None]:
        """`hidden`, and of a model with experts how their tokens were routed, summed over layers.

        `tuned`: what a task adds to the backbone, for rows of one segment each (model/applied); not over `mesh.stage`, and
        without prompts where parts meet late. `every`: the states behind each layer `[N, B, T, D]`, all through the final
        norm, as an exit reads them.
        """
        return self._rows(tokens, item_rows, view, items, key, tuned, every)[:2]

    def observed(
        self,
        tokens: Int[Array, "B T"],
        item_rows: Int[Array, "B T"],
        view: View,
        items: Catalogues,
        key: jax.Array | None,
        layer: int,
        every: bool = False,
    ) -> tuple[Float[Array, "*N B T D"], Routing | None, tuple[Array, Array, Array]]:
        """`routed`, and the queries `[B, T, K, G, h]`, keys and values `[B, T, K, h]` of a layer, before rotation."""
        hidden, routing, x = self._rows(tokens, item_rows, view, items, key, None, every, layer)
        at = 0 if self.config.shared_layers else layer
        w = {n: sharding.place(w, None, *Block.AXES[n][1:])[at] for n, w in self.block.stacked().items()}
        return hidden, routing, vectors(x, self._ready(w), self.config)

    def _rows(
        self, tokens: Array, item_rows: Array, view: View, items: Catalogues, key: jax.Array | None,
        tuned: applied.Applied | None, every: bool, kept: int | None = None,
    ) -> tuple[Array, Routing | None, Any]:  # fmt: skip
        """Hidden states of `routed`, how tokens were routed, and what went into layer `kept`."""
        config = self.config
        quantise = "none" if key is None or tuned is not None else config.quantise  # what is served is never rounded
        key_id, key_in, key_layers = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.embeddings.read(tokens, item_rows, items, key_id)
        x = self._cast(dropout(x, config.embed_dropout, key_in, "batch", "position", None))
        if tuned is not None:
            x, view = tuned.before(x, view)
        turns = rope_turns(view.positions, config.head_dim, config.rope_theta)
        layer_keys = None if key_layers is None else jax.random.split(key_layers, (config.layers, 2))
        rows, depths = ((turns, view.k_start, view.k_end),), None
        if config.late:
            parts = interaction.cut(tokens, *view)
            own = rope_turns(parts.positions, config.head_dim, config.rope_theta)
            told = interaction.embedded(self.part[...], parts.number, x.dtype)
            rows = (*rows, (own, parts.k_start, parts.k_end), told)
            depths = jnp.arange(config.late - config.layers, config.late)  # 0: the first layer in which parts meet

        def run(x, layers, rows, part=None):
            def layer(carry, inputs):
                (x, found), (w, keys, own, depth, number) = carry, inputs
                w = self._ready(shared or w) | applied.of_rows(own, tuned)
                x, (turns, k_start, k_end) = (x, rows[0]) if depth is None else interaction.meet(x, depth, *rows)
                found = None if kept is None else jnp.where(number == kept, x, found)
                q, k, v = project(x, w, turns, config, quantise=quantise)
                mixed = attend(q, k, v, k_start, k_end, config.attention)
                mixed = applied.heard(mixed, q, k, v, view.positions, w, tuned)
                y, routing = close(x, mixed, w, config, keys, real=k_end > k_start, part=part, quantise=quantise)
                x = applied.kept(x, y, w)
                return (x, found), (routing, x if every else None)

            begun = x, None if kept is None else x
            walked, length = remat(layer, config.remat), config.layers if shared else None
            return jax.lax.scan(walked, begun, layers, length, unroll=unrolled(config.layers, config.remat))

        shared: dict[str, Array] = {}
        weights, stages, states = self.block.stacked(), sharding.shards("layers"), None
        if stages == 1:
            weights = {name: sharding.place(w, None, *Block.AXES[name][1:]) for name, w in weights.items()}
            if config.shared_layers:  # of the program's constants, not of the scan's inputs
                shared, weights = first(weights), {}
            numbers = None if kept is None else jnp.arange(config.layers)
            of_layers = (weights, layer_keys, applied.layers_of(tuned), depths, numbers)
            (x, found), (routing, states) = run(x, of_layers, rows)
        else:  # without experts, exits and shared layers: training/sharding.check_fit
            keys = None if layer_keys is None else sharding.place(layer_keys, "layers", None)
            depths = None if depths is None else sharding.place(depths, "layers")
            through = lambda *of: run(*of)[0][0]  # noqa: E731
            of_layers = (weights, keys, {}, depths, None)
            x, routing, found = pipelined(through, x, of_layers, rows, config.microbatches or stages), None, None
        x = states if every else x
        x = x if tuned is None else tuned.after(x)
        return rms_norm(x, self.final_norm[...], config.norm_eps), jax.tree.map(jnp.sum, routing), found

    def prefill(
        self, tokens: Int[Array, "B T"], item_rows: Int[Array, "B T"], lengths: Int[Array, " B"], items: Catalogues,
        tuned: applied.Applied | None = None, both_ways: bool = False,
    ) -> tuple[Float[Array, "B D"], KeyValues]:  # fmt: skip
        """Hidden state of the last token, and keys/values of all, of right-padded prefixes, causal unless `both_ways` (with
        `tuned`, whose P prompts come first: P + T of them, of which a row has its own prompts more than `lengths`).

        Nobody asks for the other tokens' states, so in the last layer only keys and values are made of them: its
        queries, attention and feed-forward run for one token a row. What is left out is dead code to the compiler.
        """
        config, weights = self.config, self.block.stacked()
        view = causal(tokens.shape, lengths)
        if both_ways and tuned is not None:
            raise ValueError("both_ways=True with tuned numbers: a tuned prefix is causal")
        if both_ways:
            view = View(view.positions, view.k_start, jnp.broadcast_to(lengths[:, None], tokens.shape))
        x = self._cast(self.embeddings.read(tokens, item_rows, items, None))
        if tuned is not None:
            x, view, lengths = tuned.in_front(x, view, lengths)
        turns = rope_turns(view.positions, config.head_dim, config.rope_theta)
        real = view.positions < lengths[:, None]

        def of(number: int | Array) -> dict[str, Array]:
            return self._layer(weights, number) | applied.of_rows(_at(applied.layers_of(tuned), number), tuned)

        def keep(kept: KeyValues, number: int | Array, k: Array, v: Array) -> KeyValues:
            put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, jnp.swapaxes(new, 1, 2), number, 0)  # noqa: E731
            return put(kept[0], k), put(kept[1], v)

        def layer(number: Array, state: tuple[Array, KeyValues]) -> tuple[Array, KeyValues]:
            x, kept = state
            w = of(number)
            q, k, v = project(x, w, turns, config)
            mixed = attend(q, k, v, view.k_start, view.k_end, config.attention)
            mixed = applied.heard(mixed, q, k, v, view.positions, w, tuned, front=True)
            return applied.kept(x, close(x, mixed, w, config, None, real=real)[0], w), keep(kept, number, k, v)

        B, T, _ = x.shape
        empty = jnp.zeros((config.layers, B, config.n_kv, T, config.head_dim), x.dtype)
        x, kept = jax.lax.fori_loop(0, config.layers - 1, layer, (x, (empty, empty)))
        x, k, v = self._newest(x, of(config.layers - 1), turns, lengths, tuned)
        return rms_norm(x, self.final_norm[...], config.norm_eps), keep(kept, config.layers - 1, k, v)

    def extend(
        self,
        tokens: Int[Array, "B M T"],
        item_rows: Int[Array, "B M T"],
        positions: Int[Array, "B M T"],
        items: Catalogues,
        prefix: KeyValues,
        prefix_lengths: Int[Array, " B"],
        suffix: tuple[Float[Array, "N B S M K h"], Float[Array, "N B S M K h"]],
        ancestors: Int[Array, "B M S"],
        slot: int | Int[Array, ""],
        tuned: applied.Applied | None = None,
    ) -> tuple[Float[Array, "B M T D"], tuple[Array, Array]]:
        """Hidden states of T more tokens a beam; their keys/values are written into slots `slot .. slot + T`.

        `ancestors[b, m, s]` names the lane that wrote slot s of beam m; for the new slots that is m itself.
        """
        config = self.config
        x = self._cast(self.embeddings.read(tokens, item_rows, items, None))
        turns = rope_turns(positions, config.head_dim, config.rope_theta)
        opens = applied.opens(tuned, prefix_lengths)
        weights = self.block.stacked()
        shared, weights = (first(weights), {}) if config.shared_layers else ({}, weights)

        def layer(x, inputs):
            w, own, prefix_k, prefix_v, suffix_k, suffix_v = inputs
            w = self._ready(shared or w) | applied.of_rows(own, tuned)
            q, k, v = project(x, w, turns, config, "bmt")
            suffix_k, suffix_v = (
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2).astype(old.dtype), slot, axis=1)
                for old, new in ((suffix_k, k), (suffix_v, v))
            )
            mixed = attend_prefix(
                q, (prefix_k, prefix_v), opens, prefix_lengths, (suffix_k, suffix_v), ancestors, slot, config.attention
            )
            mixed = applied.heard_by_beams(mixed, q, prefix_k, prefix_v, positions, w, tuned)
            return applied.kept(x, close(x, mixed, w, config, None, "bmt")[0], w), (suffix_k, suffix_v)

        x, suffix = jax.lax.scan(layer, x, (weights, applied.layers_of(tuned), *prefix, *suffix))
        return rms_norm(x, self.final_norm[...], config.norm_eps), suffix

    def meant(
        self,
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
        item_rows: Int[Array, "B T"],
        items: Catalogues,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """What retrieval vectors are sums of: of each token what went in, its root mean square one, and `depth` times the last state
        `hidden` of it, both times how much the token counts: exp of a product of what went in with `salience`.

        Fresh layers add up to more than what went in, and vectors of last states alone hardly hold what a text is about.
        `key`: that of `hidden`.
        """
        key_id = None if key is None else jax.random.split(key, 3)[0]
        x = self._cast(self.embeddings.read(tokens, item_rows, items, key_id))
        x = rms_norm(x, jnp.zeros(x.shape[-1], jnp.float32), self.config.norm_eps)
        depth, salience = (self.vectors[name][...] for name in ("depth", "salience"))
        counts = jnp.einsum("btd,d->bt", x, salience, preferred_element_type=jnp.float32)
        counts = jnp.exp(MOST_COUNTED * jnp.tanh(counts / MOST_COUNTED))[..., None]
        return (x + depth.astype(x.dtype) * hidden) * counts.astype(x.dtype)

    def begin(
        self, tokens: Int[Array, "B T"], item_rows: Int[Array, "B T"], items: Catalogues
    ) -> Float[Array, "B T D"]:
        """What goes into the first layer."""
        return self._cast(self.embeddings.read(tokens, item_rows, items, None))

    def through(
        self, x: Float[Array, "B T D"], view: View, first: int | Array, last: int | Array
    ) -> Float[Array, "B T D"]:
        """What comes out of layers `first .. last - 1` (counted from 0), nothing left out and nothing kept."""
        turns = rope_turns(view.positions, self.config.head_dim, self.config.rope_theta)
        real, weights = view.k_end > view.k_start, self.block.stacked()

        def layer(number: Array, x: Array) -> Array:
            w = self._layer(weights, number)
            q, k, v = project(x, w, turns, self.config)
            mixed = attend(q, k, v, view.k_start, view.k_end, self.config.attention)
            return close(x, mixed, w, self.config, None, real=real)[0]

        return jax.lax.fori_loop(first, last, layer, x)

    def peek(self, x: Float[Array, "B T D"], lengths: Int[Array, " B"], layer: int | Array) -> Float[Array, "B D"]:
        """What one more layer makes of each row's last token, which sees the whole row, through the final norm.

        Of the other tokens only keys and values are made: a quarter of a layer's work, or less.
        """
        config, w = self.config, self._layer(self.block.stacked(), layer)
        turns = rope_turns(jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), config.head_dim, config.rope_theta)
        return rms_norm(self._newest(x, w, turns, lengths)[0], self.final_norm[...], config.norm_eps)

    def _newest(
        self, x: Float[Array, "B T D"], w: dict[str, Array], turns: Turns, lengths: Int[Array, " B"],
        tuned: applied.Applied | None = None,
    ) -> tuple[Float[Array, "B D"], Array, Array]:  # fmt: skip
        """What a layer makes of each row's last token, which sees the whole row; the layer's keys and values of all."""
        config = self.config
        _, k, v = project(x, w, turns, config)
        end, k_end = (lengths - 1)[:, None, None], lengths[:, None]
        x = jnp.take_along_axis(x, end, axis=1)
        q, *_ = project(x, w, Turns(*(jnp.take_along_axis(part, end, axis=1) for part in turns)), config)
        mixed = attend(q, k, v, applied.opens(tuned, lengths)[:, None], k_end, config.attention)
        mixed = applied.heard(mixed, q, k, v, k_end - 1, w, tuned, front=True)
        y, _ = close(x, mixed, w, config, None)
        return applied.kept(x, y, w)[:, 0], k, v

    def _layer(self, weights: dict[str, Array], number: int | Array) -> dict[str, Array]:
        """One layer's weights of the stacked ones, ready for use."""
        return self._ready(_at(weights, 0 if self.config.shared_layers else number))

    def logits(self, hidden: Float[Array, "*n D"], slice_index: int, items: Catalogues) -> Float[Array, "*n V"]:
        """Float32 scores over one vocabulary slice (0 text, 1.. code levels); spare rows cannot win."""
        table, hidden = self.embeddings.table(slice_index, items), self.embeddings.narrowed(hidden)
        scores = jnp.einsum("...d,vd->...v", hidden, self._cast(table), preferred_element_type=jnp.float32)
        return jnp.where(jnp.arange(table.shape[0]) < self.vocab.slices[slice_index].size, scores, NEVER)

    def _ready(self, w: dict[str, Array]) -> dict[str, Array]:
        """One layer's weights, gathered along fsdp and cast to the arithmetic of the run."""
        return {
            name: x
            if name.endswith("norm") or name == "router"
            else sharding.gather_weight(self._cast(x), *Block.AXES[name][1:])
            for name, x in w.items()
        }

    def _cast(self, x: Array) -> Array:
        return dense(x).astype(jnp.dtype(self.config.dtype))


def _at(stacked: dict[str, Array], number: int | Array) -> dict[str, Array]:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), stacked)
