"""Folder of checkpoints: damage is found out, a full disk survived, what is another run refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi import files
from pyro_multivi.training.checkpoints import folder as folder_module
from pyro_multivi.training.checkpoints.folder import Checkpoints

ONE, TWO = "checkpoint-1", "checkpoint-2"


def epochs(folder: Path) -> dict[str, int]:
    """Epochs done by the checkpoints in a folder."""
    return {path.parent.name: json.loads(path.read_text())["epoch"] for path in folder.glob("checkpoint-*/run.json")}


class Died(BaseException):
    """The process ended: nothing in the package catches it."""


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("once") / "begun"


@pytest.fixture
def begun(build, train, tmp_path, once):
    """Folder of a training that died after its third epoch of four."""

    def die(epoch, row, program):
        if epoch == 3:
            raise Died

    if not once.exists():
        with pytest.raises(Died):
            train(build(), 4, checkpoint=once, checkpoint_every=1, callbacks=[die])
    return shutil.copytree(once, tmp_path / "begun")


def test_the_latest_two_are_kept_and_nothing_else(begun):
    assert epochs(begun) == {TWO: 3, ONE: 2}
    assert sorted(os.listdir(begun)) == [ONE, TWO]
    assert sorted(os.listdir(begun / ONE)) == ["SHA256SUMS", "run.json", "state.pt"]


HOLDER = """
import sys, time
from pathlib import Path
from pyro_multivi.training.checkpoints.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "checkpoint")
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks of fcntl")
def test_a_folder_of_a_run_that_goes_on_is_refused_until_that_is_killed(build, train, begun):
    alone = {**os.environ, "PYTHONPATH": str(Path(pm.__file__).parents[1])}
    other = subprocess.Popen([sys.executable, "-c", HOLDER, begun], stdout=subprocess.PIPE, text=True, env=alone)
    try:
        assert other.stdout.readline() == "locked\n"
        for options in ({"resume": True}, {}):
            with pytest.raises(RuntimeError, match=rf"checkpoint=.* is in use: process {other.pid} on .* trains there"):
                train(build(), 4, checkpoint=begun, **options)
    finally:
        other.kill()
        other.communicate()
    assert (begun / ".lock").exists()
    train(build(), 4, checkpoint=begun, resume=True)
    assert max(epochs(begun).values()) == 4
    assert sorted(os.listdir(begun)) == [ONE, TWO]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "run.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink], ids=["truncated", "altered", "lost"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_used(build, train, begun, once, name, damage):
    damage(begun / TWO / name)
    called = []
    with pytest.warns(UserWarning, match=rf"{TWO} is damaged \(.*Training goes on from .*{ONE} instead") as caught:
        resumed = train(build(), 4, checkpoint=begun, resume=True, callbacks=[lambda epoch, *_: called.append(epoch)])
    assert len(caught) == 1
    assert called == [2, 3]
    whole = once.with_name("whole.pt")
    if not whole.exists():
        torch.save(train(build(), 4).program.state_dict(), whole)
    state = torch.load(whole)
    assert all(torch.equal(value, state[key]) for key, value in resumed.program.state_dict().items())
    # The damaged one was replaced.
    assert set(epochs(begun)) == {ONE, TWO}
    assert max(epochs(begun).values()) == 4


def test_nothing_is_read_of_checkpoints_that_are_all_damaged(build, train, begun):
    model = build()
    before = {name: value.clone() for name, value in model.program.state_dict().items()}
    for name in (ONE, TWO):
        truncate(begun / name / "state.pt")
    with pytest.raises(ValueError, match=rf"no checkpoint is whole\. .*{TWO} is damaged.*{ONE} is damaged"):
        train(model, 4, checkpoint=begun, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in model.program.state_dict().items())
    assert not model.is_trained


def test_an_object_that_would_run_code_is_not_loaded(build, train, begun):
    torch.save({"loop": Path("x")}, begun / TWO / "state.pt")
    sums = {name: folder_module.checksum(begun / TWO / name) for name in ("state.pt", "run.json")}
    folder_module.write_checksums(begun / TWO, sums)
    with pytest.warns(UserWarning, match=rf"{TWO} is damaged"):
        train(build(), 4, checkpoint=begun, resume=True)


