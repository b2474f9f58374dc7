"""Slices of arrays on disk are those of the array in memory, whoever decodes them."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr

from pyro_multivi.data.stores import slices as module
from pyro_multivi.data.stores.slices import slices_reader

VALUES = np.random.default_rng(0).integers(0, 1000, 5000).astype(np.int32)
SLICES = [(10, 20), (20, 20), (95, 105), (0, 5000), (390, 1210), (4999, 5000), (800, 900)]


def group_of(tmp_path, form):
    if form == "hdf5":
        group = h5py.File(tmp_path / "a.h5", "w")
        group["values"] = VALUES
        return group
    if zarr.__version__.startswith("2."):
        if form != "zarr2":
            pytest.skip("zarr 2 writes format 2 only")
        group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
        group.create_dataset("values", data=VALUES, chunks=(100,))
        return group
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2 if form == "zarr2" else 3)
    shards = {"shards": (400,)} if form == "shards" else {}
    group.create_array("values", shape=VALUES.shape, dtype=VALUES.dtype, chunks=(100,), **shards)[:] = VALUES
    return group


@pytest.mark.parametrize("form", ["hdf5", "zarr2", "zarr3", "shards"])
@pytest.mark.parametrize("at_once", [1, 120, 10**6])
def test_slices_are_those_of_the_array(tmp_path, monkeypatch, form, at_once):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    read = slices_reader(group_of(tmp_path, form), "values")
    found = list(read(SLICES))
    assert len(found) == len(SLICES)
    for (start, stop), values in zip(SLICES, found, strict=True):
        assert values.dtype == VALUES.dtype
        assert np.array_equal(values, VALUES[start:stop])
    assert list(read([])) == []


def test_a_zarr_without_joint_selections_gives_the_same(tmp_path, monkeypatch):
    group = group_of(tmp_path, "zarr2")
    monkeypatch.setattr(module, "_joins", lambda array: False)
    monkeypatch.setattr(module, "_together", lambda *_: pytest.fail("asked for slices together"))
    for (start, stop), values in zip(SLICES, slices_reader(group, "values")(SLICES), strict=True):
        assert np.array_equal(values, VALUES[start:stop])


def test_zarrs_decodes_where_it_is_installed_and_leaves_zarrs_configuration(tmp_path, monkeypatch):
    zarrs = pytest.importorskip("zarrs", reason="zarrs, of the extra scale on Python 3.11 or later, is not installed")
    group, calls = group_of(tmp_path, "shards"), []
    pipeline = zarrs.ZarrsCodecPipeline
    read_batch = pipeline.read

    async def counted(self, *arguments, **named):
        calls.append(1)
        return await read_batch(self, *arguments, **named)

    monkeypatch.setattr(pipeline, "read", counted)
    before = zarr.config.get("codec_pipeline.path")
    found = np.concatenate(list(slices_reader(group, "values")(SLICES)))
    assert calls == [1]
    assert np.array_equal(found, np.concatenate([VALUES[start:stop] for start, stop in SLICES]))
    assert zarr.config.get("codec_pipeline.path") == before
