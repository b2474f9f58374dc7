"""Say what went wrong when the loss is not a number."""

from __future__ import annotations

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram, is_of_cells

REMEDY = "Try a smaller lr, gradient_clip=10.0, or look at the cells named."


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or infinite."""


@torch.no_grad()
def diagnose(program: MultiVIProgram, cells: Cells, epoch: int, place: int) -> TrainingDiverged:
    """Find the first parameter or site that is not finite and describe it in an error."""
    where = f"epoch {epoch + 1}, minibatch {place + 1}"
    for name, parameter in program.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return TrainingDiverged(f"Training diverged in {where}: parameter {name!r} is not finite. {REMEDY}")
    with pyro.validation_enabled(False):
        guide_trace = poutine.trace(program.guide).get_trace(cells)
        model_trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace(cells)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name == "cells" or (site["infer"] or {}).get("_deterministic", False):
                continue
            bad = _bad_cells(site["unscaled_log_prob"])
            if len(bad) and not is_of_cells(site):
                return TrainingDiverged(
                    f"Training diverged in {where}: site {name!r} of the {role}, which all cells share, is not "
                    f"finite. {REMEDY}"
                )
            if len(bad):
                which = cells.index.cpu()[bad.cpu()].tolist()
                return TrainingDiverged(
                    f"Training diverged in {where}: site {name!r} of the {role} is not finite for {len(which)} "
                    f"cells, the first at positions {which[:5]} of the data. {REMEDY}"
                )
    return TrainingDiverged(f"Training diverged in {where}: the loss is not finite. {REMEDY}")


def _bad_cells(log_prob: Tensor) -> Tensor:
    flat = log_prob.reshape(-1, log_prob.shape[-1]) if log_prob.dim() else log_prob.reshape(1, 1)
    return (~torch.isfinite(flat)).any(0).nonzero().squeeze(-1)
