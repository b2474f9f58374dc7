"""Results written to disk block by block."""

from __future__ import annotations

import errno
import logging
import signal

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi import MULTIVI
from pyro_multivi.data.stores import unfinished
from pyro_multivi.posterior.quantities import array_sink, containers, estimates, file_sink
from pyro_multivi.posterior.quantities.file_sink import FileSink, digest
from pyro_multivi.posterior.quantities.output import request_digest

SUFFIXES = [".h5ad", ".zarr"]


def read(path):
    return anndata.read_h5ad(path) if path.suffix == ".h5ad" else anndata.read_zarr(path)


@pytest.fixture(params=SUFFIXES)
def out(request, tmp_path):
    if request.param == ".zarr":
        pytest.importorskip("zarr")
    return tmp_path / f"result{request.param}"


@pytest.fixture
def no_arrays(monkeypatch):
    """Fails the test if the result is collected in memory."""

    def never(*_, **__):
        raise AssertionError("the result was collected in memory")

    monkeypatch.setattr(array_sink.ArraySink, "__init__", never)


@pytest.fixture
def interrupted(monkeypatch):
    """A failure in the n-th minibatch that is decoded; how many were is counted."""
    decode, seen = estimates.decode, []

    def at(n):
        def failing(program, cells, *rest):
            seen.append(len(cells))
            if len(seen) == n:
                raise OSError("no space left")
            return decode(program, cells, *rest)

        seen.clear()
        monkeypatch.setattr(estimates, "decode", failing)
        return seen

    return at


def test_a_file_holds_what_memory_would(fitted, out):
    expected = fitted.get_accessibility_estimates(n_samples=25, return_interval=0.9)
    path = fitted.get_accessibility_estimates(n_samples=25, return_interval=0.9, out=out, silent=True, batch_size=64)
    assert path == out
    found = read(out)
    assert list(found.obs_names) == list(expected.mean.index)
    assert list(found.var_names) == list(expected.mean.columns)
    np.testing.assert_allclose(found.X, expected.mean, rtol=1e-5)
    for name in ("sd", "lower", "upper"):
        np.testing.assert_allclose(found.layers[name], getattr(expected, name), rtol=1e-4, atol=1e-7)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_gaps_in_text_stay_gaps(fitted, out):
    adata = fitted.adata.copy()
    adata.obs["note"] = pd.Series(["a", None, np.nan, pd.NA] * adata.n_obs, dtype=object)[: adata.n_obs].to_numpy()
    fitted.impute(adata, out=out, silent=True)
    found = read(out).obs["note"]
    assert found[:4].tolist()[0] == "a"
    assert found.isna().tolist() == adata.obs["note"].isna().tolist()


def test_a_threshold_writes_it_sparse(fitted, out):
    expected = fitted.get_accessibility_estimates(threshold=0.4, return_numpy=True)
    fitted.get_accessibility_estimates(threshold=0.4, out=out, silent=True, batch_size=64)
    found = read(out).X
    assert isinstance(found, sp.csr_matrix)
    assert found.nnz == expected.nnz
    np.testing.assert_allclose(found.toarray(), expected.toarray(), rtol=1e-5)


@pytest.mark.usefixtures("no_arrays")
def test_nothing_is_collected_in_memory(fitted, out):
    fitted.get_normalized_expression(out=out, silent=True, gene_list=["gene_04", "gene_01"], indices=[2, 190])
    found = read(out)
    assert list(found.obs_names) == ["cell_002", "cell_190"]
    assert list(found.var_names) == ["gene_04", "gene_01"]


