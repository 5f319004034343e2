"""The visibility rule, shown by gradients, and decoding against whole rows."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.data.examples import Sequence
from m6rec_jax.data.packing import pack_row
from m6rec_jax.model import block
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View, causal
from m6rec_jax.vocab import Vocab

CONFIG = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=32)
VOCAB = Vocab(200, (40,))
WIDTH, LENGTH = 6, 24
LEVEL = VOCAB.levels[0]


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    blueprint = Blueprint(CONFIG, VOCAB, WIDTH)
    items = item_table(rng.normal(size=(40, WIDTH)), rng.random(40) < 0.8)
    return blueprint, blueprint.init(0), items, rng


def sequence(rng, n, order=None):
    """n item tokens with their features, in causal order unless another is given."""
    rows = rng.integers(0, 40, n).astype(np.int32)
    order = np.arange(n, dtype=np.int32) if order is None else order
    return Sequence(rows + LEVEL.offset, rows * 0, order, np.zeros(n, np.float32), rows)


def run(world, row, embedded=None):
    """Hidden states of one packed row; with `embedded` as the input vectors in place of the token's."""
    blueprint, params, items, _ = world
    model = blueprint.bind(params)
    if embedded is not None:
        model.embeddings.read = lambda *_: embedded
    view = View(*(row[name][None] for name in ("positions", "k_start", "k_end")))
    return model.hidden(row["tokens"][None], row["item_rows"][None], view, items)[0]


def influence(world, row):
    """`[T, S]`: whether input s changes output t, by exact gradient."""
    blueprint, params, items, _ = world
    x = blueprint.bind(params).embeddings.read(row["tokens"][None], row["item_rows"][None], items, None)
    jacobian = jax.jacrev(lambda x: run(world, row, x).sum(-1))(x)[:, 0]
    return np.abs(np.asarray(jacobian)).sum(-1) > 0


@pytest.mark.smoke
def test_a_query_sees_its_segment_up_to_its_own_order_and_nothing_else(world):
    rng = world[3]
    seq2seq = np.array([0, 0, 0, 0, 1, 2, 3], np.int32)
    bidirectional = np.zeros(5, np.int32)
    parts = [sequence(rng, 8), sequence(rng, 7, seq2seq), sequence(rng, 5, bidirectional)]
    row = pack_row([(s, 0) for s in parts], LENGTH)
    segment, order = row["segment_ids"], row["order"]
    allowed = (segment[:, None] == segment) & (order <= order[:, None]) & (segment > 0)
    seen = influence(world, row)
    real = segment > 0
    assert (seen[real] == allowed[real]).all()
    assert not seen[real][:, ~real].any()  # padding is seen by nothing


def test_an_example_means_the_same_alone_and_packed(world):
    rng = world[3]
    parts = [sequence(rng, n) for n in (6, 9, 7)]
    packed = run(world, pack_row([(s, 0) for s in parts], LENGTH))
    at = 0
    for part in parts:
        alone = run(world, pack_row([(part, 0)], LENGTH))
        n = len(part.tokens)
        np.testing.assert_allclose(packed[at : at + n], alone[:n], atol=1e-5)
        at += n


def test_features_of_the_item_to_predict_have_no_gradient_on_the_input_side(world):
    """The state that predicts event t depends on features of earlier items only (a hidden item's features included)."""
    blueprint, params, items, _ = world
    rows = np.arange(10, dtype=np.int32)
    causal = Sequence(rows + LEVEL.offset, rows, rows * 1, np.ones(10, np.float32), rows)
    hidden_item = 4
    masked_rows = np.where(rows == hidden_item, -1, rows)
    masked_tokens = np.where(rows == hidden_item, 4, rows + LEVEL.offset).astype(np.int32)
    masked = Sequence(masked_tokens, rows, rows * 0, np.ones(10, np.float32), masked_rows)
    for layout, position, item in ((causal, 3, 4), (masked, hidden_item, hidden_item)):
        row = pack_row([(layout, 0)], LENGTH)

        def state(content, row=row, position=position):
            view = View(*(row[name][None] for name in ("positions", "k_start", "k_end")))
            table = items._replace(content=content)
            return (
                blueprint.bind(params)
                .hidden(row["tokens"][None], row["item_rows"][None], view, table)[0, position]
                .sum()
            )

        gradient = np.asarray(jax.grad(state)(jnp.asarray(items.content)))
        assert (gradient[item] == 0).all()
        assert (gradient[position - 1] != 0).any()


