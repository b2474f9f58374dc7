"""Files of AnnData and MuData: h5ad, h5mu and zarr."""

from __future__ import annotations

import warnings

import h5py
import numpy as np
import pandas as pd
import pytest

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.datasets.readers import read
from pyro_multivi.datasets.simulate import simulate_multiome


def test_h5mu_with_whole_numbers_beside_cells_and_features(tmp_path):
    pytest.importorskip("mudata")
    mdata = simulate_multiome((5, 3, 2), 10, 12, return_mudata=True)
    mdata.varm["place"] = np.arange(44).reshape(22, 2)
    mdata.obsm["place"] = np.arange(10)[:, None]
    mdata.mod["rna"].obs["own"] = 1
    with mudata_as_given():
        mdata.write_h5mu(tmp_path / "m.h5mu")
    again = read(tmp_path / "m.h5mu")
    for matrices, read_back in ((mdata.varm, again.varm), (mdata.obsm, again.obsm)):
        np.testing.assert_array_equal(read_back["place"], matrices["place"])
        assert read_back["place"].dtype == matrices["place"].dtype
    pd.testing.assert_frame_equal(again.obs, mdata.obs)
    pd.testing.assert_frame_equal(again.var, mdata.var, check_column_type=False)
    for name, part in mdata.mod.items():
        pd.testing.assert_frame_equal(again.mod[name].obs, part.obs)
        np.testing.assert_array_equal(again.mod[name].X.toarray(), part.X.toarray())


def test_h5mu_as_stored(tmp_path):
    pytest.importorskip("mudata")
    mdata = simulate_multiome((5, 3, 2), 10, 12, return_mudata=True)
    with mudata_as_given():
        mdata.write_h5mu(tmp_path / "m.h5mu")
    again = read(tmp_path / "m.h5mu")
    assert list(again.mod) == ["rna", "atac"]
    assert again.obs.columns.tolist() == mdata.obs.columns.tolist()
    assert (again.mod["atac"].X != mdata.mod["atac"].X).nnz == 0


def test_zarr_as_the_package_writes_it(tmp_path):
    pytest.importorskip("zarr")
    adata = simulate_multiome((5, 0, 0), 10, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # AnnData speaks of the default of its next version.
        adata.write_zarr(tmp_path / "cells.zarr")
    assert (read(tmp_path / "cells.zarr").X != adata.X).nnz == 0
    for path in (tmp_path / "cells.zarr" / "X").rglob("*"):
        if path.is_file() and path.name != "zarr.json":
            path.write_bytes(b"")
    with pytest.raises(ValueError, match="cells.zarr is broken"):
        read(tmp_path / "cells.zarr")


@pytest.mark.parametrize("name", ["obs", "var", "X", "X/indptr", "obs/modality"])
def test_h5ad_with_malformed_content_is_one_error_in_one_line(tmp_path, name):
    path = tmp_path / "cells.h5ad"
    simulate_multiome((5, 0, 0), 10, 12).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = 3
    with pytest.raises(ValueError, match=f"^{path} is broken, or holds what cannot be read") as caught:
        read(path)
    assert "\n" not in str(caught.value)
