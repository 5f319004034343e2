"""Kernels of libraries against XLA's attention: the same outputs, the same gradients, the same mask.

splash runs in Pallas' interpreter. Of tokamax no CPU can run the kernels for Hopper: what they are given is tried here
with the implementation beside them, and they are compiled in tests/test_ahead_of_time.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.examples import Sequence
from m6rec_jax.data.packing import pack_row
from m6rec_jax.errors import InputError
from m6rec_jax.model import attention, kernels
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.vocab import Vocab

B, T, K, G, h = 2, 200, 2, 2, 16
ORDERS = {
    "causal": lambda n: np.arange(n),
    "bidirectional": lambda n: np.zeros(n),
    "seq2seq": lambda n: np.maximum(np.arange(n) - n // 2, 0),
    "events": lambda n: np.arange(n) // 3,  # bidirectional inside an event, causal across
}
EVERY_KIND = [(kind, 45) for kind in ORDERS]  # and padding behind them
SEGMENTS = st.lists(st.tuples(st.sampled_from(sorted(ORDERS)), st.integers(1, 90)), min_size=1, max_size=8)


def packed(segments):
    """A row `[T]` of these segments, as many as fit."""
    parts, left = [], T
    for kind, n in segments:
        if n <= left:
            order = ORDERS[kind](n).astype(np.int32)
            parts.append((Sequence(order * 0, order * 0, order, np.zeros(n, np.float32), order * 0 - 1), 0))
            left -= n
    return pack_row(parts, T)


def rule(row):
    """`[T, T]`: DESIGN's rule, from segments and order."""
    segment, order = row["segment_ids"], row["order"]
    return (segment[:, None] == segment) & (order <= order[:, None]) & (segment > 0)


def drawn(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return [
        jnp.asarray(rng.normal(size=s), dtype) for s in ((B, T, K, G, h), (B, T, K, h), (B, T, K, h), (B, T, K, G, h))
    ]


def ranges(rows):
    return tuple(jnp.asarray(np.stack([row[name] for row in rows])) for name in ("k_start", "k_end"))


@partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, start, end, cotangent):
    """The output at queries that see something, and gradients of q, k, v."""
    real = (end > start)[..., None, None, None]
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, start, end), q, k, v)
    return jnp.where(real, out, 0), *back(jnp.where(real, cotangent, 0))


def by_splash(*arrays):
    return kernels.attend(*arrays, "splash")


def agree(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), **tolerance)


@settings(max_examples=4)
@given(rows=st.tuples(SEGMENTS, SEGMENTS))
@example(rows=(EVERY_KIND, EVERY_KIND[:1]))
def test_splash_attends_as_xla_forward_and_backward(rows):
    q, k, v, cotangent = drawn(0)
    arrays = (q, k, v, *ranges([packed(row) for row in rows]), cotangent)
    expected = value_and_gradients(attention.attend, *arrays)
    agree(value_and_gradients(by_splash, *arrays), expected, atol=2e-5, rtol=2e-5)
    assert np.abs(expected[0]).max() > 0.1


def test_splash_in_bfloat16_is_as_far_from_float32_as_xla():
    rows = [packed(EVERY_KIND), packed(EVERY_KIND[::-2])]
    exact = value_and_gradients(attention.attend, *drawn(0)[:3], *ranges(rows), drawn(0)[3])
    q, k, v, cotangent = drawn(0, jnp.bfloat16)
    found = value_and_gradients(by_splash, q, k, v, *ranges(rows), cotangent)
    xla = value_and_gradients(attention.attend, q, k, v, *ranges(rows), cotangent)
    for one, other, true in zip(found, xla, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error, theirs = (np.linalg.norm(np.asarray(x, np.float32) - true) / np.linalg.norm(true) for x in (one, other))
        assert error < max(1.5 * theirs, 0.01)


@settings(max_examples=30)
@given(row=SEGMENTS)
def test_both_libraries_are_given_the_mask_of_the_visibility_rule(row):
    row = packed(row)
    expected = rule(row)
    real = expected.any(-1)
    start, end = kernels.seeing(row["k_start"], row["k_end"], T)
    splash = np.asarray(kernels.in_range(kernels.packed(start, end)[:, None], jnp.arange(T)[None]))
    np.testing.assert_array_equal(splash[real], expected[real])
    assert (splash[~real].sum(-1) == 1).all()  # a query that sees nothing must not divide by nothing
    pytest.importorskip("tokamax")
    dense = kernels.tokamax_mask(start[None], end[None]).as_array(T, T)
    np.testing.assert_array_equal(dense[0, 0], splash)


@given(st.integers(0, kernels.MOST_KEYS - 2), st.data())
def test_a_packed_range_holds_its_ends_exactly(start, data):
    end = data.draw(st.integers(start + 1, kernels.MOST_KEYS - 1))
    one = kernels.packed(jnp.int32(start), jnp.int32(end))
    seen = [bool(kernels.in_range(one, jnp.int32(key))) for key in (start - 1, start, end - 1, end)]
    assert seen == [False, True, True, False]


def by_tokamax(*arrays):
    base = pytest.importorskip("tokamax._src.ops.attention.base")
    return kernels.tokamax(*arrays, kernel=base.DotProductAttention(), lse=True)


def test_tokamax_is_given_heads_ranges_and_sums_as_it_takes_them():
    """By its implementation without a kernel, which runs here and is called alike."""
    rows = [packed(EVERY_KIND), packed(EVERY_KIND[::-2])]
    q, k, v, cotangent = drawn(1)
    arrays = (q, k, v, *ranges(rows), cotangent)
    expected = value_and_gradients(attention.attend, *arrays)
    agree(value_and_gradients(lambda *x: by_tokamax(*x)[0], *arrays), expected, atol=2e-5, rtol=2e-5)
    sums = jax.jit(by_tokamax)(*arrays[:-1])[1]
    real = np.asarray(arrays[4] > arrays[3])
    scores = jnp.einsum("btkgh,bskh->btkgs", q, k) * h**-0.5
    mask = np.stack([rule(row) for row in rows])[:, :, None, None]
    agree([sums[real]], [jax.nn.logsumexp(scores, axis=-1, where=mask)[real]], atol=1e-4)


def beams(seed, P=140, M=8, steps=1, slots=3):
    """Queries of beams in the middle slot, a prefix that one user has not, suffixes, who wrote them."""
    rng = np.random.default_rng(seed)
    normal = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    ancestors = jnp.asarray(rng.integers(0, M, (3, M, slots)))
    return (
        normal(3, M, steps, K, G, h), (normal(3, K, P, h), normal(3, K, P, h)), jnp.array([5, 0, 0]), jnp.array([P, 57, 0]),
        (normal(3, slots, M, K, h), normal(3, slots, M, K, h)), ancestors, slots - 1 - steps,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2])
