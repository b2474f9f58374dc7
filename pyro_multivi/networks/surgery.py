"""Architecture surgery: new batches and categories of covariates in a trained program.

The design s of a program gets columns for them, which start at the average of the known ones: a new batch is decoded as
an average batch before anything is learned of it. Everything else is that of the reference, and only the new columns
are trained unless more is chosen (scArches, Lotfollahi et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.networks.decoders import with_intercepts
from pyro_multivi.networks.extra.modality import ExtraModality
from pyro_multivi.networks.layers import BatchNorm

# Ending of buffers with directions of a layer's input: the last column is that of the intercept.
_INTERCEPT_LAST = "weight_directions"
# The last layers that some of them are of.
_LAYER_OF = {
    f"{modality.key}_{_INTERCEPT_LAST}": f"{modality.name}_decoder.{modality.decoded}.weight" for modality in MODALITIES
}
# Tensors whose batches come after something else.
_BATCHES_LAST = {*_LAYER_OF.values(), *(f"{modality.key}_depth_regression" for modality in MODALITIES)}
#: Networks by the words of the arguments ``freeze_batchnorm_encoder`` and ``freeze_batchnorm_decoder``.
_NETWORKS = {
    "encoder": tuple(
        f"{each.key}_{part}." for each in MODALITIES for part in ("first_layer", "expert", "alone_expert")
    ),
    "decoder": tuple(f"{each.name}_decoder." for each in MODALITIES),
}


class Axis(NamedTuple):
    """Columns of a grown axis.

    Attributes
    ----------
    sources
        For each column the old ones of which it is the average; itself alone if it was there.
    new
        Positions of those that were not there.
    """

    sources: list[list[int]]
    new: list[int]

    def after(self, n: int) -> Axis:
        """Axis with ``n`` known columns in front of these."""
        sources = [[place] for place in range(n)] + [[n + place for place in each] for each in self.sources]
        return Axis(sources, [n + place for place in self.new])


@dataclass(frozen=True)
class Growth:
    """Design and batches of a grown program in terms of those of the old one.

    Attributes
    ----------
    design, batches
        Columns of the design, and the batches.
    n_design, n_batch
        Their old numbers.
    """

    design: Axis
    batches: Axis
    n_design: int
    n_batch: int

    @classmethod
    def of(cls, old: Sequence[Sequence[str]], new: Sequence[Sequence[str]], n_continuous: int) -> Growth:
        """Growth of categories, those of the batch first; known ones keep their places before the new ones.

        Examples
        --------
        >>> Growth.of([["a", "b"], ["x"]], [["a", "b", "c"], ["x"]], n_continuous=1).design
        Axis(sources=[[0], [1], [0, 1], [2], [3]], new=[2])
        """
        sources: list[list[int]] = []
        added: list[int] = []
        first = 0
        for known, names in zip(old, new, strict=True):
            every = list(range(first, first + len(known)))
            added += range(len(sources) + len(known), len(sources) + len(names))
            sources += [[first + place] if place < len(known) else every for place in range(len(names))]
            first += len(known)
        sources += [[first + place] for place in range(n_continuous)]
        n_batch = len(new[0])
        batches = Axis(sources[:n_batch], [place for place in added if place < n_batch])
        return cls(Axis(sources, added), batches, first + n_continuous, len(old[0]))

    def state(
        self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], wider: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Parts]:
        """State of the grown program, and the new parts of its tensors.

        Parameters
        ----------
        old, new
            States of the old program, after :func:`add_intercepts`, and of a new one of the grown size.
        wider
            State of a program with the grown design and the old batches, which tells axes of the design from those of
            batches alone. Without, a longer axis than that of the batches is taken for one of the design.

        Raises
        ------
        ValueError
            If a tensor of a custom program is new, or has grown by something else than batches or columns of the
            design.
        """
        state: dict[str, Tensor] = {}
        parts: Parts = {}
        for name, wanted in new.items():
            if name not in old:
                raise ValueError(
                    f"Tensor {name!r} is not in the reference, and is {tuple(wanted.shape)} with the query's batches. "
                    "A module for each batch does not grow; one parameter does whose first or "
                    "last axis is n_batch of the program's config."
                )
            value = old[name].detach().to(wanted.device)
            state[name] = value.clone()
            changed = [axis for axis, (n, m) in enumerate(zip(value.shape, wanted.shape, strict=True)) if n != m]
            if changed:
                place = changed[0]
                of_batches = None if wider is None else wider[name].shape[place] == value.shape[place]
                sizes = value.shape[place], wanted.shape[place]
                axis = self._axis(name, *sizes, of_batches) if len(changed) == 1 else None
                if axis is None:
                    raise ValueError(
                        f"Tensor {name!r} is {tuple(value.shape)} in the reference and {tuple(wanted.shape)} with the "
                        "query's batches. Neither is n_batch nor n_covariates of the program's config its last part: "
                        "this program cannot be mapped onto."
                    )
                columns = [value[(slice(None),) * place + (each,)].mean(place, keepdim=True) for each in axis.sources]
                state[name] = torch.cat(columns, place)
                parts[name] = (place, axis.new)
        return state, parts

    def _axis(self, name: str, old: int, new: int, of_batches: bool | None) -> Axis | None:
        """The axis that has grown from a length to another: hidden units, if any, and behind them batches or design."""
        if name.endswith(_INTERCEPT_LAST):
            # As those of the layer's weights, and one behind them.
            grown = self._axis(_LAYER_OF.get(name, ""), old - 1, new - 1, of_batches)
            return None if grown is None else Axis([*grown.sources, [old - 1]], grown.new)
        if of_batches is None:
            # A custom last layer may see the design, which has grown where there is no new batch.
            of_batches = name in _BATCHES_LAST and bool(self.batches.new)
        if of_batches or old == self.n_batch:
            before, axis = old - self.n_batch, self.batches
        else:
            before, axis = old - self.n_design, self.design
        return axis.after(before) if before >= 0 and before + len(axis.sources) == new else None


def add_intercepts(state: dict[str, Tensor], program: nn.Module, n_batch: int, prefix: str = "") -> None:
    """Give last layers of a state intercepts of its batches, at zero, where it has none and the program has.

    A program of one batch has none, nor had those of several before version 0.2.

    Parameters
    ----------
    n_batch
        Number of batches of the state.
    prefix
        Beginning of the names in it.
    """
    for modality, layer, n_intercepts in with_intercepts(program):
        directions = f"{modality.key}_{_INTERCEPT_LAST}"
        name, directions = prefix + _LAYER_OF[directions], prefix + directions
        weight, known = state.get(name), state.get(directions)
        if weight is not None and weight.shape[1] == layer.in_features - n_intercepts:
            state[name] = pad(weight, (0, n_batch))
            if known is not None:
                state[directions] = torch.cat([pad(known[:, :-1], (0, n_batch)), known[:, -1:]], 1)


#: Trained parts of parameters by name: axis and positions, or None for all of it.
Parts = dict[str, "tuple[int, list[int]] | None"]


@dataclass(frozen=True)
class Training:
    """Parts of a grown program that are trained.

    Attributes
    ----------
    parts
        Trained parameters.
    dropout
        Whether dropout is used in training.
    batch_norm
        Networks, "encoder" or "decoder", whose batch normalisation follows the cells of training.
    """

    parts: Parts
    dropout: bool = True
    batch_norm: tuple[str, ...] = ()

    @classmethod
    def chosen(
        cls,
        program: nn.Module,
        new: Parts,
        *,
        unfrozen: bool,
        freeze_dropout: bool,
        freeze_expression: bool,
        freeze_decoder_first_layer: bool,
        freeze_batchnorm_encoder: bool,
        freeze_batchnorm_decoder: bool,
    ) -> Training:
        """The new parts and what scvi-tools' arguments of these names choose beside them."""
        names = [name for name, _ in program.named_parameters()]
        if unfrozen:
            return cls(dict.fromkeys(names), batch_norm=tuple(_NETWORKS))
        norms = {"encoder": not freeze_batchnorm_encoder, "decoder": not freeze_batchnorm_decoder}
        extra = [name for name, module in program.named_modules() if isinstance(module, ExtraModality)]
        whole: list[str] = []
        if not freeze_expression:
            whole += [f"{each.key}_first_layer." for each in MODALITIES] + [f"{name}.first_layer." for name in extra]
        if not freeze_decoder_first_layer:
            stacks = [f"{name}stack" for name in _NETWORKS["decoder"]] + [f"{name}.decoder" for name in extra]
            whole += [f"{stack}.linear.0." for stack in stacks]
        normalisations = _normalisations(program)
        whole += [module for network, module in normalisations if norms[network]]
        # Some lie in the first layers.
        kept = tuple(module for network, module in normalisations if not norms[network])
        parts: Parts = {name: part for name, part in new.items() if name in names}
        parts.update({name: None for name in names if name.startswith(tuple(whole)) and not name.startswith(kept)})
        return cls(parts, not freeze_dropout, tuple(network for network, trained in norms.items() if trained))

    @property
    def changes_encoders(self) -> bool:
        """Whether states of known cells change by it."""
        return any(part is None and not _belongs(name, "decoder") for name, part in self.parts.items())

    def apply(self, program: Any) -> None:
        """Freeze everything else in a program: its gradients are zero, and so are those of old columns."""
        for name, parameter in program.named_parameters():
            parameter.requires_grad_(self.parts.get(name, ()) != ())
        program.partly_trained = {name: part for name, part in self.parts.items() if part is not None}
        keep_columns(program)
        modules = dict(program.named_modules())
        for network, prefix in _normalisations(program):
            modules[prefix.removesuffix(".")].frozen = network not in self.batch_norm
        if not self.dropout:
            for module in modules.values():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], program: nn.Module) -> Training:
        """The inverse of :meth:`to_dict`, also after JSON, for a program that has these parameters.

        Raises
        ------
        ValueError
            If it does not fit the program.
        """
        shapes = {name: parameter.shape for name, parameter in program.named_parameters()}
        parts: Parts = {}
        for name, part in values["parts"].items():
            if name not in shapes:
                raise ValueError(f"{name} is no parameter")
            if part is not None:
                axis, places = part
                size = shapes[name][axis] if axis in range(len(shapes[name])) else 0
                if not all(type(place) is int and 0 <= place < size for place in places):
                    raise ValueError(f"{name} has no part {part}")
                part = (axis, places)
            parts[name] = part
        dropout, batch_norm = values["dropout"], tuple(values["batch_norm"])
        if not isinstance(dropout, bool) or not set(batch_norm) <= _NETWORKS.keys():
            raise ValueError("training is none that is known")
        return cls(parts, dropout, batch_norm)


