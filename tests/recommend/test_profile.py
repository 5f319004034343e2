import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.profile import profile, say
from m6rec_jax.recommend.segments import freshness
from m6rec_jax.recommend.topics import Topics, fit_topics, topics_of, user_topics


@pytest.fixture(scope="module")
def made(tiny_levels, tmp_path_factory):
    """(dataset with kinds, its profiles, the folder they are in)."""
    folder = tmp_path_factory.mktemp("profiles")
    data = open_dataset(tiny_levels)
    count = profile(data, folder / "who.parquet", topics=6, language="en")
    table = pl.read_parquet(folder / "who.parquet")
    assert table.height == count
    return data, table, folder


def test_every_user_with_events_has_the_statistics_of_their_events(made):
    data, table, _ = made
    events = pl.read_parquet(data.path / "events.parquet")
    names, items = data.users["user_id"], data.items
    assert table["user_id"].to_list() == names.gather(events["user"].unique(maintain_order=True)).to_list()
    for row in table.iter_rows(named=True):
        own = events.filter(names.gather(events["user"]) == row["user_id"])
        had, times = own.filter(pl.col("item") >= 0)["item"].to_list(), own["time"].to_list()
        assert (row["events"], row["items"]) == (own.height, len(set(had)))
        assert row["repeat_share"] == pytest.approx(1 - len(set(had)) / len(had) if had else 0)
        assert (row["first"], row["last"]) == (min(times), max(times))
        assert row["span_days"] == pytest.approx((max(times) - min(times)) / 86400)
        gaps = np.diff(sorted(times))
        assert row["mean_gap_days"] == (pytest.approx(gaps.mean() / 86400) if len(gaps) else None)
        assert [row[f"kind_{k}"] for k in data.kinds] == [(own["kind"] == n).sum() for n in range(len(data.kinds))]
        found = {one["name"]: one["share"] for one in row["categories"]}
        each = [set(items["categories"][i]) for i in had]
        assert found == pytest.approx({c: sum(c in e for e in each) / len(had) for c in set().union(*each)})
        assert list(found.values()) == sorted(found.values(), reverse=True)
        known = [b for b in (items["bucket_price"][i] for i in had) if b is not None]
        expected = np.bincount(known, minlength=5) / len(known) if known else np.zeros(5)
        assert row["price_shares"] == pytest.approx(expected.tolist())


def test_topics_of_a_user_are_the_decayed_sum_of_the_items(made):
    data, table, folder = made
    items = np.array(pl.read_parquet(folder / "who.items.parquet")["topics"].to_list())
    assert items.shape == (data.catalogue, 6) and ((items.sum(1) == 0) | np.isclose(items.sum(1), 1, atol=1e-5)).all()
    assert (items >= 0).all()
    events = pl.read_parquet(data.path / "events.parquet")
    age = (events["time"].max() - events["time"]).to_numpy()
    weight = 0.5 ** (age / np.median(age)) * np.array(data.manifest["kind_weights"])[events["kind"].to_numpy()]
    for user, row in zip(events["user"].unique(maintain_order=True), table.iter_rows(named=True), strict=True):
        at = np.flatnonzero((events["user"] == user).to_numpy() & (events["item"] >= 0).to_numpy())
        total = (weight[at, None] * items[events["item"].to_numpy()[at]]).sum(0)
        assert row["topics"] == pytest.approx((total / total.sum() if total.sum() else total).tolist(), abs=1e-4)
        best = [(one["topic"], one["share"]) for one in row["interests"]]
        assert [share for _, share in best] == sorted((s for s in row["topics"] if s > 0), reverse=True)[:3]
        assert all(row["topics"][topic] == pytest.approx(share) for topic, share in best)
    words = pl.read_parquet(folder / "who.topics.parquet")
    assert words["topic"].to_list() == list(range(6)) and words["share"].to_list() == sorted(
        words["share"], reverse=True
    )
    assert (words["words"].list.len() > 0).all()


def test_what_is_held_out_is_left_out_on_request(made, tmp_path):
    data, whole, folder = made
    assert profile(data, tmp_path / "train.parquet", topics=6, split="train")
    train = pl.read_parquet(tmp_path / "train.parquet")
    events = pl.read_parquet(data.path / "events.parquet").filter(pl.col("split") == 0)
    assert train["events"].sum() == events.height < whole["events"].sum() and "text" not in train.columns
    # Topics are of item texts: who did what is nothing to them.
    assert (tmp_path / "train.items.parquet").read_bytes() == (folder / "who.items.parquet").read_bytes()


