"""Late interaction and early exit against the full model: time of a request and area under the ROC curve, side by side.

    taskset -c 0,1 python -m benchmarks.interaction [--steps 1300] [--more 1000] [--out FILE]

Planted clicks: a user has a profile and a history of some ten events in words, and clicks a candidate by how much of the
history is of its kind (bought counts more than seen), by the profile's taste and by the candidate's quality. Three models
of 6 layers begin with one plain model and are trained alike from there on: full, late (for each `--late`), exits. `--sizes` measures larger models with random
parameters as well: late, and an exit in the middle that half of the rows take; rows of models that are not measured stay. What is compared takes turns in one process, batch by batch, and medians are told.
Writes benchmarks/results/interaction.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import kept_rows, write_results
from m6rec_jax.config import ModelConfig, OptimConfig
from m6rec_jax.data.examples import text_example
from m6rec_jax.data.packing import pack_lengths, pack_row
from m6rec_jax.decoding.exits import Exits, ExitScorer, auc, calibrate, sure
from m6rec_jax.decoding.late import LateScorer
from m6rec_jax.decoding.shapes import Prompt
from m6rec_jax.model.items import ItemTable, item_table
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.scoring import arrange_scoring
from m6rec_jax.training.optim import make_optimizer
from m6rec_jax.training.state import init_state
from m6rec_jax.training.step import make_train_step
from m6rec_jax.vocab import BOS, END_SOURCE, END_TARGET, SEP, SOURCE, SPECIALS, TARGET, Vocab

WORD = len(SPECIALS)  # the first id of a word
KINDS, QUALITIES, TASTES, DEEDS, TITLES = 12, 12, 6, 3, 60
VOCAB = Vocab(WORD + KINDS + QUALITIES + TASTES + DEEDS + TITLES, (128,), options=(2,))
ITEMS: ItemTable = jax.tree.map(jnp.asarray, item_table(np.zeros((128, 1)), np.ones(128, bool)))
MODEL = ModelConfig(layers=6, width=64, heads=4, dropout=0.0, embed_dropout=0.0, content=False)
LENGTH, ROWS = 128, 16
TRAIN, VALID, TEST = 40_000, 8_000, 12_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=1300, help="of training a plain model that all begin with; 0: only --sizes"
    )
    parser.add_argument("--more", type=int, default=1000, help="steps of each model from there on")
    parser.add_argument("--repeat", type=int, default=20, help="turns of each that is timed")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--late", type=int, nargs="+", default=[1, 2], help="joined layers")
    parser.add_argument("--max-loss", type=float, default=0.002, help="area that early exit may lose on validation")
    parser.add_argument("--hit-rate", type=float, default=0.8, help="share of parts that were kept, beside all of them")
    parser.add_argument("--sizes", nargs="*", default=["12x384x256"], help="layers x width x tokens, random parameters")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = planted_rows(options) if options.steps else []
    for size in options.sizes:
        rows += sized_rows(size, options)
    rows = kept_rows("interaction", rows, ("model", "system", "batch")) + rows
    print(f"wrote {write_results('interaction', rows, options.out)}")


# -- planted clicks ------------------------------------------------------------------------------------------------


def planted(n: int, seed: int) -> tuple[list[Prompt], np.ndarray]:
    """Instances and their labels. Kinds of events and candidates are drawn alike for both labels."""
    rng = np.random.default_rng(seed)
    kind_0, quality_0 = WORD, WORD + KINDS
    taste_0 = quality_0 + QUALITIES
    deed_0, title_0 = taste_0 + TASTES, taste_0 + TASTES + DEEDS
    fixed = np.random.default_rng(0)
    worth = fixed.normal(size=QUALITIES)
    liked = fixed.normal(size=(TASTES, KINDS))
    prompts, labels = [], np.zeros(n, np.int64)
    for i in range(n):
        taste = rng.integers(TASTES)
        favourites = rng.integers(KINDS, size=2)
        events = int(rng.integers(4, 11))
        kinds = np.where(rng.random(events) < 0.6, rng.choice(favourites, events), rng.integers(KINDS, size=events))
        deeds = rng.integers(DEEDS, size=events)
        kind = int(rng.choice(favourites)) if rng.random() < 0.5 else int(rng.integers(KINDS))
        quality = int(rng.integers(QUALITIES))
        match = ((kinds == kind) * (deeds + 1)).sum()
        logit = 0.8 * match - 2.2 + 0.8 * worth[quality] + 0.8 * liked[taste, kind]
        labels[i] = rng.random() < 1 / (1 + np.exp(-1.5 * logit))
        titles = rng.integers(TITLES, size=(events + 1, 3)) + title_0
        body = [[taste_0 + taste]]
        body += [[deed_0 + d, kind_0 + k, *t] for d, k, t in zip(deeds, kinds, titles.tolist(), strict=False)]
        request = [kind_0 + kind, quality_0 + quality, *titles[-1].tolist()]
        tokens = [
            BOS,
            SOURCE,
            *[t for part in body for t in (SEP, *part)][1:],
            END_SOURCE,
            TARGET,
            *request,
            END_TARGET,
        ]
        prompts.append((np.array(tokens, np.int32), np.full(len(tokens), -1, np.int32)))
    return prompts, labels


def trained(
    config: ModelConfig, prompts: Sequence[Prompt], labels: np.ndarray, steps: int, begin: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Parameters after so many steps, from fresh ones or from those of another model (`begin`; what it lacks is fresh)."""
    blueprint, seconds = Blueprint(config, VOCAB, 1), time.monotonic()
    optimizer = make_optimizer(OptimConfig(learning_rate=2e-3, warmup=100, weight_decay=0.01), steps)
    step = make_train_step(blueprint, optimizer, 1, 0)
    state, rng = init_state(blueprint, optimizer, 0), np.random.default_rng(1 if begin is None else 2)
    if begin is not None:
        state = state.begun_with({name: begin.get(name, fresh) for name, fresh in state.params.items()})
    rows: list[list[int]] = []
    lengths = np.array([len(tokens) for tokens, _ in prompts])
    loss = 0.0
    for number in range(steps):
        if len(rows) < ROWS:
            fresh = pack_lengths(lengths, LENGTH)
            rng.shuffle(fresh)
            rows += fresh
        taken, rows = rows[:ROWS], rows[ROWS:]
        packed = [pack_row([(_example(prompts[i][0], labels[i]), 0) for i in row], LENGTH) for row in taken]
        batch = {name: np.stack([row[name] for row in packed])[None] for name in packed[0]}
        state, measured = step(state, batch, ITEMS)
        loss = 0.98 * loss + 0.02 * float(measured.losses.loss[0] / measured.losses.weight[0])
        if (number + 1) % 250 == 0:
            print(f"  step {number + 1}: loss {loss / (1 - 0.98 ** (number + 1)):.4f}, {time.monotonic() - seconds:.0f} s", flush=True)  # fmt: skip
    return state.params


