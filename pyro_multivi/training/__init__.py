"""Training of a program: options, objective, schedules, the loop."""

from pyro_multivi.training.adversary import Adversary
from pyro_multivi.training.contract import ContractError, check_contract
from pyro_multivi.training.divergence import TrainingDiverged
from pyro_multivi.training.fit import fit
from pyro_multivi.training.history import History
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.options import FitOptions, resolve_device
from pyro_multivi.training.schedules import AnnealLatents, kl_weight

__all__ = [
    "Adversary",
    "AnnealLatents",
    "ContractError",
    "FitOptions",
    "History",
    "NegativeELBO",
    "TrainingDiverged",
    "check_contract",
    "fit",
    "kl_weight",
    "resolve_device",
]
