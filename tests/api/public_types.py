"""Types that the analyst's methods return. mypy checks this file (see setup.cfg); nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

import pyro_multivi as pm
from pyro_multivi.posterior.quantities.output import Estimates
from pyro_multivi.posterior.quantities.summary import Estimate

if TYPE_CHECKING:
    from typing_extensions import assert_type

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]


def latent(model: pm.MULTIVI, either: bool) -> None:
    assert_type(model.get_latent_representation(), Floats)
    assert_type(model.get_latent_representation(None, "expression", ["cell_1"], False, n_samples=3), Floats)
    assert_type(model.get_latent_representation(return_dist=True), tuple[Floats, Floats])
    assert_type(model.get_latent_representation(return_dist=either), Floats | tuple[Floats, Floats])


def likelihood(model: pm.MULTIVI, either: bool) -> None:
    assert_type(model.get_elbo(), float)
    assert_type(model.get_elbo(return_mean=False), Doubles)
    assert_type(model.get_elbo(None, None, 512, either), float | Doubles)
    assert_type(model.get_reconstruction_error(), dict[str, float])
    assert_type(model.get_reconstruction_error(return_mean=False), dict[str, Doubles])
    assert_type(model.get_marginal_ll(n_mc_samples=10), float)
    assert_type(model.get_marginal_ll(return_mean=False), Doubles)
    assert_type(model.get_marginal_ll(return_se=True), tuple[float, float])
    assert_type(model.get_marginal_ll(return_mean=False, return_se=True), tuple[Doubles, Doubles])


def expression(model: pm.MULTIVI, either: bool) -> None:
    assert_type(model.get_normalized_expression(), pd.DataFrame)
    assert_type(model.get_normalized_expression(gene_list=["CD4"], indices=np.arange(3), n_samples=9), pd.DataFrame)
    assert_type(model.get_normalized_expression(indices=pd.Index(["cell_1"]), return_numpy=True), Floats)
    assert_type(model.get_normalized_expression(return_mean=False, return_numpy=True), Floats)
    assert_type(model.get_normalized_expression(n_samples=50, return_interval=0.9), Estimate)
    assert_type(model.get_normalized_expression(return_numpy=either), Estimates)


def accessibility(model: pm.MULTIVI) -> None:
    assert_type(model.get_accessibility_estimates(), pd.DataFrame)
    assert_type(model.get_accessibility_estimates(threshold=0.5), pd.DataFrame)
    assert_type(model.get_accessibility_estimates(return_numpy=True), Floats)
    assert_type(model.get_accessibility_estimates(threshold=0.5, return_numpy=True), sp.csr_matrix)
    assert_type(model.get_accessibility_estimates(n_samples=50, return_interval=0.9), Estimate)
    assert_type(model.get_normalized_accessibility(region_list=[3, 1]), pd.DataFrame)
    assert_type(model.get_normalized_accessibility(out="regions.h5ad"), Estimates)


def imputation(model: pm.MULTIVI) -> None:
    # AnnData has no types for mypy: only what is not one can be told from Any.
    assert_type(model.impute(out="filled.h5ad"), Path)
