"""Collaborative memory: what other users did after the items of this history, and how far to trust it (DESIGN section 6).

The memory is a sparse distribution over the catalogue for each user, read from transition counts without any learning.
Its ranking with the default settings is the counting floor of EVALUATION.md. The gate is the only fitted part.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.schemas import GATE
from m6rec_jax.data.transitions import Transitions
from m6rec_jax.decoding.beam import GATE_MOST
from m6rec_jax.errors import InputError
from m6rec_jax.recommend.metrics import flatten

GATE_FILE = "gate.json"


@dataclass(frozen=True)
class MemoryConfig:
    """How transition counts become a distribution.

    Args:
        recency: weights of the last items of a history, newest first.
        power: a row of counts is divided by (its sum) to this power, so that common items do not drown the others.
        backward: share with which a new event also counts in the other direction; what `prepare` counted with.
        width: heaviest items kept for a user.
    """

    recency: tuple[float, ...] = (1.0, 0.5, 0.25)
    power: float = 0.5
    backward: float = 0.5
    width: int = 4096


@dataclass(frozen=True)
class Support:
    """The memory of U users as plain arrays, heaviest item first (ties: lower catalogue row).

    `rows` int32 `[U,S]`, -1 = padding; `mass` float32 `[U,S]`, sums to 1 (0 for a user without support); `total`
    float64 `[U]`: the mass before it was normalised, which is how much evidence there was.
    """

    rows: np.ndarray
    mass: np.ndarray
    total: np.ndarray

    def probability(self, targets: np.ndarray) -> np.ndarray:
        """Mass of one item a user: float64 `[U]`."""
        return np.where(self.rows == targets[:, None], self.mass, 0).sum(1, dtype=np.float64)


class Memory:
    """Transition counts, forward and backward joined, that answer for a batch of histories and learn from one event.

    The counts lie in one CSR. A known pair is counted in place; a row that gains a pair moves to a small overflow, so
    an event costs time in the length of the rows it touches, whatever the size of the catalogue.
    """

    def __init__(self, transitions: Transitions, config: MemoryConfig | None = None) -> None:
        self.config = config or MemoryConfig()
        self.window = transitions.window
        joined = (transitions.forward.to_scipy() + transitions.backward.to_scipy()).astype(np.float64)
        joined.sort_indices()
        self._base: sp.csr_array = joined
        self._grown: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.degree: np.ndarray = np.asarray(joined.sum(axis=1)).ravel()

    @property
    def catalogue(self) -> int:
        return len(self.degree)

    def row(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """(catalogue rows ascending, raw weights) of what followed or preceded `item`."""
        if item in self._grown:
            return self._grown[item]
        span = slice(self._base.indptr[item], self._base.indptr[item + 1])
        return self._base.indices[span], self._base.data[span]

    def observe(self, history: np.ndarray, item: int, weight: float = 1.0) -> None:
        """Count one new event in place: `item` after `history` (catalogue rows in time order, -1 = no item)."""
        for gap, before in enumerate(np.asarray(history)[: -self.window - 1 : -1], 1):
            if before >= 0:
                self._add(int(before), item, weight / gap)
                self._add(item, int(before), weight * self.config.backward / gap)

    def _add(self, a: int, b: int, weight: float) -> None:
        columns, weights = self.row(a)
        at = int(np.searchsorted(columns, b))
        if at < len(columns) and columns[at] == b:
            weights[at] += weight
        else:
            self._grown[a] = np.insert(columns, at, b), np.insert(weights, at, weight)
        self.degree[a] += weight

    def scores(self, histories: Sequence[np.ndarray]) -> sp.csr_array:
        """Raw mass of every supported item: CSR `[U,C]`, nothing excluded.

        The sum over the last items i of recency x counts[i] / degree[i]^power.
        """
        recency = np.asarray(self.config.recency)
        last = [known[: -len(recency) - 1 : -1] for known in (h[h >= 0] for h in map(np.asarray, histories))]
        items, owner = flatten(last)
        weights = np.concatenate([recency[: len(h)] for h in last]) if last else np.zeros(0)
        degree = self.degree[items]
        weights = np.divide(weights, degree**self.config.power, out=np.zeros(len(items)), where=degree > 0)
        shape, moved = (len(histories), self.catalogue), np.isin(items, list(self._grown))
        asked = sp.csr_array((weights[~moved], (owner[~moved], items[~moved])), shape)
        result = asked @ self._base
        if moved.any():
            there, slot = np.unique(items[moved], return_inverse=True)
            rows = [self._grown[int(i)] for i in there]
            indptr = np.cumsum([0, *(len(columns) for columns, _ in rows)])
            columns, values = (np.concatenate(part) for part in zip(*rows, strict=True))
            overflow = sp.csr_array((values, columns, indptr), (len(there), self.catalogue))
            result = (
                result + sp.csr_array((weights[moved], (owner[moved], slot)), (len(histories), len(there))) @ overflow
            )
        return result.tocsr()

    def support(self, histories: Sequence[np.ndarray], *, exclude: Sequence[np.ndarray] | None = None,
                allowed: np.ndarray | None = None) -> Support:  # fmt: skip
        """The distribution of each history over what it may be shown: `allowed` bool `[C]`, less each `exclude`.

        Renormalised after filtering. S is the widest support of the batch, rounded up to a power of two from 8, so
        that jitted programs meet few shapes.
        """
        scores = self.scores(histories)
        owner = np.repeat(np.arange(len(histories)), np.diff(scores.indptr))
        items, values = scores.indices, scores.data
        keep = values > 0
        if allowed is not None:
            keep &= allowed[items]
        if exclude is not None:
            gone, whose = flatten(exclude)
            keep &= ~np.isin(owner * self.catalogue + items, whose[gone >= 0] * self.catalogue + gone[gone >= 0])
        owner, items, values = owner[keep], items[keep], values[keep]
        total = np.bincount(owner, values, minlength=len(histories))
        order = np.lexsort((items, -values, owner))
        owner, items, values = owner[order], items[order], values[order]
        starts = np.searchsorted(owner, np.arange(len(histories)))
        place = np.arange(len(owner)) - starts[owner]
        short = place < self.config.width
        owner, items, values, place = owner[short], items[short], values[short], place[short]
        width = 1 << max(3, int(place.max(initial=0)).bit_length())
        rows = np.full((len(histories), width), -1, np.int32)
        mass = np.zeros((len(histories), width), np.float64)
        rows[owner, place], mass[owner, place] = items, values
        kept = mass.sum(1, keepdims=True)
        return Support(rows, np.divide(mass, kept, out=mass, where=kept > 0).astype(np.float32), total)

    def evidence(self, history: np.ndarray, item: int) -> list[tuple[int, float]]:
        """The history items behind the mass of `item` and the share of it that each brings, largest first.

        Empty when the memory says nothing about the item; otherwise the shares sum to 1.
        """
        known = np.asarray(history)
        shares: dict[int, float] = {}
        for recency, before in zip(self.config.recency, known[known >= 0][::-1], strict=False):
            columns, weights = self.row(int(before))
            at = int(np.searchsorted(columns, item))
            if at < len(columns) and columns[at] == item:
                share = recency * weights[at] / self.degree[before] ** self.config.power
                shares[int(before)] = shares.get(int(before), 0.0) + share
        whole = sum(shares.values())
        return sorted(((i, s / whole) for i, s in shares.items() if s > 0), key=lambda pair: (-pair[1], pair[0]))


@dataclass(frozen=True)
class Gate:
    """g = sigmoid(bias + length x log1p(history length) + mass x log(support mass)): the share given to the memory.

    `users` says how many validation users fitted it, `gain` how many nats a user it brought over the model alone.
    """

    bias: float
    length: float
    mass: float
    users: int = 0
    gain: float = 0.0
    step: int = -1  # of the parameters it was fitted beside
    dataset: str = ""  # digest of the dataset whose validation users fitted it

    def __call__(self, lengths: np.ndarray, total: np.ndarray) -> np.ndarray:
        """g float32 `[U]` for history lengths `[U]` and `Support.total` `[U]`; 0 where there is no support."""
        z = self.bias + self.length * np.log1p(lengths) + self.mass * np.log(np.maximum(total, 1e-12))
        g = np.minimum(1 / (1 + np.exp(-np.clip(z, -30, 30))), GATE_MOST)
        return np.where(total > 0, g, 0.0).astype(np.float32)

    def save(self, path: Path | str) -> None:
        write_json(path, {"schema": GATE.name, "version": GATE.version, **asdict(self)})


def load_gate(path: Path | str) -> Gate:
    """What `Gate.save` wrote. Raises InputError when the file is missing or is something else."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if (data.pop("schema"), data.pop("version")) != GATE:
            raise ValueError("another schema")
        return Gate(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not readable as a gate ({error}); delete it and it is fitted again") from None


def fit_gate(p_model: np.ndarray, p_memory: np.ndarray, lengths: np.ndarray, total: np.ndarray, *,
             step: int = -1, dataset: str = "", ridge: float = 1e-3) -> Gate:  # fmt: skip
    """The gate that maximises the mean of log((1-g) p_model + g p_memory) over validation users `[U]`.

    `p_model`, `p_memory`: probability that each part gives the user's target; users without support teach nothing.
    Starts at g = 1/2, ends where L-BFGS does; `ridge` pulls the slopes (not the bias) to 0. With nobody to learn
    from g stays near 0.
    """
    some = total > 0
    p_model, p_memory = np.maximum(p_model[some], 1e-12), p_memory[some]
    if not some.any():
        return Gate(-30.0, 0.0, 0.0, 0, 0.0, step, dataset)
    raw = np.stack([np.log1p(lengths[some]), np.log(total[some])], 1)
    centre, scale = raw.mean(0), np.maximum(raw.std(0), 1e-6)
    features = np.concatenate([np.ones((len(raw), 1)), (raw - centre) / scale], 1)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        g = 1 / (1 + np.exp(-np.clip(features @ w, -30, 30)))
        mixed = (1 - g) * p_model + g * p_memory
        slope = -((p_memory - p_model) * g * (1 - g) / mixed) @ features / len(g)
        pull = np.array([0.0, ridge, ridge])
        return float(-np.log(mixed).mean() + (pull * w * w).sum()), slope + 2 * pull * w

    best = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(-15, 15)] * 3).x
    g = 1 / (1 + np.exp(-np.clip(features @ best, -30, 30)))
    gain = float(np.mean(np.log((1 - g) * p_model + g * p_memory) - np.log(p_model)))
    slopes = best[1:] / scale
    bias = float(best[0] - slopes @ centre)
    return Gate(bias, float(slopes[0]), float(slopes[1]), int(some.sum()), gain, step, dataset)
