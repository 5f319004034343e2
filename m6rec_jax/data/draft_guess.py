"""What the columns of an unknown table may mean: by their names, and by the values that stand in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import polars as pl

from m6rec_jax.data import values
from m6rec_jax.data.card_checks import guess_format
from m6rec_jax.data.formats import json_lines, json_records, record_columns, records_frame

ROWS = 20_000  # looked at in each table

NAMES = {  # meaning -> the names it goes by, the surest first
    "user": (
        "user user_id userid uid user_name username customer customer_id client_id visitor visitor_id visitorid "
        "reviewer_id member_id account_id profile_id person_id session session_id 用户 用户id"
    ),
    "item": (
        "item item_id itemid iid movie movie_id product product_id prod_id article article_id video video_id news "
        "news_id song song_id track track_id book book_id parent_asin asin isbn sku sku_id goods_id content_id "
        "business_id poi_id game_id ad_id 商品 商品id"
    ),
    "time": (
        "time timestamp t ts time_ms timestamp_ms unix_time unix_timestamp unixreviewtime event_time eventtime "
        "datetime date created_at created updated_at order_date purchase_date review_date reviewtime time_stamp 时间"
    ),
    "kind": "kind event event_type eventtype action action_type behavior behavior_type behaviour interaction type",
    "value": "rating value score overall stars star_rating play_count count weight watch_ratio",
    "query": "query search_query search_term search keyword keywords",
    "clicked": "clicked click is_click is_clicked label y",
    "title": (
        "title name item_title item_name movie_title movie_name product_title product_name book_title headline "
        "caption 标题 名称"
    ),
    "text": (
        "description text summary abstract body content overview plot synopsis detail review_text "
        "manual_cover_text feature features document 描述"
    ),
    "categories": (
        "categories category genres genre class classes topics topic topic_tag tags category_name main_category "
        "sub_category subcategory first_level_category_name second_level_category_name third_level_category_name "
        "类别"
    ),
    "attributes": (
        "attributes brand manufacturer maker store seller author authors artist artists album director publisher "
        "color colour size material language country city year release_year"
    ),
    "numbers": "price list_price cost duration length runtime pages num_pages",
    "published": "published release_year year release_date publish_date published_at pub_date publication_date",
    "type": "item_type type kind media_type",
    "image": "image image_url img img_url imurl picture poster cover thumbnail",
    "audio": "audio audio_url",
    "video": "video_url video_path",
    "person": (
        "age gender sex occupation job profession country city region language income education marital_status 年龄 "
        "性别"
    ),
}


@dataclass(frozen=True)
class Sample:
    """The first rows of a file, every cell as text; `columns` in their order."""

    path: Path
    format: str
    frame: pl.DataFrame
    lists: frozenset[str] = field(default_factory=frozenset)  # columns whose cells are lists

    @property
    def columns(self) -> list[str]:
        return self.frame.columns


def look(path: Path) -> Sample | None:
    """A sample of a table file; None when it is none that we know."""
    kind = guess_format(path)
    try:
        if kind == "" and path.suffix in (".txt", ".seq", ".dat"):
            return _sequences(path)
        if kind == "json" and (lines := _json_lines(path)):
            kind, frame = "jsonl", _framed(lines)
        elif kind:
            frame = READ[kind](path)
        else:
            return None
    except (OSError, ValueError, pl.exceptions.PolarsError):
        return None
    if frame.width == 0 or frame.height == 0:
        return None
    texts = frame.select(values.texts(frame[c]).alias(c) for c in frame.columns)
    lists = frozenset(c for c in texts.columns if texts[c].drop_nulls().head(50).str.contains(r"^\[.*\]$").mean() == 1)
    return Sample(path, kind, texts, lists)


def find(sample: Sample, meaning: str, besides: Iterable[str] = ()) -> str:
    """The column whose name means `meaning`, the surest first; "" when there is none."""
    plain = {_plain(c): c for c in reversed(sample.columns) if c not in set(besides)}
    return next((plain[_plain(name)] for name in NAMES[meaning].split() if _plain(name) in plain), "")


def find_all(sample: Sample, meaning: str, besides: Iterable[str] = ()) -> list[str]:
    """Every column whose name means `meaning`, in the table's order."""
    names = {_plain(name) for name in NAMES[meaning].split()}
    return [c for c in sample.columns if _plain(c) in names and c not in set(besides)]


