"""One file, NumPy alone: the same numbers as JAX has with the file's weights, and nothing that is damaged is run."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.tokenizer import Tokenizer
from m6rec_jax.edge import runner
from m6rec_jax.edge.file import Tensor, pack, quantised
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import View
from m6rec_jax.objectives.scoring import scoring_order
from m6rec_jax.recommend.edge import tensors, write_edge
from m6rec_jax.settings import load_config
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SOURCE, TARGET, Vocab
from tests.fixtures import tiny_dataset, tiny_root  # noqa: F401
from tests.training.test_prune import params_of, run  # noqa: F401

ATOMIC, LEVELS = Vocab(200, (40,)), Vocab(200, (16, 130), ((20,),))
SMALL = ModelConfig(layers=3, width=16, heads=4, kv_heads=2, ffn=24)
MODELS = {
    "shared, factorised": (replace(SMALL, shared_layers=True, embed=8), ATOMIC, ()),
    "plain, two domains, codes": (SMALL, LEVELS, (4,)),
    "without content": (replace(SMALL, content=False), ATOMIC, ()),
}
ATTENTION = {
    "causal": np.arange(9),
    "bidirectional": np.zeros(9, int),
    "source, target": np.array([0] * 5 + [1, 2, 3, 4]),
}


def some(kind, tmp_path):
    """A written model, its file loaded, and what JAX needs to run the same."""
    config, vocab, more = MODELS[kind]
    rng = np.random.default_rng(3)
    blueprint = Blueprint(config, vocab, 5, more)
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), blueprint.shapes())
    sizes = [(40, 5)] if vocab is ATOMIC else [(60, 5), (20, 4)]
    items = [item_table(rng.normal(size=size), rng.random(size[0]) < 0.7) for size in sizes]
    write_edge(tmp_path / "model.m6e", blueprint, drawn, items if config.content else [], b"pieces", {"step": 7})
    return blueprint, drawn, items, runner.load(tmp_path / "model.m6e")


def as_parameters(blueprint, drawn, items, model):
    """The file's weights as parameters, with content of items as features that nothing projects."""
    w, content = model.weights, {}
    tables = {s.name: np.pad(w[f"tables.{s.name}"], ((0, s.padded - s.size), (0, 0))) for s in blueprint.vocab.slices}
    width = blueprint.config.table_width
    if blueprint.config.content:
        content["content"] = np.eye(width, dtype=np.float32)
        if len(items) > 1:
            content["more_content"] = {"domain2_content": np.eye(width, dtype=np.float32)}
        items = [facts._replace(content=w[f"content.{i}"]) for i, facts in enumerate(items)]
    projection = {"projection": w["projection"]} if "projection" in w else {}
    block = {name: w[f"block.{name}"] for name in drawn["block"]}
    params = {"embeddings": {"tables": tables} | content | projection, "block": block, "final_norm": w["final_norm"]}
    more = (width,) * (len(items) - 1)
    return (
        replace(blueprint, content_width=width, more_widths=more if blueprint.vocab.others else ()),
        params,
        tuple(items),
    )


@pytest.mark.parametrize("kind", MODELS)
def test_it_agrees_with_jax(kind, tmp_path):
    blueprint, drawn, items, file = some(kind, tmp_path)
    blueprint, params, items = as_parameters(blueprint, drawn, items, file)
    rng = np.random.default_rng(4)
    vocab = blueprint.vocab
    tokens = np.concatenate([rng.integers(0, s.size, 6) + s.offset for s in vocab.slices])[rng.permutation(6 * len(vocab.slices))[:9]]  # fmt: skip
    rows = np.full(9, -1)
    for s in vocab.slices:
        if s.atomic:
            inside = (tokens >= s.offset) & (tokens < s.end)
            rows = np.where(inside, tokens - s.offset + (128 if s.domain else 0), rows)
    if kind.startswith("plain"):
        rows[2] = 17  # of an item spelled by codes
    model, items = blueprint.bind(jax.tree.map(jnp.asarray, params)), jax.tree.map(jnp.asarray, items)
    read = jnp.asarray(tokens)[None], jnp.asarray(rows)[None]

    @jax.jit
    def theirs(k_end):
        view = View(jnp.arange(9)[None], jnp.zeros((1, 9), jnp.int32), k_end)
        hidden = model.hidden(*read, view, items)[0]
        return hidden, [model.logits(hidden, i, items)[:, : s.size] for i, s in enumerate(vocab.slices)]

    for order in ATTENTION.values():
        wanted, scores = theirs(np.searchsorted(order, order, side="right")[None])
        given = rows if kind.startswith("plain") else None  # where a token is an item, the runner knows its row
        hidden = file.hidden(tokens, given, order)
        assert hidden.dtype == np.float32
        np.testing.assert_allclose(hidden, wanted, atol=1e-4)
        np.testing.assert_allclose(file.hidden(tokens, given, order, last=True)[0], wanted[-1], atol=1e-4)
        for s, score in zip(vocab.slices, scores, strict=True):
            np.testing.assert_allclose(file.logits(hidden, s.name), score, atol=1e-4)


