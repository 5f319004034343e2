"""With hmac no raw user id gets anywhere: not into tables, rejected rows, the report, or messages."""

import json

import polars as pl
import pytest

from m6rec_jax.data.card import load_card
from m6rec_jax.data.clean import clean
from m6rec_jax.data.privacy import check_key_place, hide_id
from m6rec_jax.data.quality import quality_report
from m6rec_jax.data.sources import read_tables
from m6rec_jax.errors import InputError

KEY = b"0123456789abcdef0123456789abcdef"
SECRETS = ["alice@example.org", "bob@example.org", "carol@example.org"]


def card_of(folder, key="user.key", **more):
    events = pl.DataFrame(
        {
            "u": [*SECRETS, "alice@example.org", "bob@example.org"] * 40,
            "i": [str(n % 7) for n in range(200)],
            "t": [*(str(n) for n in range(198)), "99999999999", "bob said soon"],
        }
    )
    users = pl.DataFrame({"u": [*SECRETS, SECRETS[0]], "age": [1, 2, 3, 4]})
    shown = pl.DataFrame({"u": SECRETS, "i": ["1", "2", "99"], "t": ["1", "x", "3"], "y": [1, 0, 1]})
    return {
        "name": "secret",
        "events": {"path": events, "user": "u", "item": "i", "time": "t"},
        "users": {"path": users, "id": "u", "attributes": ["age"]},
        "impressions": {"path": shown, "user": "u", "item": "i", "time": "t", "clicked": "y"},
        "clean": {"min_user_events": 50},
        "privacy": {"ids": "hmac", "key": str(folder / key)},
        **more,
    }


def test_no_raw_id_survives(tmp_path):
    (tmp_path / "user.key").write_bytes(KEY)
    card = load_card(card_of(tmp_path))
    tables = read_tables(card)
    cleaned = clean(tables, card)
    quality_report(tables, cleaned, card, tmp_path / "quality.html")
    assert {"bad_time", "future_time", "few_user_events", "duplicate_user", "unknown_item"} <= set(
        cleaned.rejected["rule"]
    )
    written = [(tmp_path / "quality.html").read_text(), json.dumps(card.to_dict())]
    for these in (tables, cleaned.tables):
        for frame in (these.events, these.users, these.impressions, these.rejected, cleaned.rejected):
            written.append(frame.write_ndjson())
    for secret in SECRETS:
        assert not any(secret in text for text in written)
    assert hide_id(SECRETS[0], KEY) in cleaned.tables.events["user_id"].to_list()


def test_the_same_key_gives_the_same_users_everywhere_and_another_key_others(tmp_path):
    (tmp_path / "user.key").write_bytes(KEY)
    (tmp_path / "other.key").write_bytes(KEY[::-1])
    mine, other = (read_tables(load_card(card_of(tmp_path, key))) for key in ("user.key", "other.key"))
    plain = read_tables(load_card(card_of(tmp_path, privacy={"ids": "plain"})))
    assert (
        set(mine.events["user_id"])
        == set(mine.users["user_id"])
        == set(mine.impressions["user_id"]) | {hide_id(SECRETS[1], KEY)}
    )
    assert not set(mine.events["user_id"]) & set(other.events["user_id"])
    assert mine.events.drop("user_id").equals(plain.events.drop("user_id"))
    assert mine.events["user_id"].rank("dense").n_unique() == plain.events["user_id"].n_unique()


def test_a_key_that_is_missing_short_or_inside_the_dataset(tmp_path):
    with pytest.raises(InputError, match="privacy.key.*no such file.*urandom"):
        read_tables(load_card(card_of(tmp_path)))
    (tmp_path / "user.key").write_bytes(b"short")
    with pytest.raises(InputError, match="privacy.key.*5 bytes"):
        read_tables(load_card(card_of(tmp_path)))
    out = tmp_path / "dataset"
    out.mkdir()
    (out / "user.key").write_bytes(KEY)
    (tmp_path / "link.key").symlink_to(out / "user.key")
    for key in ("dataset/user.key", "dataset/../dataset/user.key", "link.key"):
        with pytest.raises(InputError, match="privacy.key.*inside the dataset"):
            check_key_place(load_card(card_of(tmp_path, key)), out)
    check_key_place(load_card(card_of(tmp_path, "user.key")), out)
