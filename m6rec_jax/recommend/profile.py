"""Profiles of users: what they do and how often, what they are interested in; as Parquet and in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from m6rec_jax.artifacts.atomic import atomic_path
from m6rec_jax.data.dataset import Dataset, open_dataset
from m6rec_jax.data.splits import TRAIN
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.blocks import BLOCK, vectors_column, write_blocks
from m6rec_jax.recommend.segments import freshness
from m6rec_jax.recommend.topics import TOPICS, Topics, fit_topics, user_topics

DAY = 86_400
CATEGORIES, INTERESTS = 10, 3  # as many as are listed for a user
BUCKETS = "bucket_"
LANGUAGES = ("en", "zh")
_NOTHING = pl.lit([], dtype=pl.List(pl.Struct({"name": pl.String, "share": pl.Float64})))


def profile(dataset: Dataset | Path | str, out: Path | str, *, topics: int = TOPICS, split: str = "all",
            language: str | None = None, seed: int = 0) -> int:  # fmt: skip
    """Write the profile of every user with events to `out`, a row each in user order; returns how many.

    Columns: `statistics` and, for `topics` above 0, `topics` (shares over all topics) and `interests` (the strongest,
    with their words); `language` adds `text` (see `say`). Beside it `<stem>.topics.parquet` says what each topic is
    about and `<stem>.items.parquet` how much of it each item has. `split` train leaves out what is held out, for texts
    that a model is to learn from. Raises InputError when split or language is unknown, or there is no event.
    """
    if split not in ("all", "train"):
        raise InputError(f"split={split}: choose all or train")
    if language is not None and language not in LANGUAGES:
        raise InputError(f"language={language}: choose one of {', '.join(LANGUAGES)}")
    if topics < 0:
        raise InputError(f"topics={topics}: must not be negative")
    data, out = dataset if isinstance(dataset, Dataset) else open_dataset(dataset), Path(out)
    events = _events(data, split)
    if not events.height:
        raise InputError(f"{data.path}: no events of split={split}; nobody to profile")
    found = fit_topics(data, topics, seed) if topics else Topics.none(data.catalogue)
    owners = events["user"].to_numpy()
    kinds = np.array(data.manifest["kind_weights"] or [1.0], np.float64)[events["kind"].to_numpy()]
    weights = freshness(owners, events["time"].to_numpy(), data.timed) * kinds * (events["item"] >= 0).to_numpy()
    users, starts = np.unique(owners, return_index=True)
    cuts = np.append(starts, len(owners))

    def blocks() -> Iterator[pl.DataFrame]:
        for start in range(0, len(users), BLOCK):
            end = min(start + BLOCK, len(users))
            span = slice(int(cuts[start]), int(cuts[end]))
            made = statistics(events[span], data)
            if len(found):
                rows = np.searchsorted(users[start:end], owners[span])
                items = np.maximum(events["item"][span].to_numpy(), 0)
                made = made.with_columns(_interests(user_topics(rows, items, weights[span], found.weights, end - start), found))  # fmt: skip
            if language is not None:
                text = [say(row, language) for row in made.iter_rows(named=True)]
                made = made.with_columns(pl.Series("text", text, dtype=pl.String))
            yield made

    if len(found):
        _write_topics(data, found, out)
    return write_blocks(out, blocks(), len(users), "users")


def _events(data: Dataset, split: str) -> pl.DataFrame:
    path = data.path / "events.parquet"
    try:
        whole = pl.scan_parquet(path)
        kept = whole.filter(pl.col("split") == TRAIN) if split == "train" else whole
        return kept.select("user", "item", "time", "kind").collect()
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not readable ({reason}); prepare the dataset again") from None


def statistics(events: pl.DataFrame, data: Dataset) -> pl.DataFrame:
    """One row a user of `events` (`user, item, time, kind`, by user and time), in their order.

    `events`, `items` (distinct), `repeat_share` of events whose item the user had before, `first` and `last` (time);
    `span_days` and `mean_gap_days` where times are seconds; `kind_<name>` counts; `categories`: share of the item
    events that are in each of the most frequent ones; `<number>_shares`: of the item events with a known value, the
    share in each fifth of the catalogue's values, lowest first.
    """
    item = pl.col("item").filter(pl.col("item") >= 0)
    gaps = pl.when(pl.len() > 1).then((pl.col("time").max() - pl.col("time").min()) / DAY / (pl.len() - 1))
    columns = {
        "events": pl.len(),
        "items": item.n_unique(),
        "repeat_share": pl.when(item.len() > 0).then(1 - item.n_unique() / item.len()).otherwise(0.0),
        "first": pl.col("time").min(),
        "last": pl.col("time").max(),
    }
    if data.timed:
        columns |= {"span_days": (pl.col("time").max() - pl.col("time").min()) / DAY, "mean_gap_days": gaps}
    columns |= {f"kind_{name}": (pl.col("kind") == number).sum() for number, name in enumerate(data.kinds)}
    made = events.group_by("user", maintain_order=True).agg(**columns)
    buckets = [name for name in data.items.columns if name.startswith(BUCKETS)]
    taken = events.filter(pl.col("item") >= 0)
    known = data.items.select(pl.int_range(pl.len(), dtype=taken.schema["item"]).alias("item"), "categories", *buckets)
    taken = taken.join(known, on="item", how="left", maintain_order="left")
    shares = [
        pl.concat_list([(pl.col(name) == fifth).mean().fill_null(0.0) for fifth in range(5)]).alias(f"{name.removeprefix(BUCKETS)}_shares")
        for name in buckets
    ]  # fmt: skip
    counts = taken.group_by("user").agg(pl.len().alias("n"), *shares)
    categories = (
        taken.select("user", pl.col("categories").list.unique().alias("name"))
        .explode("name", empty_as_null=False)
        .drop_nulls("name")
        .group_by("user", "name")
        .agg(pl.len().alias("count"))
        .sort(["user", "count", "name"], descending=[False, True, False])
        .group_by("user", maintain_order=True)
        .head(CATEGORIES)
        .join(counts.select("user", "n"), on="user", how="left", maintain_order="left")
        .group_by("user", maintain_order=True)
        .agg(pl.struct("name", share=pl.col("count") / pl.col("n")).alias("categories"))
    )
    made = made.join(categories, on="user", how="left", maintain_order="left")
    made = made.join(counts.drop("n"), on="user", how="left", maintain_order="left")
    names = data.users["user_id"].gather(made["user"])
    return made.select(
        names.alias("user_id"),
        pl.exclude("user", "categories", r"^.*_shares$"),
        pl.col("categories").fill_null(_NOTHING),
        *(pl.col(f"{name.removeprefix(BUCKETS)}_shares").fill_null(pl.lit([0.0] * 5)) for name in buckets),
    )


def _interests(shares: np.ndarray, found: Topics) -> list[pl.Series]:
    """Columns `topics` and `interests` of users with topic shares `[U, K]`."""
    best = np.argsort(-shares, axis=1, kind="stable")[:, :INTERESTS].tolist()
    listed = [
        [{"topic": k, "share": float(own[k]), "words": found.words[k]} for k in top if own[k] > 0]
        for top, own in zip(best, shares, strict=True)
    ]
    kind = pl.List(pl.Struct({"topic": pl.Int64, "share": pl.Float64, "words": pl.List(pl.String)}))
    return [vectors_column("topics", shares), pl.Series("interests", listed, dtype=kind)]


def _write_topics(data: Dataset, found: Topics, out: Path) -> None:
    share = found.weights.mean(axis=0).astype(np.float64)
    about = pl.DataFrame({"topic": range(len(found)), "share": share, "words": found.words})
    with atomic_path(out.with_name(f"{out.stem}.topics.parquet")) as partial:
        about.write_parquet(partial)
    with atomic_path(out.with_name(f"{out.stem}.items.parquet")) as partial:
        data.items.select("item_id").with_columns(vectors_column("topics", found.weights)).write_parquet(partial)


# -- in words ------------------------------------------------------------------------------------------------------

_WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "did": "{events} events with {items} items", "in": " in {span:.0f} days", "every": ", one every {gap:.1f} days",
        "again": "; {repeat:.0f} % were repeats", "kinds": "By kind: {}.", "categories": "Mostly {}.",
        "number": "{name}: mostly {bucket}.", "interests": "Interested in {}.", "share": "{name} ({share:.0f} %)",
        "words": ", ", "comma": ", ", "semicolon": "; ", "stop": ".", "join": " ", "kind": "{name} {count}",
        "buckets": ("very low", "low", "medium", "high", "very high"),
    },
    "zh": {
        "did": "共{events}次行为，涉及{items}件物品", "in": "，历时{span:.0f}天", "every": "，平均每{gap:.1f}天一次",
        "again": "，其中{repeat:.0f}%为重复", "kinds": "行为：{}。", "categories": "常看：{}。",
        "number": "{name}：多为{bucket}。", "interests": "兴趣：{}。", "share": "{name}（{share:.0f}%）",
        "words": "、", "comma": "、", "semicolon": "；", "stop": "。", "join": "", "kind": "{name}{count}次",
        "buckets": ("很低", "偏低", "中等", "偏高", "很高"),
    },
}  # fmt: skip


def say(profile: Mapping[str, Any], language: str = "en") -> str:
    """A row of a profile in a few sentences, English or Chinese (`zh`): source text for tasks, and readable.

    Names of kinds, categories and numbers, and the words of topics, stay in the language of the data.
    """
    w = _WORDS[language]
    said = w["did"].format(events=profile["events"], items=profile["items"])
    if profile.get("span_days") is not None:
        said += w["in"].format(span=profile["span_days"])
    if profile.get("mean_gap_days") is not None:
        said += w["every"].format(gap=profile["mean_gap_days"])
    if profile["repeat_share"] > 0:
        said += w["again"].format(repeat=100 * profile["repeat_share"])
    sentences = [said + w["stop"]]
    kinds = [(name.removeprefix("kind_"), count) for name, count in profile.items() if name.startswith("kind_") and count]  # fmt: skip
    if kinds:
        sentences.append(w["kinds"].format(w["comma"].join(w["kind"].format(name=n, count=c) for n, c in kinds)))
    share = lambda name, value: w["share"].format(name=name, share=100 * value)  # noqa: E731
    if profile["categories"]:
        most = [share(one["name"], one["share"]) for one in profile["categories"][:INTERESTS]]
        sentences.append(w["categories"].format(w["comma"].join(most)))
    for name, fifths in profile.items():
        if name.endswith("_shares") and sum(fifths) > 0:
            bucket = w["buckets"][int(np.argmax(fifths))]
            sentences.append(w["number"].format(name=name.removesuffix("_shares").replace("_", " "), bucket=bucket))
    if profile.get("interests"):
        about = [share(w["words"].join(one["words"][:4]), one["share"]) for one in profile["interests"]]
        sentences.append(w["interests"].format(w["semicolon"].join(about)))
    return w["join"].join(sentences)