def keep_columns(program: Any) -> None:
    """Make the gradients of parameters zero outside the part that is trained: ``partly_trained`` of a program."""
    for name, parameter in program.named_parameters():
        if name in program.partly_trained:
            was_trained = parameter.requires_grad
            # Torch takes no hook otherwise; it stays when the parameter is frozen again.
            parameter.requires_grad_(True).register_hook(_KeepColumns(parameter, *program.partly_trained[name]))
            parameter.requires_grad_(was_trained)


class _KeepColumns:
    """Hook that keeps the gradient of some columns; that of the others is zero."""

    def __init__(self, parameter: Tensor, axis: int, places: list[int]) -> None:
        shape = [1] * parameter.dim()
        shape[axis] = parameter.shape[axis]
        self.kept = torch.zeros(shape, dtype=torch.bool)
        self.kept.view(-1)[places] = True

    def __call__(self, grad: Tensor) -> Tensor:
        self.kept = self.kept.to(grad.device)
        return torch.where(self.kept, grad, 0.0)


def _belongs(name: str, network: str) -> bool:
    """Whether a parameter or module is one of the encoders' or of the decoders'."""
    if name.startswith("extra."):
        # Networks of extra modalities are called alike in each: extra.NAME.decoder.
        return (".decoder." in name) == (network == "decoder")
    return name.startswith(_NETWORKS[network])


def _normalisations(program: nn.Module) -> list[tuple[str, str]]:
    """Network and name, with a dot behind it, of every batch normalisation."""
    return [
        (network, f"{name}.")
        for name, module in program.named_modules()
        for network in _NETWORKS
        if isinstance(module, BatchNorm) and _belongs(name, network)
    ]
