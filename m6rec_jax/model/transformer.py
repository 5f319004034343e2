"""The Transformer: rows of packed examples in training, a causal prefix and its beams in decoding."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.model import sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.experts import Routing, feed_forward
from m6rec_jax.model.items import Catalogues, Embeddings
from m6rec_jax.model.kernels import attend, attend_prefix
from m6rec_jax.model.layers import Part, Turns, dropout, rms_norm, rope, rope_turns, scale, swiglu, weight
from m6rec_jax.model.pipeline import pipelined
from m6rec_jax.model.products import KEPT, product
from m6rec_jax.model.quantised import dense
from m6rec_jax.vocab import Vocab

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


class Block(nnx.Module):
    """All N layers at once: every weight carries a leading layer axis and `jax.lax.scan` walks it.

    Pre-norm residual layer: grouped-query attention with RoPE, then SwiGLU (Shazeer 2020), or a mixture of many
    (`experts`), beside which `gate`, `up` and `down` are those that all tokens share.
    """

    AXES = {
        "attention_norm": ("layers", None),
        "query": ("layers", "embed", "kv", None, None),
        "key": ("layers", "embed", "kv", None),
        "value": ("layers", "embed", "kv", None),
        "output": ("layers", "kv", None, None, "embed"),
        "ffn_norm": ("layers", None),
        "gate": ("layers", "embed", "ffn"),
        "up": ("layers", "embed", "ffn"),
        "down": ("layers", "ffn", "embed"),
        "router": ("layers", None, None),
        "expert_gate": ("layers", "experts", "embed", "ffn"),
        "expert_up": ("layers", "experts", "embed", "ffn"),
        "expert_down": ("layers", "experts", "ffn", "embed"),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        N, D, K, h, F = config.layers, config.width, config.n_kv, config.head_dim, config.dense_width
        G = config.heads // K
        std, out_std = D**-0.5, (2 * N * D) ** -0.5
        make = lambda name, shape, std: weight(rngs, shape, self.AXES[name], std)  # noqa: E731
        self.attention_norm = scale((N, D), self.AXES["attention_norm"])
        self.query = make("query", (N, D, K, G, h), std)
        self.key = make("key", (N, D, K, h), std)
        self.value = make("value", (N, D, K, h), std)
        self.output = make("output", (N, K, G, h, D), out_std)
        self.ffn_norm = scale((N, D), self.AXES["ffn_norm"])
        if F:
            self.gate = make("gate", (N, D, F), std)
            self.up = make("up", (N, D, F), std)
            self.down = make("down", (N, F, D), (2 * N * F) ** -0.5)
        if config.experts:
            E, F = config.experts, config.expert_width
            self.router = make("router", (N, D, E), std)
            self.expert_gate = make("expert_gate", (N, E, D, F), std)
            self.expert_up = make("expert_up", (N, E, D, F), std)
            self.expert_down = make("expert_down", (N, E, F, D), (2 * N * F) ** -0.5)

    def stacked(self) -> dict[str, Array]:
        """The weights `[N, ...]` that `scan` slices a layer at a time."""
        return {name: getattr(self, name)[...] for name in self.AXES if hasattr(self, name)}


LEADING = {"bt": ("batch", "position"), "bmt": ("batch", None, None)}  # logical axes: of rows, and of beams


def _project(x: Array, w: dict[str, Array], turns: Turns, config: ModelConfig, batch: str = "bt") -> tuple[Array, ...]:
    """Normed input to rotated queries, rotated keys, and values. `batch`: einsum letters of the leading axes."""
    lead = LEADING[batch]
    y = rms_norm(x, w["attention_norm"], config.norm_eps)
    q = product(f"{batch}d,dkgh->{batch}kgh", y, w["query"], sharding.out(*lead, "kv", None, None))
    k = product(f"{batch}d,dkh->{batch}kh", y, w["key"], sharding.out(*lead, "kv", None))
    v = product(f"{batch}d,dkh->{batch}kh", y, w["value"], sharding.out(*lead, "kv", None))
    return rope(q, turns.over(2)), rope(k, turns.over(1)), v


def _close(
    x: Array,
    mixed: Array,
    w: dict[str, Array],
    config: ModelConfig,
    keys: Array | None,
    batch: str = "bt",
    real: Array | None = None,
    part: Part = None,
) -> tuple[Array, Routing | None]:
    """Attention output and feed-forward, each added to the residual stream; with experts, how tokens were routed.

    `real`: which tokens are no padding; None: all. Capacity, where that is configured, is of training (`keys`) alone.
    """
    lead = LEADING[batch]
    key_a, key_f = (None, None) if keys is None else keys
    to_stream = sharding.out(*lead, None)
    attention = product(f"{batch}kgh,kghd->{batch}d", mixed, w["output"], to_stream)
    x = x + dropout(attention, config.dropout, key_a, *lead, None, part=part)
    y = rms_norm(x, w["ffn_norm"], config.norm_eps)
    forward, routing = 0, None
    if "gate" in w:
        to_ffn = sharding.out(*lead, "ffn")
        gate, up = (product(f"{batch}d,df->{batch}f", y, w[name], to_ffn) for name in ("gate", "up"))
        inner = swiglu(gate, up)
        forward = product(f"{batch}f,fd->{batch}d", inner, w["down"], to_stream)
    if "router" in w:
        dropless = keys is None or config.routing == "dropless"
        of_experts, routing = feed_forward(y, real, w, config, lead, dropless)
        forward = forward + of_experts
    return x + dropout(forward, config.dropout, key_f, *lead, None, part=part), routing


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
    ) -> tuple[Float[Array, "B T D"], Routing | None]:
        """`hidden`, and of a model with experts how their tokens were routed, summed over layers."""
        config = self.config
        key_id, key_in, key_layers = (None,) * 3 if key is None else jax.random.split(key, 3)
        x = self.embeddings.read(tokens, item_rows, items, key_id)
        x = self._cast(dropout(x, config.embed_dropout, key_in, "batch", "position", None))
        turns = rope_turns(view.positions, config.head_dim, config.rope_theta)
        layer_keys = None if key_layers is None else jax.random.split(key_layers, (config.layers, 2))

        def run(x, layers, rows, part=None):
            turns, k_start, k_end = rows

            def layer(x, inputs):
                w, keys = inputs
                w = self._ready(w)
                q, k, v = _project(x, w, turns, config)
                mixed = attend(q, k, v, k_start, k_end, config.attention)
                return _close(x, mixed, w, config, keys, real=k_end > k_start, part=part)

            return jax.lax.scan(_remat(layer, config.remat), x, layers)

        weights, rows, stages = self.block.stacked(), (turns, view.k_start, view.k_end), sharding.shards("layers")
        if stages == 1:
            weights = {name: sharding.place(w, None, *Block.AXES[name][1:]) for name, w in weights.items()}
            x, routing = run(x, (weights, layer_keys), rows)
        else:  # without experts: training/sharding.check_fit
            keys = None if layer_keys is None else sharding.place(layer_keys, "layers", None)
            through = lambda *of: run(*of)[0]  # noqa: E731
            x, routing = pipelined(through, x, (weights, keys), rows, config.microbatches or stages), None
        return rms_norm(x, self.final_norm[...], config.norm_eps), jax.tree.map(jnp.sum, routing)

    def prefill(
        self, tokens: Int[Array, "B T"], item_rows: Int[Array, "B T"], lengths: Int[Array, " B"], items: Catalogues,
        both_ways: bool = False,
    ) -> tuple[Float[Array, "B D"], KeyValues]:  # fmt: skip
        """Hidden state of the last token, and keys/values of all, of right-padded prefixes, causal unless `both_ways`.

        Nobody asks for the other tokens' states, so in the last layer only keys and values are made of them: its
        queries, attention and feed-forward run for one token a row. What is left out is dead code to the compiler.
        """
        config, weights = self.config, self.block.stacked()
        view = causal(tokens.shape, lengths)
        if both_ways:
            view = View(view.positions, view.k_start, jnp.broadcast_to(lengths[:, None], tokens.shape))
        x = self._cast(self.embeddings.read(tokens, item_rows, items, None))
        turns = rope_turns(view.positions, config.head_dim, config.rope_theta)
        real = view.positions < lengths[:, None]

        def of(number: int | Array) -> dict[str, Array]:
            return self._ready(jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, number, keepdims=False), weights))

        def keep(kept: KeyValues, number: int | Array, k: Array, v: Array) -> KeyValues:
            put = lambda old, new: jax.lax.dynamic_update_index_in_dim(old, jnp.swapaxes(new, 1, 2), number, 0)  # noqa: E731
            return put(kept[0], k), put(kept[1], v)

        def layer(number: Array, state: tuple[Array, KeyValues]) -> tuple[Array, KeyValues]:
            x, kept = state
            w = of(number)
            q, k, v = _project(x, w, turns, config)
            mixed = attend(q, k, v, view.k_start, view.k_end, config.attention)
            return _close(x, mixed, w, config, None, real=real)[0], keep(kept, number, k, v)

        B, T = tokens.shape
        empty = jnp.zeros((config.layers, B, config.n_kv, T, config.head_dim), x.dtype)
        x, kept = jax.lax.fori_loop(0, config.layers - 1, layer, (x, (empty, empty)))
        w = of(config.layers - 1)
        _, k, v = _project(x, w, turns, config)
        end, k_end = (lengths - 1)[:, None, None], lengths[:, None]
        x = jnp.take_along_axis(x, end, axis=1)
        q, *_ = _project(x, w, Turns(*(jnp.take_along_axis(part, end, axis=1) for part in turns)), config)
        x, _ = _close(x, attend(q, k, v, jnp.zeros_like(k_end), k_end, config.attention), w, config, None)
        return rms_norm(x[:, 0], self.final_norm[...], config.norm_eps), keep(kept, config.layers - 1, k, v)

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
    ) -> tuple[Float[Array, "B M T D"], tuple[Array, Array]]:
        """Hidden states of T more tokens a beam; their keys/values are written into slots `slot .. slot + T`.

        `ancestors[b, m, s]` names the lane that wrote slot s of beam m; for the new slots that is m itself.
        """
        config = self.config
        x = self._cast(self.embeddings.read(tokens, item_rows, items, None))
        turns = rope_turns(positions, config.head_dim, config.rope_theta)

        def layer(x, inputs):
            w, prefix_k, prefix_v, suffix_k, suffix_v = inputs
            w = self._ready(w)
            q, k, v = _project(x, w, turns, config, "bmt")
            suffix_k, suffix_v = (
                jax.lax.dynamic_update_slice_in_dim(old, jnp.swapaxes(new, 1, 2).astype(old.dtype), slot, axis=1)
                for old, new in ((suffix_k, k), (suffix_v, v))
            )
            mixed = attend_prefix(
                q, (prefix_k, prefix_v), prefix_lengths, (suffix_k, suffix_v), ancestors, slot, config.attention
            )
            return _close(x, mixed, w, config, None, "bmt")[0], (suffix_k, suffix_v)

        x, suffix = jax.lax.scan(layer, x, (self.block.stacked(), *prefix, *suffix))
        return rms_norm(x, self.final_norm[...], config.norm_eps), suffix

    def logits(self, hidden: Float[Array, "*n D"], slice_index: int, items: Catalogues) -> Float[Array, "*n V"]:
        """Float32 scores over one vocabulary slice (0 text, 1.. code levels); spare rows cannot win."""
        table = self.embeddings.table(slice_index, items)
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


def _remat(layer, policy: str):
    """Named remat policies: what the backward pass computes again instead of keeping."""
    if policy == "none":
        return layer
    saved = {"dots": jax.checkpoint_policies.save_only_these_names(KEPT), "full": None}[policy]
    return partial(jax.checkpoint, prevent_cse=False, policy=saved)(layer)
