"""Contract between model and guide, checked on the first minibatch, with errors in a modeler's words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pyro
import pyro.poutine as poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_multivi.data.checks import caution
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import CELLS, MultiVIProgram
from pyro_multivi.traces import equal_scales, evaluation_mode, is_of_cells, random_sites, scale_of

# Pyro's words when a distribution does not fit into the plate it is sampled in.
_MISFIT = re.compile(
    r"Shape mismatch inside plate\('(?P<plate>[^']*)'\) at site (?P<site>\S+) dim -\d+, \d+ vs (?P<n>\d+)"
)
# Pyro's words when a name is used twice in a trace.
_TWICE = re.compile(r"Multiple (?:sample|param) sites named '(?P<site>[^']*)'")
# Draws at which model and guide are run once: a number that few other sizes have.
_N_DRAWS = 3
_HOOKS = "guide_extra(cells, s), or guide_shared() if all cells share it"


class ContractError(ValueError):
    """Model and guide do not fit together."""


def check_contract(program: MultiVIProgram, cells: Cells, elbo: ELBO | None = None) -> None:
    """Refuse a model and a guide that no ELBO would be right for.

    No parameter and no random state changes. It costs two traces of each, without likelihoods.

    Parameters
    ----------
    elbo
        Objective of training; None is ``TraceMeanField_ELBO``.

    Raises
    ------
    ContractError
        If a latent is in the model and not in the guide, or the other way round; if they come in another order where
        that matters; if their plates, shapes or scales differ; if a latent is not reparameterised where the ELBO needs
        it. If there is a plate beside that of cells, or a distribution is not one per cell inside that plate and one
        in all outside. If a parameter is none of the program's. If one of the two does not accept several draws of the
        latents. The message names the site and the fix.
    """
    mean_field = elbo is None or isinstance(elbo, TraceMeanField_ELBO)
    # In evaluation mode: batch statistics must not see these cells twice.
    with evaluation_mode(program), pyro.get_param_store().scope():
        guide = _trace("guide", program.guide, cells)
        model = _trace("model", poutine.replay(program.model, trace=guide), cells)
    for role, trace in (("guide", guide), ("model", model)):
        _check_params(role, trace, program)
    latents, guided = _latents(model), _latents(guide)
    _check_enumerated(latents, guided)
    _check_own_statements(program, latents, guided)
    _check_names(list(latents), guided)
    for role, trace in (("guide", guide), ("model", model)):
        for name, site in random_sites(trace).items():
            _check_batch(role, name, site, len(cells))
    for name, site in latents.items():
        _check_agreement(name, site, guided[name])
        if mean_field and not equal_scales(scale_of(site), scale_of(guided[name])):
            raise ContractError(
                f"Site {name!r} is scaled otherwise in the model than in the guide: TraceMeanField_ELBO would scale "
                "the KL term as the guide says and forget the model. Wrap poutine.scale around both, or use "
                "elbo=Trace_ELBO()."
            )
    for name, site in random_sites(model).items():
        _check_observed(name, site)
    _check_order(list(guided), list(latents), mean_field)
    if mean_field:
        for name, site in guided.items():
            if not site["fn"].has_rsample:
                raise ContractError(
                    f"Site {name!r} of the guide is drawn from {_family(site['fn'])}, whose draws are not "
                    "reparameterised: TraceMeanField_ELBO would return gradients without it. Use a distribution "
                    "with rsample (Normal, LogNormal, Beta, ...), or elbo=Trace_ELBO()."
                )
    _check_draws(program, cells)


def warn_of_unlearned(program: MultiVIProgram) -> None:
    """Name parameters of a modeler's own program that a backward pass did not reach, in a UserWarning."""
    if type(program) is MultiVIProgram:
        return
    learning = {name: parameter for name, parameter in program.named_parameters() if parameter.requires_grad}
    missed = [name for name, parameter in learning.items() if parameter.grad is None]
    if missed:
        shown = ", ".join(map(repr, missed[:5])) + (f" and {len(missed) - 5} more" if len(missed) > 5 else "")
        caution(
            f"Parameters of {type(program).__name__} that got no gradient from the first minibatch, and stay as they "
            f"are: {shown}. A parameter learns if the model or the guide computes with it, not with a copy of its "
            "values (.data, .detach(), torch.tensor(...)). If it is not meant to learn, say so: "
            "requires_grad_(False).",
        )