def test_a_backed_file_is_read_row_by_row(fitted, tmp_path):
    path = fitted.get_accessibility_estimates(threshold=0.4, out=tmp_path / "a.h5ad", silent=True)
    backed = anndata.read_h5ad(path, backed="r")
    row = backed.X[7].toarray()[0]
    backed.file.close()
    np.testing.assert_allclose(row, read(path).X[7].toarray()[0])


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_an_interrupted_write_is_continued(fitted, out, interrupted, caplog, threshold):
    arguments = {"threshold": threshold, "n_samples": 3, "silent": True}
    expected = fitted.get_accessibility_estimates(**arguments, return_numpy=True)
    seen = interrupted(4)
    with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="no space left"):
        fitted.get_accessibility_estimates(**arguments, batch_size=30, out=out)
    assert "stopped after 90 of 200 cells. Make the same call again to go on" in caplog.text
    assert not out.exists(), "an incomplete file has the name of a complete one"
    seen = interrupted(99)
    # Another batch size is the same request.
    fitted.get_accessibility_estimates(**arguments, batch_size=50, out=out)
    assert sum(seen) == 110
    found = read(out).X
    found, expected = (part.toarray() if sp.issparse(part) else part for part in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    "change", [{"seed": 5}, {"transform_batch": 0}, {"region_list": [1, 2]}, {"indices": [1, 2, 3]}], ids=str
)
def test_another_request_begins_anew(fitted, out, interrupted, caplog, change):
    interrupted(3)
    with pytest.raises(OSError, match="no space left"):
        fitted.get_accessibility_estimates(n_samples=3, batch_size=50, out=out, silent=True)
    seen = interrupted(99)
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        fitted.get_accessibility_estimates(n_samples=3, batch_size=50, out=out, silent=True, **change)
    n_computed = sum(seen)
    assert "was left by another request; beginning anew" in caplog.text
    expected = fitted.get_accessibility_estimates(n_samples=3, return_numpy=True, **change)
    assert n_computed == len(expected)
    np.testing.assert_allclose(read(out).X, expected, rtol=2e-5)


def test_other_weights_are_another_request(mosaic):
    MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = MULTIVI(mosaic, n_hidden=8, n_latent=2)
    model.is_trained = True
    cells = model._cells(None, None, 10)
    rest = ([estimates.Quantity("p")], estimates.Average(), ["a"])
    one = request_digest(model.program, cells, *rest)
    assert request_digest(model.program, model._cells(None, None, 7), *rest) == one
    model.program.accessibility_decoder.p.bias.data[0] += 1e-3
    assert request_digest(model.program, cells, *rest) != one


def test_other_counts_are_another_request(mosaic):
    MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = MULTIVI(mosaic, n_hidden=8, n_latent=2)
    model.is_trained = True
    other = mosaic[:, np.r_[1, 0, 2 : mosaic.n_vars]].copy()
    other.var_names = mosaic.var_names
    assert (other.X != mosaic.X).nnz, "the two genes have the same counts"
    rest = ([estimates.Quantity("p")], estimates.Average(), ["a"])
    one, two = (request_digest(model.program, model._cells(data, None, 10), *rest) for data in (mosaic, other))
    # The number of counts of each cell and their sum are the same.
    assert one != two
    assert request_digest(model.program, model._cells(mosaic.copy(), None, 10), *rest) == one


def test_an_error_before_the_first_cells_leaves_nothing(fitted, out, interrupted):
    interrupted(1)
    with pytest.raises(OSError, match="no space left"):
        fitted.get_accessibility_estimates(out=out, silent=True)
    assert list(out.parent.iterdir()) == []


def test_ctrl_c_while_a_file_is_begun_leaves_it_free(fitted, out, monkeypatch):
    begin = FileSink._begin

    def interrupting(store):
        begin(store)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(FileSink, "_begin", interrupting)
        with pytest.raises(KeyboardInterrupt):
            fitted.get_normalized_expression(out=out, silent=True)
    assert list(out.parent.iterdir()) == []
    fitted.get_normalized_expression(out=out, silent=True)
    assert read(out).shape == (200, 40)


def test_a_broken_unfinished_file_of_an_earlier_version_is_written_anew(fitted, tmp_path, caplog):
    out = tmp_path / "a.h5ad"
    (tmp_path / ".a.h5ad.unfinished").write_bytes(b"\x89HDF\r\n\x1a\nnot really")
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        fitted.get_normalized_expression(out=out, silent=True)
    assert "cannot be read" in caplog.text
    assert read(out).shape == (200, 40)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("broken", ["data.h5ad", "progress.json", "mean.values"])
