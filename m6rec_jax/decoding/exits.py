"""Early exit: every layer can answer (`model.exits`), and an instance leaves behind the first one that is sure enough.

Layers run in groups. Behind each the answer is read, rows that are sure leave, and the others go on in a smaller program,
so that what leaves early is not paid for. How sure is sure enough is fitted on validation for a stated loss of the metric
(`calibrate`) and kept beside the run (`Exits.save`). M6-Rec, arXiv 2205.08084, section on M6-Edge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.schemas import EXITS
from m6rec_jax.decoding.shapes import Prompt, batches, pad
from m6rec_jax.errors import InputError
from m6rec_jax.model.interaction import opens
from m6rec_jax.model.items import Catalogues
from m6rec_jax.model.transformer import Transformer, framed

EXITS_FILE = "exits.json"
PEEK = 0.2  # of a layer's time: keys and values of all tokens, the rest of one alone
GRID = 33  # thresholds that are tried for a layer
Metric = Callable[[np.ndarray, np.ndarray], float]  # (labels [n], logits [n, C]) -> higher is better


@dataclass(frozen=True)
class Exits:
    """Behind which layers (from 1, below the last) a row may leave, and the probability its likeliest option must exceed.

    At a threshold of 1 nothing leaves. `metric`, `loss`: what was allowed on validation, and `lost` of it; `layers_run`:
    mean layers a row took there.
    """

    layers: tuple[int, ...]
    thresholds: tuple[float, ...]
    metric: str = ""
    loss: float = 0.0
    lost: float = 0.0
    layers_run: float = 0.0

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.thresholds):
            raise InputError(f"exits: {len(self.layers)} layers, {len(self.thresholds)} thresholds; give one for each")
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 1 for layer in self.layers):
            raise InputError(f"exits: layers {list(self.layers)}: give them in order, each once, counted from 1")

    def save(self, folder: Path | str) -> Path:
        """Write `exits.json` beside a run's checkpoints or an exported model."""
        path = Path(folder) / EXITS_FILE
        write_json(path, {"schema": EXITS.name, "version": EXITS.version, **asdict(self)})
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Exits:
        """Raises InputError when there is none, or it cannot be read."""
        path = Path(folder) / EXITS_FILE
        if not path.is_file():
            raise InputError(f"{folder}: no {EXITS_FILE}; calibrate early exit on validation first")
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if (body.pop("schema"), body.pop("version")) != EXITS:
                raise InputError(f"{path}: not {EXITS.name} version {EXITS.version}; calibrate again")
            return cls(**{**body, "layers": tuple(body["layers"]), "thresholds": tuple(body["thresholds"])})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); calibrate again") from None


class Left(NamedTuple):
    """Logits of each option `[n, C]` float32, and behind which layer each row left `[n]`."""

    scores: Float[np.ndarray, "n C"]
    layers: Int[np.ndarray, " n"]


class ExitScorer:
    """A model with `model.exits`, ready to score instances: token rows that end at `</target>`. One device.

    Raises InputError when the model's layers were not trained to answer.
    """

    def __init__(self, model: Transformer, items: Catalogues) -> None:
        self.config = model.config
        if not self.config.exits:
            raise InputError("model.exits=false: only the last layer of this model was trained to answer; train with model.exits=true")  # fmt: skip
        self._define, self.params = nnx.split(model)
        self.items = items

    def score(self, instances: Sequence[Prompt], options: Float[Array, "C D"], exits: Exits) -> Left:
        """Each row's answer behind the first of its exits that is sure, or behind the last layer."""
        found = Left(np.zeros((len(instances), len(options)), np.float32), np.zeros(len(instances), np.int32))
        for chosen, T, B in batches([len(tokens) for tokens, _ in instances]):
            rows = chosen
            stops, (tokens, item_rows, at) = self._stops(exits), _padded([instances[i] for i in chosen], B, T)
            x, scores = _start(self._define, self.params, self.items, tokens, item_rows, at, options, stops[0][0] - 1)
            for number, (layer, threshold) in enumerate(stops):
                said = np.asarray(scores)[: len(rows)]
                leaves = sure(said) > threshold if layer < self.config.layers else np.ones(len(rows), bool)
                found.scores[rows[leaves]], found.layers[rows[leaves]] = said[leaves], layer
                stay = np.flatnonzero(~leaves)
                if not len(stay):
                    break
                rows = rows[stay]
                keep = np.zeros(_rows(len(rows), B), np.int32)
                keep[: len(rows)] = stay
                at, nearest = at[:, keep], (layer - 1, stops[number + 1][0] - 1)
                x, scores = _go_on(self._define, self.params, x, keep, at, options, *nearest)
        return found

    def every(self, instances: Sequence[Prompt], options: Float[Array, "C D"]) -> Float[np.ndarray, "N n C"]:
        """What each layer answers: logits `[layers, n, C]`, for `calibrate`."""
        found = np.zeros((self.config.layers, len(instances), len(options)), np.float32)
        for chosen, T, B in batches([len(tokens) for tokens, _ in instances]):
            tokens, item_rows, at = _padded([instances[i] for i in chosen], B, T)
            x, scores = _start(self._define, self.params, self.items, tokens, item_rows, at, options, 0)
            for layer in range(self.config.layers):
                if layer:
                    x, scores = _go_on(self._define, self.params, x, np.arange(B), at, options, layer - 1, layer)
                found[layer, chosen] = np.asarray(scores)[: len(chosen)]
        return found

    def _stops(self, exits: Exits) -> list[tuple[int, float]]:
        """(layer, threshold) of every exit at which something may leave, and the last layer."""
        N = self.config.layers
        if exits.layers and exits.layers[-1] >= N:
            raise InputError(f"exits: layer {exits.layers[-1]} is not below the last of {N}; calibrate for this model")
        used = [(layer, at) for layer, at in zip(exits.layers, exits.thresholds, strict=True) if at < 1]
        return [*used, (N, 0.0)]


