"""`m6rec prepare`: raw tables, named by a data card, become a dataset."""

from __future__ import annotations

from pathlib import Path

from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser


def prepare(argv: list[str]) -> None:
    """Clean, tokenise, code and split the tables of a card."""
    parser = Parser(
        prog="m6rec prepare",
        usage="m6rec prepare --card CARD.yaml --out DATASET [--like RUN|DATASET] [--append] [--runner beam] [options]",
        description="Turn raw tables into a dataset: clean, learn a tokenizer, give items codes, split, write records."
        "\n\nexample:\n  m6rec prepare --card raw/ml-100k/card.yaml --out data/ml-100k",
    )
    add = parser.add_argument
    add("--card", required=True, metavar="FILE", help="the data card: which tables, which columns, which split")
    add("--out", required=True, metavar="DATASET", help="folder to write; it appears only when finished")
    add(
        "--like",
        metavar="RUN",
        help="take tokenizer and codebooks from this run or dataset, so that its model can read the data",
    )
    add(
        "--borrow",
        choices=("everything", "tokenizer"),
        default="everything",
        metavar="WHAT",
        help="what --like lends: everything, or the tokenizer alone, for another catalogue that is to be trained together with that one",
    )
    add("--append", action="store_true", help="add the events and items of the card to the dataset at --out")
    add("--levels", type=int, metavar="N", help="codes an item: 1 (default) = an id of its own, 3 or 4 = shared codes")
    add("--codebook", type=int, metavar="N", help="codes a level, where there are several levels (default 256)")
    add("--vocab-size", type=int, metavar="N", help="text pieces to learn; fewer where texts are few (default 4096)")
    add("--runner", choices=("local", "beam"), default="local", metavar="WHERE", help="local (default): one process holds all events; beam: Apache Beam, the same dataset without any process doing so (docs/prepare-beam.md)")  # fmt: skip
    add("--runner-options", metavar="OPTIONS", help='with --runner beam: where it runs, as on a Beam command line, such as --runner-options="--runner=FlinkRunner --flink_master=host:8081" (default: in this process)')  # fmt: skip
    options = parser.parse(argv)
    sizes = {"levels": options.levels, "codebook": options.codebook, "vocab_size": options.vocab_size}
    out = folder_to_write("--out", options.out)
    if options.runner_options and options.runner != "beam":
        raise InputError(f"--runner-options {options.runner_options}: has no effect with --runner {options.runner}; add --runner beam")  # fmt: skip
    if options.runner == "beam":
        for flag, given in (("--append", options.append), ("--like", options.like), ("--borrow", options.borrow != "everything")):  # fmt: skip
            if given:
                raise InputError(f"{flag}: not with --runner beam, which prepares from the beginning; leave one of them out")  # fmt: skip
        from m6rec_jax.data.beam.prepare import prepare_on_beam

        dataset = prepare_on_beam(Path(options.card), out, runner_options=options.runner_options or "", **sizes)
    else:
        from m6rec_jax.data.prepare import prepare as prepare_dataset

        dataset = prepare_dataset(
            Path(options.card),
            out,
            like=Path(options.like) if options.like else None,
            borrow=options.borrow,
            append=options.append,
            **sizes,
        )
    note(f"wrote {dataset.path}: {dataset.catalogue:,} items, {dataset.users.height:,} users")
    note(f"what was found and cleaned away: {dataset.path / 'quality.html'}")
