"""Counts of fragments: what is refused, what is warned of, and reads turned into them."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

import pyro_multivi as pm
from pyro_multivi.data.fragments.reads import make_fragments

SIZES = {"n_cells": (30, 10, 10), "n_genes": 20, "n_regions": 40, "seed": 0}


def model_of(adata, likelihood="poisson", **setup):
    # A column of measurement patterns leaves no doubt about cells without counts.
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", **setup)
    return pm.MULTIVI(adata, n_hidden=8, n_latent=2, accessibility_likelihood=likelihood)


def simulated(**options):
    return pm.simulate_multiome(**{**SIZES, **options})


@pytest.mark.parametrize("likelihood", ["poisson", "nb", "negative_binomial"])
def test_counts_of_fragments_are_taken_without_a_word(likelihood):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = model_of(simulated(fragments=3.0), likelihood)
    assert model.program.config.counts_fragments


def test_values_that_are_not_whole_are_refused_by_cell_and_region():
    adata = simulated(fragments=3.0)
    counts = adata.X.toarray()
    counts[12, 20 + 7] = 1.5
    adata.X = sp.csr_matrix(counts)
    with pytest.raises(
        ValueError, match=r"not a whole number, for instance 1.5 for cell 'cell_12' and region 'region_07'"
    ):
        model_of(adata)
    pm.MULTIVI(adata, n_hidden=8, n_latent=2)


def test_values_that_are_not_whole_are_refused_in_other_cells_too():
    adata = simulated(fragments=3.0)
    model = model_of(adata)
    model.train(1, progress_bar=False)
    other = adata.copy()
    other.X[:, 20:] = other.X[:, 20:] * 0.5
    pm.MULTIVI.setup_anndata(other, modality_key="modality")
    with pytest.raises(ValueError, match="accessibility_likelihood counts fragments"):
        model.get_elbo(other)


def test_counts_beyond_any_cell_are_refused():
    adata = simulated(fragments=3.0)
    adata.X.data[-1] = 2e6
    with pytest.raises(ValueError, match="above 1,000,000, for instance 2e"):
        model_of(adata)


def test_binary_data_are_warned_of():
    with pytest.warns(UserWarning, match="no count above 1, as if it were binary.*leave accessibility_likelihood out"):
        model_of(simulated())


def test_reads_are_warned_of_by_name():
    with pytest.warns(UserWarning, match=r"even numbers, as of reads.*pyro_multivi.reads_to_fragments\(adata\)"):
        model_of(simulated(reads=True))


def test_reads_do_not_matter_where_only_open_or_not_is_modelled(recwarn):
    model_of(simulated(reads=True), "bernoulli")
    assert not len(recwarn)


def test_size_factors_of_probabilities_are_refused():
    adata = simulated(fragments=3.0)
    adata.obs["rna"], adata.obs["atac"] = 1.0, 0.5
    with pytest.raises(ValueError, match="size_factor_key names size factors of ATAC"):
        model_of(adata, size_factor_key=["rna", "atac"])
    model_of(adata, size_factor_key="rna")


def test_counts_need_rates_of_regions():
    with pytest.raises(ValueError, match="region_factors=False and accessibility_likelihood='nb'"):
        pm.ProgramConfig(n_genes=2, n_regions=2, accessibility_likelihood="nb", region_factors=False)


@pytest.mark.parametrize("dense", [False, True])
def test_reads_become_fragments_and_genes_stay(dense):
    adata = simulated(reads=True, fragments=4.0)
    if dense:
        adata.X = adata.X.toarray()
    before = adata.X.copy()
    pm.reads_to_fragments(adata)
    found, reads = (np.asarray(m.todense() if sp.issparse(m) else m) for m in (adata.layers["fragments"], before))
    np.testing.assert_array_equal(found[:, :20], reads[:, :20])
    np.testing.assert_array_equal(found[:, 20:], np.ceil(reads[:, 20:] / 2))
    assert abs(adata.X - before).sum() == 0
    assert sp.issparse(adata.layers["fragments"]) != dense
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_of(adata, layer="fragments")


def test_fragments_of_an_object_of_regions_alone():
    adata = simulated(reads=True)[:, 20:].copy()
    del adata.var["feature_types"]
    adata.layers["counts"] = adata.X.copy()
    pm.reads_to_fragments(adata, "counts", "f")
    np.testing.assert_array_equal(adata.layers["f"].toarray(), np.ceil(adata.X.toarray() / 2))


def test_what_is_no_count_of_reads_is_refused():
    adata = simulated(reads=True)
    with pytest.warns(UserWarning, match="are odd, as of fragments"):
        pm.reads_to_fragments(simulated(fragments=True))
    pm.reads_to_fragments(adata)
    with pytest.raises(ValueError, match=r"layers\['fragments'\] is there already"):
        pm.reads_to_fragments(adata)
    with pytest.raises(ValueError, match="read_layer='x' is no layer: choose from 'fragments'"):
        pm.reads_to_fragments(adata, "x", "other")
    adata.layers["half"] = adata.X * 0.5
    with pytest.raises(ValueError, match=r"layers\['half'\] holds 0.5 among its regions"):
        pm.reads_to_fragments(adata, "half", "other")
    adata.var["feature_types"] = "Gene Expression"
    with pytest.raises(ValueError, match="No feature of adata is a region"):
        pm.reads_to_fragments(adata, None, "other")


def test_simulated_counts_have_the_means_asked_for():
    adata = pm.simulate_multiome((400, 0, 0), n_genes=2, n_regions=50, fragments=6.0, seed=1)
    expected = 6 * adata.obsm["true_p"] * adata.obs["true_cell_factor"].to_numpy()[:, None]
    expected = expected * adata.var["true_region_factor"].to_numpy()[2:]
    found = adata.X[:, 2:].toarray()
    assert ((found - expected) / np.sqrt(expected)).mean() == pytest.approx(0, abs=0.02)
    assert (np.square(found - expected) / expected).mean() == pytest.approx(1, abs=0.05)


def test_reads_stored_in_parts_are_halved_as_a_whole():
    # 3 and 1 reads in one place, as after an unfinished sum of matrices.
    parts = sp.csr_matrix((np.array([3.0, 1.0, 2.0]), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    adata = anndata.AnnData(np.zeros((1, 2)))
    adata.X = parts.copy()
    pm.reads_to_fragments(adata)
    assert adata.layers["fragments"].toarray().tolist() == [[2, 1]]
    make_fragments(parts, np.arange(2), "X")
    assert parts.toarray().tolist() == [[2, 1]]
