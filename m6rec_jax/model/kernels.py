"""Which code attends: XLA's, or a kernel of a library where the hardware has one (docs/kernels.md).

Both kernels take DESIGN section 4's ranges as they are: query t sees keys `k_start[t] <= s < k_end[t]`, compared inside
the kernel, so that no mask is built. `attention` stays the reference and is what a CPU runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.backend import get_default_device
from jaxtyping import Array, Float, Int

from m6rec_jax.config.model import Attention
from m6rec_jax.errors import InputError
from m6rec_jax.model import attention, sharding

LANES = 128  # TPU tiles are so wide: a splash kernel takes sequences in multiples of it
BLOCKS = (512, 256, LANES)  # of queries and keys that meet in on-chip memory at a time, the widest that divides
MOST_KEYS = 1 << 15  # a range is packed into one int32
# Below so many queries or keys in a call, padding them to a block costs more than a kernel can save: XLA's, always.
FEWEST_QUERIES, FEWEST_KEYS = 16, LANES

# (q, k, v, k_start, k_end) -> the output, and with `lse=True` the log-sum-exp of each query's scores `[B, T, K, G]`.
Flash = Callable[..., tuple[Array, Array | None]]


def attend(
    q: Float[Array, "B T K G h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    choice: Attention = "auto",
) -> Float[Array, "B T K G h"]:
    """`attention.attend` by the chosen code (`model.attention`), each device for its rows, positions and heads.

    A query with an empty range (padding) gets some value that no loss reads. Raises InputError when the choice cannot
    run on these devices.
    """
    flash = chosen(choice, q.shape[1] // sharding.shards("position"), k.shape[1], q.dtype)
    heads, rows = ("batch", None, "kv", None), ("batch", "position")
    wide = ("batch", "position", "kv", None, None)
    run = attention.attend if flash is None else lambda *arrays: flash(*arrays)[0]
    return sharding.per_shard(run, (wide, heads, heads, rows, rows), wide, check=False)(q, k, v, k_start, k_end)


def attend_prefix(
    q: Float[Array, "B M T K G h"],
    prefix: tuple[Float[Array, "B K P h"], Float[Array, "B K P h"]],
    prefix_starts: Int[Array, " B"],
    prefix_lengths: Int[Array, " B"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int | Int[Array, ""],
    choice: Attention = "auto",
) -> Float[Array, "B M T K G h"]:
    """`attention.attend_prefix` by the chosen code: the prefix by a kernel, the few suffix slots by XLA, then `merge`.

    Carries no gradient where a kernel runs. Raises as `attend`.
    """
    M, T, G = q.shape[1], q.shape[2], q.shape[4]
    flash = chosen(choice, M * T * G, prefix[0].shape[2], q.dtype)
    if flash is None:
        return attention.attend_prefix(q, prefix, prefix_starts, prefix_lengths, suffix, ancestors, slot)

    # A slot that is known when the program is traced stays so: what lies behind it is not read.
    known, traced = ((slot,), ()) if isinstance(slot, int) else ((), (slot,))

    def run(q, prefix, starts, lengths, suffix, ancestors, *traced):
        (slot,) = known or traced
        far, far_lse = over_prefix(flash, q, prefix, starts, lengths)
        near, near_lse = over_suffix(q, suffix, ancestors, slot)
        return merge(far, far_lse, near, near_lse).astype(q.dtype)

    wide, kept = ("batch", None, None, "kv", None, None), ("batch", "kv", None, None)
    lanes, names = ("batch", None, None, "kv", None), ("batch", None, None)
    in_axes = (wide, (kept, kept), ("batch",), ("batch",), (lanes, lanes), names, *(() for _ in traced))
    asked = q, prefix, prefix_starts, prefix_lengths, suffix, ancestors, *traced
    return sharding.per_shard(run, in_axes, wide, check=False)(*asked)


def chosen(choice: Attention, queries: int, keys: int, dtype: jnp.dtype) -> Flash | None:
    """The kernel for so many queries and keys on the device that programs are traced for; None = XLA's code.

    Raises InputError when a kernel is asked for by name that this device, or this installation, has not.
    """
    device = get_default_device()
    fits = queries >= FEWEST_QUERIES and FEWEST_KEYS <= keys < MOST_KEYS
    if choice == "auto":
        choice = _automatic(device, dtype)
    if choice == "splash":
        if device.platform not in ("tpu", "cpu"):
            raise InputError(
                f"model.attention=splash: made for TPUs, and this is a {device.device_kind}; use auto or xla"
            )
        return partial(splash, interpret=device.platform == "cpu") if fits else None
    if choice == "tokamax":
        if not _has_mosaic(device):
            raise InputError(f"model.attention=tokamax: made for Hopper GPUs (compute capability 9), and this is a {device.device_kind}; use auto or xla")  # fmt: skip
        if not has_tokamax():
            raise InputError("model.attention=tokamax: tokamax is not installed; pip install 'm6rec-jax[kernels]', or use auto")  # fmt: skip
        return tokamax if fits else None
    return None


def _automatic(device: jax.Device, dtype: jnp.dtype) -> Attention:
    if dtype != jnp.bfloat16:
        return "xla"
    if device.platform == "tpu":
        return "splash"
    return "tokamax" if _has_mosaic(device) and has_tokamax() else "xla"


def _has_mosaic(device: jax.Device) -> bool:
    """Whether tokamax has forward and backward kernels for this GPU that compile, and are no Triton kernels, which jax
    will drop. Those for capability 10 do not get through jax's assembler (docs/kernels.md)."""
    return device.platform == "gpu" and 9 <= float(getattr(device, "compute_capability", 0)) < 10


