from __future__ import annotations

import gzip

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from pyro_multivi.datasets.readers import read, read_10x_h5, read_10x_mtx
from pyro_multivi.datasets.simulate import simulate_multiome

# Cells x features: three genes (two of one symbol, one without a place), two peaks.
COUNTS = np.array([[3, 0, 1, 0, 2], [0, 5, 0, 1, 0], [0, 0, 0, 0, 0], [7, 0, 0, 2, 2]])
BARCODES = ["AAAC-1", "AAAG-1", "AACA-1", "AACC-1"]
FEATURES = {
    "id": ["ENSG1", "ENSG2", "ENSG3", "chr1:10-20", "chr2:5-9"],
    "name": ["TP53", "TBCE", "TBCE", "chr1:10-20", "chr2:5-9"],
    "feature_type": ["Gene Expression"] * 3 + ["Peaks"] * 2,
    "genome": ["GRCh38"] * 5,
    "interval": ["chr17:1-9", "chr1:3-8", "", "chr1:10-20", "chr2:5-9"],
}
VAR_NAMES = ["TP53", "TBCE", "TBCE-1", "chr1:10-20", "chr2:5-9"]


def write_h5(path, features=FEATURES, counts=COUNTS, fixed_width=True):
    by_barcode = sp.csc_matrix(counts.T)
    with h5py.File(path, "w") as file:
        matrix = file.create_group("matrix")

        def write(group, name, values):
            # Cell Ranger writes strings of fixed width; other programs write them of any length.
            group[name] = np.array(values, "S") if fixed_width else values

        write(matrix, "barcodes", BARCODES[: len(counts)])
        matrix["data"] = by_barcode.data.astype(np.int32)
        matrix["indices"] = by_barcode.indices.astype(np.int64)
        matrix["indptr"] = by_barcode.indptr.astype(np.int64)
        matrix["shape"] = np.array(by_barcode.shape, np.int32)
        group = matrix.create_group("features")
        write(group, "_all_tag_keys", ["genome", "interval"])
        for key, values in features.items():
            write(group, key, values)
    return path


def write_mtx(folder, rows, features_name="features.tsv", gz=True, counts=COUNTS):
    folder.mkdir(exist_ok=True)
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(counts.T))
    texts = {
        features_name: "".join("\t".join(row) + "\n" for row in rows),
        "barcodes.tsv": "".join(f"{barcode}\n" for barcode in BARCODES[: len(counts)]),
        "matrix.mtx": (folder / "matrix.mtx").read_text(),
    }
    for name, text in texts.items():
        if gz:
            (folder / name).unlink(missing_ok=True)
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    return folder


def arc_rows():
    """Rows of features.tsv as Cell Ranger ARC writes them; the third gene has no place."""
    rows = []
    for identifier, name, kind, interval in zip(
        FEATURES["id"], FEATURES["name"], FEATURES["feature_type"], FEATURES["interval"], strict=True
    ):
        place = interval.replace(":", "-").split("-") if interval else ["", "", ""]
        rows.append([identifier, name, kind, *place])
    return rows


def check(adata, names=VAR_NAMES, counts=COUNTS):
    assert isinstance(adata.X, sp.csr_matrix)
    assert adata.X.dtype == np.float32
    assert adata.X.has_canonical_format
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.obs_names.tolist() == BARCODES
    assert adata.var_names.tolist() == names


@pytest.mark.parametrize("fixed_width", [True, False])
def test_h5_of_cell_ranger_arc(tmp_path, fixed_width):
    adata = read_10x_h5(write_h5(tmp_path / "m.h5", fixed_width=fixed_width))
    check(adata)
    assert adata.var["gene_ids"].tolist() == FEATURES["id"]
    assert adata.var["feature_types"].tolist() == FEATURES["feature_type"]
    assert adata.var["genome"].tolist() == FEATURES["genome"]
    assert adata.var["interval"].tolist() == FEATURES["interval"]


def test_h5_with_genes_only(tmp_path):
    features = {key: FEATURES[key][:3] for key in ("id", "name", "feature_type", "genome")}
    adata = read_10x_h5(write_h5(tmp_path / "gex.h5", features, COUNTS[:, :3]))
    check(adata, VAR_NAMES[:3], COUNTS[:, :3])
    assert set(adata.var) == {"gene_ids", "feature_types", "genome"}
    assert set(adata.var["feature_types"]) == {"Gene Expression"}


def test_what_is_read_can_be_written(tmp_path):
    adata = read(write_h5(tmp_path / "m.h5"))
    adata.write_h5ad(tmp_path / "m.h5ad")
    check(read(tmp_path / "m.h5ad"))


@pytest.mark.parametrize("gz", [True, False])
def test_mtx_of_cell_ranger_arc(tmp_path, gz):
    adata = read_10x_mtx(write_mtx(tmp_path / "m", arc_rows(), gz=gz))
    check(adata)
    assert adata.var["feature_types"].tolist() == FEATURES["feature_type"]
    assert adata.var["interval"].tolist() == FEATURES["interval"]


