"""Settings of the device mesh."""

from __future__ import annotations

from dataclasses import dataclass, field

from m6rec_jax.config.checks import check


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left.

    Args:
        data: replicas of the parameters, each with its own rows.
        fsdp: rows and parameters sharded together.
        tensor: heads, feed-forward columns and vocabulary rows sharded.
        sequence: positions of a row sharded.
        expert: experts of the feed-forward layers sharded.
        stage: layers sharded, each device holding a run of them (a pipeline).
        dcn: of several slices (TPU slices, or machines of GPUs, joined by a slower network), over how many an axis reaches:
            {data: 4} puts four groups of replicas on four slices. The factors multiply to the number of slices; an axis
            that is not named stays within a slice.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1
    expert: int = 1
    stage: int = 1
    dcn: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        axes = [name for name in self.__dataclass_fields__ if name != "dcn"]
        for name in axes:
            size = getattr(self, name)
            check(size > 0 or size == -1, f"mesh.{name}={size}: must be above 0, or -1 for all devices that are left")
        for name, factor in self.dcn.items():
            check(name in axes, f"mesh.dcn.{name}={factor}: unknown axis; known: {', '.join(axes)}")
            check(factor > 0, f"mesh.dcn.{name}={factor}: must be above 0")
            size = getattr(self, name)
            check(size == -1 or size % factor == 0, f"mesh.dcn.{name}={factor} does not divide mesh.{name}={size}")
