"""Settings by scvi-tools' names: ``pyro_multivi.settings.seed = 1``."""

from __future__ import annotations

import logging
import operator
from typing import Any

logger = logging.getLogger("pyro_multivi")


class Settings:
    """Defaults of what is called afterwards. Nothing global of torch or numpy depends on the seed.

    Examples
    --------
    >>> import pyro_multivi as pm
    >>> pm.settings.seed = 3  # of models made, and trained, from here on without seed=
    >>> pm.settings.seed
    3
    >>> pm.settings.seed = None  # as at the start: 0
    """

    #: Accepted, and of no effect: loading is not done by workers, and warnings name the caller's line anyhow.
    dl_num_workers: int = 0
    dl_persistent_workers: bool = False
    dl_pin_memory_gpu_training: bool = False
    warnings_stacklevel: int = 2
    progress_bar_style: str = "tqdm"
    logging_dir: str = "."
    jax_preallocate_gpu_memory: bool | float = False

    _KNOWN = (
        "seed", "verbosity", "num_threads", "batch_size", "dl_num_workers", "dl_persistent_workers",
        "dl_pin_memory_gpu_training", "warnings_stacklevel", "progress_bar_style", "logging_dir",
        "jax_preallocate_gpu_memory",
    )  # fmt: skip

    def __init__(self) -> None:
        self._seed: int | None = None
        self._batch_size: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._KNOWN:
            raise AttributeError(f"settings has no {name!r}; it has {', '.join(map(repr, self._KNOWN))}.")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"settings: {', '.join(f'{name}={getattr(self, name)!r}' for name in self._KNOWN)}"

    @property
    def seed(self) -> int | None:
        """Seed of initial weights, split, order of cells and noise of training where ``seed`` is not given."""
        return self._seed

    @seed.setter
    def seed(self, value: int | None) -> None:
        self._seed = None if value is None else _whole("seed", value, 0)

    def seed_or(self, given: int | None) -> int:
        """A seed that was given, or this default."""
        return given if given is not None else self._seed or 0

    @property
    def batch_size(self) -> int | None:
        """Cells per step of training where ``batch_size`` is not given; None: by the number of cells."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int | None) -> None:
        self._batch_size = None if value is None else _whole("batch_size", value, 1)

    @property
    def num_threads(self) -> int:
        """Threads of torch's CPU operations, in the whole process."""
        import torch

        return torch.get_num_threads()

    @num_threads.setter
    def num_threads(self, value: int) -> None:
        import torch

        torch.set_num_threads(_whole("num_threads", value, 1))

    @property
    def verbosity(self) -> int:
        """Level of the logger "pyro_multivi", a number or a name such as "ERROR".

        Setting it makes messages of that level appear on stderr, unless logging was configured otherwise.
        """
        return logger.getEffectiveLevel()

    @verbosity.setter
    def verbosity(self, level: int | str) -> None:
        try:
            logger.setLevel(level.upper() if isinstance(level, str) else level)
        except (TypeError, ValueError):
            raise ValueError(
                f"settings.verbosity={level!r} is not allowed: give one of logging, such as logging.INFO or 'ERROR'."
            ) from None
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())


def _whole(name: str, value: Any, least: int) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool) or not least <= found < 2**63:
        raise ValueError(f"settings.{name}={value!r} is not allowed: give a whole number of at least {least}, or None.")
    return found


settings = Settings()