def test_what_shares_no_word_shares_no_topic_and_the_same_seed_gives_the_same():
    rng = np.random.default_rng(0)
    groups, size, each = 4, 5, 10
    words = [f"{group}-{n}" for group in ("sea", "wood", "sky", "city") for n in range(size)] + ["the"]
    about = np.repeat(np.arange(groups), each)
    matrix = np.kron(np.eye(groups), np.ones((each, size))) * (0.5 + rng.random((groups * each, groups * size)))
    matrix = sp.csr_array(np.column_stack([matrix, np.full(groups * each, 3.0)]).astype(np.float32))
    topics = topics_of(matrix, words, groups)
    assert sorted({w.split("-")[0] for w in said}.pop() for said in topics.words) == ["city", "sea", "sky", "wood"]
    assert all(len({w.split("-")[0] for w in said}) == 1 for said in topics.words)  # and "the" is in none
    best = topics.weights.argmax(1)
    assert all(len(set(best[about == group].tolist())) == 1 for group in range(groups)) and len(set(best.tolist())) == 4
    again = topics_of(matrix, words, groups)
    assert np.array_equal(again.weights, topics.weights) and again.words == topics.words


def test_few_items_or_words_give_fewer_topics(tiny):
    assert len(topics_of(sp.csr_array((3, 0), dtype=np.float32), [], 5)) == 0
    assert len(topics_of(sp.csr_array(np.eye(4, dtype=np.float32)), list("abcd"), 5)) == 0  # no word in two texts
    assert len(fit_topics(tiny, 1000)) <= tiny.catalogue
    assert user_topics(np.array([0]), np.array([1]), np.ones(1), np.zeros((3, 0), np.float32), 2).shape == (2, 0)
    assert Topics.none(4).weights.shape == (4, 0)


def test_old_interests_fade():
    items = np.eye(2, dtype=np.float32)
    owners, times = np.zeros(4, int), np.array([0, 100, 900, 1000])
    shares = user_topics(owners, np.array([0, 0, 1, 1]), freshness(owners, times, True), items, 1)[0]
    assert shares[1] > 0.6 and shares.sum() == pytest.approx(1)


def test_profiles_in_words(made):
    _, table, _ = made
    row = table.filter(pl.col("categories").list.len() > 1).row(0, named=True)
    english, chinese = say(row), say(row, "zh")
    assert row["text"] == english and english.startswith(f"{row['events']} events with {row['items']} items in ")
    assert chinese.startswith(f"共{row['events']}次行为") and "events" not in chinese
    for text in (english, chinese):
        assert all(one["name"] in text for one in row["categories"][:3]) and row["interests"][0]["words"][0] in text
    assert "By kind: " in english and "行为：" in chinese
    bare = {"events": 2, "items": 1, "repeat_share": 0.5, "categories": []}
    assert say(bare) == "2 events with 1 items; 50 % were repeats."
    assert say(bare, "zh") == "共2次行为，涉及1件物品，其中50%为重复。"


def test_a_profile_without_topics_and_bad_requests(made, tmp_path):
    data = made[0]
    profile(data, tmp_path / "plain.parquet", topics=0)
    assert not {"topics", "interests"} & set(pl.read_parquet(tmp_path / "plain.parquet").columns)
    assert [p.name for p in tmp_path.iterdir()] == ["plain.parquet"]
    for changes, says in (
        ({"split": "test"}, "split=test"),
        ({"language": "fr"}, "language=fr"),
        ({"topics": -1}, "topics=-1"),
    ):
        with pytest.raises(InputError, match=says):
            profile(data, tmp_path / "x.parquet", **changes)
    with pytest.raises(InputError, match="is a folder"):
        profile(data, tmp_path, topics=0)


def test_order_only_data_has_no_days(tmp_path):
    from m6rec_jax.data.prepare import prepare

    (tmp_path / "s.txt").write_text(
        "".join(f"u{n} " + " ".join(f"i{(n + m) % 9}" for m in range(5)) + "\n" for n in range(12))
    )
    data = prepare({"name": "s", "events": {"path": tmp_path / "s.txt", "format": "sequences"}}, tmp_path / "out")
    profile(data, tmp_path / "p.parquet", language="zh")
    table = pl.read_parquet(tmp_path / "p.parquet")
    assert not {"span_days", "mean_gap_days"} & set(table.columns) and table["text"][0].startswith(
        "共5次行为，涉及5件物品。"
    )
