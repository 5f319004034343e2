"""The memory told before training is what the compiler then asks for, and what cannot fit is refused."""

from pathlib import Path

import jax
import pytest

from m6rec_jax.artifacts.run import Taught
from m6rec_jax.config import Config, DataConfig, DistillConfig, ModelConfig, OptimConfig, TrainConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import ItemTable
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.generator import Replacing, generator_of
from m6rec_jax.settings import load_config
from m6rec_jax.training import room
from m6rec_jax.training.distill import Teacher
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.room import check_room, memory_needed
from m6rec_jax.training.run import train
from m6rec_jax.training.sharding import axis_sizes, make_mesh
from m6rec_jax.training.state import TrainState, init_state
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import Vocab
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401

CONTENT = 64


def compiled_bytes(blueprint, config, items):
    """What XLA reserves for a step: arguments, results and everything in between."""
    array = jax.ShapeDtypeStruct
    optimizer, params = make_optimizer(config.optim, 10), blueprint.shapes()
    state = TrainState(params, jax.eval_shape(optimizer.init, params), array((), "int32"), array((), "int32"))
    whole = (1, config.data.rows, config.data.length)
    names = ("tokens", "item_rows", "positions", "k_start", "k_end", "targets", "task_ids", "segment_ids")
    batch = {name: array(whole, "int32") for name in names} | {"loss_weights": array(whole, "float32")}
    table = ItemTable(array((items, CONTENT), "float32"), array((items,), "bool"))
    step = make_train_step(blueprint, optimizer, 1, 0, 0.0, config.optim.negatives)
    used = step.lower(state, batch, table).compile().memory_analysis()
    return used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes


@pytest.mark.parametrize(
    ("model", "negatives"),
    [
        (ModelConfig(layers=1, width=64), 256),
        (ModelConfig(layers=3, width=128), 0),
        (ModelConfig(layers=1, width=128, dtype="bfloat16"), 0),
        (ModelConfig(layers=8, width=128, remat="dots"), 256),
        (ModelConfig(layers=8, width=128, remat="full"), 256),
    ],
)
def test_what_is_told_is_what_the_compiler_asks_for(model, negatives):
    config = Config(model, optim=OptimConfig(negatives=negatives), data=DataConfig(length=256, rows=16))
    blueprint = Blueprint(config.model, Vocab(1024, (100_096,)), CONTENT)
    told = sum(memory_needed(blueprint, config, make_mesh(config.mesh).shape, [100_096], donated=False).values())
    assert told == pytest.approx(compiled_bytes(blueprint, config, 100_096), rel=0.15)


def test_a_table_is_there_as_it_is_turned_and_as_a_gradient():
    """With little beside it: a step of descent, whose new state has no room for all three, and few positions."""
    config = Config(ModelConfig(layers=1, width=256), optim=OptimConfig(name="sgd"), data=DataConfig(length=64, rows=2))
    blueprint = Blueprint(config.model, Vocab(32_000, (50_048,)), CONTENT)
    told = sum(memory_needed(blueprint, config, make_mesh(config.mesh).shape, [50_048], donated=False).values())
    assert told == pytest.approx(compiled_bytes(blueprint, config, 50_048), rel=0.08)


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


WHOLE = Blueprint(ModelConfig(layers=2, width=64), Vocab(1024, (10_112,)), CONTENT)
LARGER = Blueprint(ModelConfig(layers=3, width=128), WHOLE.vocab, CONTENT)


@pytest.mark.parametrize(
    "optim", [OptimConfig(), OptimConfig(name="sgd"), OptimConfig(average=0.99)], ids=lambda o: f"{o.name}, {o.average}"
)
def test_what_is_told_of_the_state_the_generator_and_the_teacher_are_the_bytes_they_have(optim):
    config = Config(WHOLE.config, optim=optim, data=DataConfig(length=64, rows=4))
    replacing = Replacing(generator_of(WHOLE, config.replaced), config.replaced, (0,), (), 0.5)
    optimizer = make_optimizer(optim, 10)
    state = jax.eval_shape(lambda: init_state(WHOLE, optimizer, 0, optim.average > 0, replacing=replacing))
    lesson = Teacher(Path(), LARGER, Taught("", 1, ""), DistillConfig(teacher_layer=2)).lesson
    mesh = make_mesh(config.mesh).shape
    told = memory_needed(WHOLE, config, mesh, [10_112], True, replacing.generator, lesson.blueprint)
    held = bytes_of((state.params, state.optimizer, state.average))
    assert told["parameters and moments"] == pytest.approx(held, rel=1e-4)
    of_generator = (state.beside.params, state.beside.moments, state.beside.params["generator"])  # and its gradient
    assert told["the generator"] == pytest.approx(bytes_of(of_generator), rel=1e-2)  # less the head, of width + 1
    of_teacher = LARGER.shapes()
    cut = {
        **of_teacher,
        "block": jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), of_teacher["block"]),
    }
    assert told["the teacher"] == bytes_of(cut) < bytes_of(of_teacher)
    alone = memory_needed(WHOLE, config, mesh, [10_112], True)
    assert alone["the teacher"] == alone["the generator"] == 0 < told["activations"] - alone["activations"]


