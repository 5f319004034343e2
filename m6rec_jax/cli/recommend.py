"""`m6rec evaluate` and `m6rec generate`: measure a run; recommend to many users at once."""

from __future__ import annotations

from pathlib import Path

from m6rec_jax.cli.outputs import file_to_write
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser

DATASET = (
    "folder of the dataset, or the name of one that the run was trained on; without it the first that it was trained on"
)


def evaluate(argv: list[str]) -> None:
    """Write the report of a run on a split and print it as a table."""
    parser = Parser(
        prog="m6rec evaluate",
        usage="m6rec evaluate --run RUN [--dataset DATASET] [--split test|valid] --out report.json",
        description="Rank the whole catalogue for every user of a split and compare with popularity, item-kNN and\n"
        "the counting floor.\n\nexample:\n  m6rec evaluate --run runs/shop --split test --out report.json",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; its best checkpoint is measured")
    add("--dataset", metavar="DATASET", help=DATASET)
    add("--split", choices=["test", "valid"], default="test", help="whose targets to predict")
    add("--out", required=True, metavar="FILE", help="the report, as JSON")
    options = parser.parse(argv)
    out = file_to_write("--out", options.out)
    from m6rec_jax.cli.tables import print_report
    from m6rec_jax.recommend.evaluate import evaluate as measure

    dataset = Path(options.dataset) if options.dataset else None
    report = measure(Path(options.run), dataset=dataset, split=options.split, out=out)
    print_report(report)
    note(f"wrote {options.out}")


def generate(argv: list[str]) -> None:
    """Write the k best items for each user as Parquet."""
    parser = Parser(
        prog="m6rec generate",
        usage="m6rec generate --run RUN [--dataset DATASET] --users all|FILE [--limit N] [--k 10] --out recs.parquet",
        description="Recommend to many users at once. Parquet columns: user_id, item_id, rank, score, source, route,\n"
        "reason, model_version.\n\nexample:\n  m6rec generate --run runs/shop --users all --k 10 --out recs.parquet",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; its best checkpoint recommends")
    add("--dataset", metavar="DATASET", help=DATASET)
    add("--users", required=True, metavar="all|FILE", help="every user, or a text file with one user id a line")
    add("--limit", type=int, metavar="N", help="only the first N of them")
    add("--k", type=int, default=10, metavar="N", help="items a user")
    add("--out", required=True, metavar="FILE", help="the Parquet file to write")
    options = parser.parse(argv)
    for name in ("limit", "k"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"--{name}={options[name]}: must be above 0")
    out = file_to_write("--out", options.out)
    users = None if options.users == "all" else read_users(Path(options.users))
    from m6rec_jax.recommend.generate import generate as recommend_all

    recommend_all(
        Path(options.run),
        dataset=Path(options.dataset) if options.dataset else None,
        users=users,
        limit=options.limit,
        k=options.k,
        out=out,
    )
    note(f"wrote {options.out}")


def read_users(file: Path) -> list[str]:
    """User ids, one a line; InputError when the file is missing, unreadable or empty."""
    if not file.is_file():
        raise InputError(f"--users {file}: no such file; name a text file with one user id a line, or `all`")
    try:
        users = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise InputError(f"--users {file}: not UTF-8 text; name a text file with one user id a line") from None
    if not users:
        raise InputError(f"--users {file}: names no user; write one user id a line, or say `all`")
    return users
