import numpy as np
import pytest
import torch

from pyro_multivi.data import table as table_module
from pyro_multivi.data.marginals import LIBRARY_LOG_VAR_FLOOR, Marginals
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable

N, G, M, K = 12, 5, 7, 3


def _compressed(dense: np.ndarray) -> SparseCounts:
    counts = SparseCounts.from_dense(torch.from_numpy(dense))
    return SparseCounts(counts.crow, counts.col.int(), counts.val, dense.shape)


@pytest.fixture
def dense() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    has_rna, has_atac = np.arange(N) % 3 != 0, np.arange(N) % 4 != 0
    has_atac |= ~has_rna
    batch = np.array([0, 1] * (N // 2))
    return {
        "x": (rng.poisson(1.5, (N, G)) * has_rna[:, None]).astype(np.float32),
        "y": (rng.poisson(0.7, (N, M)) * has_atac[:, None]).astype(np.float32),
        "has_rna": has_rna,
        "has_atac": has_atac,
        "batch": batch,
        "design": np.eye(K, dtype=np.float32)[batch],
    }


@pytest.fixture
def table(dense: dict[str, np.ndarray]) -> CellTable:
    return CellTable(
        x=_compressed(dense["x"]),
        y=_compressed(dense["y"]),
        has_rna=torch.from_numpy(dense["has_rna"]),
        has_atac=torch.from_numpy(dense["has_atac"]),
        design=torch.from_numpy(dense["design"]),
        batch_code=torch.from_numpy(dense["batch"]),
        n_genes=G,
        n_regions=M,
        n_batch=K,
        label=torch.arange(N),
        rna_size=torch.arange(N) + 1.0,
        atac_size=torch.full((N,), 0.5),
    )


def test_batch_is_the_dense_rows_in_the_asked_order(table, dense):
    index = torch.tensor([7, 0, 7, 3])
    cells = table.batch(index)
    assert cells.n_total == N
    assert cells.x.col.dtype == cells.x.crow.dtype == torch.int32
    for name in ("x", "y", "has_rna", "has_atac", "design"):
        got = getattr(cells, name)
        got = got.to_dense() if isinstance(got, SparseCounts) else got
        np.testing.assert_array_equal(got.numpy(), dense[name][index.numpy()])
    assert cells.index.tolist() == [7, 0, 7, 3]
    assert cells.label.tolist() == [7, 0, 7, 3]
    assert cells.rna_size.tolist() == [8.0, 1.0, 8.0, 4.0]
    assert table.batch(index, n_total=9).n_total == 9


def test_absent_modality_keeps_its_width(dense):
    table = CellTable(
        x=None,
        y=_compressed(dense["y"]),
        has_rna=torch.zeros(N, dtype=torch.bool),
        has_atac=torch.ones(N, dtype=torch.bool),
        design=torch.ones(N, 1),
        batch_code=torch.zeros(N, dtype=torch.long),
        n_genes=G,
        n_regions=M,
    )
    cells = table.batch(torch.tensor([2, 5]))
    assert cells.x.shape == (2, G)
    assert cells.x.to_dense().sum() == 0
    assert cells.label is None
    assert cells.rna_size is None
    marginals = table.marginals()
    torch.testing.assert_close(marginals.gene_share, torch.full((G,), 1 / G))
    assert marginals.library_log_mean.tolist() == [0.0]
    assert marginals.library_log_var.tolist() == [1.0]
    assert marginals.rna_log_depth_mean == 0.0


def test_marginals_are_the_plain_formulas(table, dense, monkeypatch):
    monkeypatch.setattr(table_module, "_BLOCK", 5)  # several blocks, the last one short
    marginals = table.marginals()
    x, y = dense["x"][dense["has_rna"]], dense["y"][dense["has_atac"]]
    share = (x.sum(0) + 0.5) / (x.sum() + 0.5 * G)
    np.testing.assert_allclose(marginals.gene_share, share, rtol=1e-6)
    mu = x.sum(1, keepdims=True) * share
    inverse = (((x - mu) ** 2 - x).sum(0) + 10) / ((mu**2).sum(0) + 10)
    np.testing.assert_allclose(marginals.inverse_dispersion, 1 / np.clip(inverse, 0.01, 100), rtol=1e-5)
    np.testing.assert_allclose(marginals.detection_rate, ((y > 0).sum(0) + 0.5) / (len(y) + 1), rtol=1e-6)
    log_library = np.log(np.maximum(x.sum(1), 1))
    batch = dense["batch"][dense["has_rna"]]
    groups = [log_library[batch == 0], log_library[batch == 1], log_library]  # no cell is of batch 2
    np.testing.assert_allclose(marginals.library_log_mean, [g.mean() for g in groups], rtol=1e-6)
    expected = [max(g.var(), LIBRARY_LOG_VAR_FLOOR) for g in groups]
    np.testing.assert_allclose(marginals.library_log_var, expected, rtol=1e-5)
    assert marginals.rna_log_depth_mean == pytest.approx(np.log1p(x.sum(1)).mean())
    assert marginals.atac_log_depth_mean == pytest.approx(np.log1p((y > 0).sum(1)).mean())


def test_unmeasured_cells_do_not_count(table):
    everyone = table.marginals()
    measured_only = Marginals.of([table.batch(torch.nonzero(table.has_rna).squeeze(1))], K)
    torch.testing.assert_close(everyone.gene_share, measured_only.gene_share)
    torch.testing.assert_close(everyone.library_log_mean, measured_only.library_log_mean)


def test_only_measured_cells_count_whatever_the_others_hold():
    cells = Cells(
        index=torch.arange(2),
        n_total=2,
        x=torch.tensor([[1.0, 1.0], [9.0, 0.0]]),
        y=torch.tensor([[1.0], [1.0]]),
        has_rna=torch.tensor([True, False]),
        has_atac=torch.tensor([True, False]),
        design=torch.ones(2, 1),
    )
    marginals = Marginals.of([cells], n_batch=1)
    assert marginals.gene_share.tolist() == [0.5, 0.5]
    assert marginals.detection_rate.tolist() == [0.75]


def test_empty_observed_cell_has_log_library_zero_and_variance_is_floored():
    cells = Cells(
        index=torch.arange(2),
        n_total=2,
        x=torch.zeros(2, 3),
        y=torch.zeros(2, 2),
        has_rna=torch.tensor([True, True]),
        has_atac=torch.tensor([False, False]),
        design=torch.ones(2, 1),
    )
    marginals = Marginals.of([cells], n_batch=1)
    assert marginals.library_log_mean.tolist() == [0.0]
    assert marginals.library_log_var.tolist() == pytest.approx([LIBRARY_LOG_VAR_FLOOR])
    assert marginals.detection_rate.tolist() == [0.5, 0.5]
    assert marginals.atac_log_depth_mean == 0.0


def test_dispersion_is_that_of_the_counts():
    n, theta = 4000, np.array([0.5, 2.0, 8.0, 8.0])
    rng = np.random.default_rng(0)
    # Poisson, with a depth that varies by itself, for the last; 0.001 counts a cell say nothing of the first.
    mu = rng.lognormal(0, 0.5, n)[:, None] * np.array([0.001, 5.0, 10.0, 20.0])
    x = np.concatenate([rng.poisson(rng.gamma(theta, mu / theta)), rng.poisson(4000 * mu[:, :1] / 0.001)], 1)
    cells = Cells(
        index=torch.arange(n), n_total=n, x=torch.from_numpy(x).float(), y=torch.zeros(n, 1),
        has_rna=torch.ones(n, dtype=torch.bool), has_atac=torch.zeros(n, dtype=torch.bool), design=torch.ones(n, 1),
    )  # fmt: skip
    found = Marginals.of([cells], n_batch=1).inverse_dispersion.numpy()
    assert found[0] == pytest.approx(1, abs=0.01)
    # Over 4000 cells the moment estimate has a standard error of about 5 %; depth is itself estimated from counts.
    np.testing.assert_allclose(found[1:4], theta[1:], rtol=0.15)
    assert found[4] > 90


def test_marginals_need_cells():
    with pytest.raises(ValueError, match="no cells were given"):
        Marginals.of([], n_batch=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"design": torch.ones(3, 1)}, "design holds 3 cells and batch_code 12"),
        ({"n_genes": 6}, "x has 5 columns and n_genes is 6"),
        ({"cell_names": ("a", "b")}, "cell_names holds 2 names and batch_code 12 cells"),
        ({"y": None}, "y is None, yet 10 cells are marked"),
        ({"has_rna": torch.zeros(N, dtype=torch.bool)}, "x holds counts of 8 cells that are marked as not measured"),
    ],
)
def test_parts_that_do_not_belong_together(table, change, message):
    parts = {name: getattr(table, name) for name in CellTable.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        CellTable(**{**parts, **change})


def test_n_batch_defaults_to_the_largest_code(table):
    parts = {name: getattr(table, name) for name in CellTable.__dataclass_fields__}
    assert CellTable(**{**parts, "n_batch": 0}).n_batch == 2
