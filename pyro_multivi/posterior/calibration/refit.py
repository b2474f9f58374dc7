"""What is learned after training of the weights that came out of it, while these are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro_multivi.posterior.calibration.fit_depth import clear_depth_regressions
from pyro_multivi.posterior.calibration.fit_mixture import clear_mixture
from pyro_multivi.posterior.engine.depth_regression import LINK
from pyro_multivi.posterior.engine.population_mixture import MIXTURE_WEIGHT, POPULATION
from pyro_multivi.program import MultiVIProgram

_NAMES = (*LINK.values(), *MIXTURE_WEIGHT.values(), *POPULATION.values())


@contextmanager
def refit(program: MultiVIProgram, n_epochs: Callable[[], int]) -> Iterator[None]:
    """Forget what was learned: of other weights it is wrong. It comes back if an error ends training before an epoch.

    Parameters
    ----------
    program
        To be trained inside.
    n_epochs
        Tells how many epochs it was trained for so far.
    """
    kept = {name: getattr(program, name).clone() for name in _NAMES}
    before = n_epochs()
    clear_depth_regressions(program)
    clear_mixture(program)
    try:
        yield
    except BaseException:
        if n_epochs() == before:
            for name, value in kept.items():
                # Looked up anew: training may have moved the program to another device.
                getattr(program, name).copy_(value)
        raise
