"""`m6rec plan`: what a compiled program sends, how long a step takes, what the verb says and refuses."""

import dataclasses
import json
import platform
import statistics
import sys
from pathlib import Path

import jax
import pytest

from m6rec_jax.cli import main
from m6rec_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from m6rec_jax.topologies import Topology
from m6rec_jax.training.plan import calibrate, search
from m6rec_jax.training.plan.clock import RECOMPUTED, Work, sent_as_compiled, spent
from m6rec_jax.training.plan.hardware import CHIPS, place_of, ring_bandwidth
from m6rec_jax.training.plan.hlo import Sent, by_kind, collectives
from m6rec_jax.training.plan.lower import _refused, blueprint_of
from m6rec_jax.training.plan.report import work_of

TINY = ["--model.layers=1", "--model.width=64", "--model.heads=2", "--model.dropout=0", "--model.embed_dropout=0",
        "--model.id_dropout=0", "--data.length=32", "--data.rows=8", "--items=200", "--text-vocab=200", "--content-width=8"]  # fmt: skip
FLAT = {"fits", "hbm_bytes", "hbm_limit_bytes", "flops", "collectives", "step_seconds", "mfu", "mfu_error", "bound", "compile_seconds"}  # fmt: skip

GPU_TEXT = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = (f32[16]{0}, f32[64]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %work = f32[8]{0} fusion(%y), kind=kLoop, calls=%f
  %agd = f32[64]{0} all-gather-done(%ag)
  %ar = f32[10]{0} all-reduce-start(%z), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%sum
  %ard = f32[10]{0} all-reduce-done(%ar)
  ROOT %t = (s32[], f32[8]) tuple(%i, %work)
}

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(24)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%init), condition=%cond, body=%body
  %rs = bf16[100]{0} reduce-scatter(%g), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
  ROOT %o = f32[8]{0} get-tuple-element(%w), index=1
}
"""

TPU_TEXT = """HloModule m

%begin (p: bf16[8]) -> (bf16[8], bf16[64]) {
  %all-gather.1 = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}
  ROOT %c = (bf16[8], bf16[64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p: bf16[8]) -> (bf16[8], bf16[64]) {
  %convolution.1 = f32[8,8]{1,0} convolution(%a, %b)
  %all-gather.2 = bf16[64]{0} all-gather(%p), channel_id=7, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'fsdp'}, dimensions={0}
  ROOT %t = (bf16[8], bf16[64]) tuple(%p, %all-gather.2)
}

