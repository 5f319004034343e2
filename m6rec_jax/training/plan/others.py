"""What a step runs beside its model: the generator of replaced-token detection, and a teacher."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, NamedTuple

import jax

from m6rec_jax.config import Config, DistillConfig, ModelConfig
from m6rec_jax.data.tasks import Task, tasks
from m6rec_jax.model.load import Blueprint
from m6rec_jax.objectives.generator import Replacing
from m6rec_jax.training.beside import Beside, replacing_of
from m6rec_jax.training.distill import Lesson, check_lesson, lesson_of


class Others(NamedTuple):
    """What is trained or asked beside the model, as a step takes it."""

    replacing: Replacing | None = None
    lesson: Lesson | None = None

    @property
    def generator(self) -> Blueprint | None:
        return None if self.replacing is None else self.replacing.generator

    @property
    def teacher(self) -> Blueprint | None:
        """Up to the layer that is looked at."""
        return None if self.lesson is None else self.lesson.blueprint


@cache
def _known() -> dict[str, Task]:
    return tasks()


def others_of(
    config: Config,
    blueprint: Blueprint,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    teacher: ModelConfig | None,
) -> Others:
    """Of a configuration whose mixture may have a task of replaced-token detection, and of a teacher's model.

    Tasks that a dataset alone has are not known here; none of them replaces. Raises InputError where something does not fit.
    """
    known = _known()
    pools = [known[name] for name, share in config.mixture.tasks.items() if share > 0 and name in known]
    replacing = replacing_of(config, blueprint, pools, mesh)
    if teacher is None:
        return Others(replacing)
    check_lesson("--teacher: ", teacher, config, mesh)
    return Others(replacing, lesson_of(dataclasses.replace(blueprint, config=teacher), config.distill))


def replaced_share(config: Config) -> float:
    """Share of the target positions at which the generator writes."""
    known, asked = _known(), config.mixture.tasks
    of = sum(share for name, share in asked.items() if name in known and known[name].objective == "replaced")
    return config.data.replace_rate * of / sum(asked.values())


def unsaid(config: Config, others: Others) -> str:
    """A line that says what is trained, or may be, and is not in this plan; empty where all is."""
    lines = []
    if others.lesson is None and config.distill != DistillConfig():
        lines.append("without a teacher, which only a run has: name its configuration with --teacher to count it")
    if config.model.vectors:
        lines.append("without the products of retrieval, whose pairs are known of a dataset alone")
    return "; ".join(lines)


def shapes_of(others: Others, width: int, optimizer: Any, placed: Any) -> tuple[Any, Any]:
    """Shapes of what the state holds beside the model (`beside`), and of the teacher's parameters; None of what there is not."""
    made: list[Any] = [None, None]
    zero, no = jax.ShapeDtypeStruct((), "float32"), jax.sharding.PartitionSpec()
    if others.generator is not None:
        generator = jax.tree.map(
            lambda x, p: placed(x.shape, x.dtype, p), others.generator.shapes(), others.generator.specs()
        )
        params = {"generator": generator, "head": {"gain": placed((width,), "float32", no), "bias": zero}}
        made[0] = Beside(params, {name: jax.eval_shape(optimizer.init, part) for name, part in params.items()}, zero)
    if others.teacher is not None:
        made[1] = jax.tree.map(
            lambda x, p: placed(x.shape, x.dtype, p), others.teacher.shapes(), others.teacher.specs()
        )
    return made[0], made[1]
