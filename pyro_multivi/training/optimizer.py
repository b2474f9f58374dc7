"""The optimiser, and the priors on weights that it applies."""

from __future__ import annotations

import copy
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from pyro_multivi.data.loader import Minibatches, measured, never_measured
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, Modality
from pyro_multivi.networks.decoders import with_intercepts
from pyro_multivi.networks.encoders import SharedFirstLayer
from pyro_multivi.networks.extra.modality import ExtraModality
from pyro_multivi.networks.layers import CovariateStack
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training.options import FitOptions

#: Beginnings of the names of a modality's parameters.
_OWN = {
    RNA: ("rna_", "library_head.", "expression_decoder.", "log_theta"),
    ATAC: ("atac_", "cell_factor_", "accessibility_decoder.", "region_"),
}


def loadings(program: MultiVIProgram) -> dict[str, nn.Parameter]:
    """Weights of the decoders' last layers by name: the effect of each hidden unit on each feature.

    Examples
    --------
    >>> from pyro_multivi import ProgramConfig
    >>> list(loadings(MultiVIProgram(ProgramConfig(n_genes=3, n_regions=4, gene_likelihood="nb"))))
    ['expression_decoder.rho.weight', 'accessibility_decoder.p.weight']
    """
    last = {f"{layer}.weight" for modality in MODALITIES for layer in _last_layers(modality)}
    return {name: parameter for name, parameter in program.named_parameters() if name in last}


def _last_layers(modality: Modality) -> list[str]:
    return [f"{modality.name}_decoder.{layer}" for layer in (modality.decoded, "pi", "theta")]