# ---------------------------------------------------------------------- full disk


def test_training_goes_on_when_the_disk_is_full_and_older_checkpoints_stay(build, train, monkeypatch, tmp_path):
    whole, left = files.RecordingFile.write, [20]

    def write(stream, data):
        left[0] -= 1
        if left[0] < 0:
            stream.error = OSError(errno.ENOSPC, "No space left on device")
            return len(data)
        return whole(stream, data)

    kept = []
    with monkeypatch.context() as patch:

        def fill(epoch, row, program):
            if epoch == 1:
                left[0] = 20
                patch.setattr(files.RecordingFile, "write", write)
            kept.append(epochs(tmp_path))

        with pytest.warns(UserWarning, match=r"No checkpoint was written after \d epochs.*No space left") as caught:
            model = train(build(), 4, checkpoint=tmp_path, checkpoint_every=1, callbacks=[fill])
    assert 2 <= len(caught) <= 3
    assert model.is_trained
    assert kept[-1] == epochs(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [ONE, TWO]
    called = []
    train(build(), 4, checkpoint=tmp_path, resume=True, callbacks=[lambda epoch, *_: called.append(epoch)])
    assert called == list(range(max(kept[-1].values()), 4))


def test_a_folder_that_cannot_be_written_to_is_an_error_at_the_start(build, train, monkeypatch, tmp_path):
    def refuse(stream, data):
        stream.error = OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    model = build()
    with monkeypatch.context() as patch:
        patch.setattr(files.RecordingFile, "write", refuse)
        with pytest.raises(OSError, match=r"checkpoint='.*' could not be written \(No space left on device\)"):
            train(model, checkpoint=tmp_path)
    assert not model.is_trained
    assert len(model.history) == 0
    train(model, checkpoint=tmp_path)


# ---------------------------------------------------------------------- another run


@pytest.mark.parametrize(
    ("choices", "options", "said"),
    [
        ({}, {"lr": 0.01}, "lr: 0.002 then, 0.01 now"),
        ({}, {"max_epochs": 5}, "max_epochs: 4 then, 5 now"),
        ({}, {"seed": 1}, "seed: 0 then, 1 now"),
        ({}, {"batch_size": 20}, "batch_size: 16 then, 20 now"),
        ({}, {"train_size": 0.8}, "train_size: None then, 0.8 now"),
        ({}, {"shuffle_set_split": False}, "shuffle_set_split: True then, False now"),
        ({"n_hidden": 7, "gene_likelihood": "nb"}, {}, "n_hidden: 6 then, 7 now; gene_likelihood: 'zinb' then, 'nb'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_other_options_and_another_model_are_refused(build, train, begun, choices, options, said):
    before = epochs(begun)
    with pytest.raises(ValueError, match=rf"is of another run: {said}.*\. Give the same"):
        train(build(**choices), **{"max_epochs": 4, **options}, checkpoint=begun, resume=True)
    assert epochs(begun) == before


def changed(mosaic, what):
    if what == "counts":
        mosaic.X[0, 0] += 3
    elif what == "cells":
        mosaic = mosaic[:-1].copy()
    elif what == "order":
        mosaic = mosaic[::-1].copy()
    elif what == "names":
        mosaic.obs_names = [f"other_{name}" for name in mosaic.obs_names]
    elif what == "features":
        mosaic.var_names = [f"other_{name}" for name in mosaic.var_names]
    elif what == "batches":
        mosaic.obs["batch"] = mosaic.obs["batch"].to_numpy()[::-1]
    return mosaic


@pytest.mark.parametrize(("what", "said"), [
    ("counts", "other RNA counts"), ("cells", "cells: 60 then, 59 now"), ("order", "other names or order of the cells"),
    ("names", "other names or order of the cells"), ("features", "other names or order of the features"),
    ("batches", "other batches"),
])  # fmt: skip
def test_other_data_are_refused(mosaic, train, begun, what, said):
    other = changed(mosaic.copy(), what)
    pm.MULTIVI.setup_anndata(other, batch_key="batch", modality_key="modality")
    with pytest.raises(ValueError, match=f"is of another run: .*{said}"):
        train(pm.MULTIVI(other, n_hidden=6, n_latent=2), 4, checkpoint=begun, resume=True)


def test_another_version_is_refused(build, train, begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pyro_multivi._version.__version__", "99.0")
        with pytest.raises(ValueError, match=r"pyro_multivi: '0\..*' then, '99.0' now"):
            train(build(), 4, checkpoint=begun, resume=True)


def test_other_code_of_a_program_is_refused(build, train, tmp_path):
    def make(penalty):
        class Mine(pm.MultiVIProgram):
            if penalty:

                def model(self, cells):
                    return super().model(cells)

        return Mine

    class Mine(pm.MultiVIProgram):
        """A program of the same name."""

    train(build(program_class=make(False)), 1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="other code of the program"):
        train(build(program_class=Mine), 1, checkpoint=tmp_path, resume=True)


# ---------------------------------------------------------------------- arguments


def test_checkpoints_of_an_earlier_run_are_not_replaced(build, train, begun):
    before = epochs(begun)
    with pytest.raises(FileExistsError, match=r"holds checkpoints already: give resume=True"):
        train(build(), 4, checkpoint=begun)
    assert epochs(begun) == before


def test_a_run_that_is_refused_at_its_first_step_leaves_no_checkpoint(build, train, tmp_path):
    with pytest.raises(ValueError, match="early_stopping_monitor='nonsense' is not recorded"):
        train(build(), 1, checkpoint=tmp_path, early_stopping_monitor="nonsense")
    assert os.listdir(tmp_path) == []
    train(build(), 1, checkpoint=tmp_path)


def test_where_there_is_nothing_to_go_on_from(build, train, tmp_path):
    with pytest.warns(UserWarning, match="holds no checkpoint yet: training starts from the beginning"):
        train(build(), 1, checkpoint=tmp_path / "new", resume=True)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoints of train\(\)"):
        train(build(), 1, resume=tmp_path / "moved")


def test_arguments_that_do_not_go_together(build, train, tmp_path):
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        train(build(), resume=True)
    with pytest.raises(ValueError, match="checkpoint_every=3 needs the folder"):
        train(build(), checkpoint_every=3)
    with pytest.raises(ValueError, match=r"resume='.*a' and checkpoint='.*b' are two folders"):
        train(build(), checkpoint=tmp_path / "b", resume=tmp_path / "a")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="is a file: give a folder"):
        train(build(), checkpoint=tmp_path / "file")


@pytest.mark.parametrize(
    ("every", "epochs", "seconds"), [(None, None, 600), ("30 min", None, 1800), ("0.5min", None, 30), (7, 7, 0)]
)
def test_intervals(tmp_path, every, epochs, seconds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(folder_module.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(tmp_path, every)
    # The first is due at once.
    assert checkpoints.is_due()
    checkpoints._number = 1
    assert checkpoints.is_due(7) == (epochs == 7)
    assert not checkpoints.is_due(8)
    assert not checkpoints.is_due()
    now[0] = seconds
    assert checkpoints.is_due() == (epochs is None)


def test_what_a_kill_left_of_the_last_checkpoint_is_removed(build, train, tmp_path):
    """The run is at its end, so that no other checkpoint is written under that name."""
    folder = tmp_path / "whole"
    train(build(), 2, checkpoint=folder, checkpoint_every=1)
    shutil.copytree(folder / ONE, folder / f".{TWO}.saving-0123abcd")
    (folder / f".{ONE}.saving-0123abcd").mkdir()
    with pytest.warns(UserWarning, match="this training is finished after 2 epochs"):
        train(build(), 2, checkpoint=folder, checkpoint_every=1, resume=True)
    assert sorted(os.listdir(folder)) == [ONE, TWO]


def test_a_folder_put_aside_by_a_kill_is_found(build, train, begun):
    """As where two folders cannot be exchanged in one step."""
    shutil.move(begun / TWO, begun / f".{TWO}.earlier-01234567")
    called = []
    train(build(), 4, checkpoint=begun, resume=True, callbacks=[lambda epoch, *_: called.append(epoch)])
    assert called == [3]
