"""States given one modality, against those of cells that have no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_multivi import MultiVIProgram

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 30), slice(30, 45), slice(45, 60)


class ProductOfExperts(MultiVIProgram):
    """q(z) is the product of the prior and the measured experts."""

    def averaged(self, experts):
        weights = torch.stack([expert.measured[:, None] / expert.scale.square() for expert in experts.values()])
        locs = torch.stack([expert.loc for expert in experts.values()])
        precision = 1 + weights.sum(0)
        return (weights * locs).sum(0) / precision, precision.rsqrt()


@pytest.mark.parametrize("program_class", [MultiVIProgram, ProductOfExperts])
def test_a_modality_alone_is_mixed_and_corrected_as_all_are(build, program_class):
    model = build(program_class=program_class)
    model.train(max_epochs=2, progress_bar=False)
    model.program.posterior_scale.copy_(torch.arange(1.0, 5.0)[:, None])
    given = {"give_mean": False, "n_samples": 3}
    for modality, only in (("expression", RNA_ONLY), ("accessibility", ATAC_ONLY)):
        for asked in ({}, {"return_dist": True}, given):
            joint, alone = (model.get_latent_representation(modality=each, **asked) for each in ("joint", modality))
            np.testing.assert_array_equal(np.asarray(alone)[..., only, :], np.asarray(joint)[..., only, :])
    cells = model.minibatch()
    mean, variance = model.get_latent_representation(modality="expression", return_dist=True)
    with torch.no_grad():
        hidden = model.program.eval().encode(cells, cells.design)
        expert = model.program.experts(cells, cells.design, hidden)["expression"]
    precision, prior = (part.numpy() for part in (expert.scale**-2, expert.scale * 0))
    if program_class is ProductOfExperts:
        prior = prior + 1
    expected = expert.loc.numpy() * precision / (prior + precision)
    np.testing.assert_allclose(mean[PAIRED], expected[PAIRED], rtol=1e-5)
    np.testing.assert_allclose(variance[PAIRED], 1 / (prior + precision)[PAIRED], rtol=1e-5)
