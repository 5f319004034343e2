"""`--init-from` a folder of Hugging Face: what `m6rec export` wrote comes back, pieces find their rows, others are refused."""

import json
import shutil
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from m6rec_jax.artifacts.tensors import FILE, INDEX, open_tensors, write_tensors
from m6rec_jax.cli import WRONG_INPUT, main
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.pieces import Pieces, of_json, of_sentencepiece, stand_for
from m6rec_jax.errors import InputError
from m6rec_jax.model.export import llama
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import causal
from m6rec_jax.recommend.export import facts_of, slices, spellings
from m6rec_jax.training.initial import start_from
from m6rec_jax.vocab import SPECIALS
from tests.fixtures import tiny, tiny_dataset, tiny_levels, tiny_root  # noqa: F401

MODEL = ModelConfig(layers=2, width=24, heads=6, kv_heads=2, ffn=40, rope_theta=500.0, norm_eps=1e-5)


def blueprint_for(data, config=MODEL):
    return Blueprint(config, data.vocab, data.content.shape[1])


@pytest.fixture(scope="module")
def lent(tiny, tmp_path_factory):  # noqa: F811
    """A folder as another program writes it, of a model without items, and its parameters."""
    folder = tmp_path_factory.mktemp("llama")
    blueprint = blueprint_for(tiny, replace(MODEL, content=False))
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), blueprint.shapes())
    described, tensors = llama(blueprint, params, 64)
    (folder / "config.json").write_text(json.dumps(described))
    write_tensors(folder, tensors)
    shutil.copyfile(tiny.path / "tokenizer.model", folder / "tokenizer.model")
    return folder, params


@pytest.fixture
def folder(lent, tmp_path):
    return shutil.copytree(lent[0], tmp_path / "there")


@cache
def fresh(blueprint):
    return blueprint.init(0)


def begun(folder, data, config=MODEL):
    blueprint = blueprint_for(data, config)
    return start_from(folder, [data], blueprint)(fresh(blueprint))


def changed(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors_changed(folder, **values):
    """`values` put into the file of weights; None takes one out."""
    held = load_file(folder / FILE) | {name.replace("__", "."): x for name, x in values.items()}
    save_file({name: x for name, x in held.items() if x is not None}, folder / FILE)


def refused(folder, data, match, config=MODEL):
    with pytest.raises(InputError, match=match) as caught:
        start_from(folder, [data], blueprint_for(data, config))
    said = str(caught.value)
    assert said.startswith(f"--init-from {folder}: ") and "\n" not in said


def test_layers_and_text_come_back(lent, tiny, capsys):  # noqa: F811
    folder, params = lent
    found, drawn = begun(folder, tiny), fresh(blueprint_for(tiny))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found["block"], params["block"])
    np.testing.assert_allclose(found["final_norm"], params["final_norm"], atol=1e-6)
    size = blueprint_for(tiny).vocab.pieces
    text, theirs = found["embeddings"]["tables"]["text"], params["embeddings"]["tables"]["text"]
    np.testing.assert_array_equal(text[:size], theirs[:size])
    np.testing.assert_array_equal(found["embeddings"]["tables"]["level1"], drawn["embeddings"]["tables"]["level1"])
    np.testing.assert_array_equal(found["embeddings"]["content"], drawn["embeddings"]["content"])
    said = capsys.readouterr().err
    assert f"of {size - len(SPECIALS):,} text pieces {size - len(SPECIALS):,} by their like, 0 by" in said
    assert "item codes begin anew" in said


def exported(folder, data, blueprint, params):
    """What `m6rec export --format llama` writes of a run on `data`, as far as it is read again."""
    run = SimpleNamespace(vocab=blueprint.vocab, names=[data.name], folder=lambda domain: data.path)
    facts = facts_of(run, 0)
    described, tensors = llama(blueprint, params, 64, [facts])
    (folder / "config.json").write_text(json.dumps(described))
    write_tensors(folder, tensors)
    shutil.copyfile(data.path / "tokenizer.model", folder / "tokenizer.model")
    (folder / "vocab.json").write_text(json.dumps({**blueprint.vocab.as_dict(), "slices": slices(run)}))
    spellings(run).write_parquet(folder / "items.parquet")
    return facts


