"""Measurements besides RNA and ATAC, from obsm or a modality to the minibatch."""

from __future__ import annotations

import json
import logging

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi import MULTIVI
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.setup.spec import DataSpec

NAMES = ["CD3", "CD4", "CD8"]


@pytest.fixture
def proteins(mosaic):
    values = np.random.default_rng(0).poisson(5.0, size=(mosaic.n_obs, 3)).astype(np.float32)
    values[::4] = np.nan
    return values


@pytest.fixture
def stained(mosaic, proteins):
    mosaic.obsm["protein"] = pd.DataFrame(proteins, index=mosaic.obs_names, columns=NAMES)
    return mosaic


def set_up(adata, keys=("protein",)):
    return MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", extra_obsm_keys=keys)


def test_values_reach_the_minibatch(stained, proteins):
    report = set_up(stained)
    assert any("'protein': 3 features measured in 45 cells" in note for note in report.notes)
    cells = MULTIVI(stained, n_hidden=4, n_latent=2).minibatch([4, 1, 7])
    values, measured = cells.extra["protein"]
    assert measured.tolist() == [False, True, True]
    np.testing.assert_array_equal(values, np.nan_to_num(proteins[[4, 1, 7]]))
    assert torch.equal(cells.measured("protein"), measured)
    assert torch.equal(cells.measured("x"), cells.has_rna)
    assert cells.measured("anything").all()
    assert np.isnan(stained.obsm["protein"].iloc[0]).all(), "the data were changed"


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_matrix, sp.csc_array, lambda m: np.asarray(m, dtype=np.float64)])
def test_arrays_and_sparse_matrices_will_do(mosaic, proteins, kind):
    mosaic.obsm["protein"] = kind(np.nan_to_num(proteins))
    set_up(mosaic)
    spec = DataSpec.of(mosaic)
    assert spec.extra == {"protein": ("0", "1", "2")}
    values, measured = spec.table(mosaic).extra["protein"]
    assert measured.all()
    np.testing.assert_array_equal(values, np.nan_to_num(proteins))
    assert values.dtype == torch.float32


def test_the_program_knows_the_width_and_files_keep_the_names(stained, tmp_path):
    set_up(stained)
    model = MULTIVI(stained, n_hidden=4, n_latent=2)
    assert model.program.config.extra == {"protein": 3}
    assert DataSpec.from_dict(json.loads(json.dumps(model.spec.to_dict()))) == model.spec
    model.save(tmp_path / "model")
    assert MULTIVI.load(tmp_path / "model", stained).spec.extra == {"protein": tuple(NAMES)}


def test_other_cells_are_matched_by_name(stained, proteins):
    set_up(stained)
    spec = DataSpec.of(stained)
    other = stained.copy()
    other.obsm["protein"] = stained.obsm["protein"][["CD8", "CD3", "CD4"]].assign(more=1.0)
    values, _ = spec.table(other).extra["protein"]
    np.testing.assert_array_equal(values, np.nan_to_num(proteins))
    other.obsm["protein"] = stained.obsm["protein"][["CD8", "CD3"]]
    with pytest.raises(ValueError, match=r"adata.obsm\['protein'\] lacks 1 of the model's 3 features: 'CD4'"):
        spec.table(other)


def test_cells_without_it_count_as_not_measured(stained, caplog):
    set_up(stained)
    spec = DataSpec.of(stained)
    other = stained.copy()
    del other.obsm["protein"]
    with caplog.at_level(logging.INFO, "pyro_multivi"):
        values, measured = spec.table(other).extra["protein"]
    assert values.shape == (60, 3)
    assert not measured.any()
    assert "There is no 'protein'" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: np.where(np.arange(3) == 1, np.nan, m), "NaN or infinite values in 45 cells: .*NaN in every column"),
        (lambda m: np.nan_to_num(m) / 0.0 + 1.0, "NaN or infinite values"),
        (lambda m: m.astype(str), "holds values that are no numbers"),
        (lambda m: np.zeros((len(m), 3, 2)), r"has shape \(60, 3, 2\) and must have shape \(cells, features\)"),
    ],
    ids=["gap", "infinite", "words", "cube"],
)
def test_what_is_no_measurement_is_refused(mosaic, proteins, change, message):
    with np.errstate(all="ignore"):
        values = change(proteins)
    mosaic.obsm["protein"] = np.where(values == "nan", "low", values) if values.dtype.kind == "U" else values
    with pytest.raises(ValueError, match=message):
        set_up(mosaic)


def test_a_key_that_is_not_there_is_named(stained):
    with pytest.raises(ValueError, match="extra_obsm_keys='protien' is not in adata.obsm.*protein"):
        set_up(stained, ["protien"])


def test_a_modality_of_a_mudata(mosaic, proteins):
    mudata = pytest.importorskip("mudata")
    from anndata import AnnData

    measured = ~np.isnan(proteins[:, 0])
    gene = (mosaic.var["feature_types"] == "Gene Expression").to_numpy()
    has = mosaic.obs["modality"].astype(str)
    parts = {
        "rna": mosaic[(has != "accessibility").to_numpy(), gene].copy(),
        "atac": mosaic[(has != "expression").to_numpy(), ~gene].copy(),
        "adt": AnnData(sp.csr_matrix(proteins[measured]), obs=mosaic.obs[measured][[]], var=pd.DataFrame(index=NAMES)),
    }
    with mudata_as_given():
        mdata = mudata.MuData(parts)
    MULTIVI.setup_mudata(mdata, extra_modalities=["adt"])
    spec = DataSpec.of(mdata)
    assert spec.extra == {"adt": tuple(NAMES)}
    found = spec.table(mdata).extra["adt"]
    place = mosaic.obs_names.get_indexer(mdata.obs_names)
    np.testing.assert_array_equal(found.measured, measured[place])
    np.testing.assert_array_equal(found.values, np.nan_to_num(proteins)[place])
    with pytest.raises(ValueError, match="extra_modalities='adtt' is not in mdata.mod"):
        MULTIVI.setup_mudata(mdata, extra_modalities=["adtt"])
    with pytest.raises(ValueError, match="extra_modalities=.* holds 'adt' more than once"):
        MULTIVI.setup_mudata(mdata, extra_modalities=["adt", "adt"])
    mdata.mod["adt"].var_names = ["CD3", "CD4", "CD3"]
    with pytest.raises(ValueError, match="has several columns of the name 'CD3'"):
        MULTIVI.setup_mudata(mdata, extra_modalities=["adt"])


def test_parts_of_another_length_are_refused(stained):
    set_up(stained)
    table = DataSpec.of(stained).table(stained)
    short = Measurement(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"extra\['protein'\] holds 3 and 3 cells"):
        type(table)(**{**vars(table), "extra": {"protein": short}})
