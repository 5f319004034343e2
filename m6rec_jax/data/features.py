"""What is known of an item as text, as ids and as a content vector: fitted on item content, never on behaviour.

Everything fitted is plain arrays, so that a new item can be encoded years later (`--like`, `--append`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import polars as pl
import scipy.sparse as sp

from m6rec_jax.data.card_checks import CONTENT_FIELDS
from m6rec_jax.data.spectral import right_vectors, unit

NUMBER_PREFIX = "num_"
WIDTH = 256
WHITENING = 0.5  # singular values count by this power: rare, telling words are heard beside the common ones
TERMS = 30_000
UNKNOWN = 0  # id of a category or attribute that was not there when the features were fitted
_LINE_TERM_CHARS = 80
_CJK = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Khmer}\p{Lao}\p{Myanmar}"
_WORD = rf"[{_CJK}]|[\p{{L}}\p{{M}}\p{{N}}&&[^{_CJK}]]+|\p{{So}}"
_BUCKETS = ("very low, lowest 20 percent", "low, lowest 40 percent", "medium", "high, top 40 percent", "very high, top 20 percent")  # fmt: skip


class Encoder(Protocol):
    """Turns item texts (lines: title, then one field a line) into content vectors."""

    def encode(self, texts: list[str]) -> np.ndarray:
        """float32 [n, d], L2-normalised; zero where nothing is known."""
        ...


@dataclass(frozen=True)
class TfidfEncoder:
    """TF-IDF over words (characters and pairs of them in scripts without spaces) and whole short fields, then a
    truncated SVD: `terms` [t] (sorted), `idf` [t], `components` [t, d]."""

    terms: list[str]
    idf: np.ndarray
    components: np.ndarray

    def weigh(self, texts: list[str]) -> sp.csr_array:
        """TF-IDF of each text over `terms` `[n, t]`, unit rows."""
        return _tfidf(_count_terms(texts), len(texts), self.terms, self.idf)

    def encode(self, texts: list[str]) -> np.ndarray:
        return unit((self.weigh(texts) @ self.components).astype(np.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays for an npz."""
        return {
            "encoder_terms": pack_strings(self.terms),
            "encoder_idf": self.idf,
            "encoder_components": self.components,
        }

    @classmethod
    def from_arrays(cls, data: dict[str, np.ndarray]) -> TfidfEncoder:
        return cls(unpack_strings(data["encoder_terms"]), data["encoder_idf"], data["encoder_components"])


def fit_encoder(texts: list[str], width: int = WIDTH) -> tuple[TfidfEncoder, np.ndarray]:
    """(encoder, its vectors of `texts`), fitted on the text of every item of the catalogue.

    The width shrinks where there is less to know.
    """
    counted = _count_terms(texts)
    enough = 2 if len(texts) >= 50 else 1
    ranked = (
        counted.group_by("term")
        .agg(df=pl.len())
        .filter(pl.col("df") >= enough)
        .sort(["df", "term"], descending=[True, False])
        .head(TERMS)
        .sort("term")
    )
    idf = (np.log((1 + len(texts)) / (1 + ranked["df"].to_numpy())) + 1).astype(np.float32)
    matrix = _tfidf(counted, len(texts), ranked["term"].to_list(), idf)
    if not ranked.height:
        return TfidfEncoder([], idf, np.zeros((0, 1), np.float32)), np.zeros((len(texts), 1), np.float32)
    components = right_vectors(matrix, width)
    components *= np.linalg.norm(matrix @ components, axis=0) ** (WHITENING - 1)
    return TfidfEncoder(ranked["term"].to_list(), idf, components), unit(matrix @ components)


@dataclass(frozen=True)
class Fields:
    """Ids and buckets: known `categories` and `attributes` (sorted; id = place + 1), and for every number its four
    quintile borders."""

    categories: list[str]
    attributes: list[str]
    numbers: dict[str, np.ndarray]

    def arrays(self) -> dict[str, np.ndarray]:
        names = sorted(self.numbers)
        return {
            "fields_categories": pack_strings(self.categories),
            "fields_attributes": pack_strings(self.attributes),
            "fields_numbers": pack_strings(names),
            "fields_borders": np.array([self.numbers[n] for n in names], np.float64).reshape(len(names), 4),
        }

    @classmethod
    def from_arrays(cls, data: dict[str, np.ndarray]) -> Fields:
        names = unpack_strings(data["fields_numbers"])
        borders = dict(zip(names, data["fields_borders"], strict=True))
        return cls(unpack_strings(data["fields_categories"]), unpack_strings(data["fields_attributes"]), borders)

    def apply(self, items: pl.DataFrame) -> pl.DataFrame:
        """`items` with `category_ids`, `attribute_ids` (lists), a `bucket_<number>` (0..4) and `numbers` (in words)."""
        ids = [
            pl.col(column)
            .list.eval(
                pl.element().replace_strict(known, range(1, len(known) + 1), default=UNKNOWN, return_dtype=pl.Int32)
            )
            .alias(alias)
            for column, known, alias in (
                ("categories", self.categories, "category_ids"),
                ("attributes", self.attributes, "attribute_ids"),
            )
        ]
        items = items.with_columns(ids)
        said = []
        for name, borders in self.numbers.items():
            value = pl.col(NUMBER_PREFIX + name)
            if NUMBER_PREFIX + name not in items.columns:
                continue
            bucket = sum((value > border).cast(pl.UInt8) for border in borders.tolist())
            known = value.is_not_null() & value.is_not_nan()
            items = items.with_columns(pl.when(known).then(bucket).alias(f"bucket_{name}"))
            words = pl.col(f"bucket_{name}").replace_strict(range(5), list(_BUCKETS), return_dtype=pl.String)
            said.append(pl.lit(f"{name} ") + words)
        numbers = pl.concat_list(said).list.drop_nulls() if said else pl.lit([], dtype=pl.List(pl.String))
        return items.with_columns(numbers.alias("numbers"))


