"""Files and folders written as a whole, whatever interrupts the writer: killed before each of its file operations."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest

from pyro_multivi import files
from pyro_multivi.files import RecordingFile, replacing, write_whole, writing

FILES = Path(__file__).parents[1] / "pyro_multivi" / "files.py"

posix = pytest.mark.skipif(sys.platform == "win32", reason="forks")

#: The module alone, so that processes are made fast and have one thread.
BEGINNING = """
import importlib.util, json, os, shutil, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
if "renames" in sys.argv:
    files._exchange = lambda *_: False
home = Path(sys.argv[2])
target = home / "model"
seen = {}

def count(what):
    seen[what] = seen.get(what, 0) + 1

def save(version, overwrite=True):
    with files.replacing(target, "dir_path='model'", "SUMS", overwrite) as work:
        for name in ("weights", "description"):
            with files.writing(work / name) as stream:
                stream.write(version.encode() * 10_000)
        (work / "SUMS").write_text(version)

def content(folder):
    names = ("weights", "description", "SUMS")
    found = {(folder / name).read_text()[:3] for name in names if (folder / name).exists()}
    whole = len(found) == 1 and all((folder / name).exists() for name in names)
    return found.pop() if whole else f"broken: {found}"
"""

KILLS = """
def doomed(work, number, kind):
    # The process gets a signal before its n-th file operation.
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        left = [number]
        def hook(event, _):
            if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "ctypes") and left[0] >= 0:
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), kind)
        sys.addaudithook(hook)
        try:
            work()
        except KeyboardInterrupt:
            os._exit(3)
        os._exit(0 if left[0] >= 0 else 4)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for kind in (signal.SIGKILL, signal.SIGINT):
    for before in ("old", None):
        for number in range(1000):
            shutil.rmtree(home)
            home.mkdir()
            if before:
                save(before)
            status = doomed(lambda: save("new"), number, kind)
            count(f"{kind.name} {status}")
            folder = files.present(target)
            found = content(folder) if folder.exists() else None
            if found not in (before, "new"):
                count(f"wrong: {kind.name} {before} {number} {found}")
            if kind == signal.SIGINT and folder != target:
                count(f"not rolled back: {number}")
            save("end")
            if content(target) != "end" or [path.name for path in home.iterdir()] != ["model"]:
                count(f"left: {sorted(path.name for path in home.iterdir())}")
            if status == 0:
                break
        else:
            count("never ended")
print(json.dumps(seen))
"""

FILE_KILLS = (
    KILLS.split("for kind in")[0]
    + """
path = home / "table.csv"
for before in (b"old", None):
    for number in range(1000):
        shutil.rmtree(home)
        home.mkdir()
        if before:
            path.write_bytes(before)
        status = doomed(lambda: files.write_whole(path, b"new"), number, signal.SIGKILL)
        count(f"SIGKILL {status}")
        if (path.read_bytes() if path.exists() else None) not in (before, b"new"):
            count(f"wrong: {number}")
        files.write_whole(path, b"end")
        if [entry.name for entry in home.iterdir()] != ["table.csv"]:
            count("left")
        if status == 0:
            break
