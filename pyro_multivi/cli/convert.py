"""``pyro-multivi convert``: a data set in the form that is read fastest from disk."""

from __future__ import annotations

import argparse
import errno

from pyro_multivi.cli.inputs import named_paths
from pyro_multivi.datasets.stores.convert import convert_stores
from pyro_multivi.datasets.stores.open import open_stores


def convert(options: argparse.Namespace) -> None:
    """Write one file or several as one zarr folder, and print what it holds."""
    try:
        path = convert_stores(
            named_paths(options.data) or options.data[0],
            options.target,
            layer=options.layer,
            feature_type_key=options.feature_type_key,
            progress_bar=not options.quiet,
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"OUT {options.target} could not be written ({error.strerror}): with more space the same command goes on."
        ) from error
    adata = open_stores(path)
    print(f"{path}: {adata.n_obs} cells x {adata.n_vars} features")