def test_a_broken_unfinished_result_is_written_anew(fitted, tmp_path, interrupted, caplog, broken):
    threshold = 0.4 if broken == "mean.values" else None
    out = tmp_path / "a.h5ad"
    interrupted(3)
    with pytest.raises(OSError, match="no space left"):
        fitted.get_accessibility_estimates(out=out, threshold=threshold, batch_size=50, silent=True)
    part = tmp_path / ".a.h5ad.unfinished" / broken
    part.write_bytes(part.read_bytes()[:30])
    interrupted(99)
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        fitted.get_accessibility_estimates(out=out, threshold=threshold, batch_size=50, silent=True)
    assert "cannot be read" in caplog.text
    expected = fitted.get_accessibility_estimates(threshold=threshold, return_numpy=True)
    found, expected = (part.toarray() if sp.issparse(part) else part for part in (read(out).X, expected))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_another_writes_is_left_alone(fitted, out):
    frames = (pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=["f", "g"]))
    with FileSink(out, "one", *frames, {}, dense={"mean": "X"}) as kept:
        with pytest.raises(RuntimeError, match=f"out='.*{out.name}' is being written by another process"):
            fitted.get_normalized_expression(out=out, silent=True)
        kept.put("mean", slice(0, 2), slice(0, 2), np.ones((2, 2), np.float32))
        kept.commit(2)
    np.testing.assert_array_equal(read(out).X, np.ones((2, 2)))
    assert list(out.parent.iterdir()) == [out]


def test_a_file_that_another_completes_meanwhile_is_left_alone(out, monkeypatch):
    frames = (pd.DataFrame(index=["a"]), pd.DataFrame(index=["f"]))
    folder, begun = unfinished.UnfinishedFolder, []

    def late(path):
        # After this process looked for the file and before it has the lock.
        if not begun:
            begun.append(path)
            with FileSink(out, "one", *frames, {}, dense={"mean": "X"}) as other:
                other.commit(1)
        return folder(path)

    monkeypatch.setattr(file_sink, "UnfinishedFolder", late)
    with pytest.raises(FileExistsError, match="was completed by another process"):
        FileSink(out, "two", *frames, {}, dense={"mean": "X"})
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("has_data", [False, True])
def test_what_a_kill_left_beside_a_whole_result_is_deleted(fitted, out, has_data):
    fitted.get_normalized_expression(out=out, silent=True)
    left = out.with_name(f".{out.name}.unfinished")
    left.mkdir()
    (left / "lock").touch()
    if has_data:
        # Of a result that is not complete, when a file of its name came from elsewhere.
        (left / f"data{out.suffix}").touch()
    with pytest.raises(FileExistsError, match="exists and is not replaced"):
        fitted.get_normalized_expression(out=out, silent=True)
    assert left.exists() == has_data


@pytest.mark.parametrize("threshold", [None, 0.2], ids=["dense", "sparse"])
@pytest.mark.parametrize("limit", [300, 6_000, 40_000])
def test_a_full_disk_is_an_error_and_the_call_can_be_made_again(fitted, out, threshold, limit):
    # A limit to the size of files stands for the disk: the system refuses writes in the same places.
    resource = pytest.importorskip("resource")
    arguments = {"threshold": threshold, "n_samples": 3, "silent": True, "batch_size": 30, "return_interval": None}
    expected = fitted.get_accessibility_estimates(**{**arguments, "return_numpy": True})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    failure = None
    try:
        fitted.get_accessibility_estimates(**arguments, out=out)
    except OSError as error:
        failure = error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if failure is None:
        # The chunks of a zarr folder are files of their own.
        assert out.suffix == ".zarr"
        assert limit == 40_000
    else:
        assert failure.errno == errno.EFBIG
        assert failure.filename == str(out)
        assert not out.exists()
        fitted.get_accessibility_estimates(**arguments, out=out)
    found, expected = (part.toarray() if sp.issparse(part) else part for part in (read(out).X, expected))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    assert list(out.parent.iterdir()) == [out]


