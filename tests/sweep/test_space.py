"""Spaces: read with the types of the settings, refused in one line before anything starts."""

import pytest

from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.settings import load_config, shipped
from m6rec_jax.sweep.journal import distributions, settings_of
from m6rec_jax.sweep.space import Choice, Range, find_space, overrides, read_space, with_values


def read(tmp_path, text, base=None):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_space(path, base or Config())


def test_ranges_and_values_come_out_as_the_settings_take_them(tmp_path):
    axes = read(
        tmp_path,
        "optim.learning_rate: {low: 1e-4, high: 3e-3, log: true}\n"  # YAML takes 1e-4 for a text
        "model.layers: {values: [2, 4]}\n"
        "model.width: {low: 64, high: 256, step: 64}\n"
        "model.dropout: {low: 0, high: 0.4, step: 0.1}\n"
        "optim.label_smoothing: {values: [0, 0.1]}\n",
    )
    assert axes == [
        Range("optim.learning_rate", 1e-4, 3e-3, log=True),
        Choice("model.layers", (2, 4)),
        Range("model.width", 64, 256, step=64, whole=True),
        Range("model.dropout", 0.0, 0.4, step=0.1),
        Choice("optim.label_smoothing", (0.0, 0.1)),
    ]
    assert axes[2].tried() == (64, 128, 192, 256)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim.learning_rat: {low: 1e-4, high: 1e-3}", "optim.learning_rat: unknown key; did you mean optim.learning_rate? known in optim: name, schedule, learning_rate, warmup"),
        ("optimiser.b1: {values: [1]}", "optimiser.b1: unknown key; write section.key, of the sections model, mesh, optim"),
        ("model.layers: {values: []}", "model.layers: {values: []}: has no values"),
        ("model.layers: {values: [2, 2]}", "2 is listed twice"),
        ("model.layers: {values: [2.5]}", "model.layers=2.5: must be a whole number"),
        ("model.dtype: {values: [f16]}", "model.dtype=f16: must be one of float32, bfloat16"),
        ("model.dtype: {low: 1, high: 2}", "only numbers have a range"),
        ("optim.learning_rate: {low: 3e-3, high: 1e-4}", "an empty range; low must be below high"),
        ("optim.learning_rate: {low: 1e-3, high: 1e-3}", "an empty range"),
        ("optim.weight_decay: {low: 0, high: 0.1, log: true}", "low must be above 0 for log"),
        ("optim.b1: {low: 0.5, high: 0.9, log: true, step: 0.1}", "log and step exclude each other"),
        ("model.width: {low: 64, high: 128, step: 48}", "step does not reach high from low"),
        ("model.width: {low: 64, high: 128, stepp: 64}", "must be {values: [...]} or {low: ..., high: ...}"),
        ("model.dropout: {low: 0.1, high: 1.2}", "model.dropout=1.2: must be at least 0 and below 1"),
        ("model.heads: {low: 1, high: 4}", "model.heads=3 does not divide model.width=64"),  # within, not at an end
        ("model.width: {values: [64, 96]}\nmodel.heads: {values: [2, 32]}", "model.width=96 over model.heads=32 gives an odd head size"),
        ("train.best: {values: [ndcg@10, loss/next-item]}", "trials are compared by that figure"),
        ("[1, 2]", "names no setting"),
        ("{a: [", "not readable as YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_that_names_it(tmp_path, text, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, text)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "space.yaml"))


def test_a_space_too_large_to_try_whole_still_has_every_value_tried(tmp_path):
    many = "".join(f"optim.{key}: {{values: [{', '.join(str(n / 50) for n in range(9))}]}}\n" for key in ("b1", "b2", "weight_decay", "label_smoothing"))  # fmt: skip
    read(tmp_path, many)
    with pytest.raises(InputError, match=r"model.kv_heads=3 does not divide"):
        read(tmp_path, many + "model.kv_heads: {values: [1, 2, 3]}\n")


def test_a_trial_gets_its_settings_and_the_command_line_says_the_same(tmp_path):
    axes = read(
        tmp_path,
        "model.dropout: {low: 0.1, high: 0.5, step: 0.1}\nmixture.tasks: {values: [{next-item: 1}, {next-item: 0.6, text-causal: 0.4}]}\n"
        "model.content: {values: [true, false]}\nmodel.dtype: {values: [float32, bfloat16]}\noptim.warmup: {low: 1, high: 100, log: true}\n",
    )  # fmt: skip
    space = distributions(axes)
    mixture = next(iter(space["mixture.tasks"].choices[1:]))
    drawn = {"model.dropout": 0.1 + 2 * 0.1, "mixture.tasks": mixture, "model.content": False, "model.dtype": "bfloat16", "optim.warmup": 7}  # fmt: skip
    values = settings_of(drawn, axes)
    assert values["model.dropout"] == 0.3
    assert values["mixture.tasks"] == {"next-item": 0.6, "text-causal": 0.4}
    assert load_config([], overrides(values)) == with_values(Config(), values)


def test_shipped_spaces_fit_the_configuration_of_their_name():
    assert shipped("sweep") and not set(shipped("sweep").values()) & set(shipped().values())
    for name, path in shipped("sweep").items():
        assert find_space(name) == path
        assert read_space(path, load_config([name]))
    with pytest.raises(InputError, match=r"--space nothing: no such file; the shipped spaces are .*quality"):
        find_space("nothing")