def _example(tokens: np.ndarray, label: int):
    example = text_example(tokens, np.array([VOCAB.option(0, int(label))], np.int32))
    return arrange_scoring(example, np.random.default_rng(0), 0.0)


def option_rows(params: dict[str, Any]) -> jax.Array:
    """The output table's rows of the two options."""
    return jnp.asarray(params["embeddings"]["tables"]["options"])[:2]


def planted_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    train, valid, test = (planted(n, seed) for seed, n in enumerate((TRAIN, VALID, TEST), start=1))
    configs = {"full": MODEL} | {f"late {k}": replace(MODEL, late=k) for k in options.late}
    configs["exits"] = replace(MODEL, exits=True)
    made, rows = {}, []
    print("training the model that all begin with", flush=True)
    begin = trained(MODEL, *train, options.steps)
    for name, config in configs.items():
        print(f"training {name}", flush=True)
        made[name] = trained(config, *train, options.more, begin)
    full = FullScorer(MODEL, made["full"])
    best = auc(test[1], full(test[0]))
    calls: dict[str, Callable[[Sequence[Prompt]], Any]] = {"full": full}
    facts: dict[str, dict[str, Any]] = {"full": {"auc": best}}
    for k in options.late:
        late = Late(configs[f"late {k}"], made[f"late {k}"])
        calls[f"late {k}, all kept"] = late
        calls[f"late {k}, {options.hit_rate:.0%} kept"] = Partly(late, options.hit_rate)
        facts[f"late {k}, all kept"] = facts[f"late {k}, {options.hit_rate:.0%} kept"] = {
            "auc": auc(test[1], late(test[0]))
        }
    scorer = ExitScorer(Blueprint(configs["exits"], VOCAB, 1).bind(made["exits"]), ITEMS)
    table = option_rows(made["exits"])
    layers = scorer.every(valid[0], table)
    of_layers = [round(auc(valid[1], one), 5) for one in layers]
    print("  area of each layer on validation", of_layers)
    last = scorer.score(test[0], table, Exits((), ()))
    facts["exits, none"] = {"auc": auc(test[1], last.scores), "layers_run": float(MODEL.layers)}
    calls["exits, none"] = lambda some: scorer.score(some, table, Exits((), ()))
    exits = calibrate(layers, valid[1], options.max_loss)
    print(f"  {exits}")
    left = scorer.score(test[0], table, exits)
    facts["exits"] = {
        "auc": auc(test[1], left.scores), "layers_run": float(left.layers.mean()), "lost_on_validation": exits.lost,
        "layers": list(exits.layers), "thresholds": list(exits.thresholds), "auc_of_layers": of_layers,
    }  # fmt: skip
    calls["exits"] = lambda some: scorer.score(some, table, exits)
    for batch in options.batch:
        rows += compared(calls, test[0], batch, options.repeat, "full", {"model": "planted 6x64"}, facts)
    return rows


