"""Several files on the command line: samples, their names, batches, and the same cells again for a saved model."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.cli import main
from pyro_multivi.cli.inputs import load_model, named_paths
from pyro_multivi.cli.parser import command_parser
from pyro_multivi.datasets.readers import sample_name

QUICK = ["--quiet", "--max-epochs", "1", "--n-latent", "2", "--n-hidden", "8", "--accelerator", "cpu"]


@pytest.fixture
def cells():
    """Cells with a count of every feature."""
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=20, seed=0)
    adata.X = sp.csr_matrix(adata.X.toarray() + 1)
    adata.obs = adata.obs[["cell_type"]]
    return adata


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, cells, no_pictures):
    """The command line, without pictures, in a folder with A.h5ad (paired), B.h5ad (RNA), C.h5ad (ATAC)."""
    monkeypatch.chdir(tmp_path)
    genes = (cells.var["feature_types"] == "Gene Expression").to_numpy()
    cells[:20].copy().write_h5ad("A.h5ad")
    cells[20:40, genes].copy().write_h5ad("B.h5ad")
    cells[40:, ~genes].copy().write_h5ad("C.h5ad")

    def run(*arguments):
        status = main([str(each) for each in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.out if status == 0 else f"error: {printed.err}"

    return run


def loaded(*data, model="out/model"):
    """The model with the data that ``check`` would give it."""
    return load_model(command_parser().parse_args(["check", model, *data, "--out", "checked"]))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("A.h5", "A"),
        ("x/A.v2.H5AD", "A.v2"),
        ("S1/outs/filtered_feature_bc_matrix.h5", "S1"),
        ("S1/outs/filtered_feature_bc_matrix", "S1"),
        ("GSM1_s1_filtered_feature_bc_matrix.h5", "GSM1_s1"),
        ("geo/GSM1_s1_matrix.mtx.gz", "GSM1_s1"),
        ("per_sample/S2/sample_filtered_feature_bc_matrix/matrix.mtx.gz", "S2"),
        ("S1/", "S1"),
        ("S3.zarr", "S3"),
    ],
)
def test_names_of_samples(path, name):
    assert sample_name(path) == name


def test_names_that_are_stated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.h5").touch()
    assert named_paths(["A.h5"]) is None
    assert named_paths(["a=b.h5"]) is None
    assert named_paths(["one=A.h5"]) == {"one": "A.h5"}
    assert named_paths(["a=b.h5", "two=x=y.h5"]) == {"a=b": "a=b.h5", "two": "x=y.h5"}


def test_several_files_are_trained_on_and_given_again(run):
    out = run("train", "A.h5ad", "B.h5ad", "three=C.h5ad", "--batch-from-file", "--out", "out", *QUICK)
    assert "20 paired, 20 RNA only, 20 ATAC only" in out
    assert "batches     3: A (20), B (20), three (20)" in out
    assert "three" in out.partition("kept of each sample:")[2].partition("pyro-multivi setup")[0]
    assert len(pd.read_csv("out/latent.csv")) == 60
    model = pm.MULTIVI.load("out/model")
    assert model.spec.setup.batch_key == "sample"
    again = loaded("A.h5ad", "B.h5ad", "three=C.h5ad")
    assert again.adata.obs["sample"].value_counts().to_dict() == {"A": 20, "B": 20, "three": 20}
    latent = pd.read_csv("out/latent.csv", index_col="cell")
    np.testing.assert_allclose(again.get_latent_representation(), latent, atol=1e-5)
    # One file alone is of the batch that it was.
    np.testing.assert_allclose(loaded("B.h5ad").get_latent_representation(), latent[20:40], atol=1e-5)
    with pytest.raises(ValueError, match="'C'.*Known: 'A', 'B', 'three'"):
        loaded("C.h5ad")
    table = run("differential", "out/model", "A.h5ad", "B.h5ad", "--groupby", "cell_type", "--out", "de.csv", "--quiet")
    assert "written to de.csv" in table


def test_union_of_files(run):
    for name, part in (("A", slice(4, None)), ("B", slice(0, 10))):
        adata = pm.read(f"{name}.h5ad")
        adata[:, part].copy().write_h5ad(f"{name}.h5ad")
    out = run("train", "A.h5ad", "B.h5ad", "C.h5ad", "--batch-from-file", "--features", "union", "--out", "out", *QUICK)
    report = out.partition("pyro-multivi setup")[2]
    assert "the others are masked there" in report.partition("measured    B: 10 of ")[2].partition("\n")[0]
    again, latent = loaded("A.h5ad", "B.h5ad", "C.h5ad"), pd.read_csv("out/latent.csv", index_col="cell")
    np.testing.assert_allclose(again.get_latent_representation(), latent, atol=1e-5)
    # What one file alone lacks was not measured in it, as it was in training.
    np.testing.assert_allclose(loaded("B.h5ad").get_latent_representation(), latent[20:40], atol=1e-5)


def test_batches_and_columns_of_samples(run, cells):
    error = run("train", "A.h5ad", "B.h5ad", "--batch-from-file", "--batch-key", "x", "--out", "out", *QUICK)
    assert "--batch-from-file and --batch-key both say what the batches are" in error
    out = run("train", "A.h5ad", "B.h5ad", "--out", "out", *QUICK)
    assert "all samples are one batch; --batch-from-file makes each a batch of its own" in out
    for name in "AB":
        adata = pm.read(f"{name}.h5ad")
        adata.obs["sample"] = np.where(np.arange(20) % 2, "s1", "s2")
        adata.write_h5ad(f"{name}.h5ad")
    # A column that is taken by something else stays as it is.
    out = run("train", "A.h5ad", "B.h5ad", "--batch-from-file", "--out", "out2", *QUICK)
    assert "batches     2: A (20), B (20)" in out
    assert loaded("B.h5ad", model="out2/model").adata.obs["file"].tolist() == ["B"] * 20
    out = run("train", "A.h5ad", "B.h5ad", "--batch-key", "sample", "--out", "out3", *QUICK)
    assert "batches     2: s1 (20), s2 (20)" in out


def test_errors_name_the_file(run, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "C.h5ad").rename(tmp_path / "x" / "A.h5ad")
    assert "there is no file or folder D.h5ad" in run("train", "A.h5ad", "D.h5ad", "--out", "out")
    assert "more than one sample is called 'A': give NAME=PATH." in run("train", "A.h5ad", "x/A.h5ad", "--out", "out")
    adata = pm.read("B.h5ad")
    x = adata.X.toarray()
    x[0] = 0
    adata.X = sp.csr_matrix(x)
    adata.write_h5ad("B.h5ad")
    error = run("train", "A.h5ad", "B.h5ad", "--out", "out", *QUICK)
    assert "sample 'B': 1 of 20 cells have no count: 'cell_20'. Leave such cells out with --min-counts 1" in error
    out = run("train", "A.h5ad", "B.h5ad", "--min-counts", 1, "--out", "out", *QUICK)
    assert "20 paired, 19 RNA only" in out


def test_words_and_layers_of_each_file(run, cells):
    mudata = pytest.importorskip("mudata")
    genes = (cells.var["feature_types"] == "Gene Expression").to_numpy()
    cells.layers["counts"] = cells.X
    cells.X = cells.X * np.float32(0.1)
    with mudata_as_given():
        mudata.MuData({"tx": cells[:20, genes].copy(), "tiles": cells[10:20, ~genes].copy()}).write("A.h5mu")
    bare = cells[30:50, genes].copy()
    del bare.var["feature_types"]
    bare.write_h5ad("B.h5ad")
    cells[50:, ~genes].copy().write_h5ad("C.h5ad")  # by the usual words
    files = ["A.h5mu", "B.h5ad", "C.h5ad"]
    options = ["--rna", "tx", "--atac", "tiles", "--layer", "counts"]
    error = run("train", *files, *options, "--out", "out", *QUICK)
    assert "sample 'B': --feature-type-key 'feature_types' is not in var." in error
    error = run("train", *files, *options, "--feature-type", "rna", "--atac", "tile", "--out", "out", *QUICK)
    assert "--atac 'tile', which no sample has. Did you mean 'tiles'?" in error
    out = run("train", *files, *options, "--feature-type", "rna", "--out", "out", *QUICK)
    assert "10 paired, 30 RNA only, 10 ATAC only" in out
    assert "12 genes, 20 regions" in out
    assert loaded(*files, "--feature-type", "rna").get_latent_representation().shape == (50, 2)
    # Some of the files, none of which has the words.
    assert loaded("two=B.h5ad", "C.h5ad", "--feature-type", "rna").get_latent_representation().shape == (30, 2)


@pytest.mark.parametrize("value", ["x", [1]])
def test_a_column_of_one_file_alone_loses_no_model(run, monkeypatch, value):
    from pyro_multivi.datasets.stores import open as opening

    adata = pm.read("A.h5ad")
    adata.obs["note"] = "x"
    adata.write_h5ad("A.h5ad")
    if value != "x":
        read = opening.open_with_keys

        def with_lists(*args, **settings):
            found = read(*args, **settings)
            found.obs["note"] = [value for _ in range(found.n_obs)]
            return found

        monkeypatch.setattr("pyro_multivi.cli.inputs.open_with_keys", with_lists)
    out = run("train", "A.h5ad", "B.h5ad", "--from-disk", "--batch-from-file", "--out", "out", *QUICK)
    assert "written to out" in out
    assert ("the data cannot be saved with the model" in out) == (value != "x")
    assert pm.MULTIVI.load("out/model").is_trained


@pytest.mark.parametrize("files", [["A.h5ad", "B.h5ad", "three=C.h5ad", "--batch-from-file"], ["A.h5ad"]])
def test_counts_stay_on_disk(run, monkeypatch, files):
    for file in "ABC":
        adata = pm.read(f"{file}.h5ad")
        counts = adata.X.toarray()
        counts[::2, ::3] = 0
        counts[1], counts[1, 1] = 0, 1
        adata.X = sp.csr_matrix(counts)
        adata.write_h5ad(f"{file}.h5ad")
    fewer = ["--min-fraction", "0.6", "--min-counts", "2"]
    in_memory = run("train", *files, "--out", "memory", *fewer, *QUICK)
    with monkeypatch.context() as context:
        context.setattr("pyro_multivi.cli.inputs.read", lambda path: pytest.fail(f"{path} is read whole"))
        on_disk = run("train", *files, "--from-disk", "--out", "disk", *fewer, *QUICK)
        table = run("differential", "disk/model", "--groupby", "cell_type", "--out", "de.csv", "--quiet")
    assert "written to de.csv" in table
    left_out = [line for line in on_disk.splitlines() if line.startswith("left out")]
    assert len(left_out) >= 2
    for text in ("batches", "modalities"):
        lines = [[line for line in out.splitlines() if line.startswith(text)] for out in (in_memory, on_disk)]
        assert lines[0] == lines[1]
    models = [pm.MULTIVI.load(f"{name}/model") for name in ("memory", "disk")]
    assert models[1].adata.X is None
    for names in ("gene_names", "region_names"):
        assert list(getattr(models[0].spec, names)) == list(getattr(models[1].spec, names))
    latents = [pd.read_csv(f"{name}/latent.csv", index_col="cell") for name in ("memory", "disk")]
    assert [*latents[0].index] == [*latents[1].index]
    # What was trained in memory finds the same counts on disk; the order of cells in training differs.
    np.testing.assert_allclose(models[0].get_latent_representation(models[1].adata), latents[0], atol=1e-5)


def test_a_column_of_samples_stays_where_counts_are_on_disk(run):
    for file in "AB":
        adata = pm.read(f"{file}.h5ad")
        adata.obs["sample"] = f"donor of {file}"
        adata.write_h5ad(f"{file}.h5ad")
    arguments = ["A.h5ad", "B.h5ad", "--from-disk", "--batch-from-file", "--out", "out", *QUICK]
    assert "written to out" in run("train", *arguments)
    model = pm.MULTIVI.load("out/model")
    assert model.spec.setup.batch_key == "file"
    assert {*model.adata.obs["sample"]} == {"donor of A", "donor of B"}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--round"], "--from-disk does not go with --round: the files are never written to"),
        (["--feature-type", "rna"], "--from-disk does not go with --feature-type"),
        (["--features", "union"], "--from-disk does not go with --features union"),
    ],
)
def test_what_needs_counts_in_memory_is_refused(run, option, says):
    assert says in run("train", "A.h5ad", "B.h5ad", "--from-disk", *option, "--out", "out", *QUICK)


def test_a_file_that_is_given_twice_is_refused(run, tmp_path):
    (tmp_path / "link.h5ad").symlink_to(tmp_path / "A.h5ad")
    for files in (("A.h5ad", "A.h5ad"), ("A.h5ad", "other=A.h5ad"), ("A.h5ad", "link.h5ad")):
        assert "A.h5ad is given more than once" in run("train", *files, "--out", "out", *QUICK)
