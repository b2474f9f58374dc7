"""Signals during a block that must not be interrupted: they wait, act once, and leave all handlers as they were."""

from __future__ import annotations

import signal
import threading

import pytest

from pyro_multivi.isolation import uninterrupted


def test_the_handler_of_the_user_is_called_once_and_kept():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with uninterrupted(), uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert seen == []
        assert seen == [1]
        with uninterrupted() as interruption:
            signal.raise_signal(signal.SIGINT)
            interruption.act()
            assert seen == [1, 1]
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert seen == [1, 1, 1], "the second one acts at once"
        assert seen == [1, 1, 1]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "default"])
def test_a_signal_that_python_does_not_handle_is_left_to_the_system(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with uninterrupted():
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_sets_no_handler():
    found = []

    def go():
        with uninterrupted() as interruption:
            found.append(signal.getsignal(signal.SIGINT))
            interruption.act()

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_a_termination_waits_until_the_block_lets_it_act():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
    try:
        with uninterrupted(signal.SIGTERM) as termination:
            assert not termination.waits
            signal.raise_signal(signal.SIGTERM)
            assert termination.waits
            assert not seen
            termination.act()
            assert len(seen) == 1
            signal.raise_signal(signal.SIGTERM)
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