# -- what is timed -------------------------------------------------------------------------------------------------


class FullScorer:
    """The whole model for each instance, its last layer for the last token alone."""

    def __init__(self, config: ModelConfig, params: dict[str, Any]):
        own = {name: value for name, value in params.items() if name != "part"}
        self.scorer = ExitScorer(Blueprint(replace(config, late=0, exits=True), VOCAB, 1).bind(own), ITEMS)
        self.table = option_rows(params)

    def __call__(self, some: Sequence[Prompt]) -> np.ndarray:
        return self.scorer.score(some, self.table, Exits((), ())).scores


class Late:
    """A model with late interaction whose parts are kept."""

    def __init__(self, config: ModelConfig, params: dict[str, Any]):
        self.scorer = LateScorer(Blueprint(config, VOCAB, 1).bind(params), ITEMS)
        self.table = option_rows(params)

    def __call__(self, some: Sequence[Prompt]) -> np.ndarray:
        return self.scorer.score(some, self.table)


class Partly:
    """The same scorer when a share of the parts of every call was not met before: their last word is another one."""

    def __init__(self, late: Late, hit_rate: float):
        self.late, self.hit_rate, self.number = late, hit_rate, 0

    def prepared(self, some: Sequence[Prompt]) -> list[Prompt]:
        rng, made = np.random.default_rng(self.number), []
        for tokens, rows in some:
            tokens = tokens.copy()
            ends = np.flatnonzero((tokens == SEP) | (tokens == END_SOURCE) | (tokens == END_TARGET)) - 1
            changed = ends[rng.random(len(ends)) >= self.hit_rate * (len(ends) + 1) / len(ends)]
            self.number += 1
            first = VOCAB.text.size - TITLES
            for place in changed:
                tokens[place - 1 : place + 1] = first + np.array(divmod(int(rng.integers(TITLES**2)), TITLES))
            made.append((tokens, rows))
        return made

    def __call__(self, some: Sequence[Prompt]) -> np.ndarray:
        return self.late(some)


