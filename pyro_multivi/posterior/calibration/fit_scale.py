r"""Fit of the factors of posterior standard deviations.

At a draw :math:`z = \mu + \sigma \varepsilon` from q, let g be the gradient of log p(counts, z) with respect to z.
In each dimension its expectations tell the curvature and the distance of the posterior mode, as in a Newton step
(Stein's identity gives the second derivative without computing it):

.. math:: t = -E[\varepsilon\, \sigma g], \qquad \delta = E[\sigma g] / t

Under a posterior that is Normal in each dimension, t is :math:`\sigma^2` over its variance and :math:`\delta` the
distance of its mean from :math:`\mu` in units of :math:`\sigma`. The factor :math:`f^2 = 1 / t + \delta^2`, averaged
over cells and at least 1, gives q the mean squared distance that the posterior has from :math:`\mu`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import modelled
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.posterior_scale import normal_in, pattern_code
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode, random_sites

logger = logging.getLogger("pyro_multivi")

# Draws of a cell: two halves, so that the square of a mean is not inflated by its noise.
_N_SAMPLES = 32
# Cells x features that are decoded, and bounds of the number of cells of each pattern: this takes seconds.
_ENTRIES = 2**21
_LEAST, _MOST = 32, 256
# With fewer cells of a pattern the factors would be noise.
_FEWEST = 10
_AT_ONCE = 64
# Standard deviations are not made smaller: where the posterior is not Normal, as between cell types, its gradients show
# the width of one of its modes. Nor is any doubled more than once.
_SMALLEST, _LARGEST = 1.0, 2.0


def fit_posterior_scale(program: MultiVIProgram, train: Minibatches) -> None:
    """Set ``posterior_scale`` of a program; 1 for patterns of fewer than ten cells, and where q(z) is not Normal.

    Parameters
    ----------
    train
        Cells that it was trained on.
    """
    program.posterior_scale.fill_(1.0)
    n_features = sum(modality.n_features_in(program.config) for modality in modelled(program.config))
    most = min(_MOST, max(_LEAST, _ENTRIES // n_features))
    code = pattern_code(train.table)[train.index]
    for pattern in range(1, len(program.posterior_scale)):
        index = spread(train.index[code == pattern], most)
        if len(index) < _FEWEST:
            continue
        try:
            found = [gradients(program, train.cut(part)) for part in index.split(_AT_ONCE)]
        except KeyboardInterrupt:
            logger.warning("interrupted after training: some posterior standard deviations are not corrected")
            return
        if any(part is None for part in found):
            return
        noise, gradient = (torch.cat(parts, 1) for parts in zip(*[part for part in found if part], strict=True))
        program.posterior_scale[pattern] = scale_factor(noise, gradient)


def scale_factor(noise_snk: Tensor, gradient_snk: Tensor) -> Tensor:
    """Factor f of each dimension, (K,).

    Parameters
    ----------
    noise_snk
        Standard Normal noise of S draws of n cells, (S, n, K).
    gradient_snk
        Gradient of log p(counts, z) at the draws, in units of 1 / standard deviation, (S, n, K).

    Examples
    --------
    A posterior of 1.5 times the standard deviation, whose mean is half of one away:

    >>> noise = torch.randn(100, 500, 1, generator=torch.Generator().manual_seed(0))
    >>> bool((scale_factor(noise, (0.5 - noise) / 1.5**2) ** 2 - (1.5**2 + 0.5**2)).abs() < 0.1)
    True
    """
    curvature_k = (-noise_snk * gradient_snk).mean((0, 1)).clamp(min=1 / _LARGEST**2)
    first, second = (half.mean(0) for half in gradient_snk.chunk(2))
    squared_k = (first * second).mean(0).clamp(min=0)
    return (1 / curvature_k + squared_k / curvature_k.square()).sqrt().clamp(_SMALLEST, _LARGEST)


def gradients(program: MultiVIProgram, cells: Cells) -> tuple[Tensor, Tensor] | None:
    """Noise of draws of z and scaled gradients at them, (S, B, K) each; None where q(z) is not Normal."""
    with evaluation_mode(program):
        latents = draw_latents(program, cells, _N_SAMPLES, as_trained=True)
        nodes: dict[str, Any] = dict(latents.trace.nodes)
        normal = normal_in(nodes["z"]["fn"])
        if normal is None:
            return None
        z = nodes["z"]["value"].detach().requires_grad_()
        with torch.enable_grad():
            model = model_trace(program.model, cells, latents.at("z", z))
            model.compute_log_prob()
            total = torch.stack([site["unscaled_log_prob"].sum() for site in random_sites(model).values()]).sum()
            (gradient,) = torch.autograd.grad(total, z)
        return ((z - normal.loc) / normal.scale).detach(), gradient * normal.scale
