"""ReDial (Li et al. 2018): the next turn of the one who recommends films, from the turns before it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.tasks.problem import Problem

FILM = re.compile(r"@(\d+)")
TURNS = 6  # turns of the conversation that are read
VALID = 0.1  # of the conversations that are learnt from
MOST = 1000  # test turns


def read(folder: Path) -> Problem | None:
    """The problem; None without its files. Its validation file is learnt from (the training file is not at hand), its
    test file is scored."""
    files = {part: folder / "redial" / f"{part}.jsonl" for part in ("valid", "test")}
    if not all(file.is_file() for file in files.values()):
        return None
    rows: list[dict[str, Any]] = []
    liked: list[dict[str, Any]] = []
    for part, file in files.items():
        talks = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for number, talk in enumerate(talks):
            split = "test" if part == "test" else "valid" if number >= len(talks) * (1 - VALID) else "train"
            found = turns_of(talk)
            rows += [{"split": split, "user_id": f"{part}{number}", **one} for one in found]
            if split == "train":
                asked = talk["initiatorQuestions"] or {}
                liked += [
                    {"user": f"{part}{number}", "item": film, "title": _clean(title)}
                    for film, title in (talk["movieMentions"] or {}).items()
                    if title and asked.get(film, {}).get("liked", 1) != 0
                ]
    frame = pl.DataFrame(rows)
    late = (
        frame.filter(pl.col("split") == "test").gather_every(max(1, sum(frame["split"] == "test") // MOST)).head(MOST)
    )
    frame = pl.concat([frame.filter(pl.col("split") != "test"), late])
    problem = Problem("redial", "chat", "rouge_2", "reply", frame, lambda: card(problem, liked))
    return problem


def turns_of(talk: dict[str, Any]) -> list[dict[str, Any]]:
    """Each turn of the recommender with the turns before it; neighbouring messages of one speaker are one turn."""
    films = {key: _clean(title or "") for key, title in (talk["movieMentions"] or {}).items()}
    turns: list[tuple[str, str]] = []
    for message in talk["messages"]:
        speaker = "SYSTEM" if message["senderWorkerId"] == talk["respondentWorkerId"] else "USER"
        text = FILM.sub(lambda match: films.get(match.group(1), "that film"), message["text"]).strip()
        if turns and turns[-1][0] == speaker:
            turns[-1] = (speaker, f"{turns[-1][1]} {text}")
        else:
            turns.append((speaker, text))
    return [
        {"answer": text, "turns": [{"speaker": who, "title": said} for who, said in turns[max(0, i - TURNS) : i]]}
        for i, (speaker, text) in enumerate(turns)
        if speaker == "SYSTEM" and i and text
    ]


def _clean(title: str) -> str:
    return " ".join(title.split())


def card(problem: Problem, liked: list[dict[str, Any]]) -> dict[str, Any]:
    """The data card: films of a conversation as its events, their titles, the training turns as text, this task."""
    events = pl.DataFrame(liked).with_row_index("order")
    items = events.unique("item", maintain_order=True).select("item", "title")
    texts = [" ".join([*(f"{t['speaker']}: {t['title']}" for t in row["turns"]), f"SYSTEM: {row['answer']}"]) for row in problem.part("train").iter_rows(named=True)]  # fmt: skip
    return {
        "name": "redial",
        "events": {"path": events, "user": "user", "item": "item", "time": "order", "time_unit": "order"},
        "items": {"path": items, "id": "item", "title": "title"},
        "corpus": {"path": pl.DataFrame({"text": texts}), "text": "text"},
        "split": "leave-one-out",
        "tasks": {"reply": problem.task_card()},
    }
