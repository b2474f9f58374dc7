"""Fitting a program: objective, schedules, the loop."""

from pyro_multivi.training.adversary import Adversary, AdversaryOptions
from pyro_multivi.training.contract import ContractError, check_contract
from pyro_multivi.training.device import resolve_device
from pyro_multivi.training.fit import FitOptions, TrainingDiverged, fit
from pyro_multivi.training.history import History
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.schedules import AnnealLatents, EarlyStopping, kl_weight

__all__ = [
    "Adversary",
    "AdversaryOptions",
    "AnnealLatents",
    "ContractError",
    "EarlyStopping",
    "FitOptions",
    "History",
    "NegativeELBO",
    "TrainingDiverged",
    "check_contract",
    "fit",
    "kl_weight",
    "resolve_device",
]
