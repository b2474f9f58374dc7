"""Fit of the posterior of the decoders' last layers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from pyro_multivi import MULTIVI, MultiVIProgram, simulate_multiome
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
from pyro_multivi.distributions.fragments import NegativeBinomialFragments, PoissonFragments
from pyro_multivi.posterior.calibration import fit_weights
from pyro_multivi.posterior.calibration.fit_weights import fit_weight_posteriors, inflation, posterior_sd
from pyro_multivi.posterior.calibration.last_layer import Decoded, Evidence, LastLayer
from pyro_multivi.posterior.engine.weight_posterior import WeightPosterior, weight_buffers

N_CELLS, N_FEATURES = 3, 5


def readout(link):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, N_CELLS, 4), (N_FEATURES, 4))
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return Readout(hidden, weight, torch.zeros(N_FEATURES, dtype=torch.float64), link)


def evidence(made, fn, modality):
    """Cells whose counts are just what is expected."""
    return Decoded(made, modality.decoded, fn, fn.mean[0], None)


def counts_of(name, values):
    library, theta = torch.tensor([[3.0, 6.0, 1.0]]).double(), torch.tensor([1.0, 3.0, 0.5, 2.0, 9.0]).double()
    if name == "poisson":
        return PoissonCounts(values, library)
    if name == "nb":
        return NegativeBinomialCounts(values, library, theta)
    if name == "zinb":
        return ZeroInflatedNegativeBinomialCounts(values, library, theta, torch.full_like(theta, -30.0))
    if name == "poisson fragments":
        return PoissonFragments(values, library, theta)
    if name == "nb fragments":
        return NegativeBinomialFragments(values, library, theta, theta.flip(0))
    return ScaledBernoulli(values, library / 7, theta / 10)


@pytest.mark.parametrize(("name", "link"), [
    ("poisson", "softmax"), ("nb", "softmax"), ("zinb", "softmax"), ("nb", "softplus"), ("bernoulli", "sigmoid"),
    ("poisson fragments", "sigmoid"), ("nb fragments", "sigmoid"),
])  # fmt: skip
def test_information_is_the_expected_square_of_the_score(name, link):
    """Of each logit with the others held, summed over all counts that a cell may have."""
    modality = ATAC if link == "sigmoid" else RNA
    made = readout(link)
    ((_, found, at_mean),) = evidence(made, counts_of(name, made), modality).evidence()
    torch.testing.assert_close(at_mean, torch.zeros_like(at_mean))
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
    counts = torch.ones(N_CELLS, N_FEATURES).double()
    ((_, *every),) = Decoded(made, "rho", counts_of("nb", made), counts, None).evidence()
    ((_, *found),) = Decoded(made, "rho", counts_of("nb", made), counts, panels).evidence()
    for part, whole in zip(found, every, strict=True):
        assert torch.equal(part, whole * panels.measured[panels.code])


@pytest.mark.parametrize(("name", "link"), [("poisson", "softmax"), ("nb", "softplus"), ("bernoulli", "sigmoid")])
def test_the_score_is_the_gradient_of_the_log_likelihood(name, link):
    made = readout(link)
    counts = torch.randint(0, 2 if name == "bernoulli" else 9, (N_CELLS, N_FEATURES)).double()
    fn = counts_of(name, made)
    ((_, _, score),) = Decoded(made, "p" if name == "bernoulli" else "rho", fn, counts, None).evidence()
    step = 1e-6
    for feature in range(N_FEATURES):
        moved = []
        for sign in (1, -1):
            bias = torch.zeros(N_FEATURES).double()
            bias[feature] = sign * step
            fn = counts_of(name, Readout(made.hidden, made.weight, bias, link))._of_features(torch.tensor([feature]))
            moved.append(fn.log_prob(counts[None, :, [feature]])[0])
        torch.testing.assert_close(score[:, feature], (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prior_precision", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("effect", [0.5, 1.0, 2.0])
def test_draws_around_fitted_weights_are_as_far_as_the_true_ones(effect, prior_precision):
    """Whatever the width of the prior that they were fitted under."""
    generator = torch.Generator().manual_seed(1)
    information = torch.tensor([50.0, 20.0, 5.0, 1.0, 0.5, 100.0]).expand(4000, 6)
    true = effect * torch.randn(4000, 5, generator=generator)
    mode = true + torch.randn(4000, 5, generator=generator) * information[:, :5] ** -0.5
    fitted = mode * information[:, :5] / (information[:, :5] + prior_precision)
    score = torch.cat([information[:, :5] * (mode - fitted), torch.zeros(4000, 1)], 1)
    sd = posterior_sd(Evidence(information, score, fitted))
    held = ((fitted - true).abs() < 1.645 * sd[:, :5]).float().mean()
    assert abs(held - 0.9) < 0.06
    torch.testing.assert_close(sd[:, 5], torch.full((4000,), 101**-0.5))


def test_a_feature_without_counts_is_held_by_the_prior():
    """Under the prior that other features have: weights of standard deviation 2."""
    generator = torch.Generator().manual_seed(1)
    information = torch.full((2000, 4), 50.0)
    information[:2] = 0.0
    mode = 2 * torch.randn(2000, 4, generator=generator)
    mode[:, 3] = 0.0
    sd = posterior_sd(Evidence(information, torch.zeros(2000, 4), mode[:, :3] * (information[:, :3] > 0)))
    torch.testing.assert_close(sd[:2], torch.tensor([[2.0, 2.0, 2.0, 1.0]]).expand(2, 4), rtol=0.1, atol=0.0)


def test_a_step_in_the_dark_is_no_longer_than_the_prior_is_wide():
    sd = posterior_sd(Evidence(torch.full((1, 4), 1e-6), torch.full((1, 4), 50.0), torch.zeros(1, 3)))
    assert sd.max() < 4.5


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
    held_out = Minibatches(train.table, fitted._split.validation, batch_size=64)
    fit_weight_posteriors(again, train, held_out)
    torch.testing.assert_close(again.atac_weight_sd, fitted.program.atac_weight_sd)


def test_held_out_counts_tell_that_weights_are_off(fitted):
    """Weights moved from where training left them by twice their prior's standard deviation."""
    train = Minibatches(fitted._training_table(), fitted._split.train, batch_size=64)
    held_out = Minibatches(train.table, fitted._split.validation, batch_size=64)
    factors = []
    for moved in (0.0, 2.0):
        again = MultiVIProgram(fitted.program.config)
        again.load_state_dict(fitted.program.state_dict())
        fit_weight_posteriors(again, train)
        alone = again.atac_weight_sd.clone()
        layer = again.accessibility_decoder.p
        noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            layer.weight.add_(moved * noise * again.config.hidden**-0.5)
        asked = LastLayer.of(again, train, ATAC, len(again.atac_weight_directions) - 1)._replace(
            cells=held_out.index[ATAC.measured_in(held_out.table)[held_out.index]], share=1.0
        )
        with torch.no_grad():
            factors.append(inflation(asked.evidence(again, held_out), alone[:, [*range(len(asked.vectors)), -1]]))
    assert factors[0] < 2
    assert factors[1] > 3


