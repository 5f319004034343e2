"""How far to trust the memory beside the model: one number a user, fitted on validation users (DESIGN section 6)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.schemas import GATE
from m6rec_jax.decoding.beam import GATE_MOST
from m6rec_jax.errors import InputError

GATE_FILE = "gate.json"
MOVES = tuple(np.arange(-2.0, 6.01, 0.5).tolist())


@dataclass(frozen=True)
class Gate:
    """g = sigmoid(bias + length x log1p(history length) + mass x log(support mass)): the share given to the memory.

    `users` says how many validation users fitted it, `gain` how many nats a user the likeliest gate brought over the model
    alone, `moved` how far the bias was then moved for the sake of the ranking.
    """

    bias: float
    length: float
    mass: float
    users: int = 0
    gain: float = 0.0
    moved: float = 0.0
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


def likeliest_gate(p_model: np.ndarray, p_memory: np.ndarray, lengths: np.ndarray, total: np.ndarray, *,
                   step: int = -1, dataset: str = "", ridge: float = 1e-3) -> Gate:  # fmt: skip
    """The gate that maximises the mean of log((1-g) p_model + g p_memory) over validation users `[U]`.

    `p_model`, `p_memory`: probability that each part gives the user's target; users without support teach nothing.
    Starts at g = 1/2, ends where L-BFGS does; `ridge` pulls the slopes (not the bias) to 0. With nobody to learn
    from g stays near 0.
    """
    some = total > 0
    p_model, p_memory = np.maximum(p_model[some], 1e-12), p_memory[some]
    if not some.any():
        return Gate(-30.0, 0.0, 0.0, step=step, dataset=dataset)
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
    return Gate(bias, *map(float, slopes), users=int(some.sum()), gain=gain, step=step, dataset=dataset)


def move_gate(gate: Gate, model_logp: np.ndarray, memory_logp: np.ndarray, is_target: np.ndarray, lengths: np.ndarray,
              total: np.ndarray, k: int = 10) -> Gate:  # fmt: skip
    """The gate whose bias, moved by one of `MOVES`, ranks the targets of U users best: highest mean NDCG@k.

    Likelihood punishes a heavy memory for every user whose target it has never seen; a ranking loses nothing there, the
    item would not have been shown anyway. So likelihood decides the slopes and ranking the height. Of each user's
    candidates `[U, n]`: both log-probabilities (-inf where a part says nothing) and which is the target. Of moves that do
    equally well the smallest is taken.
    """
    best, kept = -1.0, gate
    for move in sorted(MOVES, key=abs):
        moved = replace(gate, bias=gate.bias + move, moved=move)
        g = moved(lengths, total)[:, None]
        with np.errstate(divide="ignore"):
            scores = np.logaddexp(np.log1p(-g) + model_logp, np.log(g) + memory_logp)
        of_target = np.where(is_target, scores, -np.inf).max(1)
        place = (scores > of_target[:, None]).sum(1)
        reached = np.isfinite(of_target) & (place < k)
        ndcg = float(np.where(reached, 1 / np.log2(place + 2), 0).mean()) if len(place) else 0.0
        if ndcg > best + 1e-9:
            best, kept = ndcg, moved
    return kept
