"""Settings and remarks of one test do not reach the next."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

import pyro_multivi as pm
from pyro_multivi.api.scvi_tools import arguments


@pytest.fixture(autouse=True)
def settings_as_at_the_start(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(arguments, "_said", set())
    logger, threads = logging.getLogger("pyro_multivi"), pm.settings.num_threads
    level, handlers = logger.level, [*logger.handlers]
    yield
    pm.settings.seed = pm.settings.batch_size = None
    pm.settings.num_threads = threads
    logger.setLevel(level)
    logger.handlers[:] = handlers
