import shutil

import numpy as np
import polars as pl
import pytest
from flax import nnx

from m6rec_jax.cli import SUCCESS, WRONG_INPUT, main
from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.errors import InputError
from m6rec_jax.model.items import item_table
from m6rec_jax.recommend import embed as module
from m6rec_jax.recommend.embed import embed
from m6rec_jax.recommend.histories import Past
from m6rec_jax.recommend.recommender import Recommender


def vectors(path, name):
    table = pl.read_parquet(path)
    assert table.columns == [name, "vector"]
    return table[name].to_list(), np.array(table["vector"].to_list())


def test_user_times_item_is_the_logit(tiny_run, tiny, tmp_path, monkeypatch):
    """Differences of log-probabilities are differences of logits, whatever normalises them."""
    monkeypatch.setattr(module, "BLOCK", 16)  # several blocks, the last one shorter
    assert embed(tiny_run, "items", tmp_path / "items.parquet", tiny) == tiny.catalogue
    known = Past(tiny).all()
    assert embed(tiny_run, "users", tmp_path / "users.parquet", tiny) == len(known)
    ids, items = vectors(tmp_path / "items.parquet", "item_id")
    users, states = vectors(tmp_path / "users.parquet", "user_id")
    assert ids == tiny.item_ids and users == tiny.users["user_id"].gather(known.users).to_list()
    engine = Recommender.load(tiny_run, dataset=tiny).engine
    for u in (0, 7, len(known) - 1):
        one = known.take([u] * tiny.catalogue)
        logp = engine.score(one.items, np.arange(tiny.catalogue), times=one.times, kinds=one.kinds, queries=one.queries)
        logits = items @ states[u]
        assert logits - logits[0] == pytest.approx(logp - logp[0], abs=1e-3)
        assert np.ptp(logits) > 1
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["items.parquet", "users.parquet"]


def test_an_unseen_item_is_its_content_alone(tiny_run, tiny, tmp_path):
    engine = Recommender.load(tiny_run, dataset=tiny).engine
    unseen = np.array([3, 30, 55])
    before = engine.item_vectors(unseen)
    engine.items = item_table(tiny.content, ~np.isin(np.arange(tiny.catalogue), unseen))
    assert np.abs(engine.item_vectors(unseen) - before).max() > 0.1
    weight = np.asarray(nnx.merge(engine._define, engine.params).embeddings.content[...])
    assert engine.item_vectors(unseen) == pytest.approx(tiny.content[unseen] @ weight, abs=1e-5)


def test_items_of_several_codes_are_the_mean_of_what_is_read(levels_run, tiny_levels, tmp_path):
    data = open_dataset(tiny_levels)
    embed(levels_run, "items", tmp_path / "items.parquet", data)
    _, found = vectors(tmp_path / "items.parquet", "item_id")
    engine = Recommender.load(levels_run, dataset=data).engine
    model = nnx.merge(engine._define, engine.params)
    tables = [np.asarray(model.embeddings.tables[s.name][...]) for s in model.vocab.levels]
    codes = sum(table[data.codes[:, level]] for level, table in enumerate(tables))
    expected = (codes + data.content @ np.asarray(model.embeddings.content[...])) / data.levels
    assert found == pytest.approx(expected, abs=1e-5)
    embed(levels_run, "users", tmp_path / "users.parquet", data)
    assert np.isfinite(vectors(tmp_path / "users.parquet", "user_id")[1]).all()


def test_a_stop_half_way_leaves_the_old_file(tiny_run, tiny, tmp_path, monkeypatch):
    out = tmp_path / "items.parquet"
    out.write_text("old")
    monkeypatch.setattr(module, "BLOCK", 16)
    made = []

    def failing(engine, rows):
        made.append(len(rows))
        if len(made) == 2:
            raise KeyboardInterrupt
        return np.zeros((len(rows), 16), np.float32)

    monkeypatch.setattr("m6rec_jax.decoding.engine.Engine.item_vectors", failing)
    with pytest.raises(KeyboardInterrupt):
        embed(tiny_run, "items", out, tiny)
    assert out.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["items.parquet"] and made == [16, 16]


def test_the_command_line(tiny_run, tiny_dataset, tmp_path, capsys):
    argv = ["embed", "--run", str(tiny_run), "--dataset", str(tiny_dataset), "--out", str(tmp_path / "v.parquet")]
    for wrong in (argv, [*argv, "--users", "--items"]):
        assert main(wrong) == WRONG_INPUT and "say --users or --items" in capsys.readouterr().err
    assert main([*argv, "--items"]) == SUCCESS and "56 vectors" in capsys.readouterr().err
    who = ["profile", "--dataset", str(tiny_dataset), "--out", str(tmp_path / "p.parquet"), "--topics", "3"]
    assert main([*who, "--say", "zh"]) == SUCCESS and "60 users" in capsys.readouterr().err
    assert pl.read_parquet(tmp_path / "p.parquet")["text"][0].startswith("共")
    assert main([*who[:-1], "-3"]) == WRONG_INPUT


def test_a_run_without_a_checkpoint_is_one_line(tiny_run, tiny, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    with pytest.raises(InputError, match="no usable checkpoint"):
        embed(tmp_path / "young", "items", tmp_path / "v.parquet", tiny)
    with pytest.raises(InputError, match="embed brands"):
        embed(tiny_run, "brands", tmp_path / "v.parquet", tiny)
