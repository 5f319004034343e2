"""What tuning adds to a frozen backbone: nothing at first, then only its own; many tasks in one batch as each alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model import applied, depth, tuning
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.model.tuning import METHODS, TuneSpec
from m6rec_jax.vocab import Vocab

CONFIG = ModelConfig(layers=3, width=32, heads=4, kv_heads=2, ffn=48, dropout=0.0, embed_dropout=0.0, id_dropout=0.0)
BLUEPRINT = Blueprint(CONFIG, Vocab(200, (40,)), 6)
ROWS, LENGTH = 5, 12


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    items = jax.device_put(item_table(rng.normal(size=(40, 6)), np.ones(40, bool)))
    tokens = rng.integers(4, 200, (ROWS, LENGTH)).astype(np.int32)
    lengths = np.array([12, 7, 9, 4, 11])
    return BLUEPRINT.init(0), items, np.where(np.arange(LENGTH) < lengths[:, None], tokens, 0), lengths


def view(lengths, causal=False):
    at = np.broadcast_to(np.arange(LENGTH), (len(lengths), LENGTH))
    real = at < lengths[:, None]
    end = np.where(real, at + 1 if causal else lengths[:, None], 0)
    return View(at, np.zeros_like(at), end)


@partial(jax.jit, static_argnums=0)
def states(spec, tuned, params, tokens, view, items):
    blueprint, params = depth.assembled(spec, BLUEPRINT, params, tuned)
    own = tuning.alone(spec, tuned, len(tokens))
    return blueprint.bind(params).routed(tokens, jnp.full_like(tokens, -1), view, items, tuned=own)[0]


def hidden(world, spec, tuned, causal=False):
    params, items, tokens, lengths = world
    return states(spec, tuned, params, tokens, view(lengths, causal), items)


def shaken(tuned, seed):
    """Tuned numbers as after training: none of them zero."""
    leaves, tree = jax.tree.flatten(tuned)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def real(lengths):
    return np.arange(LENGTH) < lengths[:, None]


@pytest.mark.parametrize("method", METHODS)
def test_it_begins_as_the_backbone(world, method):
    params, items, tokens, lengths = world
    spec = TuneSpec.of(CONFIG, method, 2, layers="add=2", targets=tuning.TARGETS if method == "lora" else ())
    plain = BLUEPRINT.bind(params).hidden(tokens, np.full_like(tokens, -1), view(lengths), items)
    tuned = depth.begin(spec, BLUEPRINT, params, 1)
    np.testing.assert_allclose(
        hidden(world, spec, tuned)[real(lengths)], plain[real(lengths)], atol=1e-5
    )  # behind prompts positions move
    moved = hidden(world, spec, shaken(tuned, 2))
    assert np.abs(moved - plain)[real(lengths)].max() > 0.01


def test_prompts_are_heard_beside_the_row_by_as_much_as_the_gates_are_open(world):
    """Of one layer: what the token's attention to the prompts alone brings, times the gate, head by head."""
    params = world[0]
    spec = TuneSpec.of(CONFIG, "prompt", 2, prompts=2)
    tuned = depth.begin(spec, BLUEPRINT, params, 0)
    rng = np.random.default_rng(1)
    q, mixed = (rng.normal(size=(ROWS, LENGTH, 2, 2, 8)).astype(np.float32) for _ in range(2))
    k, v = (rng.normal(size=(ROWS, 2 + LENGTH, 2, 8)).astype(np.float32) for _ in range(2))
    gate = rng.normal(size=(2, 2)).astype(np.float32)
    at = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH)) + 1  # the first of these is the second prompt
    own = tuning.alone(spec, tuned, ROWS)
    found = applied.heard(mixed, q, k, v, at, {"prompt_gate": gate}, own)
    weights = jax.nn.softmax(np.einsum("btkgh,bskh->btkgs", q, k[:, :2]) * 8**-0.5, axis=-1)
    told = np.einsum("btkgs,bskh->btkgh", weights, v[:, :2]) * gate[..., None]
    np.testing.assert_allclose(found[:, 1:], (mixed + told)[:, 1:], atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], mixed[:, 0])


def test_every_token_hears_every_prompt_of_its_own(world):
    params, _, _, lengths = world
    spec = TuneSpec.of(CONFIG, "prompt", 2, prompts=2)
    tuned = shaken(depth.begin(spec, BLUEPRINT, params, 0), 1)
    of = lambda rows: hidden(world, spec, tuned._replace(prompts={"rows": rows}), causal=True).sum(-1)  # noqa: E731
    gradient = jax.jacrev(of)(tuned.prompts["rows"])
    assert (np.abs(gradient).sum(3) > 0)[real(lengths)].all()


MIXED = (
    ("prompt", 2, {"prompts": 3}),
    ("lora", 4, {"targets": tuning.TARGETS}),
    ("option-adapter", 2, {"prompts": 5, "rank": 3}),
    ("option", 3, {"layers": "keep=0+2"}),
    ("adapter", 2, {"layers": "keep=2"}),
)