def sure(scores: Float[np.ndarray, "*n C"]) -> Float[np.ndarray, "*n"]:
    """The probability of the likeliest option, never above 1."""
    scores = scores.astype(np.float64)
    return 1 / np.exp(scores - scores.max(-1, keepdims=True)).sum(-1)


def calibrate(
    scores: Float[np.ndarray, "N n C"],
    labels: Int[np.ndarray, " n"],
    max_loss: float,
    metric: Metric | None = None,
    name: str = "auc",
) -> Exits:
    """Thresholds that run the fewest layers while `metric` falls by at most `max_loss` below that of the last layer.

    `scores`: what every layer answers on validation (`ExitScorer.every`); `metric`: of labels and logits, higher is better
    (None: area under the ROC curve of the second option). The search begins with no exit, with one threshold for all and
    with one exit alone, and changes one threshold at a time. An exit that saves less than its peeking costs is left out.
    """
    metric = metric or auc
    N, n, _ = scores.shape
    certain = sure(scores[:-1])
    whole_metric, rows = metric(labels, scores[-1]), np.arange(n)

    def judged(thresholds: np.ndarray) -> tuple[float, float, float]:
        """(metric lost, time in layers, layers run), means a row."""
        leaves = np.vstack([certain > thresholds[:, None], np.ones(n, bool)])
        at = leaves.argmax(0)
        peeks = np.concatenate([[0], np.cumsum(thresholds < 1)])[:N]  # asked before the layer at which a row leaves
        lost = whole_metric - metric(labels, scores[at, rows])
        return lost, float(np.mean(at + PEEK * (1 + peeks[at]))), float(np.mean(at + 1))

    exits, nothing = np.arange(N - 1), np.ones(N - 1)
    grids = [(0.0, *np.unique(np.quantile(one, np.linspace(0, 1, GRID))), 1.0) for one in certain]
    steps = [(at, threshold) for at, grid in enumerate(grids) for threshold in grid]

    def quickest(some: Sequence[np.ndarray]) -> np.ndarray:
        """Of some thresholds the quickest that lose little enough; otherwise those at which nothing leaves."""
        kept = [(time, i) for i, (lost, time, _) in enumerate(map(judged, some)) if lost <= max_loss]
        return some[min(kept)[1]] if kept else nothing

    def lowered(thresholds: np.ndarray) -> np.ndarray:
        """Thresholds that no change of a single exit makes quicker."""
        while True:
            tried = [thresholds, *(np.where(exits == at, threshold, thresholds) for at, threshold in steps)]
            better = quickest(tried)
            if judged(better)[1] >= judged(thresholds)[1] - 1e-9:
                return thresholds
            thresholds = better

    alike = [np.full(N - 1, threshold) for threshold in sorted({one for grid in grids for one in grid})]
    alone = [np.where(exits == at, threshold, 1.0) for at, threshold in steps]
    best = quickest([lowered(begin) for begin in (nothing, quickest(alike), quickest(alone))])
    lost, _, run = judged(best)
    used = np.flatnonzero(best < 1)
    layers, thresholds = (tuple(x.tolist()) for x in (used + 1, best[used]))
    return Exits(layers, thresholds, name, max_loss, float(max(lost, 0.0)), run)


def auc(labels: Int[np.ndarray, " n"], scores: Float[np.ndarray, "n 2"]) -> float:
    """Area under the ROC curve of two options; equal scores count half."""
    margin = scores[:, 1].astype(np.float64) - scores[:, 0]
    _, place, count = np.unique(margin, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    positive = labels == 1
    n = int(positive.sum())
    if not 0 < n < len(labels):
        raise InputError("auc: every label is the same; calibrate on rows of both")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(labels) - n)))


def _rows(stay: int, most: int) -> int:
    """Rows of the program that so many go on in, out of `most`: up to 8 exactly, then four sizes to each power of two.

    A row is a whole sequence: half a batch that went on in a program for all would save nothing.
    """
    step = max(1, (1 << (stay - 1).bit_length()) // 8)
    return min(most, -(-stay // step) * step)


def _padded(instances: Sequence[Prompt], B: int, T: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens and item rows `[B, T]`, and where each request begins and ends `[2, B]`."""
    tokens, item_rows, lengths = pad(instances, B, T)
    request = np.ones(B, np.int32)
    request[: len(instances)] = [opens(one) for one, _ in instances]
    return tokens, item_rows, np.stack([request, lengths])


@partial(jax.jit, static_argnums=0)
def _start(define, params, items, tokens, item_rows, at, options, first):
    """Rows read and brought before layer `first` (from 0), and the logits that it gives."""
    model = nnx.merge(define, params)
    return _peeked(model, model.begin(tokens, item_rows, items), at, options, 0, first)


@partial(jax.jit, static_argnums=0)
def _go_on(define, params, x, keep, at, options, first, last):
    """Rows `keep` of `x`, which stands before layer `first`, brought before layer `last`, and the logits that it gives."""
    return _peeked(nnx.merge(define, params), x[keep], at, options, first, last)


def _peeked(model, x, at, options, first, last):
    x = model.through(x, framed(x.shape[:2], *at), first, last)
    hidden = model.peek(x, at[1], last)
    return x, jnp.einsum("bd,cd->bc", hidden, options.astype(hidden.dtype), preferred_element_type=jnp.float32)
