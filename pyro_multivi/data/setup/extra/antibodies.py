"""Proteins that lie among the genes of a 10x file, moved to where setup takes them from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyro_multivi.data.checks import checked, first_names, shown
from pyro_multivi.data.modality import PROTEIN_FEATURE_TYPES
from pyro_multivi.data.setup.options import is_lazy, is_mudata
from pyro_multivi.data.vocabulary import feature_type_column

if TYPE_CHECKING:
    from anndata import AnnData

#: Key of obsm that they are moved to, by scvi-tools' name.
OBSM_KEY = "protein_expression"


@checked
def organize_cite_seq_10x(adata: AnnData, copy: bool = False) -> AnnData | None:
    """Move the features of the type "Antibody Capture" from ``X`` to ``obsm["protein_expression"]``.

    Files of 10x Genomics hold genes, peaks and antibodies in one matrix. Setup takes proteins from ``obsm``:
    ``setup_anndata(adata, protein_expression_obsm_key="protein_expression")``.

    Parameters
    ----------
    adata
        Counts in memory, with feature types in ``var`` as :func:`~pyro_multivi.read` gives them. Layers lose the
        antibodies too.
    copy
        Return a new object and leave this one as it is.

    Returns
    -------
    AnnData or None
        With ``copy`` the new object.

    Raises
    ------
    ValueError, TypeError
        If ``adata`` is no AnnData in memory, has no such feature, or has proteins in ``obsm`` already.

    Examples
    --------
    >>> import numpy as np, pandas as pd, pyro_multivi as pm
    >>> from anndata import AnnData
    >>> var = pd.DataFrame({"feature_types": ["Gene Expression", "Antibody Capture"]}, index=["CD3E", "CD3"])
    >>> adata = AnnData(np.ones((5, 2), dtype="float32"), var=var)
    >>> pm.organize_cite_seq_10x(adata)
    >>> list(adata.var_names), list(adata.obsm["protein_expression"].columns)
    (['CD3E'], ['CD3'])
    """
    if is_mudata(adata):
        raise TypeError(
            "adata is a MuData, whose proteins have a modality of their own: name it in the setup, "
            "modalities={'protein_layer': ...}."
        )
    if not hasattr(adata, "layers"):
        raise TypeError(f"adata must be an AnnData, got {shown(adata)}.")
    counts: Any = adata.X
    if is_lazy(counts) or not (sp.issparse(counts) or isinstance(counts, np.ndarray)):
        raise TypeError(
            f"X is {shown(counts)}: read it into memory first, adata.to_memory(), or what open_stores "
            "opened by pyro_multivi.read(path)."
        )
    if OBSM_KEY in adata.obsm:
        raise ValueError(f"obsm[{OBSM_KEY!r}] is there already: delete it, or name it in the setup as it is.")
    column = feature_type_column("feature_types", adata.var.columns, needed=False)
    types = adata.var[column].astype(str) if column in adata.var else pd.Series("", index=adata.var_names)
    is_protein = types.isin(PROTEIN_FEATURE_TYPES).to_numpy()
    if not is_protein.any():
        raise ValueError(
            f"No feature of adata is of the type {PROTEIN_FEATURE_TYPES[0]!r}; var['feature_types'] holds "
            f"{first_names(types.unique())}. Put the counts of proteins into adata.obsm[{OBSM_KEY!r}] yourself."
        )
    values: Any = adata[:, is_protein].X
    dense: Any = values.toarray() if hasattr(values, "toarray") else np.array(values)
    proteins = pd.DataFrame(dense, index=adata.obs_names, columns=adata.var_names[is_protein])
    organized = adata[:, ~is_protein].copy() if copy else adata
    if not copy:
        adata._inplace_subset_var(~is_protein)
    organized.obsm[OBSM_KEY] = proteins
    return organized if copy else None
