"""Data saved beside a model: the file is written without a change of the user's object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from pyro_multivi.api.arguments import Data
from pyro_multivi.data.checks import first_names
from pyro_multivi.data.setup.options import UNS_KEY, is_mudata
from pyro_multivi.data.stores.reference import STORES, element
from pyro_multivi.datasets.stores.elements import write_element
from pyro_multivi.files import writing

#: Names of the file of an AnnData and of a MuData.
ANNDATA, MUDATA = "adata.h5ad", "mdata.h5mu"
DATA_FILES = (ANNDATA, MUDATA)

# Bytes before the HDF5 part of an .h5mu file, which begin with a sentence on its format.
_HEADER_SIZE, _HEADER = 512, b"MuData (format-version=0.1.0;creator=pyro-multivi)"


def write_data(folder: Path, data: Data) -> str:
    """Write the data of a model to a folder, and return the file's name.

    The writers of anndata and mudata turn columns of text of the object itself into categories, and point one that is
    backed to the new file. Here the elements are written one by one.
    """
    name = MUDATA if is_mudata(data) else ANNDATA
    odd = [key for key in data.mod if "/" in key] if name == MUDATA else []
    if odd:
        raise ValueError(
            f"save_anndata=True: no file can hold a modality whose name has a '/', as {first_names(odd)} of mdata.mod. "
            "Make a MuData with other names, or save the model without its data."
        )
    with writing(folder / name) as stream:
        with h5py.File(stream, "w", userblock_size=_HEADER_SIZE if name == MUDATA else None) as file:
            if name == MUDATA:
                _write_mudata(file, data)
            else:
                write_element(file, "/", data)
        if name == MUDATA:
            stream.seek(0)
            stream.write(_HEADER.ljust(_HEADER_SIZE, b"\0"))
    return name


def difference(path: Path, cells: Sequence[str], features: Sequence[str]) -> str:
    """Description of what a file of data lacks of a model's cells and features; empty if nothing."""
    try:
        with h5py.File(path) as file:
            parts = [file, *(file["mod"].values() if "mod" in file else ())]
            has_cells = {str(name) for name in element(file, "obs").index}
            has_features = {str(name) for part in parts for name in element(part, "var").index}
    except Exception as error:  # whatever a damaged file makes the reader stumble on
        return f"cannot be read ({error})"
    for what, names, found in (("cells", cells, has_cells), ("features", features, has_features)):
        lacking = [name for name in names if name not in found]
        if lacking:
            return f"lacks {len(lacking)} {what} of this model: {first_names(lacking)}"
    return ""


def refers_to_stores(path: Path) -> bool:
    """Whether a file of data holds no counts, but says in which files or folders they are."""
    try:
        with h5py.File(path) as file:
            return f"uns/{UNS_KEY}/{STORES}" in file and "X" not in file
    except OSError:
        return False


def _write_mudata(file: h5py.File, mdata: Any) -> None:
    """The elements of an .h5mu file, as its format has them."""
    write_element(file, "obs", mdata.obs)
    write_element(file, "var", mdata.var)
    for name in ("obsm", "varm", "obsp", "varp", "uns", "obsmap", "varmap"):
        write_element(file, name, dict(getattr(mdata, name)))
    for name, part in mdata.mod.items():
        write_element(file.require_group("mod"), name, part)
    file["mod"].attrs["mod-order"] = list(mdata.mod)
    file.attrs.update({"axis": mdata.axis, "encoding-type": "MuData", "encoding-version": "0.1.0"})