def test_a_mark_is_never_ahead_of_the_rows(out):
    frames = (pd.DataFrame(index=["a", "b", "c"]), pd.DataFrame(index=["f", "g"]))

    def stopped():
        with FileSink(out, "one", *frames, {}, sparse={"mean": "X"}) as kept:
            kept.append("mean", sp.csr_matrix([[0.0, 2.0]], dtype=np.float32))
            kept.commit(1)
            kept.append("mean", sp.csr_matrix([[3.0, 4.0]], dtype=np.float32))  # never committed
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    with FileSink(out, "one", *frames, {}, sparse={"mean": "X"}) as kept:
        assert kept.n_done == 1
        kept.append("mean", sp.csr_matrix([[5.0, 0.0], [0.0, 6.0]], dtype=np.float32))
        kept.commit(3)
    np.testing.assert_array_equal(read(kept.path).X.toarray(), [[0, 2], [5, 0], [0, 6]])


@pytest.mark.parametrize(("name", "error", "message"), [
    ("a.csv", ValueError, "out='.*a.csv' must end in .h5ad or .zarr"),
    ("missing/a.h5ad", FileNotFoundError, "the folder '.*missing' does not exist"),
    ("there.h5ad", FileExistsError, "there.h5ad' exists and is not replaced"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["get_normalized_expression", "get_accessibility_estimates", "impute"])
def test_unwritable_paths_are_refused_at_once(fitted, tmp_path, interrupted, method, name, error, message):
    (tmp_path / "there.h5ad").write_text("mine")
    seen = interrupted(1)
    with pytest.raises(error, match=message):
        getattr(fitted, method)(out=tmp_path / name)
    assert seen == []
    assert (tmp_path / "there.h5ad").read_text() == "mine"


def test_an_object_that_cannot_be_written_leaves_nothing(out, monkeypatch):
    def refuse(*_):
        raise TypeError("a column of sets")

    monkeypatch.setattr(containers, "write_element", refuse)
    with pytest.raises(TypeError, match="a column of sets"):
        FileSink(out, "one", pd.DataFrame(index=["a"]), pd.DataFrame(index=["f"]), {}, dense={"mean": "X"})
    assert list(out.parent.iterdir()) == []


def test_rows_without_entries_are_written(fitted, out):
    found = read(fitted.get_accessibility_estimates(threshold=1.0, out=out, silent=True, batch_size=64)).X
    assert found.shape == (200, 70)
    assert found.nnz == 0


def test_an_unfinished_file_without_progress_is_written_anew(fitted, tmp_path, caplog):
    (tmp_path / ".a.h5ad.unfinished").mkdir()
    with h5py.File(tmp_path / ".a.h5ad.unfinished" / "data.h5ad", "w"):
        pass
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        fitted.get_normalized_expression(out=tmp_path / "a.h5ad", silent=True)
    assert "cannot be read" in caplog.text


def test_a_folder_without_permission(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(file_sink.os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="may not be written to"):
        fitted.get_normalized_expression(out=tmp_path / "a.h5ad")


def test_all_draws_are_not_written(fitted, tmp_path):
    with pytest.raises(ValueError, match="return_mean=False asks for all draws"):
        fitted.get_normalized_expression(out=tmp_path / "a.h5ad", n_samples=2, return_mean=False)


def test_the_bar_is_shown_when_writing_and_can_be_silenced(fitted, tmp_path, capsys):
    fitted.get_normalized_expression(out=tmp_path / "a.h5ad", indices=[0])
    assert "posterior: 100%" in capsys.readouterr().err
    fitted.get_normalized_expression(out=tmp_path / "b.h5ad", indices=[0], silent=True)
    fitted.get_normalized_expression(indices=[0])
    assert capsys.readouterr().err == ""
    fitted.get_normalized_expression(indices=[0], silent=False)
    assert "posterior: 100%" in capsys.readouterr().err


def test_a_digest_tells_arguments_and_tensors_apart():
    one = digest({"a": 1}, torch.ones(3))
    assert one == digest({"a": 1}, torch.ones(3), None)
    assert len({one, digest({"a": 2}, torch.ones(3)), digest({"a": 1}, torch.zeros(3)), digest({"a": 1})}) == 4
