"""Runs a file that `m6rec export --format edge` wrote: NumPy and the standard library, no JAX, nothing else of this package.

    python runner.py model.m6e --tokens "2 37 512 40"            the likeliest next items
    python runner.py model.m6e --text "red shoes" --slice text   the likeliest next pieces (needs sentencepiece)
    python runner.py model.m6e --tokens "2 38 512 39 41" --task 0    probabilities of the options of a task

This file alone, copied beside a model, is enough.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAGIC, DIGEST, LENGTH = b"M6EDGE1\n", 32, 8
SCHEMA = "m6rec-edge"
TARGET = 15  # the id of `<target>`, which opens what an instance asks for; the same in every model
# Names of a layer's tensors: into heads and inner units, out of them.
PROJECTIONS, GATES = ("query", "key", "value"), ("gate", "up")


class EdgeError(ValueError):
    """A file or a request that cannot be used; one line that says why and what to do."""


@dataclass(frozen=True)
class Model:
    """A loaded file: what its header says, float32 weights by name, layers as matrices, the bytes of tokenizer.model."""

    header: dict[str, Any]
    weights: dict[str, np.ndarray]
    layers: list[dict[str, np.ndarray]]
    tokenizer: bytes

    def hidden(
        self, tokens: np.ndarray, rows: np.ndarray | None = None, order: np.ndarray | None = None, last: bool = False
    ) -> np.ndarray:
        """States `[T, D]` after the last norm, of one sequence of ids `[T]`; with `last` that of its last token, `[1, D]`.

        `order [T]`, never falling: a token sees those of its own order and below; left out, those before it and itself.
        `rows [T]`: the item whose content a token adds, -1 for none; left out, that of every token that is an item.
        """
        config = self.header["model"]
        heads, groups, size = config["kv_heads"], config["heads"] // config["kv_heads"], config["head_size"]
        tokens = self._checked(tokens)
        x, T = self._read(tokens, rows), len(tokens)
        order = np.arange(T) if order is None else np.asarray(order)
        if len(order) != T or (np.diff(order) < 0).any():
            raise EdgeError(
                f"order of {len(order)} numbers for {T} tokens: give one a token, and none below the one before"
            )
        unseen = order[None, :] > order[:, None]
        half = size // 2
        angles = np.arange(T)[:, None] * config["rope_theta"] ** (-np.arange(half, dtype=np.float32) / half)
        sin, cos = (f(angles).astype(np.float32)[:, None] for f in (np.sin, np.cos))

        def turned(x: np.ndarray) -> np.ndarray:  # [t, heads, size]
            first, second = x[..., :half], x[..., half:]
            at = slice(T - len(x), T)
            return np.concatenate([first * cos[at] - second * sin[at], second * cos[at] + first * sin[at]], axis=-1)

        eps = config["norm_eps"]
        for number in range(config["layers"]):
            w = self.layers[0 if config["shared_layers"] else number]
            y = _norm(x, w["attention_norm"], eps)
            inner = heads * size
            ends = slice(T - 1, T) if last and number == config["layers"] - 1 else slice(0, T)
            q = turned((y[ends] @ w["query"]).reshape(-1, heads * groups, size)).reshape(-1, heads, groups, size)
            kv = y @ w["key_value"]
            k, v = turned(kv[:, :inner].reshape(T, heads, size)), kv[:, inner:].reshape(T, heads, size)
            t = len(q)
            scores = q.transpose(1, 2, 0, 3).reshape(heads, groups * t, size) @ k.transpose(1, 2, 0)
            scores = (scores * np.float32(size**-0.5)).reshape(heads, groups, t, T)
            scores[:, :, unseen[ends]] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            mixed = scores.reshape(heads, groups * t, T) @ v.transpose(1, 0, 2)
            mixed = mixed.reshape(heads, groups, t, size).transpose(2, 0, 1, 3).reshape(t, -1)
            x = x[ends] + mixed @ w["output"]
            gate_up = _norm(x, w["ffn_norm"], eps) @ w["gate_up"]
            F = gate_up.shape[1] // 2
            x = x + _silu(gate_up[:, :F]) * gate_up[:, F:] @ w["down"]
        return _norm(x, self.weights["final_norm"], eps)

    def logits(self, hidden: np.ndarray, name: str = "level1") -> np.ndarray:
        """Scores `[n, size]` of states over one slice of the vocabulary: text, level1, ..., options."""
        part = self.slice_of(name)
        if "projection" in self.weights:
            hidden = hidden @ self.weights["projection"].T
        scores = hidden @ self.weights[f"tables.{name}"][: part["size"]].T
        content = self.weights.get(f"content.{part['domain']}") if part["atomic"] else None
        return scores if content is None else scores + hidden @ content[: part["size"]].T

    def next_item(self, tokens: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Logits over the first code of what comes next, which of a catalogue of one level is the item."""
        return self.logits(self.hidden(tokens, rows, last=True), "level1")[0]

    def score(self, tokens: np.ndarray, task: int = 0, rows: np.ndarray | None = None) -> np.ndarray:
        """Probabilities of a task's options at the end of an instance: what stands before its last `<target>` sees itself
        both ways, the candidate behind it reads left to right. Without one, all see each other."""
        counts = self.header["options"]
        if not 0 <= task < len(counts):
            raise EdgeError(
                f"task {task}: the model has options for {len(counts)} tasks, counted from 0; name one of them"
            )
        opens = np.flatnonzero(np.asarray(tokens) == TARGET)
        order = np.maximum(np.arange(len(tokens)) - (opens[-1] if len(opens) else len(tokens)) + 1, 0)
        begin = sum(counts[:task])
        scores = self.logits(self.hidden(tokens, rows, order, last=True), "options")[0, begin : begin + counts[task]]
        e = np.exp(scores - scores.max())
        return e / e.sum()

    def slice_of(self, name: str) -> dict[str, Any]:
        """A slice of the vocabulary: `name, offset, size, domain, atomic`."""
        for part in self.header["slices"]:
            if part["name"] == name:
                return part
        raise EdgeError(f"slice {name}: unknown; there are {', '.join(s['name'] for s in self.header['slices'])}")

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text's pieces. Needs the package sentencepiece."""
        try:
            import sentencepiece
        except ImportError:
            raise EdgeError("a text needs the package sentencepiece: install it, or give ids with --tokens") from None
        processor: Any = sentencepiece.SentencePieceProcessor(model_proto=self.tokenizer)
        return np.array(processor.encode(_normalised(text)), np.int32)

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        tokens = np.asarray(tokens, np.int64)
        known = np.zeros(len(tokens), bool)
        for s in self.header["slices"]:
            known |= (tokens >= s["offset"]) & (tokens < s["offset"] + s["size"])
        if not len(tokens) or not known.all():
            what = f"{tokens[~known][0]} is no id of this model" if len(tokens) else "none given"
            raise EdgeError(f"tokens: {what}; its header lists the slices of ids")
        return tokens

    def _read(self, tokens: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
        x: Any = 0.0
        found = np.full(len(tokens), -1)
        firsts = np.cumsum([0, *(len(self.weights[n]) for n in self._contents())])
        for s in self.header["slices"]:
            inside = (tokens >= s["offset"]) & (tokens < s["offset"] + s["size"])
            at = np.where(inside, tokens - s["offset"], 0)
            x = x + np.where(inside[:, None], self.weights[f"tables.{s['name']}"][at], 0)
            if s["atomic"] and f"content.{s['domain']}" in self.weights:
                found = np.where(inside, at + firsts[s["domain"]], found)
        rows = found if rows is None else np.asarray(rows)
        for name, first in zip(self._contents(), firsts, strict=False):
            content = self.weights[name]
            inside = (rows >= first) & (rows < first + len(content))
            x = x + np.where(inside[:, None], content[np.where(inside, rows - first, 0)], 0)
        x = np.asarray(x, np.float32)
        return x @ self.weights["projection"] if "projection" in self.weights else x

    def _contents(self) -> list[str]:
        """Names of the items' content, domain by domain."""
        return [f"content.{i}" for i in range(self.header["domains"]) if f"content.{i}" in self.weights]


def load(path: Path | str) -> Model:
    """The model in a file, its weights as float32. Raises EdgeError when the file is none, or not as it was written."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise EdgeError(f"{path}: {error.strerror}; name a file that `m6rec export --format edge` wrote") from None
    start = len(MAGIC) + DIGEST
    if data[: len(MAGIC)] != MAGIC:
        raise EdgeError(
            f"{path}: not a model of this kind (or of another version); name a file that `m6rec export --format edge` wrote"
        )
    body = memoryview(data)[start:]
    if hashlib.sha256(body).digest() != data[len(MAGIC) : start]:
        raise EdgeError(f"{path}: not as it was written (its digest differs); take it from a copy or export it again")
    size = int.from_bytes(body[:LENGTH], "little")
    header, blob = json.loads(bytes(body[LENGTH : LENGTH + size])), body[LENGTH + size :]

    def part(at: list[int], kind: str) -> np.ndarray:
        return np.frombuffer(zlib.decompress(blob[at[0] : at[0] + at[1]]), kind)

    def whole(said: dict[str, Any]) -> np.ndarray:
        shape = said["shape"]
        if "float32" in said:
            return part(said["float32"], "<f4").astype(np.float32).reshape(shape)
        if "int8" in said:
            q = part(said["int8"], "i1")
        else:
            q = np.zeros(int(np.prod(shape)), np.int8)
            q[np.unpackbits(part(said["bits"], "u1"), count=len(q)).view(bool)] = part(said["nonzero"], "i1")
        one = [1 if axis in said["summed"] else n for axis, n in enumerate(shape)]
        return q.reshape(shape) * part(said["scale"], "<f4").reshape(one)

    weights = {name: whole(said) for name, said in header["tensors"].items()}
    tokenizer = zlib.decompress(blob[header["tokenizer"][0] :][: header["tokenizer"][1]])
    return Model(header, weights, _layers(header["model"], weights), tokenizer)


def _layers(config: dict[str, Any], weights: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """A layer's tensors as matrices, those that read the same input side by side."""
    D, made = config["width"], []
    for i in range(len(weights["block.attention_norm"])):
        w = {name.removeprefix("block."): x[i] for name, x in weights.items() if name.startswith("block.")}
        inwards = {name: w[name].reshape(D, -1) for name in (*PROJECTIONS, *GATES)}
        made.append({
            "attention_norm": w["attention_norm"], "ffn_norm": w["ffn_norm"], "query": inwards["query"],
            "key_value": np.concatenate([inwards["key"], inwards["value"]], axis=1),
            "gate_up": np.concatenate([inwards[name] for name in GATES], axis=1),
            "output": w["output"].reshape(-1, D), "down": w["down"],
        })  # fmt: skip
    return made


def _normalised(text: str) -> str:
    """As the tokenizer was trained: NFKC, no control characters, single spaces (data/tokenizer.normalise)."""
    spaces = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85"
    table: dict[int, str | None] = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)))
    table |= dict.fromkeys(map(ord, spaces), " ") | dict.fromkeys(range(0xD800, 0xE000), "\ufffd") | {0x2581: "_"}
    return " ".join(unicodedata.normalize("NFKC", text.translate(table)).split())