def _trace(role: str, statements: Callable[[Cells], None], cells: Cells) -> Trace:
    try:
        return poutine.trace(statements).get_trace(cells)
    except (RuntimeError, ValueError) as error:
        misfit, twice = _MISFIT.search(str(error)), _TWICE.search(str(error))
        if twice is not None:
            raise ContractError(_twice(role, twice["site"])) from error
        if misfit is None:
            raise
        raise ContractError(
            f"Site {misfit['site']!r} of the {role} has a batch shape that ends in {misfit['n']} inside the plate "
            f"{misfit['plate']!r} of {len(cells)} cells: expected ({len(cells)},), one distribution per cell. A "
            "vector of each cell is one event: add .to_event(1)."
        ) from error


def _twice(role: str, name: str) -> str:
    if name == CELLS:
        return (
            f"The {role} enters the plate {CELLS!r} twice: expected once. Draw a latent of each cell in a method that "
            f"{role}(cells) calls inside its plate, as expression(z, s) of the model or guide_extra(cells, s) of the "
            f"guide, or write {role} anew with all statements in one plate."
        )
    return (
        f"Site {name!r} is in the {role} twice: expected one statement of that name. A method that is called more than "
        "once must not draw; keep what was drawn for as long as the call of the model or guide lasts."
    )


def _check_draws(program: MultiVIProgram, cells: Cells) -> None:
    """Run both for several draws of the posterior, as calibration, estimates and tests do after training."""
    guide: Trace | None = None
    for role, statements in (("guide", program.guide), ("model", program.model)):
        try:
            # The plate lies inside the replay: a handler that gives values hides sites from plates around it.
            drawn = pyro.plate("draws", _N_DRAWS, dim=-2)(statements)
            drawn = drawn if guide is None else poutine.replay(drawn, trace=guide)
            with evaluation_mode(program), pyro.get_param_store().scope():
                guide = poutine.trace(drawn).get_trace(cells)
        except (IndexError, RuntimeError, ValueError) as error:
            raise ContractError(
                f"The {role} of {type(program).__name__} does not accept several draws of the posterior, which "
                f"estimates, tests and the calibration after training make: {str(error).partition(chr(10))[0]}. Draws "
                "add dimensions on the left: z is (S, B, K), another latent of each cell (S, B, ...), and one that all "
                "cells share (S, 1, ...). Count dimensions from the right (z[..., 0], cat(..., -1)), and widen what "
                "has no draws: s.expand(*z.shape[:-1], -1)."
            ) from error


def _check_params(role: str, trace: Trace, program: MultiVIProgram) -> None:
    own = {id(parameter) for parameter in program.parameters()}
    for name, site in trace.nodes.items():
        if site["type"] == "param" and id(getattr(site["value"], "unconstrained", object)()) not in own:
            raise ContractError(
                f"Parameter {name!r} of the {role} comes from pyro.param or pyro.module: it lives in Pyro's global "
                "store, and train() and save() know the parameters of the program alone. Make it an nn.Parameter, or a "
                f"module, that __init__ sets as an attribute of {type(program).__name__}."
            )


def _latents(trace: Trace) -> dict[str, Any]:
    return {
        name: site
        for name, site in random_sites(trace).items()
        if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }


def _check_enumerated(latents: dict[str, Any], guided: dict[str, Any]) -> None:
    for name, site in latents.items():
        if name not in guided and site["infer"].get("enumerate"):
            raise ContractError(
                f"Site {name!r} of the model is enumerated, and the guide, of {_names(guided)}, does not draw it: "
                "the loss sums it out, but estimates, replicates and tests would draw it from its prior, whatever the "
                "counts say. Sum it out in the model (dist.MixtureSameFamily), or draw it in the guide as well, with "
                "infer={'enumerate': 'parallel'} there if elbo=TraceEnum_ELBO(max_plate_nesting=1)."
            )


def _check_own_statements(program: MultiVIProgram, latents: dict[str, Any], guided: dict[str, Any]) -> None:
    """Refuse an override of one hook that leaves out what the other says of an extra modality."""
    hooks = (("observe_extra", "cells, z, s", latents, guided), ("guide_extra", "cells, s", guided, latents))
    for modality, (hook, arguments, here, there) in itertools.product(program.modelled_extra, hooks):
        missing = [name for name in there if name.startswith(modality.site(""))]
        is_overridden = getattr(type(program), hook) is not getattr(MultiVIProgram, hook)
        if missing and is_overridden and not any(name.startswith(modality.site("")) for name in here):
            raise ContractError(
                f"Site {missing[0]!r} is missing where {hook} of {type(program).__name__} is called: it leaves out the "
                f"statements of {modality.name}. Call super().{hook}({arguments}) in it."
            )


