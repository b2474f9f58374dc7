"""Groups that lie unevenly over covariates beside the batch are decoded at the same values of these."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import pyro_multivi as pm
from pyro_multivi.posterior.differential.contrasts import Contrast, covariates_of_both
from pyro_multivi.posterior.engine.draws import draw_latents, replay
from pyro_multivi.traces import evaluation_mode

N_GENES, N_CELLS = 40, 400


@pytest.fixture(scope="module")
def model():
    """Cells of one type: in "site" b one gene in four has more counts, and with more "dose" another."""
    made = pm.simulate_multiome((N_CELLS, 0, 0), N_GENES, 30, n_types=1, n_batches=2, differential_fraction=0.1, seed=0)
    rng = np.random.default_rng(0)
    site, dose = rng.random(N_CELLS) < 0.5, rng.random(N_CELLS)
    counts = made.X.toarray()
    gene = np.arange(N_GENES) % 4
    more = np.outer(4.0 * site, gene == 0) + np.outer(20.0 * dose, gene == 2)
    counts[:, :N_GENES] += rng.poisson(counts[:, :N_GENES] * more)
    made.X = sp.csr_matrix(counts)
    made.obs["site"], made.obs["dose"] = np.where(site, "b", "a"), dose
    pm.MULTIVI.setup_anndata(
        made, batch_key="batch", modality_key="modality",
        categorical_covariate_keys=["site"], continuous_covariate_keys=["dose"],
    )  # fmt: skip
    found = pm.MULTIVI(made, n_hidden=32, n_latent=4)
    found.train(40, progress_bar=False, seed=0)
    return found


def uneven(model, name):
    """Groups of which the first has four in five of its cells with more of a covariate, the second one in five."""
    obs = model.adata.obs
    high = (obs["site"] == "b") if name == "site" else obs["dose"] > obs["dose"].median()
    first = np.random.default_rng(1).random(N_CELLS) < np.where(high, 0.8, 0.2)
    return {"idx1": np.flatnonzero(first), "idx2": np.flatnonzero(~first), "n_samples": 400}


@pytest.mark.parametrize("name", ["site", "dose"])
def test_what_a_covariate_explains_is_not_called(model, name):
    groups = uneven(model, name)
    corrected, plain = (model.differential_expression(**groups, batch_correction=how) for how in (None, False))
    assert corrected.attrs["covariates"] == {"group 1 vs group 2": [name]}
    assert corrected.attrs["batches"] == {"group 1 vs group 2": [None, None]}
    assert plain.attrs["covariates"] == {"group 1 vs group 2": []}
    assert plain["is_de_fdr_0.05"].sum() >= N_GENES / 5
    assert corrected["is_de_fdr_0.05"].sum() == 0
    even = {**groups, "idx1": np.arange(0, N_CELLS, 2), "idx2": np.arange(1, N_CELLS, 2)}
    assert model.differential_expression(**even).attrs["covariates"] == {"group 1 vs group 2": []}


def test_both_groups_are_decoded_at_the_common_mean(model):
    groups = uneven(model, "site")
    table = model.differential_accessibility(**groups, unit="cell", batch_correction=True, probability="accessible")
    assert table.attrs["covariates"] == {"group 1 vs group 2": ["site", "dose"]}
    program, n_batch = model.program, model.spec.n_batch
    common = model.minibatch().design[:, n_batch:].mean(0)
    found = []
    for index in (groups["idx1"], groups["idx2"]):
        cells, parts = model.minibatch(index), []
        for code in range(n_batch):
            design = torch.cat([torch.eye(n_batch)[code], common]).expand(len(cells), -1)
            with evaluation_mode(program):
                latents = draw_latents(program, cells, 3)
                parts.append((replay(program, cells, latents, ("p",), {"s": design})["p"] + 0).double().mean((0, 1)))
        found.append(torch.stack(parts).mean(0).numpy())
    # Other draws of the same cells.
    for column, expected in zip(("est_prob1", "est_prob2"), found, strict=True):
        np.testing.assert_allclose(table[column], expected, atol=0.02)


def test_values_that_groups_do_not_share_stay(caplog):
    contrast = Contrast(torch.arange(20), torch.arange(20, 40))
    category = np.repeat(np.eye(2), 20, axis=0)
    number = np.random.default_rng(0).permuted(np.tile(np.linspace(-1, 1, 20), (2, 1)), axis=1).reshape(-1, 1)
    apart = np.repeat([[-1.0], [1.0]], 20, axis=0)
    design = torch.from_numpy(np.hstack([np.ones((40, 1)), category, number, apart]))
    columns = {"category": slice(1, 3), "number": slice(3, 4), "apart": slice(4, 5)}
    assert covariates_of_both(contrast, design, columns, None) == ()
    assert "the groups share no value of 'category'" in caplog.text
    assert "the groups share no value of 'apart'" in caplog.text
    assert "'number'" not in caplog.text
    wanted = pd.Series(dict(covariates_of_both(contrast, design, columns, True)))
    np.testing.assert_allclose(wanted, design.mean(0)[1:], atol=1e-12)
    assert covariates_of_both(contrast, design, columns, False) == ()
    # A category that all cells are of is no number.
    assert covariates_of_both(contrast, design, {"one": slice(0, 1)}, None) == ()


def test_each_group_against_the_rest_shares_its_draws():
    design = torch.from_numpy(np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32))
    group = torch.arange(90) % 3
    found = [
        covariates_of_both(
            Contrast((group == one).nonzero()[:, 0], (group != one).nonzero()[:, 0]), design, {"a": slice(1, 2)}, True
        )
        for one in range(3)
    ]
    assert len(set(found)) == 1
