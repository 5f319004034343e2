"""Numbers, pauses and shares in words, English and Chinese: M6-Rec verbalises every statistic."""

from __future__ import annotations

from collections.abc import Sequence

HOUR, DAY, WEEK, MONTH, YEAR = 3600, 86_400, 604_800, 2_592_000, 31_536_000
UNITS = (
    (YEAR, "year", "年"),
    (MONTH, "month", "个月"),
    (WEEK, "week", "周"),
    (DAY, "day", "天"),
    (HOUR, "hour", "小时"),
)
SHARES = (0.01, 0.05, 0.2, 0.5)  # how a place among all is said: in the top so much


def span_of(seconds: int, language: str) -> str:
    """A length of time in its largest whole unit: "3 days", "3天"; "" under an hour."""
    for unit, english, chinese in UNITS:
        if seconds >= unit:
            n = int(seconds // unit)
            if language == "zh":
                return f"{n}{chinese}"
            one = "an" if english == "hour" else "a"
            return f"{one} {english}" if n == 1 else f"{n} {english}s"
    return ""


def gap_of(seconds: int, language: str) -> str:
    """The pause before an event: "3 days later", "3天后"; "" under an hour, as in histories of codes."""
    span = span_of(seconds, language)
    return span and (f"{span}后" if language == "zh" else f"{span} later")


def listed(names: Sequence[str], language: str) -> str:
    """Names one after the other."""
    return ("、" if language == "zh" else ", ").join(names)


def times_of(n: int, language: str) -> str:
    """How often: "once", "4 times"."""
    return f"{n}次" if language == "zh" else {1: "once", 2: "twice"}.get(n, f"{n} times")


def rank_of(share: float, language: str) -> str:
    """A place among all, from the share that is above it: "top 5%"; the lower half is "lower half"."""
    for bound in SHARES:
        if share < bound:
            return f"前{bound:.0%}" if language == "zh" else f"top {bound:.0%}"
    return "后50%" if language == "zh" else "lower half"


def level_of(share: float, language: str) -> str:
    """The same in one word: high, middling, low."""
    words = ("高", "中", "低") if language == "zh" else ("high", "middling", "low")
    return words[0 if share < 0.2 else 1 if share < 0.5 else 2]
