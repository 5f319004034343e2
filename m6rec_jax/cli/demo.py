"""`m6rec demo`: MovieLens-100K from the tables to a report. Each stage that is complete is skipped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.manifest import MANIFEST, file_digest
from m6rec_jax.artifacts.run import RUN_FILE
from m6rec_jax.cli.outputs import folder_to_write
from m6rec_jax.cli.tables import print_lists, print_report
from m6rec_jax.cli.train import run_training
from m6rec_jax.config import Config
from m6rec_jax.errors import InputError
from m6rec_jax.progress import note, stage
from m6rec_jax.settings import Parser, add_config_options, config_of

DATA_SET = "ml-100k"
SHOWN_USERS, SHOWN_ITEMS = 3, 5


@dataclass
class Stages:
    """Which stages are complete and what they cost, kept in `stages.json` over interruptions."""

    file: Path
    known: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, file: Path) -> Stages:
        """Raises InputError when the file is there but damaged."""
        if not file.is_file():
            return cls(file)
        try:
            return cls(file, dict(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise InputError(f"{file}: damaged ({error}); remove it, and the demo starts over") from None

    def complete(self, name: str, of: str, made: Path) -> bool:
        """Whether the stage ended before with the same input `of`, and what it made is still there."""
        known = self.known.get(name, {})
        return bool(known.get("done")) and known.get("of") == of and made.exists()

    def run(self, name: str, of: str, made: Path, work: Callable[[], Any]) -> None:
        """Do the work unless the stage is complete."""
        if self.complete(name, of, made):
            note(f"{name}: complete since an earlier run, {self.known[name]['seconds']:.0f} s then")
            return
        with self.timed(name, of):
            work()

    @contextmanager
    def timed(self, name: str, of: str) -> Iterator[None]:
        """Add the time of the body to the stage's, finished or not; complete it when the body ends well."""
        start, done = time.monotonic(), False
        try:
            yield
            done = True
        finally:
            seconds = self.known.get(name, {}).get("seconds", 0.0) + time.monotonic() - start
            self.known[name] = {"seconds": round(seconds, 2), "done": done, "of": of}
            write_json(self.file, self.known)

    def seconds(self) -> dict[str, float]:
        """Seconds a stage, in all its runs together."""
        return {name: known["seconds"] for name, known in self.known.items()}


def demo(argv: list[str]) -> None:
    """Fetch, prepare, train, evaluate, generate, report."""
    parser = Parser(
        prog="m6rec demo",
        usage="m6rec demo [--out DIR] [--source FILE] [--config CONFIG.yaml] [--section.key=value ...]",
        description="Everything once, on MovieLens-100K: fetch, prepare, train, evaluate, recommend, report.\n"
        "Interrupt it when you like; the same command continues.\n\nexample:\n  m6rec demo",
    )
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder for everything it makes")
    parser.add_argument("--source", metavar="FILE", help="a copy of the data set of one's own, for machines without a package index")  # fmt: skip
    add_config_options(parser)
    given = any(word.split("=")[0] == "--config" for word in argv)
    options = parser.parse(argv if given else ["--config", "demo", *argv])
    out = folder_to_write("--out", options.out)
    run_demo(config_of(options), out, Path(options.source) if options.source else None)