def test_options_are_scored_over_their_own_task_at_the_last_of_a_source_seen_both_ways(tmp_path):
    *_, file = some("without content", tmp_path)
    parts = [s if s["name"] == "text" else {**s, "name": "options", "size": 5} for s in file.header["slices"]]
    weights = {**file.weights, "tables.options": file.weights["tables.level1"][:5]}
    model = replace(file, header={**file.header, "slices": parts, "options": [2, 3]}, weights=weights)
    tokens = np.array([2, 50, 60, 70, 38])
    scores = file.logits(file.hidden(tokens, order=np.zeros(5)), "level1")[-1]
    for task, at in ((0, slice(0, 2)), (1, slice(2, 5))):
        e = np.exp(scores[at])
        np.testing.assert_allclose(model.score(tokens, task), e / e.sum(), rtol=1e-4)
    with pytest.raises(runner.EdgeError, match="task 2: the model has options for 2 tasks"):
        model.score(tokens, 2)


def test_a_candidate_behind_target_is_read_left_to_right_as_in_training(tmp_path):
    *_, file = some("without content", tmp_path)
    tokens = np.array([BOS, SOURCE, 50, TARGET, 60, END_SOURCE, TARGET, 70, 71, END_TARGET])
    parts = [{**s, "name": "options" if s["name"] == "level1" else s["name"]} for s in file.header["slices"]]
    weights = {**file.weights, "tables.options": file.weights["tables.level1"]}
    model = replace(file, header={**file.header, "slices": parts, "options": [2]}, weights=weights)
    order = scoring_order(tokens)
    assert order.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    scores = file.logits(file.hidden(tokens, order=order), "level1")[-1, :2]
    np.testing.assert_allclose(model.score(tokens), np.exp(scores) / np.exp(scores).sum(), rtol=1e-4)


def test_a_round_trip_loses_half_a_scale_at_most_and_no_zero(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 40, 30)).astype(np.float32)
    sparse = np.where(rng.random(x.shape) < 0.8, 0, x)
    sparse[0, :, 4] = 0
    given = {"dense": Tensor(x, (1,)), "sparse": Tensor(sparse, (1,)), "kept": Tensor(x[0, 0]),
             "block.attention_norm": Tensor(np.zeros((0, 4)))}  # fmt: skip
    made = pack({"model": {"width": 4}}, given, b"tokenizer")
    (tmp_path / "m").write_bytes(made)
    found = runner.load(tmp_path / "m")
    for name in ("dense", "sparse"):
        _, scale = quantised(given[name].value, (1,))
        assert (np.abs(found.weights[name] - given[name].value) <= 0.5001 * scale).all()
    np.testing.assert_array_equal(found.weights["kept"], x[0, 0])
    assert (found.weights["sparse"][sparse == 0] == 0).all()
    assert found.tokenizer == b"tokenizer"
    told = found.header["tensors"]
    assert "int8" in told["dense"] and {"bits", "nonzero"} <= told["sparse"].keys()
    assert pack({"model": {"width": 4}}, given, b"tokenizer") == made  # the same bytes again


