"""Construction of MULTIVI, and what every method of it holds to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pyro_multivi as pm

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 30), slice(30, 45), slice(45, 60)


RESULTS = {
    "get_latent_representation": {},
    "get_library_size_factors": {},
    "get_region_factors": {},
    "get_elbo": {},
    "get_reconstruction_error": {},
    "get_marginal_ll": {"n_mc_samples": 3},
    "get_normalized_expression": {},
    "get_accessibility_estimates": {},
}


# ---------------------------------------------------------------------- construction


def test_data_that_were_not_set_up_are_refused(mosaic):
    with pytest.raises(ValueError, match="setup_anndata"):
        pm.MULTIVI(mosaic)


@pytest.mark.parametrize(("name", "known"), [("n_genes", 40), ("n_regions", 60)])
def test_numbers_of_features_are_checked(ready, name, known, small):
    small(ready, **{name: known})
    with pytest.raises(ValueError, match=f"{name}=41, but the data set up has {known}: leave {name} out"):
        small(ready, **{name: 41})


def test_unknown_choices_are_refused_with_a_suggestion(ready, small):
    with pytest.raises(ValueError, match="gene_likelihood='znb'.*Did you mean"):
        small(ready, gene_likelihood="znb")
    with pytest.raises(ValueError, match="gene-label.*labels_key"):
        small(ready, dispersion="gene-label")


def test_a_size_factor_model_needs_size_factors(ready, small):
    with pytest.raises(ValueError, match="library='size_factor'.*size_factor_key"):
        small(ready, library="size_factor")


def test_size_factors_in_the_data_are_used(mosaic, trained):
    mosaic.obs["size"] = np.linspace(0.5, 2, 60)
    mosaic.obs["open"] = np.linspace(0.1, 0.9, 60)
    mosaic.obs.loc[mosaic.obs_names[ATAC_ONLY], "size"] = np.nan
    mosaic.obs.loc[mosaic.obs_names[RNA_ONLY], "open"] = np.nan
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality", size_factor_key=["size", "open"])
    model = trained(mosaic)
    assert model.program.config.library == "size_factor"
    found = model.get_library_size_factors()
    np.testing.assert_allclose(found["expression"], mosaic.obs["size"], rtol=1e-6)
    np.testing.assert_allclose(found["accessibility"], mosaic.obs["open"], rtol=1e-6)


@pytest.mark.parametrize("library", ["latent", "observed"])
def test_the_model_starts_at_the_marginals_of_the_data(ready, library, small):
    program = small(ready, library=library).program
    x, y = ready.X[:45, :40].toarray(), ready.X[list(range(30)) + list(range(45, 60)), 40:].toarray() > 0
    share = (x.sum(0) + 0.5) / (x.sum(0) + 0.5).sum()
    np.testing.assert_allclose(program.expression_decoder.rho.bias.detach().softmax(0), share, rtol=1e-4)
    rate = (y.sum(0) + 0.5) / (45 + 1)
    r, p = program.region_factors().detach(), program.accessibility_decoder.p.bias.detach().sigmoid()
    # p, d and r are below 1, so that the start cannot be higher than this.
    np.testing.assert_allclose(0.5 * r * p, np.minimum(rate, 0.5 * 0.95 * 0.99), rtol=1e-3)
    for code, batch in enumerate(["batch_0", "batch_1"]):
        log_total = np.log(x[(ready.obs["batch"][:45] == batch).to_numpy()].sum(1))
        assert program.library_log_mean[code].item() == pytest.approx(log_total.mean(), rel=1e-5)
        assert program.library_log_var[code].item() == pytest.approx(max(log_total.var(), 0.01), rel=1e-4)


def test_repr_tells_the_sizes(ready, small):
    model = small(ready)
    assert repr(model).startswith(
        "MULTIVI: 40 genes (zinb, dispersion gene), 60 regions (bernoulli), 2 batches; latent 2"
    )
    assert "not trained" in repr(model)
    pm.MULTIVI.setup_anndata(ready, modality_key="modality")
    assert ", 1 batch; latent 2" in repr(small(ready))


# ---------------------------------------------------------------------- what every method holds to


@pytest.mark.parametrize("method", RESULTS)
def test_an_untrained_model_warns_of_its_results_or_has_none(ready, method, small):
    model = small(ready)
    if method in ("get_latent_representation", "get_marginal_ll"):  # scvi-tools gives none either
        with pytest.raises(pm.NotTrainedError, match="not trained: call model.train"):
            getattr(model, method)(**RESULTS[method])
        return
    with pytest.warns(UserWarning, match="not trained: its results are those of random weights"):
        getattr(model, method)(**RESULTS[method])


def contents(adata):
    """Everything an AnnData holds, by name, as comparable values."""
    found = {"obs": adata.obs.copy(), "var": adata.var.copy(), "uns": repr(adata.uns), "X": adata.X.copy()}
    for part in ("layers", "obsm", "varm", "obsp"):
        found.update({f"{part}.{name}": value.copy() for name, value in getattr(adata, part).items()})
    return found


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        other = after[name]
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(value, other)
        elif sp.issparse(value):
            for part in ("data", "indices", "indptr"):
                np.testing.assert_array_equal(getattr(value, part), getattr(other, part), err_msg=name)
        else:
            assert np.array_equal(value, other), name


def test_no_method_changes_the_data_or_anything_global(ready, global_rng_untouched, tmp_path, trained):
    ready.layers["more"] = ready.X.copy()
    before = contents(ready)
    model = trained(ready)
    for method, options in RESULTS.items():
        getattr(model, method)(**options)
        assert_same(before, contents(ready))
    model.get_latent_representation(give_mean=False, n_samples=2)
    model.save(tmp_path / "model", save_anndata=True)
    pm.MULTIVI.load(tmp_path / "model", adata=ready).get_latent_representation()
    assert_same(before, contents(ready))


@pytest.mark.parametrize("method", [name for name in RESULTS if name != "get_region_factors"])
def test_cells_may_be_chosen_in_every_way(shared, method):
    names = shared.adata.obs_names
    wanted = [3, 50, 31]
    mask = np.zeros(60, dtype=bool)
    mask[wanted] = True

    def values(indices):
        result = getattr(shared, method)(indices=indices, **RESULTS[method])
        parts = list(result.values()) if isinstance(result, dict) else [result]
        return np.concatenate([np.ravel(part) for part in parts])

    by_position = values(wanted)
    np.testing.assert_array_equal(by_position, values(names[wanted]))
    np.testing.assert_array_equal(by_position, values(np.array(wanted) - 60))
    np.testing.assert_array_equal(values(sorted(wanted)), values(mask))
    np.testing.assert_array_equal(values(mask), values(pd.Series(mask, index=names)))
    np.testing.assert_array_equal(values(mask), values(pd.array(mask, dtype="boolean")))
    np.testing.assert_array_equal(values([3]), values(3))
    np.testing.assert_array_equal(values([3]), values(names[3]))


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([], ValueError, "selects no cell"),
        (np.zeros(60, dtype=bool), ValueError, "the mask is False everywhere"),
        (np.ones(59, dtype=bool), ValueError, "a mask of 59 cells and the data has 60"),
        ([60], IndexError, "holds 60, and the data has 60 cells"),
        ([-61], IndexError, "holds -61"),
        (["cell_99"], KeyError, "^indices holds 'cell_99', which is no cell of the data"),
        ([0.5], ValueError, "values of type float64"),
        ([[0, 1]], ValueError, "2 dimensions"),
    ],
    ids=str,
)
def test_cells_that_are_not_there_are_named(shared, indices, error, match):
    with pytest.raises(error, match=match):
        shared.get_latent_representation(indices=indices)


@pytest.mark.parametrize("form", [list, np.array, pd.Series])
def test_a_mask_of_numbers_is_refused(shared, form):
    """0 and 1 would be taken for the positions of the first two cells or genes."""
    mask = form([0, 1] * 30)
    for method in (shared.get_latent_representation, shared.get_normalized_expression):
        with pytest.raises(ValueError, match=r"indices holds a 0 or 1 for each of 60 names, .* \.astype\(bool\)"):
            method(indices=mask)
    with pytest.raises(ValueError, match="idx1 holds a 0 or 1 for each of 60 names"):
        shared.differential_expression(idx1=mask)
    with pytest.raises(ValueError, match="gene_list holds a 0 or 1 for each of 40 names"):
        shared.get_normalized_expression(gene_list=mask[:40])


@pytest.mark.parametrize("gap", [None, np.nan, pd.NA])
def test_a_mask_with_gaps_is_refused(shared, gap):
    mask = [True, gap, False] * 20
    for given in (pd.Series(mask, dtype=object), pd.array(mask, dtype="boolean"), np.array(mask, dtype=object)):
        with pytest.raises(ValueError, match=r"indices is a mask with 20 missing values: .*\.fillna\(False\)"):
            shared.get_latent_representation(indices=given)
    hidden = np.ma.masked_array([True] * 60, [True] + [False] * 59)
    with pytest.raises(ValueError, match=r"indices is a masked array with 1 hidden values: .*\.filled\(False\)"):
        shared.get_latent_representation(indices=hidden)
    with pytest.raises(ValueError, match="idx1 is a mask with 20 missing values"):
        shared.differential_expression(idx1=pd.array(mask, dtype="boolean"))
    assert len(shared.get_latent_representation(indices=np.ma.masked_array([3, 4]))) == 2


def test_numbers_by_name_are_positions_only_where_they_are_those_of_the_names(shared):
    names = shared.adata.obs_names
    latent = shared.get_latent_representation
    places = pd.Series([7, 3], index=names[[7, 3]])
    np.testing.assert_array_equal(latent(indices=places), latent(indices=[7, 3]))
    with pytest.raises(
        ValueError, match=r"indices is a Series of whole numbers by name, 'cell_03': 1, .*\.to_numpy\(\)"
    ):
        latent(indices=pd.Series([1, 0], index=names[[3, 7]]))


def test_a_series_in_another_order_than_the_data_is_refused(shared):
    """Its values would be taken for those of other cells or genes."""
    cells, genes = shared.adata.obs_names, list(shared.spec.gene_names)
    of_cells = pd.Series(np.arange(1.0, 61.0), index=cells)
    of_genes = pd.Series(np.arange(len(genes)) < 2, index=genes)
    expression, latent = shared.get_normalized_expression, shared.get_latent_representation
    for ordered, given in (of_cells, of_cells[::-1]), (of_cells, of_cells.rename({cells[0]: "another"})):
        np.testing.assert_allclose(expression(library_size=ordered).sum(axis=1), ordered, rtol=1e-5)
        with pytest.raises(ValueError, match=r"library_size is a Series with '.*' at position \d+.*\.loc\["):
            expression(library_size=given)
        with pytest.raises(ValueError, match="indices is a Series with"):
            latent(indices=given > 50)
        with pytest.raises(ValueError, match="idx1 is a Series with"):
            shared.differential_expression(idx1=given > 50)
    with pytest.raises(ValueError, match="gene_list is a Series with"):
        expression(gene_list=of_genes[::-1])
    # An index of something else says nothing of an order.
    assert len(latent(indices=pd.Series(of_cells.to_numpy() > 50))) == 10
    assert list(expression(gene_list=of_genes).columns) == genes[:2]


@pytest.mark.parametrize("method", [name for name in RESULTS if name != "get_region_factors"])
def test_results_do_not_depend_on_how_cells_are_cut(shared, method):
    results = [getattr(shared, method)(batch_size=size, **RESULTS[method]) for size in (7, 512)]
    left, right = [result if isinstance(result, dict) else {"": result} for result in results]
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("method", [name for name in RESULTS if name != "get_region_factors"])
def test_other_cells_may_be_given_with_features_in_another_order(shared, method):
    shuffled = shared.adata[:, np.random.default_rng(0).permutation(100)].copy()
    left, right = getattr(shared, method)(**RESULTS[method]), getattr(shared, method)(shuffled, **RESULTS[method])
    left, right = [result if isinstance(result, dict) else {"": result} for result in (left, right)]
    for name, value in left.items():
        np.testing.assert_allclose(value, right[name], rtol=2e-5, atol=1e-6)
