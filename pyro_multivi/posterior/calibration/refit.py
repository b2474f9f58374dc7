"""Calibration of a model while it is trained again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from pyro_multivi.data.modality import MODALITIES, modelled
from pyro_multivi.posterior.calibration.fit_depth import clear_depth_regressions
from pyro_multivi.posterior.calibration.fit_proteins import clear_proteins, proteins_of
from pyro_multivi.posterior.calibration.fit_residual import clear_residuals
from pyro_multivi.posterior.calibration.fit_scale import clear_posterior_scale
from pyro_multivi.posterior.calibration.fit_shrinkage import clear_shrinkage
from pyro_multivi.posterior.calibration.fit_weights import clear_weight_posteriors
from pyro_multivi.posterior.engine.decode import mean_buffers
from pyro_multivi.posterior.engine.depth_regression import regression_buffer
from pyro_multivi.posterior.engine.weight_posterior import residual_buffer, weight_buffers
from pyro_multivi.program import MultiVIProgram


@contextmanager
def refit(program: MultiVIProgram, n_epochs: Callable[[], int]) -> Iterator[None]:
    """Clear the calibration, which other weights invalidate; restore it if an error ends training before an epoch.

    Parameters
    ----------
    n_epochs
        Function that returns the number of epochs it was trained for so far.
    """
    # A layer may have been put in after the program was built.
    program.size_weight_directions()
    kept = [buffer.clone() for buffer in calibrated_buffers(program)]
    before = n_epochs()
    clear_depth_regressions(program)
    clear_weight_posteriors(program)
    clear_residuals(program)
    clear_proteins(program)
    clear_shrinkage(program)
    clear_posterior_scale(program)
    try:
        yield
    except BaseException:
        if n_epochs() == before:
            # Looked up anew: training may have moved the program to another device.
            for buffer, value in zip(calibrated_buffers(program), kept, strict=True):
                buffer.copy_(value)
        raise


def calibrated_buffers(program: MultiVIProgram) -> list[Tensor]:
    """Buffers of the program that are calibrated."""
    by_modality = (
        buffer
        for modality in modelled(program.config)
        for buffer in (
            *weight_buffers(program, modality),
            residual_buffer(program, modality),
            *mean_buffers(program, modality),
        )
    )
    proteins = (buffer for modality in proteins_of(program) for buffer in modality.calibrated)
    depths = (regression_buffer(program, modality) for modality in MODALITIES)
    return [program.posterior_scale, program.depth_scale, *depths, *by_modality, *proteins]
