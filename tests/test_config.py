"""Configuration: layers, overrides and their order, errors of one line, and the shipped files."""

import re
from dataclasses import fields

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from m6rec_jax.config import Config, DataConfig, MixtureConfig, ModelConfig, OptimConfig, TrainConfig, dump_config
from m6rec_jax.errors import InputError
from m6rec_jax.model.transformer import Transformer
from m6rec_jax.settings import SECTIONS, field_help, load_config, shipped
from m6rec_jax.vocab import Vocab


@pytest.fixture
def write(tmp_path):
    def _write(name, text):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return _write


def test_later_files_win_and_the_command_line_wins_over_files(write):
    a = write("a.yaml", "model: {layers: 4, width: 128}\noptim: {learning_rate: 1e-4}\n")
    b = write("b.yaml", "model: {layers: 6}\n")
    made = load_config([a, b], ["--model.width=96"])
    assert (made.model.layers, made.model.width, made.optim.learning_rate) == (6, 96, 1e-4)
    assert load_config([b, a]).model.layers == 4
    assert load_config([], ["--model.width=96", "--config", str(a)]).model.width == 96


def test_what_no_file_says_keeps_its_default(write):
    assert load_config([write("a.yaml", "model: {layers: 4}\n")]) == Config(model=ModelConfig(layers=4))


def test_a_mixture_in_a_file_replaces_the_default_one_and_an_override_changes_one_share(write):
    a = write("a.yaml", "mixture: {tasks: {next-item: 1.0, text-causal: 0.5}}\n")
    assert load_config([a]).mixture.tasks == {"next-item": 1.0, "text-causal": 0.5}
    changed = load_config([a], ["--mixture.tasks.text-causal=0.25"]).mixture.tasks
    assert changed == {"next-item": 1.0, "text-causal": 0.25}


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 99),
    rate=st.floats(1e-12, 1.0),
    theta=st.floats(1.0, 1e9),
    remat=st.sampled_from(["none", "dots", "full"]),
    tasks=st.dictionaries(st.from_regex(r"[a-z]{1,8}(-[a-z]{1,4})?", fullmatch=True), st.floats(0.01, 9), min_size=1),
)
def test_what_is_dumped_is_loaded_as_the_same(tmp_path_factory, layers, rate, theta, remat, tasks):
    made = Config.from_dict(
        {
            "model": {"layers": layers, "rope_theta": theta, "remat": remat},
            "optim": {"learning_rate": rate},
            "mixture": {"tasks": tasks},
        }
    )
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(made))
    assert load_config([path]) == made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {layer: 4}", ["model.layer", "did you mean model.layers?"]),
        ("modell: {layers: 4}", ["modell", "did you mean model?"]),
        ("steps: 5", ["steps", "model, mesh"]),
        ("model: {layers: many}", ["model.layers=many", "a whole number"]),
        ("model: {layers: 1.5}", ["model.layers=1.5", "a whole number"]),
        ("model: {dtype: f16}", ["model.dtype=f16", "float32, bfloat16"]),
        ("model: {content: 5}", ["model.content=5", "true or false"]),
        ("model: 3", ["model=3", "layers"]),
        ("mixture: {tasks: [next-item]}", ["mixture.tasks", "next-item: 0.6"]),
        ("- model", ["['model']", "sections"]),
        ("", ["nothing"]),
        ("model: {layers: [", ["not readable as YAML"]),
        ("model: {1: 2}", ["model.1", "unknown key"]),
    ],
)
def test_a_wrong_file_is_one_line_with_file_key_and_way_out(write, text, says):
    path = write("wrong.yaml", text + "\n")
    with pytest.raises(InputError) as caught:
        load_config([path])
    line = str(caught.value)
    assert "\n" not in line
    for part in [str(path), *says]:
        assert part in line


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--model.layer=5", "did you mean --model.layers?"),
        ("--learning_rate=1", "did you mean --optim.learning_rate?"),
        ("--model.layers=x", "--model.layers=x: must be a whole number"),
        ("--model.remat=some", "one of none, dots, full"),
        ("--model.attention=flash", "one of auto, xla, splash, tokamax"),
        (
            "--model.attention=tokamax",
            "model.attention=tokamax and model.dtype=float32: its kernels compute in bfloat16",
        ),
        ("--model.heads=5", "model.heads=5 does not divide model.width=64"),
        ("--optim.warmup=1000", "optim.warmup=1000 is not below train.steps=1000"),
        ("--train.accumulate=3", "train.accumulate=3 does not divide data.rows=32"),
        ("--config=nowhere.yaml", "nowhere.yaml: no such file; the shipped configurations are"),
        ("extra", "one word too many"),
    ],
)
def test_a_wrong_option_is_one_line(option, says):
    with pytest.raises(InputError) as caught:
        load_config([], [option])
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", SECTIONS.values(), ids=SECTIONS)
def test_every_setting_has_a_help_text(kind):
    assert list(field_help(kind)) == [f.name for f in fields(kind)]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ModelConfig(heads=3), "model.heads=3"),
        (lambda: ModelConfig(width=6, heads=2), "odd head size"),
        (lambda: ModelConfig(attention="flash"), "model.attention=flash: must be one of auto, xla, splash, tokamax"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout=1.0"),
        (lambda: DataConfig(length=8), "data.length=8"),
        (lambda: Config(optim=OptimConfig(warmup=9), train=TrainConfig(steps=9)), "optim.warmup=9"),
        (lambda: Config.from_dict({"model": {"depth": 3}}), "model.depth"),
    ],
)
def test_contradictions_raise_when_made(make, says):
    with pytest.raises(InputError, match=re.escape(says)):
        make()


