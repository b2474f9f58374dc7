"""A table on a device: the same minibatches as on the host. The device is the CPU; test_gpu.py has the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.resident import ResidentTable, n_bytes, resident_if_it_fits
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.sparse import SparseCounts


@pytest.fixture
def table(mosaic):
    """Counts as small integers, as a specification reads them."""
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    return DataSpec.of(mosaic).table(mosaic)


def filled(table):
    """With everything that is optional."""
    n = len(table)
    return dataclasses.replace(
        table,
        label=torch.arange(n) % 3,
        rna_size=torch.rand(n),
        atac_size=torch.rand(n),
        extra={"protein": Measurement(torch.rand(n, 4), torch.arange(n) % 2 == 0)},
    )


def same(one, other):
    """Whether two minibatches hold the same, to the type of each number."""
    left, right = one.parts(), other.parts()
    assert len(left) == len(right)
    assert one.n_total == other.n_total
    assert one.extra.keys() == other.extra.keys()
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("index", [[4], [59, 0, 31], list(range(60)), [30, 31], [45, 46]], ids=str)
def test_a_minibatch_is_that_of_the_table(table, index):
    table, index = filled(table), torch.tensor(index)
    resident = ResidentTable(table, "cpu")
    assert len(resident) == len(table)
    one, other = table.batch(index, n_total=7), resident.batch(index, n_total=7)
    assert same(one, other)
    assert one.n_total == 7
    assert resident.batch(index).n_total == 60
    assert other.x.dtype == other.y.dtype == torch.float32
    for rows, has in ((other.rna_rows, other.has_rna), (other.atac_rows, other.has_atac)):
        assert torch.equal(rows, has.nonzero().squeeze(-1))


def test_a_modality_that_no_cell_has(table):
    table = dataclasses.replace(table, y=None, has_atac=torch.zeros(60, dtype=torch.bool))
    index = torch.tensor([3, 1])
    assert same(table.batch(index), ResidentTable(table, "cpu").batch(index))
    assert table.batch(index).y.shape == (2, 60)


def test_a_loop_visits_the_same_cells_in_the_same_order(table):
    options = {"batch_size": 7, "shuffle": True, "seed": 3}
    index = torch.arange(5, 50)
    loops = [Minibatches(source, index, **options) for source in (table, ResidentTable(table, "cpu"))]
    for _ in range(2):
        pairs = list(zip(*loops, strict=True))
        assert len(pairs) == 7
        assert all(same(*pair) for pair in pairs)
        assert all(cells.x._order and cells.y._order for pair in pairs for cells in pair)


def train(mosaic, monkeypatch, place):
    monkeypatch.setattr("pyro_multivi.api.training.resident_if_it_fits", place)
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.train(3, progress_bar=False, batch_size=16)
    return model


def test_training_from_it_is_training(mosaic, monkeypatch):
    one = train(mosaic, monkeypatch, lambda table, device: table)
    other = train(mosaic, monkeypatch, ResidentTable)
    for name, frame in one.history.items():
        assert name == "seconds" or frame.equals(other.history[name])
    state = other.program.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.program.state_dict().items())


def test_what_a_table_takes(table):
    table = dataclasses.replace(table, y=table.y.binary())
    x, y = (8 * 61 + 4 * len(counts.col) for counts in (table.x, table.y))
    values = len(table.x.val) * table.x.val.element_size() + 1  # of all the ones together, one byte
    rest = 60 * (1 + 1 + 4 * table.design.shape[1] + 8)
    assert n_bytes(table) == x + y + values + rest


def test_on_a_cpu_there_is_no_copy(table):
    assert resident_if_it_fits(table, torch.device("cpu")) is table


@pytest.mark.parametrize(("free", "fits"), [(2.1, True), (1.9, False)])
def test_it_goes_to_a_gpu_if_half_of_the_free_memory_holds_it(table, monkeypatch, free, fits):
    moved = object()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * n_bytes(table)), 0))
    monkeypatch.setattr("pyro_multivi.data.resident.ResidentTable", lambda table, device: moved)
    assert (resident_if_it_fits(table, torch.device("cuda")) is moved) == fits


def test_rows_travel_with_the_cells_and_are_forgotten_when_the_masks_change(table):
    cells = table.batch(torch.arange(60))
    moved = cells.to("cpu")
    assert torch.equal(moved.rna_rows, cells.rna_rows)
    other = cells.replace(has_rna=cells.has_rna & False)
    assert other.rna_rows is None
    assert other.atac_rows is cells.atac_rows
    empty = SparseCounts.from_dense(torch.zeros(60, 60))
    assert cells.replace(y=empty).atac_rows is None
    assert cells.replace(n_total=3).atac_rows is cells.atac_rows


def test_a_dtype_applies_to_floating_point_numbers_alone(table):
    cells = table.batch(torch.arange(60))
    wide = cells.to(torch.float64)
    for found, before in zip(wide.parts(), cells.parts(), strict=True):
        assert found.dtype == (torch.float64 if before.is_floating_point() else before.dtype)
        assert torch.equal(found, before.to(found.dtype))
    assert wide.x.dtype == torch.float64