ENTRY %main (a: bf16[8]) -> bf16[64] {
  %s = (bf16[8], bf16[64]) fusion(%a), kind=kCustom, calls=%begin
  %f = (bf16[8], bf16[64]) fusion(%s), kind=kCustom, calls=%async_collective_fusion.3
  ROOT %r = bf16[64]{0} all-reduce(%f), channel_id=9, replica_groups=mesh['data'=2,'fsdp'=8,'tensor'=1] {'data','fsdp'}, to_apply=%sum
}
"""


def test_collectives_are_counted_as_often_as_loops_run_and_overlapped_where_there_is_work():
    gather, reduce, scatter = collectives(GPU_TEXT, 8)
    assert gather == Sent("all-gather", 24, 64 * 4 * 3 / 4, 4, True)
    assert reduce == Sent("all-reduce", 24, 10 * 4 * 2 / 2, 2, False, together=False)
    assert scatter == Sent("reduce-scatter", 1, 100 * 2 * 7, 8, False)
    assert by_kind([gather, gather])["all-gather", True] == (48, 48 * gather.size)


def test_a_collective_that_several_fusions_carry_is_one():
    gather, reduce = collectives(TPU_TEXT, 16)
    assert gather == Sent("all-gather", 1, 64 * 2 * 7 / 8, 8, True)
    assert reduce == Sent("all-reduce", 1, 64 * 2 * 2 * 15 / 16, 16, False)
    alone = TPU_TEXT.replace("%async_collective_fusion.3", "%other").replace('"AsyncCollectiveStart"', '"AsyncCollectiveDone"')  # fmt: skip
    assert not any(one.overlapped for one in collectives(alone, 16))


V5P, H100 = place_of("tpu:v5p:8x8x8"), place_of("gpu:h100:4x8")
WORK = Work(4, 1024, 8, 8, 128, 4096, 32000, 2048, tokens=512 * 2048 * 4, chips=512, fsdp=512)


def test_a_step_takes_longer_with_recomputation_and_does_no_more_of_the_model():
    again = dataclasses.replace(WORK, recomputed=RECOMPUTED["full"])
    assert spent([again], V5P).step > spent([WORK], V5P).step and again.flops() == WORK.flops()


@pytest.mark.parametrize("name", ["peak", "bandwidth", "link", "reached"])
def test_a_better_chip_is_never_slower(name):
    better = V5P._replace(chip=V5P.chip._replace(**{name: 2 * getattr(V5P.chip, name)}))
    assert spent([WORK], better).step < spent([WORK], V5P).step


def test_what_has_work_beside_it_costs_only_what_it_lasts_longer():
    part = Sent("all-gather", 10, 1e9, 512, True)
    hidden, exposed = sent_as_compiled([part, part._replace(overlapped=False)], V5P)
    assert hidden == exposed == pytest.approx(10e9 / (6e11 * V5P.chip.carried))  # three axes of the torus, both ways
    alone = spent([WORK], V5P)._replace(exposed=0, hidden=0)
    assert alone._replace(hidden=alone.computing / 2).step == alone.computing
    assert alone._replace(exposed=2.0).step == alone.computing + 2 and alone._replace(exposed=2.0).bound == "collectives"  # fmt: skip


def test_a_group_within_a_machine_is_faster_than_one_beyond():
    assert ring_bandwidth(H100, 8) > ring_bandwidth(H100, 32) > ring_bandwidth(H100, 4, together=False)


def test_flops_are_six_for_each_entry_of_a_matrix_and_token():
    config = Config(ModelConfig(layers=3, width=128, heads=4, kv_heads=2), data=DataConfig(length=64, rows=16))
    blueprint = blueprint_of(config, items=500, pieces=100, content=8)
    work = work_of(config, blueprint, dict.fromkeys(("data", "fsdp", "tensor"), 2))
    shapes = blueprint.shapes()
    entries = sum(x.size for x in jax.tree.leaves(shapes["block"]) if x.ndim > 2) + 512 * 128
    attention = 12 * 3 * 128 * 64 / 2
    assert work.flops() == (6 * entries + attention) * 16 * 64 / 8


def test_every_published_run_is_printed_and_the_error_is_their_median():
    compared, told = calibrate.compared(), calibrate.told()
    assert len(compared) >= 6 and len({one.run.topology for one in compared}) >= 3
    assert all(f"{one.error:+.1%}" in told for one in compared)
    assert calibrate.error() == statistics.median(abs(one.predicted / one.run.speed - 1) for one in compared)


def test_the_page_tells_the_calibration_as_it_is():
    assert calibrate.told() in (Path(__file__).parents[2] / "docs/plan.md").read_text(encoding="utf-8")


def test_no_published_run_decides_what_a_chip_is_said_to_reach():
    """Shares of the peak and of the links are the measured ones of single products and collectives, to the digit."""
    assert {name: CHIPS[name].reached for name in ("v5e", "v6e", "h100")} == {"v5e": 0.923, "v6e": 0.79, "h100": 0.789}
    carried = {name: round(CHIPS[name].carried, 3) for name in ("v5e", "v6e", "h100", "a100")}
    assert carried == {"v5e": round(235.76 / 400, 3), "v6e": round(235.76 / 400, 3), "h100": round(370 / 450, 3), "a100": round(230.8 / 300, 3)}  # fmt: skip


def test_the_time_model_is_within_fifteen_percent_of_half_the_published_runs():
    assert calibrate.error() < 0.15


EXPERTS = dataclasses.replace(WORK, experts=8, active=2, recomputed=RECOMPUTED["full"])


@pytest.mark.parametrize(
    "more",
    [{"places": 1.25}, {"one_hot": True}, {"rings": True}, {"expert": 8, "fsdp": 64}, {"fused": False}, {"blocks": (1024, 2048)}],
    ids=str,
)  # fmt: skip
def test_what_a_recipe_does_beside_the_model_takes_time_and_is_no_flop_of_the_model(more):
    lean = dataclasses.replace(EXPERTS, fused=True, **({"fsdp": 64} if "fsdp" in more else {}))
    there = dataclasses.replace(lean, **more)
    assert spent([there], V5P).step > spent([lean], V5P).step and there.flops() == lean.flops()


def test_experts_compute_every_place_they_have():
    few, many = (spent([dataclasses.replace(EXPERTS, places=places)], V5P).products for places in (1.0, 1.5))
    of_experts = 11 * EXPERTS.layers * 2 * EXPERTS.tokens / EXPERTS.chips * EXPERTS.width * EXPERTS.ffn * EXPERTS.active
    assert many - few == pytest.approx(0.5 * of_experts / (V5P.chip.peak * V5P.chip.reached))  # 3 + 3 + 3, and 2 again


def test_products_of_one_hot_masks_are_counted_to_the_flop():
    """Five products of a row's places with its positions, as `BSM,BSEC -> EBCM` and back are (Lepikhin et al. 2021)."""
    work = dataclasses.replace(EXPERTS, recomputed=frozenset(), places=1.25)
    added = spent([dataclasses.replace(work, one_hot=True)], V5P).products - spent([work], V5P).products
    rows, places = work.tokens / work.chips / work.length, 1.25 * 2 * work.length
    flops = work.layers * 5 * rows * 2 * places * work.length * work.width
    assert added == pytest.approx(flops / (V5P.chip.peak * V5P.chip.reached))


