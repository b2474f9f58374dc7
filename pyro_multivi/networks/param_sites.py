"""Param sites: any Pyro inference finds a program's parameters, without Pyro's global store.

``pyro.infer.SVI`` optimises the parameters that have param statements. ``pyro.module`` makes these by a process-wide
store keyed by name, in which two programs of one name silently share or lose their parameters. Here the
statement's value leads straight back to the module's own Parameter, so the module stays the only owner.
"""

from __future__ import annotations

from typing import Any

import pyro.poutine.runtime
import torch
from torch import Tensor, nn
from torch.distributions import constraints


@pyro.poutine.runtime.effectful(type="param")
def _param_site(parameter: Tensor, constraint: Any = None, event_dim: int | None = None) -> Tensor:
    # SVI calls .unconstrained() of a param site's value and optimises the result.
    value = parameter.detach()
    value.unconstrained = lambda: parameter  # type: ignore[attr-defined]
    return value


def register_param_sites(module: nn.Module, prefix: str) -> None:
    """Make a Pyro param statement named ``prefix$$$name`` for each trainable parameter.

    Outside inference (no handler on the stack) this does nothing.

    Raises
    ------
    NotImplementedError
        If a handler gives a parameter another value.
    """
    if not pyro.poutine.runtime.am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        # A weight put in the place of a parameter (torch.func.functional_call) may be computed from others.
        if parameter.requires_grad and parameter.is_leaf:
            # Inspection tools read both keywords of every param statement.
            value = _param_site(parameter, name=f"{prefix}$$${name}", constraint=constraints.real, event_dim=None)
            its_own = getattr(value, "unconstrained", lambda: None)() is parameter
            # Trackers of provenance wrap the same numbers.
            if not its_own and not torch.equal(value.detach(), parameter.detach()):
                raise NotImplementedError(
                    f"poutine.lift, substitute or replay gave the parameter {name!r} a value that no network reads: "
                    "they hold their parameters themselves. Put it into the program by torch.func.functional_call "
                    "(recipe 'Parameters as random variables'), or override the method that uses the parameter."
                )
