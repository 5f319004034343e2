"""`m6rec evaluate`, `generate`, `embed` and `profile`: measure a run; lists, vectors and profiles of many users."""

from __future__ import annotations

import os
from pathlib import Path

from m6rec_jax.cli.outputs import file_to_write, folder_to_write
from m6rec_jax.cli.processes import shard_of_job
from m6rec_jax.cli.say import add_text_options, check_text_options, write_texts
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
        usage="m6rec evaluate --run RUN [--dataset DATASET] [--split test|valid] [--tasks all|none|NAMES]\n"
        "                      [--weights full|int8] --out report.json",
        description="Rank the whole catalogue for every user of a split and compare with popularity, item-kNN and\n"
        "the counting floor.\n\nexample:\n  m6rec evaluate --run runs/shop --split test --out report.json",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; its best checkpoint is measured")
    add("--dataset", metavar="DATASET", help=DATASET)
    add("--split", choices=["test", "valid"], default="test", help="whose targets to predict")
    add("--tasks", default="all", metavar="all|none|NAMES", help="which of the dataset's own tasks to measure as well (docs/scoring.md): names with commas between, or all that the run has learnt")  # fmt: skip
    add(
        "--weights",
        choices=["full", "int8"],
        default="full",
        metavar="WEIGHTS",
        help="int8: measure int8 weights beside the full ones and print what they cost and save (docs/decoding.md; extra `quant`)",
    )
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="the report, as JSON; per-user measures go to FILE's stem + .users.parquet, charts as PNG into a folder, stem + .charts",
    )
    options = parser.parse(argv)
    out = file_to_write("--out", options.out)
    from m6rec_jax.cli.tables import print_report
    from m6rec_jax.recommend.evaluate import evaluate as measure

    dataset = Path(options.dataset) if options.dataset else None
    report = measure(
        Path(options.run), dataset=dataset, split=options.split, out=out, weights=options.weights, tasks=options.tasks
    )
    from m6rec_jax.recommend.charts import write_charts

    charts = out.with_name(f"{out.stem}.charts")
    write_charts(report, charts)
    print_report(report)
    note(f"wrote {options.out}; charts in {charts}")


