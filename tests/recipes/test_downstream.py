"""Extended programs from training to differential tests, predictive checks and files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO

import pyro_multivi as pm
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.engine.likelihood import elbo_parts
from pyro_multivi.traces import TRAINING_SITES
from pyro_multivi.training.contract import check_contract

ROOT = Path(__file__).parents[2]
PROGRAMS = (
    "MixturePrior", "VampPrior", "RandomRegionFactors", "RandomDispersions", "CovariateEffect", "LinearExpression",
    "Protein", "PoissonFragments", "FlowGuide",
)  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_model_and_guide_keep_their_contract_and_every_parameter_trains(recipes, randomised, stained, name):
    program = randomised(getattr(recipes, name))
    check_contract(program, stained, Trace_ELBO() if name == "FlowGuide" else None)
    before = {key: value.clone() for key, value in program.state_dict().items()}
    svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(stained) for _ in range(2)]
    assert np.isfinite(losses).all()
    assert [key for key, value in program.named_parameters() if torch.equal(value, before[key])] == []
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("name", ["RandomRegionFactors", "Protein", "PoissonFragments"])
def test_posterior_quantities_tests_and_checks(recipes, fitted, name):
    model = fitted(getattr(recipes, name))
    assert np.isfinite(model.get_latent_representation()).all()
    accessibility = model.get_accessibility_estimates(return_numpy=True, normalize_regions=True)
    assert ((accessibility >= 0) & (accessibility <= 1)).all()
    expression = model.get_normalized_expression(n_samples=3, return_numpy=True)
    np.testing.assert_allclose(expression.sum(-1), 1, rtol=1e-4)
    for test in (model.differential_expression, model.differential_accessibility):
        table = test(groupby="cell_type", n_samples=200)
        assert np.isfinite(table.select_dtypes("number").to_numpy()).any(0).all()
    check = model.posterior_predictive_check(n_samples=40)
    assert check.summary() is not None
    if name != "RandomRegionFactors":
        assert np.isfinite(model.get_elbo())
        assert np.isfinite(model.get_marginal_ll(n_mc_samples=5))


def test_a_differential_test_sees_the_effect_that_was_added(recipes, fitted):
    """An effect of log 8 on gene 0 in the second batch adds 3 to its log2 fold change between the batches.

    Uncalibrated: the calibrated estimate is drawn towards no change on purpose.
    """
    model = fitted(recipes.CovariateEffect)
    batch = np.unique(model.adata.obs["batch"])

    def fold_change():
        table = model.differential_expression(
            groupby="batch", group1=batch[1], group2=batch[0], n_samples=500, pseudocounts=0.0, calibrated=False
        )
        return table.loc[model.spec.gene_names[0], "lfc_mean"]

    # Shares are renormalised: a rare gene hardly changes the others.
    with torch.no_grad():
        model.program.expression_decoder.rho.bias[0] -= 6.0
    before = fold_change()
    with torch.no_grad():
        model.program.effect[0, 1] += np.log(8.0)
    assert fold_change() - before == pytest.approx(3.0, abs=0.15)


def test_predicted_proteins_are_draws_of_the_likelihood(recipes, fitted):
    model = fitted(recipes.Protein)
    cells = model.minibatch()
    drawn = draw(model.program, cells, ("protein", "z"), n_samples=400)
    values, measured = cells.extra["protein"]
    assert drawn["protein"].shape == (400, len(cells), 4)
    assert not torch.equal(drawn["protein"][0], values)
    with torch.no_grad():
        s = cells.design.expand(400, -1, -1)
        mean = model.program.protein_decoder(torch.cat([drawn["z"], s], -1)).exp()
    # Four proteins in 60 cells; an error of the mean of 400 draws below 10 %.
    np.testing.assert_allclose(drawn["protein"].mean(0).mean(0), mean.mean(0).mean(0), rtol=0.1)
    alone = model.get_latent_representation(modality="protein")
    np.testing.assert_array_equal(np.isnan(alone).any(1), ~measured.numpy())
    parts = elbo_parts(model.program, [cells])
    assert (parts.log_likelihood["protein"][~measured.numpy()] == 0).all()


@pytest.mark.parametrize("name", ["Protein", "PoissonFragments"])
def test_queries_are_mapped_onto_a_recipe(recipes, fitted, name):
    model = fitted(getattr(recipes, name))
    cells = model.adata[:20].copy()
    cells.obs["batch"] = "new"
    query = pm.MULTIVI.load_query_data(cells, model)
    query.train(1, progress_bar=False)
    latent = query.get_latent_representation()
    assert np.isfinite(latent).all()
    # A cell's state is that of the reference, but for what the batch does to it.
    of_reference = model.get_latent_representation(indices=np.arange(20))
    assert np.corrcoef(latent.ravel(), of_reference.ravel())[0, 1] > 0.9
    if name == "Protein":
        drawn = draw(query.program, query.minibatch(), ("protein",), n_samples=2)["protein"]
        assert drawn.shape == (2, 20, 4)


def test_models_that_observe_other_measurements_are_not_compared(recipes, fitted):
    with_proteins, without = fitted(recipes.Protein, 1), fitted(pm.MultiVIProgram, 1)
    given = {"indices": with_proteins.validation_indices[:2], "n_mc_samples": 2}
    assert pm.compare_models({"a": with_proteins, "b": with_proteins}, **given)["difference"].tolist() == [0, 0]
    says = r"observe the sites \['protein', 'x', 'y'\] and \['x', 'y'\]: likelihoods of different measurements"
    with pytest.raises(ValueError, match=says):
        pm.compare_models({"a": with_proteins, "b": without}, **given)
    other = with_proteins.adata.copy()
    other.obsm["protein"] = 2 * other.obsm["protein"]
    pm.MULTIVI.setup_anndata(other, batch_key="batch", modality_key="modality", extra_obsm_keys=["protein"])
    of_other = pm.MULTIVI(other, n_hidden=8, n_latent=2, program_class=recipes.Protein)
    of_other.is_trained = True
    with pytest.raises(ValueError, match="were given different values of 'protein'"):
        pm.compare_models({"a": with_proteins, "b": of_other}, **given)


def test_replicates_of_fragments_are_open_at_the_rate_of_the_model(recipes, fitted):
    model = fitted(recipes.PoissonFragments)
    cells = model.minibatch()
    drawn = draw(model.program, cells, ("y", "p", "d"), n_samples=300)
    r = torch.as_tensor(model.get_region_factors())
    expected = (drawn["p"].dense() * drawn["d"][..., None] * r).mean((0, 1))
    assert drawn["y"].max() > 1
    np.testing.assert_allclose((drawn["y"] > 0).float().mean((0, 1)), expected, atol=0.02)


def test_shared_latents_are_drawn_once_for_all_cells(recipes, fitted):
    model = fitted(recipes.RandomRegionFactors)
    cells, few = model.minibatch(), model.minibatch([3, 5])
    drawn = draw(model.program, cells, ("r_logit",), n_samples=4)["r_logit"]
    assert drawn.shape == (4, 1, 60)
    assert drawn.std(0).min() > 0
    assert torch.equal(drawn, draw(model.program, few, ("r_logit",), n_samples=4)["r_logit"])
    np.testing.assert_allclose(model.get_region_factors(), model.program.region_logit.sigmoid().detach(), rtol=1e-6)
    with pytest.raises(ValueError, match="The model shares 'r_logit' among cells"):
        model.get_elbo()


def test_a_posterior_without_a_mean_says_so(recipes, fitted):
    model = fitted(recipes.FlowGuide, elbo=Trace_ELBO())
    assert np.isfinite(model.get_latent_representation(give_mean=False, n_samples=3)).all()
    with pytest.raises(ValueError, match=r"distribution of 'z' has no mean: ask for draws .*give_mean=False"):
        model.get_latent_representation()
    with pytest.raises(
        ValueError, match=r"^The guide's distribution of 'z' has no mean: labels .* mix\(experts\) needs"
    ):
        model.transfer_labels(model.adata, "cell_type")


def test_training_with_a_bound_of_ones_own(recipes, fitted):
    model = fitted(pm.MultiVIProgram, elbo=recipes.CellRenyiELBO(num_particles=3))
    assert np.isfinite(model.history["elbo_train"]).all().all()


@pytest.mark.parametrize("elbo", [JitTrace_ELBO(), JitTraceMeanField_ELBO()], ids=lambda elbo: type(elbo).__name__)
def test_compiled_elbos_of_pyro_are_refused(fitted, elbo):
    with pytest.raises(TypeError, match=f"elbo={type(elbo).__name__} compiles a model of tensors.*use Trace_ELBO or"):
        fitted(pm.MultiVIProgram, elbo=elbo)


def test_an_elbo_without_differentiable_loss_is_refused(fitted):
    from pyro.infer import RenyiELBO

    with pytest.raises(TypeError, match="elbo=RenyiELBO has no differentiable_loss.*pyro.infer.SVI"):
        fitted(pm.MultiVIProgram, elbo=RenyiELBO(num_particles=2))


def test_handlers_compose_with_an_extended_program(recipes, randomised, stained):
    program = randomised(recipes.Protein)
    hidden = poutine.block(program.guide, hide=["l", *TRAINING_SITES])
    known = pyro.condition(program.model, {"l": torch.full((12,), 9.0, dtype=torch.float64)})

    def loss(model):
        torch.manual_seed(0)
        return float(TraceMeanField_ELBO().loss(model, hidden, stained))

    torch.manual_seed(0)
    guide = poutine.trace(hidden).get_trace(stained)
    trace = poutine.trace(poutine.replay(known, trace=guide)).get_trace(stained)
    trace.compute_log_prob()
    without = loss(poutine.block(known, hide=["protein"]))
    assert without - loss(known) == pytest.approx(trace.nodes["protein"]["log_prob_sum"].item())
    assert loss(poutine.scale(known, 0.5)) < loss(known)


# ---------------------------------------------------------------------- files

ELSEWHERE = """
import sys, numpy as np, anndata, torch
torch.set_num_threads(1)
import pyro_multivi as pm
folder, data, out = sys.argv[1:]
model = pm.MULTIVI.load(folder, anndata.read_h5ad(data), program_class="recipes:ConfiguredMixture")
np.savez(out, z=model.get_latent_representation(), n=model.program.config.n_components, elbo=model.get_elbo())
"""


def test_another_process_finds_the_class_by_the_path_it_is_given(recipes, source, fitted, tmp_path):
    model = fitted(recipes.ConfiguredMixture, program_options={"n_components": 3})
    model.save(tmp_path / "model")
    model.adata.write_h5ad(tmp_path / "data.h5ad")
    (tmp_path / "recipes.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, *(str(tmp_path / part) for part in ("model", "data.h5ad", "out.npz"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_array_equal(found["z"], model.get_latent_representation())
        assert found["n"] == 3
        assert found["elbo"] == model.get_elbo()


def test_a_file_imports_nothing_by_itself(recipes, fitted, tmp_path, monkeypatch):
    model = fitted(recipes.ConfiguredMixture, program_options={"n_components": 3})
    model.save(tmp_path / "model")
    monkeypatch.delitem(sys.modules, "recipes")
    (tmp_path / "recipes.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"class recipes:ConfiguredMixture, not .*program_class='recipes:Configured"):
        pm.MULTIVI.load(tmp_path / "model", model.adata)
    again = pm.MULTIVI.load(tmp_path / "model", model.adata, program_class=recipes.ConfiguredMixture)
    assert again.program.config.n_components == 3
    assert type(again.program.config) is recipes.MixtureConfig


def test_options_of_a_program_are_checked(recipes, fitted):
    with pytest.raises(ValueError, match=r"'n_component', which is no field of MixtureConfig; it adds 'n_components'"):
        fitted(recipes.ConfiguredMixture, program_options={"n_component": 3})
    with pytest.raises(ValueError, match="has 'dispersion', a choice of every program"):
        fitted(recipes.ConfiguredMixture, program_options={"dispersion": "gene"})
    for value in ((3, 4), np.arange(2), {1: 2}, {3}, [(1, 2)]):
        with pytest.raises(ValueError, match=r"n_components=.* of MixtureConfig is not allowed, because a saved model"):
            fitted(recipes.ConfiguredMixture, program_options={"n_components": value})
    with pytest.raises(TypeError, match="must be a subclass of MultiVIProgram"):
        fitted(torch.nn.Linear)
