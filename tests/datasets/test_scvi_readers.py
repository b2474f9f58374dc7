"""Readers by scvi-tools' names give its columns."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

import pyro_multivi as scvi
from pyro_multivi.datasets.scvi_readers import read_10x_atac, read_10x_multiome

COUNTS = np.array([[3, 0, 1], [0, 5, 0], [2, 0, 4]])


def write(folder, barcodes, table, name):
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(COUNTS.T))
    (folder / "barcodes.tsv").write_text("".join(f"{barcode}\n" for barcode in barcodes))
    (folder / name).write_text("".join("\t".join(row) + "\n" for row in table))


@pytest.fixture
def multiome(tmp_path):
    rows = [
        ("ENSG1", "TP53", "Gene Expression", "chr17", "1", "9"),
        ("ENSG2", "MT-1", "Gene Expression", "", "", ""),
        ("chr1:10-20", "chr1:10-20", "Peaks", "chr1", "10", "20"),
    ]
    write(tmp_path, ["AAAC-1", "AAAG-1", "AACA-1"], rows, "features.tsv")
    return tmp_path


def test_columns_are_those_of_scvi_tools(multiome):
    adata = read_10x_multiome(multiome)
    assert list(adata.obs_names) == ["AAAC", "AAAG", "AACA"]
    assert list(adata.obs["batch_id"]) == [1, 1, 1]
    assert list(adata.var_names) == ["TP53", "MT-1", "chr1:10-20"]
    assert list(adata.var["ID"]) == ["ENSG1", "ENSG2", "chr1:10-20"]
    assert list(adata.var["modality"]) == ["Gene Expression", "Gene Expression", "Peaks"]
    assert list(adata.var["chr"].fillna("")) == ["chr17", "", "chr1"]
    np.testing.assert_array_equal(adata.var[["start", "end"]], [[1, 9], [np.nan, np.nan], [10, 20]])
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)


def test_the_setup_knows_its_column_of_types(multiome):
    adata = read_10x_multiome(multiome)
    report = scvi.MULTIVI.setup_anndata(adata)
    assert (report.n_genes, report.n_regions) == (2, 1)
    adata.var["feature_types"] = ["Peaks", "Peaks", "Gene Expression"]
    with pytest.warns(UserWarning, match="genes in adata.X have names of regions"):
        report = scvi.MULTIVI.setup_anndata(adata)
    assert (report.n_genes, report.n_regions) == (1, 2)


def test_barcodes_of_several_wells_are_kept_whole_where_they_have_to(multiome):
    (multiome / "barcodes.tsv").write_text("AAAC-1\nAAAC-2\nAACA-2\n")
    adata = read_10x_multiome(multiome)
    assert list(adata.obs_names) == ["AAAC-1", "AAAC-2", "AACA-2"]
    assert list(adata.obs["batch_id"]) == [1, 2, 2]
    (multiome / "barcodes.tsv").write_text("AAAC\nAAAG\nAACA\n")
    adata = read_10x_multiome(multiome)
    assert list(adata.obs_names) == ["AAAC", "AAAG", "AACA"]
    assert "batch_id" not in adata.obs


def test_compressed_files_are_read(multiome):
    for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"):
        (multiome / f"{name}.gz").write_bytes(gzip.compress((multiome / name).read_bytes()))
        (multiome / name).unlink()
    assert scvi.data.read_10x_multiome(multiome).shape == (3, 3)


def test_peaks_alone(tmp_path):
    write(
        tmp_path,
        ["AAAC-1", "AAAG-1", "AACA-1"],
        [("chr1", "1", "5"), ("chr1", "7", "9"), ("chr2", "1", "5")],
        "peaks.bed",
    )
    adata = read_10x_atac(tmp_path)
    assert list(adata.var_names) == ["chr1:1-5", "chr1:7-9", "chr2:1-5"]
    assert list(adata.var["start"]) == [1, 7, 1]
    assert set(adata.var["modality"]) == {"Peaks"}


def test_organize_keeps_the_column(multiome):
    adata = read_10x_multiome(multiome)
    genes = adata.var["modality"] == "Gene Expression"
    joined = scvi.data.organize_multiome_anndatas(adata[:1].copy(), adata[1:2, genes].copy(), adata[2:, ~genes].copy())
    assert list(joined.var["modality"]) == ["Gene Expression", "Gene Expression", "Peaks"]
    assert "feature_types" not in joined.var


def test_organize_names_cells_as_scvi_tools_does(multiome):
    """Scripts cut the end off again, as ``name.rsplit("_", 1)[0]``."""
    adata = read_10x_multiome(multiome)
    adata.obs_names = [f"s1_{name}" for name in adata.obs_names]
    genes = adata.var["modality"] == "Gene Expression"
    paired, rna, atac = adata[:1].copy(), adata[:1, genes].copy(), adata[1:2, ~genes].copy()
    joined = scvi.data.organize_multiome_anndatas(paired, rna, atac)
    assert [name.rsplit("_", 1)[1] for name in joined.obs_names] == ["paired", "expression", "accessibility"]
    known = [*paired.obs_names, *rna.obs_names, *atac.obs_names]
    assert [name.rsplit("_", 1)[0] for name in joined.obs_names] == known
    alone = scvi.data.organize_multiome_anndatas(paired, modality_key="kind")
    assert alone.obs_names.tolist() == [f"{known[0]}_paired"]
    mdata = scvi.simulate_multiome((3, 0, 0), 4, 5, return_mudata=True)
    assert scvi.data.organize_multiome_anndatas(mdata).obs_names.tolist() == [f"{n}_paired" for n in mdata.obs_names]
    # By our own name the function leaves names that occur once as they are.
    assert scvi.organize_multiome_anndatas(paired).obs_names.tolist() == known[:1]
