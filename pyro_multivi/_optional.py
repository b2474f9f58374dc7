"""Optional dependencies: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
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