class UnreachedWeights:
    """Weights that no training cell reaches: of a modality that none has, or of batches and categories that none is of.

    Adam's steps do not depend on the size of a gradient, so that weight decay alone would soon take such weights to 0:
    those of a model that knew the modality or the batch, as the reference of a query does. They stay as they are,
    unless a program of one's own has gradients of them all the same. So do the decoders' last weights of a feature that
    no cell measured, which expression would move by its sum over all genes, and those of such proteins. So does what is
    frozen of last weights of which a part is trained, the intercepts of a query's batches: their prior is of the whole.

    Parameters
    ----------
    program, train
        The program in training, and all cells that it is trained on.
    """

    def __init__(self, program: MultiVIProgram, train: Minibatches) -> None:
        named = [(name, parameter) for name, parameter in program.named_parameters() if parameter.requires_grad]
        absent = [prefix for each, own in _OWN.items() if not len(measured(train, each)) for prefix in own]
        for extra in program.modelled_extra:
            if not bool(extra.measurement(train.table).measured[train.index].any()):
                absent.append(f"extra.{extra.name.replace('.', '_')}.")
        self._whole = [parameter for name, parameter in named if name.startswith(tuple(absent))]
        trained = {id(parameter) for _, parameter in named}
        width = train.table.design.shape[1]
        [columns] = torch.where(~train.table.design[train.index].any(0))
        # And an axis, and positions on it, (k,): the last columns are those of the design.
        self._parts = [
            (weight, 1, weight.shape[1] - width + columns.to(weight.device))
            for module in (program.modules() if len(columns) else ())
            for weight in _design_weights(module, width)
            if id(weight) in trained
        ]
        for modality, layer, n in with_intercepts(program):
            # Of batches that lack the modality as well: those of a query start at the average of the reference's.
            batches = (~train.table.design[measured(train, modality), :n].any(0)).nonzero().squeeze(1)
            if len(batches) and id(layer.weight) in trained:
                self._parts.append((layer.weight, 1, (layer.in_features - n + batches).to(layer.weight.device)))
        for name, weight in loadings(program).items():
            if name in program.partly_trained:
                axis, places = program.partly_trained[name]
                frozen = torch.ones(weight.shape[axis], dtype=torch.bool)
                frozen[places] = False
                self._parts.append((weight, axis, frozen.nonzero().squeeze(1).to(weight.device)))
        for extra in program.modelled_extra:
            self._parts += _of_missing(extra, train, trained)

        features = {each: never_measured(train, each) for each in MODALITIES}
        # Weights and positions of their rows, (f,).
        self._rows = [
            (parameter, features[each].to(parameter.device))
            for each in MODALITIES
            for name, parameter in (named if len(features[each]) else ())
            if name.rpartition(".")[0] in _last_layers(each)
        ]

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer take a step of all others."""
        for parameter in self._whole:
            if parameter.grad is not None and not bool(parameter.grad.any()):
                parameter.grad = None
        kept = [
            (weight, axis, at, weight.index_select(axis, at), weight.grad.index_select(axis, at).any(1 - axis, True))
            for weight, axis, at in self._parts
            if weight.grad is not None
        ]
        rows = [(parameter, at, parameter[at]) for parameter, at in self._rows]
        optimizer.step()
        for parameter, at, values in rows:
            parameter[at] = values
        for weight, axis, at, values, is_reached in kept:
            weight.index_copy_(axis, at, torch.where(is_reached, weight.index_select(axis, at), values))


def _design_weights(module: nn.Module, width: int) -> list[Tensor]:
    """Weights of a module itself whose last columns are those of the design, of this width."""
    layers: list[tuple[nn.Module | None, int]] = []
    if isinstance(module, CovariateStack):
        layers = list(zip(module.linear, module.n_injected, strict=True))
    elif isinstance(module, SharedFirstLayer) and module.covariates is not None:
        layers = [(module.covariates, module.covariates.in_features)]
    return [layer.weight for layer, n in layers if n == width and isinstance(layer, nn.Linear)]


def _of_missing(extra: ExtraModality, train: Minibatches, trained: Container[int]) -> list[tuple[Tensor, int, Tensor]]:
    """Weights of an extra modality, an axis of its features, and those on it that no training cell measured, (k,)."""
    values, measured = extra.measurement(train.table)
    known = values[train.index[measured[train.index]]]
    [missing] = torch.where(known.isnan().all(0))
    n = known.shape[1]
    if not len(known) or not len(missing):
        return []
    missing = missing.cpu()
    return [
        # Networks may give several numbers for each feature, one kind behind the other. A hidden layer of a multiple of
        # n units is taken for such, without effect: weights that a gradient reaches are trained.
        (weight, axis, (missing + n * torch.arange(size // n)[:, None]).flatten().to(weight.device))
        for weight in extra.parameters()
        if id(weight) in trained and weight.dim() == 2
        for axis, size in enumerate(weight.shape)
        if size % n == 0
    ]


def make_optimizer(
    program: MultiVIProgram, n_train: int, options: FitOptions, state: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    r"""Adam with a Normal prior on loadings.

    A prior :math:`w \sim \mathrm{Normal}(0, \sigma^2 / H)` of the loadings of H hidden units adds
    :math:`w H / (\sigma^2 N)` to the gradient of the loss per cell, N the number of training cells. Adam
    applies it as weight decay, at no cost. It matters where the data say little: Adam's steps do not depend on
    the size of a gradient, so without it the loadings of a rare feature grow as fast as those of a common
    one, from noise. So it is with the intercepts of a query's batch, the only part of its last layers that is trained
    (:class:`UnreachedWeights` keeps the rest).

    Weight decay is of the other weight matrices. Biases, dispersions and region factors have none: it would pull them
    away from the data's marginals.

    Parameters
    ----------
    n_train
        Number N of training cells.
    options
        Options of training. ``effect_sd`` is :math:`\sigma`, about how far cells differ in the logit of a feature
        before any data are seen, whatever the width; None for a flat prior.
    state
        Moments to go on from.
    """
    sd = options.effect_sd
    last = loadings(program)
    chosen = {id(parameter) for parameter in last.values()}
    weights: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in program.named_parameters():
        if parameter.requires_grad and id(parameter) not in chosen:
            # Decay would also change those parts of a weight that are not trained.
            decays = name.endswith("weight") and name not in program.partly_trained
            (weights if decays else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in last.values() if parameter.requires_grad],
            "weight_decay": 0.0 if sd is None else program.config.hidden / (sd**2 * max(n_train, 1)),
        },
        {"params": weights, "weight_decay": options.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.Adam(groups, lr=options.lr, eps=options.eps, fused=True)
    if state is not None:
        # A copy: a run that diverges must not change the moments that the caller keeps.
        optimizer.load_state_dict(copy.deepcopy(state))
        for group, wanted in zip(optimizer.param_groups, groups, strict=True):
            group.update(lr=options.lr, eps=options.eps, weight_decay=wanted["weight_decay"])
    return optimizer
