"""Running average of a module's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Until then a tenth of the steps is too few for an average.
_FIRST = 100
# It reaches back over one step in so many, and is updated so many times meanwhile.
_SHARE = 10


class RunningAverage:
    """Average of a module's weights over its latest steps, to be used in their place.

    At a constant learning rate the latest weights wander about where the loss is lowest, thrown off by the
    minibatches they saw last; their average lies closer to it (Polyak and Juditsky 1992). After t steps it
    reaches back over t / 10 of them, at most ``steps``, with older weights counting exponentially less. Before the
    100th step there is no average, and no memory is taken for one.

    Parameters
    ----------
    module
        Module whose trained parameters and floating-point buffers are averaged.
    steps
        Number of steps that the average reaches back at most. None: the weights stay the latest ones.

    Examples
    --------
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> average = RunningAverage(layer, steps=100)
    >>> for step in range(1, 1001):
    ...     _ = layer.weight.data.fill_(step // 10 % 2)
    ...     average.update(step)
    >>> with average.in_place():
    ...     0.4 < float(layer.weight.detach()) < 0.6
    True
    >>> float(layer.weight.detach())
    0.0
    """

    def __init__(self, module: nn.Module, steps: int | None) -> None:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._weights: list[Tensor] = trained + [value for value in module.buffers() if value.is_floating_point()]
        self._steps = steps
        self._average: list[Tensor] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether there is an average that differs from the latest weights."""
        return self._average is not None

    def state(self) -> list[Tensor] | None:
        """The average, not copied; None before it has begun."""
        return self._average

    def restore(self, state: list[Tensor] | None) -> None:
        """Go on from a :meth:`state`."""
        if state is not None:
            state = [value.to(weight.device) for value, weight in zip(state, self._weights, strict=True)]
        self._average = state

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after the ``step``-th step, counted from 1."""
        if self._steps is None or step < _FIRST:
            return
        window = min(step // _SHARE, self._steps)
        # Not at every step: it reads and writes all weights.
        every = max(window // _SHARE, 1)
        if self._average is None:
            self._average = [weight.detach().clone() for weight in self._weights]
        elif step % every == 0:
            for average, weight in zip(self._average, self._weights, strict=True):
                average.lerp_(weight, every / window)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module has the averaged weights inside, and the latest ones again afterwards. Nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def settle(self) -> None:
        """Leave the averaged weights in the module, and begin anew."""
        self._exchange()
        self._average = None

    def _exchange(self) -> None:
        if self._average is not None:
            for average, weight in zip(self._average, self._weights, strict=True):
                average.data, weight.data = weight.data, average.data