print(json.dumps(seen))
"""
)

FULL = """
import resource
for before in ("old", None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
    shutil.rmtree(home)
    home.mkdir()
    if before:
        save(before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        save("new")
    except OSError as error:
        count(str(error))
    if (content(target) if target.exists() else None) != before:
        count("wrong")
    if [path.name for path in home.iterdir()] != (["model"] if before else []):
        count("left")
print(json.dumps(seen))
"""

TWO_WRITERS = """
save("old")
children = []
for version in ("one", "two"):
    if (pid := os.fork()) == 0:
        failed = 0
        for _ in range(60):
            try:
                save(version)
            except OSError:
                failed += 1
        os._exit(1 if failed == 60 else 0)
    children.append(pid)
while children:
    found = files.present(target)
    try:
        number = os.open(found, os.O_RDONLY)
        try:
            # The files of one folder, whatever has its name meanwhile.
            names = {name: open(os.open(name, os.O_RDONLY, dir_fd=number)).read()[:3]
                     for name in ("weights", "description", "SUMS")}
        finally:
            os.close(number)
        count("whole" if len(set(names.values())) == 1 else f"mixed {names}")
    except FileNotFoundError:  # one that was replaced and is being removed
        count("gone")
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            count(f"writer {os.waitstatus_to_exitcode(status)}")
            children.remove(pid)
save("end")
count(content(target))
count(str([path.name for path in home.iterdir()]))
print(json.dumps(seen))
"""


def run(code: str, home: Path, *options: str) -> dict[str, int]:
    home.mkdir()
    command = [sys.executable, "-c", BEGINNING + code, str(FILES), str(home), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@posix
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_writer_killed_before_any_operation_leaves_the_old_or_the_new(tmp_path, way):
    seen = run(KILLS, tmp_path / "home", way)
    # -9: killed; 3: interrupted; 4: interrupted so late that it went on to the end; 0: not reached.
    assert set(seen) <= {"SIGKILL -9", "SIGKILL 0", "SIGINT 3", "SIGINT 4", "SIGINT 0"}, seen
    assert seen["SIGKILL -9"] > 30
    assert seen["SIGINT 3"] > 30


@posix
def test_a_file_killed_before_any_operation_is_the_old_or_the_new(tmp_path):
    seen = run(FILE_KILLS, tmp_path / "home")
    assert set(seen) == {"SIGKILL -9", "SIGKILL 0"}, seen
    assert seen["SIGKILL -9"] > 5


@posix
def test_a_full_disk_leaves_the_old_and_a_clear_error(tmp_path):
    seen = run(FULL, tmp_path / "home")
    message = "dir_path='model' could not be written (File too large): what was there before is unchanged."
    assert seen == {f"[Errno 27] {message}": 2}


@posix
@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_of_two_writers_one_is_whole(tmp_path, way):
    seen = run(TWO_WRITERS, tmp_path / "home", way)
    assert seen.pop("whole") > 0
    seen.pop("gone", None)
    assert seen == {"writer 0": 2, "end": 1, "['model']": 1}


def test_an_interrupt_that_a_library_loses_is_not_lost(tmp_path):
    """HDF5 swallows what is raised while it writes to a file in Python: data were missing, and nobody knew."""
    raised_in_the_middle = []

    def write():
        with writing(tmp_path / "data") as stream:
            try:
                stream.write(b"first")
                signal.raise_signal(signal.SIGINT)
                stream.write(b"second")
            except BaseException as error:
                raised_in_the_middle.append(error)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not raised_in_the_middle
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which no file can be made")
def test_a_folder_in_which_no_file_can_be_made_is_an_error():
    with pytest.raises(FileNotFoundError, match="/proc/table.csv"):
        write_whole(Path("/proc/table.csv"), b"content")


def test_an_error_of_writing_that_a_library_loses_is_raised_at_the_end(tmp_path):
    def write():
        with writing(tmp_path / "data") as stream:
            stream.error = OSError("disk full")
            assert stream.write(b"lost") == 4

    with pytest.raises(OSError, match="disk full"):
        write()


def test_what_a_failed_write_left_out_is_not_read_back(tmp_path):
    """HDF5 read what was not there and followed it as references: the process ended by a segmentation fault."""
    with RecordingFile(tmp_path / "data", "x+") as stream:
        stream.write(b"first")
        stream.seek(0)
        assert stream.readinto(bytearray(5)) == 5
        stream.error = OSError("disk full")
        stream.write(b"second")
        with pytest.raises(OSError, match="disk full"):
            stream.readinto(bytearray(6))


def test_a_disk_that_is_full_at_any_write_of_hdf5_is_one_error(tmp_path, monkeypatch):
    writes, room, read_back = 0, 10_000, []

    class FullDisk(RecordingFile):
        def write(self, data):
            nonlocal writes
            writes += 1
            if writes > room:
                self.error = self.error or OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

        def readinto(self, buffer):
            if self.error is not None:
                read_back.append(room)
            return super().readinto(buffer)

    def write(path):
        nonlocal writes
        writes = 0
        with writing(path) as stream, h5py.File(stream, "w") as file:
            for name in ("first", "second"):
                file.create_dataset(name, data=["a", "text", "of", "any length"], dtype=h5py.string_dtype())
                file[name].attrs["encoding"] = "text"

    monkeypatch.setattr(files, "RecordingFile", FullDisk)
    write(tmp_path / "whole.h5")
    assert writes > 10
    for room in range(writes):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / f"{room}.h5")
    assert read_back


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    def write():
        with replacing(tmp_path / "model", "dir_path='model'", "SUMS"):
            pass

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"dir_path='model' could not be written \(Permission denied\)"):
        write()


def test_a_disk_that_fills_up_is_an_error_that_names_the_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "table.csv"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(OSError, match="table.csv") as caught:
            write_whole(path, bytes(5_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
