"""Scores of predictions against measured counts: calibration of probabilities, coverage of intervals, correlation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import AnyModality

#: Bounds of the bins of predicted accessibility: squares, because most regions are closed in most cells.
EDGES = (np.arange(21) / 20) ** 2
#: Nominal probabilities of the intervals of expression.
LEVELS = tuple(round(0.05 * step, 2) for step in range(2, 20))
#: Sets of counts that coverage is computed of.
COUNTS = ("all", "expected at least 1")


class Reliability:
    """Predicted probability of a region to be open against the share of cells in which it was."""

    #: Table of a result that holds the curve.
    table = "reliability"

    def __init__(self, n_regions: int) -> None:
        self.n = np.zeros(len(EDGES) - 1)
        self._predicted, self._open = np.zeros_like(self.n), np.zeros_like(self.n)
        self._squares = np.zeros(1)
        self._open_m = np.zeros(n_regions)
        self._n_cells = np.zeros(1)

    def arrays(self) -> list[NDArray[np.float64]]:
        """All sums, which processes add up."""
        return [self.n, self._predicted, self._open, self._squares, self._open_m, self._n_cells]

    def add(self, probability: NDArray[np.float64], is_open: NDArray[np.float64]) -> None:
        """Add some cells, (B, M)."""
        bin_of = np.clip(np.searchsorted(EDGES, probability.ravel(), side="right") - 1, 0, len(self.n) - 1)
        for total, weights in ((self.n, None), (self._predicted, probability), (self._open, is_open)):
            total += np.bincount(bin_of, None if weights is None else weights.ravel(), len(self.n))
        self._squares += float(np.square(probability - is_open).sum())
        self._open_m += is_open.sum(0)
        self._n_cells += len(is_open)

    def curve(self) -> pd.DataFrame:
        """One row per bin that is not empty: bounds, number of cell-region pairs, mean prediction, share open."""
        some = self.n > 0
        return pd.DataFrame(
            {
                "from": EDGES[:-1][some],
                "to": EDGES[1:][some],
                "n": self.n[some].astype(np.int64),
                "predicted": self._predicted[some] / self.n[some],
                "observed": self._open[some] / self.n[some],
            }
        )

    def scores(self) -> dict[str, float]:
        """Expected calibration error, Brier score, and the Brier score of each region's overall rate."""
        total = self.n.sum()
        rate = self._open_m / self._n_cells
        return {
            "ece": float(np.abs(self._predicted - self._open).sum() / total),
            "brier": float(self._squares[0] / total),
            "brier_of_region_rates": float((rate * (1 - rate)).mean()),
            "predicted_rate": float(self._predicted.sum() / total),
            "observed_rate": float(self._open.sum() / total),
        }


class Coverage:
    """Share of measured counts that lie in central intervals of their predictions.

    An interval of whole numbers cannot have just the nominal probability. So each count stands for the
    stretch of the cumulative distribution that it occupies among its S replicates, of which the share
    within the central stretch is added: under the right model its expectation is the nominal probability.
    """

    #: Table of a result that holds the curve.
    table = "coverage"

    def __init__(self) -> None:
        self._covered = {name: np.zeros(len(LEVELS)) for name in COUNTS}
        self._n = {name: np.zeros(1) for name in COUNTS}

    def arrays(self) -> list[NDArray[np.float64]]:
        """All sums, which processes add up."""
        return [*self._covered.values(), *self._n.values()]

    def add(
        self, below: NDArray[np.float64], equal: NDArray[np.float64], n_samples: int, expected: NDArray[np.float64]
    ) -> None:
        """Add numbers of replicates below and equal to measured counts, and expected counts, (B, G) each."""
        start, end = below / (n_samples + 1), (below + equal + 1) / (n_samples + 1)
        # Chosen by the prediction, never by the count itself, which would bias the coverage.
        chosen = dict(zip(COUNTS, (np.ones(below.shape, dtype=bool), expected >= 1), strict=True))
        for place, level in enumerate(LEVELS):
            inside = np.minimum(end, (1 + level) / 2) - np.maximum(start, (1 - level) / 2)
            share = inside.clip(min=0) / (end - start)
            for name, which in chosen.items():
                self._covered[name][place] += float(share[which].sum())
        for name, which in chosen.items():
            self._n[name] += int(which.sum())

    def curve(self) -> pd.DataFrame:
        """Nominal probability and share covered, of all counts and of those expected to be at least 1."""
        frames = [
            pd.DataFrame({"counts": name, "nominal": LEVELS, "covered": self._covered[name] / n, "n": int(n)})
            for name, (n,) in self._n.items()
            if n
        ]
        return pd.concat(frames, ignore_index=True)

    def scores(self) -> dict[str, float]:
        """Coverage of the 90 % interval, and the largest gap over all levels; also of counts that are not mostly 0."""
        found = {}
        for (name, (n,)), suffix in zip(self._n.items(), ("", "_expected_1"), strict=True):
            if n:
                covered = self._covered[name] / n
                found[f"coverage_90{suffix}"] = float(covered[LEVELS.index(0.9)])
                found[f"largest_coverage_gap{suffix}"] = float(np.abs(covered - LEVELS).max())
        return found


