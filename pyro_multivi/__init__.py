"""MultiVI in Pyro: one latent state per cell from gene counts, peak accessibility or both.

Analysts start at :class:`MULTIVI`, modelers at :class:`MultiVIProgram`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pyro_multivi._version import __version__

if TYPE_CHECKING:
    from pyro_multivi._settings import settings
    from pyro_multivi.api.base import NotTrainedError
    from pyro_multivi.api.compare_models import compare_models
    from pyro_multivi.api.multivi import MULTIVI
    from pyro_multivi.api.saving.folder import BrokenModelError
    from pyro_multivi.api.saving.summary import describe
    from pyro_multivi.config import ProgramConfig
    from pyro_multivi.data.fragments.reads import reads_to_fragments
    from pyro_multivi.data.setup.extra.antibodies import organize_cite_seq_10x
    from pyro_multivi.data.stores.matrix import StoreChangedError
    from pyro_multivi.datasets.examples import cell_lines
    from pyro_multivi.datasets.organize import organize_multiome_anndatas
    from pyro_multivi.datasets.readers import read, read_10x_h5, read_10x_mtx
    from pyro_multivi.datasets.samples import join_samples
    from pyro_multivi.datasets.simulate import simulate_multiome
    from pyro_multivi.datasets.stores.convert import convert_stores
    from pyro_multivi.datasets.stores.open import open_stores
    from pyro_multivi.processes.group import distributed
    from pyro_multivi.program import MultiVIProgram
    from pyro_multivi.training import ContractError, TrainingDiverged

__all__ = [
    "MULTIVI",
    "BrokenModelError",
    "ContractError",
    "MultiVIProgram",
    "NotTrainedError",
    "ProgramConfig",
    "StoreChangedError",
    "TrainingDiverged",
    "__version__",
    "cell_lines",
    "compare_models",
    "convert_stores",
    "describe",
    "distributed",
    "join_samples",
    "open_stores",
    "organize_cite_seq_10x",
    "organize_multiome_anndatas",
    "read",
    "read_10x_h5",
    "read_10x_mtx",
    "reads_to_fragments",
    "settings",
    "simulate_multiome",
]

#: Module of each public name. It is imported at the first use: the command line's help does not wait for torch.
_MODULE_OF = {
    "MULTIVI": "api.multivi",
    "BrokenModelError": "api.saving.folder",
    "StoreChangedError": "data.stores.matrix",
    "ContractError": "training",
    "MultiVIProgram": "program",
    "NotTrainedError": "api.base",
    "ProgramConfig": "config",
    "TrainingDiverged": "training",
    "cell_lines": "datasets.examples",
    "compare_models": "api.compare_models",
    "convert_stores": "datasets.stores.convert",
    "describe": "api.saving.summary",
    "distributed": "processes.group",
    "join_samples": "datasets.samples",
    "open_stores": "datasets.stores.open",
    "organize_cite_seq_10x": "data.setup.extra.antibodies",
    "organize_multiome_anndatas": "datasets.organize",
    "read": "datasets.readers",
    "read_10x_h5": "datasets.readers",
    "read_10x_mtx": "datasets.readers",
    "reads_to_fragments": "data.fragments.reads",
    "settings": "_settings",
    "simulate_multiome": "datasets.simulate",
}

#: Modules of scvi-tools that scripts name, and what there is in their place.
_IN_PLACE_OF = {
    "autotune": "compare_models compares models on the same held-out cells",
    "criticism": "model.posterior_predictive_check() draws and scores replicates",
    "dataloaders": "data on disk are read as they are needed: open_stores, or a backed object",
    "external": "for other models import scvi-tools itself, under another name",
    "hub": "model.save() and MULTIVI.load() write and read folders",
    "module": "model.program is the module, MultiVIProgram its class",
}

if not TYPE_CHECKING:  # A type checker would take every misspelled name for one of these.

    def __getattr__(name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value
            return value
        if name == "REGISTRY_KEYS":  # of scripts for scvi-tools, which import it from here
            return import_module(f"{__name__}.utils").REGISTRY_KEYS
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        instead = f": {_IN_PLACE_OF[name]}." if name in _IN_PLACE_OF else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{instead}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
