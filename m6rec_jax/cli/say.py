"""The options of `m6rec generate --task`: texts for users and about items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m6rec_jax.errors import InputError
from m6rec_jax.settings import Parser

OF_TEXTS = {"prompt": "", "items": None, "language": "", "tokens": 64, "temperature": 0.7, "top_p": 0.9, "seed": 0}
OF_LISTS = {"filter": None, "candidates": None, "per": None, "cap": None, "diversity": 0.0, "new_items": 0.0, "explain": False}  # fmt: skip


def add_text_options(parser: Parser) -> None:
    """`--task` and what goes with it."""
    add = parser.add_argument
    add("--task", metavar="TASK", help="write texts: describe, summarise, explain, query, chat, classify or complete, or a task of the dataset by its name (docs/text-tasks.md)")  # fmt: skip
    add("--prompt", default="", metavar="TEXT", help="with --task: what the answer begins with; of complete the text to go on with, of classify the text, of chat the conversation, \"USER: ... SYSTEM: ... USER: ...\"")  # fmt: skip
    add("--items", metavar="FILE|ID,ID", help="with --task: what the texts are about, item ids one a line or with commas between them; left out, the item that suits each user best. Without --users a text an item")  # fmt: skip
    add("--language", default="", metavar="en|zh", help="with --task: of the template; left out, that of the task that was trained")  # fmt: skip
    add("--tokens", type=int, default=OF_TEXTS["tokens"], metavar="N", help="with --task: the most of a text")
    add("--temperature", type=float, default=OF_TEXTS["temperature"], metavar="T", help="with --task: 0 takes the likeliest token each time; above, the more the more daring")  # fmt: skip
    add("--top-p", type=float, default=OF_TEXTS["top_p"], metavar="P", help="with --task: only the likeliest tokens that together reach P")  # fmt: skip
    add("--seed", type=int, default=OF_TEXTS["seed"], metavar="N", help="with --task: another seed, other texts")


def check_text_options(options: Any) -> None:
    """Raise InputError for options that do not go together."""
    wrong, says = (OF_LISTS, "is of lists, not of texts; leave it out, or --task") if options.task else (OF_TEXTS, "is of texts; say which with --task")  # fmt: skip
    for name, default in wrong.items():
        if options[name] != default:
            raise InputError(f"--{name.replace('_', '-')} {says}")
    if options.users is None and not (options.task and options["items"]):
        raise InputError("--users is missing: all, or a file; m6rec generate --help shows an example")


def write_texts(options: Any, shard: int | None, shards: int | None) -> None:
    """Write the texts that the options ask for."""
    from m6rec_jax.recommend.say.asking import Setting
    from m6rec_jax.recommend.visitors import read_users

    names = ("prompt", "tokens", "temperature", "top_p", "seed", "k", "show_steps")
    setting = Setting(**{name: options[name] for name in names})
    users = None if options.users in (None, "all") else read_users(options.users)
    items = None if options["items"] is None else _item_ids(options["items"])
    from m6rec_jax.recommend.say.batch import CHUNK, say_all

    say_all(
        Path(options.run),
        options.task,
        dataset=Path(options.dataset) if options.dataset else None,
        users=users,
        everybody=options.users is not None,
        limit=options.limit,
        out=options.out,
        items=items,
        language=options.language,
        setting=setting,
        engine=options.engine,
        key=Path(options.key) if options.key else None,
        chunk=options.chunk or CHUNK,
        shard=shard,
        shards=shards,
        weights=options.weights,
    )


def _item_ids(given: str) -> list[str]:
    """Item ids of a file, one a line, or as they are named with commas between them."""
    path = Path(given)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else given.split(",")
    except UnicodeDecodeError:
        raise InputError(f"--items {path}: not UTF-8 text; name a file with one item id a line") from None
    return [line.strip() for line in lines if line.strip()]