@pytest.mark.parametrize("content", [True, False])
def test_an_exported_run_comes_back_with_its_items(tiny, tiny_levels, tmp_path, capsys, content):  # noqa: F811
    """Where a code is an item and has content, and where items are spelled: the same logits, text and codes."""
    data = tiny if content else open_dataset(tiny_levels)
    blueprint = blueprint_for(data, replace(MODEL, content=content))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), blueprint.shapes())
    facts = exported(tmp_path, data, blueprint, params)
    back = begun(tmp_path, data, blueprint.config)
    assert f"codes of {data.catalogue:,} items by id" in capsys.readouterr().err
    known = np.flatnonzero(data.seen)[[3, 5, 9]]
    spelled = blueprint.vocab.spell(read_arrays(data.path / "codes.npz")["codes"][known])
    tokens = np.concatenate([[2, 300], spelled.ravel()])
    rows = np.full(len(tokens), -1)
    rows[1 + data.levels :: data.levels] = known
    view = causal((1, len(tokens)), np.array([len(tokens)]))
    logits = []
    for one in (params, back):
        model = blueprint.bind(one)
        hidden = model.hidden(tokens[None], rows[None], view, facts)[0]
        logits.append([np.asarray(model.logits(hidden, i, facts)) for i in range(1 + data.levels)])
    for s, ours, theirs in zip(blueprint.vocab.slices, *logits, strict=True):
        some = np.flatnonzero(data.seen) if s.atomic else np.arange(s.size)
        np.testing.assert_allclose(theirs[:, some], ours[:, some], atol=1e-4 * np.abs(ours[:, some]).max())


def test_codes_of_other_codebooks_stay_fresh(tiny_levels, tmp_path, capsys):  # noqa: F811
    data = open_dataset(tiny_levels)
    blueprint = blueprint_for(data, replace(MODEL, content=False))
    exported(tmp_path, data, blueprint, jax.tree.map(lambda x: np.ones(x.shape, x.dtype), blueprint.shapes()))
    items = pl.read_parquet(tmp_path / "items.parquet")
    items.with_columns(pl.col("tokens").reverse()).write_parquet(tmp_path / "items.parquet")
    tables = begun(tmp_path, data, blueprint.config)["embeddings"]["tables"]
    np.testing.assert_array_equal(tables["level2"], fresh(blueprint)["embeddings"]["tables"]["level2"])
    assert "item codes begin anew" in capsys.readouterr().err
    (tmp_path / "vocab.json").write_text(json.dumps({"Ġred": 1}))  # that of another tokenizer
    begun(tmp_path, data, blueprint.config)


def test_bfloat16_in_several_files_is_read(lent, folder, tiny):  # noqa: F811
    held = {name: np.asarray(x, jnp.bfloat16) for name, x in load_file(folder / FILE).items()}
    (folder / FILE).unlink()
    assert INDEX in write_tensors(folder, held, shard=20_000)
    for name, one in open_tensors(folder).items():
        np.testing.assert_array_equal(one.read(), held[name])
    whole, half = begun(lent[0], tiny), begun(folder, tiny)
    for name, x in whole["block"].items():
        np.testing.assert_allclose(half["block"][name], x, rtol=2**-8, atol=2**-8)
    next(folder.glob("model-00002-*")).unlink()
    refused(folder, tiny, "model-00002-.*: no such file; fetch the whole folder")


def test_sizes_that_differ_are_told_as_settings(folder, tiny):  # noqa: F811
    changed(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, num_hidden_layers=3)
    refused(folder, tiny, r"train with --model.layers=3 --model.rope_theta=500000.0$")
    other = replace(MODEL, heads=4, kv_heads=0, ffn=0, norm_eps=1e-6, experts=4)
    changed(folder, rope_parameters=None, rope_theta=500.0, num_hidden_layers=2)
    refused(folder, tiny, "with --model.heads=6 --model.kv_heads=2 --model.ffn=40 --model.experts=0 --model.norm_eps=1e-05$", other)  # fmt: skip
    follows = replace(MODEL, width=16, heads=2, kv_heads=0)  # two now, and six once heads are six
    refused(folder, tiny, "train with --model.width=24 --model.heads=6 --model.kv_heads=2$", follows)


@pytest.mark.parametrize("values, match", [
    ({"model_type": "gpt2"}, "model_type=gpt2 has learned positions, LayerNorm and GELU"),
    ({"model_type": "t5"}, "model_type=t5 has an encoder beside its decoder and relative position biases"),
    ({"model_type": "mamba"}, "model_type=mamba: not computed as a Llama is; weights are taken from llama, mistral"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu: this model has SwiGLU"),
    ({"rope_parameters": None, "rope_scaling": {"rope_type": "llama3"}}, "rope_type=llama3: .* stretched"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type=yarn: .* stretched"),
    ({"head_dim": 8}, "head_dim=8 and num_attention_heads=6 make 48, not its hidden_size=24"),
    ({"hidden_size": None}, "config.json: TypeError"),
])  # fmt: skip
def test_other_architectures_are_refused_with_the_reason(folder, tiny, values, match):  # noqa: F811
    changed(folder, **values)
    refused(folder, tiny, match)


def test_tensors_that_do_not_fit_are_named(folder, tiny):  # noqa: F811
    layer = "model__layers__1__"
    tensors_changed(folder, **{layer + "self_attn__q_proj__bias": np.zeros(24, np.float32)})
    refused(folder, tiny, "layers.1.self_attn.q_proj.bias: biases, and this model has none")
    tensors_changed(folder, **{layer + "self_attn__q_proj__bias": None, layer + "mlp__up_proj__weight": None})
    refused(folder, tiny, "no tensor layers.1.mlp.up_proj.weight in its files")
    tensors_changed(folder, **{layer + "mlp__up_proj__weight": np.zeros((24, 40), np.float32)})
    refused(folder, tiny, r"layers.1.mlp.up_proj.weight is \[24, 40\], and config.json says \[40, 24\]")
    tensors_changed(folder, **{layer + "mlp__up_proj__weight": np.zeros((40, 24), np.int8)})
    refused(folder, tiny, "layers.1.mlp.up_proj.weight is stored as I8")


def test_an_output_table_of_its_own_is_not_taken_and_said(lent, folder, tiny, capsys):  # noqa: F811
    head = np.zeros_like(load_file(folder / FILE)["model.embed_tokens.weight"])
    tensors_changed(folder, lm_head__weight=head)
    changed(folder, tie_word_embeddings=False)
    tables = [begun(f, tiny)["embeddings"]["tables"]["text"] for f in (folder, lent[0])]
    np.testing.assert_array_equal(*tables)
    assert "lm_head is not taken" in capsys.readouterr().err


def test_pickles_and_damage_are_refused(folder, tiny, tmp_path):  # noqa: F811
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-1])
    refused(folder, tiny, f"{len(whole) - 1:,} bytes, and its header speaks of {len(whole):,}: cut off")
    (folder / FILE).write_bytes(b"\xff" * 64)
    refused(folder, tiny, "not readable as safetensors")
    (folder / FILE).unlink()
    refused(folder, tiny, "no model.safetensors and no model.safetensors.index.json in it")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused(folder, tiny, "pytorch_model.bin is a pickle, .* safe_serialization=True")
    (folder / FILE).write_bytes(whole)
    (folder / "tokenizer.model").unlink()
    refused(folder, tiny, "no tokenizer.json and no tokenizer.model in it")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", tiny, "neither a run nor a model")
    refused(tmp_path / "nowhere", tiny, "no such folder")


def test_a_refusal_leaves_no_run_behind(folder, tiny_dataset, tmp_path, capsys):  # noqa: F811
    line = ["train", "--dataset", str(tiny_dataset), "--run", str(tmp_path / "run"), "--init-from", str(folder)]
    assert main([*line, "--model.layers=1"]) == WRONG_INPUT
    assert "--model.layers=2 --model.width=24" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pieces_of_both_forms_find_the_same_text():
    """A BPE over characters and one over bytes that know the same words."""
    ours = Pieces({b" red": 5, b" reddish": 6, "小".encode(): 7, b"x": 8}, {0xE5: 9, ord("d"): 10}, {"<s>": 2})
    over_characters = of_json({
        "model": {"type": "BPE", "vocab": {"<s>": 0, "▁red": 1, "d": 2, "ish": 3, "<0xE5>": 4, "小": 5}},
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    })  # fmt: skip
    over_bytes = of_json({
        "model": {"type": "BPE", "vocab": {"Ġred": 1, "d": 2, "ish": 3, "å": 4, "å°ı": 5}},
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]},
    })  # fmt: skip
    for theirs in (over_characters, over_bytes):
        assert theirs.controls == {"<s>": 0}
        assert stand_for(ours, theirs) == {5: [1], 6: [1, 2, 3], 7: [5], 8: [], 9: [4], 10: [2]}


def test_rows_of_unknown_pieces_are_means(folder, tiny):  # noqa: F811
    """Their pieces are single bytes but for one: ours are the means of their bytes' rows."""
    (folder / "tokenizer.model").unlink()
    ours = of_sentencepiece((tiny.path / "tokenizer.model").read_bytes())
    word = max(ours.texts, key=len)
    vocab = {word.decode().replace(" ", "▁"): 300} | {f"<0x{byte:02X}>": byte for byte in range(1, 256)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    changed(folder, bos_token_id=301, eos_token_id=[302], pad_token_id=None)
    table = load_file(folder / FILE)["model.embed_tokens.weight"]
    text = np.asarray(begun(folder, tiny)["embeddings"]["tables"]["text"])
    np.testing.assert_array_equal(text[ours.texts[word]], table[300])
    for other, i in ours.texts.items():
        if other != word and word not in other:
            np.testing.assert_allclose(text[i], table[list(other)].mean(0), atol=1e-6)
    np.testing.assert_allclose(text[ours.singles[0]], table.mean(0), atol=1e-5)
    np.testing.assert_array_equal(text[[SPECIALS["<s>"], SPECIALS["</s>"]]], table[[301, 302]])