def test_mtx_rows_of_unequal_length(tmp_path):
    rows = [row if row[3] else row[:3] for row in arc_rows()]
    assert {len(row) for row in rows} == {3, 6}
    assert read_10x_mtx(write_mtx(tmp_path / "m", rows)).var["interval"].tolist() == FEATURES["interval"]


def test_mtx_of_cell_ranger_2_with_genes_tsv(tmp_path):
    rows = [row[:2] for row in arc_rows()[:3]]
    adata = read(write_mtx(tmp_path / "old", rows, "genes.tsv", gz=False, counts=COUNTS[:, :3]))
    check(adata, VAR_NAMES[:3], COUNTS[:, :3])
    assert set(adata.var["feature_types"]) == {"Gene Expression"}
    assert set(adata.var) == {"gene_ids", "feature_types"}


def test_mtx_of_cell_ranger_atac_with_peaks_bed(tmp_path):
    rows = [["chr1", "10", "20"], ["chr2", "5", "9"]]
    adata = read(write_mtx(tmp_path / "atac", rows, "peaks.bed", gz=False, counts=COUNTS[:, 3:]))
    check(adata, VAR_NAMES[3:], COUNTS[:, 3:])
    assert set(adata.var["feature_types"]) == {"Peaks"}


def test_a_name_made_unique_does_not_take_one_that_exists(tmp_path):
    features = FEATURES | {"name": ["A", "A", "A-1", "A", ""]}
    features |= {"feature_type": ["Gene Expression"] * 5}
    adata = read_10x_h5(write_h5(tmp_path / "m.h5", features))
    # Nothing but the name of a gene is used, and its identifier where it has none.
    assert adata.var_names.tolist() == ["A", "A-2", "A-1", "A-3", "chr2:5-9"]


def test_unordered_entries_are_put_in_order(tmp_path):
    path = write_h5(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        for key in ("indices", "data"):
            values = file["matrix"][key][:]
            values[:3] = values[:3][::-1]
            file["matrix"][key][:] = values
    check(read_10x_h5(path))


def test_absent(tmp_path):
    for reader in (read, read_10x_h5, read_10x_mtx):
        with pytest.raises(FileNotFoundError, match="there is no file or folder .*nowhere.h5"):
            reader(tmp_path / "nowhere.h5")


def test_unknown_kind(tmp_path):
    path = tmp_path / "cells.pkl"
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"cells.pkl is of no known format; give an AnnData file \(.h5ad\)"):
        read(path)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        read_10x_mtx(path)


@pytest.mark.parametrize("suffix", [".h5", ".h5ad", ".h5mu"])
def test_not_hdf5(tmp_path, suffix):
    path = tmp_path / f"cells{suffix}"
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=rf"cells{suffix} is not an HDF5 file"):
        read(path)