@pytest.mark.parametrize("causal", [False, True])
def test_a_mixed_batch_is_each_task_alone(world, causal):
    params, items, tokens, lengths = world
    specs = [TuneSpec.of(CONFIG, method, options, **more) for method, options, more in MIXED]
    tuned = [shaken(depth.begin(s, BLUEPRINT, params, i), i) for i, s in enumerate(specs)]
    stack = tuning.stack(specs, tuned, CONFIG, room=8)
    select = np.array([3, 0, 4, 1, 2])
    model = BLUEPRINT.bind(params)
    rows = np.full_like(tokens, -1)
    found = jax.jit(lambda stack, view: model.routed(tokens, rows, view, items, tuned=stack.chosen(select))[0])(
        stack, view(lengths, causal)
    )
    last = np.take_along_axis(found, (lengths - 1)[:, None, None], 1)[:, 0]
    mixed = tuning.option_logits(last, stack.weight[select], stack.bias[select])
    for row, k in enumerate(select):
        own = hidden(world, specs[k], tuned[k], causal)[row : row + 1, lengths[row] - 1]
        wanted = tuning.option_logits(own, *tuning.classifier(specs[k], tuned[k]))[0]
        np.testing.assert_allclose(mixed[row, : specs[k].options], wanted, atol=1e-5)
        assert (mixed[row, specs[k].options :] < -1e29).all()


def test_option_rows_are_prompt_and_classifier(world):
    """The gradient of one logit reaches the options' rows as prompts, of both options, and as the classifier, of its own."""
    params, _, _, lengths = world
    spec = TuneSpec.of(CONFIG, "option", 2, prompts=4)
    tuned = shaken(depth.begin(spec, BLUEPRINT, params, 0), 1)

    def logit(read, classify):
        state = hidden(world, spec, tuned._replace(prompts={"rows": read}))[:1, lengths[0] - 1]
        return tuning.option_logits(state, *tuning.classifier(spec, tuned._replace(prompts={"rows": classify})))[0, 1]

    as_prompt, as_classifier = jax.grad(logit, argnums=(0, 1))(*(tuned.prompts["rows"],) * 2)
    assert (np.abs(as_prompt).sum(-1) > 0).all()
    assert (np.abs(as_classifier).sum(-1) > 0).tolist() == [False, False, False, True]


def test_layers_that_stay_are_the_backbones_and_new_ones_are_added(world):
    params = world[0]
    spec = TuneSpec.of(CONFIG, "adapter", 2, layers="keep=0+2,add=1")
    tuned = depth.begin(spec, BLUEPRINT, params, 0)
    blueprint, own = depth.assembled(spec, BLUEPRINT, params, tuned)
    assert blueprint.config.layers == 3 and spec.layers == 3
    np.testing.assert_array_equal(own["block"]["query"][:2], params["block"]["query"][np.array([0, 2])])
    all_stay = TuneSpec.of(CONFIG, "lora", 2)
    same = depth.assembled(all_stay, BLUEPRINT, params, depth.begin(all_stay, BLUEPRINT, params, 0))[1]
    assert same is params  # nothing copied


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_arrays(world, method):
    for layers in ("", "keep=2,add=1"):
        spec = TuneSpec.of(CONFIG, method, 3, layers=layers)
        tuned = depth.begin(spec, BLUEPRINT, world[0], 0)
        assert depth.trained(spec, BLUEPRINT) == sum(x.size for x in jax.tree.leaves(tuned))
        back = tuning.from_arrays(spec, CONFIG, tuning.as_arrays(tuned))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, back, tuned))
        assert TuneSpec.from_dict(spec.as_dict()) == spec


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("prompts", 2, {}), "method=prompts: unknown; one of prompt, option"),
        (("option", 1, {}), "options=1"),
        (("option", 5, {"prompts": 4}), "prompts=4: fewer than the 5 options"),
        (("option", 5, {"rank": 4}), "rank=4: method option has nothing of low rank"),
        (("lora", 2, {"prompts": 4}), "prompts=4: method lora has no soft prompts"),
        (("lora", 2, {"targets": ("querry",)}), "targets=querry: unknown"),
        (("lora", 2, {"layers": "keep=4"}), "layers keep=4: the backbone has layers 0 to 2"),
        (("lora", 2, {"layers": "keep=2+1"}), "layers keep=2+1"),
        (("lora", 2, {"layers": "drop=1"}), "layers drop=1: not understood"),
    ],
)  # fmt: skip
def test_what_is_not_to_be_had_is_refused_in_one_line(wrong, says):
    method, options, more = wrong
    with pytest.raises(InputError, match=says.replace("+", r"\+")) as refused:
        TuneSpec.of(CONFIG, method, options, **more)
    assert "\n" not in str(refused.value)
