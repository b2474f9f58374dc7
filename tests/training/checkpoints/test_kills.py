"""Training that is killed at random moments, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def killed(number: int, *options: str) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "kill_training.py", "--kills", str(number), *options]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_three_kills():
    assert "3 of 3 the same, bit by bit; 0 faults" in killed(
        3, "--epochs", "5", "--cells", "60", "--settings", "adversary"
    )


@pytest.mark.slow
def test_twenty_kills():
    assert "20 of 20 the same, bit by bit; 0 faults" in killed(20, "--seed", "1")
