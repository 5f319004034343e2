"""Answers that name items: free text until `<item>`, then a spelling that leads to a real one, its title, and free text again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.shapes import Prompt
from m6rec_jax.recommend.say.asking import Setting
from m6rec_jax.vocab import ITEM

MOST_ITEMS = 3  # of one answer


@dataclass
class Answer:
    """What was written after a prompt so far: the text as people read it, catalogue rows of the items in it."""

    tokens: np.ndarray
    item_rows: np.ndarray
    left: int
    text: str = ""
    items: list[int] = field(default_factory=list)

    def add(self, text: str, tokens: Sequence[int], row: int, title: str, codes: np.ndarray) -> None:
        """A stretch of text and the item that it opened."""
        more = np.array([*tokens, ITEM, *codes.tolist()], np.int32)
        rows = np.full(len(more), -1, np.int32)
        rows[-1] = row
        self.tokens, self.item_rows = np.concatenate([self.tokens, more]), np.concatenate([self.item_rows, rows])
        self.left -= len(more)
        self.text = " ".join(filter(None, (self.text, text.strip(), title)))
        self.items.append(row)


def converse(engine: Engine, titles: Sequence[str], prompts: Sequence[Prompt], setting: Setting, seeds: Sequence[int],
             allowed: np.ndarray | None) -> list[Answer]:  # fmt: skip
    """An answer after each prompt, of at most `setting.tokens` tokens, spellings included. An item comes once."""
    answers = [Answer(tokens, rows, setting.tokens) for tokens, rows in prompts]
    open_, levels = list(range(len(answers))), engine.codes.shape[1]
    for turn in range(MOST_ITEMS + 1):
        some = [answers[i] for i in open_]
        room = [min(one.left, engine.prompts.length - len(one.tokens)) for one in some]
        written = engine.write(
            [one.tokens for one in some], item_rows=[one.item_rows for one in some], most=[max(n, 0) for n in room],
            temperature=setting.temperature, top_p=setting.top_p, seeds=[(seeds[i] + turn) % (1 << 32) for i in open_],
            items=[turn < MOST_ITEMS and n > levels + 1 for n in room],
        )  # fmt: skip
        opened = []
        for i, one, said, n in zip(open_, some, written, room, strict=True):
            if said.finish == "item" and n - len(said.tokens) > levels:
                opened.append((i, said))
            else:
                one.text = " ".join(filter(None, (one.text, said.text.strip())))
        if not opened:
            break
        asked = [np.concatenate([answers[i].tokens, [*said.tokens, ITEM]]) for i, said in opened]
        rows = [np.pad(answers[i].item_rows, (0, len(said.tokens) + 1), constant_values=-1) for i, said in opened]
        named = [np.array(answers[i].items, np.int32) for i, _ in opened]
        found = engine.spell(asked, item_rows=rows, exclude=named, allowed=allowed).rows[:, 0].tolist()
        for (i, said), row in zip(opened, found, strict=True):
            if row >= 0:
                answers[i].add(said.text, said.tokens, row, titles[row], engine.vocab.spell(engine.codes[row]))
            else:
                answers[i].text = " ".join(filter(None, (answers[i].text, said.text.strip())))
        open_ = [i for (i, _), row in zip(opened, found, strict=True) if row >= 0]
        if not open_:
            break
    return answers
