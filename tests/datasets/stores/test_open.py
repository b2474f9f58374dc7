"""Several stores as one data set: as join_samples joins them, with the counts left on disk."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import zarr

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores import reference

try:
    from anndata.io import write_elem
except ImportError:  # anndata before 0.11
    from anndata.experimental import write_elem

#: Of zarr 3; zarr 2 knows no other format.
FORMAT_2: dict[str, Any] = {} if zarr.__version__.startswith("2.") else {"zarr_format": 2}
FRESH: dict[str, Any] = {"use_consolidated": False} if FORMAT_2 else {}


@pytest.fixture(scope="module")
def cells():
    adata = pm.simulate_multiome((40, 20, 20), n_genes=14, n_regions=90, n_types=2, seed=0)
    return ad.AnnData(sp.csr_matrix(adata.X), obs=adata.obs[["cell_type"]], var=adata.var[["feature_types"]])


@pytest.fixture
def samples(cells):
    """Paired cells, RNA with other genes in another order, ATAC with fewer regions; two barcodes occur twice."""
    genes = (cells.var["feature_types"] == "Gene Expression").to_numpy()
    rna = cells[40:60, genes][:, [*range(13, 2, -1), 0]].copy()
    atac = cells[60:, ~genes][:, :80].copy()
    # Nothing was found in this cell, yet it was measured.
    atac.X = sp.csr_matrix(atac.X.toarray() * (np.arange(20) != 7)[:, None])
    names = rna.obs_names.tolist()
    rna.obs_names = ["cell_00", *names[1:]]
    atac.obs["age"] = np.arange(20.0)
    return {"A": cells[:40].copy(), "B": rna, "C": atac}


@pytest.fixture
def paths(samples, tmp_path):
    found = {name: tmp_path / f"{name}.h5ad" for name in "AB"}
    for name, path in found.items():
        samples[name].write_h5ad(path)
    write_elem(zarr.open_group(str(tmp_path / "C.zarr"), mode="w", **FORMAT_2), "/", samples["C"])
    return {**found, "C": tmp_path / "C.zarr"}


def table_of(adata, modality_key=None):
    pm.MULTIVI.setup_anndata(adata, modality_key=modality_key)
    return DataSpec.of(adata).table(adata)


@pytest.mark.parametrize("form", ["mapping", "list"])
def test_stores_are_joined_as_samples_are(samples, paths, form, caplog):
    with caplog.at_level(logging.INFO, "pyro_multivi"):
        stored = pm.open_stores(paths if form == "mapping" else [*paths.values()])
    joined = pm.join_samples(samples)
    assert stored.X is None
    assert stored.obs_names.equals(joined.obs_names)
    assert {"cell_00_A", "cell_00_B"} < set(stored.obs_names)
    assert stored.var_names.equals(joined.var_names)
    assert stored.obs["sample"].tolist() == joined.obs["sample"].tolist()
    assert stored.obs["age"].equals(joined.obs["age"])
    report = stored.uns["pyro_multivi"]["samples"]
    columns = ["cells", "genes", "genes_kept", "regions", "regions_kept"]
    assert report[columns].equals(joined.uns["pyro_multivi"]["samples"][columns])
    assert "of sample 'A' are left out" in caplog.text
    one, other = table_of(joined, "modality"), table_of(stored)
    assert other.on_disk
    assert one.difference(other) is None
    index = torch.tensor([79, 0, 41, 5, 66])
    assert torch.equal(one.batch(index).x.to_dense(), other.batch(index).x.to_dense())
    assert torch.equal(one.batch(index).y.to_dense(), other.batch(index).y.to_dense())


def test_a_model_of_several_stores(paths, tmp_path):
    stored = pm.open_stores(paths)
    pm.MULTIVI.setup_anndata(stored)
    model = pm.MULTIVI(stored, n_hidden=8, n_latent=2)
    model.train(max_epochs=2, shuffle_block=4, shuffle_buffer=4, progress_bar=False)
    rho = model.get_normalized_expression()
    assert rho.index.tolist() == stored.obs_names.tolist()
    assert len(model.differential_expression(groupby="sample", group1="A", n_samples=20)) == rho.shape[1]
    model.save(tmp_path / "model", save_anndata=True)
    before = model.get_latent_representation()
    assert (tmp_path / "model" / "adata.h5ad").stat().st_size < 200_000
    reference._opened.clear()  # as in another process
    again = pm.MULTIVI.load(tmp_path / "model")
    assert np.array_equal(again.get_latent_representation(), before)
    shutil.move(paths["B"], tmp_path / "elsewhere.h5ad")
    reference._opened.clear()
    with pytest.raises(pm.BrokenModelError, match=r"store 'B' are not at .*B\.h5ad any more.*open_stores"):
        pm.MULTIVI.load(tmp_path / "model")
    moved = pm.open_stores({**paths, "B": tmp_path / "elsewhere.h5ad"})
    assert np.array_equal(pm.MULTIVI.load(tmp_path / "model", moved).get_latent_representation(), before)


def test_a_store_with_other_cells_in_its_place(samples, paths, tmp_path):
    stored = pm.open_stores(paths)
    pm.MULTIVI.setup_anndata(stored)
    samples["B"][1:].copy().write_h5ad(paths["B"])
    with pytest.raises(ValueError, match=r"B\.h5ad holds other cells than when it was opened as store 'B': 19 now"):
        DataSpec.of(stored)


def test_a_single_store_keeps_all_its_features(cells, tmp_path):
    other = cells.copy()
    other.var["feature_types"] = np.where(np.arange(104) < 3, "Antibody Capture", other.var["feature_types"])
    other.write_h5ad(tmp_path / "a.h5ad")
    stored = pm.open_stores(str(tmp_path / "a.h5ad"))
    assert stored.shape == (80, 104)
    assert "sample" not in stored.obs
    pm.MULTIVI.setup_anndata(other)
    pm.MULTIVI.setup_anndata(stored)
    assert DataSpec.of(other).table(other).difference(DataSpec.of(stored).table(stored)) is None


def test_another_layer(cells, tmp_path):
    other = cells.copy()
    other.layers["counts"] = other.X.copy()
    other.X = other.X * 0.5
    other.write_h5ad(tmp_path / "a.h5ad")
    stored = pm.open_stores(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r"RNA values that are not a whole number.*perhaps by layer"):
        pm.MULTIVI.setup_anndata(stored)
    with pytest.raises(ValueError, match=r"layer='nonsense': .*a\.h5ad has no 'layers/nonsense'; it has 'counts'"):
        pm.MULTIVI.setup_anndata(stored, layer="nonsense")
    pm.MULTIVI.setup_anndata(stored, layer="counts")
    pm.MULTIVI.setup_anndata(cells)
    assert DataSpec.of(cells).table(cells).difference(DataSpec.of(stored).table(stored)) is None


def test_only_the_layer_need_be_usable(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = cells.copy()
    other.layers["counts"] = sp.csr_matrix(cells.X)
    other.X = None
    other.write_h5ad("a.h5ad")
    with pytest.raises(ValueError, match=r"a\.h5ad has no 'X'"):
        pm.open_stores("a.h5ad")
    stored = pm.open_stores("a.h5ad", layer="counts")
    pm.MULTIVI.setup_anndata(stored, layer="counts")
    pm.MULTIVI.setup_anndata(cells)
    assert DataSpec.of(cells).table(cells).difference(DataSpec.of(stored).table(stored)) is None
    arguments = ["a.h5ad", "--from-disk", "--layer", "counts", "--dry-run", "--out", "out"]
    assert main(["train", *arguments]) == 0
    assert main(["convert", "a.h5ad", "a.zarr"]) == 1
    assert "The data set has no counts in X: give --layer NAME, one of its layers ('counts')" in capsys.readouterr().err
    assert main(["convert", "a.h5ad", "a.zarr", "--layer", "counts", "--quiet"]) == 0
    assert np.array_equal(pm.read("a.zarr").X.toarray(), cells.X.toarray())
    with pytest.raises(ValueError, match=r"a\.h5ad: layer='raw': .* has no 'layers/raw'; it has 'counts'"):
        pm.open_stores("a.h5ad", layer="raw")


def spoiled(paths, samples, what):
    sample = samples["B"]
    if what == "same cells":
        shutil.copy(paths["A"], paths["B"])
        return
    if what == "genome":
        samples["A"].var["genome"], sample.var["genome"] = "GRCh38", "mm10"
        samples["A"].write_h5ad(paths["A"])
    elif what == "no feature":
        sample.var_names = [f"ENSG{number}" for number in range(sample.n_vars)]
    elif what == "no types":
        del sample.var["feature_types"]
    elif what == "twice":
        sample.obs_names = ["x", "x", *sample.obs_names[2:]]
    elif what == "column":
        sample.obs["sample"] = "other"
    elif what == "csc":
        sample.X = sample.X.tocsc()
    elif what == "text":
        sample.X = sp.csr_matrix(sample.X)
    sample.write_h5ad(paths["B"])
    if what == "truncated":
        paths["B"].write_bytes(paths["B"].read_bytes()[:3000])
    elif what == "no matrix":
        with h5py.File(paths["B"], "r+") as file:
            del file["X"]
    elif what == "text":
        with h5py.File(paths["B"], "r+") as file:
            n = len(file["X/data"])
            del file["X/data"]
            file["X/data"] = np.array([b"a"] * n)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("same cells", r"40 of 40 cells have the same names in .*A\.h5ad and .*B\.h5ad"),
        ("genome", "genes of 'A' are of the genome 'GRCh38', those of 'B' of 'mm10'"),
        ("no feature", "no gene is in all samples with RNA: 'A' has"),
        ("no types", r"B\.h5ad has no column 'feature_types' in var"),
        ("twice", r"B\.h5ad, obs_names holds names more than once: 'x'"),
        ("column", r"obs of .*B\.h5ad has a column 'sample' with 'other'"),
        ("csc", r"B\.h5ad, 'X' is compressed by columns \(CSC\).*pyro-multivi convert"),
        ("truncated", r"B\.h5ad is broken"),
        ("no matrix", r"B\.h5ad has no 'X'"),
        ("text", r"values of type \|?S1"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_stores_that_disagree_or_are_broken(paths, samples, what, said):
    spoiled(paths, samples, what)
    with pytest.raises(ValueError, match=said):
        pm.MULTIVI.setup_anndata(pm.open_stores(paths))


@pytest.mark.parametrize("names", ["obs_names", "var_names"])
@pytest.mark.filterwarnings("ignore:.* names are not unique")
def test_advice_for_repeated_names_is_true(cells, tmp_path, monkeypatch, capsys, names):
    monkeypatch.chdir(tmp_path)
    twice = cells.copy()
    setattr(twice, names, ["x", "x", *getattr(cells, names)[2:]])
    twice.write_h5ad("a.h5ad")
    assert main(["train", "a.h5ad", "--from-disk", "--out", "out"]) == 1
    first = capsys.readouterr().err
    assert main(["convert", "a.h5ad", "a.zarr"]) == 1
    for said in (first, capsys.readouterr().err):
        exec(said.partition("in Python: ")[2].strip().removesuffix("."), {"pyro_multivi": pm})
        assert pm.open_stores("OUT.h5ad").shape == cells.shape
        (tmp_path / "OUT.h5ad").unlink()


def test_what_is_no_store(tmp_path, paths):
    for wrong, said in (
        (tmp_path / "nothing.h5ad", "there is no file or folder"),
        (tmp_path, "cannot be read by cells: give an .h5ad file or a .zarr folder"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            pm.open_stores(wrong)
    with pytest.raises(ValueError, match="stores has more than one called 'A'"):
        pm.open_stores([paths["A"], paths["A"]])
    with pytest.raises(TypeError, match="objects in memory are for join_samples"):
        pm.open_stores([ad.AnnData(np.ones((2, 2)))])


def test_consolidated_metadata_are_not_needed_nor_believed(samples, tmp_path):
    """A copy of all descriptions in one place may be missing, or of an earlier state."""
    path = tmp_path / "C.zarr"
    write_elem(zarr.open_group(str(path), mode="w", **FORMAT_2), "/", samples["C"])
    plain = pm.open_stores(path)
    zarr.consolidate_metadata(str(path))
    later = samples["C"][:7].copy()
    write_elem(zarr.open_group(str(path), mode="r+", **FORMAT_2, **FRESH), "/", later)
    assert (plain.n_obs, pm.open_stores(path).n_obs) == (20, 7)


def test_columns_of_other_types_become_words(paths, samples):
    samples["A"].obs["age"] = pd.Categorical(["old"] * 40)
    samples["A"].write_h5ad(paths["A"])
    assert pm.open_stores(paths).obs["age"].tolist()[-1] == "19.0"


@pytest.mark.parametrize("form", ["csr", "dense"])
@pytest.mark.filterwarnings("ignore:.*(very old version of AnnData|without encoding metadata)")
def test_files_of_anndata_before_0_7_are_converted(cells, tmp_path, form):
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        if form == "csr":
            x = sp.csr_matrix(cells.X)
            group = file.create_group("X")
            group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = b"csr", x.shape
            for part in ("data", "indices", "indptr"):
                group[part] = getattr(x, part)
        else:
            file["X"] = sp.csr_matrix(cells.X).toarray()
        for name, index in (("obs", cells.obs_names), ("var", cells.var_names)):
            file[name] = np.array([(each.encode(),) for each in index], dtype=[("index", "S20")])
    with pytest.raises(ValueError, match=r"old\.h5ad.* is of the form of anndata before 0\.7.*pyro-multivi convert"):
        pm.open_stores(path)
    backed = ad.read_h5ad(path, backed="r")
    backed.var["feature_types"] = "Gene Expression"
    if form == "csr":
        with pytest.raises(ValueError, match=r"old\.h5ad.* is of the form of anndata before 0\.7"):
            pm.MULTIVI.setup_anndata(backed)
    backed.file.close()
    converted = pm.open_stores(pm.convert_stores(path, tmp_path / "new.zarr", progress_bar=False))
    assert converted.obs_names.equals(cells.obs_names)
    assert converted.var_names.equals(cells.var_names)


@pytest.mark.parametrize("layer", [None, "counts"])
def test_a_matrix_beside_the_stores_is_not_passed_over(cells, tmp_path, layer):
    other = cells.copy()
    other.layers["counts"] = other.X
    other.write_h5ad(tmp_path / "a.h5ad")
    stored = pm.open_stores(tmp_path / "a.h5ad", layer=layer)
    if layer is None:
        stored.X = cells.X * 2
        where, remove = r"adata\.X", r"adata\.X = None"
    else:
        stored.layers["counts"] = cells.X * 2
        where, remove = r"adata\.layers\['counts'\]", r"del adata\.layers\['counts'\]"
    with pytest.raises(ValueError, match=rf"{where} holds a matrix, .* For those of the stores, {remove}; for the"):
        pm.MULTIVI.setup_anndata(stored, layer=layer)
    del stored.uns["pyro_multivi"]["stores"]
    pm.MULTIVI.setup_anndata(stored, layer=layer)
    assert DataSpec.of(stored).table(stored).x.row_sums().sum() == 2 * cells.X[:, :14].sum()


@pytest.mark.parametrize("verb", [pm.reads_to_fragments, pm.organize_cite_seq_10x])
def test_verbs_of_counts_in_memory_say_how_to_have_them_there(cells, tmp_path, verb):
    cells.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(TypeError, match=r"X is None: read it .*what open_stores opened by pyro_multivi\.read\(path\)"):
        verb(pm.open_stores(tmp_path / "a.h5ad"))
