"""Fit of the posterior of the decoders' last layers."""

from __future__ import annotations

import logging

import pytest
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.distributions import (
    NegativeBinomialCounts,
    PoissonCounts,
    Readout,
    ScaledBernoulli,
    ZeroInflatedNegativeBinomialCounts,
)
from pyro_multivi.posterior.calibration import fit_weights
from pyro_multivi.posterior.calibration.fit_weights import _Decoded, fit_weight_posteriors, posterior_sd
from pyro_multivi.posterior.engine.weight_posterior import WeightPosterior, weight_buffers

N_CELLS, N_FEATURES = 3, 5


def readout(link):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, N_CELLS, 4), (N_FEATURES, 4))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Readout(hidden, weight, torch.zeros(N_FEATURES, dtype=torch.float64), link)


def counts_of(name, values):
    library, theta = torch.tensor([[3.0, 6.0, 1.0]]).double(), torch.tensor([1.0, 3.0, 0.5, 2.0, 9.0]).double()
    if name == "poisson":
        return PoissonCounts(values, library)
    if name == "nb":
        return NegativeBinomialCounts(values, library, theta)
    if name == "zinb":
        return ZeroInflatedNegativeBinomialCounts(values, library, theta, torch.full_like(theta, -30.0))
    return ScaledBernoulli(values, library / 7, theta / 10)


@pytest.mark.parametrize(("name", "link"), [
    ("poisson", "softmax"), ("nb", "softmax"), ("zinb", "softmax"), ("nb", "softplus"), ("bernoulli", "sigmoid"),
])  # fmt: skip
def test_information_is_the_expected_square_of_the_score(name, link):
    """Of each logit with the others held, summed over all counts that a cell may have."""
    modality = ATAC if name == "bernoulli" else RNA
    made = readout(link)
    ((_, found),) = _Decoded(made, counts_of(name, made), None).information(modality)
    link_of = {"softmax": lambda a: a.softmax(-1), "softplus": torch.nn.functional.softplus, "sigmoid": torch.sigmoid}
    counts = torch.arange(2.0 if name == "bernoulli" else 3000.0).double()[:, None, None].expand(-1, N_CELLS, 1)
    expected = torch.zeros(N_CELLS, N_FEATURES, dtype=torch.float64)
    for feature in range(N_FEATURES):
        logits = made.logits().detach().expand(len(counts), -1, -1).clone().requires_grad_()
        log_p = counts_of(name, link_of[link](logits))._of_features(torch.tensor([feature])).log_prob(counts)
        (score,) = torch.autograd.grad(log_p.sum(), logits)
        expected[:, feature] = (log_p.exp() * score[..., feature] ** 2).sum(0).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_features_outside_a_panel_carry_no_information():
    made = readout("softmax")
    panels = Panels(torch.tensor([[True] * 5, [True, False, True, False, True]]), torch.tensor([0, 1, 1]))
    ((_, every),) = _Decoded(made, counts_of("nb", made), None).information(RNA)
    ((_, found),) = _Decoded(made, counts_of("nb", made), panels).information(RNA)
    assert torch.equal(found, every * panels.measured[panels.code])


@pytest.mark.parametrize(("effect", "prior_precision"), [(0.3, 1.0), (1.0, 1.0), (2.0, 1.0), (2.0, 0.0)])
def test_draws_around_fitted_weights_are_as_far_as_the_true_ones(effect, prior_precision):
    """Whatever the width of the prior that they were fitted under."""
    generator = torch.Generator().manual_seed(1)
    information = torch.tensor([50.0, 20.0, 5.0, 1.0, 0.5, 100.0]).expand(4000, 6)
    true = effect * torch.randn(4000, 5, generator=generator)
    seen = true + torch.randn(4000, 5, generator=generator) * information[:, :5] ** -0.5
    fitted = seen * information[:, :5] / (information[:, :5] + prior_precision)
    sd = posterior_sd(information, fitted, prior_precision)
    squared = ((fitted - true) ** 2).mean(0)
    torch.testing.assert_close((sd[:, :5] ** 2).mean(0), squared, rtol=0.7, atol=0.0)
    assert (((fitted - true).abs() < 1.645 * sd[:, :5]).float().mean() - 0.9).abs() < 0.04
    torch.testing.assert_close(sd[:, 5], torch.full((4000,), 101**-0.5))


def test_a_feature_without_counts_is_held_by_the_prior():
    sd = posterior_sd(torch.zeros(2, 4), torch.zeros(2, 3), 1.0)
    torch.testing.assert_close(sd, torch.ones(2, 4))


def test_training_fits_it_and_going_on_clears_it(fitted):
    for modality in (RNA, ATAC):
        directions, sd = weight_buffers(fitted.program, modality)
        assert (sd > 0).all()
        assert sd.isfinite().all()
        assert (directions[-1, :-1] == 0).all()
        gram = directions[:-1, :-1] @ directions[:-1, :-1].T * fitted.program.config.hidden
        torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-4, rtol=0.0)
    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(fitted.program.state_dict())
    assert WeightPosterior.of(again, RNA) is not None
    train = Minibatches(fitted._training_table(), fitted._split.train, batch_size=64)
    few = Minibatches(train.table, train.index[:5], batch_size=64)
    fit_weight_posteriors(again, few)
    assert WeightPosterior.of(again, RNA) is None
    fit_weight_posteriors(again, train)
    torch.testing.assert_close(again.atac_weight_sd, fitted.program.atac_weight_sd)


def test_more_cells_leave_less_unknown(fitted):
    """A fit from a quarter of the cells takes them for all."""
    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(fitted.program.state_dict())
    train = Minibatches(fitted._training_table(), fitted._split.train, batch_size=64)
    fit_weight_posteriors(again, Minibatches(train.table, train.index[::4], batch_size=64))
    assert again.rna_weight_sd.mean() > 1.2 * fitted.program.rna_weight_sd.mean()


def test_ctrl_c_leaves_the_fitted_decoder(fitted, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(fitted.program.state_dict())
    monkeypatch.setattr(fit_weights, "spread", interrupted)
    with caplog.at_level(logging.WARNING, logger="pyro_multivi"):
        fit_weight_posteriors(again, Minibatches(fitted._training_table(), fitted._split.train))
    assert "too narrow" in caplog.text
    assert WeightPosterior.of(again, RNA) is None
    assert WeightPosterior.of(again, ATAC) is None
