"""Tuning a frozen backbone for a task: what is trained, where it acts, and many tasks in one batch (docs/tuning.md).

Six methods with one interface (M6-Rec, arXiv 2205.08084, section 4): soft prompts with a linear head; option tuning, whose
last prompts are the rows of the classifier too; low-rank adapters beside every feed-forward layer; both; low-rank updates
of the matrices (LoRA, Hu et al. 2022); and everything. Each but `full` holds a few numbers beside the backbone's own.

Prompts are heard through gates (Zhang et al. 2023, LLaMA-Adapter): tokens attend to each other as ever, and what they hear of
the prompts is added, times a number a layer and head that begins at zero. So every method begins as the backbone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from m6rec_jax.config import ModelConfig
from m6rec_jax.errors import InputError
from m6rec_jax.model.applied import Applied
from m6rec_jax.model.attention import NEVER

METHODS = ("prompt", "option", "adapter", "option-adapter", "lora", "full")
PROMPTED, OPTIONED = ("prompt", "option", "option-adapter"), ("option", "option-adapter")
ADAPTED = ("adapter", "option-adapter")
ATTENTION = ("query", "key", "value", "output")  # what LoRA updates where nobody says what
TARGETS = (*ATTENTION, "gate", "up", "down")
PROMPTS = 16  # soft prompts where nobody says how many; of option tuning at least 8 beside the options


@dataclass(frozen=True)
class TuneSpec:
    """What is trained for a task: all of it decided, nothing left to a default.

    `options`: C, the classes of the task; 0 = a text task. `prompts`: P soft prompts, the options among them. `rank`: r of
    adapters or of LoRA, whose matrices `targets` names. `keep`: the backbone's layers that stay, in order; `add`: fresh
    layers on top of them.
    """

    method: str
    options: int
    keep: tuple[int, ...]
    prompts: int = 0
    rank: int = 0
    targets: tuple[str, ...] = ()
    add: int = 0

    @classmethod
    def of(
        cls, config: ModelConfig, method: str, options: int, *, prompts: int = 0, rank: int = 0, layers: str = "",
        targets: Sequence[str] = (),
    ) -> TuneSpec:  # fmt: skip
        """The specification with its defaults filled in for a backbone (0 or "" = default).

        Adapters are as wide as a sixteenth of the model, LoRA as a sixty-fourth: about one percent of a layer's numbers
        either way. Raises InputError naming the value when the method, a layer or a number is not to be had.
        """
        if method not in METHODS:
            raise InputError(f"method={method}: unknown; one of {', '.join(METHODS)}")
        if options == 1 or options < 0:
            raise InputError(f"options={options}: a task has two options or more, or none when it writes text")
        for name, value in (("prompts", prompts), ("rank", rank)):
            if value < 0:
                raise InputError(f"{name}={value}: must be at least 1, or 0 for the default")
        if layers and config.shared_layers:
            raise InputError(f"layers {layers} and model.shared_layers=true: there is one set of weights, walked {config.layers} times; leave it out")  # fmt: skip
        keep, add = parse_layers(layers, config.layers)
        low_rank = method in (*ADAPTED, "lora")
        if rank and not low_rank:
            raise InputError(f"rank={rank}: method {method} has nothing of low rank; leave it out")
        if prompts and method not in PROMPTED:
            raise InputError(f"prompts={prompts}: method {method} has no soft prompts; leave it out")
        if config.late and method in PROMPTED:
            raise InputError(f"method={method} and model.late={config.late}: segments that are read alone have no place for soft prompts; adapter, lora or full")  # fmt: skip
        reused = options if method in OPTIONED else 0
        if prompts and prompts < reused:
            raise InputError(
                f"prompts={prompts}: fewer than the {reused} options that are prompts too; at least as many"
            )
        if targets and method != "lora":
            raise InputError(f"targets={','.join(targets)}: method {method} updates no matrix; leave it out")
        chosen = tuple(targets or ATTENTION) if method == "lora" else ()
        if unknown := [name for name in chosen if name not in TARGETS]:
            raise InputError(f"targets={unknown[0]}: unknown; some of {', '.join(TARGETS)}")
        if {"gate", "up", "down"} & set(chosen) and not config.dense_width:
            raise InputError(
                "targets=gate, up, down: this model has experts alone and no such matrices; leave them out"
            )
        return cls(
            method, options, keep, add=add, targets=chosen,
            prompts=0 if method not in PROMPTED else prompts or max(PROMPTS, reused + 8 if reused else 0),
            rank=0 if not low_rank else rank or max(1, config.width // (64 if method == "lora" else 16)),
        )  # fmt: skip

    @property
    def layers(self) -> int:
        """Layers of the tuned model."""
        return len(self.keep) + self.add

    @property
    def light(self) -> bool:
        """Whether it shares every matrix of the backbone, so that one program serves it beside others."""
        return self.method != "full" and not self.add

    def as_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TuneSpec:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})


def parse_layers(text: str, layers: int) -> tuple[tuple[int, ...], int]:
    """`keep=4,add=1` or `keep=0+2+5`: the layers (of so many) that stay, and how many are added. "" = all, none.

    `keep=N` are the first N. Raises InputError naming the part that says something else.
    """
    keep, add = tuple(range(layers)), 0
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name == "add" and value.isdigit():
            add = int(value)
        elif name == "keep" and re.fullmatch(r"\d+(\+\d+)*", value):
            said = [int(n) for n in value.split("+")]
            keep = tuple(said) if len(said) > 1 else tuple(range(said[0]))
            if not keep or list(keep) != sorted(set(keep)) or keep[-1] >= layers:
                raise InputError(f"layers {part}: the backbone has layers 0 to {layers - 1}; keep=N with N up to {layers}, or a rising list such as keep=0+{layers - 1}")  # fmt: skip
        else:
            raise InputError(f"layers {part}: not understood; write keep=N, keep=0+2+5, add=M or keep=N,add=M")
    return keep, add


class Tuned(NamedTuple):
    """The trained numbers of one task, float32. What a method has none of is empty.

    `prompts [P, D]`; `layers`: arrays `[N, ...]`, N layers of the tuned model; `head`: `weight [C, D]`, `bias [C]`; `added`:
    weights of the fresh layers `[M, ...]`; `backbone`: of `full`, all parameters, kept layers alone.
    """

    prompts: dict[str, Array]
    layers: dict[str, Array]
    head: dict[str, Array]
    added: dict[str, Array]
    backbone: dict[str, Any]


def shapes(spec: TuneSpec, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of `Tuned.layers`."""
    N, D, K, h, r = spec.layers, config.width, config.n_kv, config.head_dim, spec.rank
    G, F = config.heads // K, config.dense_width
    made: dict[str, tuple[int, ...]] = {"prompt_gate": (N, K, G)} if spec.prompts else {}
    if spec.method in ADAPTED:
        made |= {"adapter_in": (N, D, r), "adapter_in_bias": (N, r), "adapter_out": (N, r, D), "adapter_out_bias": (N, D), "adapter_scale": (N,)}  # fmt: skip
    out = {"query": (K, G, h), "key": (K, h), "value": (K, h), "output": (D,), "gate": (F,), "up": (F,), "down": (D,)}
    for name in spec.targets:
        made |= {f"{name}_a": (N, F if name == "down" else D, r), f"{name}_b": (N, r, *out[name])}
    return made


