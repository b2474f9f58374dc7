"""Data: from files to minibatches. Import from the modules; this file stays light on purpose.

Readers that scvi-tools' scripts look for here, ``scvi.data.read_10x_multiome``, are found at their first use.
"""

from importlib import import_module as _import_module

_MODULE_OF = {
    "organize_cite_seq_10x": "pyro_multivi.data.setup.extra.antibodies",
    "organize_multiome_anndatas": "pyro_multivi.datasets.scvi_readers",
    "read_10x_atac": "pyro_multivi.datasets.scvi_readers",
    "read_10x_multiome": "pyro_multivi.datasets.scvi_readers",
    "read_h5ad": "anndata",
    "reads_to_fragments": "pyro_multivi.data.fragments.reads",
    "synthetic_iid": "pyro_multivi.datasets.synthetic",
}


def __getattr__(name: str) -> object:
    if name in _MODULE_OF:
        return getattr(_import_module(_MODULE_OF[name]), name)
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; readers here are {', '.join(sorted(_MODULE_OF))}, and "
        "pyro_multivi.read."
    )
