"""A student learns the relations of its teacher, and the teacher learns nothing."""

import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.artifacts.checkpoints import step_folder, steps
from m6rec_jax.artifacts.run import read_run
from m6rec_jax.config import (  # fmt: skip
    CheckpointConfig,
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View, causal
from m6rec_jax.training.distill import Lesson, open_teacher, relation_loss
from m6rec_jax.training.metrics import read_rows
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import make_mesh
from m6rec_jax.training.step import slice_losses
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny, tiny_card, tiny_dataset, tiny_levels, tiny_root, tiny_tables  # noqa: F401
from tests.training.test_prune import params_of

CONFIG = Config(
    model=ModelConfig(layers=2, shared_layers=True, width=16, embed=8, heads=2),
    optim=OptimConfig(learning_rate=0.02, warmup=2),
    data=DataConfig(length=64, rows=4, block=512),
    checkpoint=CheckpointConfig(every=4, keep=4),
    train=TrainConfig(steps=8, log_every=2, eval_every=0),
    distill=DistillConfig(weight=2.0, heads=4),
)
BIG = replace(
    CONFIG, model=ModelConfig(layers=3, width=32, heads=4, kv_heads=2), train=TrainConfig(steps=3, eval_every=0)
)


@pytest.fixture(scope="module")
def teacher(tiny_dataset, tmp_path_factory):  # noqa: F811
    return train(BIG, [tiny_dataset], tmp_path_factory.mktemp("distill") / "teacher")


@pytest.fixture(scope="module")
def student(teacher, tiny_dataset):  # noqa: F811
    return train(CONFIG, [tiny_dataset], teacher.parent / "student", distill_from=teacher)


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    vocab, T = Vocab(200, (40,)), 10
    student, teacher = (Blueprint(c.model, vocab, 5) for c in (CONFIG, BIG))
    items = jax.tree.map(jnp.asarray, item_table(rng.normal(size=(40, 5)), np.ones(40, bool)))
    tokens = rng.integers(0, 200, (2, T)).astype(np.int32)
    view = causal((2, T), np.array([T, 7]))
    zeros = np.zeros((2, T), np.int32)
    batch = {
        "tokens": tokens,
        "item_rows": zeros - 1,
        "targets": tokens,
        "loss_weights": zeros + 1.0,
        "task_ids": zeros,
    }
    return student, teacher, items, jax.tree.map(jnp.asarray, batch | view._asdict())


def written_down(student, teacher, k_start, k_end, heads):
    """Wang et al. 2021, equations 4 and 5, a query at a time, over the tokens that it sees."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for b in range(len(k_end)):
            for t in range(k_end.shape[1]):
                seen = np.arange(k_start[b, t], k_end[b, t])
                if not len(seen):
                    continue
                told = []
                for x in (theirs, ours):
                    x = np.asarray(x[b], np.float64).reshape(len(x[b]), heads, -1)
                    scores = np.einsum("rd,srd->rs", x[t], x[seen]) / np.sqrt(x.shape[-1])
                    e = np.exp(scores - scores.max(1, keepdims=True))
                    told.append(e / e.sum(1, keepdims=True))
                total += (told[0] * np.log(told[0] / told[1])).sum() / heads
    return total


def test_the_loss_is_the_one_of_the_paper():
    rng = np.random.default_rng(1)
    draw = lambda K, G, h: tuple(rng.normal(size=(2, 6, K, *more, h)) for more in ((G,), (), ()))  # noqa: E731
    student, teacher = draw(2, 1, 6), draw(2, 2, 10)
    k_start, k_end = np.array([[0] * 6, [0, 0, 2, 2, 2, 0]]), np.array([[1, 2, 3, 6, 6, 6], [1, 2, 5, 5, 5, 0]])
    found = relation_loss(student, teacher, k_start, k_end, 4)
    np.testing.assert_allclose(found, written_down(student, teacher, k_start, k_end, 4), rtol=1e-5)


@partial(jax.jit, static_argnums=(0, 4))
def vectors_of(blueprint, params, items, batch, layer):
    view = View(batch["positions"], batch["k_start"], batch["k_end"])
    return blueprint.bind(params).observed(batch["tokens"], batch["item_rows"], view, items, None, layer)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(world):
    _, blueprint, items, batch = world
    params = blueprint.init(0)

    @partial(jax.jit, static_argnums=0)
    def told(layer, params):
        lesson = Lesson(blueprint, DistillConfig(student_layer=layer))
        return slice_losses(blueprint, 1, params, batch, items, lesson=lesson, teacher=params).relation

    assert abs(float(told(0, params))) < 1e-5
    assert float(told(2, params)) > 1e-3  # another layer is not like it


def test_gradients_reach_the_layers_below_in_the_student_and_nothing_in_the_teacher(world):
    student, teacher, items, batch = world
    lesson = Lesson(teacher, CONFIG.distill)

    def loss(params, of_teacher):
        return slice_losses(student, 1, params, batch, items, lesson=lesson, teacher=of_teacher).relation

    ours, theirs = jax.jit(jax.grad(loss, argnums=(0, 1)))(student.init(0), teacher.init(1))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(theirs))
    moved = {name for name, g in ours["block"].items() if np.abs(g).max() > 0}
    assert moved == set(ours["block"])  # what is looked at comes of all of a layer that is walked twice
    assert (np.asarray(ours["final_norm"]) == 0).all()


def test_looking_at_a_layer_changes_no_state_and_finds_its_own_vectors(world):
    _, blueprint, items, batch = world
    params = blueprint.init(3)
    view = View(batch["positions"], batch["k_start"], batch["k_end"])
    plain = jax.jit(lambda: blueprint.bind(params).hidden(batch["tokens"], batch["item_rows"], view, items))()
    for layer in range(3):
        hidden, _, vectors = vectors_of(blueprint, params, items, batch, layer)
        np.testing.assert_allclose(hidden, plain, atol=1e-5)
        short = replace(blueprint, config=replace(blueprint.config, layers=layer + 1))
        cut = {**params, "block": jax.tree.map(lambda w, n=layer + 1: w[:n], params["block"])}
        for one, other in zip(vectors, vectors_of(short, cut, items, batch, layer)[2], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_student_comes_nearer_its_teacher_and_names_it(student, teacher):
    rows = [row for row in read_rows(student) if "loss/distill" in row]
    assert rows[-1]["loss/distill"] < 0.7 * rows[0]["loss/distill"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    taught = read_run(student).teacher
    assert (taught.run, taught.step) == (str(teacher), 3)


def test_a_taught_run_resumes_to_the_bit_and_only_with_its_teacher(student, teacher, tiny_dataset, tmp_path):  # noqa: F811
    again, moved = tmp_path / "again", tmp_path / "moved"
    shutil.copytree(student, again)
    shutil.copytree(teacher, moved)
    shutil.rmtree(step_folder(again, 8))
    assert steps(again) == [4]
    with pytest.raises(InputError, match="was taught by step 3 of .*; name it again with --distill-from"):
        train(CONFIG, [tiny_dataset], again)
    with pytest.raises(InputError, match="finished step 3|holds other parameters than those"):
        train(CONFIG, [tiny_dataset], again, distill_from=student)
    train(CONFIG, [tiny_dataset], again, distill_from=moved)  # told by what it holds, not by its place
    for one, other in zip(*(jax.tree.leaves(params_of(r, 8)) for r in (student, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(InputError, match="was trained without a teacher"):
        train(BIG, [tiny_dataset], moved, distill_from=teacher)


def test_a_teacher_whose_ids_or_sizes_do_not_fit_is_refused(teacher, tiny, tiny_levels, tmp_path):  # noqa: F811
    mesh = make_mesh(CONFIG.mesh)
    blueprint = Blueprint(CONFIG.model, tiny.vocab, tiny.content.shape[1])
    other = prepare(tiny_card(tiny_tables(seed=4)), tmp_path / "other", vocab_size=600).path
    borrowed = prepare(tiny_card(tiny_tables()), tmp_path / "borrowed", levels=3, codebook=8, like=tiny.path, borrow="tokenizer").path  # fmt: skip
    opened = [open_dataset(path) for path in (other, borrowed)]
    vocabs = [replace(blueprint, vocab=dataset.vocab) for dataset in opened]
    for dataset, plan, changes, says in (
        (opened[0], vocabs[0], {}, "another tokenizer than"),
        (opened[1], vocabs[1], {}, "its ids are those of"),
        (tiny, blueprint, {"heads": 3}, "distill.heads=3 does not divide the 32 numbers of the teacher's"),
        (tiny, blueprint, {"teacher_layer": 4}, "distill.teacher_layer=4, and that model has 3 layers"),
        (tiny, blueprint, {"student_layer": 3}, "distill.student_layer=3, and that model has 2 layers"),
    ):
        config = replace(CONFIG, distill=replace(CONFIG.distill, **changes))
        with pytest.raises(InputError, match=says) as error:
            open_teacher(teacher, [dataset], plan, config, mesh, None)
        assert "\n" not in str(error.value) and str(error.value).startswith(f"--distill-from {teacher}: ")


def test_a_stated_layer_of_the_teacher_is_all_that_is_loaded(teacher, tiny):  # noqa: F811
    blueprint = Blueprint(CONFIG.model, tiny.vocab, tiny.content.shape[1])
    config = replace(CONFIG, distill=DistillConfig(teacher_layer=2, heads=4))
    opened = open_teacher(teacher, [tiny], blueprint, config, make_mesh(CONFIG.mesh), None)
    params = opened.load(make_mesh(CONFIG.mesh))
    assert {x.shape[0] for x in jax.tree.leaves(params["block"])} == {2} == {opened.lesson.blueprint.config.layers}
    for name, x in params_of(teacher, 3)["block"].items():
        np.testing.assert_array_equal(params["block"][name], jnp.asarray(x)[:2])