# One value outside the range of every number, at its edge where the range is open; and one inside.
OUTSIDE = {
    "model": {"layers": 0, "width": 0, "heads": 0, "kv_heads": -2, "ffn": -1, "dropout": 1.0, "embed_dropout": 1.0,
              "id_dropout": 1.0, "rope_theta": 0.0, "norm_eps": 0.0, "experts": -1, "experts_per_token": 0, "expert_ffn": -1,
              "shared_experts": -1, "capacity_factor": 0.0, "balance": -0.1, "router_z": -0.1, "microbatches": -1,
              "embed": -1, "late": -1, "vectors": -1},
    "mesh": {"data": 0, "fsdp": 0, "tensor": -2, "sequence": 0, "expert": 0, "stage": 0},
    "optim": {"learning_rate": 0.0, "warmup": -1, "final": 1.5, "weight_decay": -0.1, "b1": 1.0, "b2": 1.0, "clip": 0.0,
              "label_smoothing": 1.0,
              "average": 1.0, "negatives": -1},
    "data": {"length": 15, "rows": -1, "mask_rate": 1.0, "replace_rate": 1.0, "block": 0, "threads": -1, "bad_records": -1},
    "mixture": {"temperature": -0.1},
    "checkpoint": {"every": 0, "keep": 0},
    "train": {"steps": 0, "epochs": -0.5, "accumulate": 0, "log_every": 0, "eval_every": -1, "patience": -1, "seed": 2**32,
              "explode": 0.5, "max_skips": 0, "spike": -0.1, "rewinds": -1, "hang_seconds": -1.0},
    "distill": {"weight": 0.0, "heads": -1, "teacher_layer": -1, "student_layer": -1},
    "prune": {"sparsity": 1.0, "begin": -1, "end": -1, "every": 0},
    "replaced": {"weight": 0.0, "layers": 0, "width": -1, "reward": -0.1, "augment": 1.5},
}  # fmt: skip
EDGE = {
    "model": {"kv_heads": 0, "ffn": 0, "dropout": 0.0},
    "mesh": {"data": -1, "tensor": 1},
    "optim": {"warmup": 0, "final": 1.0, "weight_decay": 0.0, "b1": 0.0, "clip": float("inf"), "label_smoothing": 0.0},
    "data": {"length": 16, "block": 1, "threads": 0},
    "mixture": {"temperature": 0.0},
    "checkpoint": {"every": 1, "keep": 1},
    "replaced": {"reward": 0.0, "augment": 1.0},
    "train": {"log_every": 1, "eval_every": 0, "patience": 0, "seed": 2**32 - 1},
}
NUMBERS = [(s, f.name) for s, kind in SECTIONS.items() for f in fields(kind) if type(getattr(kind(), f.name)) in (int, float)]  # fmt: skip


@pytest.mark.parametrize(("section", "name"), NUMBERS, ids=[f"{section}.{name}" for section, name in NUMBERS])
def test_every_number_has_a_range_and_the_error_names_it(section, name):
    for value in (OUTSIDE[section][name], -2, float("nan"), float("-inf")):
        with pytest.raises(InputError, match=re.escape(f"{section}.{name}={value}: must ")):
            SECTIONS[section](**{name: value})


@pytest.mark.parametrize("section", EDGE)
def test_the_edge_of_a_range_belongs_to_it(section):
    assert SECTIONS[section](**EDGE[section])


def test_choices_and_shares_are_checked_in_python_too():
    with pytest.raises(InputError, match="model.dtype=f16: must be one of float32, bfloat16"):
        ModelConfig(dtype="f16")
    for share in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InputError, match=re.escape(f"mixture.tasks.next-item={share}")):
            MixtureConfig({"next-item": share})


def test_the_five_sizes_are_shipped():
    assert {"demo", "small", "base", "1b", "7b"} <= set(shipped())


def parameters(module):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(("name", "path"), shipped().items(), ids=shipped())
def test_shipped_files_say_how_many_parameters_they_make(name, path):
    """The count is of the abstract tree: nothing is allocated, and 7b costs what demo costs."""
    config, vocab = load_config([name]).model, Vocab(4096, (1682,))
    model = nnx.eval_shape(lambda: Transformer(config, vocab, 64, rngs=nnx.Rngs(0)))
    said = re.search(r"^# Model +([\d.]+) M parameters in the layers", path.read_text(), re.MULTILINE)
    assert round(parameters(model.block) / 1e6, 1) == float(said[1])
    rows = sum(s.padded for s in vocab.slices) + (64 if config.content else 0)
    projection = config.embed * config.width
    assert parameters(model) == parameters(model.block) + config.table_width * rows + projection + config.width


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("base", 0.28e9, 0.33e9), ("1b", 0.95e9, 1.1e9), ("7b", 6.7e9, 7.2e9), ("moe-100b", 95e9, 105e9)],
)
def test_names_say_the_size(name, least, most):
    model = nnx.eval_shape(lambda: Transformer(load_config([name]).model, Vocab(4096, (1682,)), 64, rngs=nnx.Rngs(0)))
    assert least < parameters(model) < most


@pytest.mark.parametrize("name", shipped())
def test_shipped_meshes_divide_what_they_shard(name):
    config = load_config([name])
    assert config.data.rows % (config.mesh.fsdp * config.mesh.expert * config.train.accumulate) == 0
    assert config.model.experts % config.mesh.expert == 0 and config.model.expert_width % config.mesh.tensor == 0
    assert config.model.n_kv % config.mesh.tensor == 0
    assert config.model.ffn_width % config.mesh.tensor == 0
    assert config.model.width % config.mesh.fsdp == 0
    assert {"Command", "Hardware", "Model"} <= set(re.findall(r"^# (\w+) ", shipped()[name].read_text(), re.MULTILINE))
