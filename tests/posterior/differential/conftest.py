"""Two groups of cells, and every draw of every feature of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from pyro_multivi import MULTIVI
from pyro_multivi.data.modality import Modality
from pyro_multivi.posterior.differential.group_draws import choose_evenly
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace, replay
from pyro_multivi.traces import evaluation_mode


class TwoGroups:
    """Two groups of the cells of a model, of different types, measured in all three ways and in both batches."""

    #: Draws of each.
    n = 300

    def __init__(self, model: MULTIVI) -> None:
        self.model = model
        types = model.adata.obs["cell_type"]
        self.first = np.flatnonzero(types == "type_0")
        self.second = np.flatnonzero(types.isin(["type_1", "type_2"]))

    def names(self, modality: Modality) -> list[str]:
        return list(modality.feature_names_in(self.model.spec))

    def compared(self, modality: Modality, **arguments: Any) -> pd.DataFrame:
        """The table of a comparison, by default of the two groups, in the order of the features."""
        method = getattr(self.model, f"differential_{modality.name}")
        options = {"idx1": self.first, "idx2": self.second, "n_samples": self.n, "batch_correction": False, **arguments}
        return method(**options).loc[self.names(modality)]

    def chosen(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cell of each draw, and the number of the draw among those of its cell."""
        return choose_evenly(np.random.default_rng([0, index[0]]), len(index), self.n)

    def draws(
        self, modality: Modality, index: NDArray[np.int64], batches: tuple[int | None, ...] = (None,)
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
                drawn = replay(self.model.program, cells, latents, (modality.decoded,), {"s": design})
            values.append((drawn[modality.decoded] + 0).double().numpy())
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

    def both(self, modality: Modality, batches: tuple[int | None, ...] = (None,)) -> tuple[Any, Any]:
        return self.draws(modality, self.first, batches), self.draws(modality, self.second, batches)

    def cell_factors(self, index: NDArray[np.int64]) -> NDArray[np.float64]:
        """d of every draw, (n,); NaN where it is of a cell without ATAC."""
        chosen, number = self.chosen(index)
        cells = self.model.minibatch(index)
        with evaluation_mode(self.model.program):
            nodes = draw_latents(self.model.program, cells, int(number.max()) + 1).trace.nodes
        d: NDArray[np.float64] = nodes["d"]["value"].double().numpy()[number, chosen]
        return np.where(cells.has_atac.numpy()[chosen], d, np.nan)

    def detection(self, *indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Factor of p in the probability of detection in a cell of mean depth, (F,)."""
        means, sizes = [], []
        for index in indices or (self.first, self.second):
            means.append(np.nanmean(self.cell_factors(index)))
            sizes.append(int(self.model.minibatch(index).has_atac.sum()))
        factor: NDArray[np.float64] = np.average(means, weights=sizes) * self.model.get_region_factors()
        return factor


@pytest.fixture
def groups(fitted: MULTIVI) -> TwoGroups:
    """Two groups of the cells of :func:`fitted`."""
    return TwoGroups(fitted)
