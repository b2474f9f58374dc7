"""Files that are written as a whole or not at all."""

from __future__ import annotations

import errno

import pandas as pd
import pytest

from pyro_multivi._files import whole_file


@pytest.mark.parametrize(
    "error", [ValueError("mine"), KeyboardInterrupt(), OSError(errno.ENOSPC, "no space")], ids=repr
)
def test_what_was_there_stays_after_an_error(tmp_path, error):
    path = tmp_path / "table.csv"
    path.write_text("old")

    def write():
        with whole_file(path) as part:
            part.write_text("half of the ne")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))


def test_a_disk_that_fills_up_is_an_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "table.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(OSError, match="table.csv"), whole_file(path) as part:
            pd.DataFrame({"a": range(5_000)}).to_csv(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_a_number_names_the_file(tmp_path):
    with pytest.raises(OSError, match="table.csv': of a library"), whole_file(tmp_path / "table.csv"):
        raise OSError("of a library")
