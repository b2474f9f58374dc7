"""Steps of wide layers ahead of the others, so that gradients need not all be held at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# A gradient of fewer elements (4 MB) is not worth a step of its own.
_WIDE = 1_000_000


class OptimizerInBackward:
    """Lets each wide layer take its step as soon as its own gradients are complete.

    The gradient of a wide layer is tens of megabytes. With all of them taken at the end of the backward
    pass, those of decoders and encoders exist side by side; here the memory of one serves the next.
    Parameters and moments come out as by one ``optimizer.step()``, which is still to be called for the rest.

    Not for gradients that are looked at, changed or summed up between the backward pass and the step
    (clipping, several backward passes): those of wide layers are None by then.

    Parameters
    ----------
    module
        Whose weights of more than a million elements are concerned; a bias beside a weight ("x.bias"
        to "x.weight") is waited for.
    optimizer
        A torch optimiser of these weights. Its learning rates are those of now.

    Notes
    -----
    A layer whose bias has a gradient that is not finite is left alone, with its gradients, for the caller to
    refuse: whatever spoils the gradient of the weight also spoils that of the bias, a thousandth of its size.

    Examples
    --------
    >>> layer = nn.Linear(2000, 1000)
    >>> optimizer = torch.optim.Adam(layer.parameters())
    >>> early = OptimizerInBackward(layer, optimizer)
    >>> layer(torch.ones(1, 2000)).sum().backward()
    >>> layer.weight.grad is None, layer.bias.grad is None
    (True, False)
    >>> optimizer.step()
    >>> early.remove()
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(module.named_parameters())
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        self._handles = []
        for name, weight in parameters.items():
            if weight.numel() <= _WIDE or not name.endswith("weight") or id(weight) not in groups:
                continue
            make: Any = type(optimizer)
            own = make([{**groups[id(weight)], "params": [weight]}])
            own.state = optimizer.state
            bias = parameters.get(name.removesuffix("weight") + "bias")
            layer = _Layer(weight, bias if bias is not None and bias.requires_grad else None, own)
            self._handles += [part.register_post_accumulate_grad_hook(layer.gradient_came) for part in layer.parts()]

    def remove(self) -> None:
        """Leave all steps to the optimiser again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Layer:
    """A wide weight, its bias, and the optimiser of the weight alone."""

    def __init__(self, weight: Tensor, bias: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
        self.weight, self.bias, self.optimizer = weight, bias, optimizer

    def parts(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def gradient_came(self, _: Tensor) -> None:
        witness = self.weight if self.bias is None else self.bias
        if self.weight.grad is None or witness.grad is None:
            return  # the other one is still to come
        if bool(torch.isfinite(torch.linalg.vector_norm(witness.grad))):
            self.optimizer.step()
            self.weight.grad = None
