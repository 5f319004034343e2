"""What is published of each chip. Nothing here comes from a training run.

Vendors: Google Cloud's pages of TPU v4, v5e, v5p, v6e, TPU7x ("System architecture"); NVIDIA's data sheets of A100, H100 SXM
and H200 SXM (dense figures). Links and data-centre network of TPUs, matrix units: "How to Scale Your Model" (Austin et al. 2025,
part 2), but v6e's network, of which the vendor's page says 25.6 Tbit/s a pod of 256. Networks of GPU machines: AWS p4d
(400 Gbit/s a machine) and p5 (3,200 Gbit/s a machine).
"""

from __future__ import annotations

from typing import NamedTuple

from m6rec_jax.errors import InputError


class Chip(NamedTuple):
    """Of one chip: FLOP/s in bfloat16, bytes of memory, bytes a second of memory, of one link one way and of the network.

    `reached`: share of the peak that one large matrix product alone was measured to reach. `carried`, `routed`: share of
    the links' and of the network's speed that one large collective alone was. `vector`: elementwise float32 operations
    a second; `special`: exponentials a second. `unit`: side of the matrix unit, to which products are padded. `host`:
    chips in a machine.
    """

    peak: float
    memory: float
    bandwidth: float
    link: float
    network: float
    reached: float
    vector: float
    special: float
    unit: int
    host: int
    ring: int  # an axis of the torus closes to a ring when it is a multiple of this
    carried: float
    routed: float = 1.0

    @property
    def block(self) -> int:
        """Positions in a block of the attention kernel: splash on TPU, flash attention on GPU."""
        return 128 if self.unit == 16 else 1024

    @property
    def split(self) -> bool:
        """Whether the attention kernels' backward pass is two, of which each computes the scores again."""
        return self.unit != 16


# One large product alone, in bfloat16: v5e 92.3 % at 8192^3 (jax, docs/pallas/tpu/matmul.ipynb, XLA); v4 and v5p have the
# same matrix unit and no measurement was found: v5e's. v6e 79 %, TPU7x 90 % (yangwhale/gpu-tpu-pedia, tpu/v7_perf, time on the
# device). H100 780.2 TFLOP/s = 78.9 % (Chillee, "H100 peak matmul FLOPS"); for A100 none was found: H100's.
V5E, V6E, TPU7, H100 = 0.923, 0.79, 0.90, 0.789
# One large collective alone. TPU: a sum over all of a v6e pod of 16 x 16, 235.8 GB/s of the 400 that four links carry
# (AI-Hypercomputer/tpu-recipes, microbenchmarks/trillium/collectives; bytes sent by a ring formula); no other chip's was
# found: v6e's. Its figures of the data-centre network changed six-fold between two editions: not taken. H100: 370 GB/s of
# 450 within a machine (NCCL's maintainer, NVIDIA/nccl-tests issue 212); 321 of 400 GB/s over 32 machines of p5
# (crazyguitar/aws-gpu-communication-benchmark, all-reduce of 8 GB). A100: 230.8 GB/s of 300 within a p4d, 29.6 of 50 over
# four of them (NVIDIA/nccl issue 527, 1 GB).
TORUS, NVLINK4, P5, NVLINK3, P4 = 0.589, 0.822, 0.803, 0.769, 0.592
# Vector units of a TPU: 8 x 128 lanes x 4 operations a cycle a core, exponentials among them; cycles a second follow
# from the peak and the matrix units.
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.2e12, 4.5e10, 6.25e9, V5E, 2 * 4096 * 1.05e9, 2 * 1024 * 1.05e9, 128, 4, 4, TORUS),
    "v5e": Chip(197e12, 16 * 2**30, 8.19e11, 5e10, 3.1e9, V5E, 4096 * 1.5e9, 1024 * 1.5e9, 128, 8, 16, TORUS),
    "v5p": Chip(
        459e12, 95 * 2**30, 2.765e12, 1e11, 6.25e9, V5E, 2 * 4096 * 1.75e9, 2 * 1024 * 1.75e9, 128, 4, 4, TORUS
    ),
    "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 1e11, 1.25e10, V6E, 4096 * 1.75e9, 1024 * 1.75e9, 256, 8, 16, TORUS),
    "tpu7x": Chip(
        2307e12, 192 * 2**30, 7.38e12, 1e11, 6.25e9, TPU7, 2 * 4096 * 2.2e9, 2 * 1024 * 2.2e9, 256, 4, 4, TORUS
    ),
    "a100": Chip(312e12, 80e9, 2.039e12, 3e11, 6.25e9, H100, 9.75e12, 2.4e12, 16, 8, 0, NVLINK3, P4),
    "a100-40": Chip(312e12, 40e9, 1.555e12, 3e11, 6.25e9, H100, 9.75e12, 2.4e12, 16, 8, 0, NVLINK3, P4),
    "h100": Chip(989.4e12, 80e9, 3.35e12, 4.5e11, 5e10, H100, 33.5e12, 3.9e12, 16, 8, 0, NVLINK4, P5),
    "h200": Chip(989.4e12, 141e9, 4.8e12, 4.5e11, 5e10, H100, 33.5e12, 3.9e12, 16, 8, 0, NVLINK4, P5),
}
TPU7X_DEVICES = 2  # JAX shows each TPU7x chip as two devices


class Place(NamedTuple):
    """A topology by numbers: the chip of one *device*, and its layout."""

    name: str
    chip: Chip
    layout: tuple[int, ...]
    gpu: bool


def place_of(topology: str) -> Place:
    """The chip and layout in a topology's name; InputError when nothing is published of it here."""
    platform, name, layout = topology.split(":")
    if name not in CHIPS:
        raise InputError(f"{topology}: no published figures of {name} here; known: {', '.join(CHIPS)}")
    return Place(topology, CHIPS[name], tuple(int(n) for n in layout.split("x")), platform == "gpu")


def ring_bandwidth(place: Place, group: int, together: bool = True, rings: bool = False) -> float:
    """Bytes a second that a device sends in a collective among `group` devices; `together`: neighbours, not far apart.

    TPU: as many axes of the torus as it takes to reach so many, both ways where an axis closes to a ring; with `rings`
    the group is one ring of neighbours, and the other links are another group's. GPU: its links within a machine;
    beyond, what arrives over the machine's network is shared within it.
    """
    chip = place.chip
    if place.gpu:
        machine = place.layout[-1]
        if group <= machine and together:
            return chip.link * chip.carried
        return chip.network * chip.routed * (machine if together else 1)
    if rings:
        return 2 * chip.link * chip.carried
    total, reach = 0.0, 1
    for size in sorted(place.layout, reverse=True):
        if reach >= group:
            break
        if size > 1:
            total += chip.link * (2 if size % chip.ring == 0 else 1)
            reach *= size
    return (total or chip.link) * chip.carried
