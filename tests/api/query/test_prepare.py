"""Queries in the form of the reference, in place or as a new object."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data import synthetic_iid


def shuffled(world):
    """Five genes less, one that is unknown, in another order."""
    kept = np.random.default_rng(0).permutation(np.arange(5, world.query.n_vars))
    query = world.query[:, kept].copy()
    names = query.var_names.to_numpy(dtype=object).copy()
    names[list(query.var_names).index(world.query.var_names[5])] = "unknown"
    query.var_names = names
    query.layers["more"] = query.X.copy()
    query.raw = query
    return query


def test_a_new_object_has_the_features_of_the_reference(world, caplog):
    query = shuffled(world)
    with caplog.at_level(logging.INFO, "pyro_multivi"):
        made = pm.MULTIVI.prepare_query_anndata(query, world.model, inplace=False)
    assert query.n_vars == world.query.n_vars - 5
    assert "unknown" in query.var_names
    reference = [*world.model.spec.gene_names, *world.model.spec.region_names]
    assert list(made.var_names) == reference
    assert list(pm.MULTIVI.prepare_query_anndata(query, world.model, return_reference_var_names=True)) == reference
    assert (~made.var["pyro_multivi_measured"]).sum() == 6
    np.testing.assert_array_equal(made.X[:, 6:].toarray(), world.query.X[:, 6:].toarray())
    assert made.X[:, :6].nnz == 0
    np.testing.assert_array_equal(made.layers["more"].toarray(), made.X.toarray())
    assert made.raw.n_vars == query.n_vars
    assert "1 that it does not know are left out ('unknown')" in caplog.text
    assert "6 are missing" in caplog.text
    prepared, plain = (pm.MULTIVI.load_query_data(each, world.model) for each in (made, query))
    np.testing.assert_array_equal(prepared.get_latent_representation(), plain.get_latent_representation())
    assert prepared.query_report.missing == plain.query_report.missing == {"genes": 6, "regions": 0}


def test_in_place_as_scvi_tools_does(world):
    query = shuffled(world)
    assert pm.MULTIVI.prepare_query_anndata(query, world.model) is None
    assert list(query.var_names) == [*world.model.spec.gene_names, *world.model.spec.region_names]
    mapped = pm.MULTIVI.load_query_data(query, world.model)
    assert mapped.query_report.missing["genes"] == 6
    view = world.query[:5]
    with pytest.raises(ValueError, match="is a view.*inplace=False"):
        pm.MULTIVI.prepare_query_anndata(view, world.model)


def test_marks_survive_a_file(world, tmp_path):
    import anndata

    made = pm.MULTIVI.prepare_query_anndata(shuffled(world), world.model, inplace=False)
    made.write_h5ad(tmp_path / "query.h5ad")
    read = anndata.read_h5ad(tmp_path / "query.h5ad")
    expected = pm.MULTIVI.load_query_data(made, world.model).get_latent_representation()
    np.testing.assert_array_equal(pm.MULTIVI.load_query_data(read, world.model).get_latent_representation(), expected)


def test_setup_does_not_take_marked_zeros_for_counts(world):
    made = pm.MULTIVI.prepare_query_anndata(shuffled(world), world.model, inplace=False)
    assert pm.MULTIVI.setup_anndata(made, batch_key="batch").n_genes == 18
    made.var["pyro_multivi_measured"] = "yes"
    with pytest.raises(ValueError, match="must be True or False for every feature"):
        pm.MULTIVI.setup_anndata(made, batch_key="batch")


def test_dense_counts_and_one_modality(world):
    genes = world.query.var["feature_types"] == "Gene Expression"
    query = world.query[world.query.obs["modality"] != "accessibility", genes][:, 3:].copy()
    query.X = query.X.toarray()
    made = pm.MULTIVI.prepare_query_anndata(query, world.model, inplace=False)
    assert list(made.var_names) == [*world.model.spec.gene_names, *world.model.spec.region_names]
    assert isinstance(made.X, np.ndarray)
    strangers = query.copy()
    strangers.var_names = [f"other_{name}" for name in query.var_names]
    with pytest.raises(ValueError, match="shares no genes with reference_model"):
        pm.MULTIVI.prepare_query_anndata(strangers, world.model)


def test_a_mudata(world):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((30, 10, 10), n_genes=24, n_regions=30, n_batches=3, seed=1, return_mudata=True)
    mdata.mod["rna"]._inplace_subset_var(mdata.mod["rna"].var_names[4:])
    with mudata_as_given():
        mdata.update()
    before = mdata.mod["rna"].n_vars
    made = pm.MULTIVI.prepare_query_mudata(mdata, world.model, inplace=False)
    assert mdata.mod["rna"].n_vars == before
    names = pm.MULTIVI.prepare_query_mudata(mdata, world.model, return_reference_var_names=True)
    assert {name: list(index) for name, index in names.items()} == {
        "rna": list(world.model.spec.gene_names),
        "atac": list(world.model.spec.region_names),
    }
    assert list(made.mod["rna"].var_names) == list(names["rna"])
    assert made.n_obs == mdata.n_obs
    one, other = (pm.MULTIVI.load_query_data(each, world.model) for each in (mdata, made))
    np.testing.assert_array_equal(one.get_latent_representation(), other.get_latent_representation())
    assert pm.MULTIVI.prepare_query_mudata(mdata, world.model) is None
    assert mdata.mod["rna"].n_vars == 24
    with pytest.raises(TypeError, match="use prepare_query_anndata"):
        pm.MULTIVI.prepare_query_mudata(world.query, world.model)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("unique", [False, True])
def test_a_mudata_whose_features_were_renamed_and_its_cells_reordered(world, inplace, unique):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((30, 10, 10), n_genes=24, n_regions=30, n_batches=3, seed=1, return_mudata=True)
    with mudata_as_given():
        mdata = mdata[np.random.default_rng(0).permutation(50)].copy()
    mdata.obsm["place"] = np.arange(50)[:, None]
    mdata.obsp["near"] = np.eye(50)
    cells, states = mdata.obs_names, pm.MULTIVI.load_query_data(mdata, world.model).get_latent_representation()
    for name, part in mdata.mod.items():
        part.layers["counts"] = part.X.copy()
        part.var_names = [*(f"{name if unique else 'other'}_{at}" for at in range(4)), *part.var_names[4:]]
    renamed = pm.MULTIVI.load_query_data(mdata, world.model).get_latent_representation()
    made = pm.MULTIVI.prepare_query_mudata(mdata, world.model, inplace=inplace)
    if inplace:
        made = mdata
    else:
        assert list(mdata.mod["rna"].var_names[:1]) == ["rna_0" if unique else "other_0"]
    assert list(made.obs_names) == list(cells)
    for name, part in made.mod.items():
        place = made.obsmap[name]  # from 1; 0 for cells without the modality
        assert (part.obs_names[place[place > 0] - 1] == cells[place > 0]).all()
    assert made.obsm["place"].ravel().tolist() == [*range(50)]
    np.testing.assert_array_equal(made.obsp["near"], np.eye(50))
    for name, known in (("rna", world.model.spec.gene_names), ("atac", world.model.spec.region_names)):
        assert list(made.mod[name].var_names) == list(known)
        assert made.mod[name][:, list(known[:4])].layers["counts"].sum() == 0
    assert list(made.var_names) == [*world.model.spec.gene_names, *world.model.spec.region_names]
    mapped = pm.MULTIVI.load_query_data(made, world.model)
    assert mapped.query_report.missing == {"genes": 4, "regions": 4}
    np.testing.assert_array_equal(mapped.get_latent_representation(), renamed)
    assert not np.array_equal(states, renamed)


def test_a_view_of_a_mudata_is_not_changed_in_place(world):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((30, 10, 10), n_genes=24, n_regions=30, n_batches=3, seed=1, return_mudata=True)
    with pytest.raises(ValueError, match="mdata is a view .* give inplace=False"):
        pm.MULTIVI.prepare_query_mudata(mdata[:20], world.model)
    assert pm.MULTIVI.prepare_query_mudata(mdata[:20], world.model, inplace=False).n_obs == 20


@pytest.fixture
def positional():
    """A reference whose var has no feature types."""
    adata = synthetic_iid(batch_size=40, n_genes=40)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch")
    model = pm.MULTIVI(adata, n_genes=20, n_regions=20, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    return SimpleNamespace(adata=adata, model=model, names=list(adata.var_names))


@pytest.mark.parametrize("inplace", [False, True])
def test_features_without_types_are_found_by_name(positional, tmp_path, caplog, inplace):
    positional.model.save(tmp_path / "model")
    query = synthetic_iid(batch_size=40, n_genes=44)
    query.var_names = [*(f"other_{at}" for at in range(4)), *query.var_names[4:]]
    query = query[:, ::-1].copy()
    query.layers["counts"] = query.X.copy()
    plain = pm.MULTIVI.load_query_data(query, positional.model)
    made = pm.MULTIVI.prepare_query_anndata(query, tmp_path / "model", inplace=inplace)
    made = query if inplace else made
    assert list(made.var_names) == positional.names
    assert made[:, positional.names[:4]].layers["counts"].sum() == 0
    assert made.var["pyro_multivi_measured"].tolist() == [False] * 4 + [True] * 36
    assert "8 features of no type that the reference does not know are left out" in caplog.text
    prepared = pm.MULTIVI.load_query_data(made, positional.model)
    np.testing.assert_array_equal(prepared.get_latent_representation(), plain.get_latent_representation())
    assert prepared.query_report.missing == {"genes": 4, "regions": 0}
    made.var_names = [f"x{at}" for at in range(40)]
    with pytest.raises(ValueError, match="shares no features with the model, which has 40"):
        pm.MULTIVI.prepare_query_anndata(made, positional.model)


def test_a_report_on_features_without_types(positional):
    same = pm.MULTIVI.load_query_data(positional.adata.copy(), positional.model).query_report
    assert same.shared == {"genes": 20, "regions": 20}
    assert same.unknown == {"genes": 0, "regions": 0}
    more = pm.MULTIVI.load_query_data(synthetic_iid(batch_size=40, n_genes=44), positional.model).query_report
    assert more.unknown == {"genes": 0, "regions": 0, "features": 4}
    assert "features    4 unknown to it, which are not used" in str(more)
    assert type(more).from_dict(more.to_dict()) == more


@pytest.mark.parametrize("typed", [False, True])
def test_a_whole_modality_becomes_zeros_that_count_as_not_measured(world, positional, typed):
    if typed:
        adata, model = world.reference, world.model
        is_region = (adata.var["feature_types"] == "Peaks").to_numpy()
    else:
        adata, model, is_region = positional.adata, positional.model, np.arange(40) >= 20
    reference = [*model.spec.gene_names, *model.spec.region_names]
    query = adata[np.ravel(adata[:, is_region].X.sum(1)) > 0, is_region].copy()
    made = pm.MULTIVI.prepare_query_anndata(query, model, inplace=False)
    assert list(made.var_names) == reference
    assert made[:, list(model.spec.gene_names)].X.sum() == 0
    assert made[:, list(model.spec.region_names)].X.sum() == query.X.sum()
    assert made.var["pyro_multivi_measured"].tolist() == [False] * model.n_genes + [True] * model.n_regions
    prepared, plain = (pm.MULTIVI.load_query_data(each, model) for each in (made, query))
    assert prepared.query_report.n_cells == {"paired": 0, "expression": 0, "accessibility": query.n_obs}
    np.testing.assert_array_equal(prepared.get_latent_representation(), plain.get_latent_representation())
    np.testing.assert_array_equal(model.get_normalized_expression(made), model.get_normalized_expression(query))
