"""Mixin: cells of new batches mapped onto a trained model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.api.arguments import Data
from pyro_multivi.api.base import NotTrainedError
from pyro_multivi.api.query.grow import grown_program, query_spec, set_priors
from pyro_multivi.api.query.labels import batches_apart, carried_over, label_codes, labelled_reference
from pyro_multivi.api.query.prepare import in_reference_order, proteins_in_reference_order, say_left_out
from pyro_multivi.api.query.report import QueryReport, cautions
from pyro_multivi.api.saving.folder import BrokenModelError
from pyro_multivi.api.saving.mixin import SavingMixin
from pyro_multivi.api.scvi_tools.arguments import QUERY, takes
from pyro_multivi.api.scvi_tools.devices import load_arguments
from pyro_multivi.data.checks import caution, check_number, checked, shown
from pyro_multivi.data.modality import MODALITIES, modelled
from pyro_multivi.data.setup.adapter import open_data
from pyro_multivi.data.setup.options import is_mudata
from pyro_multivi.isolation import isolated
from pyro_multivi.networks.surgery import Training

logger = logging.getLogger("pyro_multivi")

_NOT_IN_PLACE = "{} is a view or lies in a file, and cannot be changed in place: give inplace=False."

Model = TypeVar("Model", bound="QueryMixin")


class QueryMixin(SavingMixin):
    """Methods about queries."""

    _query_report: QueryReport | None = None

    @classmethod
    @takes(QUERY, load_arguments)
    @isolated()
    @checked
    def load_query_data(
        cls: type[Model],
        adata: Data,
        reference_model: Any,
        device: str | torch.device | None = None,
        unfrozen: bool = False,
        freeze_dropout: bool = False,
        freeze_expression: bool = True,
        freeze_decoder_first_layer: bool = True,
        freeze_batchnorm_encoder: bool = True,
        freeze_batchnorm_decoder: bool = False,
    ) -> Model:
        """Model of a query, which maps its cells onto a trained model.

        It works at once, without training: :meth:`get_latent_representation` places its cells among the reference's.
        :meth:`train` then fits what is new in it, the effects of new batches on expression and accessibility, and what
        is chosen here beside them, for 100 epochs without early stopping by default. The reference is not changed.

        By default training leaves the states of cells where they are, unless the reference has
        ``encode_covariates=True``. Where a new batch does not mix with the reference, give ``freeze_expression=False``:
        then training moves its cells to where the frozen decoders explain them best, and calibrates anew: by default
        no cells are held out, and depths of what was not measured and what is imputed lose the calibration of the
        reference, which needs some (``train(train_size=0.9)``; see :meth:`train`). Intervals are calibrated on the
        reference and too narrow in a new batch of few cells: those of 90 % of expression held 0.46, 0.63 and 0.83 of
        the truth in simulated batches of 5, 20 and 100 cells, 0.93 in the reference.

        Parameters
        ----------
        adata
            The query: an AnnData or MuData with the columns of ``obs`` that the reference was set up with. It need not
            be set up and is not changed. It may have RNA, ATAC or both, in any of its cells; batches and categories of
            covariates may be new. Features are found by name in any order. Those that it lacks count as not measured:
            encoders scale up what the others say of a cell (:mod:`pyro_multivi.networks.panels`), likelihoods leave
            them out, and depths are those of all features. Those that the reference does not know are not used.
            :attr:`query_report` counts both.
        reference_model
            A trained model, or the folder of a saved one.
        device
            Device of the new model; default: that of the reference, or the CPU for a folder. scvi-tools'
            ``accelerator`` is taken too.
        unfrozen
            Train everything, but networks of modalities that no cell of the query has. What is learned of a new batch
            then changes what is decoded in the others too.
        freeze_dropout
            Use no dropout in training.
        freeze_expression
            Keep the first layers of the encoders as they are. False: they are trained, which moves all cells, those of
            the reference too in this model; the reference model stays as it is.
        freeze_decoder_first_layer
            Keep the first layers of the decoders as they are, but for the weights of new batches and categories.
        freeze_batchnorm_encoder, freeze_batchnorm_decoder
            Keep batch normalisation as it is, in models that have it.

        Returns
        -------
        A model of the query. Its batches are those of the reference, followed by the new ones.

        Raises
        ------
        ValueError
            If a modality shares no features with the reference, values are no raw counts, or a column is missing.
        NotTrainedError
            If the reference was not trained.
        FileNotFoundError, BrokenModelError
            If there is no saved model, or it is damaged or of a newer version.

        Warns
        -----
        UserWarning
            If few features are shared, cells of a known batch are of another depth than its cells were, or cells that
            are said to have a modality have no count of it.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((60, 0, 0), n_genes=30, n_regions=50, n_batches=2, seed=0)
        >>> reference = adata[adata.obs["batch"] == "batch_0"].copy()
        >>> query = adata[adata.obs["batch"] == "batch_1", 5:].copy()
        >>> report = pm.MULTIVI.setup_anndata(reference, batch_key="batch")
        >>> model = pm.MULTIVI(reference, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> mapped = pm.MULTIVI.load_query_data(query, model)
        >>> mapped.get_latent_representation().shape, mapped.query_report.missing["genes"]
        ((32, 3), 5)
        >>> mapped.train(max_epochs=2, progress_bar=False)
        """
        reference = cls._reference_model(reference_model)
        spec, opened = query_spec(reference.spec, adata, reference.program.needs_labels)
        table = spec.table(adata)
        program, new = grown_program(reference.program, reference.spec, spec)
        set_priors(program, table, spec, reference.spec.n_batch)
        report = QueryReport.of(reference.spec, spec, opened, table)
        logger.info("%s", report)
        for sentence in cautions(report, spec, opened, table, program):
            caution(sentence)
        training = Training.chosen(
            program,
            new,
            unfrozen=unfrozen,
            freeze_dropout=freeze_dropout,
            freeze_expression=freeze_expression,
            freeze_decoder_first_layer=freeze_decoder_first_layer,
            freeze_batchnorm_encoder=freeze_batchnorm_encoder,
            freeze_batchnorm_decoder=freeze_batchnorm_decoder,
        )
        training.apply(program.to(device or reference.device))
        model = cls.__new__(cls)
        model._assemble(replace(spec, n_cells=report.n_cells), program, adata, table)
        model._training, model._query_report = training, report
        model._reference = reference
        model.is_trained = True
        return model

    @property
    def query_report(self) -> QueryReport | None:
        """Report on the query of a model that :meth:`load_query_data` made; None for any other."""
        return self._query_report

    @classmethod
    @isolated()
    @checked
    def prepare_query_anndata(
        cls, adata: AnnData, reference_model: Any, return_reference_var_names: bool = False, inplace: bool = True
    ) -> AnnData | pd.Index[Any] | None:
        """Bring an AnnData into the form of the reference: its features, in its order.

        Not needed for :meth:`load_query_data`, which finds features by name. Features that are missing become columns
        of zeros, which ``var["pyro_multivi_measured"]`` marks as not measured; setup and models here do not take them
        for counts; so does a modality of which the object has none. Features that the reference does not know are left
        out, and a log line at level WARNING says how many. Without a column of feature types they are found by name.

        Parameters
        ----------
        adata
            The query, in memory.
        reference_model
            A model, or the folder of a saved one.
        return_reference_var_names
            Return the names of the reference's features, genes first, and do nothing else.
        inplace
            Change ``adata`` itself, as scvi-tools does by default; False: return a new object and leave it as it is.

        Returns
        -------
        The new object, the names, or None if ``adata`` was changed.

        Raises
        ------
        ValueError, TypeError
            If no features are shared, or it is no AnnData in memory.
        """
        spec = cls._reference_model(reference_model, trained=False).spec
        if return_reference_var_names:
            return pd.Index([name for each in MODALITIES for name in each.feature_names_in(spec)])
        if not isinstance(adata, AnnData):
            verb = ": use prepare_query_mudata(mdata, ...)" if is_mudata(adata) else ""
            raise TypeError(f"adata must be an AnnData, got {shown(adata)}{verb}.")
        opened = spec.open(adata)
        say_left_out(opened, spec)
        counts = {modality: opened.counts.get(modality) for modality in modelled(spec)}
        return _replaced(adata, in_reference_order(adata, counts, spec, spec.setup.feature_type_key), inplace)

    @classmethod
    @isolated()
    @checked
    def prepare_query_mudata(
        cls, mdata: Any, reference_model: Any, return_reference_var_names: bool = False, inplace: bool = True
    ) -> Any:
        """Bring the modalities of a MuData into the form of the reference; see :meth:`prepare_query_anndata`.

        Parameters
        ----------
        mdata
            The query; it may lack a modality.
        reference_model, return_reference_var_names, inplace
            As for an AnnData. Names are returned as a dict, with one index for each modality.
        """
        spec = cls._reference_model(reference_model, trained=False).spec
        protein = spec.setup.protein_key
        if return_reference_var_names:
            names = {each: spec.setup.mudata_name(each) or each.key for each in MODALITIES if each.n_features_in(spec)}
            found_names = {name: pd.Index(each.feature_names_in(spec)) for each, name in names.items()}
            protein_names = {} if protein is None else {protein: pd.Index(spec.protein_names)}
            return {**found_names, **protein_names}
        if not is_mudata(mdata):
            verb = ": use prepare_query_anndata(adata, ...)" if isinstance(mdata, AnnData) else ""
            raise TypeError(f"mdata must be a MuData, got {shown(mdata)}{verb}.")
        found = open_data(mdata, spec.setup).counts
        if inplace and mdata.is_view:
            raise ValueError(_NOT_IN_PLACE.format("mdata"))
        changed = {
            name: in_reference_order(part, {modality: counts}, spec, None)
            for name, part in mdata.mod.items()
            for modality, counts in found.items()
            if counts.owner == f"mdata.mod[{name!r}]"
        }
        if protein is not None and protein in mdata.mod:
            changed[protein] = proteins_in_reference_order(mdata.mod[protein], f"mdata.mod[{protein!r}]", spec)
        parts = {name: changed[name] if name in changed else part.copy() for name, part in mdata.mod.items()}
        # Made anew: a MuData cannot follow features that were renamed and taken out since it was made.
        with mudata_as_given() as mudata:
            made = mudata.MuData(parts)
            if list(made.obs_names) != list(mdata.obs_names):
                made = made[mdata.obs_names].copy()
            made.obs, made.uns = mdata.obs.copy(), dict(mdata.uns)
            for theirs, ours in ((mdata.obsm, made.obsm), (mdata.obsp, made.obsp)):
                ours.update({key: value.copy() for key, value in theirs.items() if key not in parts})
            if not inplace:
                return made
            places = {name: dict(getattr(made, name)) for name in ("obsm", "varm", "obsp", "varp", "obsmap", "varmap")}
            mudata.MuData.__init__(mdata, dict(made.mod), obs=made.obs, var=made.var, uns=made.uns, **places)
        return None

    @isolated()
    @checked
    def transfer_labels(
        self,
        query: Any,
        key: str,
        n_neighbors: int = 15,
        threshold: float = 0.5,
        unknown: str = "unknown",
        alpha: float = 0.05,
    ) -> pd.DataFrame:
        """Labels of the reference's cells, carried over to those of a query by neighbours in the latent space.

        Both ways to be unknown are learned from reference cells, those held out of training where there are 100,
        encoded with only the modalities and features that the query has: how often the label of the neighbours is
        right, and how far cells lie from their neighbours. See
        :mod:`pyro_multivi.posterior.mapping.label_transfer`.

        Cells of a type that the reference lacks are found if they lie apart. Of a cell line left out of a reference of
        four, by default 86 to 100 % were found from RNA, and 11 to 46 % from ATAC, whose encoder places many among the
        known ones. All this holds for cells measured as the reference's were. A new batch that is not aligned with it
        lies apart as a whole, and its labels are less often right than their confidence says; train its model with
        ``freeze_expression=False`` first.

        Parameters
        ----------
        query
            An AnnData or MuData as for :meth:`load_query_data`, or the model that it made of one.
        key
            Column with labels in ``obs`` of the reference: of this model's data, or, if this is the model of a query,
            of those of its reference. Cells without a label do not vote.
        n_neighbors
            Number of neighbours that vote; nearer ones weigh more.
        threshold
            Smallest confidence of a label; below it a cell is ``unknown``.
        unknown
            Label of such cells.
        alpha
            Cells are ``unknown`` too that lie farther from their neighbours than a share 1 - ``alpha`` of the
            reference's own cells: so many of all cells are called so wrongly of a query that is like the reference, of
            rare types many more (a quarter to 0.9 of one with 20 cells in simulation). 0: none are, for their sake.

        Returns
        -------
        A frame of the query's cells: ``label``, or ``unknown``; ``nearest_label``, the label of the neighbours whatever
        its confidence; ``confidence``, the probability that this is right; ``p_value``, the chance that a cell of the
        reference lies as far from its neighbours, small for a cell that lies apart.

        Warns
        -----
        UserWarning
            If more than half of a batch lies apart.

        Raises
        ------
        ValueError
            If there is no such column, or no data of the reference.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((120, 0, 0), n_genes=30, n_regions=50, n_batches=2, n_types=2, seed=0)
        >>> reference = adata[adata.obs["batch"] == "batch_0"].copy()
        >>> query = adata[adata.obs["batch"] == "batch_1"].copy()
        >>> report = pm.MULTIVI.setup_anndata(reference, batch_key="batch")
        >>> model = pm.MULTIVI(reference, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.transfer_labels(query, "cell_type").columns.tolist()
        ['label', 'confidence', 'nearest_label', 'p_value']
        """
        least = check_number("threshold", threshold, least=0.0, most=1.0)
        tail = check_number("alpha", alpha, least=0.0, most=1.0)
        if not isinstance(query, (AnnData, QueryMixin)) and not is_mudata(query):
            raise TypeError(f"query={shown(query)} is not allowed: give an AnnData, a MuData, or the model of a query.")
        mapped: Any
        if not isinstance(query, QueryMixin):
            mapped = self if self._training is not None else type(self).load_query_data(query, self)
            table = mapped._table_of(query)[0]
        else:
            mapped, table = query, query._training_table()
        reference = labelled_reference(self)
        names, code = label_codes(reference._obs_of(None), key)
        if unknown in map(str, names):
            raise ValueError(f"unknown={unknown!r} is a label of the reference: give another word.")
        mine = mapped.spec.table(reference.adata)
        held_out = torch.zeros(0, dtype=torch.int64) if reference._split is None else reference._split.validation
        found, confidence, p_value = carried_over(mapped.program, mine, code, held_out, table, n_neighbors)
        is_apart = p_value < tail
        for sentence in batches_apart(is_apart, table, mapped.spec.batch_categories, tail):
            caution(sentence)
        nearest = pd.Categorical.from_codes(found, pd.Index(names))
        codes = np.where(is_apart | (confidence < least), len(names), found)
        label = pd.Categorical.from_codes(codes, pd.Index([*names, unknown], dtype=object))
        columns = {"label": label, "confidence": confidence, "nearest_label": nearest, "p_value": p_value}
        return pd.DataFrame(columns, index=pd.Index(table.cell_names))

    # ------------------------------------------------------------------ shared by the methods

    def _query_description(self) -> dict[str, Any] | None:
        if self._training is None or self._query_report is None:
            return None
        return {"training": self._training.to_dict(), "report": self._query_report.to_dict()}

    def _restore_query(self, values: Mapping[str, Any]) -> None:
        self._training = Training.from_dict(values["training"], self.program)
        self._query_report = QueryReport.from_dict(values["report"])
        self._training.apply(self.program)

    @classmethod
    def _reference_model(cls, reference_model: Any, trained: bool = True) -> Any:
        """The model that was given, or that of a folder."""
        if isinstance(reference_model, (str, os.PathLike)):
            reference: Any
            try:
                reference = cls.load(reference_model)
            except (FileNotFoundError, BrokenModelError, ValueError) as error:
                raise type(error)(f"reference_model: {error}") from error
        elif isinstance(reference_model, SavingMixin):
            reference = reference_model
        else:
            raise TypeError(
                f"reference_model={shown(reference_model)} is not allowed: give a trained model, or the folder of a "
                "saved one."
            )
        if trained and not reference.is_trained:
            raise NotTrainedError("reference_model is not trained: call reference_model.train() first.")
        return reference


def _replaced(adata: AnnData, made: AnnData, inplace: bool) -> AnnData | None:
    """The new object, or None after it has taken the place of the old one."""
    if not inplace:
        return made
    if adata.isbacked or adata.is_view:
        raise ValueError(_NOT_IN_PLACE.format("adata"))
    AnnData.__init__(adata, made)
    return None
