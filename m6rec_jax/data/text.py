"""Cleaning of running text: tags, entities, mojibake, control characters, NFKC, white space, length.

Cleaning is idempotent: a pass is repeated until nothing changes. Most text needs none of it, so a cheap look
decides first, and each distinct string is cleaned once.
"""

from __future__ import annotations

import re
import unicodedata
from html.entities import html5

import polars as pl
from ftfy import fix_encoding
from selectolax.lexbor import LexborHTMLParser

TEXT_RULES = ("html", "entities", "mojibake", "control_characters", "nfkc", "white_space", "overlong")
SLACK = 8  # a raw text is cut at this many times its limit before anything else looks at it
PASSES = 20

SUSPECT = r"[^\x20-\x7e]|<[A-Za-z/!]|&[#A-Za-z]|  |^ | $"
_NAMES = (
    "a|abbr|acronym|address|area|article|aside|audio|b|base|bdi|bdo|big|blockquote|body|br|button|canvas|caption|center|"
    "cite|code|col|colgroup|dd|del|details|dfn|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|"
    "head|header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|map|mark|meta|nav|noscript|object|ol|"
    "optgroup|option|p|param|picture|pre|q|s|samp|script|section|select|small|source|span|strike|strong|style|sub|"
    "summary|sup|svg|table|tbody|td|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|var|video|wbr"
)
_BARE = "allowfullscreen|async|autoplay|checked|compact|controls|default|defer|disabled|hidden|loop|multiple|muted|nowrap|noshade|open|readonly|required|selected"
_ATTRIBUTE = rf"""\s+(?:[A-Za-z_:@][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{_BARE})(?=[\s/>]))"""
TAG = re.compile(rf"<(/?)({_NAMES})(?:{_ATTRIBUTE})*\s*/?>|<!--.*?-->|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL)
INLINE = frozenset(["a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "del", "dfn", "em", "font", "i", "ins", "kbd", "label", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "tt", "u", "var", "wbr"])  # fmt: skip
UNSEEN = "script,style,noscript,iframe,object,svg"
ENTITY = re.compile(r"&(?:amp;)*(#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064"
    "\u2066-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)  # Cc that is not white space, soft hyphen, direction marks, BOM; joiners of emoji and Persian (200c, 200d) stay
# UTF-8 read as another encoding always leaves some accented, Cyrillic, Greek or box-drawing character behind.
GARBLED = re.compile("[\x80-\u05ff\u2500-\u259f]")
SPACE = re.compile(r"^\s+|\s+$|[^\S ]|\s{2,}")


def clean_column(series: pl.Series, limit: int, counts: dict[str, int]) -> pl.Series:
    """A string column cleaned; adds to `counts` the cells that each rule changed. Null stays null."""
    column = pl.col("x")
    frame = series.to_frame("x").with_columns(
        suspect=column.str.contains(SUSPECT) | ((column.str.len_bytes() > limit) & (column.str.len_chars() > limit))
    )
    suspects = frame.filter("suspect")["x"].value_counts()
    if suspects.height == 0:
        return series
    made, changed = [], dict.fromkeys(TEXT_RULES, 0)
    for text, times in zip(suspects["x"].to_list(), suspects["count"].to_list(), strict=True):
        cleaned, rules = _clean(text, limit)
        made.append(cleaned)
        for rule in rules:
            changed[rule] += times
    for rule, n in changed.items():
        counts[rule] = counts.get(rule, 0) + n
    table = suspects.select("x", pl.Series("y", made, dtype=pl.String))
    found = frame.join(table, on="x", how="left", maintain_order="left")
    return found.select(pl.coalesce("y", "x").alias(series.name)).to_series()


def clean_lists(series: pl.Series, limit: int, counts: dict[str, int]) -> pl.Series:
    """A column of string lists, each string cleaned, empty ones and repeats left out."""
    flat = series.to_frame("x").with_row_index("at").explode("x").drop_nulls("x")
    cleaned = clean_column(flat["x"], limit, counts)
    if (cleaned == flat["x"]).all() and not (cleaned == "").any():
        return series
    lists = (
        flat.with_columns(cleaned.alias("x"))
        .filter(pl.col("x") != "")
        .group_by("at", maintain_order=True)
        .agg(pl.col("x").unique(maintain_order=True))
    )
    every = pl.DataFrame({"at": pl.int_range(len(series), dtype=flat["at"].dtype, eager=True)})
    empty = pl.lit([], dtype=pl.List(pl.String))
    return (
        every.join(lists, on="at", how="left", maintain_order="left")
        .select(pl.col("x").fill_null(empty))
        .to_series()
        .alias(series.name)
    )


def _clean(text: str, limit: int) -> tuple[str, set[str]]:
    rules: set[str] = set()
    if len(text) > SLACK * limit:
        text = text[: SLACK * limit]
        rules.add("overlong")
    for _ in range(PASSES):
        before = text
        text = _pass(text, limit, rules)
        if text == before:
            break
    return text, rules


def _pass(text: str, limit: int, rules: set[str]) -> str:
    tagged = "<" in text and TAG.search(text)
    if tagged:
        text = _without_tags(text)
        rules.add("html")
    if "&" in text and (decoded := ENTITY.sub(_entity, text)) != text:
        text = decoded
        rules.add("entities")
    if not text.isascii():
        if GARBLED.search(text) and (fixed := fix_encoding(text)) != text:
            text = fixed
            rules.add("mojibake")
        if not unicodedata.is_normalized("NFKC", text):
            text = unicodedata.normalize("NFKC", text)
            rules.add("nfkc")
    if CONTROL.search(text):
        text = CONTROL.sub("", text)
        rules.add("control_characters")
    if SPACE.search(text):
        text = " ".join(text.split())
        if not tagged:
            rules.add("white_space")
    if len(text) > limit:
        text = text[:limit].rstrip()
        rules.add("overlong")
    return text


def _entity(match: re.Match) -> str:
    name = match[1]
    if name[0] != "#":
        return html5.get(name + ";", match[0])
    point = int(name[1:]) if name[1].isdigit() else int(f"0{name[1:]}", 16)
    if point > 0x10FFFF or 0xD800 <= point <= 0xDFFF:
        return ""
    return chr(point)


def _without_tags(text: str) -> str:
    """The visible text of HTML: block tags part words, inline ones do not; a `<` that opens no tag is text."""
    parts, end = [], 0
    for tag in TAG.finditer(text):
        parts.append(text[end : tag.start()].replace("<", "&lt;"))
        parts.append(tag[0] if (tag[2] or "").lower() in INLINE else "\n" + tag[0])
        end = tag.end()
    parts.append(text[end:].replace("<", "&lt;"))
    parser = LexborHTMLParser("<body>" + "".join(parts))
    for node in parser.css(UNSEEN):
        node.decompose()
    return parser.root.text(separator="") if parser.root else ""
