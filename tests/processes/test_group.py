"""Processes of torchrun, as its environment tells of them."""

from __future__ import annotations

import re

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
