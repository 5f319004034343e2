"""`m6rec plan` counts what a step runs beside its model: the generator of replaced-token detection, and a teacher."""

import dataclasses
import platform
import sys

import jax
import pytest

from m6rec_jax.cli import main
from m6rec_jax.config import Config, DataConfig, DistillConfig, MeshConfig, MixtureConfig, ModelConfig, ReplacedConfig
from m6rec_jax.errors import InputError
from m6rec_jax.topologies import Topology
from m6rec_jax.training.beside import begun
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.plan import search
from m6rec_jax.training.plan.clock import compute, spent
from m6rec_jax.training.plan.hardware import place_of
from m6rec_jax.training.plan.lower import blueprint_of
from m6rec_jax.training.plan.others import Others, others_of, replaced_share, shapes_of, unsaid
from m6rec_jax.training.plan.report import works_of
from m6rec_jax.training.sharding import make_mesh

MODEL = ModelConfig(layers=2, width=128, heads=4, kv_heads=2, dtype="bfloat16", remat="full")
TEACHER = ModelConfig(layers=6, width=256, heads=4)
CONFIG = Config(
    MODEL,
    data=DataConfig(length=64, rows=16, replace_rate=0.2),
    mixture=MixtureConfig({"text-replaced": 0.0, "next-item": 0.6, "behaviour-replaced": 0.2}),
    distill=DistillConfig(teacher_layer=4),
    replaced=ReplacedConfig(layers=1, width=64),
)
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.fixture
def others():
    return others_of(CONFIG, blueprint_of(CONFIG, 500, 100, 8), make_mesh(MeshConfig()), TEACHER)


def test_a_step_takes_shapes_of_what_training_makes(others):
    placed = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    assert others.replacing.tasks == (1,) and others.replacing.histories == (
        0,
    )  # pools of tasks without a share there are none
    optimizer = make_optimizer(CONFIG.optim, 10)
    beside, teacher = shapes_of(others, MODEL.width, optimizer, placed)
    made = jax.eval_shape(lambda: begun(others.replacing, MODEL.width, optimizer, 0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), beside) == jax.tree.map(lambda x: (x.shape, x.dtype), made)
    assert {x.shape[0] for x in jax.tree.leaves(teacher["block"])} == {CONFIG.distill.teacher_layer}
    assert shapes_of(Others(), MODEL.width, optimizer, placed) == (None, None)


def test_the_generator_learns_and_the_teacher_only_answers(others):
    model, generator, teacher = works_of(
        CONFIG, blueprint_of(CONFIG, 500, 100, 8), ONE, others.generator, others.teacher
    )
    tokens = 16 * 64
    entries = lambda of: sum(x.size for x in jax.tree.leaves(of.shapes()["block"]) if x.ndim > 2)  # noqa: E731
    seen = lambda layers, width: layers * width * 64  # noqa: E731
    written = 0.2 * 0.2 / 0.8 * 4 / 3  # a share of a share, and once more to draw
    assert replaced_share(CONFIG) == pytest.approx(0.2 * 0.2 / 0.8)
    assert generator.flops() == pytest.approx(
        6 * tokens * (entries(others.generator) + seen(1, 64) + written * 512 * 64)
    )
    assert teacher.flops() == 2 * tokens * (entries(others.teacher) + seen(4, 256))
    at = place_of("tpu:v5e:2x2")
    together, alone = spent([model, generator, teacher], at), spent([model], at)
    assert all(getattr(together, part) > getattr(alone, part) for part in ("products", "attention", "memory"))
    taught = dataclasses.replace(teacher, learns=True)
    asked, learnt = compute([teacher], at.chip), compute([taught], at.chip)
    assert all(2 * getattr(asked, part) < getattr(learnt, part) for part in ("products", "attention", "memory"))
    sharded = [dataclasses.replace(work, chips=4, fsdp=4) for work in (teacher, taught)]
    assert spent(sharded[:1], at).exposed == 0 < spent(sharded[1:], at).exposed


def test_the_search_makes_room_for_them(monkeypatch):
    monkeypatch.setattr(search, "ROWS", (1, 8))
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, remat="none"))
    at = Topology("tpu:v5e:2x2", [None] * 4, None)  # type: ignore[list-item]
    blueprint = blueprint_of(config, 500, 100, 8)
    plain = dataclasses.replace(config, mixture=MixtureConfig({"next-item": 1.0}))
    by = lambda found: {one.overrides: one for one in found}  # noqa: E731
    without = by(search.candidates(at, plain, blueprint, [500]))
    written = by(search.candidates(at, config, blueprint, [500]))
    taught = by(search.candidates(at, config, blueprint, [500], TEACHER))
    assert taught.keys() <= written.keys() <= without.keys() and taught
    for way, one in taught.items():
        assert one.memory > written[way].memory > without[way].memory
        assert one.seconds > written[way].seconds > without[way].seconds


def test_a_teacher_that_was_not_named_is_said_and_one_that_does_not_fit_is_refused(others):
    alone = others._replace(lesson=None)
    assert "--teacher" in unsaid(CONFIG, alone) and unsaid(CONFIG, others) == ""
    plain = dataclasses.replace(CONFIG, distill=DistillConfig())
    assert unsaid(plain, alone) == ""
    assert "retrieval" in unsaid(dataclasses.replace(plain, model=dataclasses.replace(plain.model, vectors=8)), alone)
    deep = dataclasses.replace(CONFIG, distill=DistillConfig(teacher_layer=7))
    with pytest.raises(InputError, match="--teacher: distill.teacher_layer=7, and that model has 6 layers"):
        others_of(deep, blueprint_of(deep, 500, 100, 8), make_mesh(MeshConfig()), TEACHER)


def test_what_no_mesh_mends_is_said_by_the_search_as_without_it():
    at = Topology("tpu:v5e:2x2", [None] * 4, None)  # type: ignore[list-item]
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(), distill=DistillConfig(teacher_layer=9))
    with pytest.raises(InputError, match="teacher_layer=9"):
        search.candidates(at, config, blueprint_of(config, 500, 100, 8), [500], TEACHER)


@pytest.mark.slow
@pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu is for Linux x86-64")
def test_the_verb_compiles_them_with_the_step(capsys):
    pytest.importorskip("libtpu")
    tiny = ["--model.layers=1", "--model.width=64", "--model.heads=2", "--data.length=32", "--data.rows=8", "--items=200",
            "--text-vocab=60000", "--content-width=8", "--mesh.fsdp=2", "--mesh.data=2"]  # fmt: skip
    more = ["--mixture.tasks={next-item: 0.8, behaviour-replaced: 0.2}", "--teacher=small", "--distill.heads=2"]
    assert main(["plan", "--config", "small", "--topology", "tpu:v5e:2x2", *tiny, *more]) == 0
    told = {line.split(",")[0].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert float(told["the teacher"]) > float(told["the generator"]) > 0
