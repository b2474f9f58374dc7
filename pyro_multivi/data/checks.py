"""Checks of a user's arguments, with errors that suggest what to do."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")

# Packages between a warning and the code of the caller.
_NOT_THE_CALLERS = frozenset({"pyro_multivi", "contextlib", "functools", "pyro", "torch"})
# Names shown in a message: enough to recognise a pattern, few enough to read.
_SHOWN = 5
# Of the names one can choose from, more: the right one should be among them.
_SHOWN_CHOICES = 12
# Of a wrong value, in characters: a number, a name or a short list as a whole.
_SHOWN_VALUE = 60

#: Whole numbers among the arguments that may be 0; all others are at least 1.
_FROM_ZERO = frozenset({
    "seed", "n_genes", "n_regions", "n_labels", "n_covariates", "n_epochs_kl_warmup", "n_steps_kl_warmup", "start",
    "least", "n_proteins", "max_epochs",
})  # fmt: skip
#: Numbers of draws, which people write as 1e3: a float that holds a whole number will do.
_DRAWS = frozenset({"n_samples", "n_samples_overall", "n_mc_samples", "n_particles", "m_permutation"})
#: Choices of some words, which the function that knows the words checks.
_CHOICES = frozenset({
    "gene_likelihood", "dispersion", "latent_distribution", "modality_weights", "modality_penalty", "use_batch_norm",
    "use_layer_norm", "accelerator", "precision", "adversarial_target", "adversarial_schedule", "modality",
    "hidden_depth", "mode", "test_mode", "unit", "weights", "probability",
})  # fmt: skip
#: What a seed, and any other whole number, may be at most: those of torch's generators, and of its shapes.
_MOST_SEED, _MOST = 2**63 - 1, 2**31 - 1


class UnknownKeyError(ValueError, KeyError):
    """A key that is not where an argument places it; scvi-tools raises a KeyError."""

    # KeyError's own shows a message in quotes.
    __str__ = Exception.__str__


class NotInModelError(ValueError, RuntimeError):
    """A result that a model has not by the choices it was made with; scvi-tools raises a RuntimeError."""


class ExternalIndexingError(ValueError, Warning):
    """Cells that ``external_indexing`` lists twice, or leaves out; scvi-tools raises a Warning."""


class FolderExistsError(FileExistsError, ValueError):
    """A folder that may not be replaced; scvi-tools raises a ValueError."""


class NoModelError(FileNotFoundError, ValueError):
    """A folder that is no saved model; scvi-tools raises a ValueError."""


def first_names(names: Iterable[object], limit: int = _SHOWN) -> str:
    """The first few names, quoted, and how many there are in all."""
    every = list(names)
    shown = ", ".join(repr(str(name)) for name in every[:limit])
    return shown if len(every) <= limit else f"{shown}, ... ({len(every)} in all)"


def nearest(name: object, known: Iterable[object]) -> str:
    """A sentence that suggests the closest known name, if one is close, and lists those known."""
    options = [str(option) for option in known]
    if not options:
        return "There are none."
    # Case is the commonest slip, and difflib counts it as a wrong letter.
    by_lower = {option.casefold(): option for option in reversed(options)}
    close = difflib.get_close_matches(str(name).casefold(), list(by_lower), n=1)
    suggestion = f"Did you mean {by_lower[close[0]]!r}? " if close else ""
    return f"{suggestion}Known: {first_names(options, _SHOWN_CHOICES)}."


def unknown_key(argument: str, key: object, where: str, known: Iterable[object]) -> UnknownKeyError:
    """The error for a key that is not where an argument places it."""
    names = list(known)
    mend = f"Its name is no text: {where}.columns = {where}.columns.astype(str)."
    alike = any(str(name) == key and not isinstance(name, str) for name in names)
    return UnknownKeyError(f"{argument}={key!r} is not in {where}. {mend if alike else nearest(key, names)}")


def check_unique(names: Any, where: str, fix: str) -> None:
    """Refuse names that are not unique, for rows and columns are found by them."""
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise ValueError(f"{where} holds names more than once: {first_names(repeated)}. Make them unique: {fix}.")


def difference_of_names(then: Sequence[str], now: Iterable[str]) -> str | None:
    """A sentence on how cells differ from those that were there before; None if they are the same in order."""
    names = list(map(str, now))
    if names == list(then):
        return None
    at = next((place for place, (one, other) in enumerate(zip(then, names, strict=False)) if one != other), None)
    sizes = f"they had {len(then)} cells and have {len(names)}" if len(then) != len(names) else None
    if at is None:
        at = min(len(then), len(names))
        where = f"up to position {at} they are the same"
    else:
        where = f"cell {then[at]!r} was at position {at}, where {names[at]!r} is now"
    reordered = "they were reordered" if sizes is None and set(names) == set(then) else None
    return f"{', '.join(part for part in (sizes or reordered or 'cells have other names', where))}."


def check_strings(names: Any, where: str) -> None:
    """Refuse names that are no strings: by numbers, positions would be mistaken for them, and NaN is equal to none."""
    # Of repeated categories each is looked at once.
    distinct = getattr(names, "categories", names)
    if names.hasnans or distinct.inferred_type not in ("string", "empty"):
        first = next((name for name in names if not isinstance(name, str)), None)
        number = sum(not isinstance(name, str) for name in names)
        mend = "give every one a name" if names.hasnans else f"make them strings: {where} = {where}.astype(str)"
        raise ValueError(f"{where} holds {number} names that are no strings, for instance {first!r}: {mend}.")


def caution(message: str) -> None:
    """Warn of a likely mistake, at the line of the caller's own code."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and shortened."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 3]}... ({type(value).__name__})"


