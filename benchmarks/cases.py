"""Cases of the benchmark: sizes of data and of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """A data set and the widths of the networks, the same for everyone.

    Attributes
    ----------
    name
        As given to ``--case``.
    n_genes, n_regions, n_train, n_predict
        Features; cells to train on; cells to predict. All None for real data, where the file decides.
    n_hidden, n_latent
        Widths, by the rule both packages use if none are given: the square root of the number of
        regions, at most 128, and the square root of that.
    rna_density, atac_density
        Share of non-zeros.
    """

    name: str
    n_genes: int | None
    n_regions: int | None
    n_train: int | None
    n_predict: int | None
    n_hidden: int = 128
    n_latent: int = 11
    rna_density: float = 0.10
    atac_density: float = 0.05

    def random_data(self, n_cells: int | None) -> dict[str, Any]:
        """Arguments of :func:`make_data.write_random`."""
        return {
            "n_cells": n_cells,
            "n_genes": self.n_genes,
            "n_regions": self.n_regions,
            "rna_density": self.rna_density,
            "atac_density": self.atac_density,
        }


CASES = {
    case.name: case
    for case in (
        # Seconds: only to see that everything runs.
        Case("tiny", 60, 200, 384, 512, n_hidden=14, n_latent=3),
        Case("small", 2_000, 5_000, 2_560, 2_560, n_hidden=70, n_latent=8),
        Case("multiome", 15_000, 80_000, 1_280, 10_000),
        Case("wide", 20_000, 250_000, 1_280, 1_280),
        Case("cell_lines", None, None, None, None),
    )
}
