"""Training in several Gloo processes: the steps of one process, and all end with the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import anndata
import pytest
import torch

from pyro_multivi.processes.group import Processes
from pyro_multivi.traces import Terms
from pyro_multivi.training.distributed.shared_steps import sum_gradients, sum_terms

ROOT = Path(__file__).parents[3]
SHARED = ("defaults", "adversary", "batch_norm", "few_held_out", "continued", "stopped", "listed")
#: Scenarios and numbers of processes. In this order: some go on from what others left.
QUICK = (
    *("one_step:1", "one_step:2", "no_cells:2", "uninterrupted:2", "killed:2", "resumed_after_kill:2"),
    "from_disk:2",
    "other_given:2",
    *("posterior:1", "posterior:2"),
)
SLOW = (
    *(
        "one_step:3",
        "learned:1",
        "learned:2",
        "terminated:2",
        "resumed_after_termination:2",
        "posterior:3",
        "not_resumed:2",
    ),
    *(f"{name}:2" for name in (*SHARED, "other_cells", "fails", "out_of_one")),
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Outcomes of the processes of a scenario, by its name and their number; run with others of its kind."""
    folder, done = tmp_path_factory.mktemp("processes"), set()
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def read(name, size, ranks=None):
        runs = next(each for each in (QUICK, SLOW) if f"{name}:{size}" in each)
        if runs not in done:
            done.add(runs)
            command = [sys.executable, Path(__file__).with_name("launch.py"), folder, *runs]
            ran = subprocess.run(command, capture_output=True, text=True, env=alone, check=False)
            assert ran.returncode == 0, ran.stdout + ran.stderr
        ranks = range(size) if ranks is None else ranks
        return [torch.load(folder / f"{name}-{size}-{rank}.pt", weights_only=True) for rank in ranks]

    read.folder = folder
    return read


slow = pytest.mark.slow


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=slow)])
def test_a_step_without_noise_is_that_of_one_process(ended, size):
    (one,), first = ended("one_step", 1), ended("one_step", size)[0]
    # Adam's first moment after one step is a tenth of the gradient.
    assert one["moments"].keys() == first["moments"].keys()
    for key, expected in one["moments"].items():
        torch.testing.assert_close(first["moments"][key], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert first["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], rel=1e-6)
    assert first["history"][0]["elbo_train"] == pytest.approx(one["history"][0]["elbo_train"], rel=1e-6)


@pytest.mark.parametrize("name", ["uninterrupted", "from_disk", *(pytest.param(name, marks=slow) for name in SHARED)])
def test_all_processes_end_with_the_same_weights_and_history(ended, name):
    one, other = ended(name, 2)
    assert "error" not in one, one["error"]
    assert one["history"] == other["history"]
    assert [key for key, value in one["weights"].items() if not torch.equal(value, other["weights"][key])] == []
    assert [key for key, value in one["moments"].items() if not torch.equal(value, other["moments"][key])] == []


@slow
def test_two_processes_learn_as_much_as_one(ended):
    (one,), two = ([[row["elbo_train"] for row in run["history"]] for run in ended("learned", n)] for n in (1, 2))
    assert len(one) == len(two[0])
    # Of 131 before, which an epoch's noise moves by 0.15: 127.9 by one process, 127.9 by two.
    ends = [sum(losses[-10:]) / 10 for losses in (one, two[0])]
    assert ends[1] < two[0][0] - 2
    assert abs(ends[1] - ends[0]) < 0.4


@slow
def test_a_callback_of_one_process_stops_all(ended):
    assert len(ended("stopped", 2)[1]["history"]) == 2


def test_too_few_cells_are_refused_in_every_process(ended):
    for each in ended("no_cells", 2):
        assert each["error"] == (
            "ValueError: 3 cells are too few for 2 processes, of which each needs two: start at most 1."
        )


@slow
def test_processes_with_other_cells_are_refused(ended):
    for each in ended("other_cells", 2):
        assert each["error"].startswith(
            "ValueError: The 2 processes were not given the same. From process 0 differ process 1 (cells: 60 in "
            "process 0, 61 in process 1; other names or order of the cells; "
        )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("more_counts", "(other RNA counts; other ATAC counts)"),
        ("other_names", "(other names or order of the features)"),
        ("other_batches", "other batches of the cells"),
        ("other_age", "(other batches or covariates of the cells)"),
        ("fewer_measured", "other cells measured in RNA"),
        ("mixing_weight", "(mixing_weight: 4.0 in process 0, 0.0 in process 1)"),
        ("contrast_weight", "(contrast_weight: 2.5 in process 0, 0.0"),
        ("dropout_rate", "(dropout_rate: 0.1 in process 0, 0.3"),
        ("lr", "(lr: 0.002 in process 0, 0.001 in process 1)"),
        ("seed", "(seed: 0 in process 0, 5 in process 1)"),
        ("external_indexing", "(other cells in external_indexing)"),
        ("checkpoint", "(checkpoint: 'none' in process 0, 'given' in process 1)"),
    ],
)
def test_processes_that_were_given_other_things_are_refused(ended, name, words):
    one, other = ended("other_given", 2)
    assert "error" not in one, one["error"]
    assert one[name] == other[name]
    assert one[name].startswith("The 2 processes were not given the same. From process 0 differ process 1 (")
    assert words in one[name]


