"""Gradients of the block-wise likelihoods, formed together with the value where that is possible.

Gradients formed during the forward pass are right only if the objective weighs all evaluated
cells equally, because the contraction over cells in a weight's gradient cannot be reweighted
later. The backward pass checks this, and forms them again with the true weights if need be.
On an accelerator the check would make the host wait, so gradients are formed in the backward
pass there, unless the caller declares equal weights with :func:`equal_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

_DECLARED: ContextVar[float | None] = ContextVar("equal_weights", default=None)


@contextmanager
def equal_weights(weight: float = 1.0) -> Iterator[None]:
    """Declare that all evaluated cells have one weight in the objective, close to ``weight``.

    Log-probabilities computed inside may form their gradients at once, also on an accelerator.
    The weights are equal in an ELBO whose likelihoods carry their mask themselves (``.mask``) and are
    scaled as a whole, by a plate or :func:`pyro.poutine.scale` with one number. They are not under
    :func:`pyro.poutine.mask` or weights per cell: there an accelerator would return wrong gradients,
    while a CPU notices. A good guess of the value saves a pass over the gradients; it need not be right.

    Parameters
    ----------
    weight
        Expected derivative of the objective by a cell's log-probability, not 0.

    Raises
    ------
    ValueError
        If ``weight`` is 0 or not finite.

    Examples
    --------
    >>> with equal_weights(-1 / 128):
    ...     pass
    """
    if not weight or weight - weight != 0:
        raise ValueError(f"weight must be a finite number other than 0, got {weight}")
    token = _DECLARED.set(weight)
    try:
        yield
    finally:
        _DECLARED.reset(token)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on gradients that raises an error when they are differentiated.

    It depends on ``n`` tensors, all that the gradients are functions of: ``torch.autograd.grad`` visits no node that
    does not lead to what it differentiates by, and would take the second derivatives for 0.
    """

    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in tensors[n:])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the block-wise likelihoods have no second derivatives; "
            "give the distribution readout.dense() instead of the readout to get them"
        )


Gradients = tuple[Tensor | None, ...]
# From weights per cell (None: no gradients) and whether to form the value, to value and gradients.
Evaluation = Callable[[Tensor | None, bool], tuple[Tensor | None, Gradients]]


class Pending:
    """Gradients of one likelihood, formed before the weights of the objective are known or afterwards."""

    def __init__(self, evaluate: Evaluation, device: torch.device, wants_grad: bool) -> None:
        declared = _DECLARED.get()
        self.weight = 1.0 if declared is None else declared
        self.evaluate = evaluate
        self.formed: Gradients | None = None
        self._can_check = device.type == "cpu"
        self._forms_now = wants_grad and (self._can_check or declared is not None)

    def value(self, hidden: Tensor) -> Tensor:
        """Evaluate the log-probabilities, one for each row, and the gradients if that can be done already."""
        weights = hidden.new_full((len(hidden),), self.weight) if self._forms_now else None
        value, gradients = self.evaluate(weights, True)
        if weights is not None:
            self.formed = gradients
        assert value is not None
        return value

    def gradients(self, upstream: Tensor) -> Gradients:
        """Gradients under the weights of the objective."""
        formed, self.formed = self.formed, None  # given away: a second backward pass forms its own
        if formed is not None and upstream.numel() > 0:
            first = upstream[0]
            if not self._can_check:
                formed = tuple(None if g is None else g.mul_(first / self.weight) for g in formed)
            elif not bool((upstream == first).all()):
                formed = None
            elif float(first) != self.weight:
                formed = tuple(None if g is None else g.mul_(float(first) / self.weight) for g in formed)
        if formed is None:
            formed = self.evaluate(upstream, False)[1]
        return formed


def log_prob(evaluate: Callable[..., Any], make_term: Callable[..., Any], *inputs: Tensor | None) -> Tensor:
    """Log-probability of each cell, (n,), with gradients for the inputs.

    Parameters
    ----------
    evaluate
        Takes the term of the likelihood, then the arguments of an :data:`Evaluation`.
    make_term
        Makes that term, from the inputs and the tuple that tells which of them need a gradient.
    inputs
        Tensors that gradients may be asked for. The first is a hidden layer, (n, H).
    """
    value: Tensor = _LogProb.apply(evaluate, make_term, torch.is_grad_enabled(), *inputs)
    return value


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, evaluate: Callable[..., Any], make_term: Callable[..., Any], grad_enabled: bool, *inputs: Any
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        hidden: Tensor = inputs[0]
        evaluation: Evaluation = partial(evaluate, make_term(*inputs, needs))
        ctx.pending = Pending(evaluation, hidden.device, grad_enabled and any(needs))
        ctx.save_for_backward(*inputs)
        return ctx.pending.value(hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        inputs: Gradients = ctx.saved_tensors  # raises if an input was changed in place since the forward pass
        with torch.no_grad():
            gradients: Gradients = ctx.pending.gradients(upstream)
        if torch.is_grad_enabled():
            gradients = _FirstOrderOnly.apply(len(inputs) + 1, *inputs, upstream, *gradients)
        return None, None, None, *gradients
