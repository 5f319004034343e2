"""Meshes over several slices, and who reads which rows: of devices that are not there."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from m6rec_jax.config import Config, MeshConfig
from m6rec_jax.errors import InputError
from m6rec_jax.settings import load_config
from m6rec_jax.training.sharding import mesh_of, row_part


@dataclass(frozen=True)
class Device:
    """What the making of a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "a card"


@dataclass(frozen=True)
class Unsliced:
    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(slices, each, processes=1, platform="gpu"):
    """So many slices of so many devices, each slice run by some processes."""
    return [
        Device(s * each + d, s * processes + d * processes // each, s, platform)
        for s in range(slices)
        for d in range(each)
    ]


def along(mesh, axis):
    """Slices met along an axis, from every place."""
    moved = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    return {tuple(d.slice_index for d in line) for line in moved.reshape(len(moved), -1).T}


def test_only_the_axes_that_are_named_reach_over_slices():
    mesh = mesh_of(MeshConfig(data=4, fsdp=2, tensor=2, dcn={"data": 2, "fsdp": 2}), devices(4, 4))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2, "sequence": 1, "expert": 1, "stage": 1}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(16))
    assert along(mesh, "tensor") == {(s, s) for s in range(4)}
    assert along(mesh, "data") == {(0, 0, 2, 2), (1, 1, 3, 3)}  # two replicas in each slice, neighbours
    assert along(mesh, "fsdp") == {(0, 1), (2, 3)}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}


def test_where_no_slice_is_known_a_process_is_one():
    mesh = mesh_of(MeshConfig(stage=2, dcn={"stage": 2}), [Unsliced(n, n // 4) for n in range(8)])
    assert {tuple(d.process_index for d in line) for line in mesh.devices.reshape(4, 2)} == {(0, 1)}


@pytest.mark.parametrize(
    ("mesh", "there", "line"),
    [
        ({"dcn": {"data": 4}}, (2, 4), r"mesh.dcn=\{data: 4\} reaches over 4 slices and there are 2"),
        ({"dcn": {"data": 2}}, (1, 8), "reaches over 2 slices and there is 1"),
        ({}, (2, 4, 1, "tpu"), r"mesh.dcn names no axis and there are 2 .*\{data: 2\}"),
        ({"data": 2, "fsdp": -1, "dcn": {"fsdp": 3}}, (3, 4), None),
        ({"data": 6, "fsdp": -1, "dcn": {"fsdp": 3}}, (3, 4), "mesh.dcn.fsdp=3 does not divide the 2 devices along mesh.fsdp"),
    ],
)  # fmt: skip
def test_factors_that_do_not_fit_the_slices_are_named(mesh, there, line):
    if line is None:
        assert mesh_of(MeshConfig(**mesh), devices(*there)).shape["fsdp"] == 6
        return
    with pytest.raises(InputError, match=line) as error:
        mesh_of(MeshConfig(**mesh), devices(*there))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dcn", "line"),
    [
        ({"rows": 2}, "mesh.dcn.rows=2: unknown axis; known: data, fsdp"),
        ({"tensor": 0}, "mesh.dcn.tensor=0: must be above 0"),
        ({"tensor": 2}, "mesh.dcn.tensor=2 does not divide mesh.tensor=1"),
    ],
)
def test_a_factor_that_no_mesh_can_have_is_refused_when_read(dcn, line):
    with pytest.raises(InputError, match=line):
        MeshConfig(dcn=dcn)


def test_factors_come_from_files_and_from_the_command_line(tmp_path):
    file = tmp_path / "slices.yaml"
    file.write_text("mesh: {data: 8, dcn: {data: 4}}")
    config = load_config([file])
    assert config.mesh.dcn == {"data": 4} and Config.from_dict(config.as_dict()) == config
    assert load_config([], ["--mesh.dcn={data: 2}"]).mesh.dcn == {"data": 2}


@pytest.mark.parametrize(
    ("mesh", "processes", "parts"),
    [
        (MeshConfig(data=8), 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (MeshConfig(data=2, tensor=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (MeshConfig(data=1, sequence=8), 4, [(0, 1)] * 4),
        (MeshConfig(data=2, fsdp=2, stage=2), 2, [(0, 2), (1, 2)]),
    ],
)
def test_processes_that_hold_the_same_rows_read_the_same_part(mesh, processes, parts):
    made = mesh_of(mesh, devices(1, 8, processes))
    assert [row_part(made, process) for process in range(processes)] == parts


def test_rows_that_overlap_between_processes_are_refused():
    made = mesh_of(MeshConfig(data=3, tensor=2), devices(1, 6, 2)[:6])
    with pytest.raises(InputError, match="some processes share a part of their rows"):
        row_part(made, 0)