def _norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * (1 + gain)


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def main(argv: list[str] | None = None) -> int:
    """Answer one request; 0, or 2 and one line of error."""
    parser = argparse.ArgumentParser(description="Run a model of one file with NumPy alone.")
    add = parser.add_argument
    add("model", help="file that `m6rec export --format edge` wrote")
    add("--tokens", help="ids, separated by spaces or commas")
    add(
        "--text",
        help="a text, read with the tokenizer in the file (needs sentencepiece); ids of --tokens come before it",
    )
    add("--task", type=int, help="probabilities of the options of this task, from 0; without it, what comes next")
    add("--slice", default="level1", help="whose ids are ranked: level1 (items), text, ... (default: level1)")
    add("--top", type=int, default=10, help="how many (default: 10)")
    add("--repeat", type=int, default=1, help="ask so often and say the median seconds (default: 1)")
    options = parser.parse_args(argv)
    try:
        model = load(options.model)
        words = (options.tokens or "").replace(",", " ").split()
        if not all(word.lstrip("-").isdigit() for word in words):
            raise EdgeError(f"--tokens {options.tokens}: ids are whole numbers")
        tokens = np.array([int(word) for word in words], np.int64)
        if options.text is not None:
            tokens = np.concatenate([tokens, model.encode(options.text)])
        took = []
        for _ in range(max(options.repeat, 1)):
            start = time.perf_counter()
            if options.task is not None:
                answer: dict[str, Any] = {"probabilities": model.score(tokens, options.task).round(6).tolist()}
            else:
                scores = model.logits(model.hidden(tokens, last=True), options.slice)[0]
                best = np.argsort(-scores, kind="stable")[: options.top]
                answer = {"slice": options.slice, "ids": best.tolist(), "logits": scores[best].round(5).tolist()}
            took.append(time.perf_counter() - start)
    except EdgeError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(answer | {"tokens": len(tokens), "seconds": round(float(np.median(took)), 6)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
