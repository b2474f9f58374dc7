"""Names that scripts and tests for scvi-tools import: keys of its registry, kinds of minified data, ``attrdict``."""

from __future__ import annotations

from typing import Any, NamedTuple

from pyro_multivi.data.checks import nearest


class _RegistryKeys(NamedTuple):
    X_KEY: str = "X"
    ATAC_X_KEY: str = "atac"
    PROTEIN_EXP_KEY: str = "proteins"
    BATCH_KEY: str = "batch"
    SAMPLE_KEY: str = "sample"
    LABELS_KEY: str = "labels"
    CAT_COVS_KEY: str = "extra_categorical_covs"
    CONT_COVS_KEY: str = "extra_continuous_covs"
    SIZE_FACTOR_KEY: str = "size_factor"
    INDICES_KEY: str = "ind_x"
    MINIFY_TYPE_KEY: str = "minify_type"
    LATENT_QZM_KEY: str = "latent_qzm"
    LATENT_QZV_KEY: str = "latent_qzv"
    OBSERVED_LIB_SIZE: str = "observed_lib_size"


class _MinifiedTypes(NamedTuple):
    LATENT_POSTERIOR: str = "latent_posterior_parameters"
    LATENT_POSTERIOR_WITH_COUNTS: str = "latent_posterior_parameters_with_counts"


#: Keys of ``model.adata_manager.data_registry``; those of samples, positions and minified data are in none here.
REGISTRY_KEYS = _RegistryKeys()
#: Values of ``model.minified_data_type``.
ADATA_MINIFY_TYPE = _MinifiedTypes()


class attrdict(dict[str, Any]):
    """A dictionary whose keys are attributes as well, and those of dictionaries in it.

    Examples
    --------
    >>> place = attrdict(batch={"attr_name": "obs"})
    >>> place.batch.attr_name
    'obs'
    >>> place.to_dict()
    {'batch': {'attr_name': 'obs'}}
    """

    def __getattr__(self, name: str) -> Any:
        try:
            found = self[name]
        except KeyError:
            raise AttributeError(f"{name!r} is not there. {nearest(name, self)}") from None
        return attrdict(found) if type(found) is dict else found

    def to_dict(self) -> dict[str, Any]:
        """A copy of plain dictionaries."""
        return {key: attrdict(kept).to_dict() if isinstance(kept, dict) else kept for key, kept in self.items()}
