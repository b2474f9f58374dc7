"""Processes of torchrun, as its environment tells of them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pyro_multivi.processes.group import current, distributed, is_first_process

VARIABLES = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    def put(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    put()
    return put


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "1"}])
def test_one_process_is_alone(environment, variables):
    environment(**variables)
    with distributed() as processes:
        assert (processes.rank, processes.size, processes.are_several) == (0, 1, False)
        assert processes.any(True, False) == [True, False]
        assert processes.broadcast(b"ab") == b"ab"
    assert is_first_process()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("WORLD_SIZE", "The environment has RANK=1 and MASTER_ADDR=127.0.0.1 and MASTER_PORT=29500 and no WORLD_SIZE:"),
        ("RANK", "and no RANK:"),
        ("MASTER_ADDR", "and no MASTER_ADDR: to share a call, processes need all of RANK, WORLD_SIZE, MASTER_ADDR, "),
    ],
)
def test_half_an_environment_is_refused(environment, build, missing, message):
    environment(**{name: value for name, value in VARIABLES.items() if name != missing})
    with pytest.raises(ValueError, match=re.escape(message)), distributed():
        pass
    with pytest.raises(ValueError, match=re.escape(message)):
        build().train(1)
    assert not current().are_several


@pytest.mark.parametrize("wrong", [{"RANK": "2"}, {"RANK": "-1"}, {"WORLD_SIZE": "two"}])
def test_numbers_that_do_not_fit_are_refused(environment, wrong):
    environment(**{**VARIABLES, **wrong})
    with pytest.raises(ValueError, match="RANK is a whole number from 0, and WORLD_SIZE one above it. torchrun sets"):
        is_first_process()


def test_the_first_process_is_that_of_rank_zero(environment):
    environment(**VARIABLES)
    assert not is_first_process()
    environment(**{**VARIABLES, "RANK": "0"})
    assert is_first_process()


_RESTARTED = """
import os, sys, time
from pyro_multivi.processes.group import distributed

again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
if again and os.environ["RANK"] == "1":
    time.sleep(3)  # the other is first, and finds what the first start left
with distributed() as processes:
    processes.wait()
    if not again and processes.rank == 1:
        os._exit(9)
    processes.wait()
open(f"{sys.argv[1]}/{processes.rank}", "w").close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Gloo finds no address")
def test_processes_that_torchrun_starts_again_find_each_other(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(_RESTARTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    subprocess.run([*torchrun, script, tmp_path], capture_output=True, check=False)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
