"""A larger run as the teacher of a smaller one: relations between the tokens of a text (MiniLM v2, Wang et al. 2021).

What is compared is how alike the queries of two tokens are, their keys, and their values, as a distribution over the
tokens that one sees. That has no width, so the student's may be another. Vectors are taken before rotation: positions
turn those of both models by what is known, and nothing is learnt from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jaxtyping import Array, Float, Int

from m6rec_jax.artifacts.checkpoints import load_params, manifest, pick_step
from m6rec_jax.artifacts.manifest import file_digest
from m6rec_jax.artifacts.run import RUN_FILE, Run, Taught, read_run
from m6rec_jax.config import Config, DistillConfig, ModelConfig
from m6rec_jax.data.arrays import read_arrays
from m6rec_jax.data.dataset import Dataset
from m6rec_jax.errors import InputError
from m6rec_jax.model import sharding
from m6rec_jax.model.attention import NEVER
from m6rec_jax.model.block import Block
from m6rec_jax.model.load import Blueprint
from m6rec_jax.model.transformer import Transformer, View
from m6rec_jax.progress import note
from m6rec_jax.training.sharding import check_fit

ROWS = 8  # whose relations exist at one time
Vectors = tuple[Float[Array, "B T K G h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]


@dataclass(frozen=True)
class Lesson:
    """What a student learns from: the teacher's model up to the layer that is looked at, and the settings."""

    blueprint: Blueprint
    config: DistillConfig

    def vectors(self, params: Any, batch: dict[str, Array], items: Any) -> Vectors:
        """Queries, keys and values of the teacher's layer for a `[B, T]` batch; no gradient goes there."""
        model = self.blueprint.bind(params)
        view = View(batch["positions"], batch["k_start"], batch["k_end"])
        layers = self.blueprint.config.layers
        *_, vectors = model.observed(batch["tokens"], batch["item_rows"], view, items, None, layers - 1)
        return jax.lax.stop_gradient(vectors)

    def layer_of(self, student: Transformer) -> int:
        """The layer of the student, from 0, that is to be like the teacher's."""
        return (self.config.student_layer or student.config.layers) - 1

    def heads_of(self, student: Transformer) -> int:
        return self.config.heads or student.config.heads


def relation_loss(
    student: Vectors, teacher: Vectors, k_start: Int[Array, "B T"], k_end: Int[Array, "B T"], heads: int
) -> Float[Array, ""]:
    """Sum over tokens of KL(teacher || student) of three relations (queries, keys, values), mean over relation heads.

    A token's relations are with the tokens that it sees; padding has none. Each model's vectors of all its heads are
    cut into `heads` of equal size, and products scaled by the root of that size.
    """

    def of_row(row: tuple[Vectors, Vectors, Array, Array]) -> Array:
        student, teacher, k_start, k_end = row
        s = jnp.arange(len(k_start))
        seen = (s >= k_start[:, None]) & (s < k_end[:, None])

        def log_relation(x: Array) -> Array:
            x = x.reshape(len(x), heads, -1)
            scores = jnp.einsum("trd,srd->rts", x, x, preferred_element_type=jnp.float32) * x.shape[-1] ** -0.5
            return jax.nn.log_softmax(jnp.where(seen, scores, NEVER), axis=-1)

        total = jnp.zeros(())
        for ours, theirs in zip(student, teacher, strict=True):
            p, q = log_relation(theirs), log_relation(ours)
            total += jnp.sum(jnp.where(seen, jnp.exp(p) * (p - q), 0)) / heads
        return total

    def local(*arrays: Any) -> Array:
        return sharding.psum(jnp.sum(jax.lax.map(jax.checkpoint(of_row), arrays, batch_size=ROWS)), sharding.BATCH)

    row = ("batch", None)
    vectors = (("batch", *(None,) * 4), ("batch", *(None,) * 3), ("batch", *(None,) * 3))
    return sharding.per_shard(local, (vectors, vectors, row, row), (), check=False)(student, teacher, k_start, k_end)


def lesson_of(teacher: Blueprint, config: DistillConfig) -> Lesson:
    """What is learnt from a whole teacher."""
    layers = config.teacher_layer or teacher.config.layers
    return Lesson(replace(teacher, config=replace(teacher.config, layers=layers)), config)


@dataclass(frozen=True)
class Teacher:
    """A run that teaches: which, of which step, with which parameters (`taught`, as run.json keeps it)."""

    run: Path
    blueprint: Blueprint  # whole
    taught: Taught
    config: DistillConfig

    @property
    def layers(self) -> int:
        return self.config.teacher_layer or self.blueprint.config.layers

    @property
    def lesson(self) -> Lesson:
        return lesson_of(self.blueprint, self.config)

    def load(self, mesh: jax.sharding.Mesh) -> Any:
        """Its parameters on the mesh, less the layers above the one that is looked at; InputError when they are damaged."""
        place = lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, p))  # noqa: E731
        wanted = jax.tree.map(place, self.blueprint.shapes(), self.blueprint.specs())
        step, params = load_params(self.run, self.taught.step, wanted)
        if step != self.taught.step:
            raise InputError(f"--distill-from {self.run}: step {self.taught.step} is damaged; take it from a copy")
        if self.layers < self.blueprint.config.layer_sets:
            cut = lambda name, x: sharding.place(x, None, *Block.AXES[name][1:])[: self.layers]  # noqa: E731
            with jax.set_mesh(mesh):
                block = jax.jit(lambda block: {name: cut(name, x) for name, x in block.items()})(params["block"])
            params = {**params, "block": block}
        note(f"--distill-from {self.run}: step {step}, layer {self.layers} of {self.blueprint.config.layers}")
        return params