@cache
def has_tokamax() -> bool:
    """Whether the extra `kernels` is installed."""
    return importlib.util.find_spec("tokamax") is not None


def splash(
    q: Float[Array, "B T K G h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    *,
    lse: bool = False,
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G h"], Float[Array, "B T K G"] | None]:
    """jax's splash attention; with `lse` it carries no gradient.

    Its mask function is given a number of each query and the index of each key; ours is the query's range, packed. All
    blocks of a row are computed, as which of them are empty is not known before the batch. `interpret` is for a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

    B, T, K, G, h = q.shape
    S = k.shape[1]
    k_start, k_end = seeing(k_start, k_end, S)
    pad = lambda x, n: jnp.pad(x, ((0, 0), (0, -n % LANES), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
    q, k, v, ranges = pad(q * jnp.asarray(h**-0.5, q.dtype), T), pad(k, S), pad(v, S), pad(packed(k_start, k_end), T)
    bq, bk = (next(block for block in BLOCKS if length % block == 0) for length in (q.shape[1], k.shape[1]))
    sizes = kernels.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk, block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip

    def row(ranges: Array, *arrays: Array):
        info = masks.MaskInfo(
            data_next=None, mask_next=None, block_mask=None, partial_mask_blocks=None, q_sequence=ranges
        )
        kernel = kernels.SplashAttentionKernel(
            info, info, info, block_sizes=sizes, is_mqa=False, save_residuals=lse, mask_value=attention.NEVER,
            attn_logits_soft_cap=None, residual_checkpoint_name=None, mask_function=in_range, interpret=interpret,
        )  # fmt: skip
        return kernel(*arrays)

    heads_first = lambda x: jnp.swapaxes(x.reshape(*x.shape[:2], -1, h), 1, 2)  # noqa: E731
    found = jax.vmap(row)(ranges, heads_first(q), heads_first(k), heads_first(v))
    out, sums = (found[0], found[1][0]) if lse else (found, None)
    tokens_first = lambda x, *more: jnp.swapaxes(x, 1, 2)[:, :T].reshape(B, T, K, G, *more)  # noqa: E731
    return tokens_first(out, h), None if sums is None else tokens_first(sums)


def tokamax(
    q: Float[Array, "B T K G h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    k_start: Int[Array, "B T"],
    k_end: Int[Array, "B T"],
    *,
    lse: bool = False,
    kernel: Any = None,
) -> tuple[Float[Array, "B T K G h"], Float[Array, "B T K G"] | None]:
    """tokamax's flash attention by its Mosaic kernels, or by another of its implementations (`kernel`)."""
    if kernel is None:
        # tokamax.ops.gpu, where this is public, asks for jax_triton, which this does without.
        from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

        kernel = PallasMosaicGpuFlashAttention()
    B, T, K, G, h = q.shape
    mask = tokamax_mask(*seeing(k_start, k_end, k.shape[1]))
    found = kernel(q.reshape(B, T, K * G, h), k, v, mask=mask, return_residuals=lse)
    if not lse:
        return found.reshape(q.shape), None
    out, (most, total) = found
    return out.reshape(q.shape), jnp.swapaxes(most + jnp.log(total), 1, 2).reshape(B, T, K, G)


def tokamax_mask(k_start: Int[Array, "B T"], k_end: Int[Array, "B T"]):
    """The ranges as tokamax's mask, one for all heads."""
    from tokamax._src.ops.attention.base import Mask

    return Mask(k_start=k_start[:, None], k_end=k_end[:, None])


def seeing(k_start: Array, k_end: Array, keys: int) -> tuple[Array, Array]:
    """The ranges with none empty: a query that sees nothing sees one key, so that no kernel divides by a sum of 0."""
    k_start = jnp.minimum(k_start, keys - 1)
    return k_start, jnp.maximum(k_end, k_start + 1)


def packed(k_start: Array, k_end: Array) -> Array:
    """A range as one int32; `in_range` reads it. Holds below `MOST_KEYS` keys."""
    return k_start << 16 | k_end


def in_range(query: Array, key: Array) -> Array:
    """Whether the key's index lies in the query's `packed` range."""
    return (key >= query >> 16) & (key < query & 0xFFFF)


def over_prefix(
    flash: Flash, q: Array, prefix: tuple[Array, Array], starts: Array, lengths: Array
) -> tuple[Array, Array]:
    """Attention of all beams to the prefix they share, from `starts` on: beams and the queries of a group are one axis of
    queries.

    Output `[B, M, T, K, G, h]` and its log-sum-exp `[B, M, T, K, G]`, which is `NEVER` for a prefix of no token.
    """
    B, M, T, K, G, h = q.shape
    folded = jnp.moveaxis(q, 3, 4).reshape(B, M * T * G, K, 1, h)
    start, end = (jnp.broadcast_to(x[:, None], folded.shape[:2]) for x in (starts, lengths))
    keys, values = (jnp.swapaxes(x, 1, 2) for x in prefix)
    out, sums = flash(folded, keys, values, start, end, lse=True)
    unfold = lambda x, *more: jnp.moveaxis(x.reshape(B, M, T, G, K, *more), 4, 3)  # noqa: E731
    return unfold(out, h), jnp.where((lengths > starts)[:, None, None, None, None], unfold(sums), attention.NEVER)


def over_suffix(
    q: Float[Array, "B M T K G h"],
    suffix: tuple[Float[Array, "B S M K h"], Float[Array, "B S M K h"]],
    ancestors: Int[Array, "B M S"],
    slot: int | Int[Array, ""],
) -> tuple[Float[Array, "B M T K G h"], Float[Array, "B M T K G"]]:
    """The part of `attention.attend_prefix` over the beams' own slots: output, and log-sum-exp of its scores."""
    B, M, T, K, G, h = q.shape
    _, scores, values = attention.own(q * h**-0.5, suffix, ancestors, slot)
    sums = jax.nn.logsumexp(jnp.concatenate(scores, axis=-1), axis=-1)
    mixed = attention.mix_own([jnp.exp(part - sums[..., None]) for part in scores], values)
    unfold = lambda x, *more: jnp.moveaxis(x.reshape(B, K, M, T, G, *more), 1, 3)  # noqa: E731
    return unfold(mixed, h), unfold(sums)


def merge(
    far: Float[Array, "*n h"], far_lse: Float[Array, "*n"], near: Float[Array, "*n h"], near_lse: Float[Array, "*n"]
) -> Float[Array, "*n h"]:
    """Attention over two sets of keys as one, from attention over each and the log-sum-exp of its scores."""
    share = jax.nn.sigmoid(far_lse - near_lse)[..., None]  # of the softmax that lies in the far set
    return share * far + (1 - share) * near
