"""Differential tests with importance weights."""

from __future__ import annotations

import numpy as np

from pyro_multivi.posterior.engine.draws import draw, draw_latents
from pyro_multivi.posterior.engine.likelihood import log_weights, scored_traces
from pyro_multivi.traces import evaluation_mode


def test_importance_weights_follow_the_posterior_of_the_model(continuum):
    """Means under importance weights agree with self-normalised importance sampling, and move from the guide's."""
    index = np.arange(0, 20)
    cells, n = continuum.minibatch(index), 64
    with evaluation_mode(continuum.program):
        log_w = log_weights(*scored_traces(continuum.program, cells, draw_latents(continuum.program, cells, n))).numpy()
    values = (draw(continuum.program, cells, ("rho",), n)["rho"] + 0).numpy()
    share = np.exp(log_w - log_w.max(0))
    share /= share.sum(0)
    expected = (share[..., None] * values).sum(0).mean(0)
    arguments = {"idx1": index, "idx2": np.arange(20, 60), "n_samples": 2000}
    order = list(continuum.spec.gene_names)
    table = continuum.differential_expression(weights="importance", **arguments).loc[order]
    plain = continuum.differential_expression(**arguments).loc[order]
    np.testing.assert_allclose(table["scale1"], expected, rtol=0.03)
    np.testing.assert_allclose(plain["scale1"], values.mean((0, 1)), rtol=0.03)
