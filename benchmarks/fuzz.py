"""Random requests to the public engine: is every id that comes back real, allowed, unseen and there once?

    python -m benchmarks.fuzz [--requests 1000000] [--worlds 40] [--seed 0]

A world is a random model over a random catalogue: 1 to 4 code levels, 1 to 400 items, deep and shallow tries, items that
nobody has met; k, beams and a way to normalise. A request brings a history, exclusions, memory, a gate and a temperature
of its own; a call a filter (none to all items forbidden), and in every second world users whose prefixes are kept. Counted are lists with an
id that is out of the catalogue, forbidden, excluded or there twice, or that are shorter than what may be listed. Of each
call a share is asked again with as many beams as there are items: a list that was called exact must be that one. Writes
benchmarks/results/fuzz.json and ends with exit code 1 when anything was counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write_results
from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.beam import Normalise
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.lists import Lists
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import stage
from m6rec_jax.vocab import SPECIALS, Vocab

CALL = 8192  # requests of one call
PROVEN = 256  # of them are asked again without pruning
CONTENT = 4
TOLERANCE = 1e-4  # of a score: two items that near may change places
WAYS: tuple[Normalise, ...] = ("level", "level", "vocab", "children")
WRONG = ("unreal", "forbidden", "excluded", "twice", "short", "inexact")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--worlds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows, start = [], time.monotonic()
    share = -(-options.requests // options.worlds)
    with stage("fuzz", options.requests, "requests") as bar:
        for number in range(options.worlds):
            rng = np.random.default_rng((options.seed, number))
            row = world(rng) | {
                "seed": options.seed,
                "world": number,
                "requests": 0,
                "proven": 0,
                **dict.fromkeys(WRONG, 0),
            }
            engine = row.pop("engine")
            known = number % 2 == 1
            while row["requests"] < share:
                found = ask(engine, rng, min(CALL, share - row["requests"]), row, known)
                row |= {name: row[name] + n for name, n in found.items()}
                bar.advance(found["requests"])
            rows.append(row)
            jax.clear_caches()  # every trie has programs of its own
    total = {name: sum(row[name] for row in rows) for name in ("requests", "proven", *WRONG)}
    print(f"wrote {write_results('fuzz', rows)}: {time.monotonic() - start:,.0f} s")
    print(", ".join(f"{n:,} {name}" for name, n in total.items()))
    sys.exit(1 if any(total[name] for name in WRONG) else 0)


def world(rng: np.random.Generator) -> dict[str, Any]:
    """A random engine, and what it is like."""
    levels, catalogue = int(rng.choice([1, 2, 3, 4])), int(np.exp(rng.uniform(0, np.log(400))))
    least = 2 if levels == 1 else int(np.ceil(catalogue ** (1 / levels)))
    codebook = catalogue if levels == 1 else max(2, least + int(rng.integers(0, 6)))
    spelled = np.arange(catalogue) if levels == 1 else rng.choice(codebook**levels, catalogue, replace=False)
    codes = np.stack(np.unravel_index(spelled, (codebook,) * levels), axis=1).astype(np.int32)
    config = ModelConfig(layers=int(rng.integers(1, 3)), width=8, heads=2, kv_heads=1)
    blueprint = Blueprint(config, Vocab(len(SPECIALS) + 8, (codebook,) * levels), CONTENT)
    drawn = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.7, x.shape), x.dtype), blueprint.shapes())
    content = rng.normal(size=(catalogue, CONTENT)).astype(np.float32)
    engine = Engine(blueprint.bind(drawn), codes, content, rng.random(catalogue) < 0.8, length=32)
    asked = {
        "k": int(rng.choice([1, 5, 10])),
        "beams": int(rng.choice([1, 10, 20])),
        "normalise": str(rng.choice(WAYS)),
    }
    made = {"levels": levels, "codebook": codebook, "catalogue": catalogue, "layers": config.layers}
    return {"engine": engine, **made, **asked}


def ask(engine: Engine, rng: np.random.Generator, count: int, settings: dict[str, Any], known: bool) -> dict[str, int]:
    """One call of so many requests: how many there were, and how many lists are wrong in which way."""
    n = engine.catalogue

    def some(most: int) -> list[np.ndarray]:
        return [rng.integers(0, n, size).astype(np.int32) for size in rng.integers(0, most + 1, count)]

    support = rng.integers(-1, n, (count, 6)).astype(np.int32)
    allowed = None if rng.random() < 0.3 else rng.random(n) < rng.choice([0.0, 0.05, 0.5, 0.95])
    request: dict[str, Any] = {
        "histories": some(12), "exclude": some(8), "memory": (support, rng.random(support.shape).astype(np.float32)),
        "gate": rng.random(count).astype(np.float32), "temperature": rng.uniform(0.5, 2.0, count).astype(np.float32),
    }  # fmt: skip
    shared: dict[str, Any] = {"allowed": allowed, "k": settings["k"], "normalise": settings["normalise"]}
    users = rng.integers(0, 2 * count, count).tolist() if known else None
    lists = engine.recommend(**request, **shared, users=users, beams=settings["beams"])
    found = {"requests": count, **faults(lists, request["exclude"], allowed, n)}

    chosen = rng.permutation(count)[:PROVEN]
    part = {name: [x[u] for u in chosen] for name, x in request.items() if name in ("histories", "exclude")}
    part |= {name: request[name][chosen] for name in ("gate", "temperature")}
    whole = engine.recommend(**part, memory=tuple(x[chosen] for x in request["memory"]), **shared, beams=n)
    return found | {"proven": len(chosen), "inexact": inexact(lists, chosen, whole)}


def faults(lists: Lists, exclude: list[np.ndarray], allowed: np.ndarray | None, catalogue: int) -> dict[str, int]:
    """Lists with an id that must not be in them, and lists that end before what may be listed does."""
    rows, listed = lists.rows, lists.rows >= 0
    seen = np.zeros((len(rows), catalogue), bool)
    for u, gone in enumerate(exclude):
        seen[u, gone] = True
    may = ~seen if allowed is None else ~seen & allowed
    at = np.clip(rows, 0, catalogue - 1)
    forbidden = np.zeros_like(listed) if allowed is None else ~allowed[at]
    in_order = np.sort(np.where(listed, rows, -1 - np.arange(rows.shape[1])), axis=1)
    return {
        "unreal": int((rows >= catalogue).any(1).sum()),
        "forbidden": int((forbidden & listed).any(1).sum()),
        "excluded": int((np.take_along_axis(seen, at, axis=1) & listed).any(1).sum()),
        "twice": int((in_order[:, 1:] == in_order[:, :-1]).any(1).sum()),
        "short": int((listed.sum(1) != np.minimum(rows.shape[1], may.sum(1))).sum()),
    }


def inexact(lists: Lists, chosen: np.ndarray, whole: Lists) -> int:
    """Lists called exact whose scores are not those of the search that prunes nothing."""
    ours, best = lists.scores[chosen], whole.scores
    there = np.isfinite(best)
    near = np.abs(np.where(there, ours, 0) - np.where(there, best, 0)) <= TOLERANCE * np.maximum(
        1.0, np.abs(np.where(there, best, 0))
    )
    same = (there & near) | (~there & (ours == best))
    return int((lists.exact[chosen] & ~same.all(1)).sum())


if __name__ == "__main__":
    main()