def test_a_device_holds_of_the_experts_those_that_are_dealt_to_it():
    dealt = dataclasses.replace(EXPERTS, expert=8)
    dense = dataclasses.replace(EXPERTS, experts=1, active=1)
    assert dealt.parameters() == EXPERTS.parameters() and dealt.held() == dense.parameters()


def test_experts_with_a_fixed_capacity_compute_all_places_and_shared_ones_have_none():
    model = ModelConfig(layers=2, width=128, heads=4, experts=8, experts_per_token=2, shared_experts=2, routing="capacity", capacity_factor=1.5)  # fmt: skip
    config = Config(model, data=DataConfig(length=64, rows=16))
    axes = {"data": 1, "fsdp": 2, "tensor": 1, "expert": 4}
    of = lambda config: work_of(config, blueprint_of(config, 500, 100, 8), axes)  # noqa: E731
    free = dataclasses.replace(config, model=dataclasses.replace(model, routing="dropless"))
    assert (of(config).places, of(free).places, of(free).expert) == ((2 * 1.5 + 2) / 4, 1.0, 4)


def test_the_search_proposes_only_what_divides_and_fits_best_first():
    config = Config(ModelConfig(layers=2, width=128, heads=4, dtype="bfloat16"), MeshConfig(), data=DataConfig(length=128))  # fmt: skip
    at = Topology("tpu:v5e:4x4", [None] * 16, None)  # type: ignore[list-item]
    blueprint = blueprint_of(config, 1000, 1000, 16)
    found = search.candidates(at, config, blueprint, [1000])
    assert [one.mfu for one in found] == sorted((one.mfu for one in found), reverse=True)
    for one in found:
        mesh = one.config.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == 16 and one.config.data.rows % (mesh.data * mesh.fsdp) == 0
        assert one.memory < CHIPS["v5e"].memory and mesh.tensor <= 4


def test_a_refusal_of_the_tpu_compiler_is_read_and_another_error_is_not():
    said = "Ran out of memory on HBM, the total memory required for HLO temporaries (18.84G) exceeds available HBM (15.75G)."
    assert _refused(said) == (18.84 * 2**30, 15.75 * 2**30)
    assert _refused("Used 20.5G of 15.75G hbm. Exceeded") == (20.5 * 2**30, 15.75 * 2**30)
    assert _refused("INTERNAL: something else (3.0G)") is None


compiles = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="libtpu is for Linux x86-64"
)


@compiles
def test_the_verb_writes_a_flat_plan_of_fractions_and_quantities_a_chip(tmp_path, capsys):
    pytest.importorskip("libtpu")
    out = tmp_path / "plan.json"
    mesh = ["--mesh.data=2", "--mesh.fsdp=2"]
    assert main(["plan", "--config", "small", "--topology", "tpu:v5e:2x2", "--out", str(out), *TINY, *mesh]) == 0
    made, told = json.loads(out.read_text()), capsys.readouterr().out
    assert set(made) == FLAT and made["fits"] is True
    assert 0 < made["mfu"] < 1 and made["mfu_error"] == calibrate.error()
    assert 0 < made["hbm_bytes"] < made["hbm_limit_bytes"] and made["bound"] in ("compute", "memory", "collectives")
    assert made["collectives"] > 0 and made["step_seconds"] > 0 and "all-gather" in told
    assert all(word in told for word in ("parameters", "optimiser", "activations", "weak scaling", "MFU"))


@compiles
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--topology=tpu:v9:2x2"], "tpu:v9:2x2: unknown topology; known: tpu:v4"),
        (["--topology=tpu:v5e:2x2", "--mesh.fsdp=3"], "mesh .*fsdp=3.*does not divide the 4 devices"),
        (["--topology=tpu:v5e:2x2", "--data.rows=6"], "data.rows=6 does not divide"),
        (["--topology=tpu:v5e:2x2", "--search", "--items=100000000000"], "none fits by estimate"),
        (["--items=0"], "--items=0: must be at least 1"),
        ([], "--topology is missing; known"),
    ],
)
def test_bad_input_is_named_with_the_way_out(options, said, capsys):
    pytest.importorskip("libtpu")
    assert main(["plan", "--config", "small", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    import re

    assert re.search(said, error), error
