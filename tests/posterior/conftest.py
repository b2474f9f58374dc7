"""Two small trained models, and the engine without a data set behind it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from anndata import AnnData

from pyro_multivi import MULTIVI, simulate_multiome
from pyro_multivi.data.modality import modality_at
from pyro_multivi.posterior.calibration.fit_shrinkage import clear_shrinkage
from pyro_multivi.posterior.calibration.fit_weights import clear_weight_posteriors
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.quantities.array_sink import ArraySink
from pyro_multivi.posterior.quantities.estimates import Quantity, estimate

N_GENES, N_REGIONS = 40, 70


def _trained(adata: AnnData, epochs: int, **choices: Any) -> MULTIVI:
    MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = MULTIVI(adata, **choices)
    model.train(max_epochs=epochs, batch_size=32, lr=1e-2, progress_bar=False)
    return model


@pytest.fixture(scope="session")
def fitted() -> MULTIVI:
    """100 paired, 50 RNA-only and 50 ATAC-only cells of 4 distinct types in 2 batches, latent of 3 dimensions."""
    adata = simulate_multiome(
        (100, 50, 50), N_GENES, N_REGIONS, n_latent=3, n_batches=2, effect_size=2.0, differential_fraction=0.6, seed=0
    )
    return _trained(adata, 35, n_hidden=32, n_latent=3)


@pytest.fixture
def fitted_weights(fitted: MULTIVI) -> MULTIVI:
    """``fitted`` without what calibration adds to the latent state: a posterior of the last layers, and means."""
    return _without_weights(fitted)


@pytest.fixture
def without_weights() -> Callable[[MULTIVI], MULTIVI]:
    """A view of a model whose draws are all of the weights it was fitted to."""
    return _without_weights


def _without_weights(model: MULTIVI) -> MULTIVI:
    bare = copy.copy(model)
    bare.program = copy.deepcopy(model.program)
    clear_weight_posteriors(bare.program)
    clear_shrinkage(bare.program)
    return bare


@pytest.fixture(scope="session")
def continuum() -> MULTIVI:
    """Few features, two continuous dimensions: the counts of one cell leave much of its state open."""
    return _continuum()


@pytest.fixture(scope="session")
def unmixed_continuum() -> MULTIVI:
    """The same cells, trained without a penalty on the distance between measurement patterns."""
    return _continuum(mixing_weight=0)


def _continuum(**choices: Any) -> MULTIVI:
    adata = simulate_multiome(
        (120, 60, 60), 15, 30, n_latent=2, n_types=1, mean_library=100, differential_fraction=1.0, seed=1
    )
    return _trained(
        adata, 40, n_hidden=32, n_latent=2, gene_likelihood="nb", n_layers_decoder=1, dropout_rate=0.0, **choices
    )


@pytest.fixture
def compute() -> Callable[..., Any]:
    """A quantity of some minibatches, by name, without names of features or cells."""

    def run(program: Any, minibatches: list[Any], quantity: Quantity, average: Average) -> ArraySink:
        n_cells = sum(len(cells) for cells in minibatches)
        every = modality_at(quantity.site).n_features_in(program.config)
        width = every if quantity.features is None else len(quantity.features)
        shape = (average.n_samples, n_cells, width) if average.keep_draws else (n_cells, width)
        kept = ArraySink(shape, dense=average.names)
        estimate(program, minibatches, quantity, average, kept)
        return kept

    return run