@pytest.mark.parametrize("suffix", [".h5", ".h5ad"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_hdf5(tmp_path, suffix, share):
    path = tmp_path / f"cells{suffix}"
    if suffix == ".h5":
        write_h5(path)
    else:
        simulate_multiome((5, 0, 0), 10, 12).write_h5ad(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is broken, perhaps truncated"):
        read(path)


def test_hdf5_of_another_kind(tmp_path):
    path = tmp_path / "m.h5"
    simulate_multiome((5, 0, 0), 10, 12).write_h5ad(path)
    with pytest.raises(ValueError, match="looks like a .h5ad file: give it that suffix"):
        read(path)
    with h5py.File(path, "w") as file:
        file.create_group("GRCh38")["gene_names"] = ["A"]
    with pytest.raises(ValueError, match=r"written by Cell Ranger 2; read the folder"):
        read(path)
    with h5py.File(path, "w") as file:
        file.create_group("table")
    with pytest.raises(ValueError, match="it holds 'table', and a group 'matrix' with 'features' is needed"):
        read(path)


def test_h5_that_contradicts_itself(tmp_path):
    path = write_h5(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        file["matrix/indices"][0] = 99
    with pytest.raises(ValueError, match="data, indices and indptr of its matrix do not fit together"):
        read(path)
    with h5py.File(path, "r+") as file:
        file["matrix/shape"][:] = [5, 3]
    with pytest.raises(ValueError, match="5 features x 3 barcodes, but 5 features and 4 barcodes are named"):
        read(path)
    with h5py.File(path, "r+") as file:
        del file["matrix/indptr"]
    with pytest.raises(ValueError, match="lacks 'matrix/indptr'"):
        read(path)


def test_mtx_folder_lacks_a_file(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows())
    (folder / "features.tsv.gz").rename(folder / "features.csv.gz")
    message = (
        r"has no features.tsv or genes.tsv or peaks.bed \(plain or .gz\); it holds 'barcodes.tsv.gz', 'features.csv"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read(folder)


@pytest.mark.parametrize("name", ["matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz"])
def test_mtx_truncated_gz(tmp_path, name):
    folder = write_mtx(tmp_path / "m", arc_rows())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) - 12])
    with pytest.raises(ValueError, match=f"{name} is broken"):
        read(folder)


def test_mtx_truncated_text(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows(), gz=False)
    content = (folder / "matrix.mtx").read_text()
    (folder / "matrix.mtx").write_text("\n".join(content.splitlines()[:-2]) + "\n")
    with pytest.raises(ValueError, match="matrix.mtx is broken or not in Matrix Market format"):
        read(folder)


def test_mtx_sizes_that_do_not_fit(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows()[:4])
    with pytest.raises(ValueError, match="5 features x 4 barcodes, but 4 features and 4 barcodes are named"):
        read(folder)


def test_mtx_features_with_too_few_columns(tmp_path):
    rows = arc_rows()
    rows[1] = rows[1][:2]
    with pytest.raises(
        ValueError, match="features.tsv.gz has 2 columns in row 2; it needs at least 3 in every row: identifier"
    ):
        read(write_mtx(tmp_path / "m", rows))


@pytest.mark.parametrize("gz", [True, False])
def test_mtx_with_the_prefix_of_a_repository(tmp_path, gz):
    folder = write_mtx(tmp_path / "m", arc_rows(), gz=gz)
    for path in list(folder.iterdir()):
        path.rename(folder / f"GSM1_s1_{path.name}")
    check(read(folder))
    check(read(next(folder.glob("*matrix.mtx*"))))


def test_mtx_of_several_samples_is_chosen_by_its_matrix(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows())
    (folder / "features.tsv.gz").rename(folder / "GSE1_features.tsv.gz")
    for name in ("barcodes.tsv.gz", "matrix.mtx.gz"):
        (folder / f"GSM2_{name}").write_bytes((folder / name).read_bytes())
        (folder / name).rename(folder / f"GSM1_{name}")
    with pytest.raises(
        ValueError, match=r"more than one matrix.mtx: 'GSM1_.* path of one matrix, such as .*GSM1_matrix"
    ):
        read(folder)
    # The table of features is of both samples, the barcodes are of one.
    check(read(folder / "GSM2_matrix.mtx.gz"))
    (folder / "GSM2_barcodes.tsv.gz").rename(folder / "GSM3_barcodes.tsv.gz")
    with pytest.raises(ValueError, match=r"more than one barcodes.tsv: 'GSM1_barcodes.tsv.gz', 'GSM3_"):
        read(folder / "GSM2_matrix.mtx.gz")


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("table", ["features.tsv", "genes.tsv"])
def test_mtx_without_feature_types_has_them_from_the_names(tmp_path, caplog, columns, table):
    rows = [row[:2] if columns == 2 else [name] for row, name in zip(arc_rows(), VAR_NAMES, strict=True)]
    rows[4] = ["chr2-5-9"] * columns
    adata = read(write_mtx(tmp_path / "m", rows, table))
    check(adata, [*VAR_NAMES[:4], "chr2-5-9"])
    assert adata.var["feature_types"].tolist() == FEATURES["feature_type"]
    assert f"{table}.gz has no column of feature types: by their names 3 genes and 2 regions" in caplog.text


def test_mtx_named_gz_and_unpacked_by_a_browser(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows(), gz=False)
    for path in list(folder.iterdir()):
        path.rename(folder / f"{path.name}.gz")
    check(read(folder))


def test_mtx_of_cells_by_features(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows(), gz=False)
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(COUNTS))
    check(read(folder))


def test_mtx_tables_with_a_heading(tmp_path):
    folder = write_mtx(tmp_path / "m", arc_rows(), gz=False)
    (folder / "barcodes.tsv").write_text("x\n" + (folder / "barcodes.tsv").read_text())
    with pytest.raises(ValueError, match="5 barcodes are named: is the first row of a table a heading"):
        read(folder)


def test_packed_files_are_to_be_unpacked(tmp_path):
    (tmp_path / "GSE1_RAW.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="GSE1_RAW.tar is packed: unpack it first"):
        read(tmp_path / "GSE1_RAW.tar")


def damage(file, kind):
    if kind == "strings":
        del file["matrix/barcodes"]
        file["matrix/barcodes"] = np.arange(4)
    elif kind == "group":
        del file["matrix/data"]
        file.create_group("matrix/data")
    elif kind == "shape":
        del file["matrix/shape"]
        file["matrix/shape"] = [5]
    elif kind == "scalar":
        del file["matrix/indptr"]
        file["matrix/indptr"] = 3
    elif kind == "text":
        del file["matrix/data"]
        file["matrix/data"] = ["many"] * 8


@pytest.mark.parametrize("kind", ["strings", "group", "shape", "scalar", "text"])
def test_h5_with_malformed_content_is_one_error_in_one_line(tmp_path, kind):
    path = write_h5(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        damage(file, kind)
    with pytest.raises(ValueError, match=f"^{path} ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
