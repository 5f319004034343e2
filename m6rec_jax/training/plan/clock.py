"""How long a step takes, from what it must compute, read and send and from what chips are published to do.

Nothing in here is fitted to a training run. Products run at the share of the peak that one large product alone reaches, padded
to the matrix unit; attention at the slower of matrix and vector unit; what is elementwise between products at the
speed of memory, and so is the optimiser. Collectives follow ring formulas. Those that something is computed beside cost
only what they last longer than all computing; the others are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from m6rec_jax.training.plan.hardware import Chip, Place, ring_bandwidth
from m6rec_jax.training.plan.hlo import Sent

# Matrices whose product the backward pass computes again, and "attention". The last product of a layer ("down") is dead
# code there: nothing of the backward pass reads the layer's output.
RECOMPUTED = {
    "none": frozenset(),
    "dots": frozenset({"attention"}),
    "full": frozenset({"query", "key", "value", "output", "gate", "up", "attention"}),
}
# Elementwise operations on one score: scale, mask (two compares, select), maximum, difference, sum, rescale, conversion; and
# backward: mask, difference, two products, conversions. Exponentials: one each.
FORWARD, BACKWARD = 9, 9


@dataclass(frozen=True)
class Work:
    """A training step. `tokens`: of all rows together; `experts` of a layer, `active` of them for a token.

    `places`: rows that experts compute for each of a token's choices, more than 1 where they have a fixed capacity;
    `one_hot`: tokens reach them by products with one-hot masks (Lepikhin et al. 2021), not by being moved. `fused`: the
    attention's backward pass is one kernel. `blocks`: positions in a block of its forward and of its backward kernel, 0:
    as the chip's. `rings`: each axis of the mesh is a ring of neighbours with links of its own. `learns`: it has a
    backward pass and an optimiser. `compared`: share of the positions whose states meet the largest table.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head: int
    ffn: int
    vocab: int
    length: int
    tokens: int
    chips: int
    fsdp: int
    tensor: int = 1
    data: int = 1
    slices: int = 1  # gradients of so many are added up; weights are gathered for each
    experts: int = 1
    active: int = 1
    expert: int = 1  # devices that experts are dealt over; rows are dealt over them too
    places: float = 1.0
    one_hot: bool = False
    fused: bool = False
    blocks: tuple[int, int] = (0, 0)
    rings: bool = False
    learns: bool = True
    compared: float = 1.0
    recomputed: frozenset[str] = frozenset()
    weight_bytes: int = 2  # as gathered
    gradient_bytes: int = 4
    sets: int = 0  # layers with weights of their own; 0: all
    embed: int = 0  # size of a row of the tables; 0: width
    network: bool = False  # `data` lies across slices, on the data-centre network

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of a layer's matrices, as one token meets them."""
        D, Q, K = self.width, self.heads * self.head, self.kv_heads * self.head
        F = self.ffn * self.active
        return {"query": (D, Q), "key": (D, K), "value": (D, K), "output": (Q, D), "gate": (D, F), "up": (D, F), "down": (F, D)}  # fmt: skip

    def parameters(self) -> float:
        """All of them, embeddings included (tied or not, one table)."""
        return self._parameters(self.experts)

    def held(self) -> float:
        """Those of a group of devices that shards them: of its part of `tensor`, and of the experts that are dealt to it."""
        return self._parameters(self.experts / self.expert) / self.tensor

    def _parameters(self, experts: float) -> float:
        layer = sum(a * b for a, b in self.matrices().values()) + 3 * self.width * self.ffn * (experts - self.active)
        return (self.sets or self.layers) * layer + self.tables()

    def tables(self) -> int:
        """Numbers in the largest table, and in the matrix between its rows and the width where there is one."""
        return self.embed * (self.vocab + self.width) if self.embed else self.width * self.vocab

    def flops(self) -> float:
        """Model FLOPs a chip: 6 for each entry of a matrix and token, and causal attention, 6 T h H N; none twice. A third of it
        where nothing is learnt."""
        matrices = self.layers * sum(a * b for a, b in self.matrices().values()) + self.compared * self.tables()
        attention = self.layers * self.heads * self.head * self.length
        return (6.0 if self.learns else 2.0) * (matrices + attention) * self.tokens / self.chips


