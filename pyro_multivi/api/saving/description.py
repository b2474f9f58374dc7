"""Description of a saved model: what ``model.json`` holds, checked entry by entry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch

from pyro_multivi.api.saving.folder import DESCRIPTION, Saved, broken
from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.checks import first_names
from pyro_multivi.data.setup.spec import LATER_FIELDS, DataSpec
from pyro_multivi.data.split import NAMES, Split
from pyro_multivi.networks.modules import build_program
from pyro_multivi.program import MultiVIProgram

#: Entries beside those of the file format.
_ENTRIES = ("config", "program_class", "spec", "history", "split", "is_trained")

# Width of a network that no memory is too small for.
_WIDE = 4096


class Description(NamedTuple):
    """Everything of a model beside its tensors.

    Attributes
    ----------
    config, program_class
        Fields of the configuration, and the import path of the class.
    spec, history, split, is_trained
        As the model has them.
    minified
        Whether its data were minified.
    query
        Parts that are trained and report, of a model of a query; None for any other.
    """

    config: dict[str, Any]
    program_class: str
    spec: DataSpec
    history: list[dict[str, float]]
    split: Split | None
    is_trained: bool
    minified: bool = False
    query: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self._asdict(),
            "spec": self.spec.to_dict(),
            "split": None if self.split is None else self.split.to_dict(),
        }

    @classmethod
    def of(cls, saved: Saved, where: str) -> Description:
        """The description in a model folder, also of earlier formats.

        Raises
        ------
        BrokenModelError
            If an entry is missing or is not what it should be.
        """
        with broken(where, f"{DESCRIPTION} is damaged"):
            values = saved.description if saved.version > 1 else _with_todays_names(saved.description)
            missing = [name for name in _ENTRIES if name not in values]
            if missing:
                raise ValueError(f"{', '.join(missing)} missing")
            types = {"config": dict[str, Any], "program_class": str, "is_trained": bool, "history": list, "spec": dict}
            for name, hint in types.items():
                _check(name, values[name], hint)
            _check("minified", values.get("minified", False), bool)
            if not all(values["program_class"].partition(":")):
                raise ValueError(f"program_class is {values['program_class']!r}, not 'module:name'")
            spec = _spec(values["spec"])
            if values.get("query") is not None:
                _check("query", values["query"], dict[str, Any])
            for row in values["history"]:
                _check("history", row, dict[str, float], finite=False)
            return cls(
                config=values["config"],
                program_class=values["program_class"],
                spec=spec,
                history=values["history"],
                split=None if values["split"] is None else _split(values["split"], sum(spec.n_cells.values())),
                is_trained=values["is_trained"],
                minified=values.get("minified", False),
                query=values.get("query"),
            )

    def make_program(self, program_class: type[MultiVIProgram], state: dict[str, torch.Tensor], where: str) -> Any:
        """The program with its tensors."""
        with broken(where, f"{DESCRIPTION} is damaged"):
            config = _config(program_class.config_class, self.config)
            _check_sizes(config, self.spec)
            _check_widths(config, state)
            program = build_program(program_class, config)
        with broken(where, "the weights do not fit the model"):
            program.load_state_dict(state)
        return program


def difference_of_cells(split: Split, names: Sequence[str]) -> str:
    """Description of how cells differ from those that were split; empty if they are the same in any order."""
    known, given = set(split.cell_names), set(names)
    if not known or known == given:
        return ""
    lacking = [name for name in split.cell_names if name not in given]
    new = [name for name in names if name not in known]
    notes = [f"lacks {len(lacking)} of the {len(known)} cells of training: {first_names(lacking)}"] if lacking else []
    notes += [f"has {len(new)} cells that are not among these: {first_names(new)}"] if new else []
    return " and ".join(notes)


def _config(kind: type[ProgramConfig], values: Mapping[str, Any]) -> ProgramConfig:
    hints = get_type_hints(kind)
    unknown = values.keys() - hints.keys()
    if unknown:
        raise ValueError(f"config has {first_names(sorted(unknown))}, which {kind.__name__} has not")
    for name, value in values.items():
        _check(f"config.{name}", value, hints[name])
    return kind(**values)


def _spec(values: Mapping[str, Any]) -> DataSpec:
    hints = get_type_hints(DataSpec)
    for entry in fields(DataSpec):
        if entry.name in values or entry.name not in LATER_FIELDS:
            _check(f"spec.{entry.name}", values[entry.name], hints[entry.name])
    spec = DataSpec.from_dict(values)
    setup = spec.setup
    for name, size in spec.n_cells.items():
        if size < 0:
            raise ValueError(f"spec.n_cells.{name} is {size}")
    for name in ("gene_names", "region_names", "batch_categories", "label_categories", "continuous"):
        _check_distinct(f"spec.{name}", getattr(spec, name))
    for groups in (spec.categorical, spec.extra):
        for name, known in groups.items():
            _check_distinct(f"spec ({name})", known)
    agree = {
        "kind": setup.kind in ("anndata", "mudata"),
        "batch_categories": bool(spec.batch_categories),
        "label_categories": bool(spec.label_categories) == (setup.labels_key is not None),
        "categorical": tuple(spec.categorical) == setup.categorical_covariate_keys,
        "continuous": spec.continuous == setup.continuous_covariate_keys,
        "continuous_mean": len(spec.continuous_mean) == len(spec.continuous),
        "continuous_sd": len(spec.continuous_sd) == len(spec.continuous) and all(sd > 0 for sd in spec.continuous_sd),
        "extra": tuple(spec.extra) == setup.extra,
        "typical_size": all(0 < size < math.inf for size in spec.typical_size.values()),
        "missing_proteins": set(spec.missing_proteins) <= set(spec.batch_categories),
    }
    wrong = [name for name, fits in agree.items() if not fits]
    if wrong:
        raise ValueError(f"spec.{wrong[0]} does not fit the rest")
    return spec


def _check_sizes(config: ProgramConfig, spec: DataSpec) -> None:
    sizes = {
        "n_genes": spec.n_genes,
        "n_regions": spec.n_regions,
        "n_batch": spec.n_batch,
        "n_labels": spec.n_labels,
        "n_covariates": spec.design_width,
        "extra": {name: len(features) for name, features in spec.extra.items()},
        "proteins": spec.setup.protein_key is not None,
    }
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise ValueError(f"config.{name} is {getattr(config, name)} and spec has {size}")


def _check_widths(config: ProgramConfig, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse networks far larger than the weights before memory is taken for them."""
    widest = max(_WIDE, *(size for tensor in state.values() for size in tensor.shape), 0)
    for name, most in (
        ("hidden", widest),
        ("latent", widest),
        ("n_layers_encoder", _WIDE),
        ("n_layers_decoder", _WIDE),
    ):
        if getattr(config, name) > most:
            raise ValueError(f"config.{name} is {getattr(config, name)}, and no tensor is as large")


