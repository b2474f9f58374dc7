"""Latent state and sequencing depth of cells, and measures of how well a model explains them."""

from __future__ import annotations

from typing import Literal, TypeAlias, cast, overload

import numpy as np
from numpy.typing import NDArray

from pyro_multivi.api.arguments import Data, Indices
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.api.scvi_tools.arguments import CELLS, takes, tell_difference
from pyro_multivi.data.checks import NotInModelError, check_choice, check_whole, checked
from pyro_multivi.data.modality import ATAC, MODALITIES, modality_named
from pyro_multivi.posterior.engine.draws import region_factors
from pyro_multivi.posterior.engine.likelihood import ElboParts, cells_for_likelihood, elbo_parts, marginal_likelihood
from pyro_multivi.posterior.quantities.latent import depth_factors, latent_draws, latent_moments, latent_points

#: Log marginal likelihoods: their mean or one per cell, alone or with the standard error.
MarginalLL: TypeAlias = (
    float | NDArray[np.float64] | tuple[float, float] | tuple[NDArray[np.float64], NDArray[np.float64]]
)


class LatentMixin(ModelBase):
    """Methods that return latent variables and likelihoods of cells."""

    @overload
    def get_latent_representation(
        self, adata: Data | None = ..., modality: str = ..., indices: Indices = ..., give_mean: bool = ...,
        batch_size: int = ..., return_dist: Literal[False] = ..., n_samples: int = ..., seed: int = ...,
    ) -> NDArray[np.float32]: ...  # fmt: skip
    @overload
    def get_latent_representation(
        self, adata: Data | None = ..., modality: str = ..., indices: Indices = ..., give_mean: bool = ...,
        batch_size: int = ..., *, return_dist: Literal[True], n_samples: int = ..., seed: int = ...,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...  # fmt: skip
    @overload
    def get_latent_representation(
        self, adata: Data | None = ..., modality: str = ..., indices: Indices = ..., give_mean: bool = ...,
        batch_size: int = ..., return_dist: bool = ..., n_samples: int = ..., seed: int = ...,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]: ...  # fmt: skip
    @checked
    def get_latent_representation(
        self,
        adata: Data | None = None,
        modality: str = "joint",
        indices: Indices = None,
        give_mean: bool = True,
        batch_size: int = PREDICTION_BATCH,
        return_dist: bool = False,
        n_samples: int = 1,
        seed: int = 0,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Latent state of each cell.

        Parameters
        ----------
        adata
            Other cells; default: those of training.
        modality
            ``"joint"``: given everything measured in a cell. ``"expression"`` or
            ``"accessibility"``: given that modality alone; NaN for cells that lack it. Extra
            modalities for which a model of your own has an expert, by their name.
        indices
            Positions, names or a mask of cells.
        give_mean
            The posterior mean. With ``latent_distribution="ln"``, its softmax, as the decoders take
            it. Otherwise draws.
        batch_size
            Cells at a time.
        return_dist
            Return mean and variance of q(z) as it was trained instead; draws have standard deviations that are
            corrected for what training leaves wrong with them.
        n_samples
            Draws per cell if ``give_mean=False``.
        seed
            Seed of the draws, which do not depend on ``batch_size`` or the other cells.

        Returns
        -------
        ndarray
            (cells, K); for several draws (n_samples, cells, K). With ``return_dist`` two of these.

        Raises
        ------
        ValueError
            If the modality is unknown, not modelled, or measured in none of the cells.
        """
        names = ["joint", *(entry.name for entry in MODALITIES), *self.spec.extra]
        check_choice("modality", modality, names, NotInModelError)
        self._check_modality("modality", modality)
        chosen = modality_named(modality)
        cells = self._cells(adata, indices, batch_size, counts=None)
        if chosen is not None and not chosen.measured_in(cells.table)[cells.index].any():
            raise ValueError(f"modality={modality!r}: none of the {cells.n_cells} cells has it. Use modality='joint'.")
        if not give_mean and not return_dist:
            tell_difference("seed")
            draws = latent_draws(self.program, cells, modality, n_samples, seed)
            return draws if n_samples > 1 else draws[0]
        if return_dist:
            return latent_moments(self.program, cells, modality)
        return latent_points(self.program, cells, modality)

    @checked
    def get_library_size_factors(
        self, adata: Data | None = None, indices: Indices = None, batch_size: int = PREDICTION_BATCH
    ) -> dict[str, NDArray[np.float32]]:
        """Sequencing depth of each cell.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.

        Returns
        -------
        dict
            ``"expression"``: posterior mean of l in counts (scvi-tools returns a logarithm);
            ``"accessibility"``: that of the cell factor d in (0, 1), or of the number of fragments. NaN for
            cells that lack the modality.
        """
        tell_difference("library_size")
        return depth_factors(self.program, self._cells(adata, indices, batch_size, untrained=True, counts=None))

    def get_region_factors(self) -> NDArray[np.float32]:
        """Factor r_j of each region, (M,), in (0, 1) unless fragments are counted; of a model without regions none."""
        self._check_trained(warn=True)
        if self._lacks("get_region_factors", ATAC):
            return np.zeros(0, dtype=np.float32)
        factors = region_factors(self.program)
        if factors is None:
            raise NotInModelError("region_factors=False was chosen for this model: it has no region factors.")
        return cast("NDArray[np.float32]", factors.cpu().numpy())

    # ------------------------------------------------------------------ likelihood

    @overload
    def get_elbo(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., return_mean: Literal[True] = ...,
        n_particles: int = ..., seed: int = ...,
    ) -> float: ...  # fmt: skip
    @overload
    def get_elbo(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., *, return_mean: Literal[False],
        n_particles: int = ..., seed: int = ...,
    ) -> NDArray[np.float64]: ...  # fmt: skip
    @overload
    def get_elbo(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., return_mean: bool = ...,
        n_particles: int = ..., seed: int = ...,
    ) -> float | NDArray[np.float64]: ...  # fmt: skip
    @takes(CELLS)
    @checked
    def get_elbo(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        batch_size: int = PREDICTION_BATCH,
        return_mean: bool = True,
        n_particles: int = 1,
        seed: int = 0,
    ) -> float | NDArray[np.float64]:
        """Evidence lower bound in nats per cell; higher is better.

        The bound on log p(x, y | s) itself: the alignment of the modalities, a term of training
        only, is no part of it (in scvi-tools it is).

        Parameters
        ----------
        adata, indices
            Cells; default: all of training.
        batch_size
            Cells at a time.
        return_mean
            The mean over cells; otherwise one number per cell.
        n_particles
            Draws per cell over which the expected log-likelihood is averaged.
        seed
            Seed of the draws.

        Returns
        -------
        float or ndarray
            Nats per cell; with ``return_mean=False`` one value per cell, (cells,).

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.get_elbo(return_mean=False).shape
        (80,)
        """
        parts = self._elbo_parts("get_elbo", adata, indices, batch_size, n_particles, seed)
        # numpy's float, which has the .item() that scripts for scvi-tools call.
        return np.float64(parts.elbo.mean()) if return_mean else parts.elbo

    @overload
    def get_reconstruction_error(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., return_mean: Literal[True] = ...,
        n_particles: int = ..., seed: int = ...,
    ) -> dict[str, float]: ...  # fmt: skip
    @overload
    def get_reconstruction_error(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., *, return_mean: Literal[False],
        n_particles: int = ..., seed: int = ...,
    ) -> dict[str, NDArray[np.float64]]: ...  # fmt: skip
    @overload
    def get_reconstruction_error(
        self, adata: Data | None = ..., indices: Indices = ..., batch_size: int = ..., return_mean: bool = ...,
        n_particles: int = ..., seed: int = ...,
    ) -> dict[str, float] | dict[str, NDArray[np.float64]]: ...  # fmt: skip
    @takes(CELLS)
    @checked
    def get_reconstruction_error(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        batch_size: int = PREDICTION_BATCH,
        return_mean: bool = True,
        n_particles: int = 1,
        seed: int = 0,
    ) -> dict[str, float] | dict[str, NDArray[np.float64]]:
        """Minus the expected log-likelihood of the counts of each modality, in nats per measured cell.

        Cells in which a modality was not measured do not enter its mean (in scvi-tools they enter as 0).

        Parameters
        ----------
        adata, indices, batch_size, n_particles, seed
            As in :meth:`get_elbo`.
        return_mean
            The mean over the measured cells; otherwise one number per cell, NaN where not measured.

        Returns
        -------
        dict
            ``"reconstruction_loss_expression"`` and ``"reconstruction_loss_accessibility"``, each only
            if it was measured in some cell.
        """
        parts = self._elbo_parts("get_reconstruction_error", adata, indices, batch_size, n_particles, seed)
        names = {modality.counts: modality.name for modality in MODALITIES}
        per_cell = {
            f"reconstruction_loss_{names.get(site, site)}": np.where(parts.measured[site], -values, np.nan)
            for site, values in parts.log_likelihood.items()
            if parts.measured[site].any()
        }
        if not return_mean:
            return per_cell
        # numpy's float, as in get_elbo.
        means: dict[str, float] = {name: np.float64(np.nanmean(values)) for name, values in per_cell.items()}
        return means

    @overload
    def get_marginal_ll(
        self, adata: Data | None = ..., n_mc_samples: int = ..., indices: Indices = ...,
        return_mean: Literal[True] = ..., batch_size: int = ..., return_se: Literal[False] = ..., seed: int = ...,
    ) -> float: ...  # fmt: skip
    @overload
    def get_marginal_ll(
        self, adata: Data | None = ..., n_mc_samples: int = ..., indices: Indices = ..., *,
        return_mean: Literal[False], batch_size: int = ..., return_se: Literal[False] = ..., seed: int = ...,
    ) -> NDArray[np.float64]: ...  # fmt: skip
    @overload
    def get_marginal_ll(
        self, adata: Data | None = ..., n_mc_samples: int = ..., indices: Indices = ...,
        return_mean: Literal[True] = ..., batch_size: int = ..., *, return_se: Literal[True], seed: int = ...,
    ) -> tuple[float, float]: ...  # fmt: skip
    @overload
    def get_marginal_ll(
        self, adata: Data | None = ..., n_mc_samples: int = ..., indices: Indices = ..., *,
        return_mean: Literal[False], batch_size: int = ..., return_se: Literal[True], seed: int = ...,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...  # fmt: skip
    @overload
    def get_marginal_ll(
        self, adata: Data | None = ..., n_mc_samples: int = ..., indices: Indices = ..., return_mean: bool = ...,
        batch_size: int = ..., return_se: bool = ..., seed: int = ...,
    ) -> MarginalLL: ...  # fmt: skip
    @takes(CELLS)
    @checked
    def get_marginal_ll(
        self,
        adata: Data | None = None,
        n_mc_samples: int = 1000,
        indices: Indices = None,
        return_mean: bool = True,
        batch_size: int = PREDICTION_BATCH,
        return_se: bool = False,
        seed: int = 0,
    ) -> MarginalLL:
        r"""Log marginal likelihood log p(x, y | s) in nats per cell, by importance sampling.

        The posterior is the proposal for z, the library size and the cell factor; their joint density with the counts,
        divided by the proposal's, is averaged before the logarithm is taken.

        Parameters
        ----------
        adata, indices, return_mean, batch_size, seed
            As in :meth:`get_elbo`.
        n_mc_samples
            Draws per cell.
        return_se
            Also return the Monte Carlo standard error.

        Returns
        -------
        float or ndarray
            Nats per cell. Its expectation is between the ELBO and the truth, which it approaches from
            below as ``n_mc_samples`` grows. With ``return_se`` a pair of value and standard error: of
            the mean over these cells, or of each cell. Few draws carry much of the weight, which an estimate by draws
            sees too late: in three simulations values of other seeds scattered 1.2 to 2.6 times as much as their error
            said, with 2 to 1000 draws. An error near 1 for a cell means that the value is unreliable.

        Raises
        ------
        ValueError
            If ``n_mc_samples`` is below 1, or below 2 with ``return_se``.
        """
        check_whole("n_mc_samples", n_mc_samples, 2 if return_se else 1)
        size = cells_for_likelihood(batch_size, n_mc_samples)
        cells = self._cells(adata, indices, size, counts="VAEMixin.get_marginal_ll")
        found = marginal_likelihood(self.program, cells, n_mc_samples, seed)
        if not return_mean:
            return (found.log_likelihood, found.standard_error) if return_se else found.log_likelihood
        mean = np.float64(found.log_likelihood.mean())
        # Draws of different cells are independent.
        error = np.float64(np.sqrt(np.square(found.standard_error).sum()) / len(found.standard_error))
        return (mean, error) if return_se else mean

    # ------------------------------------------------------------------ shared by the methods

    def _elbo_parts(
        self, method: str, adata: Data | None, indices: Indices, batch_size: int, n_particles: int, seed: int
    ) -> ElboParts:
        cells = self._cells(adata, indices, cells_for_likelihood(batch_size, n_particles), True, f"VAEMixin.{method}")
        return elbo_parts(self.program, cells, n_particles, seed)
