"""How far to trust the memory beside the model: one number a user, fitted on validation users (DESIGN section 6)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from m6rec_jax.artifacts.atomic import write_json
from m6rec_jax.artifacts.schemas import GATE
from m6rec_jax.decoding.beam import GATE_MOST
from m6rec_jax.errors import InputError

GATE_FILE = "gate.json"
LEAST_P = 1e-12  # what a target is given at least while a gate is fitted
MOVES = (-4.0, -3.0, *np.arange(-2.0, 6.01, 0.5).tolist())
ERRORS = 1.0  # standard errors that a smaller move may seem worse than the best
SHUT = -30.0  # a bias that nothing comes up against


@dataclass(frozen=True)
class Gate:
    """g = sigmoid(bias + length x log1p(history length) + mass x log(support mass)): the share given to the memory.

    `temperature` divides the model's logits beside the memory (Guo et al. 2017): a model that is surer than it is right
    would leave the memory no say where both are in doubt. `users` says how many validation users fitted it, `gain` how
    many nats a user the likeliest gate brought over the model alone, `moved` how far the bias was
    then moved for the sake of the ranking.
    """

    bias: float
    length: float
    mass: float
    users: int = 0
    gain: float = 0.0
    moved: float = 0.0
    temperature: float = 1.0
    step: int = -1  # of the parameters it was fitted beside
    dataset: str = ""  # digest of the dataset whose validation users fitted it

    def __call__(self, lengths: np.ndarray, total: np.ndarray) -> np.ndarray:
        """g float32 `[U]` for history lengths `[U]` and `Support.total` `[U]`; 0 where there is no support."""
        z = self.bias + self.length * np.log1p(lengths) + self.mass * np.log(np.maximum(total, 1e-12))
        g = np.minimum(1 / (1 + np.exp(-np.clip(z, -30, 30))), GATE_MOST)
        return np.where(total > 0, g, 0.0).astype(np.float32)

    def heat(self, g: np.ndarray) -> np.ndarray:
        """The temperature of each user `[U]`: 1 where the memory says nothing, so that the model's own list stands."""
        return np.where(g > 0, self.temperature, 1.0).astype(np.float32)

    def shut(self) -> Gate:
        """This gate with the memory left out for everybody."""
        return replace(self, bias=SHUT, length=0.0, mass=0.0, moved=SHUT - self.bias)

    def save(self, path: Path | str) -> None:
        write_json(path, {"schema": GATE.name, "version": GATE.version, **asdict(self)})


def load_gate(path: Path | str) -> Gate | None:
    """What `Gate.save` wrote; None for that of an earlier version, which is to be fitted again.

    Raises InputError when the file is missing or is something else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        schema, version = data.pop("schema"), data.pop("version")
        if schema != GATE.name or version > GATE.version:
            raise ValueError(f"{schema} {version} in place of {GATE.name} {GATE.version}")
        return Gate(**data) if version == GATE.version else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not readable as a gate ({error}); delete it and it is fitted again") from None


def tempered_gate(logp: np.ndarray, temperatures: Sequence[float], p_memory: np.ndarray, lengths: np.ndarray,
                  total: np.ndarray, *, step: int = -1, dataset: str = "") -> Gate:  # fmt: skip
    """`likeliest_gate` at the temperature whose mixture is the likeliest.

    `logp [U, n]`: the model's log-probability of each user's target at each of n `temperatures`, the first of which is 1.
    """
    some = total > 0
    best, kept = -np.inf, Gate(SHUT, 0.0, 0.0, step=step, dataset=dataset)
    for at, temperature in enumerate(temperatures if some.any() else ()):
        p = np.exp(logp[:, at].astype(np.float64))
        gate = likeliest_gate(p, p_memory, lengths, total, step=step, dataset=dataset)
        g = gate(lengths, total)
        likely = float(np.log(np.maximum((1 - g) * p + g * p_memory, LEAST_P))[some].mean())
        if likely > best:
            before = float(np.maximum(logp[some, 0], np.log(LEAST_P)).mean())
            best, kept = likely, replace(gate, temperature=float(temperature), gain=likely - before)
    return kept


def likeliest_gate(p_model: np.ndarray, p_memory: np.ndarray, lengths: np.ndarray, total: np.ndarray, *,
                   step: int = -1, dataset: str = "", ridge: float = 1e-3) -> Gate:  # fmt: skip
    """The gate that maximises the mean of log((1-g) p_model + g p_memory) over validation users `[U]`.

    `p_model`, `p_memory`: probability that each part gives the user's target; users without support teach nothing.
    Starts at g = 1/2, ends where L-BFGS does; `ridge` pulls the slopes (not the bias) to 0. With nobody to learn
    from g stays near 0.
    """
    some = total > 0
    p_model, p_memory = np.maximum(p_model[some], LEAST_P), p_memory[some]
    if not some.any():
        return Gate(SHUT, 0.0, 0.0, step=step, dataset=dataset)
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
    """The gate whose bias, moved by one of `MOVES`, or which is shut, ranks the targets of U users well: by mean NDCG@k.

    Likelihood punishes a heavy memory for every user whose target it has never seen; a ranking loses nothing there, the
    item would not have been shown anyway. So likelihood decides the slopes and ranking the height, but few users rank
    by luck as well: of the moves that are not worse than the best by more than `ERRORS` standard errors of the difference
    the smallest is taken (the 1 SE rule: Breiman et al. 1984, section 3.4.3). Of each user's candidates `[U, n]`: both
    log-probabilities (-inf where a part says nothing) and which is the target.
    """
    if not len(lengths):
        return gate
    moves = [*(replace(gate, bias=gate.bias + move, moved=move) for move in sorted(MOVES, key=abs)), gate.shut()]
    ndcg = np.zeros((len(moves), len(lengths)))
    for at, moved in enumerate(moves):
        g = moved(lengths, total)[:, None]
        with np.errstate(divide="ignore"):
            scores = np.logaddexp(np.log1p(-g) + model_logp, np.log(g) + memory_logp)
        of_target = np.where(is_target, scores, -np.inf).max(1)
        place = (scores > of_target[:, None]).sum(1)
        ndcg[at] = np.where(np.isfinite(of_target) & (place < k), 1 / np.log2(place + 2), 0)
    lost = ndcg[ndcg.mean(1).argmax()] - ndcg
    enough = lost.mean(1) <= ERRORS * lost.std(1) / len(lengths) ** 0.5 + 1e-12
    return moves[int(enough.argmax())]