def test_more_cells_leave_less_unknown(fitted):
    """A fit from a quarter of the cells takes them for all."""
    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(fitted.program.state_dict())
    train = Minibatches(fitted._training_table(), fitted._split.train, batch_size=64)
    fit_weight_posteriors(again, Minibatches(train.table, train.index[::4], batch_size=64))
    leading = [0, 1, -1]  # Others are left to the prior, however many cells there are.
    of_quarter = again.rna_weight_sd[:, leading].mean(0)
    fit_weight_posteriors(again, train)
    ratio = of_quarter / again.rna_weight_sd[:, leading].mean(0)
    assert (ratio > 1.4).all()


def test_ctrl_c_leaves_the_fitted_decoder(fitted, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(fitted.program.state_dict())
    monkeypatch.setattr(fit_weights.LastLayer, "of", interrupted)
    with caplog.at_level(logging.WARNING, logger="pyro_multivi"), pytest.raises(KeyboardInterrupt):
        fit_weight_posteriors(again, Minibatches(fitted._training_table(), fitted._split.train))
    assert "too narrow" in caplog.text
    assert WeightPosterior.of(again, RNA) is None
    assert WeightPosterior.of(again, ATAC) is None


class Bottleneck(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.map = nn.Linear(3, width)

    def forward(self, z, s):
        return self.map(z).relu()


class OwnDecoder(MultiVIProgram):
    width = 0

    def __init__(self, config):
        super().__init__(config)
        self.expression_decoder.stack = Bottleneck(self.width)
        self.expression_decoder.rho = nn.Linear(self.width, config.n_genes)


@pytest.mark.parametrize("width", [5, 20])
def test_a_decoder_of_another_width_has_a_posterior_too(width, monkeypatch):
    monkeypatch.setattr(OwnDecoder, "width", width)
    adata = simulate_multiome((60, 0, 0), 20, 30, n_latent=2, seed=0)
    MULTIVI.setup_anndata(adata)
    model = MULTIVI(adata, n_hidden=12, n_latent=3, gene_likelihood="nb", program_class=OwnDecoder)
    model.train(max_epochs=3, progress_bar=False)
    directions, sd = weight_buffers(model.program, RNA)
    assert directions.shape == (12, width + 1)
    # As many directions as there are, and none beyond.
    used = min(width, 11)
    assert (directions[:used].abs().sum(1) > 0).all()
    assert (directions[used:-1] == 0).all()
    assert (sd[:, directions.any(1)] > 0).all()
    again = OwnDecoder(model.program.config)
    again.load_state_dict(model.program.state_dict())
    assert torch.equal(weight_buffers(again, RNA)[0], directions)
    drawn, fixed = (
        model.get_normalized_expression(n_samples=25, return_mean=mean, return_numpy=True, **options)
        for mean, options in ((False, {}), (True, {"return_interval": 0.9}))
    )
    assert drawn.std(0).mean() > 0
    assert (fixed.upper > fixed.lower).all()


class Ambient(MultiVIProgram):
    """Nine tenths of the counts are of a flat background: logits of rho say less of them."""

    def expression_dist(self, l, rho, theta, pi_logits):
        return PoissonCounts(0.1 * rho + 0.9 / self.config.n_genes, l)

    def accessibility_dist(self, p, d, r):
        return ScaledBernoulli(0.5 + 0.5 * p, d, r)


def test_a_likelihood_of_something_made_of_rho_is_no_likelihood_of_rho():
    """Its derivatives are others, so that neither weights nor their standard deviations follow from those of rho."""
    adata = simulate_multiome((80, 0, 0), 20, 30, n_latent=2, seed=0)
    MULTIVI.setup_anndata(adata)
    model = MULTIVI(adata, n_hidden=12, n_latent=3, gene_likelihood="poisson", program_class=Ambient)
    model.train(max_epochs=2, progress_bar=False)
    for modality in (RNA, ATAC):
        assert Decoded.of(model.program, model.minibatch(), modality) is None
        assert WeightPosterior.of(model.program, modality) is None
    found = model.get_normalized_expression(n_samples=25, return_numpy=True, return_interval=0.9)
    assert (found.upper >= found.lower).all()
