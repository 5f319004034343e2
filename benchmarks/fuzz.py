"""Random requests to the public engine: is every id that comes back real, allowed, unseen and there once, and right?

    python -m benchmarks.fuzz [--requests 1000000] [--worlds 32] [--seed 0]

A world is a random model over a random catalogue: 1 to 4 code levels, 1 to 256 spellings of as many items or of fewer,
deep, shallow and lopsided tries; k, beams and a way to normalise. A request brings a history, exclusions, memory, a gate
and a temperature of its own; a call a filter (none to all items forbidden). In each fifth world users are known and come
back with one event more; in each third of the others some lists that are not proven are asked for again, wider.

Counted are lists with an id that is out of the catalogue, forbidden, excluded or there twice, or that are shorter than
what may be listed. Of some users of a call every spelling is scored, each as an item of its own, and what follows for the
items is reckoned in NumPy. Counted are then lists with a score that is not the item's, lists called exact that are not
the best ones, and ranks of random candidates that differ. Writes benchmarks/results/fuzz.json and ends with exit code 1
when anything was counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import write_results
from m6rec_jax.config import ModelConfig
from m6rec_jax.decoding.beam import GATE_MOST, Normalise, enough
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.lists import Lists
from m6rec_jax.model.load import Blueprint
from m6rec_jax.progress import note, stage
from m6rec_jax.vocab import SPECIALS, Vocab

CALL = 8192  # requests of one call
PROVEN = 256  # of them are reckoned by hand; also the known users of a world
TURNS = 5  # of known users, one event each, before they begin anew
PROVEN_TURNS = 0.3  # share of their calls that are reckoned by hand
WIDENED = 16  # at most so many of a call are asked again, one by one
CANDIDATES = 16  # at most so many spellings of a user's candidates: one shape
SPELLINGS = 256
CONTENT = 4
TOLERANCE = 1e-4  # of a score: two items that near may change places
WAYS: tuple[Normalise, ...] = ("level", "level", "vocab", "children")
WRONG = ("unreal", "forbidden", "excluded", "twice", "short", "misscored", "inexact", "misranked")
COUNTED = ("requests", "proven", "exact", "widened", "ranked", *WRONG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--worlds", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rows, total, start = [], Counter(dict.fromkeys(COUNTED, 0)), time.monotonic()
    share = -(-options.requests // options.worlds)
    with stage("fuzz", share * options.worlds, "requests") as bar:
        for number in range(options.worlds):
            rng, began = np.random.default_rng((options.seed, number)), time.monotonic()
            world = draw(rng, number)
            counts, call = Counter(dict.fromkeys(COUNTED, 0)), 0
            while counts["requests"] < share:
                found = world.ask(rng, call, share - counts["requests"])
                counts.update(found)
                call += 1
                bar.advance(found["requests"], wrong=sum(total[name] + counts[name] for name in WRONG))
                if faults := {name: found[name] for name in WRONG if found[name]}:
                    note(f"seed {options.seed}, world {number}, call {call - 1}: {faults} ({world.facts})")
            total.update(counts)
            rows.append({"seed": options.seed, "world": number, **world.facts, **counts, "seconds": round(time.monotonic() - began, 1)})  # fmt: skip
            jax.clear_caches()  # every trie has programs of its own
    seconds = time.monotonic() - start
    speed = {"seconds": round(seconds, 1), "requests_per_second": round(total["requests"] / seconds, 1)}
    rows.insert(0, {"seed": options.seed, "world": "all", "worlds": options.worlds, **total, **speed})
    print(f"wrote {write_results('fuzz', rows)}: {seconds:,.0f} s, {total['requests'] / seconds:,.0f} requests/s")
    print(", ".join(f"{total[name]:,} {name}" for name in COUNTED))
    sys.exit(1 if any(total[name] for name in WRONG) else 0)


@dataclass
class Fuzzed:
    """A random engine; `flat` is one to which each of its spellings is an item, `item [N]` whose spelling each is."""

    engine: Engine
    flat: Engine
    item: np.ndarray
    facts: dict[str, Any]
    histories: list[np.ndarray] | None = None  # of known users

    def ask(self, rng: np.random.Generator, call: int, most: int) -> Counter[str]:
        """One call of at most so many requests: how many there were, and how many answers are wrong in which way."""
        C, known = self.engine.catalogue, self.facts["known"]
        count = min(PROVEN if known else CALL, most)

        def some(most: int) -> list[np.ndarray]:
            return [rng.integers(0, C, size).astype(np.int32) for size in rng.integers(0, most + 1, count)]

        allowed = None if rng.random() < 0.3 else rng.random(C) < rng.choice([0.0, 0.05, 0.5, 0.95])
        support = rng.integers(-1, C, (count, 6)).astype(np.int32)
        mass = (rng.random(support.shape) * (rng.random((count, 1)) < 0.8)).astype(np.float32)
        request: dict[str, Any] = {
            "histories": self._come_back(rng, call, count) if known else some(12), "exclude": some(8),
            "memory": (support, mass), "gate": np.clip(rng.uniform(-0.2, 1.1, count), 0, 1).astype(np.float32),
            "temperature": rng.uniform(0.5, 2.0, count).astype(np.float32),
        }  # fmt: skip
        shared = {"allowed": allowed} | {name: self.facts[name] for name in ("k", "beams", "normalise")}
        lists = self.engine.recommend(**request, **shared, users=range(count) if known else None)
        counts = Counter(requests=count, exact=int(lists.exact.sum()), **faults(lists, request["exclude"], allowed, C))
        if known and rng.random() > PROVEN_TURNS:
            return counts

        chosen = rng.permutation(count)[:PROVEN]
        part = {name: _pick(value, chosen) for name, value in request.items()}
        may = np.ones((len(chosen), C), bool) if allowed is None else np.tile(allowed, (len(chosen), 1))
        for one, gone in zip(may, part["exclude"], strict=True):
            one[gone] = False
        each = self._scored(part, allowed)
        truth, spelled = self._mixed(each, may, part)
        counts.update(proven=len(chosen), **self._against(_part(lists, chosen), truth, spelled))
        if self.facts["widen"]:
            for u in np.flatnonzero(~lists.exact[chosen])[:WIDENED]:
                one = {name: _pick(value, np.array([u])) for name, value in part.items()}
                wide = self.engine.recommend(**one, **shared, widen=self.facts["widen"])
                counts.update(requests=1, widened=1, **faults(wide, one["exclude"], allowed, C))
                counts.update(self._against(wide, truth[[u]], spelled[[u]]))
        if shared["normalise"] == "level":  # as ranks are
            counts.update(self._ranked(rng, part, each))
        return counts

    def _come_back(self, rng: np.random.Generator, call: int, count: int) -> list[np.ndarray]:
        """Histories of the known users: at first any, then with an event more at each turn."""
        room = (self.engine.prompts.length - 1) // self.engine.trie.levels - TURNS
        old, C = self.histories, self.engine.catalogue
        if old is None or call % TURNS == 0:
            self.histories = [rng.integers(0, C, size).astype(np.int32) for size in rng.integers(0, room + 1, count)]
        else:
            self.histories = [np.append(h, rng.integers(0, C)).astype(np.int32) for h in old[:count]]
        return self.histories

    def _scored(self, part: dict[str, Any], allowed: np.ndarray | None) -> np.ndarray:
        """The model's log-probability of every spelling `[U, N]`; with `children` of those that may be shown."""
        N, shared = len(self.item), {"histories": part["histories"], "temperature": part["temperature"]}
        if self.facts["normalise"] == "level":
            return np.stack(self.flat.logp(**shared, rows=[np.arange(N)] * len(part["histories"])))
        gone = [np.flatnonzero(np.isin(self.item, rows)) for rows in part["exclude"]]
        may = None if allowed is None else allowed[self.item]
        found = self.flat.recommend(**shared, exclude=gone, allowed=may, k=N, beams=N, normalise=self.facts["normalise"])  # fmt: skip
        made = np.full((len(gone), N + 1), -np.inf, np.float32)
        np.put_along_axis(made, found.rows, found.model_logp, axis=1)  # row -1 is the last, which is dropped
        return made[:, :N]

    def _mixed(self, logp: np.ndarray, may: np.ndarray, part: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Score of every item `[U, C]`, -inf where it must not be shown, of the model's part for every spelling; and of
        every spelling `[U, N]`."""
        U, C = may.shape
        (support, mass), users = part["memory"], np.arange(len(may))[:, None]
        memory = np.zeros((U, C + 1))
        np.add.at(memory, (users, support), mass)
        memory = np.where(may, memory[:, :C], 0)
        total = memory.sum(1, keepdims=True)
        memory = np.divide(memory, total, out=np.zeros_like(memory), where=total > 0)
        gate = np.where(total > 0, np.minimum(part["gate"], GATE_MOST)[:, None], np.float32(0))
        with np.errstate(divide="ignore"):
            score = np.log1p(-gate) + logp
            score[:, :C] = np.logaddexp(score[:, :C], np.log(gate) + np.log(memory))  # the canonical ones come first
        made = np.full((U, C), -np.inf)
        np.maximum.at(made, (slice(None), self.item), score)
        return np.where(may, made, -np.inf), score

    def _against(self, lists: Lists, truth: np.ndarray, spelled: np.ndarray) -> dict[str, int]:
        """Lists with a score that is not the item's, and lists called exact that are not the best."""
        k = lists.rows.shape[1]
        best = np.pad(-np.sort(-truth, axis=1)[:, :k], ((0, 0), (0, max(0, k - truth.shape[1]))), constant_values=-np.inf)  # fmt: skip
        listed = lists.rows >= 0
        own = np.where(listed, np.take_along_axis(truth, np.maximum(lists.rows, 0), axis=1), -np.inf)
        right = _near(lists.scores, own)
        if (
            len(self.item) > self.engine.catalogue
        ):  # in a list that is not exact, that of another of the item's spellings
            for u in np.flatnonzero(~lists.exact):
                of = self.item[None] == lists.rows[u][:, None]
                right[u] |= (of & _near(np.broadcast_to(lists.scores[u][:, None], of.shape), spelled[u][None])).any(1)
        return {
            "misscored": int((~right & listed).any(1).sum()),
            "inexact": int((lists.exact & ~_near(lists.scores, best).all(1)).sum()),
        }

    def _ranked(self, rng: np.random.Generator, part: dict[str, Any], each: np.ndarray) -> dict[str, int]:
        """Ranks of random candidates, none for the first user, that are not what follows from their scores."""
        C, U = self.engine.catalogue, len(each)
        most = max(1, min(C, CANDIDATES // self.engine.trie.most))
        own = [rng.permutation(C)[: rng.integers(1, most + 1) if u else 0] for u in range(U)]
        asked = {name: part[name] for name in ("histories", "memory", "gate", "temperature")}
        ranked = self.engine.rank(candidates=own, **asked)
        may = np.zeros((U, C), bool)
        for one, rows in zip(may, own, strict=True):
            one[rows] = True
        (truth, _), wrong = self._mixed(each, may, part), 0
        for u, rows in enumerate(own):
            n, found, scores = len(rows), ranked.rows[u], ranked.scores[u]
            right = set(found[:n].tolist()) == set(rows.tolist()) and (found[n:] == -1).all()
            wrong += not (right and (np.diff(scores[:n]) <= 0).all() and _near(scores[:n], truth[u, found[:n]]).all())
        return {"ranked": U, "misranked": wrong}


def draw(rng: np.random.Generator, number: int) -> Fuzzed:
    """A random engine."""
    levels, wider = 1 + number % 4, number % 3 == 2 and number % 5 != 1  # wider: much to prune
    spellings, most = int(np.exp(rng.uniform(np.log(SPELLINGS / 4) if wider else 0, np.log(SPELLINGS), 2).max())), 1
    if levels == 1:
        codebook, codes = max(2, spellings), np.arange(max(2, spellings), dtype=np.int32)[:, None]
    else:
        codebook = max(2, int(np.ceil(spellings ** (1 / levels))) + int(rng.integers(0, 6)))
        places = codebook**levels
        # Lopsided: most spellings begin alike, so that a node has many children and others have one.
        steep = rng.choice([0.0, 3.0])
        weight = np.exp(-steep * np.stack(np.unravel_index(np.arange(places), (codebook,) * levels)).sum(0) / codebook)
        chosen = rng.choice(places, min(spellings, places), replace=False, p=weight / weight.sum())
        codes = np.stack(np.unravel_index(chosen, (codebook,) * levels), axis=1).astype(np.int32)
        most = int(rng.integers(1, 5))
    catalogue = max(1, 2 * len(codes) // (most + 1))
    item = np.append(np.arange(catalogue), rng.integers(0, catalogue, len(codes) - catalogue))
    config = ModelConfig(layers=int(rng.integers(1, 3)), width=8, heads=2, kv_heads=1)
    blueprint = Blueprint(config, Vocab(len(SPECIALS) + 8, (codebook,) * levels), CONTENT)
    # With weights of .7 logits of some 40 came about, and two ways to read one history differed by 2e-4 in float32, in one
    # list of 695,744 requests.
    model = blueprint.bind(jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), blueprint.shapes()))  # fmt: skip
    content, seen = rng.normal(size=(catalogue, CONTENT)).astype(np.float32), rng.random(catalogue) < 0.8
    more = None if most == 1 else (item[catalogue:], codes[catalogue:])
    engine = Engine(model, codes[:catalogue], content, seen, length=32, spellings=more)
    flat = engine if most == 1 else Engine(model, codes, content[item], seen[item], length=32)
    asked = {
        "k": int(rng.choice([1, 2] if wider else [1, 5, 10])), "beams": 1 if wider else int(rng.choice([1, 10, 20])), "normalise": str(rng.choice(WAYS)),
        "known": number % 5 == 1,
    }  # fmt: skip
    widen = 2 * max(asked["beams"], enough(engine.trie, min(asked["k"], catalogue))) if wider else 0
    made = {"levels": levels, "codebook": codebook, "catalogue": catalogue, "spellings": len(codes), "most": engine.trie.most}  # fmt: skip
    return Fuzzed(engine, flat, item, {**made, "layers": config.layers, **asked, "widen": widen})


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


def _near(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    there = np.isfinite(a) & np.isfinite(b)
    x, y = np.where(there, a, 0), np.where(there, b, 0)
    return np.where(there, np.abs(x - y) <= TOLERANCE * np.maximum(1.0, np.abs(y)), a == b)


def _pick(value: Any, chosen: np.ndarray) -> Any:
    """A part of requests, for some of the users."""
    if isinstance(value, tuple):
        return tuple(_pick(one, chosen) for one in value)
    return value[chosen] if isinstance(value, np.ndarray) else [value[u] for u in chosen]


def _part(lists: Lists, chosen: np.ndarray) -> Lists:
    return Lists(*(getattr(lists, name)[chosen] for name in lists.__dataclass_fields__))


if __name__ == "__main__":
    main()
