"""`m6rec data fetch` and `m6rec data card`: from a public data set or own files to a data card."""

from __future__ import annotations

from pathlib import Path

from m6rec_jax.cli.outputs import file_to_write, folder_to_write
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser


def fetch(argv: list[str]) -> None:
    """Write the tables of a registered data set and a card for them."""
    parser = Parser(
        prog="m6rec data fetch",
        usage="m6rec data fetch NAME --out DIR [--source FILE]",
        description="Fetch a public data set: writes its tables and DIR/card.yaml.\n\n"
        "example:\n  m6rec data fetch ml-100k --out raw/ml-100k",
    )
    parser.add_argument("name", metavar="NAME", help="which data set, for instance ml-100k")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; made if missing")
    parser.add_argument(
        "--source",
        metavar="FILE",
        help="a copy of one's own (the archive, or a folder with its files) instead of the sources tried in order",
    )
    options = parser.parse(argv)
    out = folder_to_write("--out", options.out)
    from m6rec_jax.data.registry import fetch as fetch_tables

    fetch_tables(options.name, out, source=Path(options.source) if options.source else None)
    note(f"wrote {out / 'card.yaml'}; next: m6rec prepare --card {out / 'card.yaml'} --out DATASET")


def card(argv: list[str]) -> None:
    """Print or write a draft card for the files of a folder."""
    parser = Parser(
        prog="m6rec data card",
        usage="m6rec data card --from DIR [--out CARD.yaml]",
        description="Draft a data card from the files found in a folder. Read it before you use it: it guesses.\n\n"
        "example:\n  m6rec data card --from raw/shop --out raw/shop/card.yaml",
    )
    parser.add_argument(
        "--from", dest="folder", required=True, metavar="DIR", help="folder with Parquet, CSV, TSV or JSONL tables"
    )
    parser.add_argument("--out", metavar="FILE", help="file to write; without it the draft goes to standard output")
    options = parser.parse(argv)
    out = file_to_write("--out", options.out) if options.out else None
    from m6rec_jax.artifacts.atomic import write_text
    from m6rec_jax.data.draft import draft_card

    text = draft_card(Path(options.folder), out.parent if out else None)
    if out:
        write_text(out, text)
        note(f"wrote {out}; read it, then: m6rec prepare --card {out} --out DATASET")
    else:
        print(text, end="")
