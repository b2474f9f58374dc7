"""Files of users on the command line: what is read, left out and said."""

from __future__ import annotations

import warnings

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

import pyro_multivi as pm
from pyro_multivi.cli import main


@pytest.fixture
def cells():
    """Paired cells with a count of every feature."""
    adata = pm.simulate_multiome((40, 0, 0), n_genes=12, n_regions=20, seed=0)
    adata.X = sp.csr_matrix(adata.X.toarray() + 1)
    return adata


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Train on a file until the model would be trained: the status, what was printed, the data and the model."""
    monkeypatch.chdir(tmp_path)

    def run(adata, *options, name="cells.h5ad"):
        if adata is not None:
            write(adata, name)
        found = {}
        monkeypatch.setattr(
            "pyro_multivi.cli.train._analyse", lambda model, data, _: found.update(model=model, data=data)
        )
        status = main(["train", name, "--out", "out", *map(str, options)])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert (status == 0) == bool(found)
        assert printed.err.count("\n") == (status != 0)
        return found.get("model"), found.get("data"), printed.out if status == 0 else printed.err

    return run


def write(data, name):
    with warnings.catch_warnings():
        # MuData updates as it writes, and warns of its next version.
        warnings.simplefilter("ignore", FutureWarning)
        data.write(name)


def as_mudata(adata, rna="rna", atac="atac", atac_cells=slice(None)):
    mudata = pytest.importorskip("mudata")
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return mudata.MuData({rna: adata[:, genes].copy(), atac: adata[atac_cells, ~genes].copy()})


@pytest.mark.parametrize("names", [("gex", "atac"), ("RNA", "peaks"), ("rna", "Chromatin Accessibility")])
def test_usual_names_of_modalities_are_known(cells, run, names):
    model, _, _ = run(as_mudata(cells, *names), name="cells.h5mu")
    assert (model.spec.n_genes, model.spec.n_regions) == (12, 20)
    assert model.spec.n_cells["paired"] == 40


def test_other_names_of_modalities_are_options(cells, run):
    mdata = as_mudata(cells, "one", "atac")
    model, _, printed = run(mdata, name="cells.h5mu")
    assert model.spec.n_genes == 0
    assert "modalities not used: 'one' (--rna NAME and --atac NAME would name others)." in printed
    model, _, printed = run(mdata, "--rna", "one", name="cells.h5mu")
    assert (model.spec.n_genes, model.spec.n_regions) == (12, 20)
    assert "not used" not in printed
    assert (
        "--rna 'two' is not a modality of the file. Known: 'one', 'atac'"
        in run(mdata, "--rna", "two", name="cells.h5mu")[2]
    )
    assert (
        "say which is which with --rna NAME and --atac NAME"
        in run(as_mudata(cells, "one", "two"), name="cells.h5mu")[2]
    )
    assert (
        "'rna', 'gex' could all be RNA: choose one with --rna."
        in run(as_mudata(cells, "rna", "gex"), name="cells.h5mu")[2]
    )


def test_usual_feature_types_are_known_and_others_options(cells, run):
    cells.var["feature_types"] = (
        cells.var["feature_types"].astype(str).replace({"Gene Expression": "GEX", "Peaks": "tiles"})
    )
    model, _, printed = run(cells)
    assert (model.spec.n_genes, model.spec.n_regions) == (12, 0)
    assert "20 features of type 'tiles' are ignored" in printed
    model, _, _ = run(cells, "--atac", "tiles")
    assert (model.spec.n_genes, model.spec.n_regions) == (12, 20)
    error = run(cells, "--atac", "tile")[2]
    assert "--atac 'tile' is not among the words of var['feature_types']. Did you mean 'tiles'?" in error
    cells.var["feature_types"] = "something"
    error = run(cells)[2]
    assert "Say which is which: --rna WORD, --atac WORD." in error
    assert "feature_type_values" not in error


def test_a_file_without_feature_types(cells, run):
    genes = cells[:, cells.var["feature_types"] == "Gene Expression"].copy()
    del genes.var["feature_types"]
    error = run(genes)[2]
    assert "--feature-type-key 'feature_types' is not in var" in error
    assert "if all features are of one type, give --feature-type rna (or atac)." in error
    assert "adata" not in error
    model, _, _ = run(genes, "--feature-type", "rna")
    assert (model.spec.n_genes, model.spec.n_regions) == (12, 0)
    assert "which says 'Gene Expression', 'Peaks'" in run(cells, "--feature-type", "rna")[2]
    assert "for a file without modalities" in run(as_mudata(cells), "--feature-type", "rna", name="cells.h5mu")[2]


def rare(adata):
    """The first gene is in no cell, the last region in the first cell alone."""
    x = adata.X.toarray()
    x[:, 0] = 0
    x[:, -1] = 0
    x[0, -1] = 1
    adata.X = sp.csr_matrix(x)
    return adata


@pytest.mark.parametrize("name", ["cells.h5ad", "cells.h5mu"])
def test_features_left_out_are_counted_and_the_option_named(cells, run, name):
    adata = rare(cells)
    model, data, printed = run(adata if name.endswith("ad") else as_mudata(adata), "--min-fraction", 0.05, name=name)
    assert (model.spec.n_genes, model.spec.n_regions) == (11, 19)
    assert data.n_vars == 30
    assert "left out by --min-fraction: 1 of 12 genes, which are detected in less than 0.05 of the cells" in printed
    assert "left out by --min-fraction: 1 of 20 regions" in printed
    model, _, printed = run(adata, "--min-fraction", 0, name="cells.h5ad")
    assert model.spec.n_genes == 12
    assert "left out" not in printed
    assert "--min-fraction 1.0 is not allowed" in run(adata, "--min-fraction", 1)[2]


@pytest.mark.parametrize("how", ["marked", "counted", "listed"])
def test_min_fraction_counts_over_measured_cells(run, how):
    adata = pm.simulate_multiome((10, 190, 0), n_genes=12, n_regions=20, seed=0)
    peaks, paired = (adata.var["feature_types"] == "Peaks").to_numpy(), (adata.obs["modality"] == "paired").to_numpy()
    expected = int(((adata[paired][:, peaks].X > 0).mean(0) >= 0.2).sum())
    assert 0 < expected < 20
    options = ["--modality-key", "modality"] if how == "marked" else []
    if how == "listed":
        adata = as_mudata(adata, atac_cells=paired)
    model, _, _ = run(adata, "--min-fraction", 0.2, *options, name="cells.h5mu" if how == "listed" else "cells.h5ad")
    assert model.spec.n_regions == expected
    # Where nothing else says so, a cell whose few counts were left out is taken as not measured.
    assert model.spec.n_cells["paired"] == 10 or how == "counted"


def test_the_filter_reads_the_layer(cells, run):
    cells.layers["counts"] = cells.X
    for x in (None, sp.csr_matrix(cells.shape, dtype=np.float32), -np.ones(cells.shape, np.float32)):
        other = cells.copy()
        other.X = x
        model, _, _ = run(other, "--layer", "counts")
        assert (model.spec.n_genes, model.spec.n_regions) == (12, 20)


def write_10x(path, x, n_genes=12):
    c = sp.csr_matrix(x)
    features = [f"f{number}" for number in range(x.shape[1])]
    with h5py.File(path, "w") as file:
        for name, values in {
            "data": c.data, "indices": c.indices, "indptr": c.indptr, "shape": x.shape[::-1],
            "barcodes": [f"B{row}-1" for row in range(len(x))], "features/id": features, "features/name": features,
            "features/feature_type": ["Gene Expression"] * n_genes + ["Peaks"] * (x.shape[1] - n_genes),
        }.items():  # fmt: skip
            file[f"matrix/{name}"] = values


def test_cells_whose_only_features_have_an_unknown_word_are_no_empty_barcodes(cells, run):
    x = cells.X.toarray()
    x[:5, :12] = 0
    cells.X = sp.csr_matrix(x)
    cells.var["feature_types"] = cells.var["feature_types"].astype(str).replace("Peaks", "tiles")
    error = run(cells)[2]
    assert "5 of 40 cells have no count" in error
    assert "'tiles' count as neither RNA nor ATAC: if they are, say so by --rna or --atac." in error
    assert run(cells, "--atac", "tiles")[0].spec.n_regions == 20


def test_empty_barcodes_are_left_out_by_an_option(cells, run):
    x = cells.X.toarray().astype(int)
    x[::4] = 0
    x[1] = 0
    x[1, :3] = 1
    write_10x("raw.h5", x)
    error = run(None, name="raw.h5")[2]
    assert "10 of 40 cells have no count: 'B0-1'" in error
    assert "--min-counts 1" in error
    assert "adata" not in error
    _, data, printed = run(None, "--min-counts", 10, name="raw.h5")
    assert data.n_obs == 29
    assert "left out by --min-counts: 11 of 40 cells, which have fewer than 10 counts" in printed
    assert "leaves no cell" in run(None, "--min-counts", 10**6, name="raw.h5")[2]


def test_cells_that_the_filter_empties(cells, run):
    x = rare(cells).X.toarray().astype(int)
    x[0] = 0
    x[0, -1] = 1
    write_10x("rare.h5", x)
    error = run(None, "--min-fraction", 0.05, name="rare.h5")[2]
    assert "1 of 40 cells have counts only in features that --min-fraction leaves out: 'B0-1'" in error
    _, data, printed = run(None, "--min-fraction", 0.05, "--min-counts", 1, name="rare.h5")
    assert data.n_obs == 39
    assert "1 of 40 cells, which have counts only in features that are left out" in printed


def test_counts_are_rounded_when_asked(cells, run):
    whole = cells.X.copy()
    cells.X = cells.X * np.float32(1 - 1e-4)
    error = run(cells)[2]
    assert "not a whole number" in error
    _, data, _ = run(cells, "--round")
    assert (whole != data.X).nnz == 0


def test_repeated_names_are_made_unique_and_said(cells, run):
    cells.var_names = ["gene", "gene", *cells.var_names[2:]]
    cells.obs_names = ["cell", "cell", *cells.obs_names[2:]]
    cells.write_h5ad("repeated.h5ad")
    # AnnData warns of them when it reads.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model, _, printed = run(None, name="repeated.h5ad")
    assert model.spec.gene_names[:2] == ("gene", "gene-1")
    assert "1 names of features occur more than once" in printed
    assert "1 names of cells occur more than once" in printed


def test_columns_of_one_modality_of_a_mudata(cells, run):
    mdata = as_mudata(cells)
    mdata.mod["rna"].obs["donor"] = np.where(np.arange(40) % 2, "a", "b")
    model, _, _ = run(mdata, "--batch-key", "rna:donor", name="cells.h5mu")
    assert model.spec.batch_categories == ("a", "b")
    assert "Known: 'rna:" in run(mdata, "--batch-key", "donor", name="cells.h5mu")[2]


def test_check_and_differential_leave_out_the_same_cells(cells, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = rare(cells).X.toarray().astype(int)
    x[:4] = 0
    x[0, -1] = 1
    write_10x("raw.h5", x)
    options = ["--quiet", "--max-epochs", "1", "--n-latent", "2", "--n-hidden", "8"]
    assert main(["train", "raw.h5", "--out", "out", "--min-counts", "1", "--min-fraction", "0.05", *options]) == 0
    capsys.readouterr()
    check = ["check", "out/model", "raw.h5", "--out", "check", "--n-samples", "40"]
    assert main(check) == 1
    assert "Leave them out with --min-counts 1" in capsys.readouterr().err
    assert main([*check, "--min-counts", "1"]) == 0
    assert "replicates of 3 held-out cells" in capsys.readouterr().out


MALFORMED = {
    "empty.h5ad": b"",
    "text.h5": b"<html>404</html>",
    "cells.csv": b"a,b\n1,2\n",
    "cells.tar.gz": b"\x1f\x8b",
    "matrix.mtx": b"%%MatrixMarket matrix coordinate real general\n2 2 1\n9 9 1\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_one_line(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_bytes(MALFORMED[name])
    (tmp_path / "barcodes.tsv").write_text("A\nB\n")
    (tmp_path / "features.tsv").write_text("g1\ng2\n")
    assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pyro-multivi: ")
    assert error.count("\n") == 1 + ("features.tsv has no column" in error)
    assert str(path) in error


@pytest.mark.parametrize(
    "name", ["obs", "var", "X", "X/indptr", "X/data", "obs/modality", "var/feature_types", "obs/_index"]
)
@pytest.mark.parametrize("how", ["number", "text", "nothing"])
def test_malformed_content_of_an_h5ad_is_one_line(tmp_path, capsys, name, how):
    path = tmp_path / "cells.h5ad"
    pm.simulate_multiome((10, 0, 0), n_genes=5, n_regions=6, seed=0).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        del file[name]
        if how != "nothing":
            file[name] = 3 if how == "number" else "damaged"
    status = main(
        [
            "train",
            str(path),
            "--out",
            str(tmp_path / "out"),
            "--quiet",
            "--max-epochs",
            "1",
            "--modality-key",
            "modality",
        ]
    )
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (1, 1)


class Own(pm.MultiVIProgram):
    """A program that no command can open."""


def test_a_model_of_a_program_of_ones_own_is_for_python(cells, tmp_path, capsys):
    pm.MULTIVI.setup_anndata(cells)
    model = pm.MULTIVI(cells, n_hidden=6, n_latent=2, program_class=Own)
    model.is_trained = True
    model.save(tmp_path / "model", save_anndata=True)
    assert main(["check", str(tmp_path / "model"), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "Commands take models of the package's own program alone: open it in Python" in error
    assert "program_class" not in error
