"""Optional dependencies: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module or say which extra brings it.

    Parameters
    ----------
    module
        Import name, for instance ``"mudata"``.
    extra
        Extra of this package that installs it, for instance ``"mudata"``.

    Raises
    ------
    ImportError
        If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is installed but broken shows its own error.
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"{module!r} is needed here and is not installed. Install the extra: pip install 'pyro-multivi[{extra}]'"
        ) from error


@contextmanager
def mudata_as_given() -> Iterator[ModuleType]:
    """Import mudata; within the context a MuData keeps the tables it was given.

    Before 0.4, mudata copies columns between the tables of the modalities and that of the MuData, and warns that it
    will not for long. From 0.4 on there is nothing to switch off. It draws names of columns from Python's generator of
    random numbers, which is as it was afterwards.
    """
    mudata = require("mudata", "mudata")
    set_options = getattr(mudata, "set_options", None)
    options = nullcontext() if set_options is None else set_options(pull_on_update=False)
    random_state = random.getstate()
    with _handler_of_messages():
        options.__enter__()
    try:
        yield mudata
    finally:
        with _handler_of_messages():
            options.__exit__(None, None, None)
        random.setstate(random_state)


@contextmanager
def _handler_of_messages() -> Iterator[None]:
    """Give the root logger a handler: without any, mudata's messages to it install one that stays.

    After that, the ``logging.basicConfig`` of a user would do nothing.
    """
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)
