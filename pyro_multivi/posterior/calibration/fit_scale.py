r"""Fit of the factors of posterior standard deviations.

At a draw :math:`z = \mu + \sigma \varepsilon` from q, let g be the gradient of log p(counts, z) with respect to z.
In each dimension its expectations tell the curvature and the distance of the posterior mode, as in a Newton step
(Stein's identity gives the second derivative without computing it):

.. math:: t = -E[\varepsilon\, \sigma g], \qquad \delta = E[\sigma g] / t

Under a posterior that is Normal in each dimension, t is :math:`\sigma^2` over its variance and :math:`\delta` the
distance of its mean from :math:`\mu` in units of :math:`\sigma`. The factor :math:`f^2 = 1 / t + \delta^2`, averaged
over cells and at least 1, gives q the mean squared distance that the posterior has from :math:`\mu`. The logarithm of
the library size and the logit of the cell factor, of which q is Normal too, are treated as dimensions of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.minibatch import Cells, pattern_code
from pyro_multivi.data.modality import MODALITIES, modelled
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.posterior_scale import normal_behind, normal_in
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode, log_density, random_sites, scale_of

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


@tells_if_interrupted("some posterior standard deviations are not corrected")
def fit_posterior_scale(program: MultiVIProgram, train: Minibatches) -> None:
    """Set ``posterior_scale`` and ``depth_scale`` of a program.

    They are 1 for patterns of fewer than ten cells, and where q(z) is not Normal; that of a depth also where it is
    known, and where its modality was not measured.

    Parameters
    ----------
    train
        Cells that it was trained on.
    """
    clear_posterior_scale(program)
    config = program.config
    n_features = sum(modality.n_features_in(config) for modality in modelled(config))
    most = min(_MOST, max(_LEAST, _ENTRIES // n_features))
    code = pattern_code(train.table)[train.index]
    for pattern in range(1, len(program.posterior_scale)):
        index = spread(train.index[code == pattern], most)
        if len(index) < _FEWEST:
            continue
        known = [
            modality for place, modality in enumerate(MODALITIES) if pattern & 2**place and modality in modelled(config)
        ]
        factors = _factors(program, train, index, ["z", *(modality.depth for modality in known)])
        if "z" not in factors:
            return
        program.posterior_scale[pattern] = factors["z"]
        for modality in known:
            if modality.depth in factors:
                program.depth_scale[pattern, MODALITIES.index(modality)] = factors[modality.depth]


def clear_posterior_scale(program: MultiVIProgram) -> None:
    """Return to the standard deviations that were trained."""
    program.posterior_scale.fill_(1.0)
    program.depth_scale.fill_(1.0)


def _factors(program: MultiVIProgram, train: Minibatches, index: Tensor, sites: Sequence[str]) -> dict[str, Tensor]:
    """Factors of the dimensions of those sites whose posteriors are made of Normals, (K,) each, from some cells."""
    parts = [gradients(program, train.cut(part), sites) for part in index.split(_AT_ONCE)]
    factors = {}
    for site in sites:
        if all(site in part for part in parts):
            noise, gradient = (torch.cat(several, 1) for several in zip(*(part[site] for part in parts), strict=True))
            factors[site] = scale_factor(noise, gradient)
    return factors


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


def gradients(program: MultiVIProgram, cells: Cells, sites: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Noise of draws of some sites, and scaled gradients at them, (S, B, K) each, by site.

    Those of a depth, of the Normal of which it is a transformation, have K = 1. A site is left out where its posterior
    is not made of Normals, and a depth where it is a point, or known to a guide of one's own that does not draw it.
    """
    with evaluation_mode(program):
        latents = draw_latents(program, cells, _N_SAMPLES, as_trained=True)
        nodes: dict[str, Any] = dict(latents.trace.nodes)
        noise: dict[str, Tensor] = {}
        terms = []
        with torch.enable_grad():
            for site in filter(nodes.__contains__, sites):
                fn, value = nodes[site]["fn"], nodes[site]["value"].detach()
                normal = normal_in(fn) if site == "z" else normal_behind(fn)
                if normal is None:
                    continue
                transforms = [] if site == "z" else fn.transforms
                for transform in reversed(transforms):
                    value = transform.inv(value)
                noise[site] = ((value - normal.loc) / normal.scale).requires_grad_()
                value = normal.loc + normal.scale * noise[site]
                for transform in transforms:
                    before, value = value, transform(value)
                    terms.append(transform.log_abs_det_jacobian(before, value).sum())
                latents = latents.at(site, value)
            if not noise:
                return {}
            model = model_trace(program.model, cells, latents)
            model.compute_log_prob()
            # What training scales as a whole has the same posterior.
            whole = scale_of(nodes["z"])
            terms += [(log_density(each) / whole).sum() for each in random_sites(model).values()]
            found = torch.autograd.grad(torch.stack(terms).sum(), list(noise.values()))
    by_site = {site: (noise[site].detach(), gradient) for site, gradient in zip(noise, found, strict=True)}
    return {site: each if site == "z" else (each[0][..., None], each[1][..., None]) for site, each in by_site.items()}
