"""Tuned tasks of all methods served in one batch over one backbone: each comes out as it does alone."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.artifacts.tuned import Artefact, backbone_digests
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.instances.layout import Laid
from m6rec_jax.decoding import tuned as serving
from m6rec_jax.decoding.instances import InstanceScorer
from m6rec_jax.decoding.sampling import writable
from m6rec_jax.decoding.tuned import TunedServer
from m6rec_jax.errors import InputError
from m6rec_jax.model import depth, tuning
from m6rec_jax.model.depth import Backbone
from m6rec_jax.model.items import widened
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.tuning import TuneSpec
from m6rec_jax.training.tune.rows import TuneRows
from m6rec_jax.training.tune.step import scores, states
from m6rec_jax.vocab import BOS, EOS, OPTIONS
from tests.tuning import END_SOURCE, END_TARGET, FIRST, SOURCE, TARGET, VOCAB, backbone, options_rows

CONFIG = ModelConfig(layers=3, width=32, heads=2, ffn=48, dropout=0.0, embed_dropout=0.0)
TASKS = {
    "click": ("prompt", 2, {}),
    "topic": ("lora", 5, {"targets": tuning.TARGETS}),
    "mood": ("option-adapter", 3, {"prompts": 6}),
    "stars": ("option", 5, {"layers": "keep=2"}),
    "deep": ("adapter", 2, {"layers": "keep=0+2,add=1"}),
    "own": ("full", 2, {}),
}


@pytest.fixture(scope="module")
def frozen():
    return backbone(CONFIG)


TEXTS = {
    "say": ("prompt", 0, {"prompts": 3}),
    "tell": ("option-adapter", 0, {"prompts": 6, "layers": "keep=0+1"}),
    "name": ("lora", 0, {}),
}


@pytest.fixture(scope="module")
def artefacts(frozen, tmp_path_factory):
    return tuned(frozen, tmp_path_factory.getbasetemp(), TASKS)


def tuned(frozen, folder, tasks):
    """Artefacts of tasks, with numbers as after training: none of them zero."""
    held, made = backbone_digests(frozen.params), {}
    for seed, (name, (method, options, more)) in enumerate(tasks.items()):
        spec = TuneSpec.of(CONFIG, method, options, **more)
        leaves, tree = jax.tree.flatten(depth.begin(spec, frozen.blueprint, frozen.params, seed))
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        moved = tree.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
        if "prompt_gate" in moved.layers:
            moved.layers["prompt_gate"] *= 10  # open enough to be heard in every word
        task = {"name": name, "options": [f"o{i}" for i in range(options)]}
        arrays = tuning.as_arrays(jax.device_get(moved))
        made[name] = Artefact(folder / name, spec.as_dict(), task, held, {}, arrays)
    return made


def requests(n=24):
    rows = options_rows(5, n)
    return [list(TASKS)[i % len(TASKS)] for i in range(n)], list(zip(rows.source, rows.source_rows, strict=True))


def test_a_mixed_batch_is_each_task_alone(frozen, artefacts):
    """Against a server of one task, and against what training validates with."""
    names, prompts = requests()
    server = TunedServer(frozen)
    server.add(*artefacts.values())
    mixed = server.score(names, prompts)
    for name, artefact in artefacts.items():
        own = [i for i, one in enumerate(names) if one == name]
        single = TunedServer(frozen)
        single.add(artefact)
        spec = TuneSpec.from_dict(artefact.spec)
        batch = options_rows(5, len(names)).batch(np.array(own), len(own), 16)
        own_numbers = tuning.from_arrays(spec, CONFIG, artefact.arrays)
        validated = scores(spec, frozen.blueprint, own_numbers, frozen.params, batch, frozen.items)[2]
        for i, alone, wanted in zip(own, single.score([name] * len(own), [prompts[i] for i in own]), validated, strict=True):  # fmt: skip
            assert mixed[i].shape == (spec.options,)
            np.testing.assert_allclose(mixed[i], alone, atol=1e-5)
            np.testing.assert_allclose(mixed[i], wanted, atol=1e-5)
            np.testing.assert_allclose(np.exp(mixed[i]).sum(), 1.0, atol=1e-5)


def test_one_task_more_compiles_nothing_and_copies_nothing_of_the_backbone(frozen, artefacts):
    _, prompts = requests()
    server = TunedServer(frozen)
    light = [artefacts[name] for name in ("click", "topic", "mood", "stars")]
    server.add(*light)
    server.score(["mood"] * 4, prompts[:4])
    compiled = serving._score._cache_size()
    other = Artefact(light[0].path, light[0].spec, {**light[0].task, "name": "more"}, light[0].backbone, {}, light[0].arrays)  # fmt: skip
    server.add(other)
    first, again = server.score(["click", "more"], [prompts[0], prompts[0]])
    server.score(["more", "stars", "topic", "mood"], prompts[:4])
    np.testing.assert_allclose(first, again, atol=1e-6)
    assert serving._score._cache_size() <= compiled + 1  # two rows are a shape of their own; four are not
    assert [group.params for group in server._groups] == [server.params]
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (server._groups[0].params, server.params)), strict=True))
    server.drop("more")
    with pytest.raises(InputError, match="task more: not served; there are click, topic, mood, stars"):
        server.score(["more"], prompts[:1])


def test_another_backbone_and_other_options_are_refused(frozen, artefacts):
    other = backbone(CONFIG, seed=1)
    with pytest.raises(InputError, match="tuned on another backbone: .* arrays differ") as refused:
        TunedServer(other).add(artefacts["click"])
    assert "\n" not in str(refused.value)
    mood = artefacts["mood"]
    with pytest.raises(InputError, match="tuned for 3 options, and the task mood has 2"):
        mood.check_options(["o0", "o1"])
    with pytest.raises(InputError, match="its option 'o2' is 'new' in the task mood"):
        mood.check_options(["o0", "o1", "new"])
    mood.check_options(["o0", "o1", "o2"])
    server = TunedServer(frozen)
    two = Artefact(mood.path, mood.spec, {**mood.task, "options": ["o0", "o1"]}, mood.backbone, {}, mood.arrays)
    with pytest.raises(InputError, match="2 options by name and 3 tuned"):
        server.add(two)
    assert not server.tasks


def test_texts_of_several_tasks_are_those_of_each_alone(frozen, tmp_path):
    """Against the likeliest next token of whole rows, read again for every token."""
    texts, most = tuned(frozen, tmp_path, TEXTS), 5
    server = TunedServer(frozen)
    server.add(*texts.values())
    rows = options_rows(6, 6)
    prompts = [(s[:-1], r[:-1]) for s, r in zip(rows.source, rows.source_rows, strict=True)]
    names = [list(TEXTS)[i % 3] for i in range(6)]
    written = server.write(names, prompts, most)
    may = writable(VOCAB.text, jnp.zeros(1, bool))[0]
    for name, artefact in texts.items():
        spec = TuneSpec.from_dict(artefact.spec)
        own = tuning.from_arrays(spec, CONFIG, artefact.arrays)

        @jax.jit
        def after(tokens, lengths, spec=spec, own=own):
            batch = {"tokens": tokens, "item_rows": jnp.full_like(tokens, -1), "lengths": lengths}
            model, hidden = states(spec, frozen.blueprint, frozen.params, own, batch, frozen.items, None)
            last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
            return jnp.argmax(jnp.where(may, model.logits(last, 0, frozen.items), -jnp.inf), axis=-1)

        for i in [i for i, one in enumerate(names) if one == name]:
            wanted = prompts[i][0].tolist()
            while len(wanted) < len(prompts[i][0]) + most:
                token = int(after(np.array([wanted + [0] * (24 - len(wanted))], np.int32), np.array([len(wanted)]))[0])
                if token == EOS:
                    break
                wanted.append(token)
            assert written[i].tolist() == wanted[len(prompts[i][0]) :]
    assert len({tuple(one.tolist()) for one in written}) > 1
    with pytest.raises(InputError, match="task say: has no options"):
        server.score(["say"], prompts[:1])


@pytest.mark.parametrize("method", ["adapter", "option-adapter"])
def test_before_the_first_step_a_tuned_task_is_what_pretraining_learnt(tmp_path, method):
    """With the rows of the options' table and what else does nothing yet, requests of all lengths included."""
    vocab = replace(VOCAB, options=(2,))
    blueprint = Blueprint(CONFIG, vocab, 6)
    held = Backbone(blueprint, blueprint.init(4), backbone(CONFIG).items, {"run": "runs/tiny", "step": 7})
    rng = np.random.default_rng(0)
    words = lambda most: rng.integers(FIRST, FIRST + 8, rng.integers(0, most))  # noqa: E731
    told = [np.array([BOS, SOURCE, *words(12), END_SOURCE, TARGET, *words(6), END_TARGET], np.int32) for _ in range(20)]
    laid = [
        Laid(one, np.full(len(one), -1, np.int32), *[np.zeros(0, np.int32)] * 2, np.zeros((0, 2), int)) for one in told
    ]
    scorer = InstanceScorer(blueprint, held.params, held.items, [{"name": "click", "options": ["no", "yes"]}])
    embeddings = held.params["embeddings"]
    rows = np.asarray(widened(embeddings, embeddings["tables"][OPTIONS][:2]))
    spec = TuneSpec.of(CONFIG, method, 2)
    fresh = tuning.as_arrays(jax.device_get(depth.begin(spec, blueprint, held.params, 0, rows)))
    server = TunedServer(held)
    server.add(Artefact(tmp_path, spec.as_dict(), {"name": "click", "options": ["no", "yes"]}, backbone_digests(held.params), {}, fresh))  # fmt: skip
    found = np.exp(np.stack(server.score(["click"] * 20, [(one.source, one.source_rows) for one in laid])))
    np.testing.assert_allclose(found, scorer.option_chances("click", laid), atol=1e-5)
    assert found[:, 1].std() > 1e-3
    train = TuneRows.with_options(told, [one.source_rows for one in laid], np.zeros(20, np.int32))
    batch = train.batch(np.arange(20), 20, 32)
    tuned = tuning.from_arrays(spec, CONFIG, fresh)
    logp = scores(spec, blueprint, tuned, held.params, batch, held.items)[2]  # and so does training read them
    np.testing.assert_allclose(np.exp(logp), found, atol=1e-5)
