"""The fourth modality: its likelihood, and simulated cells from training to what is imputed and tested."""

from __future__ import annotations

import numpy as np
import pyro.poutine as poutine
import torch
from scipy import stats

import pyro_multivi as pm
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.training.contract import check_contract


def test_its_likelihood_is_beta_binomial(recipes, randomised, stained):
    assert recipes.WithMethylation.extra_modalities == {"methylated": recipes.Methylation}
    n, measured = len(stained), stained.extra["protein"].measured
    coverage = torch.arange(3 * n).reshape(n, 3).double() % 5
    methylated = (coverage / 2).floor()
    extra = {"methylated": Measurement(methylated, measured), "coverage": Measurement(coverage, measured)}
    cells = stained.replace(extra=extra)
    program = randomised(recipes.WithMethylation, extra={"methylated": 3, "coverage": 3})
    check_contract(program, cells)
    with torch.no_grad():
        trace = poutine.trace(program.model).get_trace(cells)
        trace.compute_log_prob()
    nodes, c = trace.nodes, program.extra["methylated"].log_c.exp().detach().numpy()
    rate = nodes["methylated_mean"]["value"].numpy()
    expected = stats.betabinom.logpmf(methylated, coverage, rate * c, (1 - rate) * c).sum(1) * measured.numpy()
    np.testing.assert_allclose(nodes["methylated"]["unscaled_log_prob"], expected)


def test_rates_of_simulated_cells_are_imputed_and_tested(recipes, tmp_path):
    adata = pm.simulate_multiome((120, 40, 40), n_genes=30, n_regions=40, n_types=2, type_separation=0.97, seed=0)
    rng, first = np.random.default_rng(0), (adata.obs["cell_type"] == "type_0").to_numpy()
    rates = np.where(first[:, None], [0.8, 0.3, 0.5], [0.2, 0.7, 0.5])
    coverage = rng.poisson(30.0, size=rates.shape)
    methylated = rng.binomial(coverage, rates).astype(np.float32)
    hidden = np.arange(len(first)) % 4 == 0
    methylated[hidden] = np.nan
    adata.obsm["methylated"], adata.obsm["coverage"] = methylated, coverage.astype(np.float32)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", extra_obsm_keys=["methylated", "coverage"])
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=3, program_class=recipes.WithMethylation)
    # After 60 epochs the correlation was .68 to .94 over eight seeds, after 150 .90 to .97 over five.
    model.train(150, batch_size=32, lr=5e-3, progress_bar=False)
    imputed = model.get_extra_estimates("methylated", return_numpy=True)[hidden]
    for place in (0, 1):
        assert np.corrcoef(imputed[:, place], rates[hidden, place])[0, 1] > 0.8
    # Seen from RNA or ATAC alone, a state is less sure, and rates lie nearer to their mean.
    assert np.abs(imputed - rates[hidden]).mean() < 0.2
    table = model.differential_extra(
        "methylated", groupby="cell_type", group1="type_0", change_fn="difference", delta=0.01, n_samples=500
    )
    change = table["lfc_mean"]
    # Few cells: directions, not sizes.
    assert abs(change["2"]) < 0.02 < min(change["0"], -change["1"])
    assert sorted(table.index) == ["0", "1", "2"]
    assert np.isnan(model.get_latent_representation(modality="methylated")[hidden]).all()
    model.save(tmp_path / "model")
    again = pm.MULTIVI.load(tmp_path / "model", adata, program_class=recipes.WithMethylation)
    np.testing.assert_array_equal(again.get_extra_estimates("methylated", return_numpy=True)[hidden], imputed)