class Imputation:
    """Predictions of a hidden modality against its counts, feature by feature."""

    def __init__(self, n_features: int) -> None:
        self._n_cells = np.zeros(1)
        self._sums = np.zeros((5, n_features))

    @property
    def n_cells(self) -> int:
        """Number of cells added."""
        return int(self._n_cells[0])

    def arrays(self) -> list[NDArray[np.float64]]:
        """All sums, which processes add up."""
        return [self._n_cells, self._sums]

    def add(self, predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> None:
        """Add some cells, (B, F)."""
        products = (predicted, measured, predicted**2, measured**2, predicted * measured)
        self._sums += np.stack([part.sum(0) for part in products])
        self._n_cells += len(measured)

    def table(self) -> pd.DataFrame:
        """Means of counts and of predictions of each feature, and their correlation over cells."""
        mean_p, mean_m, square_p, square_m, product = self._sums / max(self.n_cells, 1)
        var_p, var_m = (square_p - mean_p**2).clip(min=0), (square_m - mean_m**2).clip(min=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            correlation = (product - mean_p * mean_m) / np.sqrt(var_p * var_m)
        # Constant values have no correlation; rounding leaves traces of variance in them.
        constant = (var_p <= 1e-12 * mean_p**2) | (var_m <= 1e-12 * mean_m**2)
        return pd.DataFrame(
            {"measured": mean_m, "imputed": mean_p, "correlation": np.where(constant, np.nan, correlation)}
        )


class Scorer:
    """Scores of one modality over many minibatches, each with all of its draws.

    Where only open or closed is modelled the probabilities are scored, otherwise the intervals.
    """

    def __init__(self, modality: AnyModality, n_features: int) -> None:
        self.calibration: Reliability | Coverage = Reliability(n_features) if modality.binary else Coverage()
        self.imputation = Imputation(n_features)

    def begin(self, counts: Tensor) -> None:
        """Begin a minibatch of these measured counts, (B, F)."""
        self._counts = counts
        self._mean = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
        self._below, self._equal = torch.zeros_like(self._mean), torch.zeros_like(self._mean)
        self._n_samples = 0

    def add(self, values: Tensor, mean: Tensor) -> None:
        """Add some draws of the minibatch: values and expectations, (S, B, F)."""
        self._mean += mean.double().sum(0)
        if isinstance(self.calibration, Coverage):
            self._below += (values < self._counts).sum(0)
            self._equal += (values == self._counts).sum(0)
        self._n_samples += len(values)

    def end(self) -> None:
        """Score the minibatch, all of whose draws were added."""
        if len(self._counts) == 0:
            return
        mean = (self._mean / self._n_samples).cpu().numpy()
        counts = self._counts.double().cpu().numpy()
        self.imputation.add(mean, counts)
        if isinstance(self.calibration, Coverage):
            self.calibration.add(self._below.cpu().numpy(), self._equal.cpu().numpy(), self._n_samples, mean)
        else:
            self.calibration.add(mean, counts)

    def arrays(self) -> list[NDArray[np.float64]]:
        """All sums, which processes add up."""
        return [*self.calibration.arrays(), *self.imputation.arrays()]

    def tables(self, setting: str) -> dict[str, pd.DataFrame]:
        """Scores and the curve that they summarise, by table of a result; none without measured cells."""
        if self.imputation.n_cells == 0:
            return {}
        scores = self.calibration.scores()
        curve = self.calibration.curve()
        curve.insert(0, "setting", setting)
        return {
            "scores": pd.DataFrame({"setting": setting, "score": list(scores), "value": list(scores.values())}),
            self.calibration.table: curve,
        }