def _split(values: Any, n_cells: int) -> Split:
    _check("split", values, dict[str, list[Any]])
    names = values.get("cell_names", [])
    positions = [place for name, part in values.items() if name not in NAMES for place in part]
    every_name = [name for entry in NAMES for name in values.get(entry, [])]
    _check("split", positions, tuple[int, ...])
    _check("split", every_name, tuple[str, ...])
    for part in (positions, every_name):
        _check_distinct("split", part)
    split = Split.from_dict(values)
    n_cells = len(names) or n_cells
    if positions and not 0 <= min(positions) <= max(positions) < n_cells:
        raise ValueError(f"split has positions outside the {n_cells} cells")
    return split


def _check_distinct(name: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{name} holds something twice")


def _check(name: str, value: Any, hint: Any, finite: bool = True) -> None:
    if not _fits(value, hint, finite):
        shown = repr(value)
        raise ValueError(f"{name} is {shown if len(shown) < 40 else type(value).__name__}")


def _fits(value: Any, hint: Any, finite: bool) -> bool:
    """Whether a value from JSON is of a type; lists stand for tuples. Of other types than those of JSON any is."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is list:
        return isinstance(value, list)
    if kind in (Union, UnionType):
        return any(_fits(value, each, finite) for each in inner)
    if kind is tuple:
        each = inner[:1] * len(value) if isinstance(value, list) and inner[-1] is Ellipsis else inner
        return (
            isinstance(value, list) and len(value) == len(each) and all(map(_fits, value, each, [finite] * len(each)))
        )
    if kind is dict:
        return isinstance(value, dict) and all(_fits(each, inner[1], finite) for each in value.values())
    if hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (math.isfinite(value) or not finite)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, list, dict, NoneType) else True


#: Beginnings of tensors' names in format 1, and today's.
_RENAMED = {
    "rna_reader.": "rna_first_layer.",
    "atac_reader.": "atac_first_layer.",
    "rna_depth_link": "rna_depth_regression",
    "atac_depth_link": "atac_depth_regression",
}


#: Endings of tensors that today's programs do not have: of a mixture from which earlier versions imputed.
_DROPPED = ("_trust", "_mixture_weight", "_population")


def todays_names(saved: Saved) -> dict[str, torch.Tensor]:
    """Tensors of a program by the names that they have today, without those that are not used any more."""
    state = {name: part for name, part in saved.state.items() if not name.endswith(_DROPPED)}
    for old, new in _RENAMED.items() if saved.version == 1 else ():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: part for name, part in state.items()}
    return state


def _with_todays_names(description: dict[str, Any]) -> dict[str, Any]:
    """A description of format 1, in which extra modalities had another name."""
    spec = description.get("spec")
    for part in (description.get("config"), spec, spec.get("setup") if isinstance(spec, dict) else None):
        if isinstance(part, dict) and "further" in part:
            part["extra"] = part.pop("further")
    return description
