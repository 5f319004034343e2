"""The ways of the table taken by real requests: who is unknown, what is unknown, and lists that are hard to make."""

import json

import numpy as np
import polars as pl
import pytest

from m6rec_jax.data.dataset import open_dataset
from m6rec_jax.data.prepare import prepare
from m6rec_jax.data.transitions import count_transitions
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.baselines import Popularity
from m6rec_jax.recommend.gating import with_gate
from m6rec_jax.recommend.generate import generate
from m6rec_jax.recommend.memory import Memory
from m6rec_jax.recommend.recommender import Recommender
from m6rec_jax.recommend.segments import Segments, freshness
from m6rec_jax.recommend.visitors import Users, read_users
from tests.recommend.conftest import saved_run

STRANGERS = [
    {"user_id": "u7", "history": ["item-1"], "age": 27},
    {"user_id": "s1", "history": ["item-3", "nowhere", "item-4"], "age": None},
    {"user_id": "s2", "history": [], "age": 25},
    {"user_id": "s3", "history": ["nowhere"], "age": 999},
]


def routes(path) -> dict[str, set[str]]:
    table = pl.read_parquet(path)
    return {user: set(part["route"]) for (user,), part in table.group_by("user_id", maintain_order=True)}


@pytest.fixture(scope="module", params=["plain", "levels"])
def world(request):
    names = {"plain": ("tiny_dataset", "tiny_run"), "levels": ("tiny_levels", "levels_run")}[request.param]
    data, run = open_dataset(request.getfixturevalue(names[0])), request.getfixturevalue(names[1])
    return data, run, with_gate(Recommender.load(run, dataset=data), run, data)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_users_with_sessions_and_attributes_take_their_way(world, tmp_path, suffix, capsys):
    data, run, recommender = world
    file, out = tmp_path / f"users.{suffix}", tmp_path / "recs.parquet"
    frame = pl.DataFrame(STRANGERS)
    if suffix == "parquet":
        frame.write_parquet(file)
    elif suffix == "csv":
        frame.with_columns(pl.col("history").list.join(" ")).write_csv(file)
    else:
        file.write_text("\n".join(json.dumps(row) for row in STRANGERS), encoding="utf-8")
    generate(run, data, users=read_users(file), out=out, k=4)
    said = capsys.readouterr().err
    assert "3 of 4 ids are not in" in said and "1 get lists by their session, 2 by their attributes, 0 by" in said
    assert "2 items of their histories are not in the catalogue" in said and "1 users with a history are in" in said
    assert routes(out) == {"u7": {"model+memory"}, "s1": {"session-memory"}, "s2": {"segment"}, "s3": {"popularity"}}
    table = pl.read_parquet(out)
    listed = {u: part["item_id"].to_list() for (u,), part in table.group_by("user_id", maintain_order=True)}
    assert all(len(items) == 4 for items in listed.values()) and not {"item-3", "item-4"} & set(listed["s1"])
    session = np.array([data.row_of("item-3"), data.row_of("item-4")])
    expected = recommender.memory.support([session], exclude=[session]).rows[0, :4]
    assert [data.row_of(i) for i in listed["s1"]] == expected.tolist()
    generate(run, data, users=read_users(file), out=tmp_path / "by-model.parquet", k=4, engine="model")
    assert routes(tmp_path / "by-model.parquet")["s1"] == {"model+memory"}
    generate(run, data, users=read_users(file), out=tmp_path / "by-memory.parquet", k=4, engine="memory")
    assert routes(tmp_path / "by-memory.parquet")["u7"] == {"memory"}


def test_another_session_is_another_job(world, tmp_path):
    data, run, _ = world
    out = tmp_path / "recs.parquet"
    lists = []
    for item in ("item-3", "item-30"):
        generate(run, data, users=pl.DataFrame({"user_id": ["s"], "history": [item]}), out=out, k=3)
        lists.append(pl.read_parquet(out)["item_id"].to_list())
    assert lists[0] != lists[1]


def test_a_user_known_without_events_is_served_by_what_is_known_of_them(tiny_run, tmp_path):
    from tests.fixtures import tiny_card, tiny_tables

    tables = tiny_tables()
    silent = pl.DataFrame({"id": ["quiet"], "age": [30]})
    card = tiny_card(tables | {"users": pl.concat([tables["users"], silent], how="vertical_relaxed")})
    data = prepare(card, tmp_path / "more", like=tiny_run)
    generate(tiny_run, data, users=["quiet", "u7", "who"], out=tmp_path / "recs.parquet")
    assert routes(tmp_path / "recs.parquet") == {"quiet": {"segment"}, "u7": {"model+memory"}, "who": {"popularity"}}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("u.csv", "id,age\n1,2\n", "no column user_id .there are id, age.*"),
        ("u.csv", "user_id,age\n", "names no user"),
        ("u.csv", "user_id,age\nu1,2\n,3\n", "no user_id in row 2"),
        ("u.jsonl", '{"user_id": "u1"}\n{"user_id"', "not readable as jsonl .line 2"),
        ("u.jsonl", "[1]\n", "not readable as jsonl"),
        ("u.parquet", "PAR1", "not readable as parquet"),
        ("u.txt", "\n\n", "names no user"),
    ],
)
def test_bad_files_of_users_are_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"--users {tmp_path / name}: {says}"):
        read_users(tmp_path / name)