def init(
    spec: TuneSpec,
    config: ModelConfig,
    text: Float[Array, "V D"],
    key: jax.Array,
    rows: Float[Array, "C D"] | None = None,
) -> Tuned:
    """Fresh numbers of every method but for `added` and `backbone`, which `depth.begin` adds.

    Adapters, LoRA and prompts begin as nothing: what they multiply by last is zero. Prompts begin as rows of the backbone's
    `text` table (Lester et al. 2021), behind closed gates. `rows`: of the classifier to begin with, where the backbone has learnt the task's options.
    """
    key_prompts, *keys = jax.random.split(key, 1 + len(made := shapes(spec, config)))
    prompts: dict[str, Array] = {}
    if spec.prompts:
        of = jax.random.randint(key_prompts, (spec.prompts,), 0, text.shape[0])
        rows_of = text[of].astype(jnp.float32)
        if spec.method in OPTIONED and rows is not None:
            rows_of = jnp.concatenate([rows_of[: -spec.options], rows.astype(jnp.float32)])
        prompts = {"rows": rows_of}
    layers = {}
    for key, (name, shape) in zip(keys, made.items(), strict=True):
        if name == "adapter_scale":
            layers[name] = jnp.ones(shape)
        elif name == "adapter_in" or name.endswith("_a"):
            layers[name] = jax.random.normal(key, shape) * shape[1] ** -0.5
        else:
            layers[name] = jnp.zeros(shape)
    head: dict[str, Array] = {}
    if spec.options and spec.method not in OPTIONED:
        weight = jnp.zeros((spec.options, config.width)) if rows is None else rows.astype(jnp.float32)
        head = {"weight": weight, "bias": jnp.zeros(spec.options)}
    return Tuned(prompts, layers, head, {}, {})


def classifier(spec: TuneSpec, tuned: Tuned) -> tuple[Float[Array, "C D"], Float[Array, " C"]]:
    """Rows and biases of the softmax over options: of option tuning the last C prompts, and no bias."""
    if spec.method in OPTIONED:
        return tuned.prompts["rows"][-spec.options :], jnp.zeros(spec.options)
    return tuned.head["weight"], tuned.head["bias"]


