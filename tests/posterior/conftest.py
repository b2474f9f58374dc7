"""Two small trained models, and the engine without a data set behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi import MULTIVI, simulate_multiome
from pyro_multivi.data.modality import modality_at
from pyro_multivi.posterior.differential.group_draws import _evenly
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace, replay
from pyro_multivi.posterior.quantities.array_sink import Arrays
from pyro_multivi.posterior.quantities.estimates import Quantity, estimate
from pyro_multivi.traces import evaluation_mode

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
def without_mixture(fitted: MULTIVI) -> Iterator[MULTIVI]:
    """:func:`fitted`, decoded from the guide's posterior alone, without population mixtures."""
    buffers = (fitted.program.rna_mixture_weight, fitted.program.atac_mixture_weight)
    before = [float(buffer) for buffer in buffers]
    for buffer in buffers:
        buffer.fill_(1.0)
    yield fitted
    for buffer, value in zip(buffers, before, strict=True):
        buffer.fill_(value)


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

    def run(program: Any, minibatches: list[Any], quantity: Quantity, average: Average) -> Arrays:
        n_cells = sum(len(cells) for cells in minibatches)
        every = modality_at(quantity.site).n_features_in(program.config)
        width = every if quantity.features is None else len(quantity.features)
        shape = (average.n_samples, n_cells, width) if average.keep_draws else (n_cells, width)
        kept = Arrays(shape, dense=average.names)
        estimate(program, minibatches, quantity, average, kept)
        return kept

    return run


class TwoGroups:
    """Two groups of the cells of a model, of different types, measured in all three ways and in both batches."""

    #: Draws of each.
    n = 300

    def __init__(self, model: MULTIVI) -> None:
        self.model = model
        types = model.adata.obs["cell_type"]
        self.first = np.flatnonzero(types == "type_0")
        self.second = np.flatnonzero(types.isin(["type_1", "type_2"]))

    def names(self, site: str) -> list[str]:
        return list(self.model.spec.gene_names if site == "rho" else self.model.spec.region_names)

    def compared(self, site: str, **arguments: Any) -> pd.DataFrame:
        """The table of a comparison, by default of the two groups, in the order of the features."""
        expression = site == "rho"
        method = self.model.differential_expression if expression else self.model.differential_accessibility
        asked = {"idx1": self.first, "idx2": self.second, "n_samples": self.n, **arguments}
        return method(**asked).loc[self.names(site)]

    def chosen(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which cell of a part each draw is of, and the how-manieth of it."""
        return _evenly(np.random.default_rng([0, index[0]]), len(index), self.n)

    def draws(
        self, site: str, index: NDArray[np.int64], batches: tuple[int | None, ...] = (None,)
    ) -> NDArray[np.float64]:
        """Every draw of every feature, (n, F): whole, from the engine."""
        chosen, number = self.chosen(index)
        cells = self.model.minibatch(index)
        values = []
        for code in batches:
            design = cells.design.clone()
            if code is not None:
                design[:, : self.model.spec.n_batch] = torch.eye(self.model.spec.n_batch)[code]
            with evaluation_mode(self.model.program):
                latents = draw_latents(self.model.program, cells, int(number.max()) + 1)
                # Groups are compared by what the guide says.
                drawn = replay(self.model.program, cells, latents, (site,), {"s": design}, plain=True)[site]
            values.append((drawn + 0).double().numpy())
        sizes = [len(part) for part in np.array_split(np.arange(self.n), len(batches))]
        return np.stack(values)[np.repeat(np.arange(len(batches)), sizes), number, chosen]

    def expected(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """rho times the probability that no count is dropped, every draw of every gene, (n, G)."""
        chosen, number = self.chosen(index)
        cells, program = self.model.minibatch(index), self.model.program
        with evaluation_mode(program):
            x = model_trace(program.model, cells, draw_latents(program, cells, int(number.max()) + 1)).nodes["x"]["fn"]
            mean: NDArray[np.float64] = (x.mean / x.library[..., None]).double().numpy()
        return mean[number, chosen]

    def both(self, site: str, batches: tuple[int | None, ...] = (None,)) -> tuple[Any, Any]:
        return self.draws(site, self.first, batches), self.draws(site, self.second, batches)

    def detection(self, *indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """What p is multiplied with to be the probability of detection in a cell of mean depth, (F,)."""
        d = self.model.get_library_size_factors()["accessibility"].ravel()
        means, sizes = [], []
        for index in indices or (self.first, self.second):
            drawn = d[index[self.chosen(index)[0]]]
            means.append(np.nanmean(drawn))
            sizes.append(np.isfinite(d[index]).sum())
        factor: NDArray[np.float64] = np.average(means, weights=sizes) * self.model.get_region_factors()
        return factor


@pytest.fixture
def groups(fitted: MULTIVI) -> TwoGroups:
    """Two groups of the cells of :func:`fitted`."""
    return TwoGroups(fitted)