def test_items_nobody_has_used_are_known_by_content_alone(world):
    blueprint, params, items, _ = world
    model = blueprint.bind(params)
    unseen = int(np.flatnonzero(~items.seen[:40])[0])
    row = np.array([[unseen]], np.int32)
    read = model.embeddings.read(row + LEVEL.offset, row, items, None)[0, 0]
    content = items.content[unseen] @ np.asarray(params["embeddings"]["content"])
    np.testing.assert_allclose(read, content, atol=1e-6)
    np.testing.assert_allclose(model.embeddings.table(1, items)[unseen], content, atol=1e-6)


def test_spare_rows_never_win(world):
    blueprint, params, items, _ = world
    logits = blueprint.bind(params).logits(jnp.ones((3, CONFIG.width)), 1, items)
    assert logits.shape == (3, LEVEL.padded)
    assert (logits[:, LEVEL.size :] < -1e29).all()


def test_prefill_and_extend_equal_whole_rows(world):
    """Ragged prefixes, two beams that branch, three tokens later: every state equals that of the whole sequence."""
    blueprint, params, items, rng = world
    model = blueprint.bind(params)
    lengths = np.array([5, 9], np.int32)
    whole = rng.integers(0, 40, (2, 2, 12)).astype(np.int32)  # [B, M, prefix + suffix]
    prefix = np.zeros((2, 9), np.int32)
    for b, n in enumerate(lengths):
        whole[b, :, :n] = whole[b, 0, :n]
        prefix[b, :n] = whole[b, 0, :n]
    _, kv = model.prefill(prefix + LEVEL.offset, prefix, lengths, items)
    S, K, h = 3, CONFIG.n_kv, CONFIG.head_dim
    suffix = tuple(jnp.zeros((CONFIG.layers, 2, S, 2, K, h)) for _ in range(2))
    # Beams swap lanes after the first token: beam m continues what lane 1 - m wrote.
    first = np.stack([whole[b, ::-1, n : n + 1] for b, n in enumerate(lengths)])
    stay = np.broadcast_to(np.arange(2)[None, :, None], (2, 2, S)).copy()
    positions = np.broadcast_to(lengths[:, None, None], (2, 2, 1))
    _, suffix = model.extend(first + LEVEL.offset, first, positions, items, kv, lengths, suffix, stay, 0)
    swapped = stay.copy()
    swapped[:, :, 0] = 1 - swapped[:, :, 0]
    rest = np.stack([whole[b, :, n + 1 : n + 3] for b, n in enumerate(lengths)])
    positions = lengths[:, None, None] + np.array([1, 2])
    positions = np.broadcast_to(positions, (2, 2, 2))
    got, _ = model.extend(rest + LEVEL.offset, rest, positions, items, kv, lengths, suffix, swapped, 1)
    for b, n in enumerate(lengths):
        for m in range(2):
            rows = whole[b, m, : n + 3]
            row = pack_row([(Sequence(rows + LEVEL.offset, rows, np.arange(n + 3), rows * 0.0, rows), 0)], LENGTH)
            np.testing.assert_allclose(got[b, m], run(world, row)[n + 1 : n + 3], atol=1e-5)