def test_seeds_of_initial_weights_may_differ_as_the_first_process_gives_its_own(ended):
    assert [each["nothing"] for each in ended("other_given", 2)] == ["", ""]


def test_a_killed_process_ends_the_others_with_a_message(ended):
    lost = ended("killed", 2, ranks=[0])[0]["error"]
    assert lost.startswith("ProcessLostError: Process 0 of 2 has lost another one, which ended, failed or did not come")
    assert "resume=True goes on from the latest checkpoint. (torch: " in lost


@slow
def test_an_error_of_one_process_ends_the_others(ended):
    lost, own = ended("fails", 2)
    assert own["error"] == "OSError: nothing works"
    assert lost["error"].startswith("ProcessLostError: Process 0 of 2 has lost another one")


@pytest.mark.parametrize("name", ["resumed_after_kill", pytest.param("resumed_after_termination", marks=slow)])
def test_training_goes_on_from_a_checkpoint_of_several_processes(ended, name):
    expected, one, other = ended("uninterrupted", 2)[0], *ended(name, 2)
    for each in (one, other):
        assert "error" not in each, each["error"]
        assert each["history"] == one["history"]
        assert [key for key, value in expected["weights"].items() if not torch.equal(value, each["weights"][key])] == []
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in of["history"]] for of in (expected, one)]
    assert rows[0] == rows[1]


@slow
def test_a_checkpoint_is_whole_before_a_signal_to_another_process_ends_any(ended):
    ended("resumed_after_termination", 2)
    found = {path.parent.name: json.loads(path.read_text()) for path in ended.folder.glob("terminated/*/run.json")}
    # Of the first step, of the signal after two epochs, and of the end, in place of the first.
    assert {name: each["epoch"] for name, each in found.items()} == {"checkpoint-1": 4, "checkpoint-2": 2}


@slow
def test_checkpoints_are_not_replaced_unasked(ended):
    first, other = ended("not_resumed", 2)
    assert first["error"].startswith("FileExistsError: checkpoint=")
    assert other["error"] == "ProcessLostError: Process 1 of 2 ends: the message of process 0 says why."


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=slow)])
def test_results_are_those_of_one_process_bit_by_bit(ended, size):
    (one,), all_of_them = ended("posterior", 1), ended("posterior", size)
    assert len(one) > 10, one
    for each in all_of_them:
        assert "error" not in each, each["error"]
        # The first of several processes has the odd minibatch.
        assert each.pop("calls") < 0.7 * one["calls"]
        for name in ("scores", "imputed"):  # sums over cells, each process its own first
            torch.testing.assert_close(each.pop(name), one[name], rtol=1e-12, atol=0, equal_nan=True)
        assert [
            name for name, value in each.items() if not torch.equal(value.nan_to_num(), one[name].nan_to_num())
        ] == []


@pytest.mark.parametrize("name", ["rho", "imputed"])
def test_files_are_those_of_one_process(ended, name):
    for size in (1, 2):
        ended("posterior", size)  # writes them
    one, two = (anndata.read_h5ad(ended.folder / f"{name}{size}.h5ad") for size in (1, 2))
    assert list(one.layers) == list(two.layers)
    assert one.obs_names.equals(two.obs_names)
    pairs = [(one.X, two.X), *((one.layers[layer], two.layers[layer]) for layer in one.layers)]
    for first, other in pairs:
        assert (first != other).sum() == 0


@slow
def test_a_file_is_that_of_the_first_process(ended):
    first, other = ended("out_of_one", 2)
    assert first["path"].endswith("alone.h5ad")
    assert "call it in all of them within `with pyro_multivi.distributed():`" in other["error"]


class Echo(Processes):
    """Two processes with the same tensors; both are this one."""

    def __init__(self) -> None:
        super().__init__(0, 2)

    def sum_(self, tensors):
        for tensor in tensors:
            tensor.mul_(2)


def test_gradients_weigh_as_the_cells_of_a_share():
    wide, narrow = (torch.nn.Parameter(torch.zeros(n)) for n in (100_000, 3))
    unused = torch.nn.Parameter(torch.zeros(2))
    wide.grad, narrow.grad = torch.full((100_000,), 2.0), torch.full((3,), 4.0)
    loss = sum_gradients(Echo(), [wide, unused, narrow], torch.tensor(10.0), 0.25)
    assert float(loss) == 5.0
    assert wide.grad.unique().tolist() == [1.0]
    assert narrow.grad.tolist() == [2.0] * 3
    assert unused.grad is None


def test_one_process_changes_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    loss, terms = torch.tensor(3.0), Terms(n_cells=4)
    assert sum_gradients(Processes(), [parameter], loss, 0.5) is loss
    assert parameter.grad.tolist() == [1.0, 1.0]
    assert sum_terms(Processes(), terms, 9) is terms
