"""Queries in the form of the reference, in place or as a new object."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given


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
    assert list(made.var_names) == list(world.model.spec.gene_names)
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
