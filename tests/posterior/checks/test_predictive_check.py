"""A model that is right passes, one that is wrong fails."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from pyro.infer import TraceMeanField_ELBO

from pyro_multivi import MULTIVI, MultiVIProgram, ProgramConfig, compare_models, simulate_multiome
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.split import Split
from pyro_multivi.posterior.checks.result import PredictiveCheck

N_CELLS, N_GENES, N_REGIONS = 500, 60, 200
CHOICES = {"n_hidden": 24, "n_latent": 2, "dropout_rate": 0.0, "modality_penalty": None, "n_layers_decoder": 1}


def true_program() -> MultiVIProgram:
    """Genes of 1 to 60 counts with theta near 2, regions open in 5 to 60 % of deep cells."""
    torch.manual_seed(1)
    program = MultiVIProgram(ProgramConfig(N_GENES, N_REGIONS, gene_likelihood="nb", **CHOICES)).eval()
    with torch.no_grad():
        program.expression_decoder.rho.bias.copy_(0.8 * torch.randn(N_GENES))
        program.expression_decoder.rho.weight.copy_(0.25 * torch.randn(N_GENES, CHOICES["n_hidden"]))
        program.log_theta.copy_(0.7 + 0.3 * torch.randn(1, N_GENES))
        program.accessibility_decoder.p.bias.copy_(torch.randn(N_REGIONS))
        program.accessibility_decoder.p.weight.copy_(0.3 * torch.randn(N_REGIONS, CHOICES["n_hidden"]))
        program.region_logit.copy_(0.5 + torch.randn(N_REGIONS))
        program.library_log_mean.fill_(np.log(600.0))
        program.library_log_var.fill_(0.15)
    return program


def fit_guide(program: MultiVIProgram, cells: Cells, n_steps: int) -> None:
    """Fit the guide to the posterior of a fixed model; experts are also trained alone."""
    of_model = ("expression_decoder", "accessibility_decoder", "log_theta", "region_logit")
    parameters = [value for name, value in program.named_parameters() if not name.startswith(of_model)]
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_steps)
    elbo = TraceMeanField_ELBO()
    rng = np.random.default_rng(0)
    for _ in range(n_steps):
        lot = torch.from_numpy(rng.random(len(cells)))
        some = cells.replace(has_rna=lot > 0.3, has_atac=lot < 0.7)
        loss = elbo.differentiable_loss(program.model, program.guide, some)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


def as_model(adata: AnnData, weights: dict[str, torch.Tensor], **choices: object) -> MULTIVI:
    """A model of these weights, as if trained on four fifths of the cells."""
    model = MULTIVI(adata, **{"gene_likelihood": "nb", **CHOICES, **choices})
    known = model.program.state_dict()
    model.program.load_state_dict({name: weights.get(name, value) for name, value in known.items()})
    model._split = Split.of(len(adata), 0.2, 0.8, True, 0)
    model.is_trained = True
    return model


@pytest.fixture(scope="module")
def truth() -> MULTIVI:
    """Cells drawn from a program, and that very program with a guide trained for it.

    With exact parameters the check is of the method itself. Latents are inferred, so statistics of single
    cells cannot be uniform; those over cells nearly are, two of 60 degrees of freedom being spent.
    """
    with torch.random.fork_rng():
        program = true_program()
        both = torch.ones(N_CELLS, dtype=torch.bool)
        blank = Cells(
            torch.arange(N_CELLS), N_CELLS, torch.zeros(N_CELLS, N_GENES), torch.zeros(N_CELLS, N_REGIONS),
            both, both, torch.ones(N_CELLS, 1),
        )  # fmt: skip
        with torch.no_grad():
            nodes = poutine.trace(poutine.uncondition(program.model)).get_trace(blank).nodes
        x, y = (nodes[site]["value"].detach() for site in ("x", "y"))
        kinds = ["Gene Expression"] * N_GENES + ["Peaks"] * N_REGIONS
        names = [f"gene_{g}" for g in range(N_GENES)] + [f"region_{m}" for m in range(N_REGIONS)]
        adata = AnnData(
            sp.csr_matrix(torch.cat([x, y], 1).numpy()),
            obs=pd.DataFrame(
                {"modality": "paired", "half": np.where(np.arange(N_CELLS) % 2, "a", "b")},
                index=[f"cell_{n}" for n in range(N_CELLS)],
            ),
            var=pd.DataFrame({"feature_types": kinds}, index=names),
        )
        MULTIVI.setup_anndata(adata, modality_key="modality")
        model = as_model(adata, program.state_dict())
        with torch.no_grad():
            model.program.rna_log_depth.fill_(float(x.sum(1).log().mean()))
            model.program.atac_log_depth.fill_(float(y.sum(1).log1p().mean()))
        fit_guide(model.program, model.minibatch(), 400)
    return model


@pytest.fixture(scope="module")
def check(truth):
    return truth.posterior_predictive_check(groupby="half", n_samples=100)


def shares(check, table="genes"):
    """Share of features outside the interval, by statistic."""
    summary = check.summary().query("table == @table").set_index("statistic")
    return summary["data_above"] + summary["data_below"], summary


def test_own_simulator_passes(check):
    assert check.n_cells == 400
    for table, bound in (("genes", 0.25), ("regions", 0.15)):
        outside, summary = shares(check, table)
        # Kolmogorov's 1 % point is 0.21 for 60 genes and 0.115 for 200 regions; they are not independent.
        assert (summary["uniformity"] < bound).all(), summary
        assert (outside < 0.15).all(), summary
    totals = check.totals.query("by == 'all'").set_index("statistic")
    of_genes = totals[~totals.index.str.contains("region")]
    assert of_genes["p_value"].between(0.005, 0.995).all(), totals
    # The guide gives the cell factor as a single number, from a network: near, not exact.
    assert (totals["replicated"] / totals["observed"]).between(0.96, 1.04).all(), totals


def test_own_simulator_is_calibrated_on_held_out_cells_and_hidden_modalities(check):
    scores = check.scores.set_index(["setting", "score"])["value"]
    for setting in ("held-out cells", "hidden accessibility"):
        assert scores[setting, "ece"] <= 0.02
        assert scores[setting, "brier"] < scores[setting, "brier_of_region_rates"]
    for setting in ("held-out cells", "hidden expression"):
        assert scores[setting, "largest_coverage_gap"] <= 0.03
        assert scores[setting, "largest_coverage_gap_expected_1"] <= 0.03
    imputed = check.imputed.groupby("modality")["correlation"].mean()
    assert (imputed > 0.1).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_fitted_model_of_its_own_simulator_passes(seed):
    """Default model, default training; of the features of 200 held-out cells about 6 % lie outside by chance."""
    adata = simulate_multiome((1200, 400, 400), n_genes=80, n_regions=200, seed=seed)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, gene_likelihood="nb")
    model.train(max_epochs=150, train_size=0.9, early_stopping=False, progress_bar=False)
    check = model.posterior_predictive_check(n_samples=200)
    for table in ("genes", "regions"):
        outside, summary = shares(check, table)
        assert (outside < 0.15).all(), summary
        assert (summary["uniformity"] < 0.25).all(), summary
    scores = check.scores.set_index(["setting", "score"])["value"]
    for setting in ("held-out cells", "hidden accessibility"):
        assert scores[setting, "ece"] <= 0.02
    for setting in ("held-out cells", "hidden expression"):
        assert scores[setting, "largest_coverage_gap"] <= 0.03


def test_poisson_fails_on_overdispersed_counts(truth):
    wrong = as_model(truth.adata, truth.program.state_dict(), gene_likelihood="poisson")
    found = wrong.posterior_predictive_check(n_samples=100, hide_modalities=False)
    _, summary = shares(found)
    assert summary.loc["variance", "data_above"] > 0.9
    assert summary.loc["zero_fraction", "data_above"] > 0.7
    assert summary.loc[["variance", "zero_fraction"], "fails"].all()
    assert found.scores.set_index("score")["value"]["coverage_90"] < 0.75
    # What the likelihood of genes does not touch is as good as before.
    assert not shares(found, "regions")[1]["fails"].any()
    assert "FAILS" in repr(found)


class FixedLibrary(MultiVIProgram):
    """The library of every cell as large as the typical one."""

    def known_library(self, cells, s):
        return self.library_moments(s)[0].exp()


class FixedDepth(FixedLibrary):
    """Every cell as deep as the typical one, in both modalities."""

    def cell_factor_prior(self, cells, s):
        return dist.Delta(cells.design.new_full((len(cells),), 0.5))


class NothingInferred(FixedDepth):
    """Depth is told and the state has no effect: replicates are drawn from the very distribution of the data."""

    def transform(self, z):
        return torch.zeros_like(z)


def with_counts(model: MULTIVI, x: torch.Tensor, y: torch.Tensor, **choices: object) -> MULTIVI:
    """A program of the same weights, and other counts of the same cells."""
    adata = model.adata.copy()
    adata.X = sp.csr_matrix(torch.cat([x, y], 1).numpy())
    MULTIVI.setup_anndata(adata, modality_key="modality")
    return as_model(adata, model.program.state_dict(), **choices)


def drawn_from(program: MultiVIProgram, cells: Cells, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of a data set drawn from a program, latents from their priors."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        nodes = poutine.trace(poutine.uncondition(program.model)).get_trace(cells).nodes
    return nodes["x"]["value"].detach(), nodes["y"]["value"].detach()


def failures(checks: list[PredictiveCheck]) -> pd.DataFrame:
    """Whether each row of the summaries fails, (rows, checks)."""
    return pd.concat([one.summary().set_index(["table", "statistic"])["fails"] for one in checks], axis=1)


N_SETS = 12
# Under the right model a row fails in one of 20 data sets. More than 4 of 12 have a probability of 2 in 10 000.
MOST_FAILURES = 4
# Rows of which depth is inferred.
DEPTHS = [f"{of}{total}" for of in ("", "mean ", "sd ") for total in ("expression_depth", "accessible_regions")]


def test_data_of_the_program_itself_fail_no_more_often_than_by_chance(truth):
    exact = as_model(truth.adata, truth.program.state_dict(), program_class=NothingInferred)
    checks = []
    for seed in range(N_SETS):
        counts = drawn_from(exact.program, exact.minibatch(), seed)
        model = with_counts(truth, *counts, program_class=NothingInferred)
        checks.append(
            model.posterior_predictive_check(
                indices=range(200), n_samples=40, hide_modalities=False, groupby="half", seed=seed
            )
        )
    failed = failures(checks)
    assert len(failed) == 25
    assert failed.notna().all(axis=None)
    counted = failed.sum(axis=1)
    assert (counted <= MOST_FAILURES).all(), counted
    # 300 rows, of which 5 % are 15; 30 would be 4 standard deviations more.
    assert counted.sum() <= 30, counted


def test_depth_that_is_inferred_from_the_counts_has_no_verdict(check, truth):
    assert check.untested == ("accessible_regions", "expression_depth")
    summary = check.summary()
    of_depth = summary["statistic"].isin(DEPTHS)
    assert of_depth.sum() == 10
    assert (summary["fails"].isna() == of_depth).all()
    assert repr(check).count(" n/a\n") == 10
    # Known depths of one modality leave that of the other.
    observed = as_model(truth.adata, truth.program.state_dict(), program_class=FixedLibrary)
    found = observed.posterior_predictive_check(n_samples=40, hide_modalities=False)
    assert found.untested == ("accessible_regions",)


@pytest.mark.slow
def test_data_of_a_fitted_program_fail_no_more_often_than_by_chance():
    """Replicates of a trained model, as data of that model."""
    adata = simulate_multiome((600, 200, 200), n_genes=80, n_regions=200, n_batches=2, seed=0)
    MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    model = MULTIVI(adata)
    model.train(max_epochs=150, progress_bar=False)
    cells = model.minibatch()
    replicates = model.posterior_predictive_sample(n_samples=N_SETS)
    checks = []
    for seed, (x, y) in enumerate(zip(replicates["x"], replicates["y"], strict=True)):
        drawn = adata.copy()
        masked = [part.multiply(mask.numpy()[:, None]) for part, mask in ((x, cells.has_rna), (y, cells.has_atac))]
        drawn.X = sp.hstack(masked, format="csr")
        MULTIVI.setup_anndata(drawn, modality_key="modality", batch_key="batch")
        again = MULTIVI(drawn)
        again.program.load_state_dict(model.program.state_dict())
        again._split, again.is_trained = model._split, True
        checks.append(again.posterior_predictive_check(n_samples=100, hide_modalities=False, seed=seed))
    failed = failures(checks)
    of_depth = failed.index.get_level_values("statistic").isin(DEPTHS)
    assert (failed.isna().all(axis=1) == of_depth).all()
    counted = failed[~of_depth].sum(axis=1)
    assert (counted <= MOST_FAILURES).all(), counted


def test_every_tested_row_can_fail(truth):
    """Data of other genes and regions, and data in which half of the cells lost half of their genes."""
    x, y = drawn_from(truth.program, truth.minibatch(), 0)
    half = (torch.arange(N_CELLS) % 2 == 0)[:, None]
    lost = torch.where(half, x * (torch.arange(N_GENES) % 2), x)
    checks = [
        with_counts(truth, *counts).posterior_predictive_check(n_samples=40, hide_modalities=False)
        for counts in ((x.flip(1), y.flip(1)), (lost, y))
    ]
    failed = failures(checks).dropna()
    assert len(failed) == 8
    assert failed.any(axis=1).all(), failed


def test_fixed_depth_fails_the_statistics_of_depth(truth):
    wrong = as_model(truth.adata, truth.program.state_dict(), program_class=FixedDepth)
    found = wrong.posterior_predictive_check(n_samples=100, hide_modalities=False)
    totals = found.totals.set_index("statistic")["p_value"]
    # The data scatter more than any replicate.
    assert totals["sd expression_depth"] == 0
    assert totals["sd accessible_regions"] == 0
    outside, summary = shares(found, "cells")
    assert (outside[["expression_depth", "accessible_regions"]] > 0.2).all()
    # Depth is told to this program, not inferred from the counts: there it is a test.
    assert found.untested == ()
    assert summary["fails"].notna().all()
    assert summary.loc[["expression_depth", "accessible_regions"], "fails"].all()
    assert "n/a" not in repr(found)


def test_groups_have_statistics_of_their_own(check):
    groups = check.groups
    assert set(groups["group"]) == {"a", "b"}
    assert set(groups["statistic"]) == {"mean", "variance", "cv", "zero_fraction", "detection_rate"}
    assert len(groups) == 2 * (4 * N_GENES + N_REGIONS)
    assert len(check.totals) == 3 * 6
    # The whole is made of its parts.
    part = groups.query("statistic == 'mean' and feature == 'gene_3'").set_index("group")["observed"]
    whole = check.genes.query("statistic == 'mean' and gene == 'gene_3'")["observed"].item()
    assert min(part) <= whole <= max(part)


def test_observed_statistics_are_those_of_the_data(truth, check):
    counts = truth.adata.X.toarray()[truth.validation_indices]
    x, y = counts[:, :N_GENES], counts[:, N_GENES:]
    for name, value in (("mean", x.mean(0)), ("zero_fraction", (x == 0).mean(0)), ("variance", x.var(0, ddof=1))):
        np.testing.assert_allclose(check.genes.query(f"statistic == {name!r}")["observed"], value, rtol=1e-5)
    np.testing.assert_allclose(check.regions["observed"], y.mean(0), rtol=1e-6)
    depth = check.cells.query("statistic == 'expression_depth'")
    assert depth["cell"].tolist() == list(truth.adata.obs_names[truth.validation_indices])
    np.testing.assert_allclose(depth["observed"], x.sum(1))
    assert check.histogram["observed"].sum() == x.size
    assert check.histogram["replicated"].sum() == pytest.approx(x.size)


def test_statistic_of_the_user(truth):
    def share_of_first_gene(counts):
        assert sp.issparse(counts)
        assert counts.shape == (400, N_GENES + N_REGIONS)
        return counts[:, 0].sum() / counts[:, :N_GENES].sum()

    def mean_of_genes(counts):
        return np.asarray(counts[:, :N_GENES].mean(0)).ravel()

    found = truth.posterior_predictive_check(
        statistics={"share": share_of_first_gene, "means": mean_of_genes}, n_samples=40, hide_modalities=False
    )
    user = found.user.set_index(["statistic", "position"])
    counts = truth.adata.X[truth.validation_indices]
    assert user.loc[("share", 0), "observed"] == pytest.approx(share_of_first_gene(counts))
    means = user.loc["means"]
    built_in = found.genes.query("statistic == 'mean'")
    np.testing.assert_allclose(means["observed"], built_in["observed"], rtol=1e-5)
    # Another set of replicates of the same model.
    width = (built_in["upper"] - built_in["lower"]).to_numpy()
    assert (np.abs(means["replicated"].to_numpy() - built_in["replicated"].to_numpy()) < width / 2).all()


def test_compare_models_prefers_the_truth(truth):
    models = {
        "poisson": as_model(truth.adata, truth.program.state_dict(), gene_likelihood="poisson"),
        "truth": truth,
    }
    some = truth.validation_indices[:60]
    table = compare_models(models, indices=some, n_mc_samples=30)
    assert table.index.tolist() == ["truth", "poisson"]
    assert table.loc["truth", "difference"] == 0
    assert table.loc["poisson", "difference"] < -5 * table.loc["poisson", "difference_error"]
    per_cell = truth.get_marginal_ll(n_mc_samples=30, indices=some, return_mean=False)
    assert table.loc["truth", "log_likelihood"] == pytest.approx(per_cell.mean())
    assert table.loc["truth", "standard_error"] == pytest.approx(per_cell.std(ddof=1) / 60**0.5)
    assert table["n_cells"].tolist() == [60, 60]


def test_compare_models_refuses_what_cannot_be_compared(truth, fitted):
    with pytest.raises(ValueError, match="at least two trained models"):
        compare_models({"one": truth})
    with pytest.raises(ValueError, match="hold out different cells"):
        compare_models({"a": truth, "b": fitted})
    with pytest.raises(ValueError, match="have different genes"):
        compare_models({"a": truth, "b": fitted}, indices=range(10))
    observed = as_model(truth.adata, truth.program.state_dict(), library="observed")
    with pytest.raises(ValueError, match="one is given the depth that the other must predict"):
        compare_models({"a": truth, "b": observed})
    other = truth.adata.copy()
    other.X = other.X * 2
    with pytest.raises(ValueError, match="were given different counts"):
        compare_models({"a": truth, "b": as_model(other, truth.program.state_dict())})