def last_and_all(world, layers):
    """Programs of parameters and items: `prefill`'s state of three ragged prefixes, and the states of all their tokens."""
    rng = np.random.default_rng(1)
    blueprint = Blueprint(ModelConfig(layers=layers, width=16, heads=4, kv_heads=2, ffn=32), VOCAB, WIDTH)
    lengths, rows = np.array([5, 9, 1], np.int32), rng.integers(0, 40, (3, 9)).astype(np.int32)
    last = jax.jit(lambda p, i: blueprint.bind(p).prefill(rows + LEVEL.offset, rows, lengths, i)[0])
    whole = jax.jit(lambda p, i: blueprint.bind(p).hidden(rows + LEVEL.offset, rows, causal(rows.shape, lengths), i))
    return last, whole, (blueprint.init(1), world[2]), lengths


@pytest.mark.parametrize("layers", [1, 2])
def test_prefill_gives_the_state_of_the_last_token(world, layers):
    last, whole, inputs, lengths = last_and_all(world, layers)
    np.testing.assert_allclose(last(*inputs), whole(*inputs)[np.arange(3), lengths - 1], atol=1e-5)


def test_prefill_does_the_last_layer_for_the_last_token_alone(world):
    last, whole, inputs, lengths = last_and_all(world, 1)
    flops = [program.lower(*inputs).compile().cost_analysis()["flops"] for program in (last, whole)]
    weights = 16 * (16 * 2 + 8 * 2 + 32 * 3)  # of a layer
    spared = 2 * (3 * 9 - len(lengths)) * (weights - 16 * 8 * 2)  # keys and values are of all tokens
    assert flops[0] <= flops[1] - spared


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_not_gradients(world, remat):
    _, params, items, rng = world
    row = pack_row([(sequence(rng, 20), 0)], LENGTH)

    def gradient(policy):
        blueprint = Blueprint(ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=32, remat=policy), VOCAB, WIDTH)
        return jax.grad(lambda p: jnp.square(run((blueprint, p, items, rng), row)).sum())(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient("none"), gradient(remat))


def test_bfloat16_stays_near_float32(world):
    _, params, items, rng = world
    row = pack_row([(sequence(rng, 20), 0)], LENGTH)
    low = Blueprint(ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=32, dtype="bfloat16"), VOCAB, WIDTH)
    close, exact = run((low, params, items, rng), row), run(world, row)
    assert close.dtype == jnp.bfloat16
    np.testing.assert_allclose(close[:20].astype(jnp.float32), exact[:20], atol=0.1)


def test_one_mesh_axis_cannot_shard_two_dimensions():
    from m6rec_jax.model.sharding import spec

    with pytest.raises(ValueError, match="tensor.*two dimensions"):
        spec("kv", "ffn")
    with pytest.raises(ValueError, match="unknown logical axis 'heads'"):
        spec("heads")


def test_layers_one_behind_another_are_those_of_the_loop(world, monkeypatch):
    """Few layers on a CPU are no loop (block.unrolled); losses and gradients are the loop's, with dropout and remat."""
    blueprint, params, items, rng = world
    blueprint, items = (
        replace(blueprint, config=replace(CONFIG, dropout=0.2, remat="dots")),
        jax.tree.map(jnp.asarray, items),
    )
    row = pack_row([(sequence(rng, 9), 0), (sequence(rng, 6), 0)], LENGTH)
    view = View(*(row[name][None] for name in ("positions", "k_start", "k_end")))

    def loss(params):
        hidden = blueprint.bind(params).hidden(
            row["tokens"][None], row["item_rows"][None], view, items, jax.random.key(1)
        )
        return jnp.sum(jnp.sin(hidden))

    results, loops = [], []
    for most in (block.UNROLLED, 0):
        monkeypatch.setattr(block, "UNROLLED", most)
        lowered = jax.jit(jax.value_and_grad(lambda p: loss(p))).lower(params)
        loops.append(lowered.as_text().count("stablehlo.while"))
        results.append(lowered.compile()(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *results)
    assert loops[0] == loops[1] - 2  # forward and backward
