"""The quality report of a data set: one self-contained page for people, its figures for thresholds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from m6rec_jax.artifacts.atomic import write_text
from m6rec_jax.data import quality_charts
from m6rec_jax.data.card import Card
from m6rec_jax.data.clean import Cleaned
from m6rec_jax.data.quality_figures import figures
from m6rec_jax.data.sources import Tables
from m6rec_jax.errors import InputError

TEMPLATES = Path(__file__).parent / "templates"


def quality_report(tables: Tables, cleaned: Cleaned, card: Card, path: Path | str) -> dict[str, Any]:
    """Write the page to `path` and return its figures (plain values)."""
    found = figures(tables, cleaned, card)
    write_page(found, card, path)
    return found


def write_page(found: dict[str, Any], card: Card, path: Path | str) -> None:
    """The page of these figures."""
    env = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    env.filters |= {"n": _count, "pct": _percent, "x": _number}
    page = env.get_template("quality.html.j2").render(
        f=found, charts=quality_charts.all_charts(found), remarks=remarks(found, card), limits=limits(found, card)
    )
    write_text(path, page)


def limits(found: dict[str, Any], card: Card) -> list[dict[str, Any]]:
    """Each threshold that the card sets: its key, limit, the value found, and whether it holds."""
    made = []
    for key, limit in vars(card.quality).items():
        if limit is not None:
            value = found["limits"][key[4:]]
            good = value <= limit if key.startswith("max_") else value >= limit
            made.append({"key": key, "limit": limit, "value": value, "good": good})
    return made


def check_thresholds(found: dict[str, Any], card: Card, page: Path, kept: Path) -> None:
    """Raise InputError naming every threshold of the card that the data does not keep, and `kept`: a copy of `page`."""
    if broken := [one for one in limits(found, card) if not one["good"]]:
        said = "; ".join(f"quality.{b['key']}: {b['limit']}: {_exact(b['value'])} was found" for b in broken)
        write_text(kept, page.read_text(encoding="utf-8"))
        raise InputError(f"{card.origin}: {said}; see {kept}, then mend the data or move the limit")


def remarks(found: dict[str, Any], card: Card) -> list[dict[str, str]]:
    """What deserves a look, most serious first: {level: bad|look|fine, text}."""
    made: list[dict[str, str]] = []

    def say(level: str, condition: Any, text: str) -> None:
        if condition:
            made.append({"level": level, "text": text})

    limit, tail, bots = found["limits"], found["tail"], found["bots"]
    for one in limits(found, card):
        say("bad", not one["good"], f"{one['key']} is {one['limit']} in the card; {_exact(one['value'])} was found.")
    lost = found["read"] - found["events"]
    say("bad" if limit["rejected"] > 0.2 else "look", limit["rejected"] > 0.01,
        f"{_percent(limit['rejected'])} of the event rows ({lost:,}) were rejected: {_largest(found)}.")  # fmt: skip
    say("look", limit["missing_titles"] > 0.05, f"{_percent(limit['missing_titles'])} of the items have no title: what they are must be learnt from behaviour alone.")  # fmt: skip
    say("look", limit["near_duplicates"] > 0.02, f"{_percent(limit['near_duplicates'])} of the items repeat the title of another one: the same product under several ids splits its history.")  # fmt: skip
    say("look", bots["count"], f"{bots['count']:,} {'users look' if bots['count'] != 1 else 'user looks'} automatic and {'bring' if bots['count'] != 1 else 'brings'} {_percent(bots['share'])} of the events. They are kept.")  # fmt: skip
    say("look", limit["new_item_events"] > 0.05, f"{_percent(limit['new_item_events'])} of the held-out events are on items that training never saw: only their text can recommend them.")  # fmt: skip
    say("look", found["ties"] > 0.1, f"{_percent(found['ties'])} of the events share their time with the user's event before: their order is the source's row order, and results depend on it.")  # fmt: skip
    say("look", found["short_users"] > 0.2 * found["users"], f"{found['short_users']:,} users have fewer than three events: they train, and are not evaluated where each user's last events are held out.")  # fmt: skip
    say("look", not card.repeat and found["repeats"] > 0.1, f"{_percent(found['repeats'])} of the events return to an item that the user had before, but the card says repeat: false.")  # fmt: skip
    say("look", tail["gini"] > 0.9, f"A Gini coefficient of {tail['gini']:.2f}: a few items have nearly all events, so compare every result with popularity.")  # fmt: skip
    say("look", tail["never"] > 0.2 * found["items"], f"{tail['never']:,} of {found['items']:,} items have no event: they can be recommended by their text only.")  # fmt: skip
    if not made:
        made.append({"level": "fine", "text": "Nothing stands out."})
    return sorted(made, key=lambda one: ("bad", "look", "fine").index(one["level"]))


def _largest(found: dict[str, Any]) -> str:
    rejecting = sorted((r for r in found["rules"] if r["rejects"]), key=lambda r: -r["count"])
    return ", ".join(f"{r['rule'].replace('_', ' ')} {r['count']:,}" for r in rejecting[:3])


def _exact(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(share: float) -> str:
    return "0 %" if share == 0 else "< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.3g}"