def name_list(argument: str, value: Iterable[str] | str | None, distinct: bool = False) -> tuple[str, ...]:
    """A list of names, all of them strings; None is no name, one string is one name, a set is put in order.

    With ``distinct``, a name that is there more than once is refused.
    """
    found = unwrapped(value)
    if found is None:
        return ()
    names = tuple(found) if isinstance(found, Iterable) and not isinstance(found, (str, bytes)) else (found,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a list of strings; {shown(name)} is not a string.")
    if distinct and len(set(names)) < len(names):
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        raise ValueError(f"{argument}={shown(value)} holds {first_names(twice)} more than once: name each once.")
    return tuple(sorted(names)) if isinstance(found, (set, frozenset)) else names


def least_draws(level: float) -> int:
    """Fewest draws of which one is expected outside either end of a central interval.

    Examples
    --------
    >>> least_draws(0.9)
    20
    """
    return math.ceil(2 / (1 - level) - 1e-9)


def check_whole(argument: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``; one of draws may be held by a float."""
    return _whole(argument, unwrapped(value), least=least)


def whole_numbers(argument: str, values: Any) -> list[int]:
    """A list of whole numbers, or one of them alone."""
    found = [unwrapped(value) for value in values] if isinstance(values, Iterable) else [unwrapped(values)]
    if not found or not all(isinstance(number, int) and not isinstance(number, bool) for number in found):
        raise _refused(argument, values, "a list of whole numbers")
    return found


def check_number(
    argument: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    allowed: str = "",
) -> float:
    """A finite number, above, of at least or of at most some other if one is given; ``allowed`` ends the message."""
    found = unwrapped(value)
    numeric = isinstance(found, (int, float)) and not isinstance(found, bool)
    # Everything is computed in float32, where larger numbers are infinite.
    if not numeric or not abs(found) <= float(np.finfo(np.float32).max):
        raise _refused(argument, value, f"a finite number{allowed}")
    if above is not None and not found > above:
        raise _refused(argument, value, f"a number above {above}{allowed}")
    if least is not None and not found >= least:
        raise _refused(argument, value, f"a number of at least {least}{allowed}")
    if most is not None and not found <= most:
        raise _refused(argument, value, f"a number of at most {most}{allowed}")
    return float(found)


def check_probability(argument: str, value: Any, example: float) -> float:
    """A number above 0 and below 1; the message names an example."""
    found = check_number(argument, value)
    if not 0 < found < 1:
        raise _refused(argument, value, f"a probability such as {example}")
    return found


def check_choice(name: str, found: object, allowed: Sequence[str], kind: type[ValueError] = ValueError) -> None:
    """Refuse what is not one of some words, and name them and the nearest."""
    if not isinstance(found, str) or found not in allowed:
        near = difflib.get_close_matches(str(found), allowed, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise kind(f"{name}={shown(found)} is not allowed: choose one of {', '.join(map(repr, allowed))}.{hint}")


def check_type(argument: str, value: Any, kind: type, remedy: str = "") -> None:
    """Refuse what is no object of a class; ``remedy`` follows in the message."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be of class {kind.__name__}, got {shown(value)}{remedy}.")


def check_mapping(argument: str, value: Any, example: str) -> dict[Any, Any]:
    """A copy of a mapping; None is an empty one."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{argument}={shown(value)} is not allowed: give a dictionary such as {example}.")
    return dict(value or {})


def unwrapped(value: Any) -> Any:
    """A number or string of numpy or torch, also an array of no dimensions, as Python's own; all else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse wrong values of its plain arguments before anything else happens.

    Plain are those annotated as a number, a truth value, a string, a path or a device, or one of these or None. The
    function gets them as Python's own types: ``np.int64(3)`` as 3.

    Examples
    --------
    >>> @checked
    ... def draw(n_samples: int, level: float | None = None) -> int:
    ...     return n_samples
    >>> draw(np.int64(3))
    3
    >>> draw(3, level="high")
    Traceback (most recent call last):
    ValueError: level='high' is not allowed: give a finite number, or None.
    """
    signature = inspect.signature(function)
    plain = {name: each for name, each in signature.parameters.items() if _kind(each.annotation) in _PLAIN}

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError:
            # Python's own error names the function too.
            return function(*args, **kwargs)
        for name, parameter in plain.items():
            if name not in given.arguments:
                continue
            value = given.arguments[name]
            if value is None and name == "batch_size" and isinstance(parameter.default, int):
                # The default of scvi-tools, whose users pass it on.
                value = parameter.default
            given.arguments[name] = _check_plain(name, parameter.annotation, value)
        return function(*given.args, **given.kwargs)

    return run


def check_fields(options: Any, kind: type) -> None:
    """Refuse wrong values of the plain fields of a frozen dataclass, those of class ``kind``, as :func:`checked`."""
    for entry in fields(kind):
        if _kind(entry.type) in _PLAIN:
            value = _check_plain(entry.name, str(entry.type), getattr(options, entry.name))
            object.__setattr__(options, entry.name, value)


def _check_plain(argument: str, annotation: str, value: Any) -> Any:
    if value is None and annotation.endswith(_OR_NONE):
        return None
    check = _PLAIN[_kind(annotation)]
    return check(argument, unwrapped(value), ", or None" if annotation.endswith(_OR_NONE) else "")


def _kind(annotation: object) -> str:
    return annotation.removesuffix(_OR_NONE) if isinstance(annotation, str) else ""


def _refused(argument: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{argument}={shown(value)} is not allowed: give {allowed}.")


def _whole(argument: str, value: Any, or_none: str = "", least: int | None = None) -> int:
    if argument in _DRAWS and isinstance(value, float) and value.is_integer():
        value = int(value)
    if least is None:
        least = 0 if argument in _FROM_ZERO else 1
    most = _MOST_SEED if argument == "seed" else _MOST
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _refused(argument, value, f"a whole number of at least {least}{or_none}")
    if value > most:
        raise _refused(argument, value, f"a whole number of at most {most}{or_none}")
    return int(value)


def _number(argument: str, value: Any, or_none: str) -> float:
    check_number(argument, value, allowed=or_none)
    # An integer stays one, for messages to show it as it was given.
    return value


def _truth(argument: str, value: Any, or_none: str) -> bool:
    if not isinstance(value, bool):
        raise _refused(argument, value, f"True or False{or_none}")
    return value


def _text(argument: str, value: Any, or_none: str) -> str:
    if isinstance(value, str) or argument in _CHOICES:
        return value
    remedy = ""
    several = not isinstance(value, bytes) and isinstance(value, Sequence) and all(isinstance(v, str) for v in value)
    if several and len(value) > 1 and argument in ("batch_key", "labels_key", "labels"):
        made = " + ', ' + ".join(f"obs[{name!r}].astype(str)" for name in value)
        remedy = f". For the combination of several make a column of it: obs[{'_'.join(value)!r}] = {made}"
    raise TypeError(f"{argument}={shown(value)} is not allowed: give one string{or_none}{remedy}.")


def _path(argument: str, value: Any, or_none: str) -> str | os.PathLike[str]:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text or "\0" in text:
        raise TypeError(f"{argument}={shown(value)} is not allowed: give a path, a string or pathlib.Path{or_none}.")
    if text == "~" or text.startswith(("~/", "~\\")):
        raise ValueError(
            f"{argument}={text!r} begins with '~', which Python does not replace by your home folder: give "
            f"os.path.expanduser({text!r})."
        )
    return value


def _device(argument: str, value: Any, or_none: str) -> Any:
    import torch

    if isinstance(value, str) and value == "auto":
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(value) if isinstance(value, (str, torch.device)) else None
        if device is not None and device.type != "meta":
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError):
        pass
    names = ", ".join(repr(f"cuda:{number}") for number in range(torch.cuda.device_count()))
    found = f" or {names}" if names else " (torch finds no GPU)"
    raise _refused(argument, value, f"a device of torch that is there: 'auto', 'cpu'{found}{or_none}")


_OR_NONE = " | None"
_PLAIN: dict[str, Callable[[str, Any, str], Any]] = {
    "int": _whole,
    "float": _number,
    "bool": _truth,
    "str": _text,
    "OutPath": _path,
    "str | os.PathLike[str]": _path,
    "str | torch.device": _device,
    "torch.device | str": _device,
}


def check_once(table: Any, key: str, where: str) -> None:
    """Refuse a column that is there more than once."""
    number = list(table.columns).count(key)
    if number > 1:
        raise ValueError(
            f"{where} has {number} columns called {key!r}, and which is meant cannot be known. Keep one: "
            f"{where} = {where}.loc[:, ~{where}.columns.duplicated()]."
        )
