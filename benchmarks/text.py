"""Texts of mixed lengths: slots that are filled again as texts end, against batches that all run to their longest text.

    taskset -c 0,1 python -m benchmarks.text [--turns 3] [--out FILE]

A random model (2 layers of width 128, 8,192 text pieces at most), 64 requests of 5 to 100 tokens of prompt whose texts
have 4 to 128 tokens, most of them few. Both run the same two programs over 8 slots and take turns in one process; they
must write the same texts. Writes benchmarks/results/text.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.record import write_results
from m6rec_jax.config import ModelConfig
from m6rec_jax.data.tokenizer import Tokenizer, train_tokenizer
from m6rec_jax.decoding.engine import Engine
from m6rec_jax.decoding.texts import Text
from m6rec_jax.model.load import Blueprint
from m6rec_jax.vocab import BOS, SPECIALS, Vocab

ITEMS, CONTENT, PIECES = 1_000, 16, 8_192
REQUESTS, SLOTS, SHORTEST, LONGEST = 64, 8, 4, 128
SYSTEMS = ("batches", "slots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3, help="of each system, after one that compiles")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measured(options.turns)
    for row in rows:
        print("{system:8} {users_per_s:6.1f} users/s, {tokens_per_s:7.0f} tokens/s; a text after {p50_ms:.0f} ms (p95 {p95_ms:.0f})".format(**row))  # fmt: skip
    speed = {row["system"]: row["users_per_s"] for row in rows}
    print(f"slots / batches = {speed['slots'] / speed['batches']:.2f}")
    print(f"wrote {write_results('text', rows, options.out)}")


def measured(turns: int) -> list[dict]:
    """One row a system: medians over the turns; milliseconds from the start of all to the end of each text."""
    engine, rng = random_engine(), np.random.default_rng(1)
    pieces = engine.vocab.text.size
    prompts = [[BOS, *rng.integers(len(SPECIALS), pieces, n).tolist()] for n in rng.integers(4, 100, REQUESTS)]
    most = np.clip(rng.geometric(1 / 24, REQUESTS), SHORTEST, LONGEST).tolist()
    taken: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    waited: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    texts: dict[str, list[Text]] = {}
    for turn in range(turns + 1):  # the first compiles
        for system in SYSTEMS[:: 1 if turn % 2 else -1]:
            start, ended = time.perf_counter(), []
            texts[system] = run(engine, prompts, most, REQUESTS if system == "slots" else SLOTS, ended)
            if turn:
                taken[system].append(time.perf_counter() - start)
                waited[system] += [end - start for end in ended]
        assert texts["slots"] == texts["batches"]
    tokens = sum(len(text.tokens) for text in texts["slots"])
    return [
        {
            "system": system, "slots": SLOTS, "requests": REQUESTS, "tokens": tokens,
            "users_per_s": REQUESTS / float(np.median(taken[system])), "tokens_per_s": tokens / float(np.median(taken[system])),
            "p50_ms": 1e3 * float(np.median(waited[system])), "p95_ms": 1e3 * float(np.quantile(waited[system], 0.95)),
        }
        for system in SYSTEMS
    ]  # fmt: skip


def run(engine: Engine, prompts: list[list[int]], most: list[int], at_once: int, ended: list[float]) -> list[Text]:
    """The texts, asked for so many at a time; when each of them ended is added to `ended`."""
    texts = []
    for first in range(0, len(prompts), at_once):
        futures = [engine.submit_text(prompts[i], most=most[i], seed=i) for i in range(first, min(first + at_once, len(prompts)))]  # fmt: skip
        for future in futures:
            future.add_done_callback(lambda _: ended.append(time.perf_counter()))
        texts += [future.result() for future in futures]
    return texts


def random_tokenizer() -> Tokenizer:
    """Pieces of made-up words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("bcdfghklmnprst"), 4) + rng.choice(list("aeiou"), 4)) for _ in range(9_000)]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer([" ".join(words[i : i + 9]) for i in range(0, 9_000, 3)], Path(folder) / "tokenizer.model", PIECES)  # fmt: skip


def random_engine() -> Engine:
    """The model that is measured."""
    rng, tokenizer = np.random.default_rng(0), random_tokenizer()
    vocab = Vocab(tokenizer.size, (ITEMS,))
    blueprint = Blueprint(ModelConfig(layers=2, width=128, heads=4), vocab, CONTENT)
    content = rng.normal(size=(ITEMS, CONTENT)).astype(np.float32)
    return Engine(
        blueprint.bind(blueprint.init(0)), np.arange(ITEMS)[:, None], content, np.ones(ITEMS, bool), length=256,
        tokenizer=tokenizer, slots=SLOTS,
    )  # fmt: skip


if __name__ == "__main__":
    main()
