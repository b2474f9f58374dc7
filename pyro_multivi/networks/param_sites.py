"""Param sites: any Pyro inference finds a program's parameters, without Pyro's global store.

``pyro.infer.SVI`` optimises the parameters that have param statements. ``pyro.module`` makes these by a process-wide
store keyed by name, in which two programs of one name silently share or lose their parameters. Here the
statement's value leads straight back to the module's own Parameter, so the module stays the only owner.
"""

from __future__ import annotations

from typing import Any

import pyro.poutine.runtime
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
    """
    if not pyro.poutine.runtime.am_i_wrapped():
        return
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            # Inspection tools read both keywords of every param statement.
            _param_site(parameter, name=f"{prefix}$$${name}", constraint=constraints.real, event_dim=None)
