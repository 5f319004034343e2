"""Settings of what makes a model small: a teacher, and weights that go."""

from __future__ import annotations

from dataclasses import dataclass

from m6rec_jax.config.checks import above_zero, at_least, below_one, check


@dataclass(frozen=True)
class DistillConfig:
    """What is learnt from a teacher, with --distill-from (training/distill).

    Args:
        weight: of the relation loss beside the losses of the tasks.
        heads: relation heads, into which queries, keys and values of both models are cut; 0 = heads of this model.
        teacher_layer: layer of the teacher that is looked at, counted from 1; 0 = its last.
        student_layer: layer of this model that is to be like it; 0 = the last.
    """

    weight: float = 1.0
    heads: int = 0
    teacher_layer: int = 0
    student_layer: int = 0

    def __post_init__(self) -> None:
        above_zero("distill", self, "weight")
        at_least(0, "distill", self, "heads", "teacher_layer", "student_layer")


@dataclass(frozen=True)
class PruneConfig:
    """Gradual magnitude pruning of the layers' matrices (training/prune).

    Args:
        sparsity: share of each matrix that is zero in the end; 0 = nothing is pruned.
        begin: step after which weights begin to go.
        end: step by which `sparsity` is reached; at most train.steps.
        every: steps from one share to the next.
        tables: prune the token tables too, and the matrix between their rows and the width.
    """

    sparsity: float = 0.0
    begin: int = 0
    end: int = 1000
    every: int = 50
    tables: bool = False

    def __post_init__(self) -> None:
        below_one("prune", self, "sparsity")
        at_least(0, "prune", self, "begin", "end")
        above_zero("prune", self, "every")
        check(self.begin <= self.end, f"prune.begin={self.begin}: must be at most prune.end={self.end}")
