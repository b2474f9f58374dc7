"""Fitting a program: objective, schedules, the loop."""

from pyro_multivi.training.fit import FitOptions, TrainingDiverged, fit
from pyro_multivi.training.history import History
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.schedules import AnnealLatents, EarlyStopping, kl_weight

__all__ = [
    "AnnealLatents",
    "EarlyStopping",
    "FitOptions",
    "History",
    "NegativeELBO",
    "TrainingDiverged",
    "fit",
    "kl_weight",
]
