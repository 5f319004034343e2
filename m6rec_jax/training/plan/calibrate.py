"""The time model against runs that others have published. Nothing of the model is fitted to them.

Rows are compared by tokens a second and chip, which needs no agreement on how FLOPs are counted.
"""

from __future__ import annotations

import statistics
from functools import cache
from typing import NamedTuple

from m6rec_jax.training.plan.clock import RECOMPUTED, Work, spent
from m6rec_jax.training.plan.hardware import Place, place_of

FULL = RECOMPUTED["full"]
PROJECTIONS_KEPT = frozenset({"gate", "up", "attention"})  # q, k, v and the output projection are saved
QUERIES_KEPT = frozenset({"output", "gate", "up", "attention"})  # q, k, v are saved

MAXTEXT = "maxtext docs/reference/models/tiering.md and the recipes it links to"
FUJI = "axlearn experiments/text/gpt/fuji.py"
RUN_MIXTRAL = "maxtext tests/end_to_end/tpu/mixtral/Run_Mixtral.md"
# A token of Mixtral-8x7B at 4,096 as MaxText counts: FLOP/s over tokens a second of one log.
MIXTRAL_FLOPS = 302.311e12 / 3645.203


class Published(NamedTuple):
    """A run that somebody measured: tokens a second and chip, and what it ran."""

    name: str
    topology: str
    speed: float
    work: Work
    source: str
    assumed: str = ""


def _llama2_70b(**of: object) -> Work:
    return Work(80, 8192, 64, 8, 128, 28672, 32000, 4096, **of)  # type: ignore[arg-type]


def _llama3(layers: int, width: int, heads: int, ffn: int, **of: object) -> Work:
    return Work(layers, width, heads, 8, 128, ffn, 128256, 8192, **of)  # type: ignore[arg-type]


def _mixtral(**of: object) -> Work:
    return Work(32, 4096, 32, 8, 128, 14336, 32000, 4096, experts=8, active=2, **of)  # type: ignore[arg-type]


