"""Memory of blocks that were read, returned to the system."""

import pytest

from pyro_multivi.data.stores import freed


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(freed, "_trim", lambda: calls.append)
    monkeypatch.setattr(freed, "_read", 0)
    return calls


def test_memory_is_returned_each_time_so_many_bytes_were_read(calls):
    for _ in range(10):
        freed.count_read(freed.EVERY // 4)
    assert calls == [0, 0]


def test_a_system_without_the_call_goes_on(monkeypatch):
    def without(_):
        raise OSError("no such library")

    freed._trim.cache_clear()
    monkeypatch.setattr(freed.ctypes, "CDLL", without)
    monkeypatch.setattr(freed, "_read", 1)
    try:
        freed.count_read(freed.EVERY)
        assert freed._trim()(0) == 0
        assert freed._read == 0
    finally:
        freed._trim.cache_clear()
