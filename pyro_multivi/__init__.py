"""MultiVI in Pyro: one latent state per cell from gene counts, peak accessibility or both.

Analysts start at :class:`MULTIVI`, modelers at :class:`MultiVIProgram`.
"""

from pyro_multivi._version import __version__
from pyro_multivi.api.base import NotTrainedError
from pyro_multivi.api.compare_models import compare_models
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.api.saving.folder import BrokenModelError
from pyro_multivi.config import ProgramConfig
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.organize import organize_multiome_anndatas
from pyro_multivi.datasets.readers import read, read_10x_h5, read_10x_mtx
from pyro_multivi.datasets.simulate import simulate_multiome
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training import ContractError, TrainingDiverged

__all__ = [
    "MULTIVI",
    "BrokenModelError",
    "ContractError",
    "MultiVIProgram",
    "NotTrainedError",
    "ProgramConfig",
    "TrainingDiverged",
    "__version__",
    "cell_lines",
    "compare_models",
    "organize_multiome_anndatas",
    "read",
    "read_10x_h5",
    "read_10x_mtx",
    "simulate_multiome",
]
