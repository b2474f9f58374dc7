"""Proteins from obsm or a modality of a MuData: where they lie, what was measured, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.spec import DataSpec

NAMES = ["CD3", "CD4", "CD8"]


@pytest.fixture
def counts(mosaic):
    return np.random.default_rng(0).poisson(5.0, size=(mosaic.n_obs, 3)).astype(np.float32) + 1


def set_up(adata, **more):
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "adt"}
    return pm.MULTIVI.setup_anndata(adata, **{**keys, **more})


def table_of(data):
    return DataSpec.of(data).table(data)


@pytest.mark.parametrize("kind", ["frame", "array", "csr", "named"])
def test_any_matrix_of_obsm_will_do(mosaic, counts, kind):
    forms = {"frame": lambda x: pd.DataFrame(x, index=mosaic.obs_names, columns=NAMES), "csr": sp.csr_matrix}
    mosaic.obsm["adt"] = forms.get(kind, np.asarray)(counts)
    mosaic.uns["names"] = np.array(NAMES)
    report = set_up(mosaic, protein_names_uns_key="names" if kind == "named" else None)
    spec = DataSpec.of(mosaic)
    assert spec.extra == {"protein": tuple(NAMES) if kind in ("frame", "named") else ("0", "1", "2")}
    values, measured = spec.table(mosaic).extra["protein"]
    np.testing.assert_array_equal(values, counts)
    assert measured.all()
    assert f"3 proteins measured in {mosaic.n_obs} cells." in report.notes
    assert DataSpec.from_dict(spec.to_dict()) == spec


def test_rows_without_counts_and_zeros_of_a_whole_batch_were_not_measured(mosaic, counts):
    counts[::4] = 0
    counts[1::4] = np.nan
    in_second = (mosaic.obs["batch"] == mosaic.obs["batch"].unique()[1]).to_numpy()
    name = str(mosaic.obs["batch"].unique()[1])
    counts[in_second, 2] = 0
    counts[~in_second, 1] *= 2
    mosaic.obsm["adt"] = pd.DataFrame(counts, index=mosaic.obs_names, columns=NAMES)
    report = set_up(mosaic)
    values, measured = (part.numpy() for part in table_of(mosaic).extra["protein"])
    seen = (np.nan_to_num(counts) > 0).any(1)
    np.testing.assert_array_equal(measured, seen)
    assert np.isnan(values[seen & in_second, 2]).all()
    np.testing.assert_array_equal(values[seen & ~in_second], counts[seen & ~in_second])
    assert DataSpec.of(mosaic).missing_proteins == {name: ("CD8",)}
    assert any(f"1 of 3 proteins have no count in batch {name!r}" in note and "'CD8'" in note for note in report.notes)
    assert any("the other" in note and "not measured" in note for note in report.notes)

    # What a batch measured is known from the cells of training, not from a few others.
    few = mosaic[seen & ~in_second][:2].copy()
    few.obsm["adt"]["CD8"] = 0.0
    spec = DataSpec.of(mosaic)
    assert not np.isnan(spec.table(few).extra["protein"].values.numpy()).any()
    # And a batch that has it after all, has it.
    late = mosaic[seen & in_second].copy()
    late.obsm["adt"]["CD8"] = 1.0
    assert not np.isnan(spec.table(late).extra["protein"].values.numpy()).any()


@pytest.mark.parametrize("dtype", [None, "Int64", "Float32", "object"])
def test_single_entries_may_be_missing(mosaic, counts, dtype):
    counts[3, 1] = np.nan
    mosaic.obsm["adt"] = counts if dtype is None else pd.DataFrame(counts, mosaic.obs_names).astype(dtype)
    set_up(mosaic)
    values, measured = table_of(mosaic).extra["protein"]
    assert measured.all()
    np.testing.assert_array_equal(values, counts)


def test_a_batch_without_any_protein_counts_as_not_stained(mosaic, counts):
    first = (mosaic.obs["batch"] == mosaic.obs["batch"].unique()[0]).to_numpy()
    counts[first] = 0
    mosaic.obsm["adt"] = counts
    set_up(mosaic)
    np.testing.assert_array_equal(table_of(mosaic).extra["protein"].measured, ~first)
    assert DataSpec.of(mosaic).missing_proteins == {}


def test_a_cell_with_proteins_alone_is_a_cell(mosaic, counts):
    mosaic.obs["modality"] = mosaic.obs["modality"].astype(str)
    mosaic.obs.loc[mosaic.obs_names[-3:], "modality"] = "protein"
    x = mosaic.X.tolil()
    x[-3:] = 0
    mosaic.X = x.tocsr()
    counts[:-10] = 0
    mosaic.obsm["adt"] = counts
    report = set_up(mosaic)
    assert report.n_cells["protein"] == 3
    assert sum(report.n_cells.values()) == mosaic.n_obs
    assert "3 proteins only" in str(report)
    report = set_up(mosaic, modality_key=None)
    assert report.n_cells["protein"] == 3
    counts[-3:] = 0
    mosaic.obsm["adt"] = counts
    with pytest.raises(ValueError, match="3 of .* cells have nothing measured, neither RNA nor ATAC nor proteins"):
        set_up(mosaic)


@pytest.mark.parametrize("layer", [None, "raw"])
def test_a_modality_of_a_mudata(layer):
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=8, n_regions=9, n_proteins=4, stained=0.5, return_mudata=True)
    part = mdata.mod["protein"]
    if layer is not None:
        part.layers["raw"], part.X = part.X, part.X.log1p()
    pm.MULTIVI.setup_mudata(mdata, protein_layer=layer, modalities={"protein_layer": "protein"})
    spec = DataSpec.of(mdata)
    assert spec.extra == {"protein": tuple(part.var_names)}
    values, measured = spec.table(mdata).extra["protein"]
    np.testing.assert_array_equal(measured, mdata.obs["has_protein"])
    kept = mdata.obsm["protein_expression"].to_numpy()
    np.testing.assert_array_equal(values, kept)


def test_a_mudata_of_two_modalities_is_told_what_they_are(counts, mosaic):
    genes = mosaic[mosaic.obs["modality"] != "accessibility", mosaic.var["feature_types"] == "Gene Expression"].copy()
    adt = AnnData(counts, obs=mosaic.obs[[]], var=pd.DataFrame(index=NAMES))
    with mudata_as_given() as mudata:
        mdata = mudata.MuData({"rna": genes, "adt": adt})
    report = pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "protein_layer": "adt"})
    assert report.n_regions == 0
    for modalities, message in (
        ({"rna_layer": "rna", "protein_layer": "rna"}, "'rna' cannot be both RNA and proteins"),
        (
            {"rna_layer": "rna", "protein_layer": "atd"},
            r"modalities\['protein_layer'\] is 'atd', which is not in mdata.mod",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pm.MULTIVI.setup_mudata(mdata, modalities=modalities)
    with pytest.raises(ValueError, match="protein_layer='raw' was given, but modalities does not name its modality"):
        pm.MULTIVI.setup_mudata(mdata, protein_layer="raw", modalities={"rna_layer": "rna"})
    with pytest.raises(ValueError, match=r"protein_layer='raw' is not in mdata.mod\['adt'\].layers"):
        pm.MULTIVI.setup_mudata(mdata, protein_layer="raw", modalities={"rna_layer": "rna", "protein_layer": "adt"})


def replaced(value, row=2, column=1):
    def change(counts):
        counts[row, column] = value
        return counts

    return change


def column_of(value):
    def change(counts):
        counts[:, 1] = value
        return counts

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (np.log1p, "not a whole number, for instance .* and protein 'CD.'. The background of proteins is mod.*CLR"),
        (replaced(0.5), r"not a whole number, for instance 0.5 for cell 'cell_\w+' and protein 'CD4'"),
        (replaced(-1), r"negative, for instance -1 for cell 'cell_\w+' and protein 'CD4'"),
        (replaced(np.inf), "infinite"),
        (replaced(2e6), "above 1,000,000"),
        (column_of(0), "1 of 3 proteins have no count in any cell, so that no batch measured them: 'CD4'. Leave"),
        (column_of(np.nan), "1 of 3 proteins have no count in any cell"),
        (column_of(4), "1 of 3 proteins have the same count in every cell: 'CD4'. Leave them out"),
        (np.zeros_like, "holds no count in any cell: leave proteins out of the setup"),
    ],
)  # fmt: skip
def test_what_are_no_counts_of_proteins_is_refused(mosaic, counts, change, message):
    values = change(counts)
    mosaic.obsm["adt"] = pd.DataFrame(values, index=mosaic.obs_names, columns=NAMES)
    before = dict(mosaic.uns)
    with pytest.raises(ValueError, match=message) as error:
        set_up(mosaic)
    assert "adata.obsm['adt']" in str(error.value)
    assert dict(mosaic.uns) == before


def test_names_that_do_not_fit_are_refused(mosaic, counts):
    mosaic.obsm["adt"] = counts
    for names, message in (
        (["CD3", "CD4"], "has 3 columns and 2 names were given for them"),
        (["CD3", "CD4", "CD4"], "has several columns of the name 'CD4'"),
        (np.ones((2, 2)), r"adata.uns\['names'\] has shape \(2, 2\): give a flat list"),
    ):
        mosaic.uns["names"] = np.asarray(names)
        with pytest.raises(ValueError, match=message):
            set_up(mosaic, protein_names_uns_key="names")
    with pytest.raises(ValueError, match="protein_names_uns_key='nams' is not in adata.uns"):
        set_up(mosaic, protein_names_uns_key="nams")
    with pytest.raises(ValueError, match="give protein_expression_obsm_key too"):
        set_up(mosaic, protein_expression_obsm_key=None, protein_names_uns_key="names")
    with pytest.raises(ValueError, match="protein_expression_obsm_key='atd' is not in adata.obsm"):
        set_up(mosaic, protein_expression_obsm_key="atd")
    mosaic.obsm["protein"] = counts
    with pytest.raises(ValueError, match="extra_obsm_keys holds 'protein'"):
        set_up(mosaic, extra_obsm_keys=["protein"])


def test_other_cells_are_matched_by_name(mosaic, counts):
    mosaic.obsm["adt"] = pd.DataFrame(counts, index=mosaic.obs_names, columns=NAMES)
    set_up(mosaic)
    spec = DataSpec.of(mosaic)
    other = mosaic[:10].copy()
    other.obsm["adt"] = other.obsm["adt"][["CD8", "CD3", "CD4"]].assign(more=1.0)
    np.testing.assert_array_equal(spec.table(other).extra["protein"].values, counts[:10])
    other.obsm["adt"] = other.obsm["adt"][["CD8", "CD3"]]
    with pytest.raises(ValueError, match="lacks 1 of the model's 3 features: 'CD4'"):
        spec.table(other)
    del other.obsm["adt"]
    assert not spec.table(other).extra["protein"].measured.any()


def test_a_change_in_place_is_found_out(mosaic, counts):
    counts[0, 0] = np.nan
    mosaic.obsm["adt"] = counts
    set_up(mosaic)
    model = pm.MULTIVI(mosaic, n_hidden=8, n_latent=2)
    mosaic.obs["note"] = 1
    model.minibatch([0])
    mosaic.obsm["adt"][1, 1] += 1
    with pytest.raises(ValueError, match="'protein' holds other values"):
        model.minibatch([0])


@pytest.mark.parametrize("sparse", [False, True])
def test_antibodies_of_a_10x_file_are_moved_to_obsm(sparse):
    adata = pm.simulate_multiome((20, 0, 0), n_genes=6, n_regions=7, n_proteins=3, seed=0)
    proteins = adata.obsm.pop("protein_expression")
    kinds = [*adata.var["feature_types"], *["Antibody Capture"] * 3]
    var = pd.DataFrame({"feature_types": kinds}, index=[*adata.var_names, *proteins.columns])
    counts = sp.hstack([adata.X, sp.csr_matrix(proteins.to_numpy())]).tocsr()
    tenx = AnnData(counts if sparse else counts.toarray(), obs=adata.obs[[]], var=var)
    tenx.layers["counts"] = tenx.X.copy()
    report = pm.MULTIVI.setup_anndata(tenx.copy())
    assert any("'Antibody Capture' are ignored. pyro_multivi.organize_cite_seq_10x" in note for note in report.notes)
    moved = pm.organize_cite_seq_10x(tenx, copy=True)
    assert tenx.n_vars == 16
    assert pm.organize_cite_seq_10x(tenx) is None
    for found in (moved, tenx):
        assert found.layers["counts"].shape == (20, 13)
        np.testing.assert_array_equal(found.obsm["protein_expression"], proteins)
        assert list(found.obsm["protein_expression"].columns) == list(proteins.columns)
        pm.MULTIVI.setup_anndata(found, protein_expression_obsm_key="protein_expression")
    with pytest.raises(ValueError, match="is there already"):
        pm.organize_cite_seq_10x(tenx)
    del tenx.obsm["protein_expression"]
    with pytest.raises(ValueError, match="No feature of adata is of the type 'Antibody Capture'"):
        pm.organize_cite_seq_10x(tenx)
    with pytest.raises(TypeError, match="adata must be an AnnData"):
        pm.organize_cite_seq_10x(3)


def test_proteins_called_present_or_absent_are_warned_of(mosaic, counts):
    mosaic.obsm["adt"] = (counts > 5).astype(np.float32)
    with pytest.warns(UserWarning, match=r"No count of adata.obsm\['adt'\] is above 1.*raw counts"):
        set_up(mosaic)