def option_logits(
    hidden: Float[Array, "B D"], weight: Float[Array, "*k C D"], bias: Float[Array, "*k C"]
) -> Float[Array, "B C"]:
    """Float32 scores of each option; rows `[B, C, D]` are each row's own."""
    rows = "b" if weight.ndim == 3 else ""
    made = jnp.einsum(f"bd,{rows}cd->bc", hidden, weight.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return made + bias


def alone(spec: TuneSpec, tuned: Tuned, rows: int) -> Applied:
    """One task for a batch of so many rows."""
    prompts = None
    if spec.prompts:
        own = tuned.prompts["rows"]
        prompts = jnp.broadcast_to(own, (rows, *own.shape))
    return Applied(prompts, jnp.full(rows, spec.prompts, jnp.int32), tuned.layers)


class Stack(NamedTuple):
    """K tasks over one backbone, padded to common prompts, rank and options.

    `prompts [K, P, D]`, right-aligned, `used [K]` of them; `layers`: arrays `[N, K, ...]`, N layers of the backbone;
    `weight [K, C, D]`, `bias [K, C]` (of options that a task has not: `NEVER`).
    """

    prompts: Float[Array, "K P D"] | None
    used: Int[Array, " K"]
    layers: dict[str, Array]
    weight: Float[Array, "K C D"]
    bias: Float[Array, "K C"]

    def chosen(self, select: Int[Array, " B"]) -> Applied:
        """The task of each row."""
        prompts = None if self.prompts is None else self.prompts[select]
        return Applied(prompts, self.used[select], self.layers, select)


def stack(specs: Sequence[TuneSpec], tuned: Sequence[Tuned], config: ModelConfig, room: int = 0) -> Stack:
    """Tasks as one stack of NumPy arrays, over a backbone of this configuration, with room for `room` tasks; all `light`.

    Sizes are rounded up to powers of two, so that one task more seldom asks for another program.
    """
    K, N, D = max(room, len(specs)), config.layers, config.width
    P, r, C = (_rounded(max(getattr(spec, name) for spec in specs)) for name in ("prompts", "rank", "options"))
    prompts, used = np.zeros((K, P, D), np.float32), np.zeros(K, np.int32)
    weight, bias = np.zeros((K, C, D), np.float32), np.full((K, C), NEVER, np.float32)
    layers: dict[str, np.ndarray] = {}
    for k, (spec, one) in enumerate(zip(specs, jax.device_get(list(tuned)), strict=True)):
        used[k] = spec.prompts
        if spec.prompts:
            prompts[k, P - spec.prompts :] = one.prompts["rows"]
        if spec.options:
            weight[k, : spec.options], bias[k, : spec.options] = classifier(spec, one)
        for name, x in one.layers.items():
            axis = RANKED.get(name, 2 if name.endswith("_a") else 1)
            x = x if axis is None else np.pad(x, [(0, r - spec.rank if i == axis else 0) for i in range(x.ndim)])
            layers.setdefault(name, np.zeros((N, K, *x.shape[1:]), np.float32))[list(spec.keep), k] = x
    if any(len(spec.keep) < N for spec in specs):
        layers["on"] = np.ones((N, K), np.float32)
        for k, spec in enumerate(specs):
            layers["on"][:, k] = np.isin(np.arange(N), spec.keep)
    return Stack(prompts if P else None, used, layers, weight, bias)


# Which axis of these is the rank (of LoRA's, the last of A and the first of B).
RANKED = {"prompt_gate": None, "adapter_in": 2, "adapter_in_bias": 1, "adapter_out": 1, "adapter_out_bias": None, "adapter_scale": None}  # fmt: skip


def _rounded(n: int) -> int:
    """The next power of two; 0 stays 0."""
    return 1 << (n - 1).bit_length() if n else 0


def as_whole(spec: TuneSpec) -> TuneSpec:
    """The specification as that of the assembled model, all of whose layers stay."""
    return replace(spec, keep=tuple(range(spec.layers)), add=0)


def as_arrays(tuned: Tuned) -> dict[str, Any]:
    """A nested dict of what there is, as an artefact holds it."""
    return {name: part for name, part in tuned._asdict().items() if part}


def from_arrays(spec: TuneSpec, config: ModelConfig, arrays: Mapping[str, Any]) -> Tuned:
    """`as_arrays` undone. Raises InputError when the arrays are not those of the specification."""
    tuned = Tuned(*(dict(arrays.get(name, {})) for name in Tuned._fields))
    wanted = {f"layers.{name}": shape for name, shape in shapes(spec, config).items()}
    wanted |= {"prompts.rows": (spec.prompts, config.width)} if spec.prompts else {}
    if spec.options and spec.method not in OPTIONED:
        wanted |= {"head.weight": (spec.options, config.width), "head.bias": (spec.options,)}
    found = {f"{part}.{name}": x.shape for part in ("prompts", "layers", "head") for name, x in getattr(tuned, part).items()}  # fmt: skip
    if differ := sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name)):
        name = differ[0]
        raise InputError(f"{name} is {found.get(name, 'missing')} where method {spec.method} needs {wanted.get(name, 'none')}; tune again")  # fmt: skip
    return tuned
