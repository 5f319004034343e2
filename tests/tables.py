"""Small tables in the shape of public ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def films_folder(folder: Path) -> Path:
    """Rows of films as TALLRec has them: twelve users of six rows each, who like what is even."""
    rng = np.random.default_rng(0)
    (folder / "tallrec").mkdir()
    for part in ("valid", "test"):
        rows = []
        for _ in range(12):
            events = rng.permutation(40)[:12].tolist()
            for at in range(6, 12):
                liked, disliked = ([f'"Film {n}"' for n in events[:at] if n % 2 == odd] for odd in (0, 1))
                says = f"User Preference: {', '.join(liked)}\nUser Unpreference: {', '.join(disliked)}\n"
                says += f'Whether the user will like the target movie "Film {events[at]}"?'
                rows.append({"input": says, "output": "No." if events[at] % 2 else "Yes."})
        (folder / "tallrec" / f"movie_{part}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def talks_folder(folder: Path) -> Path:
    """Conversations as ReDial has them: a seeker names a film, and the recommender another, twice."""
    (folder / "redial").mkdir()
    for part, number in (("valid", 20), ("test", 4)):
        talks = []
        for n in range(number):
            films = {str(i): f"Film {i} (20{i:02})" for i in (n % 7, 10 + n % 5, 20 + n % 3)}
            said = [(i % 2, f"what of @{film}, number {i}") for i, film in enumerate([*films, *films])]
            messages = [{"senderWorkerId": who, "text": text} for who, text in said]
            asked = {film: {"liked": 1} for film in films}
            talks.append({"movieMentions": films, "messages": messages, "respondentWorkerId": 1, "initiatorQuestions": asked})  # fmt: skip
        path = folder / "redial" / f"{part}.jsonl"
        path.write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    return folder


def captions_folder(folder: Path) -> Path:
    """Captions of videos as KuaiRec has them: of two categories, of forty videos each."""
    (folder / "kuairec").mkdir()
    lines = ["video_id,manual_cover_text,caption,topic_tag,first_level_category_name,second_level_category_name"]
    for n in range(80):
        kind = ("美食", "旅行")[n % 2]
        lines.append(f"{n},UNKNOWN,今天给大家看的是{kind}第{n}集,[{kind}],{kind},{kind}日常")
    (folder / "kuairec" / "captions.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder
