"""What many users ask for, checked and ready to be cut into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m6rec_jax.decoding.programs import Asked
from m6rec_jax.decoding.shapes import Prompt, bucket, pad, rectangle
from m6rec_jax.vocab import BOS


@dataclass(frozen=True)
class Requests:
    """One entry a user: its prefix, rows that it shall not get, its memory's rows and mass, gate and temperature."""

    prompts: list[Prompt]
    exclude: Sequence[np.ndarray]
    support: list[np.ndarray]
    mass: list[np.ndarray]
    gate: np.ndarray
    temperature: np.ndarray

    @classmethod
    def of(
        cls, prompts: list[Prompt], catalogue: int, exclude: Sequence[np.ndarray] | None,
        memory: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] | None, gate: np.ndarray | None,
        temperature: float | np.ndarray,
    ) -> Requests:  # fmt: skip
        """As `Engine.recommend` takes them; ValueError when counts differ or a row is outside the catalogue."""
        users, nothing = len(prompts), np.zeros(0, np.int32)
        rows, mass = memory if memory is not None else ([nothing] * users, [nothing] * users)
        gate = np.zeros(users, np.float32) if gate is None else np.asarray(gate, np.float32)
        exclude = [nothing] * users if exclude is None else exclude
        if not len(rows) == len(mass) == len(gate) == len(exclude) == users:
            raise ValueError(f"{users} histories, {len(exclude)} exclusions, {len(rows)} memories, {len(gate)} gates")
        for name, given in (("exclude", exclude), ("memory", rows)):
            if max((int(np.max(r, initial=-1)) for r in given), default=-1) >= catalogue:
                raise ValueError(f"{name}: a row outside the catalogue of {catalogue} items")
        some = [np.asarray(m) > 0 for m in mass]
        return cls(
            prompts, exclude, [np.asarray(r)[s] for r, s in zip(rows, some, strict=True)],
            [np.asarray(m)[s] for m, s in zip(mass, some, strict=True)], gate,
            np.broadcast_to(np.asarray(temperature, np.float32), users),
        )  # fmt: skip

    @classmethod
    def blank(cls, users: int, length: int, excluded: int, supported: int) -> Requests:
        """Requests of these sizes that ask for nothing in particular: what a program is warmed up with."""
        prompt = np.full(length, BOS, np.int32), np.full(length, -1, np.int32)
        rows = lambda n: [np.full(n, -1, np.int32)] * users  # noqa: E731
        return cls(
            [prompt] * users, rows(excluded), rows(supported), [np.zeros(supported, np.float32)] * users,
            np.zeros(users, np.float32), np.ones(users, np.float32),
        )  # fmt: skip

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prefix `[U]`."""
        return np.array([len(tokens) for tokens, _ in self.prompts], np.int64)

    def asked(self, chosen: np.ndarray, B: int, T: int) -> Asked:
        """The chosen users as the arrays of a program of shape (B, T); spare rows ask for nothing."""
        pick = lambda parts: [parts[u] for u in chosen]  # noqa: E731
        exclude, support, mass = pick(self.exclude), pick(self.support), pick(self.mass)
        excluded_width, support_width = bucket(max(map(len, exclude)), 32, 4), bucket(max(map(len, support)), 64, 8)
        spare = (0, B - len(chosen))
        return Asked(
            *pad(pick(self.prompts), B, T),
            rectangle(exclude, B, excluded_width, -1, np.int32),
            rectangle(support, B, support_width, -1, np.int32),
            rectangle(mass, B, support_width, 0, np.float32),
            np.pad(self.gate[chosen], spare),
            np.pad(self.temperature[chosen], spare, constant_values=1),
        )


def mass_of(candidates: np.ndarray, rows: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """What a user's support `rows [J]` (-1 = none) gives each of some distinct candidates."""
    made = np.zeros(len(candidates))
    if len(candidates):
        order = np.argsort(candidates, kind="stable")
        at = order[np.minimum(np.searchsorted(candidates, rows, sorter=order), len(order) - 1)]
        hit = np.asarray(candidates)[at] == rows
        np.add.at(made, at[hit], mass[hit])
    return made
