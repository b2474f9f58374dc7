"""The program as Pyro's own tools see it, and its configuration."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.sparse import SparseCounts

CHOICES = [
    {},
    {"gene_likelihood": "nb", "dispersion": "gene-batch"},
    {"gene_likelihood": "poisson"},
    {"dispersion": "gene-cell", "latent_distribution": "ln"},
    {"dispersion": "gene-label", "library": "observed"},
    {"use_batch_norm": "both", "modality_weights": "cell", "encode_covariates": True, "region_factors": False},
    {"n_genes": 0},
    {"n_regions": 0},
]


def of(make_program, make_cells, choices, **more):
    """A program and cells for it: without genes, no cell is RNA-only."""
    n = (5, 0, 4) if choices.get("n_genes") == 0 else (5, 3, 0) if choices.get("n_regions") == 0 else (5, 3, 4)
    sizes = {name: choices[name] for name in ("n_genes", "n_regions") if name in choices}
    cells = make_cells(n, **sizes, **more)
    if choices.get("n_genes") == 0:
        cells = cells.replace(has_rna=cells.has_rna & False)
    if choices.get("n_regions") == 0:
        cells = cells.replace(has_atac=cells.has_atac & False)
    return make_program(**choices), cells


# ---------------------------------------------------------------------- sites


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_model_and_guide_agree_on_their_latents(make_program, make_cells, choices):
    program, cells = of(make_program, make_cells, choices)
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    latents = [name for name in model.stochastic_nodes if name != "cells"]
    assert [name for name in guide.stochastic_nodes if name != "cells"] == latents
    for name in latents:
        left, right = guide.nodes[name]["fn"], model.nodes[name]["fn"]
        assert left.batch_shape == right.batch_shape == (len(cells),)
        assert left.event_shape == right.event_shape
    expected = {"z", "l", "d"} - ({"l"} if not program.config.n_genes else set())
    assert set(latents) == expected - ({"d"} if not program.config.n_regions else set())


def test_the_trace_shows_the_graph_of_the_paper(make_program, make_cells):
    program, cells = make_program(), make_cells()
    nodes = poutine.trace(program.model).get_trace(cells).nodes
    order = [name for name in nodes if name in ("s", "z", "l", "rho", "x", "p", "d", "y")]
    assert order == ["s", "z", "l", "rho", "x", "p", "d", "y"]
    shapes = {name: tuple(nodes[name]["value"].shape) for name in order}
    assert shapes == {"s": (12, 3), "z": (12, 3), "l": (12,), "rho": (12, 7), "x": (12, 7), "p": (12, 9),
                      "d": (12,), "y": (12, 9)}  # fmt: skip
    torch.testing.assert_close(nodes["rho"]["value"].sum(-1), torch.ones(12))
    assert nodes["x"]["value"] is cells.x


@pytest.mark.parametrize("validate", [True, False])
def test_reading_a_program_needs_no_gradient_and_no_validation(make_program, make_cells, validate):
    program, cells = make_program(), make_cells()
    with torch.no_grad(), pyro.validation_enabled(validate):
        assert TraceMeanField_ELBO().loss(program.model, program.guide, cells) > 0


@pytest.mark.parametrize("extreme", [60.0, -60.0])
def test_a_saturated_cell_factor_stays_within_its_prior(make_program, make_cells, extreme):
    """In float32 sigmoid(60) is 1, whose logit is infinite."""
    program, cells = make_program(), make_cells()
    with torch.no_grad():
        program.cell_factor_head.out.bias.fill_(extreme)
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        program.zero_grad()
        loss = elbo.differentiable_loss(program.model, program.guide, cells)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in program.parameters() if p.grad is not None)


@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_an_absurd_library_size_stays_finite(make_program, make_cells, extreme):
    program, cells = make_program(), make_cells()
    with torch.no_grad():
        program.library_head.out.bias.fill_(extreme)
    loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in program.parameters() if p.grad is not None)


# ---------------------------------------------------------------------- particles


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("choices", [CHOICES[0], CHOICES[5]], ids=str)
def test_vectorised_particles_agree_with_sequential_ones(make_program, make_cells, choices, elbo):
    """Not bit for bit, as they draw in another order, but with the same particles in expectation."""
    program, cells = of(make_program, make_cells, choices)
    found = {}
    for vectorize in (True, False):
        losses = []
        for _ in range(8):
            estimate = elbo(num_particles=16, vectorize_particles=vectorize, max_plate_nesting=1)
            losses.append(estimate.loss(program.model, program.guide, cells))
        losses = torch.tensor(losses)
        found[vectorize] = losses.mean(), losses.std() / 8**0.5
    gap = abs(found[True][0] - found[False][0])
    assert gap < 6 * (found[True][1] ** 2 + found[False][1] ** 2) ** 0.5 + 1e-3


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_each_vectorised_particle_is_an_elbo_of_its_own(make_program, make_cells, choices):
    program, cells = of(make_program, make_cells, choices)

    def of_particles(n):
        with pyro.plate("particles", n, dim=-2):
            guide = poutine.trace(program.guide).get_trace(cells)
            model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
        return guide, model

    guide, model = of_particles(3)
    model.compute_log_prob()
    for k in range(3):
        # A shape of one is drawn once for all particles: a value that is not random.
        latents = {name: guide.nodes[name]["value"].expand(3, len(cells), -1)[k] if name == "z"
                   else guide.nodes[name]["value"].expand(3, len(cells))[k]
                   for name in ("z", "l", "d") if name in guide.nodes}  # fmt: skip
        alone = poutine.trace(poutine.condition(program.model, latents)).get_trace(cells)
        alone.compute_log_prob()
        for name in ("x", "y"):
            if name in alone.nodes:
                together = model.nodes[name]["unscaled_log_prob"].expand(3, len(cells))[k]
                torch.testing.assert_close(together, alone.nodes[name]["unscaled_log_prob"], rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------- handlers


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_predictive_draws_counts_that_were_observed(make_program, make_cells, choices, parallel):
    program, cells = of(make_program, make_cells, choices)
    n, sites = len(cells), ["z"]
    sites += ["l", "rho", "x"] if program.config.n_genes else []
    sites += ["d", "p", "y"] if program.config.n_regions else []
    predictive = Predictive(
        poutine.uncondition(program.model), guide=program.guide, num_samples=4, parallel=parallel, return_sites=sites
    )
    drawn = predictive(cells)
    assert set(drawn) == set(sites)
    events = {"z": (3,), "l": (), "rho": (7,), "x": (7,), "d": (), "p": (9,), "y": (9,)}
    for name, value in drawn.items():
        assert value.shape == (4, n, *events[name])
    if "x" in drawn:
        assert (drawn["x"] == drawn["x"].round()).all()
        assert drawn["x"].std(0).sum() > 0
        # The last cells of a mosaic have no RNA: sampling takes no notice of the mask.
        assert drawn["x"][:, -1].sum() > 0
        decoded = program.expression(drawn["z"], cells.design)
        torch.testing.assert_close(drawn["rho"], decoded.rho.dense(), rtol=1e-4, atol=1e-5)
    if "y" in drawn:
        assert set(drawn["y"].unique().tolist()) == {0.0, 1.0}


def test_condition_fixes_a_latent(make_program, make_cells):
    program, cells = make_program(), make_cells()
    fixed = torch.linspace(10, 20, 12)
    trace = poutine.trace(pyro.condition(program.model, {"l": fixed})).get_trace(cells)
    assert torch.equal(trace.nodes["l"]["value"], fixed)
    blocked = poutine.block(program.guide, hide=["l"])
    loss = TraceMeanField_ELBO().loss(pyro.condition(program.model, {"l": fixed}), blocked, cells)
    assert loss == loss


def test_an_intervention_on_the_design_reaches_the_decoders_but_not_the_guide(make_program, make_cells):
    program, cells = make_program(encode_covariates=True), make_cells()
    other = cells.design.clone()
    other[:, :2] = other[:, :2].flip(1)
    guide = poutine.trace(program.guide).get_trace(cells)

    def replayed(model, given):
        return poutine.trace(poutine.replay(model, trace=guide)).get_trace(given).nodes

    done = replayed(pyro.do(program.model, {"s": other}), cells)
    really = replayed(program.model, cells.replace(design=other))
    for name in ("rho", "p"):
        assert not torch.allclose(done[name]["value"], replayed(program.model, cells)[name]["value"])
        torch.testing.assert_close(done[name]["value"] + 0.0, really[name]["value"] + 0.0)
    torch.testing.assert_close(done["l"]["fn"].loc, really["l"]["fn"].loc)
    both = TraceMeanField_ELBO().loss(pyro.do(program.model, {"s": other}), program.guide, cells)
    assert both == both


def test_one_design_for_all_cells_is_enough(make_program, make_cells):
    program, cells = make_program(dispersion="gene-batch"), make_cells()
    one = torch.tensor([0.0, 1.0, 0.0])
    torch.manual_seed(0)
    narrow = poutine.trace(pyro.do(program.model, {"s": one})).get_trace(cells)
    torch.manual_seed(0)
    wide = poutine.trace(pyro.do(program.model, {"s": one.expand(12, 3)})).get_trace(cells)
    narrow.compute_log_prob()
    wide.compute_log_prob()
    torch.testing.assert_close(narrow.log_prob_sum(), wide.log_prob_sum())


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("choices", [CHOICES[0], CHOICES[1], CHOICES[6], CHOICES[7]], ids=str)
def test_pyro_can_draw_the_graph(make_program, make_cells, choices, sparse):
    program, cells = of(make_program, make_cells, choices, sparse=sparse)
    relations = get_model_relations(program.model, model_args=(cells,))
    upstream = relations["sample_sample"]
    if program.config.n_genes:
        assert {"z", "l"} <= set(upstream["x"])
        assert "d" not in upstream["x"]
    if program.config.n_regions:
        assert {"z", "d"} <= set(upstream["y"])
        assert "l" not in upstream["y"]
    assert set(relations["observed"]) >= {name for name in ("x", "y") if name in upstream}
    assert relations["plate_sample"]["cells"]


# ---------------------------------------------------------------------- start of a program, older states


def test_a_state_from_before_d_had_a_posterior_gets_one(make_program, make_cells):
    """Its width needs nothing learned; d was uniform a priori."""
    old, cells = make_program(), make_cells()
    old.cell_factor_offset.zero_()
    later = {"cell_factor_loc", "cell_factor_log_scale", "cell_factor_offset", "cell_factor_sd"}
    program = MultiVIProgram(old.config).eval()
    program.load_state_dict({name: value for name, value in old.state_dict().items() if name not in later})
    q = poutine.trace(program.guide).get_trace(cells).nodes["d"]["fn"]
    measured = cells.has_atac
    f_l = program.cell_factor(cells, program.encode(cells, cells.design))
    torch.testing.assert_close(q.loc.sigmoid()[measured], f_l[measured])
    assert bool((q.scale[measured] < q.scale[~measured].min()).all())
    uniform = torch.rand(100_000, dtype=torch.float64)
    with torch.no_grad():
        prior = program.cell_factor_prior(cells, cells.design)
    assert float(prior.loc[0]) == pytest.approx(float(uniform.logit().mean()), abs=0.03)
    assert float(prior.scale[0]) == pytest.approx(float(uniform.logit().std()), abs=0.03)


def test_a_state_from_before_batches_had_intercepts_is_decoded_as_before(make_program, make_cells):
    old, cells = make_program(), make_cells()
    program, width = MultiVIProgram(old.config).eval(), old.config.hidden
    state = old.state_dict()
    for decoder, layer, key in (("expression_decoder", "rho", "rna"), ("accessibility_decoder", "p", "atac")):
        weight, directions = (state[name] for name in (f"{decoder}.{layer}.weight", f"{key}_weight_directions"))
        weight[:, width:], directions[:, width:-1] = 0.0, 0.0
        state[f"{decoder}.{layer}.weight"] = weight[:, :width].clone()
        state[f"{key}_weight_directions"] = torch.cat([directions[:, :width], directions[:, -1:]], 1)
    program.load_state_dict(state)
    for name, value in old.state_dict().items():
        torch.testing.assert_close(program.state_dict()[name], value)
    z = torch.randn(len(cells), old.config.latent)
    for found, wanted in (
        (program.expression(z, cells.design).rho.dense(), old.expression(z, cells.design).rho.dense()),
        (program.accessibility(z, cells.design).dense(), old.accessibility(z, cells.design).dense()),
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("likelihood", "buffer"), [("bernoulli", "cell_factor_loc"), ("poisson", "fragments_log_mean")]
)
def test_an_intervention_on_the_design_reaches_both_depths(make_program, make_cells, likelihood, buffer):
    """Under do(s), p(l | s) and p(d | s) are those of the other batch."""
    program, cells = make_program(accessibility_likelihood=likelihood), make_cells()
    with torch.no_grad():
        for of_batches in (program.library_log_mean, getattr(program, buffer)):
            of_batches.copy_(torch.tensor([-1.0, 1.0]))
    s = cells.design.clone()
    s[:, :2] = cells.design[:, [1, 0]]
    nodes = poutine.trace(poutine.do(program.model, {"s": s})).get_trace(cells).nodes
    mean = torch.tensor([-1.0, 1.0])[s[:, :2].argmax(1)]
    for name in ("l", "d"):
        assert torch.equal(nodes[name]["fn"].base_dist.loc, mean), name


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_a_program_starts_at_the_marginals(make_program, make_cells, dispersion):
    program, cells = make_program(dispersion=dispersion).eval(), make_cells()
    marginals = Marginals.of([cells], n_batch=2)
    assert marginals.inverse_dispersion.std() > 0.01
    program.start_from(marginals)
    z, s = torch.randn(len(cells), program.config.latent), cells.design
    with torch.no_grad():
        decoded = program.expression(z, s)
        theta = program.theta(cells, s, decoded, program.log_dispersions())
        p, r = program.accessibility(z, s).dense(), program.region_factors()
    # Whatever the state: every cell starts at the mean profile.
    torch.testing.assert_close(decoded.rho.dense(), marginals.gene_share.expand(len(cells), -1))
    torch.testing.assert_close(theta.expand(len(cells), -1), marginals.inverse_dispersion.expand(len(cells), -1))
    d = program.cell_factor_offset.sigmoid()
    rate = torch.minimum(marginals.detection_rate, 0.94 * d)  # more is out of reach
    torch.testing.assert_close(d * p * r, rate.expand(len(cells), -1), rtol=0.02, atol=0)
    torch.testing.assert_close(program.library_log_mean, marginals.library_log_mean)
    torch.testing.assert_close(program.library_log_var, marginals.library_log_var)


# ---------------------------------------------------------------------- what the encoders read


def test_the_encoder_reads_expression_at_one_depth(make_program, make_cells):
    """Twice the counts are the same expression, sparse or dense, and an empty cell is no division by zero."""
    program, cells = make_program(), make_cells()
    x = cells.x.to_dense()
    x[1] = 0
    read = program.rna_input(x)
    assert torch.equal(program.rna_input(SparseCounts.from_dense(x)).to_dense(), read)
    torch.testing.assert_close(program.rna_input(2 * x), read)
    assert not read[1].any()
    np.testing.assert_allclose(read[0].expm1().sum(), program.rna_log_depth.exp(), rtol=1e-5)