class Spent(NamedTuple):
    """Seconds of a step, by what they are spent on. `hidden`: of collectives with work beside them."""

    products: float
    attention: float
    memory: float
    exposed: float
    hidden: float

    @property
    def computing(self) -> float:
        return self.products + self.attention + self.memory

    @property
    def step(self) -> float:
        return max(self.computing, self.hidden) + self.exposed

    @property
    def bound(self) -> str:
        """What takes most of the step: compute, memory or collectives."""
        sent = self.exposed + max(0.0, self.hidden - self.computing)
        parts = {"compute": self.products + self.attention, "memory": self.memory, "collectives": sent}
        return max(parts, key=lambda name: parts[name])


def spent(works: Sequence[Work], place: Place) -> Spent:
    """Seconds of a step of all these one after another, their collectives by ring formulas from the mesh."""
    hidden, exposed = (sum(part) for part in zip(*(sent(work, place) for work in works), strict=True))
    return compute(works, place.chip)._replace(hidden=hidden, exposed=exposed)


def compute(works: Sequence[Work], chip: Chip) -> Spent:
    """Seconds a chip computes in a step; nothing is sent."""
    return Spent(*(sum(part) for part in zip(*(_compute(work, chip) for work in works), strict=True)))


def _compute(work: Work, chip: Chip) -> Spent:
    tokens = work.tokens / work.chips * work.tensor  # of those that a chip works on, it does 1 / tensor
    products = 0.0
    for name, (rows, columns) in work.matrices().items():
        split = name in ("output", "down")  # along rows, the others along columns
        a, b = (rows / work.tensor, columns) if split else (rows, columns / work.tensor)
        times = 3 + (name in work.recomputed) if work.learns else 1
        rows_of = tokens * work.places if name in ("gate", "up", "down") else tokens
        products += work.layers * times * _product(rows_of, a, b, chip)
    if work.compared:
        products += 3 * _product(tokens * work.compared, work.embed or work.width, work.vocab / work.tensor, chip)
    if work.embed:  # on the way in and out, of who only answers in
        products += (6 if work.learns else 1) * _product(tokens, work.embed, work.width, chip)
    if work.one_hot:  # into the experts' places and back: of every row a product of all places with all positions
        times = 5 + ("gate" in work.recomputed)  # forward two, backward three: the mask of the way in has no gradient
        places = work.length * work.active * work.places
        products += work.layers * times * tokens / work.length * _product(places, work.length, work.width, chip)
    ahead, back = (
        tokens * work.heads / work.tensor * work.layers * _scores(work.length, n or chip.block) for n in work.blocks
    )
    again, back = "attention" in work.recomputed, back * work.learns
    kernels = 1 if work.fused or not chip.split else 2
    # Of each score 2 h operations for q k and 2 h for p v; backward five such products (Dao et al. 2022, appendix B), seven
    # where one kernel makes the gradient of queries and another those of keys and values: both compute the scores again.
    matrix = 2 * work.head * (ahead * 2 * (1 + again) + back * (3 + 2 * kernels)) / (chip.peak * chip.reached * _filled(work.head, chip))  # fmt: skip
    vector = (ahead * FORWARD * (1 + again) + back * BACKWARD * kernels) / chip.vector
    vector += (ahead * (1 + again) + back * kernels) / chip.special
    return Spent(products, max(matrix, vector), _elementwise(work, chip, tokens), 0.0, 0.0)


