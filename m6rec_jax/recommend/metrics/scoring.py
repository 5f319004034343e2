"""Measures of scores, of clicks or of list places: AUC, GAUC, log-loss, calibration, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Chance that a positive row scores above a negative one, a tie counting half; NaN when one of the two is missing."""
    positive = np.asarray(labels, bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((rankdata(scores)[positive].sum() - n * (n + 1) / 2) / (n * m))


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """Mean over users of the AUC among their own rows, weighted by their number of rows (DIN's weight: impressions).

    Users whose rows are all positive or all negative are left out; NaN when that leaves nobody.
    """
    per, weight = _user_auc(labels, scores, users)
    return float(per @ weight / weight.sum()) if weight.sum() else float("nan")


def _user_auc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC among the rows of each distinct user and its weight, 0 where there is none."""
    _, owner = np.unique(users, return_inverse=True)
    positive = np.asarray(labels, bool)
    # Ranks over (user, score) less those of the users before are ranks within the user.
    _, dense = np.unique(scores, return_inverse=True)
    many = np.bincount(owner)
    inside = rankdata(owner * (int(dense.max(initial=0)) + 1.0) + dense) - (np.cumsum(many) - many)[owner]
    n = np.bincount(owner, positive)
    m = many - n
    usable = (n > 0) & (m > 0)
    area = np.bincount(owner, inside * positive) - n * (n + 1) / 2
    return np.divide(area, n * m, out=np.zeros(len(many)), where=usable), np.where(usable, many, 0.0)


def log_loss(labels: np.ndarray, chances: np.ndarray) -> float:
    """Mean of -ln of the chance given to what happened, in nats; chances are kept 1e-15 away from 0 and 1."""
    return float(_losses(labels, chances).mean())


def _losses(labels: np.ndarray, chances: np.ndarray) -> np.ndarray:
    p = np.clip(np.asarray(chances, np.float64), 1e-15, 1 - 1e-15)
    return -np.where(np.asarray(labels, bool), np.log(p), np.log1p(-p))


def _bins(chances: np.ndarray, bins: int) -> np.ndarray:
    """Number of the bin of each chance: bins of equal size, equal chances together."""
    edges = np.quantile(chances, np.linspace(0, 1, bins + 1)[1:-1])
    return np.searchsorted(edges, chances)


def reliability(labels: np.ndarray, chances: np.ndarray, bins: int = 10) -> list[dict[str, Any]]:
    """Chance given against share that came true, in `bins` bins of equal size; equal chances stay together.

    One dict a bin: `p` mean chance, `hit` share, `low` and `high` its 95 % interval (Wilson), `n` rows.
    """
    labels, chances = np.asarray(labels, np.float64), np.asarray(chances, np.float64)
    if not len(chances):
        return []
    at = _bins(chances, bins)
    many = np.bincount(at)
    made = []
    for b in np.flatnonzero(many):
        n, p, hit = int(many[b]), float(chances[at == b].mean()), float(labels[at == b].mean())
        z2 = 1.96**2 / n
        centre, half = (hit + z2 / 2) / (1 + z2), 1.96 * np.sqrt(hit * (1 - hit) / n + z2 / (4 * n)) / (1 + z2)
        low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
        made.append({"p": p, "hit": hit, "low": low, "high": high, "n": n})
    return made


def ece(labels: np.ndarray, chances: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: mean over rows of |chance given - share that came true| of their bin, see `reliability`."""
    parts = reliability(labels, chances, bins)
    return float(sum(b["n"] * abs(b["p"] - b["hit"]) for b in parts) / max(sum(b["n"] for b in parts), 1))


def scoring(labels: np.ndarray, chances: np.ndarray, users: np.ndarray | None = None, *, seed: int = 0,
            draws: int = 500) -> dict[str, Any]:  # fmt: skip
    """AUC, log-loss, ECE, and GAUC where `users` are given: `{metrics, ci95}`; what cannot be told is left out.

    95 % intervals by Poisson bootstrap over users, or over rows without users; the bins of the ECE stay as they are.
    """
    labels, chances = np.asarray(labels, bool), np.asarray(chances, np.float64)
    units, owner = np.unique(np.arange(len(labels)) if users is None else users, return_inverse=True)
    values = {"auc": auc(labels, chances), "log_loss": log_loss(labels, chances), "ece": ece(labels, chances)}
    per, weight = _user_auc(labels, chances, owner)
    if users is not None:
        values["gauc"] = gauc(labels, chances, users)
    losses, at = _losses(labels, chances), _bins(chances, 10)
    order = np.argsort(chances, kind="stable")
    _, first = np.unique(chances[order], return_index=True)
    rng, drawn = np.random.default_rng(seed), {name: [] for name in values}
    for _ in range(draws):
        times = rng.poisson(1.0, len(units)).astype(np.float64)
        w = times[owner]
        total = w.sum()
        if total == 0:
            continue
        up, down = (np.add.reduceat((w * side)[order], first) for side in (labels, ~labels))
        if up.sum() and down.sum():
            drawn["auc"].append(up @ (np.cumsum(down) - down / 2) / (up.sum() * down.sum()))
        drawn["log_loss"].append(w @ losses / total)
        drawn["ece"].append(np.abs(np.bincount(at, w * (chances - labels))).sum() / total)
        if users is not None and (times @ weight) > 0:
            drawn["gauc"].append((times * weight) @ per / (times @ weight))
    known = {name: value for name, value in values.items() if np.isfinite(value)}
    limits = {name: np.quantile(drawn[name], (0.025, 0.975)) for name in known if drawn[name]}
    return {"metrics": known, "ci95": {name: (float(a), float(b)) for name, (a, b) in limits.items()}}
