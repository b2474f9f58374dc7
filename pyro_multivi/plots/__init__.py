"""Pictures: each function takes an ``ax`` and returns it. Needs the extra ``plot``."""

from pyro_multivi.plots.checks import (
    calibration_curve,
    coverage_curve,
    imputed_against_measured,
    observed_against_replicated,
    p_value_histogram,
    rootogram,
)
from pyro_multivi.plots.differential import top_features, volcano
from pyro_multivi.plots.latent import latent_scatter, neighbour_embedding, principal_plane, training_history
from pyro_multivi.plots.overview import check_summary, overview
from pyro_multivi.plots.style import PALETTE

__all__ = [
    "PALETTE",
    "calibration_curve",
    "check_summary",
    "coverage_curve",
    "imputed_against_measured",
    "latent_scatter",
    "neighbour_embedding",
    "observed_against_replicated",
    "overview",
    "p_value_histogram",
    "principal_plane",
    "rootogram",
    "top_features",
    "training_history",
    "volcano",
]
