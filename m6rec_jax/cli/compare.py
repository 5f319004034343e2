"""`m6rec compare`: whether runs differ on the same users."""

from __future__ import annotations

from m6rec_jax.cli.outputs import file_to_write
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note
from m6rec_jax.settings import Parser


def compare(argv: list[str]) -> None:
    """Print the table of all pairs, and write it as JSON where asked."""
    parser = Parser(
        prog="m6rec compare",
        usage="m6rec compare RUN_OR_REPORT RUN_OR_REPORT [...] [--split test|valid] [--metric ndcg@10 ...] [--out comparison.json]",
        description="Tell whether runs differ: paired randomisation over the same users, Holm-corrected over all pairs and\n"
        "measures. A run without a report of its best step is evaluated first; on test that counts as a look.\n\n"
        "example:\n  m6rec compare runs/shop runs/shop-wide --split valid --metric ndcg@10 --metric recall@10",
    )  # fmt: skip
    add = parser.add_argument
    add("sides", nargs="*", metavar="RUN_OR_REPORT", help="folder of `m6rec train`, or JSON of `m6rec evaluate`")
    add("--split", choices=["test", "valid"], default="test", help="whose targets")
    add("--metric", action="append", metavar="NAME", help="a per-user measure of the report; repeat it for more; without it ndcg@10 and recall@10")  # fmt: skip
    add("--dataset", metavar="DATASET", help="where the dataset of the runs lies now; without it, where each was trained on it")  # fmt: skip
    add("--out", metavar="FILE", help="the comparison, as JSON")
    options = parser.parse(argv)
    if len(options.sides) < 2:
        raise InputError("name at least two runs or reports; m6rec compare --help shows an example")
    out = file_to_write("--out", options.out) if options.out else None
    from m6rec_jax.artifacts.atomic import write_json
    from m6rec_jax.cli.tables import print_comparison
    from m6rec_jax.recommend.compare import compare as measure

    measures = list(dict.fromkeys(options.metric or ("ndcg@10", "recall@10")))
    comparison = measure(options.sides, options.split, measures, options.dataset)
    if out is not None:
        write_json(out, comparison)
    print_comparison(comparison)
    if out is not None:
        note(f"wrote {out}")