def test_every_part_grows_with_what_it_holds():
    small = Config(data=DataConfig(length=128, rows=8), optim=OptimConfig(negatives=256))
    mesh = make_mesh(small.mesh).shape

    def parts(items=10_112, model=small.model, optim=small.optim, data=small.data, width=CONTENT, generator=None):
        config = Config(model, optim=optim, data=data)
        return memory_needed(Blueprint(model, Vocab(1024, (items,)), width), config, mesh, [items], True, generator)

    base = parts()
    assert parts(items=20_224)["parameters and moments"] > 1.5 * base["parameters and moments"]
    assert parts(width=2 * CONTENT)["item features"] == 2 * base["item features"]
    assert parts(data=DataConfig(length=128, rows=16))["activations"] == 2 * base["activations"]
    assert parts(optim=OptimConfig(negatives=0))["scores over the vocabulary"] > 10 * base["scores over the vocabulary"]
    averaged = parts(optim=OptimConfig(negatives=256, average=0.9))["parameters and moments"]
    assert averaged == pytest.approx(4 / 3 * base["parameters and moments"])
    twin = parts(generator=Blueprint(small.model, Vocab(1024, (10_112,)), CONTENT))
    beside = base["parameters and moments"] + base["gradients and the new state"]
    assert (base["the generator"], twin["the generator"]) == (0, pytest.approx(beside))


def test_a_catalogue_of_a_million_items_is_told_and_where_it_cannot_fit_refused(tmp_path, monkeypatch, capsys):
    config = Config(ModelConfig(layers=1, width=128), data=DataConfig(length=64, rows=16))
    blueprint, mesh = Blueprint(config.model, Vocab(8000, (1_000_000,)), 128), make_mesh(config.mesh)
    wide = Config(ModelConfig(layers=1, width=1024, heads=8), data=config.data)
    larger = Blueprint(wide.model, blueprint.vocab, 128)
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)  # no limit of its own
    (tmp_path / "meminfo").write_text("MemAvailable:   25165824 kB\n")
    with pytest.raises(InputError, match="of 24.0 GiB that are free .*1,000,000 items.*prepare --levels 3"):
        check_room(larger, wide, mesh, [1_000_000])
    fits = Config(config.model, data=config.data, optim=OptimConfig(negatives=2048))
    check_room(blueprint, fits, mesh, [1_000_000])
    assert "memory a device: about 3." in capsys.readouterr().err
    (tmp_path / "meminfo").unlink()
    check_room(larger, wide, mesh, [1_000_000])  # where nobody knows what is free, nothing is refused


def test_a_container_has_what_it_is_given_and_what_may_fit_is_tried(tmp_path, monkeypatch, capsys):
    config = Config(ModelConfig(layers=1, width=128), data=DataConfig(length=64, rows=16))
    blueprint, mesh = Blueprint(config.model, Vocab(8000, (200_000,)), 128), make_mesh(config.mesh)
    need = sum(memory_needed(blueprint, config, mesh.shape, [200_000], donated=False).values())
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemAvailable:   999999999 kB\n")
    cached = 3 * int(need)  # files in memory, which give way
    (tmp_path / "memory.current").write_text(f"{1000 + cached}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1000\nactive_file {cached // 3}\ninactive_file {cached // 3 * 2}\n")
    for share, limit in ((0.9, str(int(need * 0.9) + 1000)), (0.5, str(int(need * 0.5) + 1000)), (9, "max")):
        (tmp_path / "memory.max").write_text(limit)
        if share == 0.5:
            with pytest.raises(InputError, match="does not fit"):
                check_room(blueprint, config, mesh, [200_000])
        else:
            check_room(blueprint, config, mesh, [200_000])
        assert ("may not fit" in capsys.readouterr().err) == (share == 0.9)


@pytest.mark.parametrize(("name", "devices", "gib"), [("base", 8, 40), ("1b", 16, 80), ("7b", 64, 80)])
def test_shipped_configurations_fit_the_hardware_they_name(name, devices, gib):
    config = load_config([name])
    mesh = axis_sizes(config.mesh, devices)
    blueprint = Blueprint(config.model, Vocab(32_000, (256, 256, 256)), 256)
    assert sum(memory_needed(blueprint, config, mesh, [1_000_000]).values()) / room.GIB < gib


def test_a_run_that_does_not_fit_leaves_nothing(tiny_dataset, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemAvailable:   100 kB\n")
    with pytest.raises(InputError, match="does not fit"):
        train(Config(train=TrainConfig(steps=200)), [tiny_dataset], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_positions_and_layers_over_devices_take_less_of_each():
    config = load_config(["7b"])
    blueprint = Blueprint(config.model, Vocab(32_000, (100_000,)), 256)
    need = lambda **axes: memory_needed(blueprint, config, {**axis_sizes(config.mesh, 64), **axes}, [100_000])  # noqa: E731
    one, positions, layers = need(), need(sequence=4), need(stage=4)
    assert positions["activations"] == pytest.approx(one["activations"] / 4)
    assert positions["parameters and moments"] == one["parameters and moments"]
    assert layers["activations"] < one["activations"] / 2
    assert layers["parameters and moments"] < 0.35 * one["parameters and moments"]  # tables are not dealt over stages
