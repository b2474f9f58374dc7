"""Mixin: the data of a model reduced to the posterior of each cell."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.api.scvi_tools.minified import digest_of_weights
from pyro_multivi.data.checks import check_choice, checked
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minified.layout import KIND, OBSERVED_LIBRARY, OBSM_KEY, WEIGHTS, kind_of
from pyro_multivi.data.modality import RNA
from pyro_multivi.data.setup import latest
from pyro_multivi.data.setup.adapter import open_data
from pyro_multivi.data.setup.counts import read
from pyro_multivi.data.setup.options import UNS_KEY, Setup, is_mudata
from pyro_multivi.data.stores.reference import STORES, stores_of
from pyro_multivi.posterior.quantities.latent import posterior_to_store
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.utils import ADATA_MINIFY_TYPE

# What of the guide the stored posterior stands for: a program that overrides one of these has latents of its own.
_STORED = ("guide", "guide_shared", "guide_extra")


class MinifyMixin(ModelBase):
    """Methods about minified data."""

    @property
    def minified_data_type(self) -> str | None:
        """Kind of minified data that the model has; None if it has counts, or no data."""
        return None if self._table is None or self._table.posterior is None else kind_of(self.adata)

    @checked
    def minify_adata(
        self,
        minified_data_type: str = ADATA_MINIFY_TYPE.LATENT_POSTERIOR,
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Keep the posterior of each cell in place of its counts, in a copy of the data that becomes the model's own.

        Latent states, normalized values, depths and differential tests of cells (``unit="cell", all_stats=False``) stay
        what they were; what compares with counts is refused. The object that was given to the constructor does not
        change. :meth:`save` with ``save_anndata=True`` writes the small one.

        Parameters
        ----------
        minified_data_type
            ``"latent_posterior_parameters"``. Counts are not kept beside the posterior, as scvi-tools can: leave the
            data as they are instead.
        use_latent_qzm_key, use_latent_qzv_key
            No effect: the model computes its posterior itself.

        Raises
        ------
        ValueError
            If the data are a MuData, are minified already, or the model's guide is one of your own: with other
            latents, or another family of the posterior of z, l or d.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> before = model.get_latent_representation()
        >>> model.minify_adata()
        >>> model.adata.X.nnz, bool((model.get_latent_representation() == before).all())
        (0, True)
        """
        self._minify(minified_data_type, "minify_adata")

    @checked
    def minify_mudata(
        self,
        minified_data_type: str = ADATA_MINIFY_TYPE.LATENT_POSTERIOR,
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Keep the posterior of each cell in place of its counts, as :meth:`minify_adata`, of a MuData.

        Parameters
        ----------
        minified_data_type, use_latent_qzm_key, use_latent_qzv_key
            As in :meth:`minify_adata`.

        Raises
        ------
        ValueError
            If the data are an AnnData, are minified already, or the model's guide is one of your own, as above.
        """
        self._minify(minified_data_type, "minify_mudata")

    def _minify(self, kind: str, method: str) -> None:
        check_choice("minified_data_type", kind, ADATA_MINIFY_TYPE)
        if kind != ADATA_MINIFY_TYPE.LATENT_POSTERIOR:
            raise ValueError(
                f"minified_data_type={kind!r} keeps counts, by which nothing gets smaller: leave the data as they are."
            )
        self._check_trained()
        table = self._training_table()
        if table.posterior is not None:
            raise ValueError(f"{method}: the data of this model are minified already.")
        needed = "minify_mudata" if is_mudata(self.adata) else "minify_adata"
        if method != needed:
            raise ValueError(f"{method}: the data of this model are of the other kind: call {needed}().")
        own = [name for name in _STORED if getattr(type(self.program), name) is not getattr(MultiVIProgram, name)]
        if own:
            raise ValueError(
                f"{method}: {type(self.program).__name__} has a {own[0]} of its own, and the posterior of z, l and d "
                "alone would not be all of it. Keep the data as they are."
            )
        cells = Minibatches(table, torch.arange(len(table)), batch_size=PREDICTION_BATCH, device=self.device)
        try:
            posterior = posterior_to_store(self.program, cells)
        except ValueError as error:
            raise ValueError(f"{method}: {error}") from None
        data = _without_counts(self.adata, kept=self.spec.setup.protein_key)
        data.obsm[OBSM_KEY] = posterior
        data.obs[OBSERVED_LIBRARY] = _rna_totals(self.adata, self.spec.setup)
        kept = data.uns.get(UNS_KEY)
        entries = kept if isinstance(kept, Mapping) else {}
        data.uns[UNS_KEY] = {**entries, KIND: kind, WEIGHTS: digest_of_weights(self.program)}
        self._adata, self._table = data, self.spec.table(data)
        self._checksum = latest.checksum_of(data, self._table)


def _rna_totals(data: Any, setup: Setup) -> NDArray[Any]:
    """RNA counts of each cell, of all genes of the data, (n,), of the type that a sum of the matrix has."""
    opened = open_data(data, setup)
    if RNA not in opened.counts:
        return np.zeros(len(opened.cells))
    part = opened.counts[RNA]
    totals = read({RNA: part}, {RNA: tuple(part.features)})[RNA].row_sums().numpy()
    return totals.astype(np.zeros(0, part.matrix.dtype).sum().dtype)


def _without_counts(data: Any, kept: str | None) -> Any:
    """A copy of an object whose matrices of cells × features are empty, except for one modality of a MuData."""
    if is_mudata(data):
        copy = _copy_of_mudata(data)
        for name, part in copy.mod.items():
            if name != kept:
                _empty(part)
        return copy
    copy = _copy_in_memory(data)
    _empty(copy)
    return copy


def _copy_in_memory(adata: Any) -> Any:
    return adata.to_memory() if adata.isbacked else adata.copy()


def _copy_of_mudata(data: Any) -> Any:
    """A copy of a MuData; its own fails for whole numbers in ``obsm`` or ``varm``, which mudata would set to NaN."""
    tables, maps = ("obsm", "varm"), ("obsp", "varp", "obsmap", "varmap")
    with mudata_as_given() as mudata, warnings.catch_warnings():
        # mudata makes the copy through calls of its own that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        copy = mudata.MuData(
            {name: _copy_in_memory(part) for name, part in data.mod.items()},
            obs=data.obs.copy(),
            var=data.var.copy(),
            uns=deepcopy(data.uns),
            **{name: {key: value.copy() for key, value in getattr(data, name).items()} for name in maps},
        )
    for name in tables:
        of_modalities = data.mod.keys()
        kept = {key: value.copy() for key, value in getattr(data, name).items() if key not in of_modalities}
        getattr(copy, name).update(kept)
    return copy


def _empty(adata: Any) -> None:
    for name in list(adata.layers):
        if name is not None:
            adata.layers[name] = sp.csr_matrix(adata.shape, dtype=np.float32)
    adata.X = sp.csr_matrix(adata.shape, dtype=np.float32)
    if stores_of(adata) is not None:
        adata.uns[UNS_KEY] = {key: value for key, value in adata.uns[UNS_KEY].items() if key != STORES}
    del adata.raw