def compared(
    calls: dict[str, Callable[[Sequence[Prompt]], Any]], prompts: Sequence[Prompt], batch: int, repeat: int, base: str,
    about: dict[str, Any], facts: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Median seconds of each call on the same batches, in turns; what is compiled or kept at first is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    kept: dict[str, float] = {}
    rng = np.random.default_rng(3)
    lots = [[prompts[i] for i in rng.integers(len(prompts), size=batch)] for _ in range(repeat)]
    for call in calls.values():
        for some in lots:  # every shape is compiled, every part read
            call(some)
            if isinstance(call, Partly):
                call(call.prepared(some))
    for turn, some in enumerate(lots):
        for name in sorted(calls, reverse=bool(turn % 2)):
            call = calls[name]
            given = call.prepared(some) if isinstance(call, Partly) else some
            late = call.late if isinstance(call, Partly) else call
            before = late.scorer.uses if isinstance(late, Late) else None
            start = time.perf_counter()
            call(given)
            taken[name].append(time.perf_counter() - start)
            if before is not None:
                now = late.scorer.uses
                kept[name] = kept.get(name, 0.0) + (now.kept - before.kept) / (now.asked - before.asked) / repeat
    rows = []
    for name, seconds in taken.items():
        row = {
            **about, "system": name, "batch": batch, "p50_ms": 1e3 * float(np.median(seconds)),
            "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
            "of_full": float(np.median(seconds) / np.median(taken[base])),
            "mean_of_full": float(np.sum(seconds) / np.sum(taken[base])),
            "tokens": float(np.mean([len(tokens) for some in lots for tokens, _ in some])), **facts.get(name, {}),
        }  # fmt: skip
        if name in kept:
            row["kept"] = round(kept[name], 3)
        said = f", AUC {row['auc']:.4f}" if "auc" in row else ""
        print(
            f"{about['model']} batch {batch:2} {name:20}: {row['p50_ms']:8.2f} ms, {row['of_full']:.2f} of full (means {row['mean_of_full']:.2f}){said}"
        )
        rows.append(row)
    return rows


# -- larger models -------------------------------------------------------------------------------------------------


def sized_rows(size: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    layers, width, tokens = map(int, size.split("x"))
    config = replace(MODEL, layers=layers, width=width, heads=width // 64 or 1)
    rng, prompts = np.random.default_rng(5), []
    for _ in range(64):
        body = [rng.integers(WORD, VOCAB.text.size, 7).tolist() for _ in range(tokens // 8 - 2)]
        request = rng.integers(WORD, VOCAB.text.size, 8).tolist()
        row = [BOS, SOURCE, *[t for part in body for t in (SEP, *part)][1:], END_SOURCE, TARGET, *request, END_TARGET]
        prompts.append((np.array(row, np.int32), np.full(len(row), -1, np.int32)))
    params = Blueprint(config, VOCAB, 1).init(0)
    full = FullScorer(config, params)
    calls: dict[str, Callable[[Sequence[Prompt]], Any]] = {"full": full}
    for k in options.late:
        late = Late(replace(config, late=k), Blueprint(replace(config, late=k), VOCAB, 1).init(0))
        calls[f"late {k}, all kept"] = late
        calls[f"late {k}, {options.hit_rate:.0%} kept"] = Partly(late, options.hit_rate)
    scorer, table, half = full.scorer, full.table, layers // 2
    middle = float(
        np.median(sure(scorer.every(prompts, table)[half - 1]))
    )  # nothing was learnt: half are surer than that
    exits = Exits((half,), (middle,))
    calls[f"exits, half behind layer {half}"] = lambda some: scorer.score(some, table, exits)
    rows = []
    for batch in options.batch:
        repeat = max(3, options.repeat // (4 if batch == 64 else 1))
        rows += compared(calls, prompts, batch, repeat, "full", {"model": f"random {size}"}, {})
    return rows


if __name__ == "__main__":
    main()
