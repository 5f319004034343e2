"""The mixture of experts against a loop over tokens and experts: values, gradients, what is dropped and what is judged."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model import experts
from m6rec_jax.model.items import item_table
from m6rec_jax.model.layers import swiglu
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View, causal
from m6rec_jax.vocab import Vocab

CONFIG = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, ffn=32, experts=5, experts_per_token=2, expert_ffn=24,
                     dropout=0.0, embed_dropout=0.0, id_dropout=0.0)  # fmt: skip
B, T, D, E, F = 3, 12, CONFIG.width, CONFIG.experts, CONFIG.expert_width
LEAD = ("batch", None)


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    w = {"router": (D, E), "expert_gate": (E, D, F), "expert_up": (E, D, F), "expert_down": (E, F, D)}
    w = {name: jnp.asarray(rng.normal(size=s) * s[-2] ** -0.5, jnp.float32) for name, s in w.items()}
    real = np.arange(T) < np.array([T, 7, 10])[:, None]
    return jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), jnp.asarray(real), w


def one_by_one(y, real, w, config, room=None):
    """Each expert over all tokens, weighted by a softmax over the chosen logits; past `room` an expert takes none of a row."""
    logits = y @ w["router"]
    order = jnp.argsort(-logits, axis=-1)[..., : config.experts_per_token]
    best = jnp.take_along_axis(logits, order, axis=-1)
    scales = jax.nn.softmax(best, axis=-1) * real[..., None]
    kept, taken = np.ones(order.shape), np.zeros((B, E), int)
    for choice in range(config.experts_per_token if room else 0):
        for b, t in np.argwhere(np.asarray(real)):
            e = int(order[b, t, choice])
            kept[b, t, choice] = taken[b, e] < room
            taken[b, e] += 1
    out = 0
    for e in range(E):
        share = jnp.sum(jnp.where(order == e, scales * kept, 0), axis=-1)
        out += share[..., None] * (swiglu(y @ w["expert_gate"][e], y @ w["expert_up"][e]) @ w["expert_down"][e])
    probabilities = jax.nn.softmax(logits, axis=-1)[real]
    times = np.bincount(np.asarray(order[real]).ravel(), minlength=E) / order[real].size
    return out, E * jnp.sum(times * probabilities.mean(0)), ((1 - kept) * np.asarray(real)[..., None]).sum()


@pytest.mark.parametrize("room", [None, 3], ids=["dropless", "capacity"])
def test_values_and_gradients_are_those_of_a_loop_over_experts(room):
    y, real, w = drawn()
    config = replace(CONFIG, capacity_factor=(room or 0.0001) * E / (2 * T))

    def found(y, w):
        out, routing = experts.feed_forward(y, real, w, config, LEAD, dropless=room is None)
        return jnp.sum(jnp.sin(out)) + routing.balance / routing.tokens, (out, routing)

    def expected(y, w):
        out, balance, dropped = one_by_one(y, real, w, config, room)
        return jnp.sum(jnp.sin(out)) + balance, (out, balance, dropped)

    (loss, (got, routing)), gradients = jax.jit(jax.value_and_grad(found, (0, 1), has_aux=True))(y, w)
    (right, (out, balance, dropped)), slow = jax.value_and_grad(expected, (0, 1), has_aux=True)(y, w)
    np.testing.assert_allclose(got, out, atol=1e-5)
    np.testing.assert_allclose(routing.means()["balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(loss, right, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, slow)
    assert routing.dropped * CONFIG.experts_per_token == dropped and (dropped > 0) == (room is not None)
    assert not np.asarray(got)[~np.asarray(real)].any()  # padding is sent nowhere


def test_with_room_for_all_capacity_is_dropless():
    y, real, w = drawn(1)
    config = replace(CONFIG, capacity_factor=E / 2)
    some, none = (experts.feed_forward(y, real, w, config, LEAD, dropless)[0] for dropless in (False, True))
    np.testing.assert_allclose(some, none, atol=1e-6)


def test_padding_takes_no_place_from_a_token():
    y, real, w = drawn(2)
    config = replace(CONFIG, capacity_factor=0.5)
    run = lambda y: experts.feed_forward(y, real, w, config, LEAD, dropless=False)  # noqa: E731
    (a, told), (b, again) = run(y), run(jnp.where(real[..., None], y, 100.0))
    np.testing.assert_array_equal(a, b)
    assert told == again


def test_balance_is_one_when_experts_are_used_evenly_and_their_number_when_one_gets_all():
    y, real = jnp.eye(E)[jnp.arange(B * T * E).reshape(B, -1) % E], jnp.ones((B, T * E), bool)
    config = replace(CONFIG, experts_per_token=1)
    even, one = (experts.route(y, real, w, config)[2] for w in (20 * jnp.eye(E), jnp.zeros((E, E)).at[:, 2].set(20)))
    np.testing.assert_allclose(even.means()["balance"], 1, rtol=1e-4)
    np.testing.assert_allclose(one.means()["balance"], E, rtol=1e-4)


def test_routing_is_in_float32_when_the_model_is_not():
    y, real, w = drawn(3)
    y, low = y.astype(jnp.bfloat16), jax.tree.map(lambda x: x.astype(jnp.bfloat16), w) | {"router": w["router"]}
    _, chosen, _ = experts.route(y, real, w["router"], CONFIG)
    right = np.argsort(-np.asarray(y, np.float64) @ np.asarray(w["router"], np.float64), axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen[real], right[np.asarray(real)])
    out, _ = experts.feed_forward(y, real, low, CONFIG, LEAD)
    assert out.dtype == jnp.bfloat16


VOCAB, WIDTH = Vocab(200, (40,)), 6
SHARED = replace(CONFIG, shared_experts=1)


@pytest.fixture(scope="module", params=[CONFIG, SHARED, replace(CONFIG, routing="capacity", capacity_factor=0.5)],
                ids=["experts", "shared", "capacity"])  # fmt: skip
def model(request):
    rng = np.random.default_rng(0)
    blueprint = Blueprint(request.param, VOCAB, WIDTH)
    return (
        blueprint,
        blueprint.init(0),
        jax.tree.map(jnp.asarray, item_table(rng.normal(size=(40, WIDTH)), rng.random(40) < 0.8)),
    )


def test_prefill_and_extend_answer_as_whole_rows_do_whatever_routing_trains(model):
    """Two beams of a ragged prefix; each takes two more tokens, then one."""
    (blueprint, params, items), rng = model, np.random.default_rng(1)
    made, offset = blueprint.bind(params), VOCAB.levels[0].offset
    lengths, rows = np.array([6, 4]), rng.integers(0, 40, (2, 2, 9))
    rows[:, :, :6] = rows[:, :1, :6]
    whole = []
    for b, n in enumerate(lengths):
        row = np.concatenate([rows[b, :, :n], rows[b, :, 6:]], axis=1)
        whole.append(made.hidden(row + offset, row, causal(row.shape, np.full(2, n + 3)), items)[:, n - 1 :])
    last, prefix = made.prefill(rows[:, 0, :6] + offset, rows[:, 0, :6], lengths, items)
    suffix = (jnp.zeros((2, 2, 3, 2, 2, 4)),) * 2
    got = [jnp.broadcast_to(last[:, None, None], (2, 2, 1, D))]
    for at, n in ((0, 2), (2, 1)):
        new = rows[:, :, 6 + at : 6 + at + n]
        positions = jnp.broadcast_to(lengths[:, None, None] + at + np.arange(n), new.shape)
        lanes = jnp.broadcast_to(jnp.arange(2)[:, None], (2, 2, 3))
        x, suffix = made.extend(new + offset, new, positions, items, prefix, lengths, suffix, lanes, at)
        got.append(x)
    np.testing.assert_allclose(jnp.concatenate(got, axis=2), np.stack(whole), atol=1e-5)


def test_training_drops_with_capacity_alone(model):
    blueprint, params, items = model
    rows = np.random.default_rng(2).integers(0, 40, (2, 16))
    view = View(*(causal(rows.shape, np.array([16, 11]))))
    made = blueprint.bind(params)
    _, training = made.routed(rows, rows, view, items, jax.random.key(0))
    _, serving = made.routed(rows, rows, view, items)
    assert (training.dropped > 0) == (blueprint.config.routing == "capacity") and serving.dropped == 0
    assert (
        training.tokens == serving.tokens == 2 * 32
    )  # of layers and tokens: under `causal`, padding sees what it follows


@pytest.mark.parametrize("routing", ["dropless", "capacity"])
def test_a_dense_model_reports_nothing(routing):
    blueprint = Blueprint(replace(CONFIG, experts=0, routing=routing), VOCAB, WIDTH)
    assert not any("expert" in name or name == "router" for name in blueprint.shapes()["block"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts_per_token": 6}, "model.experts_per_token=6 is more than model.experts=5"),
        ({"experts": 0, "shared_experts": 1}, "model.shared_experts=1 and model.experts=0"),
        ({"routing": "random"}, "model.routing=random: must be one of dropless, capacity"),
        ({"capacity_factor": 0.0}, "model.capacity_factor=0.0: must be above 0"),
    ],
)
def test_contradictions_are_named(changes, says):
    with pytest.raises(InputError, match=says):
        replace(CONFIG, **changes)
