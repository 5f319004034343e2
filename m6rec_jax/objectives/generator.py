"""The generator of replaced-token detection: a small masked model, and what it writes in place of hidden tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from m6rec_jax.config import ReplacedConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model import sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.items import Catalogues, catalogues
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, View
from m6rec_jax.vocab import MASK, OPTIONS, SPECIALS, Slice, Vocab

CHUNK = 128  # positions that are written at one time: each draws a number for every id of its slice
Batch = dict[str, Array]


@dataclass(frozen=True)
class Replacing:
    """What a step must know of replaced-token detection; static.

    `tasks`: which pools are of it. `histories`: pools of histories read left to right, which `config.augment` rewrites.
    `rate`: share of a history's items that it rewrites.
    """

    generator: Blueprint
    config: ReplacedConfig
    tasks: tuple[int, ...]
    histories: tuple[int, ...]
    rate: float


class Written(NamedTuple):
    """Where the generator wrote (`hidden`), what stood at each position, what stands there now, and its own `states`."""

    hidden: Bool[Array, "B T"]
    original: Int[Array, "B T"]
    tokens: Int[Array, "B T"]
    states: Float[Array, "B T D"]


def generator_of(blueprint: Blueprint, config: ReplacedConfig) -> Blueprint:
    """A small dense model over the same ids, with tables of its own. Raises InputError for a width that heads do not divide."""
    model = blueprint.config
    width = config.width or model.width // 2
    said = f"replaced.width={config.width}" + ("" if config.width else f" (half of model.width: {width})")
    if width % (2 * model.heads) or width == 0:
        raise InputError(f"{said}: the generator has model.heads={model.heads}, and each takes an even share of its width; set replaced.width to a multiple of {2 * model.heads}")  # fmt: skip
    small = replace(
        model, layers=config.layers, width=width, embed=0, ffn=0, experts=0, shared_experts=0, shared_layers=False,
        late=0, exits=False, vectors=0,
    )  # fmt: skip
    return replace(blueprint, config=small)


def in_pools(pools: tuple[int, ...], task_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Which positions belong to these pools."""
    return reduce(jnp.logical_or, [task_ids == pool for pool in pools], jnp.zeros_like(task_ids, bool))


def rewritten(
    replacing: Replacing, params: Any, batch: Batch, items: Catalogues, key: jax.Array
) -> tuple[Batch, Written]:
    """A `[B, T]` batch as the model shall read it, with what the generator of `params` wrote into it, and where that was.

    In tasks of detection `<mask>` says where, in histories read left to right chance does. The generator sees what the
    model sees: nothing behind a position that is read left to right. An item of one code brings its features whether it
    was there or was written; of spelled items nobody has any, or features would tell who was not rewritten.
    """
    model = replacing.generator.bind(params)
    key_model, key_draw, key_where = jax.random.split(key, 3)
    tokens, weights = batch["tokens"], batch["loss_weights"]
    asked = in_pools(replacing.tasks, batch["task_ids"]) & (batch["segment_ids"] > 0)
    hidden = asked & (tokens == MASK) & (weights > 0)
    number = numbers(tokens.shape)
    if replacing.config.augment:
        hidden = hidden | _augmented(replacing, model.vocab, batch, number, key_where)
    original = jnp.where(asked, batch["targets"], tokens)
    read = jnp.where(hidden, MASK, tokens), jnp.where(hidden, -1, batch["item_rows"])
    states = model.hidden(*read, View(batch["positions"], batch["k_start"], batch["k_end"]), items, key_model)
    drawn = draw(model, states, original, hidden, number, items, key_draw)
    now = jnp.where(hidden, drawn, original)
    rows = jnp.where(asked | hidden, _rows(model.vocab, now, items), batch["item_rows"])
    return {**batch, "tokens": now, "item_rows": rows}, Written(hidden, original, now, states)


def numbers(shape: tuple[int, ...]) -> Int[Array, "B T"]:
    """Each position's own number, the same on every mesh: what is drawn there hangs on it."""
    return sharding.place(jnp.arange(shape[0] * shape[1], dtype=jnp.int32).reshape(shape), "batch", "position")