def test_beams_over_a_prefix_by_splash_and_merged_are_those_of_one_softmax(steps):
    asked = beams(0, steps=steps)
    expected = attention.attend_prefix(*asked)
    agree([jax.jit(partial(kernels.attend_prefix, choice="splash"))(*asked)], [expected], atol=1e-5)
    assert np.ptp(expected) > 1


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.1, 60), st.integers(0, 99))
def test_attention_over_two_sets_of_keys_merges_into_attention_over_both(far, near, spread, seed):
    rng = np.random.default_rng(seed)
    scores, values = rng.normal(size=far + near) * spread, rng.normal(size=(far + near, 3))

    def part(scores, values):
        weights = np.exp(scores - scores.max())
        return weights @ values / weights.sum(), np.log(weights.sum()) + scores.max()

    merged = kernels.merge(*part(scores[:far], values[:far]), *part(scores[far:], values[far:]))
    np.testing.assert_allclose(merged, part(scores, values)[0], atol=1e-5)


def test_a_model_is_the_same_by_splash_and_by_xla():
    vocab, rng = Vocab(200, (40,)), np.random.default_rng(0)
    items = jax.device_put(item_table(rng.normal(size=(40, 6)), np.ones(40, bool)))
    row = packed(EVERY_KIND)
    view = View(*(row[name][None] for name in ("positions", "k_start", "k_end")))
    tokens, real = rng.integers(0, 40, (1, T)) + vocab.levels[0].offset, row["segment_ids"] > 0
    target = rng.normal(size=(1, T, 16))

    sizes = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=32, remat="dots", attention="xla")
    params = Blueprint(sizes, vocab, 6).init(0)

    def gradient(choice):
        blueprint = Blueprint(replace(sizes, attention=choice), vocab, 6)

        def loss(params):
            hidden = blueprint.bind(params).hidden(tokens, np.full((1, T), -1), view, items)
            return jnp.sum(jnp.where(real[:, None], hidden * target, 0))

        return jax.jit(jax.value_and_grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), gradient("splash"), gradient("xla")
    )


def on(monkeypatch, platform, **more):
    monkeypatch.setattr(
        kernels, "get_default_device", lambda: SimpleNamespace(platform=platform, device_kind=platform, **more)
    )


def test_each_kind_of_device_gets_its_kernel_and_the_cpu_the_code_it_had(monkeypatch):
    pytest.importorskip("tokamax")
    auto = lambda *sizes, dtype=jnp.bfloat16: getattr(kernels.chosen("auto", *sizes, jnp.dtype(dtype)), "func", None)  # noqa: E731
    assert auto(256, 256) is None
    on(monkeypatch, "tpu")
    assert auto(256, 256) is kernels.splash
    assert auto(256, 256, dtype=jnp.float32) is None
    assert auto(1, 256) is auto(256, 100) is auto(256, kernels.MOST_KEYS) is None
    for other in ("8.0", "10.0"):
        on(monkeypatch, "gpu", compute_capability=other)
        assert auto(256, 256) is None
        with pytest.raises(InputError, match="made for Hopper"):
            kernels.chosen("tokamax", 256, 256, jnp.dtype(jnp.bfloat16))
    on(monkeypatch, "gpu", compute_capability="9.0")
    assert kernels.chosen("auto", 256, 256, jnp.dtype(jnp.bfloat16)) is kernels.tokamax
    monkeypatch.setattr(kernels, "has_tokamax", lambda: False)
    assert auto(256, 256) is None


@pytest.mark.parametrize(
    ("choice", "platform", "said"),
    [("tokamax", "cpu", "Hopper"), ("splash", "gpu", "made for TPUs"), ("tokamax", "gpu", "m6rec-jax[kernels]")],
)
def test_a_kernel_that_this_machine_has_not_is_refused_by_name(monkeypatch, choice, platform, said):
    on(monkeypatch, platform, compute_capability="9.0")
    monkeypatch.setattr(kernels, "has_tokamax", lambda: False)
    with pytest.raises(InputError, match=f"model.attention={choice}") as error:
        kernels.chosen(choice, 256, 256, jnp.dtype(jnp.bfloat16))
    assert said in str(error.value) and "\n" not in str(error.value)