DAMAGE = {
    "cut short": lambda data: data[:-10],
    "a bit flipped": lambda data: data[:-50] + bytes([data[-50] ^ 4]) + data[-49:],
    "a header that is not its own": lambda data: data.replace(b'"layers":2', b'"layers":3'),
    "another file": lambda data: b"PK" + data[2:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(exported, damage, tmp_path, capsys):
    bad = tmp_path / "bad.m6e"
    bad.write_bytes(DAMAGE[damage](exported.read_bytes()))
    assert bad.read_bytes() != exported.read_bytes()
    assert runner.main([str(bad), "--tokens", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith(f"{bad}: not ")


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("edge") / "model.m6e"
    assert main(["export", "--run", str(run), "--format", "edge", "--out", str(out)]) == SUCCESS
    return out


def test_a_pruned_run_is_exported_with_its_zeros_and_its_tokenizer(exported, run, capsys):  # noqa: F811
    file, params = runner.load(exported), params_of(run, 12)
    for name, kept in params["block"].items():
        if not name.endswith("norm"):
            assert (file.weights[f"block.{name}"][np.asarray(kept) == 0] == 0).all()
    told = {
        name: said for name, said in file.header["tensors"].items() if name.startswith("block.") and "norm" not in name
    }
    assert all("bits" in said for said in told.values())
    text = "  Red shoes ▁\t小米手机 ＡＢＣ \x00 ☕ \ud800"
    ours = Tokenizer((run / "tokenizer.model").read_bytes()).encode(text)
    np.testing.assert_array_equal(file.encode(text), ours)
    again = ["export", "--run", str(run), "--format", "edge", "--out", str(exported)]
    assert main(again) == WRONG_INPUT and "is there already; name a new file" in capsys.readouterr().err
    assert main([*again[:-1], "other", "--dtype", "bfloat16"]) == WRONG_INPUT
    assert "its numbers are int8" in capsys.readouterr().err


ALONE = """
import sys
from importlib.machinery import PathFinder

find, wanted = PathFinder.find_spec, {"numpy", "sentencepiece", "runner"} | set(sys.stdlib_module_names)
PathFinder.find_spec = lambda name, *rest: find(name, *rest) if name.partition(".")[0] in wanted | {"m6rec_jax"} else None
try:
    import jax
except ImportError:
    pass
else:
    raise SystemExit("jax can be imported")
"""


@pytest.mark.parametrize("start", ["import m6rec_jax; from m6rec_jax.edge import runner", "import runner"])
def test_it_runs_where_nothing_but_numpy_can_be_imported(exported, start, tmp_path):
    """As a part of the package, and as one file copied beside the model."""
    shutil.copyfile(runner.__file__, tmp_path / "runner.py")
    path = [str(tmp_path)] if start == "import runner" else [p for p in sys.path if p]
    program = f"{ALONE}\nsys.path[:0] = {path!r}\n{start}\nraise SystemExit(runner.main(sys.argv[1:]))"
    tokens = [2, 300, 301, 645]
    command = [sys.executable, "-c", program, str(exported), "--tokens", " ".join(map(str, tokens))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer, file = json.loads(done.stdout), runner.load(exported)
    scores = file.next_item(np.array(tokens))
    assert answer["ids"][0] == int(scores.argmax()) and len(answer["ids"]) == 10 and answer["tokens"] == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tokens", "2 99999"], "99999 is no id of this model"),
        (["--tokens", ""], "tokens: none given"),
        (["--tokens", "2 x"], "ids are whole numbers"),
        (["--tokens", "2", "--slice", "level9"], "slice level9: unknown; there are text, level1"),
        (["--tokens", "2", "--task", "0"], "task 0: the model has options for 0 tasks"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_in_one_line(exported, words, says, capsys):
    assert runner.main([str(exported), *words]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_experts_are_refused(tmp_path):
    blueprint = Blueprint(replace(SMALL, experts=4), ATOMIC, 5)
    with pytest.raises(InputError, match=r"model.experts=4: .*model.experts=0"):
        write_edge(tmp_path / "m", blueprint, {}, [], b"", {})


PIECES, ITEMS, LIMIT = 16_000, 4_000, 3_500_000


def test_the_preset_has_ten_million_parameters_and_two_million_that_are_not_zero():
    config = load_config(["edge-pruned"])
    assert (config.model.layers, config.model.shared_layers, config.model.width) == (24, True, 768)
    assert (config.model.heads, config.model.embed) == (16, 128)
    blueprint = Blueprint(config.model, Vocab(PIECES, (ITEMS,)), 64)
    assert 9.5e6 < blueprint.parameters() < 10.5e6
    assert config.model == load_config(["edge"]).model and config.prune.sparsity == 0.8 and config.prune.tables
    assert 1.9e6 < blueprint.parameters() * (1 - config.prune.sparsity) < 2.1e6


def test_the_pruned_preset_is_small_enough_on_disk(tmp_path):
    """Random weights are the worst case: their values have no pattern, and no channel is empty."""
    config = load_config(["edge-pruned"])
    blueprint, rng = Blueprint(config.model, Vocab(PIECES, (ITEMS,)), 64), np.random.default_rng(0)

    def pruned(x):
        w = rng.standard_normal(x.shape, np.float32)
        return np.where(np.abs(w) < np.quantile(np.abs(w[0]), config.prune.sparsity), 0, w) if w.ndim > 1 else w

    facts = [item_table(np.zeros((ITEMS, 64)), np.ones(ITEMS, bool))]
    params = jax.tree.map(pruned, blueprint.shapes())
    tokenizer = rng.bytes(400_000)  # one of 16,000 pieces has about 300,000 bytes
    write_edge(tmp_path / "model.m6e", blueprint, params, facts if config.model.content else [], tokenizer, {})
    size = (tmp_path / "model.m6e").stat().st_size
    file = runner.load(tmp_path / "model.m6e")
    assert 1.9e6 < file.header["nonzero"] < 2.1e6
    assert size <= LIMIT, size
    assert sum(t.value.size for t in tensors(blueprint, params, facts).values()) == file.header["numbers"]
