"""The ELBO against the formulas of the paper, written once more in NumPy and SciPy from the raw weights."""

from __future__ import annotations

import itertools

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import special, stats

from pyro_multivi.networks import alignment
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import measure

LIKELIHOODS = ("zinb", "nb", "negative_binomial", "poisson")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


def relu(h):
    return np.maximum(h, 0)


def leaky(h):
    return np.where(h > 0, h, 0.01 * h)


class Oracle:
    """Everything the paper writes down, from tensors of the program's state and nothing else of it."""

    def __init__(self, program, cells):
        self.w = {name: value.numpy() for name, value in program.state_dict().items()}
        self.config = program.config
        self.x, self.y = cells.x.to_dense().numpy(), cells.y.to_dense().numpy()
        self.has_rna, self.has_atac = cells.has_rna.numpy(), cells.has_atac.numpy()
        self.s = cells.design.numpy()
        self.batch = self.s[:, : self.config.n_batch].argmax(1)
        self.label = cells.label.numpy()
        self.rna_size = None if cells.rna_size is None else cells.rna_size.numpy()
        self.atac_size = None if cells.atac_size is None else cells.atac_size.numpy()

    def norm(self, h, where):
        if self.config.use_layer_norm not in (where, "both"):
            return h
        centred = h - h.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    def linear(self, name, h):
        return h @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def stack(self, name, h, s, act, where, n_layers):
        for layer in range(n_layers):
            given = layer == 0 or self.config.deeply_inject_covariates
            h = np.concatenate([h, s], 1) if given and s is not None else h
            h = act(self.norm(self.linear(f"{name}.linear.{layer}", h), where))
        return h

    def encode(self, kind):
        """Mean and sd of the expert, arguments of the depth head; for every cell, measured or not."""
        inputs = (self.y > 0) * 1.0
        if kind == "rna":
            inputs = np.log1p(self.x / self.x.sum(1, keepdims=True).clip(1) * np.exp(self.w["rna_log_depth"]))
        h = inputs @ self.w[f"{kind}_first_layer.counts.weight"] + self.w[f"{kind}_first_layer.counts.bias"]
        s = None
        if self.config.encode_covariates:
            h = h + self.s @ self.w[f"{kind}_first_layer.covariates.weight"].T
            s = self.s if self.config.deeply_inject_covariates else None
        h = leaky(self.norm(h, "encoder"))
        top = self.stack(f"{kind}_expert.stack", h, s, leaky, "encoder", self.config.n_layers_encoder - 1)
        loc = self.linear(f"{kind}_expert.loc", top)
        sd = np.exp(0.5 * self.linear(f"{kind}_expert.log_variance", top))
        if kind == "rna":
            depth, centre, head = np.log(self.x.sum(1).clip(1)), self.w["rna_log_depth"], "library_head"
        else:
            depth, centre, head = np.log1p((self.y > 0).sum(1)), self.w["atac_log_depth"], "cell_factor_head"
        hidden = leaky(self.linear(f"{head}.hidden", np.column_stack([h, depth - centre])))
        out = self.linear(f"{head}.out", hidden)
        out[:, 0] += depth
        return loc, sd, out

    def guide(self):
        """q(z), q(l) and d of every cell, and the Jeffreys divergence of the paired ones."""
        (loc_x, sd_x, lib), (loc_y, sd_y, factor) = self.encode("rna"), self.encode("atac")
        logit = np.zeros((len(self.s), 2))
        if self.config.modality_weights == "universal":
            logit += self.w["weight_logits"]
        elif self.config.modality_weights == "cell":
            for k, (loc, sd) in enumerate([(loc_x, sd_x), (loc_y, sd_y)]):
                logit[:, k] = self.linear(f"weight_net.{k}", np.column_stack([loc, np.log(sd)]))[:, 0]
        weight = np.exp(logit) * np.column_stack([self.has_rna, self.has_atac])
        weight = weight / weight.sum(1, keepdims=True)
        wx, wy = weight[:, :1], weight[:, 1:]
        loc, var = wx * loc_x + wy * loc_y, wx**2 * sd_x**2 + wy**2 * sd_y**2
        prior_loc = self.w["library_log_mean"][self.batch]
        prior_sd = np.sqrt(self.w["library_log_var"][self.batch])
        l_loc = np.where(self.has_rna, lib[:, 0], prior_loc)
        l_sd = np.where(self.has_rna, np.exp(lib[:, 1].clip(max=2)), prior_sd)
        gap = (loc_x - loc_y) ** 2
        forth = np.log(sd_y / sd_x) + (sd_x**2 + gap) / (2 * sd_y**2) - 0.5
        back = np.log(sd_x / sd_y) + (sd_y**2 + gap) / (2 * sd_x**2) - 0.5
        paired = self.has_rna & self.has_atac
        return {
            "z": (loc, np.sqrt(var)),
            "l": (l_loc, l_sd),
            "d": self.cell_factor(factor[:, 0] - self.w["atac_log_depth"] + self.w["cell_factor_offset"]),
            "alignment": np.where(paired, (forth + back).sum(1) + self.contrast(loc_x, loc_y, paired), 0.0),
            "mixing": np.full(len(paired), self.config.mixing * self.apart(loc)),
        }

    def factor_prior(self):
        """Mean and standard deviation of logit d."""
        return self.w["cell_factor_loc"][self.batch], self.w["cell_factor_sd"][self.batch]

    def cell_factor(self, logit):
        """Mean and standard deviation of q(logit d); from the number of open regions that a probability implies."""
        prior_loc, prior_sd = self.factor_prior()
        closed = 1 / (1 + np.exp(logit))
        precision = 1 / prior_sd**2 + (self.y > 0).sum(1) * closed**2
        sd = np.exp(self.w["cell_factor_log_scale"]) / np.sqrt(precision)
        return np.where(self.has_atac, logit, prior_loc), np.where(self.has_atac, sd, prior_sd)

    def apart(self, loc):
        """Squared discrepancy between cells of RNA alone, ATAC alone and both, summed over the three pairs."""
        squared = ((loc[:, None] - loc[None]) ** 2).sum(-1)
        median = np.sort(squared, axis=None)[(squared.size - 1) // 2]  # the lower one, as torch takes it
        kernel = np.mean([np.exp(-squared / (median * width)) for width in (0.05, 0.1, 0.25, 0.5, 1)], axis=0)
        patterns = ((True, False), (False, True), (True, True))
        sets = [np.flatnonzero((self.has_rna == rna) & (self.has_atac == atac)) for rna, atac in patterns]
        total = 0.0
        for a, b in itertools.combinations([cells for cells in sets if len(cells) > 1], 2):
            within = [(kernel[np.ix_(c, c)].sum() - len(c)) / (len(c) * (len(c) - 1)) for c in (a, b)]
            total += sum(within) - 2 * kernel[np.ix_(a, b)].mean()
        return total

    def contrast(self, loc_x, loc_y, paired):
        """Mean surprisal at finding a cell's other expert among those of its batch's pairs, times its weight."""
        surprisal = np.zeros(len(paired))
        for batch in np.unique(self.batch):
            rows = np.flatnonzero(paired & (self.batch == batch))
            score = -((loc_x[rows][:, None] - loc_y[rows][None]) ** 2).sum(-1)
            both_ways = special.logsumexp(score, axis=1) + special.logsumexp(score, axis=0)
            surprisal[rows] = both_ways / 2 - np.diag(score)
        return self.config.contrast_weight * surprisal

    def beside_batch(self, h):
        """Hidden units of a last layer, and the batch in units of their norm, where there are several."""
        n = self.config.n_batch
        return np.column_stack([h, np.sqrt(h.shape[1]) * np.eye(n)[self.batch]]) if n > 1 else h

    def log_x(self, z, l):
        z = special.softmax(z, 1) if self.config.latent_distribution == "ln" else z
        h = self.stack("expression_decoder.stack", z, self.s, relu, "decoder", self.config.n_layers_decoder)
        logits = self.linear("expression_decoder.rho", self.beside_batch(h))
        rho = special.softmax(logits, 1) if self.config.library != "size_factor" else np.log1p(np.exp(logits))
        mu = l[:, None] * rho
        if self.config.gene_likelihood == "poisson":
            return stats.poisson.logpmf(self.x, mu).sum(1) * self.has_rna
        theta = {
            "gene": lambda: np.exp(self.w["log_theta"][0]),
            "gene-batch": lambda: np.exp(self.w["log_theta"][self.batch]),
            "gene-label": lambda: np.exp(self.w["log_theta"][self.label]),
            "gene-cell": lambda: np.exp(self.linear("expression_decoder.theta", h)),
        }[self.config.dispersion]()
        log_prob = stats.nbinom.logpmf(self.x, theta, theta / (theta + mu))
        if self.config.gene_likelihood == "zinb":
            pi = special.expit(self.linear("expression_decoder.pi", h))
            with np.errstate(divide="ignore"):
                log_prob = np.logaddexp(np.log(pi * (self.x == 0)), np.log1p(-pi) + log_prob)
        return log_prob.sum(1) * self.has_rna

    def log_y(self, z, d):
        z = special.softmax(z, 1) if self.config.latent_distribution == "ln" else z
        h = self.stack("accessibility_decoder.stack", z, self.s, leaky, "decoder", self.config.n_layers_decoder)
        r = special.expit(self.w["region_logit"]) if self.config.region_factors else 1.0
        q = special.expit(self.linear("accessibility_decoder.p", self.beside_batch(h))) * d[:, None] * r
        return stats.bernoulli.logpmf((self.y > 0) * 1, q).sum(1) * self.has_atac

    def kl(self):
        """KL(q|p) of z, l and d of each cell."""
        q = self.guide()
        loc, sd = q["z"]
        kl_z = (0.5 * (sd**2 + loc**2 - 1) - np.log(sd)).sum(1)
        m, v = self.w["library_log_mean"][self.batch], self.w["library_log_var"][self.batch]
        loc, sd = q["l"]
        kl_l = 0.5 * ((sd**2 + (loc - m) ** 2) / v - 1 - np.log(sd**2 / v))
        (loc, sd), (m, prior_sd) = q["d"], self.factor_prior()
        kl_d = 0.5 * ((sd**2 + (loc - m) ** 2) / prior_sd**2 - 1) - np.log(sd / prior_sd)
        return kl_z, kl_l if self.config.library == "latent" else np.zeros_like(kl_l), kl_d


def traces(program, cells):
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    guide.compute_log_prob()
    model.compute_log_prob()
    return model, guide


def drawn(guide, *names):
    return [guide.nodes[name]["value"].detach().numpy() for name in names]


def check(program, cells):
    """Every argument of the guide and every log probability of the model, cell by cell."""
    model, guide = traces(program, cells)
    z, l, d = drawn(guide, "z", "l", "d")
    oracle = Oracle(program, cells)
    q = oracle.guide()
    close = {"rtol": 1e-9, "atol": 1e-9}

    def of(trace, site):
        return trace.nodes[site]["unscaled_log_prob"].detach().numpy()

    np.testing.assert_allclose(guide.nodes["z"]["fn"].mean.detach(), q["z"][0], **close)
    np.testing.assert_allclose(guide.nodes["z"]["fn"].stddev.detach(), q["z"][1], **close)
    # A factor of the guide counts as minus log q: positive, it raises the loss.
    np.testing.assert_allclose(of(guide, "alignment"), q["alignment"], **close)
    np.testing.assert_allclose(of(guide, "mixing"), q["mixing"], **close)
    np.testing.assert_allclose(of(model, "z"), stats.norm.logpdf(z).sum(1), **close)
    if program.config.library == "latent":
        np.testing.assert_allclose(guide.nodes["l"]["fn"].loc.detach(), q["l"][0], **close)
        np.testing.assert_allclose(guide.nodes["l"]["fn"].scale.detach(), q["l"][1], **close)
        mean = oracle.w["library_log_mean"][oracle.batch]
        sd = np.sqrt(oracle.w["library_log_var"][oracle.batch])
        np.testing.assert_allclose(of(model, "l"), stats.norm.logpdf(np.log(l), mean, sd) - np.log(l), **close)
    if cells.atac_size is None:
        np.testing.assert_allclose(guide.nodes["d"]["fn"].loc.detach(), q["d"][0], **close)
        np.testing.assert_allclose(guide.nodes["d"]["fn"].scale.detach(), q["d"][1], **close)
        log_prior = stats.norm.logpdf(special.logit(d), *oracle.factor_prior()) - np.log(d * (1 - d))
        np.testing.assert_allclose(of(model, "d"), log_prior, **close)
    np.testing.assert_allclose(of(model, "x"), oracle.log_x(z, l), **close)
    np.testing.assert_allclose(of(model, "y"), oracle.log_y(z, d), **close)


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_likelihoods_and_dispersions(make_program, make_cells, likelihood, dispersion):
    program = make_program(torch.float64, gene_likelihood=likelihood, dispersion=dispersion)
    check(program, make_cells(dtype=torch.float64))


@pytest.mark.parametrize(
    "choices",
    [
        {"region_factors": False},
        {"latent_distribution": "ln"},
        {"modality_weights": "universal"},
        {"modality_weights": "cell"},
        {"encode_covariates": True},
        {"encode_covariates": True, "deeply_inject_covariates": True, "n_layers_encoder": 3, "n_layers_decoder": 3},
        {"deeply_inject_covariates": True},
        {"use_layer_norm": "none"},
        {"use_layer_norm": "encoder"},
        {"use_layer_norm": "decoder"},
        {"n_layers_encoder": 1, "n_layers_decoder": 1},
        {"dropout_rate": 0.5},
        {"contrast_weight": 0.7, "mixing_weight": 2.0},
        {"modality_penalty": "Jeffreys", "contrast_weight": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_other_choices(make_program, make_cells, choices, sparse):
    check(make_program(torch.float64, **choices), make_cells(dtype=torch.float64, sparse=sparse))


@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_size_factors_make_rho_a_softplus_and_stand_in_for_l_and_d(make_program, make_cells, likelihood, dispersion):
    cells = make_cells(dtype=torch.float64)
    sizes = torch.linspace(0.5, 2.0, len(cells), dtype=torch.float64)
    cells = cells.replace(rna_size=sizes, atac_size=sizes.flip(0) / 3)
    program = make_program(torch.float64, library="size_factor", gene_likelihood=likelihood, dispersion=dispersion)
    check(program, cells)
    _, guide = traces(program, cells)
    assert torch.equal(guide.nodes["l"]["value"], cells.rna_size)
    assert torch.equal(guide.nodes["d"]["value"], cells.atac_size)


def test_the_observed_library_is_the_total_count_and_the_prior_median_elsewhere(make_program, make_cells):
    program, cells = make_program(torch.float64, library="observed"), make_cells(dtype=torch.float64)
    check(program, cells)
    _, guide = traces(program, cells)
    median = np.exp(program.library_log_mean.numpy()[cells.design[:, :2].argmax(1)])
    total = cells.x.to_dense().numpy().sum(1)
    np.testing.assert_allclose(guide.nodes["l"]["value"], np.where(cells.has_rna, total, median))


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_loss_of_an_elbo(make_program, make_cells, elbo):
    """Likelihoods, KL terms and the alignment add up with these signs, times N / B."""
    program, cells = make_program(torch.float64), make_cells(dtype=torch.float64, n_total=60)
    torch.manual_seed(3)
    loss = elbo().differentiable_loss(program.model, program.guide, cells).item()
    torch.manual_seed(3)
    _, guide = traces(program, cells)
    z, l, d = drawn(guide, "z", "l", "d")
    oracle = Oracle(program, cells)
    q, (kl_z, kl_l, kl_d) = oracle.guide(), oracle.kl()
    per_cell = q["alignment"] + q["mixing"] - oracle.log_x(z, l) - oracle.log_y(z, d)
    if elbo is TraceMeanField_ELBO:
        per_cell = per_cell + kl_z + kl_l + kl_d
    else:
        mean, sd = oracle.w["library_log_mean"][oracle.batch], np.sqrt(oracle.w["library_log_var"][oracle.batch])
        ratio_z = stats.norm.logpdf(z, *q["z"]).sum(1) - stats.norm.logpdf(z).sum(1)
        # log l and logit d are normal under both, and the Jacobian cancels.
        ratio_l = stats.norm.logpdf(np.log(l), *q["l"]) - stats.norm.logpdf(np.log(l), mean, sd)
        logit = special.logit(d)
        ratio_d = stats.norm.logpdf(logit, *q["d"]) - stats.norm.logpdf(logit, *oracle.factor_prior())
        per_cell = per_cell + ratio_z + ratio_l + ratio_d
    assert loss == pytest.approx(60 / 12 * per_cell.sum(), rel=1e-9)


def test_terms_are_the_parts_of_the_elbo_and_the_alignment_is_none_of_them(make_program, make_cells):
    program, cells = make_program(torch.float64), make_cells(dtype=torch.float64, n_total=60)
    torch.manual_seed(3)
    terms = measure(program, cells)
    torch.manual_seed(3)
    _, guide = traces(program, cells)
    z, l, d = drawn(guide, "z", "l", "d")
    oracle = Oracle(program, cells)
    kl_z, kl_l, kl_d = oracle.kl()
    log_x, log_y = oracle.log_x(z, l), oracle.log_y(z, d)
    assert terms.log_likelihood == pytest.approx({"x": log_x.sum(), "y": log_y.sum()})
    assert terms.kl == pytest.approx({"z": kl_z.sum(), "l": kl_l.sum(), "d": kl_d.sum()})
    q = oracle.guide()
    assert terms.training == pytest.approx({name: q[name].sum() for name in ("alignment", "mixing")})
    assert terms.elbo == pytest.approx((log_x + log_y - kl_z - kl_l - kl_d).sum())
    row = terms.per_cell()
    assert row["elbo"] == pytest.approx(-terms.elbo / 12)
    # Eight cells have RNA, nine have ATAC.
    assert row["reconstruction_expression"] == pytest.approx(-log_x.sum() / 8)
    assert row["reconstruction_accessibility"] == pytest.approx(-log_y.sum() / 9)
    assert row["reconstruction_loss"] == pytest.approx(-(log_x + log_y).sum() / 12)
    assert row["kl_local"] == pytest.approx(row["kl_z"] + row["kl_l"] + row["kl_d"])


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"modality_weights": "cell", "encode_covariates": True, "deeply_inject_covariates": True},
        {"modality_penalty": "MMD", "contrast_weight": 0.7, "mixing_weight": 2.5},
        {"modality_penalty": "None", "dispersion": "gene-batch", "gene_likelihood": "nb"},
        {"dispersion": "gene-cell", "latent_distribution": "ln", "modality_weights": "universal"},
        {"use_batch_norm": "both", "gene_likelihood": "poisson", "region_factors": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_gradients_are_those_of_the_loss(make_program, make_cells, choices, sparse, monkeypatch):
    """Slope along a random direction of all parameters, by finite differences of the loss itself.

    Where the gradient stops on purpose, the depth heads and the bandwidth of kernels, it is opened or held; the next
    test is about the first.
    """
    monkeypatch.setattr(MultiVIProgram, "depth_hidden_state", lambda self, state: state)
    monkeypatch.setattr(alignment, "_bandwidth", lambda squared: torch.tensor(0.7, dtype=torch.float64))
    program = make_program(torch.float64, **choices)
    cells = make_cells(dtype=torch.float64, sparse=sparse)
    parameters = list(program.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def loss():
        torch.manual_seed(1)
        return TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)

    loss().backward()
    # All parameters together; with sparse counts also each of them.
    each = [[k] for k in range(len(parameters))] if sparse else []
    for chosen in [range(len(parameters)), *each]:
        slope = sum((parameters[k].grad * directions[k]).sum().item() for k in chosen)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                for k in chosen:
                    parameters[k] += step * directions[k]
                values.append(loss().item())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=2e-5, abs=1e-5)


def test_depth_does_not_shape_the_shared_first_layer(make_program, make_cells):
    program, cells = make_program(torch.float64), make_cells(dtype=torch.float64)
    read = program.encode(cells, cells.design)
    depth = program.library_posterior(cells, cells.design, read).mean.sum() + program.cell_factor(cells, read).sum()
    depth.backward()
    assert program.library_head.out.weight.grad.abs().sum() > 0
    assert program.cell_factor_head.out.weight.grad.abs().sum() > 0
    assert all(
        p.grad is None for layer in (program.rna_first_layer, program.atac_first_layer) for p in layer.parameters()
    )
