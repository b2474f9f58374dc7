"""What is learned after training of the weights that came out of it, while these are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyro_multivi.posterior.depth import LINK
from pyro_multivi.posterior.learning_depth import forget_depths
from pyro_multivi.posterior.learning_trust import forget_trust
from pyro_multivi.posterior.trust import POPULATION, TRUST
from pyro_multivi.program import MultiVIProgram

_NAMES = (*LINK.values(), *TRUST.values(), *POPULATION.values())


@contextmanager
def learning_anew(program: MultiVIProgram, n_epochs: Callable[[], int]) -> Iterator[None]:
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
    forget_depths(program)
    forget_trust(program)
    try:
        yield
    except BaseException:
        if n_epochs() == before:
            for name, value in kept.items():
                # Looked up anew: training may have moved the program to another device.
                getattr(program, name).copy_(value)
        raise
