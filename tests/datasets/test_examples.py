from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from pyro_multivi.datasets.examples import cell_lines


def test_cell_lines_are_raw_paired_counts():
    adata = cell_lines()
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    assert (adata.X.data == np.round(adata.X.data)).all()
    assert adata.X.data.min() >= 1
    assert adata.var["feature_types"].value_counts().to_dict() == {"Gene Expression": 3000, "Peaks": 12000}
    assert (adata.X[:, :3000].sum(1) > 0).all()
    assert (adata.X[:, 3000:].sum(1) > 0).all()
    assert "GSE126074" in adata.uns["source"]


def test_a_new_copy_each_time():
    first = cell_lines()
    first.obs["cell_type"] = "changed"
    first.X.data[:] = 0
    assert set(cell_lines().obs["cell_type"]) == {"BJ", "GM12878", "H1", "K562"}
    assert cell_lines().X.sum() > 0