def test_users_are_read_alike_from_every_kind_of_cell(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2, 1], "history": [[10, 11], None, [12]], "attributes": [["age: 5"], [], None], "town": ["Ｕlm ", None, "x"]})  # fmt: skip
    table = pl.concat(Users.of(frame).blocks())
    assert table.rows() == [("1", ["10", "11"], ["age: 5", "town: Ulm"]), ("2", [], [])]
    (tmp_path / "u.csv").write_text('user_id,history,attributes,town\n1,10 11,"[""age: 5""]",Ulm\n2,,,\n')
    assert pl.concat(read_users(tmp_path / "u.csv").blocks()).rows() == table.rows()


# -- lists that are hard to make -----------------------------------------------------------------------------------


def bare(catalogue: int, users: np.ndarray, items: np.ndarray, **parts) -> Recommender:
    """A recommender without a model over hand-made events of users sorted by time."""
    times = np.arange(len(items))
    weights = freshness(users, np.zeros(len(items)), True)
    popularity = Popularity(np.bincount(items, weights, minlength=catalogue), parts.pop("listed", None))
    frame = pl.DataFrame({"item_id": [f"i{n}" for n in range(catalogue)], "title": [""] * catalogue, "events": np.bincount(items, minlength=catalogue)})  # fmt: skip
    about = [[f"age: {u % 2}"] for u in range(int(users.max(initial=0)) + 1)]
    segments = Segments.of(about, users, items, weights, popularity)
    return Recommender(frame, memory=Memory(count_transitions(users, items, times, catalogue=catalogue)), segments=segments, **parts)  # fmt: skip


def every_way(recommender: Recommender, history: np.ndarray, k: int):
    """Lists by session, by attributes, by nothing, and of a known user."""
    empty = np.zeros(0, np.int32)
    lists = recommender.recommend_rows(
        [history, empty, empty, history], k=k, sessions=np.array([True, True, True, False]), attributes=[["age: 1"], ["age: 1"], [], []]
    )  # fmt: skip
    assert lists.routes.tolist() == ["session-memory", "segment", "popularity", "memory"]
    assert np.isfinite(lists.scores[lists.rows >= 0]).all() and (lists.scores[:, 1:] <= lists.scores[:, :-1]).all()
    return lists


def test_ties_everywhere_fall_to_the_lower_row_in_any_batch():
    """Each item once, all at one moment, nobody after anybody: nothing tells items apart."""
    n = 40
    recommender = bare(n, np.arange(n), np.arange(n))
    lists = every_way(recommender, np.array([7]), 10)
    assert lists.rows[2].tolist() == list(range(10))
    assert lists.rows[1].tolist() == [*range(1, 20, 2)]  # the segment's own items first, they are tied as well
    known = recommender.recommend_rows([np.array([7])] * 3, k=10)
    assert (known.rows == [i for i in range(11) if i != 7]).all()
    recommender.batch = 1
    assert np.array_equal(recommender.recommend_rows([np.array([7])] * 3, k=10).rows, known.rows)


def test_a_catalogue_of_one_item():
    recommender = bare(1, np.array([0, 1]), np.array([0, 0]))
    lists = every_way(recommender, np.array([0]), 5)
    assert lists.rows[1].tolist() == lists.rows[2].tolist() == [0, -1, -1, -1, -1]
    assert (lists.rows[[0, 3]] == -1).all()  # had it
    recommender.repeat = True
    assert every_way(recommender, np.array([0]), 5).rows[:, 0].tolist() == [0] * 4
    assert recommender.recommend([], 5)[0].item_id == "i0"


def test_a_run_over_a_catalogue_of_one_item(tmp_path):
    tables = {"events": pl.DataFrame({"u": [f"u{n // 4}" for n in range(40)], "i": ["only"] * 40, "t": range(40)})}
    card = {"name": "one", "repeat": True, "split": "leave-one-out"}
    card["events"] = {"path": tables["events"], "user": "u", "item": "i", "time": "t"}
    data = prepare(card, tmp_path / "one")
    run = saved_run(data.path, tmp_path / "run")
    generate(run, data, out=tmp_path / "recs.parquet", k=5)
    table = pl.read_parquet(tmp_path / "recs.parquet")
    assert table["item_id"].unique().to_list() == ["only"] and table.height == data.users.height
    assert set(table["route"]) == {"model+memory"}


def test_k_beyond_the_catalogue_on_every_way():
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(6), 5)
    lists = every_way(bare(12, users, rng.integers(0, 12, 30)), np.array([3, 3, 4]), 50)
    for row, had in zip(lists.rows, ([3, 4], [], [], [3, 4]), strict=True):
        assert sorted(row[row >= 0].tolist()) == [i for i in range(12) if i not in had]


def test_what_left_the_catalogue_stays_out_of_every_list_though_the_memory_holds_it():
    users, items = np.repeat(np.arange(6), 3), np.array([0, 1, 2] * 6)
    listed = np.array([True, False, True, True])
    lists = every_way(bare(4, users, items, listed=listed), np.array([0]), 4)
    assert not (lists.rows == 1).any() and (lists.rows[0] == lists.rows[3]).all() and lists.rows[0, 0] == 2
    assert every_way(bare(4, users, items), np.array([0]), 4).rows[0, 0] == 1  # it would lead, were it there


def test_histories_of_nothing_known_are_no_histories():
    recommender = bare(5, np.array([0, 0, 1]), np.array([1, 2, 3]))
    lists = recommender.recommend_rows(
        [np.array([-1, 99, -1]), np.array([-1])], k=3, attributes=[["age: 0"], ["age: 7"]]
    )
    assert lists.routes.tolist() == ["segment", "popularity"] and (lists.rows >= 0).all()
