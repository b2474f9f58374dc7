"""Likely mistakes are said once, at setup, with what to do."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.cautions import _cut, _ends


def warned(setup, data, **keys) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = setup(data, **keys)
    found = [str(each.message) for each in caught if each.category is UserWarning]
    assert all(sentence in report.notes and "\n" not in sentence for sentence in found)
    return found


def test_nothing_is_said_of_good_data():
    adata = pm.simulate_multiome((60, 20, 20), n_genes=12, n_regions=40, n_batches=2, seed=0)
    assert warned(pm.MULTIVI.setup_anndata, adata, modality_key="modality", batch_key="batch") == []


def test_cells_marked_as_measured_without_a_count():
    adata = pm.simulate_multiome((20, 20, 20), n_genes=20, n_regions=30, seed=0)
    adata.obs["modality"] = "paired"
    rna, atac = warned(pm.MULTIVI.setup_anndata, adata, modality_key="modality")
    assert rna.startswith("20 of the 60 cells said to have RNA have no count in adata.X: 'cell_40'")
    assert atac.startswith("20 of the 60 cells said to have ATAC have no count in adata.X: 'cell_20'")


def test_few_paired_cells_and_a_batch_for_each_modality():
    adata = pm.simulate_multiome((20, 60, 60), n_genes=12, n_regions=40, seed=0)
    few, same = warned(pm.MULTIVI.setup_anndata, adata, modality_key="modality", batch_key="modality")
    assert few.startswith("Only 20 of 140 cells are paired.")
    assert same.startswith("batch_key='modality' says the same as what was measured in a cell")


def test_zeros_that_an_outer_join_filled_in():
    adata = pm.simulate_multiome((60, 20, 20), n_genes=12, n_regions=40, n_batches=2, seed=0)
    x = adata.X.toarray()
    second = (adata.obs["batch"] == "batch_1").to_numpy()
    x[np.ix_(second, [0, 1, 2])] = 0
    adata.X = x
    (filled,) = warned(pm.MULTIVI.setup_anndata, adata, modality_key="modality", batch_key="batch")
    assert filled.startswith("3 genes have no count in the ")
    assert "cells of batch 'batch_1' and many in others" in filled
    assert "join_samples" in filled
    assert warned(pm.MULTIVI.setup_anndata, adata, modality_key="modality") == []


def test_regions_that_are_called_genes():
    adata = pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=40, seed=0)
    adata.var_names = [f"chr1-{n}-{n + 9}" if "region" in name else name for n, name in enumerate(adata.var_names)]
    assert warned(pm.MULTIVI.setup_anndata, adata) == []
    rna, atac = adata[:, :12].copy(), adata[:, 12:].copy()
    adata.var["feature_types"] = ["GEX"] * 20 + ["ATAC"] * 32
    (found,) = warned(pm.MULTIVI.setup_anndata, adata)
    assert found.startswith("8 of the 20 genes in adata.X have names of regions: 'chr1-12-21', 'chr1-13-22', 'chr1-14")
    assert found.endswith("Correct adata.var['feature_types'] or feature_type_values if they are regions.")
    with mudata_as_given() as mudata:
        swapped = mudata.MuData({"rna": atac, "atac": rna})
    _, found = warned(pm.MULTIVI.setup_mudata, swapped)
    assert found.startswith("40 of the 40 genes in mdata.mod['rna'].X have names of regions: ")
    # Without types a setup does not know yet which are genes.
    del adata.var["feature_types"]
    assert warned(pm.MULTIVI.setup_anndata, adata) == []
    pm.MULTIVI(adata, n_genes=12, n_regions=40, n_hidden=4)
    shuffled = adata[:, ::-1].copy()
    assert warned(pm.MULTIVI.setup_anndata, shuffled) == []
    with pytest.warns(UserWarning, match="but 12 of the first 12 features have names of regions.* genes first"):
        pm.MULTIVI(shuffled, n_genes=12, n_regions=40, n_hidden=4)


def test_a_batch_for_each_cell():
    adata = pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=40, seed=0)
    adata.obs["name"] = adata.obs_names
    (batch,) = warned(pm.MULTIVI.setup_anndata, adata, batch_key="name")
    assert batch.startswith("batch_key='name' has 30 categories for 30 cells")
    (covariate,) = warned(pm.MULTIVI.setup_anndata, adata, categorical_covariate_keys=["name"])
    assert covariate.startswith("categorical_covariate_keys='name' has 30 categories")


def test_rna_that_is_binary_or_of_equal_depth():
    adata = pm.simulate_multiome((60, 0, 0), n_genes=20, n_regions=40, seed=0)
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    counts = adata.X.toarray()
    adata.layers["binary"] = (counts > 0).astype(np.float32)
    share = counts[:, genes] / counts[:, genes].sum(1, keepdims=True)
    adata.layers["cpm"] = counts.copy()
    adata.layers["cpm"][:, genes] = np.rint(10_000 * share)
    assert warned(pm.MULTIVI.setup_anndata, adata, layer="binary") == [
        "adata.layers['binary'] holds no RNA count above 1, as if it were binary: give the counts."
    ]
    (normalised,) = warned(pm.MULTIVI.setup_anndata, adata, layer="cpm")
    assert "sum to nearly the same" in normalised
    assert warned(pm.MULTIVI.setup_anndata, adata) == []


def test_features_of_a_type_that_is_not_named():
    adata = pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=40, seed=0)
    adata.var["kind"] = adata.var["feature_types"].astype(str).replace("Peaks", "cCRE")
    (left_out,) = warned(
        pm.MULTIVI.setup_anndata, adata, feature_type_key="kind", feature_type_values={"genes": "Gene Expression"}
    )
    assert left_out.startswith("40 features are left out, of kind 'cCRE' (40): feature_type_values names genes")


@pytest.mark.parametrize(
    ("of_rna", "of_atac", "ends"),
    [
        ("{}-1", "{}-1-0", "suffix '-0'"),
        ("{}-1_rna", "{}-1_atac", "suffix '_rna' and '_atac'"),
        ("{}-1", "{}", "suffix '-1'"),
        ("{}-1", "fragments#{}-1", "another prefix"),
    ],
)
def test_barcodes_that_match_once_an_end_is_cut(of_rna, of_atac, ends):
    mudata = pytest.importorskip("mudata")
    adata = pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=40, seed=0)
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    barcodes = ["".join(np.random.default_rng(i).choice(list("ACGT"), 16)) for i in range(30)]
    parts = {"rna": adata[:, genes].copy(), "atac": adata[:, ~genes].copy()}
    for name, form in (("rna", of_rna), ("atac", of_atac)):
        parts[name].obs_names = [form.format(barcode) for barcode in barcodes]
        parts[name].obs = parts[name].obs[[]]
    with mudata_as_given():
        (sentence,) = warned(pm.MULTIVI.setup_mudata, mudata.MuData(parts))
    assert sentence.startswith("0 cells are paired, but 30 of the 30 cells of one modality have the same name")
    assert f"({ends})" in sentence


def test_other_cells_do_not_match():
    assert _cut("AAAC-1-0", 1) == "AAAC-1"
    assert _cut("rna_ACGTACGTA-1", 3) == "ACGTACGTA-1"
    assert _cut("rna_007", 3) == "rna_007"  # what is left is no barcode
    assert _ends("AAAC-1-rna", "AAAC-1-atac") == "suffix '-rna' and '-atac'"


def test_a_modality_of_a_mudata_without_cells():
    mudata = pytest.importorskip("mudata")
    adata = pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=40, seed=0)
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    adata.obs = adata.obs[[]]
    with warnings.catch_warnings():
        # anndata before 0.11 says so of every index without names.
        warnings.filterwarnings("ignore", message="Transforming to str index")
        no_cells, no_genes = adata[:0, genes].copy(), adata[:, genes][:, :0].copy()
    with mudata_as_given():
        mdata = mudata.MuData({"rna": no_cells, "atac": adata[:, ~genes].copy()})
        (sentence,) = warned(pm.MULTIVI.setup_mudata, mdata)
        assert sentence.startswith("No cell was measured for RNA")
        none = mudata.MuData({"rna": no_genes, "atac": adata[:, ~genes].copy()})
        (sentence,) = warned(pm.MULTIVI.setup_mudata, none)
        assert sentence.startswith("mdata.mod['rna'] has no features")
        other = mudata.MuData({"rna": adata[:, genes].copy(), "tiles": adata[:, ~genes].copy()})
        (sentence,) = warned(pm.MULTIVI.setup_mudata, other)
        assert sentence.startswith("'tiles' of mdata.mod (40 features) left out")


def test_a_warning_points_at_the_line_of_the_caller():
    adata = pm.simulate_multiome((10, 30, 30), n_genes=12, n_regions=40, seed=0)
    with pytest.warns(UserWarning, match="are paired") as caught:
        pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    assert {warning.filename for warning in caught} == {__file__}


def test_zeros_of_features_without_a_type_may_be_those_of_a_modality():
    adata = pm.simulate_multiome((0, 40, 40), n_genes=20, n_regions=30, seed=0)
    [message] = warned(pm.MULTIVI.setup_anndata, adata, batch_key="modality")
    assert "join_samples" not in message
    del adata.var["feature_types"]
    [message] = warned(pm.MULTIVI.setup_anndata, adata, batch_key="modality")
    assert re.match(r"\d+ features have no count in the 40 cells of batch .* \(an outer join\)\. .*", message)
    assert message.endswith("nothing is to be done: n_genes and n_regions of MULTIVI() tell it.")