def open_teacher(
    run: Path, datasets: Sequence[Dataset], blueprint: Blueprint, config: Config, mesh: jax.sharding.Mesh,
    before: Taught | None,
) -> Teacher:  # fmt: skip
    """The teacher at `run` for a student `blueprint`; `before`: what the run that is taken up was taught by.

    Raises InputError, before anything is compiled, when ids do not mean the same to both (it names what differs), the
    models cannot be compared, or the teacher is not the one of before.
    """
    said, record = f"--distill-from {run}: ", read_run(run)
    theirs = Blueprint(record.config.model, record.vocab, record.content_width, record.more_widths)
    _check_same_ids(said, record, datasets, blueprint)
    check_lesson(said, theirs.config, config, mesh)
    step = pick_step(run, before.step if before else "best")
    taught = Taught(str(run), step, _digest(run, step))
    if before and before.digest != taught.digest:
        raise InputError(f"{said}step {step} holds other parameters than those that this run was taught by ({before.run}); name that run")  # fmt: skip
    return Teacher(run, theirs, taught, config.distill)


def check_lesson(said: str, theirs: ModelConfig, config: Config, mesh: jax.sharding.Mesh) -> None:
    """Raises InputError, which begins with `said`, where a model cannot teach the configured one on the mesh."""
    for what, value, layers in (
        ("teacher_layer", config.distill.teacher_layer, theirs.layers),
        ("student_layer", config.distill.student_layer, config.model.layers),
    ):
        if value > layers:
            raise InputError(f"{said}distill.{what}={value}, and that model has {layers} layers; 0 is the last")
    heads = config.distill.heads or config.model.heads
    for whose, model in (("the teacher", theirs), ("this model", config.model)):
        for size in (model.width, model.n_kv * model.head_dim):
            if size % heads:
                raise InputError(f"{said}distill.heads={heads} does not divide the {size} numbers of {whose}'s queries or keys of a token; set --distill.heads to a divisor of both models'")  # fmt: skip
    if mesh.shape["stage"] > 1:
        raise InputError(f"{said}mesh.stage={mesh.shape['stage']}: layers dealt over stages are not looked into; set mesh.stage=1")  # fmt: skip
    check_fit(mesh, replace(config, model=_placed(theirs, config.model)))


def teacher_of(
    run: Path, source: Path | None, datasets: Sequence[Dataset], blueprint: Blueprint, config: Config,
    mesh: jax.sharding.Mesh,
) -> Teacher | None:  # fmt: skip
    """The teacher that --distill-from names; InputError when a run is taken up with another one, with none, or with a new one."""
    there = (run / RUN_FILE).is_file()
    before = read_run(run).teacher if there else None
    if source is None:
        if before:
            raise InputError(f"{run}: was taught by step {before.step} of {before.run}; name it again with --distill-from")  # fmt: skip
        return None
    if there and before is None:
        raise InputError(f"{run}: was trained without a teacher; use a new --run with --init-from {run}")
    return open_teacher(source, datasets, blueprint, config, mesh, before)


def _placed(teacher: ModelConfig, student: ModelConfig) -> ModelConfig:
    return replace(teacher, microbatches=student.microbatches)


def _check_same_ids(said: str, record: Run, datasets: Sequence[Dataset], blueprint: Blueprint) -> None:
    first = datasets[0].path
    if record.tokenizer != file_digest(first / "tokenizer.model"):
        raise InputError(f"{said}another tokenizer than {first}'s; prepare the dataset with --like {record.path}")
    if record.vocab != blueprint.vocab:
        raise InputError(f"{said}its ids are those of {record.vocab.as_dict()} and the student's those of {blueprint.vocab.as_dict()}; train both on the same datasets")  # fmt: skip
    if len(record.datasets) != len(datasets):
        raise InputError(f"{said}trained on {len(record.datasets)} datasets, the student on {len(datasets)}; train both on the same")  # fmt: skip
    for number, dataset in enumerate(datasets):
        theirs, ours = (read_arrays(folder / "codes.npz") for folder in (record.folder(number), dataset.path))
        for name in ("codes", "content"):
            if not np.array_equal(theirs[name], ours[name]):
                raise InputError(f"{said}the {name} of its items are not those of {dataset.path}; train both on the same dataset")  # fmt: skip


def _digest(run: Path, step: int) -> str:
    """Of the content of all parameters of a step."""
    said = manifest(run, step)["content"]["params"]
    return xxhash.xxh3_128("".join(f"{path} {said[path]}\n" for path in sorted(said)).encode()).hexdigest()