def rows() -> list[Published]:
    """The runs, in the order of their sources. `tokens` is rows a device x length x chips, as the recipe says."""
    v6, v5e = "tpu:v6e:16x16", "tpu:v5e:16x16"
    pod = {"chips": 256, "fsdp": 256}
    pods = {"chips": 1024, "fsdp": 256, "data": 4, "network": True}
    eight, big = 256 * 8192, 256 * 4096
    large, later = {"blocks": (1024, 2048)}, {"blocks": (2048, 2048), "fused": True}  # of splash, as recipes set it
    rings = {"chips": 256, "fsdp": 64, "rings": True}
    dropped = {"places": 1.25, "one_hot": True, "recomputed": PROJECTIONS_KEPT, "blocks": (2048, 2048)}
    full16 = {"recomputed": FULL, "gradient_bytes": 2}  # weights, and so their gradients, in bfloat16
    fuji7 = Work(32, 4096, 32, 32, 128, 11008, 32768, 4096, 4 * 2**20, 256, 8, data=32, recomputed=PROJECTIONS_KEPT)
    fuji7_tpu = Work(32, 4096, 32, 32, 128, 11008, 32768, 4096, 4 * 2**20, **pods, recomputed=RECOMPUTED["dots"])  # type: ignore[arg-type]
    larger = Work(56, 6144, 48, 8, 128, 16384, 32768, 4096, 8 * big, **rings, expert=4, experts=8, active=2, **dropped)  # type: ignore[arg-type]
    return [
        Published("Llama2-70B", v6, 900, _llama2_70b(tokens=2 * big, **pod, **large, recomputed=QUERIES_KEPT), MAXTEXT),
        Published("Llama3.1-8B", v6, 7207, _llama3(32, 4096, 32, 14336, tokens=4 * eight, **pod, **later, recomputed=PROJECTIONS_KEPT), MAXTEXT),
        Published("Llama3.1-70B", v6, 960, _llama3(80, 8192, 64, 28672, tokens=4 * eight, **pod, **later, recomputed=QUERIES_KEPT), MAXTEXT),
        Published("Llama3.1-405B", v6, 123, _llama3(126, 16384, 128, 53248, tokens=eight, **rings, tensor=4, **large, recomputed=PROJECTIONS_KEPT), MAXTEXT, "its recipe, which is of two pods"),
        Published("Mixtral-8x7B", v6, 3899, _mixtral(tokens=12 * big, **pod, **dropped), MAXTEXT),
        Published("Mixtral-8x22B", v6, 1326, larger, MAXTEXT),
        Published("Llama2-70B", "tpu:v5p:8x8x8", 692, _llama2_70b(tokens=512 * 4 * 4096, chips=512, fsdp=512, recomputed=PROJECTIONS_KEPT), MAXTEXT, "rows and policy of its recipe for 64 chips"),
        Published("Mixtral-8x7B", "tpu:v5p:4x4x8", 2909, _mixtral(tokens=128 * 36 * 4096, chips=128, fsdp=128, **full16), MAXTEXT, "rows of its recipe for 64 chips"),
        Published("Mixtral-8x7B", "tpu:v5p:4x4x4", 251.94e12 / MIXTRAL_FLOPS, _mixtral(tokens=64 * 36 * 4096, chips=64, fsdp=64, **full16), RUN_MIXTRAL, "rows of its recipe"),
        Published("fuji-7B v2, 4 pods", v5e, 4 * 2**20 / 1024 / 2.21, fuji7_tpu, FUJI),
        Published("fuji-70B v2, 4 pods", v5e, 4096 / 14.3736, _llama2_70b(tokens=1024 * 4096, **pods, recomputed=RECOMPUTED["dots"]), FUJI, "a row a chip"),
        Published("fuji-7B v2, 32 machines", "gpu:h100:32x8", 4 * 2**20 / 256 / 1.78, fuji7, FUJI, "default policy: projections saved"),
    ]  # fmt: skip


LACKING = {
    "MaxText custom 900B, 700B and 10T models": "sizes not published",
    "Levanter 345M to 65B on v3-256": "rows, policy and sizes not stated, memory of v3 shared by two cores",
    "marin mixture of experts on 8 B200": "no figures of B200 here",
    "v5p example run at 29.4 %": "an example of a log, its model not stated",
}


class Compared(NamedTuple):
    """A published run beside its prediction; `error`: predicted over published, less one."""

    run: Published
    predicted: float
    mfu: float
    bound: str
    error: float


def speed(work: Work, place: Place) -> tuple[float, float, str]:
    """Tokens a second and chip, MFU and what bounds it."""
    took = spent([work], place)
    return work.tokens / work.chips / took.step, work.flops() / (took.step * place.chip.peak), took.bound


@cache
def compared() -> tuple[Compared, ...]:
    """Every run, bad ones too."""
    made = []
    for run in rows():
        told, mfu, bound = speed(run.work, place_of(run.topology))
        made.append(Compared(run, told, mfu, bound, told / run.speed - 1))
    return tuple(made)


def error() -> float:
    """Median of the absolute relative errors: what `mfu_error` is."""
    return statistics.median(abs(one.error) for one in compared())


def told() -> str:
    """The calibration as a table, and the rows that could not be reproduced."""
    lines = [f"{'run':<26}{'topology':<16}{'published':>10}{'predicted':>11}{'error':>9}  {'bound':<12}assumed"]
    for one in compared():
        run = one.run
        lines.append(f"{run.name:<26}{run.topology:<16}{run.speed:>10,.0f}{one.predicted:>11,.0f}{one.error:>+9.1%}  {one.bound:<12}{run.assumed}")  # fmt: skip
    lines.append(
        f"tokens a second and chip; median absolute error {error():.1%} over {len(compared())} runs, none fitted"
    )
    lines += [f"not reproduced: {name}: {why}" for name, why in LACKING.items()]
    return "\n".join(lines)
