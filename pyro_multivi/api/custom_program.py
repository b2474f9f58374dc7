"""Custom programs: their configuration, and their class on loading."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any

from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.checks import first_names, shown
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.setup.summary import modalities_together
from pyro_multivi.data.table import CellTable
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")


def configure(program_class: type[MultiVIProgram], options: Mapping[str, Any], **choices: Any) -> ProgramConfig:
    """Configuration of a program: the options that every program has, and those of its own.

    Raises
    ------
    TypeError
        If ``program_class`` is no program.
    ValueError
        If an option is not a field of its ``config_class``, is an argument of the constructor, or cannot be saved.
    """
    check_program(program_class)
    config_class = program_class.config_class
    common = {entry.name for entry in fields(ProgramConfig)}
    own = [entry.name for entry in fields(config_class) if entry.name not in common]
    for name in options:
        if name in common:
            raise ValueError(f"program_options has {name!r}, a choice of every program: set it as that argument.")
        if name not in own:
            raise ValueError(
                f"program_options has {name!r}, which is no field of {config_class.__name__}; it adds "
                f"{first_names(own) if own else 'nothing'}. A choice of your own is a field of a subclass of "
                f"ProgramConfig that {program_class.__name__} names as config_class."
            )
    config = config_class(**choices, **options)
    for name in own:
        _check_saved(config, name)
    return config


def _check_saved(config: ProgramConfig, name: str) -> None:
    """Refuse a choice that a saved model, which is JSON, would not give back as it was."""
    value = getattr(config, name)
    try:
        back = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        back = None
    if type(back) is not type(value) or repr(back) != repr(value):
        raise ValueError(
            f"{name}={shown(value)} of {type(config).__name__} is not allowed, because a saved model would not have it "
            "back: give a number, text, True or False, None, or a list or dictionary of these; a list in place of a "
            "tuple or an array (values.tolist())."
        )


def learns_together(spec: DataSpec, table: CellTable, program_class: type[MultiVIProgram]) -> bool:
    """Whether states are learned from all modalities together where nothing says so: ``fully_paired`` by default."""
    number, n_lacking = modalities_together(spec, table)
    # A guide of one's own, or that of other modalities, need not teach the encoders of one modality alone.
    of_guide = ("guide", "experts", "experts_alone", "seen", "mix")
    is_own = any(getattr(check_program(program_class), name) is not getattr(MultiVIProgram, name) for name in of_guide)
    if is_own or program_class.extra_modalities or not number or n_lacking:
        return False
    logger.info("fully_paired=True, because all %d cells have %s modalities", len(table), number)
    return True


def modelled_extra(spec: DataSpec, program_class: type[MultiVIProgram]) -> list[str]:
    """Names of the extra modalities of a model of some data: those of its program, and proteins."""
    return [*check_program(program_class).extra_modalities, *spec.setup.modelled_extra]


def check_program(program_class: object) -> type[MultiVIProgram]:
    """Refuse anything but a class of programs; return it."""
    if not (isinstance(program_class, type) and issubclass(program_class, MultiVIProgram)):
        raise TypeError(f"program_class must be a subclass of MultiVIProgram, got {shown(program_class)}.")
    return program_class


def import_path(program_class: type[MultiVIProgram]) -> str:
    """Name of a class in a saved model, ``"module:name"``.

    Examples
    --------
    >>> import_path(MultiVIProgram)
    'pyro_multivi.program:MultiVIProgram'
    """
    return f"{program_class.__module__}:{program_class.__qualname__}"


def find_program(given: type[MultiVIProgram] | str, wanted: str, where: str) -> type[MultiVIProgram]:
    """Class of a saved program. Only a class that the user names is imported, whatever the file says.

    The user gives the class or its import path, ``"module:name"``; ``wanted`` is the import path in the saved model,
    and messages begin with ``where``.

    Raises
    ------
    ValueError
        If the two differ, or there is no such class.
    """
    if not isinstance(given, str):
        check_program(given)
    named = given if isinstance(given, str) else import_path(given)
    # A class defined in a notebook or script belongs to module __main__ there, and to another one elsewhere.
    same_name = named.partition(":")[2] == wanted.partition(":")[2]
    if named != wanted and not (wanted.startswith("__main__:") and same_name):
        raise ValueError(
            f"{where} holds a program of class {wanted}, not {named}. If you trust that class, import it and give "
            f"program_class={wanted.rpartition('.')[2].rpartition(':')[2]}, or let it be imported: "
            f"program_class={wanted!r}."
        )
    found: Any = given
    if isinstance(given, str):
        module, _, name = given.partition(":")
        try:
            found = attrgetter(name)(importlib.import_module(module))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"program_class={given!r} cannot be imported ({error}). Give the class itself, or put its module where "
                "Python finds it."
            ) from error
    return check_program(found)
