"""What text tasks answer, put together from facts: what training is told, and what stands in for a text that fails."""

from __future__ import annotations

import re
from collections.abc import Sequence

from m6rec_jax.data.instances.wording import listed
from m6rec_jax.data.instances.world import World

SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
DESCRIBED = 200  # characters of a running text that a description begins with
BEFORE = 30  # events before an item among which its like is looked for


def described(world: World, row: int, language: str) -> str:
    """An item without its name: its categories, facts and the beginning of its text; "" where nothing is known."""
    parts = (listed(world.categories[row], language), world.attributes[row], world.descriptions[row][:DESCRIBED])
    return ("；" if language == "zh" else "; ").join(filter(None, parts))


def reason(world: World, row: int, before: Sequence[int], topics: Sequence[set[str]], language: str) -> str:
    """What an item shares with the latest of the items `before` it (oldest first) with which it shares the most `topics`
    [C]; "" where it shares none."""
    others = [i for i in before[-BEFORE:] if i >= 0 and i != row]
    shared = [len(topics[row] & topics[i]) for i in others]
    if not max(shared, default=0):
        return ""
    like = others[len(shared) - 1 - shared[::-1].index(max(shared))]
    what = listed([c for c in world.categories[row] if c in topics[like]], language)
    title = world.titles[like]
    return f"它和{title}一样属于{what}" if language == "zh" else f"it is {what}, like {title}"


def lead(world: World, row: int) -> tuple[str, str]:
    """The first sentence of an item's text and the others (a text's lead is its summary: Zhu et al. 2021); ("", "") for a
    text of one sentence or none."""
    parts = SENTENCE.split(world.descriptions[row].strip(), maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 and parts[1].strip() else ("", "")


def in_short(world: World, row: int, language: str) -> str:
    """An item in one line, from its facts alone: name, categories, attributes; "" where nothing is known but the name."""
    facts = [listed(world.categories[row], language), world.attributes[row]]
    said = ("；" if language == "zh" else "; ").join(filter(None, facts))
    return said and f"{world.titles[row]}{'：' if language == 'zh' else ': '}{said}"


def searched(world: World, row: int) -> str:
    """What one types who looks for an item: its title, in small letters."""
    return world.titles[row].lower()


def begun(world: World, row: int) -> tuple[str, str]:
    """The first half of an item's title and text, and the second; "" where there is none."""
    title = world.items["title"][row]
    text = " ".join(filter(None, (title, world.descriptions[row])))
    words = text.split()
    if len(words) > 1:
        return " ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])
    return (text[: len(text) // 2], text[len(text) // 2 :]) if len(text) > 3 and not text.isascii() else (text, "")