def generate(argv: list[str]) -> None:
    """Write the k best items for each user, or a text, as Parquet."""
    parser = Parser(
        prog="m6rec generate",
        usage="m6rec generate --run RUN [--dataset DATASET] --users all|FILE [--limit N] [--k 10]\n"
        "                      [--engine auto|model|memory|popularity] [--weights full|int8] [--key FILE]\n"
        "                      [--filter CONDITION]\n"
        "                      [--candidates FILE] [--per COLUMN --cap N] [--diversity D] [--new-items S]\n"
        "                      [--explain] [--show-steps] [--chunk N] [--shards N --shard I]\n"
        "                      [--task TASK [--prompt TEXT] [--items FILE|ID,ID] [--language en|zh] [--tokens N]\n"
        "                       [--temperature T] [--top-p P] [--seed N]]\n"
        "                      --out recs.parquet|FOLDER/",
        description="Recommend to many users at once. Parquet columns: user_id, item_id, rank, score, source, route,\n"
        "reason, model_version. The same command again goes on where it stopped (docs/batch.md).\n\n"
        "example:\n  m6rec generate --run runs/shop --users all --k 10 --out recs.parquet\n\n"
        "where lists go, and who makes them:\n"
        "    --out recs/                                a folder that keeps the parts, no joined file\n"
        "    --shards 4 --shard 0 --out recs.parquet    one of four processes; 1, 2 and 3 run elsewhere\n"
        "    --users visitors.parquet --chunk 1000      users of a file, 1000 to a part\n\n"
        "rules for what is listed (docs/rules.md), one or several:\n"
        "    --filter \"category == 'Skin Care' and price < 20\"\n"
        "    --candidates stock.txt\n"
        "    --per category --cap 2\n"
        "    --diversity 0.3\n"
        "    --new-items 0.2\n\n"
        "why an item is in a list (docs/explanations.md), as columns beside it:\n"
        "    --users ids.txt --k 3 --explain --show-steps\n\n"
        "a text instead of a list (docs/text-tasks.md):\n"
        "    --users all --limit 3 --task describe\n"
        "    --items 50,181 --task summarise\n"
        '    --users ids.txt --task chat --prompt "USER: something like Alien, but funny"',
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; its best checkpoint recommends")
    add("--dataset", metavar="DATASET", help=DATASET)
    add(
        "--users",
        metavar="all|FILE",
        help="every user; or a text file with one user id a line; or a table (.parquet, .csv, .jsonl) with a column user_id and, for users the dataset does not know, history (item ids, oldest first) and attributes: `attributes` (a list) or a column each",
    )
    add("--limit", type=int, metavar="N", help="only the first N of them")
    add("--k", type=int, default=10, metavar="N", help="items a user")
    add(
        "--engine",
        choices=["auto", "model", "memory", "popularity"],
        default="auto",
        metavar="ENGINE",
        help="auto, the best way there is for each user (docs/routing.md); model, memory or popularity narrow the choice",
    )
    add(
        "--weights",
        choices=["full", "int8"],
        default="full",
        metavar="WEIGHTS",
        help="int8: keep the model's weights as int8, a quarter of the memory (docs/decoding.md; extra `quant`)",
    )
    add(
        "--key",
        metavar="FILE",
        help="key that hid the dataset's user ids (privacy: hmac), so that --users may be raw ids",
    )
    add("--filter", metavar="CONDITION", help="list only items of which this is true, in columns of items.parquet")
    add(
        "--candidates",
        metavar="FILE",
        help="list only these items: a text file with one item id a line; or a table (.parquet, .csv, .jsonl) with item_id and, where each user has their own, user_id",
    )
    add(
        "--per", metavar="COLUMN", help="with --cap: no value of this column (category, attribute, ...) comes too often"
    )
    add("--cap", type=int, metavar="N", help="items of one value of --per that a list may hold")
    add(
        "--diversity",
        type=float,
        default=0.0,
        metavar="D",
        help="0 to 1: how much unlike each other the items shall be",
    )
    add("--new-items", type=float, default=0.0, metavar="S", help="0 to 1: share of places for items without a training event")  # fmt: skip
    add("--explain", action="store_true", help="add columns memory_share, evidence (history items behind the memory) and attribution (events the model needs), see docs/explanations.md")  # fmt: skip
    add("--show-steps", action="store_true", help="add a column steps: code by code, its probability and the likeliest others")  # fmt: skip
    add(
        "--chunk",
        type=int,
        metavar="N",
        help="users of a part: what a kill can cost, and what is held at a time; 4096 if left out",
    )
    add(
        "--shards",
        type=int,
        metavar="N",
        help="how many processes share the work, through a folder that all of them see; under srun, or with M6REC_PROCESSES and M6REC_PROCESS_ID, found by itself",
    )
    add("--shard", type=int, metavar="I", help="which of them this is, from 0; whoever makes the last part finishes")
    add(
        "--out",
        required=True,
        metavar="FILE|FOLDER/",
        help="the Parquet file to write, with its parts in FILE.parts until it is whole; or, with a slash at the end or a folder that is there, a folder that keeps the parts. A manifest.json says what is in them",
    )
    add_text_options(parser)
    options = parser.parse(argv)
    check_text_options(options)
    for name in ("limit", "k", "chunk"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"--{name}={options[name]}: must be above 0")
    to_folder = options.out.endswith(("/", os.sep)) or Path(options.out).is_dir()
    (folder_to_write if to_folder else file_to_write)("--out", options.out)
    shard, shards = shard_of_job(options.shard, options.shards)
    if options.task:
        return write_texts(options, shard, shards)
    from m6rec_jax.decoding.batch import CHUNK
    from m6rec_jax.recommend.candidates import read_candidates
    from m6rec_jax.recommend.reranking import check_rules
    from m6rec_jax.recommend.visitors import read_users

    check_rules(options.per, options.cap, options.diversity, options.new_items, "--{}")
    candidates = None if options.candidates is None else read_candidates(options.candidates)
    users = None if options.users == "all" else read_users(options.users)  # refused before jax is loaded
    from m6rec_jax.recommend.generate import generate as recommend_all

    recommend_all(
        Path(options.run),
        dataset=Path(options.dataset) if options.dataset else None,
        users=users,
        limit=options.limit,
        k=options.k,
        out=options.out,
        engine=options.engine,
        key=Path(options.key) if options.key else None,
        filter=options.filter,
        candidates=candidates,
        per=options.per,
        cap=options.cap,
        diversity=options.diversity,
        new_items=options.new_items,
        explain=options.explain,
        show_steps=options.show_steps,
        chunk=options.chunk or CHUNK,
        shard=shard,
        shards=shards,
        weights=options.weights,
    )


def embed(argv: list[str]) -> None:
    """Write the vectors of all users or all items as Parquet."""
    parser = Parser(
        prog="m6rec embed",
        usage="m6rec embed --run RUN [--dataset DATASET] --users|--items --out vectors.parquet",
        description="Write one vector a user (user_id, vector) or an item (item_id, vector). Where a code is an item, the\n"
        "product of the two is the model's logit. Where items have several codes, an item's vector is the mean of what\n"
        "the model reads at its codes.\n\n"
        "example:\n  m6rec embed --run runs/shop --items --out items.parquet",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="RUN", help="folder that `m6rec train` wrote; its best checkpoint is asked")
    add("--dataset", metavar="DATASET", help=DATASET)
    add("--users", action="store_true", help="every user with events: the state after the last of them")
    add("--items", action="store_true", help="every item of the catalogue")
    add("--out", required=True, metavar="FILE", help="the Parquet file to write")
    options = parser.parse(argv)
    wanted = [what for what in ("users", "items") if options[what]]
    if len(wanted) != 1:
        raise InputError("say --users or --items, one of them; m6rec embed --help shows an example")
    out = file_to_write("--out", options.out)
    from m6rec_jax.recommend.embed import embed as embed_all

    dataset = Path(options.dataset) if options.dataset else None
    count = embed_all(Path(options.run), wanted[0], out, dataset)
    note(f"wrote {options.out}: {count:,} vectors")


def profile(argv: list[str]) -> None:
    """Write the profiles of all users as Parquet."""
    parser = Parser(
        prog="m6rec profile",
        usage="m6rec profile --dataset DATASET [--topics N] [--split all|train] [--say en|zh] --out profiles.parquet",
        description="Write one row a user: counts, pace, repeats, categories, numbers, and interest topics of item texts. Beside\n"
        "it NAME.topics.parquet says what each topic is about, NAME.items.parquet how much of it an item has.\n\n"
        "example:\n  m6rec profile --dataset data/shop --out profiles.parquet",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="DATASET", help="folder that `m6rec prepare` wrote")
    add("--topics", type=int, default=24, metavar="N", help="interest topics to fit at most; 0 = none")
    add("--split", choices=["all", "train"], default="all", metavar="SPLIT", help="all events, or train: those a model may learn from")  # fmt: skip
    add("--say", choices=["en", "zh"], metavar="LANGUAGE", help="add a column `text` that says it in en or zh")
    add("--out", required=True, metavar="FILE", help="the Parquet file to write")
    options = parser.parse(argv)
    if options.topics < 0:
        raise InputError(f"--topics={options.topics}: must not be negative")
    out = file_to_write("--out", options.out)
    from m6rec_jax.recommend.profile import profile as profile_all

    count = profile_all(Path(options.dataset), out, topics=options.topics, split=options.split, language=options.say)
    note(f"wrote {options.out}: {count:,} users")