def fit_fields(items: pl.DataFrame) -> Fields:
    """Known categories, attributes and quintiles of the catalogue's numbers."""

    def names(column: str) -> list[str]:
        return items[column].explode().drop_nulls().unique().sort().to_list()

    numbers = {}
    for column in items.columns:
        if column.startswith(NUMBER_PREFIX):
            values = items[column].drop_nulls().drop_nans()
            if len(values):
                numbers[column.removeprefix(NUMBER_PREFIX)] = np.quantile(values.to_numpy(), (0.2, 0.4, 0.6, 0.8))
    return Fields(names("categories"), names("attributes"), numbers)


def item_texts(items: pl.DataFrame, fields: Sequence[str] = CONTENT_FIELDS) -> list[str]:
    """One text an item: the title on the first line, then a line each for categories, attributes, numbers in words
    (`Fields.apply` writes them) and running text; of those, what `fields` name."""
    lists = [pl.col(c).list.join("\n").fill_null("") for c in ("categories", "attributes", "numbers") if c in fields]
    title = pl.col("title").fill_null("").str.replace_all("\n", " ") if "title" in fields else pl.lit("")
    text = [pl.col("text").fill_null("")] if "text" in fields else []
    joined = pl.concat_str([title, *lists, *text], separator="\n")
    return items.select(joined.str.strip_chars_end("\n").str.replace_all("\n{2,}", "\n")).to_series().to_list()


def pack_strings(strings: Sequence[str]) -> np.ndarray:
    """Strings without line breaks as one uint8 array (npz without pickle)."""
    return np.frombuffer("\n".join(strings).encode("utf-8"), np.uint8)


def unpack_strings(data: np.ndarray) -> list[str]:
    return data.tobytes().decode("utf-8").split("\n") if len(data) else []


def _count_terms(texts: list[str]) -> pl.DataFrame:
    """`row, term, n`: how often each term occurs in each text. A short field counts as one term as well as by its words."""
    lines = (
        pl.LazyFrame({"text": texts}, schema={"text": pl.String})
        .with_row_index("row")
        .with_columns(pl.col("text").str.to_lowercase().str.split("\n"))
        .explode("text", empty_as_null=False)
        .with_columns(first=pl.int_range(pl.len()).over("row") == 0)
    )
    words = lines.select("row", term=pl.col("text").str.extract_all(_WORD))
    pairs = [
        lines.filter(pl.col("text").str.contains(rf"[{_CJK}]{{2}}"))
        .select("row", run=pl.col("text").str.extract_all(rf"[{_CJK}]{{2,}}"))
        .explode("run", empty_as_null=False)
        .select("row", term=pl.col("run").str.slice(start).str.extract_all(rf"[{_CJK}]{{2}}"))
        for start in (0, 1)
    ]
    single = pl.concat([words, *pairs]).explode("term", empty_as_null=False)
    whole = lines.filter(~pl.col("first") & pl.col("text").str.len_chars().is_between(1, _LINE_TERM_CHARS)).select(
        "row", term="=" + pl.col("text")
    )
    return (
        pl.concat([single, whole])
        .filter(pl.col("term").is_not_null())
        .group_by("row", "term")
        .agg(n=pl.len())
        .sort("row", "term")
        .collect()
    )


def _tfidf(counted: pl.DataFrame, rows: int, terms: list[str], idf: np.ndarray) -> sp.csr_array:
    """Sublinear TF-IDF `[rows, terms]` with unit rows."""
    index = pl.DataFrame({"term": terms}, schema={"term": pl.String}).with_row_index("column")
    found = counted.join(index, on="term", how="inner").sort("row", "column")
    columns = found["column"].to_numpy()
    weights = (1 + np.log(found["n"].to_numpy())) * idf[columns]
    matrix = sp.csr_array((weights, (found["row"].to_numpy(), columns)), shape=(rows, len(terms)), dtype=np.float32)
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    return sp.csr_array(sp.diags_array(1 / np.maximum(norms, 1e-12), dtype=np.float32) @ matrix)
