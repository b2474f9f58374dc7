"""Mixin: estimates of proteins and of other extra modalities."""

from __future__ import annotations

from typing import Any

from pyro_multivi.api.arguments import Batches, Data, FeatureList, Indices, OutPath, choose_features
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.api.scvi_tools.arguments import TOTALVI, takes
from pyro_multivi.data.checks import NotInModelError, check_choice, checked
from pyro_multivi.data.minibatch import ExtraFeatures
from pyro_multivi.data.modality import PROTEIN
from pyro_multivi.posterior.engine.draws import cells_at_a_time
from pyro_multivi.posterior.quantities.estimates import Quantity
from pyro_multivi.posterior.quantities.output import Estimates, deliver

#: Proteins, in the words of their methods.
PROTEINS = ExtraFeatures(PROTEIN, feature=PROTEIN)


class ProteinEstimatesMixin(ModelBase):
    """Methods that return estimates of proteins, measured in a cell or not."""

    @takes(TOTALVI)
    @checked
    def get_normalized_protein_expression(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        n_samples_overall: int | None = None,
        transform_batch: Batches = None,
        protein_list: FeatureList = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        include_protein_background: bool = False,
        scale_protein: bool = False,
        batch_size: int = PREDICTION_BATCH,
        return_mean: bool = True,
        return_numpy: bool = False,
        silent: bool | None = None,
        *,
        return_interval: float | None = None,
        out: OutPath | None = None,
        seed: int = 0,
    ) -> Estimates:
        r"""Expected counts of each protein in each cell without its background, :math:`E_q[(1 - \pi) \alpha \beta]`.

        Denoised where proteins were measured, imputed from RNA and accessibility where they were not.

        Parameters
        ----------
        adata, indices, n_samples_overall, use_z_mean, n_samples, batch_size, return_numpy, silent
            As in :meth:`get_normalized_expression`.
        return_mean
            Average over the draws of the latent state; otherwise return all of them: the expectation given each, not
            the cell's own expression that ``return_interval`` is about.
        return_interval
            As in :meth:`get_normalized_expression`, but of the cell's own expression: each draw is background or
            foreground, and has a background of its own, as the counts of the cell tell where the protein was
            measured, else as cells of its state do. A protein that a cell surely lacks has the interval from 0 to 0.
            The mean is that of these draws: it knows the counts, which the expectation given the state does not.
        out, seed
            As in :meth:`get_normalized_expression`.
        transform_batch
            Batch to decode in, or several to average over. A cell's background moves there with it: as far from the
            mean of that batch, in standard deviations, as it was from that of its own.
        protein_list
            Names, positions or a mask of proteins; only these are returned.
        include_protein_background
            Add the background, :math:`E_q[\pi \beta + (1 - \pi) \alpha \beta]`: the expected counts.
        scale_protein
            Divide by the sum over all proteins.

        Returns
        -------
        DataFrame or ndarray
            (cells, proteins), in counts. With ``return_interval``, ``return_mean=False`` or ``out`` as in
            :meth:`get_normalized_expression`.

        Raises
        ------
        ValueError
            If the model has no proteins, a protein or batch is unknown, or an argument is out of range.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, n_proteins=6, stained=0.5)
        >>> report = pm.MULTIVI.setup_anndata(
        ...     adata, modality_key="modality", protein_expression_obsm_key="protein_expression"
        ... )
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.get_normalized_protein_expression(protein_list=["protein_1", "protein_4"]).shape
        (80, 2)
        """
        part = "mean" if include_protein_background else "foreground_mean"
        return self._extra_estimates(
            "get_normalized_protein_expression", part, locals(), PROTEINS, protein_list, of_sum=scale_protein
        )

    @checked
    def get_protein_foreground_probability(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        transform_batch: Batches = None,
        protein_list: FeatureList = None,
        n_samples: int = 1,
        batch_size: int = PREDICTION_BATCH,
        use_z_mean: bool = True,
        return_mean: bool = True,
        return_numpy: bool = False,
        silent: bool | None = None,
        *,
        n_samples_overall: int | None = None,
        return_interval: float | None = None,
        out: OutPath | None = None,
        seed: int = 0,
    ) -> Estimates:
        r"""Probability that the counts of each protein in each cell are foreground, :math:`E_q[1 - \pi]`.

        It is decoded from the state of the cell; other cells of that state share it. In simulation of 520 cells its
        mean was right, and single ones too near to 1/2, the more so the shorter the training: of proteins at 0.3 to 0.5
        and 0.7 to 0.9 shares of 0.35 and 0.91 were foreground after 200 epochs, 0.15 and 0.96 after 60 of a smaller
        model.

        Parameters
        ----------
        adata, indices, transform_batch, protein_list, n_samples, batch_size, use_z_mean, return_mean, return_numpy
            As in :meth:`get_normalized_protein_expression`.
        silent, n_samples_overall, return_interval, out, seed
            As in :meth:`get_normalized_protein_expression`.

        Returns
        -------
        DataFrame or ndarray
            (cells, proteins), as :meth:`get_normalized_protein_expression`.

        Raises
        ------
        ValueError
            If the model has no proteins, a protein or batch is unknown, or an argument is out of range.
        """
        return self._extra_estimates(
            "get_protein_foreground_probability", "foreground_probability", locals(), PROTEINS, protein_list
        )

    @checked
    def get_extra_estimates(
        self,
        name: str,
        adata: Data | None = None,
        indices: Indices = None,
        transform_batch: Batches = None,
        feature_list: FeatureList = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        *,
        n_samples_overall: int | None = None,
        return_mean: bool = True,
        return_numpy: bool = False,
        return_interval: float | None = None,
        batch_size: int = PREDICTION_BATCH,
        out: OutPath | None = None,
        silent: bool | None = None,
        seed: int = 0,
    ) -> Estimates:
        """Expectation of what an extra modality of a program estimates, in each cell.

        Parameters
        ----------
        name
            Name of the extra modality. Its class names the site, ``estimated``: of proteins that is the foreground.
        adata, indices, transform_batch, use_z_mean, n_samples, n_samples_overall, return_mean, return_numpy, \
        return_interval, batch_size, out, silent, seed
            As in :meth:`get_normalized_expression`.
        feature_list
            Names, positions or a mask of features; only these are returned.

        Returns
        -------
        DataFrame or ndarray
            (cells, features), as :meth:`get_normalized_expression`.

        Raises
        ------
        ValueError
            If the program models no such modality, a feature or batch is unknown, or an argument is out of range.
        """
        part = self._check_extra("name", name)
        return self._extra_estimates("name", part, locals(), ExtraFeatures(name), feature_list)

    def _extra_estimates(
        self,
        argument: str,
        part: str,
        arguments: dict[str, Any],
        extra: ExtraFeatures,
        wanted: FeatureList,
        of_sum: bool = False,
    ) -> Estimates:
        """Estimates of a site of an extra modality; ``arguments`` are those of a method above, by name."""
        self._check_extra(argument, extra.name)
        average = self._average(
            [extra],
            *(arguments[key] for key in ("transform_batch", "n_samples", "n_samples_overall", "use_z_mean")),
            *(arguments[key] for key in ("return_mean", "return_interval", "seed")),
        )
        features, names = choose_features(self.spec, extra, wanted, self.device)
        at_once = cells_at_a_time(arguments["batch_size"], average.n_samples)
        cells = self._cells(arguments["adata"], arguments["indices"], at_once, True, None)
        quantity = Quantity(f"{extra.name}_{part}", features, of_sum=of_sum)
        return deliver(
            self.program, cells, quantity, average, names,
            **{key: arguments[key] for key in ("return_numpy", "out", "silent")},
        )  # fmt: skip

    def _check_extra(self, argument: str, name: str) -> str:
        """Refuse an extra modality that the program does not model, and say what is estimated of another."""
        estimated = {modality.name: modality.estimated for modality in self.program.modelled_extra}
        if name == PROTEIN and name not in estimated:
            raise NotInModelError(
                f"{argument}: this model has no proteins. Give their counts to the setup: "
                "protein_expression_obsm_key of setup_anndata, or modalities={'protein_layer': ...} of setup_mudata."
            )
        if not estimated:
            raise NotInModelError(f"{argument}={name!r}: this model has no extra modality.")
        check_choice(argument, name, list(estimated))
        return estimated[name]