def _check_names(latents: list[str], guided: dict[str, Any]) -> None:
    for name in latents:
        if name not in guided:
            raise ContractError(
                f"Site {name!r} of the model is a latent that the guide does not have; it has {_names(guided)}. "
                f"Expected: one statement of that name in each. Add pyro.sample({name!r}, ...) to {_HOOKS}, or "
                "observe it in the model (obs=...)."
            )
    for name in guided:
        if name not in latents:
            raise ContractError(
                f"Site {name!r} of the guide is no latent of the model, whose latents are {_names(latents)}. Expected: "
                "one statement of that name in each. Rename or delete it, or, if it is noise that helps the guide, "
                'give it infer={"is_auxiliary": True}, and no parameters to learn: Pyro\'s ELBOs count its density.'
            )


def _check_order(guided: list[str], latents: list[str], mean_field: bool) -> None:
    if mean_field and guided != latents:
        name = next(name for name, other in zip(guided, latents, strict=True) if name != other)
        raise ContractError(
            f"Site {name!r} comes in another order: the guide draws {_names(guided)}, the model {_names(latents)}. "
            "TraceMeanField_ELBO is right if both have the order of the model. Move the statement, or use "
            "elbo=Trace_ELBO()."
        )


def _check_batch(role: str, name: str, site: Any, n_cells: int) -> None:
    where, batch = f"Site {name!r} of the {role}", tuple(site["fn"].batch_shape)
    others = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != CELLS]
    if others:
        beside = (
            f" beside that of cells: expected the plate {CELLS!r} alone" if is_of_cells(site) else ": expected none"
        )
        raise ContractError(
            f"{where} lies in the plate {', '.join(map(repr, others))}{beside}, as draws of "
            "the posterior have the dimension -2. Make what belongs to one cell, or to all, one event: .to_event(...) "
            "in place of the plate."
        )
    if not is_of_cells(site):
        if batch:
            raise ContractError(
                f"{where} has batch shape {batch} outside of the plate {CELLS!r}: expected (), as all cells share it. "
                "Add .to_event(...) for what belongs to one draw, or move the statement into the plate of cells."
            )
    elif batch != (n_cells,):
        raise ContractError(
            f"{where} has batch shape {batch} inside the plate {CELLS!r}: expected ({n_cells},), one distribution per "
            "cell. A vector of each cell is one event: add .to_event(1)."
        )


def _check_observed(name: str, site: Any) -> None:
    fn, value = site["fn"], site["value"]
    batch, event = tuple(fn.batch_shape), tuple(fn.event_shape)
    if site["is_observed"] and isinstance(value, Tensor) and event and tuple(value.shape[-len(event) :]) != event:
        raise ContractError(
            f"Site {name!r} of the model is observed with shape {tuple(value.shape)}, and its distribution "
            f"{_family(fn)} has batch shape {batch} and event shape {event}: expected a value of shape "
            f"{batch + event}. Compare the number of features of the data with that of the decoder."
        )


def _check_agreement(name: str, model: Any, guide: Any) -> None:
    plates = [{frame.name for frame in site["cond_indep_stack"]} for site in (model, guide)]
    if plates[0] != plates[1]:
        raise ContractError(
            f"Site {name!r} lies in {_plates(plates[0])} in the model and in {_plates(plates[1])} in the guide: "
            f"expected the same plates. A latent of each cell belongs into guide_extra(cells, s), one that all "
            "cells share into guide_shared()."
        )
    shapes = [tuple(site["fn"].event_shape) for site in (model, guide)]
    if shapes[0] != shapes[1]:
        raise ContractError(
            f"Site {name!r} has event shape {shapes[0]} in the model and {shapes[1]} in the guide: expected the same. "
            "Compare their widths and their .to_event(...)."
        )


def _names(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"


def _plates(names: set[str]) -> str:
    return f"the plate {', '.join(map(repr, sorted(names)))}" if names else "no plate"


def _family(fn: Any) -> str:
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