def sent(work: Work, place: Place) -> tuple[float, float]:
    """Seconds of collectives that have work beside them, and of those that have none."""
    ring = lambda n: (n - 1) / n  # noqa: E731
    held = work.held()
    gathered = held * work.weight_bytes * ring(work.fsdp) * _gathers(work) * work.slices
    scattered = held * work.gradient_bytes * ring(work.fsdp) * work.slices * work.learns
    speed = ring_bandwidth(place, work.fsdp, rings=work.rings)
    hidden, exposed = gathered / speed, scattered / speed
    if work.data > 1 and work.learns:
        speed = (
            place.chip.network * place.chip.routed if work.network else ring_bandwidth(place, work.data, together=False)
        )
        exposed += held / work.fsdp * work.gradient_bytes * 2 * ring(work.data) / speed
    tokens = work.tokens / work.chips * work.tensor
    if work.tensor > 1:  # two sums forward and two backward a layer, and those computed again (Shoeybi et al. 2019)
        sums = work.layers * (4 + ("output" in work.recomputed) if work.learns else 2) * tokens * work.width * 2
        exposed += sums * 2 * ring(work.tensor) / ring_bandwidth(place, work.tensor, rings=work.rings)
    if work.expert > 1:
        # Places go to their experts and back, and their gradients; round a ring it is a quarter of the way on average.
        moved = work.layers * (4 + ("gate" in work.recomputed) if work.learns else 2) * _routed(work, tokens) * 2
        hops = ring(work.expert) if place.gpu else work.expert / 4
        exposed += moved * hops / ring_bandwidth(place, work.expert, rings=work.rings)
    return hidden, exposed


def sent_as_compiled(sent: Sequence[Sent], place: Place) -> tuple[float, float]:
    """The same of a compiled program's collectives, each overlapped or not as its text shows."""
    hidden = exposed = 0.0
    for one in sent:
        took = one.count * one.size / ring_bandwidth(place, one.group, one.together)
        hidden, exposed = (hidden + took, exposed) if one.overlapped else (hidden, exposed + took)
    return hidden, exposed


def _product(tokens: float, rows: float, columns: float, chip: Chip) -> float:
    """Seconds of `[tokens, rows] x [rows, columns]`: the matrix unit's or the memory's, whichever is slower."""
    filled = _filled(rows, chip) * _filled(columns, chip)
    flops = 2.0 * tokens * rows * columns / (chip.peak * chip.reached * filled)
    return max(flops, 2.0 * (tokens * rows + rows * columns + tokens * columns) / chip.bandwidth)


def _scores(length: int, block: int) -> float:
    """Scores of a query with causal attention in blocks of so many positions; those on the diagonal are computed whole."""
    blocks = max(1.0, length / block)
    return length * (blocks + 1) / (2 * blocks)


def _routed(work: Work, tokens: float) -> float:
    """Numbers in the experts' places of a layer, as they come in or go out."""
    return tokens * work.active * work.places * work.width if work.experts > 1 else 0.0


def _filled(size: float, chip: Chip) -> float:
    """Share of the matrix unit's side that a dimension fills."""
    return size / (math.ceil(size / chip.unit) * chip.unit)


def _elementwise(work: Work, chip: Chip, tokens: float) -> float:
    """Seconds of what is read and written between products, of logits and of the optimiser."""
    D, heads = work.width, (work.heads + 2 * work.kv_heads) * work.head / work.tensor
    F = work.ffn * work.active * work.places / work.tensor
    # Two norms (read, write), two residual sums (read, write beside a product's own), turned queries and keys, SwiGLU.
    forward = 2.0 * (8 * D + 2 * heads + 3 * F)
    times = 3 + (1 if work.recomputed else 0) if work.learns else 1
    # A token's places in its experts: written on the way in and read on the way out, as is what they are read from.
    routed = 2.0 * 4 * _routed(work, tokens) * times * work.layers
    if work.one_hot:  # two masks are made, and made again
        routed += 2.0 * 2 * tokens * work.length * work.active * work.places * work.layers * (1 + bool(work.recomputed))
    logits = (
        4.0 * work.vocab / work.tensor * 4 * work.compared
    )  # written, read for the sum, read and written as their gradient
    held = work.held()
    state = 28.0 * held / work.fsdp * work.learns  # parameter, moments and gradient read, three written
    # Gathered weights are written before a product reads them; gradients are written, and read to be scattered.
    if work.fsdp > 1:
        state += held * work.slices * (work.weight_bytes * _gathers(work) + 2 * work.gradient_bytes * work.learns)
    return (tokens * (work.layers * forward * times + logits) + routed + state) / chip.bandwidth


def _gathers(work: Work) -> int:
    """How often a step gathers each weight: forward, backward, and to compute the forward again."""
    return 2 + bool(work.recomputed - {"attention"}) if work.learns else 1