def run_demo(config: Config, out: Path, source: Path | None) -> None:
    """The stages in their order, each skipped where its result stands."""
    raw, dataset, run = out / "raw", out / "dataset", out / "run"
    evaluation, recommendations = out / "evaluation.json", out / "recommendations.parquet"
    stages = Stages.open(out / "stages.json")
    stages.run("fetch", DATA_SET, raw / "card.yaml", lambda: _fetch(raw, source))
    stages.run("prepare", DATA_SET, dataset / MANIFEST, lambda: _prepare(raw / "card.yaml", dataset))
    wanted = f"{file_digest(dataset / MANIFEST)} {json.dumps(config.as_dict(), sort_keys=True)}"
    stages.run("train", wanted, run / RUN_FILE, lambda: _train(config, dataset, run))
    best = _best(run)
    stages.run("evaluate", best, evaluation, lambda: _evaluate(run, dataset, evaluation))
    stages.run("generate", best, recommendations, lambda: _generate(run, dataset, recommendations))
    page, report, samples = out / "report.html", json.loads(evaluation.read_text(encoding="utf-8")), []
    shown = f"{best} {file_digest(evaluation)} {file_digest(recommendations)}"
    with stage("titles", SHOWN_USERS, "users") as bar:
        for sample in _samples(dataset, recommendations):
            samples.append(sample)
            bar.advance(1)
    stages.run("report", shown, page, lambda: _report(page, report, run, samples, stages.seconds()))
    spent = stages.seconds()
    write_json(out / "report.json", {**report, "seconds": round(sum(spent.values()), 2), "stages": spent})
    for sample in samples:
        print_lists(sample)
    print_report(report)
    print(", ".join(f"{name} {value:.0f} s" for name, value in {**spent, "total": sum(spent.values())}.items()))
    print(f"report: {page}, {out / 'report.json'}; all lists: {recommendations}")


def _fetch(raw: Path, source: Path | None) -> None:
    from m6rec_jax.data.registry import fetch

    fetch(DATA_SET, raw, source=source)


def _prepare(card: Path, dataset: Path) -> None:
    from m6rec_jax.data.prepare import prepare

    prepare(card, dataset)


def _train(config: Config, dataset: Path, run: Path) -> None:
    try:
        run_training(config, [dataset], run)
    except InputError as error:
        fact, _, way_out = str(error).partition("; ")
        if "--run" not in way_out:
            raise
        # Training advises another --run, which the demo does not have.
        raise InputError(f"{fact}; go back to what it was, or start another demo with --out") from None


def _best(run: Path) -> str:
    """Which checkpoint the later stages read: its step and the digest of its manifest."""
    from m6rec_jax.artifacts.checkpoints import best_step, step_folder

    step = best_step(run)
    return f"step {step} {file_digest(step_folder(run, step) / MANIFEST)}"


def _evaluate(run: Path, dataset: Path, out: Path) -> None:
    from m6rec_jax.recommend.evaluate import evaluate

    evaluate(run, dataset=dataset, split="test", out=out)


def _generate(run: Path, dataset: Path, out: Path) -> None:
    from m6rec_jax.recommend.generate import generate

    generate(run, dataset=dataset, users=None, limit=None, k=10, out=out)


def _samples(dataset: Path, recommendations: Path) -> Iterator[dict[str, Any]]:
    """A few users, spread over the data set: the end of the history and the head of the generated list, as titles."""
    import polars as pl

    from m6rec_jax.data.dataset import open_dataset
    from m6rec_jax.recommend.histories import Past

    opened, table = open_dataset(dataset), pl.read_parquet(recommendations)
    past, titles, ids = Past(opened), opened.items["title"].to_list(), opened.users["user_id"].to_list()
    for i in range(SHOWN_USERS):
        at = (2 * i + 1) * len(past) // (2 * SHOWN_USERS)
        user, items = ids[past.users[at]], past.take([at]).items[0]
        rows = table.filter(pl.col("user_id") == user).sort("rank").head(SHOWN_ITEMS).iter_rows(named=True)
        yield {
            "user": user,
            "history": [titles[row] for row in items[-SHOWN_ITEMS:] if row >= 0],
            "more": max(0, len(items) - SHOWN_ITEMS),
            "recommendations": [
                {
                    "title": titles[opened.row_of(row["item_id"])],
                    "item_id": row["item_id"],
                    "score": row["score"],
                    "source": row["source"],
                    "because": [row["reason"].removeprefix("because of ")] if row["reason"] else [],
                }
                for row in rows
            ],
        }


def _report(page: Path, report: dict[str, Any], run: Path, samples: list[dict[str, Any]], spent: dict[str, float]) -> None:  # fmt: skip
    with stage("report", 1, "pages") as bar:
        from m6rec_jax.recommend.charts import write_charts
        from m6rec_jax.recommend.report import write_report

        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        facts = [(f"Seconds: {name}", f"{value:.0f}") for name, value in spent.items()]
        write_charts(report, page.with_name("charts"))
        write_report(page, report, [json.loads(line) for line in lines if line], samples, facts)
        bar.advance(1)