def time_unit(column: pl.Series) -> str:
    """s, ms, iso or order, by the size of the numbers; "" for what no unit explains."""
    known = values.texts(column).drop_nulls()
    numbers = known.cast(pl.Float64, strict=False)
    if numbers.null_count() > len(known) // 2:
        parsed = values.times(known, "iso")
        return "iso" if parsed.null_count() <= len(known) // 2 else ""
    middle = numbers.median() or 0.0
    if 1e8 <= middle < 1e11:
        return "s"
    return "ms" if 1e11 <= middle < 1e14 else "order" if middle < 1e8 else ""


def list_separator(sample: Sample, columns: list[str]) -> str:
    """What parts the values of these text columns, where it is not "|" or a JSON list; "" when nothing does."""
    text = pl.concat([sample.frame[c].drop_nulls().head(2000).rename("x") for c in columns]) if columns else None
    if text is None or not len(text) or any(c in sample.lists for c in columns) or sample.format == "recbole":
        return ""
    shares = {mark: text.str.contains(mark, literal=True).mean() for mark in ("|", ";", " > ", ", ", ",", "/")}
    best = max(shares, key=lambda mark: shares[mark] or 0)
    return best if best != "|" and (shares[best] or 0) > 0.3 else ""


def overlap(sample: Sample, column: str, ids: set[str]) -> float:
    """Share of `ids` that stand in a column (its lists opened)."""
    if not ids:
        return 0.0
    cells = values.sequences(sample.frame[column], "").explode() if column in sample.lists else sample.frame[column]
    return len(ids & set(values.ids(cells.drop_nulls()).to_list())) / len(ids)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def _sequences(path: Path) -> Sample | None:
    """Lines of bare words, of different lengths: `user item item ...`."""
    with open(path, encoding="utf-8") as file:
        rows = [line.split() for line in islice(file, ROWS)]
    rows = [row for row in rows if row]
    if (
        not rows
        or len({len(row) for row in rows}) < 2
        or not all(re.fullmatch(r"[\w.:-]+", w) for r in rows for w in r)
    ):
        return None
    frame = pl.DataFrame({"user": [row[0] for row in rows], "items": [json.dumps(row[1:]) for row in rows]})
    return Sample(path, "sequences", frame, frozenset({"items"}))


def _json_lines(path: Path) -> list[dict]:
    """The first records when a .json file holds one object a line; [] when it is one JSON value."""
    try:
        records = _first_lines(path)
    except ValueError:
        return []
    return records if len(records) > 1 and all(isinstance(one, dict) for one in records) else []


def _first_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8-sig") as file:
        return json_lines(islice(file, ROWS))


def _framed(records: list[dict]) -> pl.DataFrame:
    return records_frame(records, record_columns(records))


def _delimited(path: Path, separator: str) -> pl.DataFrame:
    return pl.read_csv(path, separator=separator, infer_schema=False, n_rows=ROWS, encoding="utf8-lossy")


def _recbole(path: Path) -> pl.DataFrame:
    frame = pl.read_csv(path, separator="\t", quote_char=None, infer_schema=False, n_rows=ROWS)
    return frame.rename({c: c.split(":")[0] for c in frame.columns})


READ = {
    "csv": lambda path: _delimited(path, ","),
    "tsv": lambda path: _delimited(path, "\t"),
    "recbole": _recbole,
    "parquet": lambda path: pl.scan_parquet(path).head(ROWS).collect(),
    "jsonl": lambda path: _framed(_first_lines(path)),
    "json": lambda path: _framed(json_records(path.read_bytes())),
}
