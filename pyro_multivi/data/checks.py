"""Checks of a user's arguments, with errors that suggest what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Names shown in a message: enough to recognise a pattern, few enough to read.
_SHOWN = 5
# Of the names one can choose from, more: the right one should be among them.
_SHOWN_CHOICES = 12


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


def unknown_key(argument: str, key: object, where: str, known: Iterable[object]) -> ValueError:
    """The error for a key that is not where an argument places it."""
    return ValueError(f"{argument}={key!r} is not in {where}. {nearest(key, known)}")


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


def name_list(argument: str, value: Sequence[str] | str | None) -> tuple[str, ...]:
    """A list of names, all of them strings; None is no name and one string is one name."""
    if value is None:
        return ()
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a list of strings; {name!r} is not a string.")
    return names


def number_of_draws(n_samples: int, n_samples_overall: int | None) -> int:
    """One number of draws, at least 1, out of two names for it, which may not differ."""
    found = check_draws("n_samples", n_samples)
    if n_samples_overall is None:
        return found
    overall = check_draws("n_samples_overall", n_samples_overall)
    if found not in (1, overall):
        raise ValueError(
            f"n_samples={n_samples} and n_samples_overall={n_samples_overall} both mean the number of draws "
            "averaged: give one of them."
        )
    return overall


def least_draws(level: float) -> int:
    """Fewest draws of which one is expected outside either end of a central interval.

    Examples
    --------
    >>> least_draws(0.9)
    20
    """
    return math.ceil(2 / (1 - level) - 1e-9)


def check_draws(argument: str, value: Any, least: int = 1) -> int:
    """A number of draws: a whole number of at least ``least``, which a float may hold."""
    whole = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool) and value % 1 == 0
    if not whole or value < least:
        raise ValueError(f"{argument}={value!r} is not allowed: give a whole number of at least {least}.")
    return int(value)


def check_number(argument: str, value: Any) -> float:
    """A finite number."""
    numeric = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not numeric or not np.isfinite(value):
        raise ValueError(f"{argument}={value!r} is not a number.")
    return float(value)


def check_choice(name: str, found: object, allowed: Sequence[str]) -> None:
    """Refuse what is not one of some words, and name them and the nearest."""
    if found not in allowed:
        near = difflib.get_close_matches(str(found), allowed, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={found!r} is not allowed: choose one of {', '.join(map(repr, allowed))}.{hint}")


def check_at_least(name: str, found: object, least: int) -> None:
    """Refuse what is not an integer of at least ``least``."""
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise ValueError(f"{name}={found!r} is not a whole number of at least {least}.")