def draw(
    model: Transformer,
    states: Float[Array, "B T D"],
    original: Int[Array, "B T"],
    hidden: Bool[Array, "B T"],
    number: Int[Array, "B T"],
    items: Catalogues,
    key: jax.Array,
) -> Int[Array, "B T"]:
    """At hidden positions a token drawn from the model's distribution over the slice of the original (Gumbel-max), elsewhere 0.

    So a code is replaced by a code of its level, and text by text that is no special token. Items of one code that nobody
    has used are not proposed. No gradient passes.
    """
    vocab = model.vocab
    slices = [(i, s) for i, s in enumerate(vocab.slices) if s.name != OPTIONS]
    states = jax.lax.stop_gradient(model.embeddings.narrowed(states))
    tables = [jax.lax.stop_gradient(model.embeddings.table(i, items)).astype(states.dtype) for i, _ in slices]
    seen = [facts.seen for facts in catalogues(items)]

    def local(states, original, hidden, number, tables, seen, key):
        shape = original.shape
        states, original, hidden, number = (x.reshape(-1, *x.shape[2:]) for x in (states, original, hidden, number))
        ends = jnp.array([s.end for _, s in slices])
        slice_of = jnp.where(hidden, jnp.searchsorted(ends, original, side="right"), len(slices))
        size = min(CHUNK, len(original))
        spare = -len(original) % size
        order = jnp.argsort(slice_of, stable=True)
        pad = lambda x, fill: jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1)), constant_values=fill)  # noqa: E731
        cut = lambda x, fill: pad(x[order], fill).reshape(-1, size, *x.shape[1:])  # noqa: E731

        def write(_, chunk):
            h, of, at = chunk
            made = jnp.zeros_like(at)
            for i, ((_, s), table) in enumerate(zip(slices, tables, strict=True)):
                legal = seen[s.domain] if s.atomic and model.config.content else None
                chosen = jax.lax.cond(
                    jnp.any(of == i),
                    lambda h, at, s=s, table=table, legal=legal: s.offset + _highest(h, at, s, table, legal, key),
                    lambda h, at: jnp.zeros_like(at),
                    h,
                    at,
                )
                made = jnp.where(of == i, chosen, made)
            return None, made

        _, made = jax.lax.scan(write, None, (cut(states, 0), cut(slice_of, len(slices)), cut(number, 0)))
        return jnp.zeros_like(original).at[order].set(made.reshape(-1)[: len(original)]).reshape(shape)

    row = ("batch", "position")
    in_axes = ((*row, None), row, row, row, [("vocab", None)] * len(tables), [("vocab",)] * len(seen), ())
    run = sharding.per_shard(local, in_axes, row, check=False)
    return run(states, original, hidden, number, tables, seen, key)


def _highest(
    h: Float[Array, "c D"],
    number: Int[Array, " c"],
    s: Slice,
    table: Float[Array, "V D"],
    legal: Bool[Array, " V"] | None,
    key: jax.Array,
) -> Int[Array, " c"]:
    """The row of the highest logit plus Gumbel noise. Every shard along tensor draws the noise of all rows: that makes a
    position's noise the same on any mesh."""
    first = sharding.tensor_index() * table.shape[0]
    rows = first + jnp.arange(table.shape[0])
    least = len(SPECIALS) if s.name == "text" else 0
    allowed = (rows >= least) & (rows < s.size)
    if legal is not None:
        allowed = allowed & legal[: table.shape[0]]
    noise = jax.vmap(lambda n: jax.random.gumbel(jax.random.fold_in(key, n), (s.padded,)))(number)
    noise = jax.lax.dynamic_slice_in_dim(noise, first, table.shape[0], axis=1)
    scores = jnp.einsum("cd,vd->cv", h, table, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed, scores + noise, NEVER)
    best = jnp.max(scores, axis=1)
    mine = jnp.where(best == sharding.pmax(best, sharding.TENSOR), rows[jnp.argmax(scores, axis=1)], -1)
    return sharding.pmax(mine, sharding.TENSOR)


def _augmented(
    replacing: Replacing, vocab: Vocab, batch: Batch, number: Int[Array, "B T"], key: jax.Array
) -> Bool[Array, "B T"]:
    """Items that are rewritten in histories read left to right: in `augment` of the segments, `rate` of their items."""

    def local(tokens, task_ids, segment_ids, k_start, number, at, key):
        chance = lambda key, n: jax.vmap(jax.vmap(lambda n: jax.random.uniform(jax.random.fold_in(key, n))))(n)  # noqa: E731
        of_segment, of_item = jax.random.split(key)
        some = in_pools(replacing.histories, task_ids) & (segment_ids > 0)
        some &= (tokens >= vocab.text.end) & (tokens < vocab.codes_end)
        some &= chance(of_segment, number - at + k_start) < replacing.config.augment
        return some & (chance(of_item, number) < replacing.rate)

    shape, row = batch["tokens"].shape, ("batch", "position")
    at = sharding.place(jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape), *row)
    names = ("tokens", "task_ids", "segment_ids", "k_start")
    run = sharding.per_shard(local, (*(row,) * 6, ()), row, check=False)
    return run(*(batch[name] for name in names), number, at, key)


def _rows(vocab: Vocab, tokens: Int[Array, "B T"], items: Catalogues) -> Int[Array, "B T"]:
    """The catalogue row of each token that is an item by itself, -1 of others."""
    rows, first = jnp.full_like(tokens, -1), 0
    by_domain = {s.domain: s for s in vocab.slices if s.atomic}
    for domain, facts in enumerate(catalogues(items)):
        if domain in by_domain:
            s = by_domain[domain]
            rows = jnp.where((tokens >= s.offset) & (tokens < s.offset + s.size), tokens - s.offset + first, rows)
        first += len(facts.seen)
    return rows
