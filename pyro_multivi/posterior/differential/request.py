"""What a differential test is asked, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pyro_multivi.data.checks import check_number, number_of_draws
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.posterior.differential.effect import TEST_MODES, Change
from pyro_multivi.posterior.differential.group_draws import WEIGHTS

MODES = ("change", "vanilla")
UNITS = ("group", "cell")
#: That a region is found open in a cell of mean depth, p d r; that it is open, p.
PROBABILITIES = ("detected", "accessible")
#: Bounds that are meant if none is named, by what is compared and on which scale: 0.25 and 0.5 in
#: log2 units, five percentage points of accessibility.
DEFAULT_DELTA = {
    ("rho", "log-fold"): 0.25,
    ("p", "difference"): 0.05,
    ("p", "log-fold"): 0.25,
    ("p", "log-odds"): 0.5,
}


@dataclass(frozen=True)
class DifferentialRequest:
    """Arguments of a differential test; see the methods of the model for what they mean.

    Attributes
    ----------
    site
        ``"rho"`` for expression, ``"p"`` for accessibility.
    delta, pseudocounts
        None where they are to be estimated.
    n_pairs
        Pairs drawn anew at random from the draws; None pairs each draw once.
    probability
        For accessibility: ``"detected"`` or ``"accessible"``; of which of them changes are.
    batches1, batches2
        Batches that the groups are decoded in, if ``batch_correction``; None for those of their cells.
    features
        Positions of the features asked for; None for all.
    """

    site: str
    mode: str
    change: Change
    delta: float | None
    pseudocounts: float | None
    threshold_counts: float
    test_mode: str
    two_sided: bool
    m1_domain_fn: Callable[[Any], Any] | None
    levels: tuple[float, ...]
    unit: str
    calibrated: bool
    weights: str
    n_samples: int
    n_pairs: int | None
    probability: str
    batch_correction: bool
    batches1: tuple[int, ...] | None
    batches2: tuple[int, ...] | None
    fdr_target: float
    all_stats: bool
    features: Tensor | None
    batch_size: int
    seed: int

    @classmethod
    def of(
        cls,
        spec: DataSpec,
        site: str,
        *,
        mode: str,
        change_fn: Any,
        delta: float | str | None,
        pseudocounts: float | None,
        threshold_counts: float,
        test_mode: str,
        two_sided: bool,
        m1_domain_fn: Callable[[Any], Any] | None,
        cred_interval_lvls: Sequence[float] | float | None,
        unit: str,
        calibrated: bool | None,
        weights: str,
        n_samples: int,
        n_samples_overall: int | None,
        use_permutation: bool,
        m_permutation: int,
        probability: str,
        batch_correction: bool,
        batchid1: Any,
        batchid2: Any,
        fdr_target: float,
        all_stats: bool,
        features: Tensor | None,
        batch_size: int,
        seed: int,
    ) -> DifferentialRequest:
        """Check what an analyst gave.

        Raises
        ------
        ValueError
            If an argument is out of range, misspelt, or contradicts another.
        """
        for name, value, known in (
            ("mode", mode, MODES), ("test_mode", test_mode, TEST_MODES), ("unit", unit, UNITS),
            ("weights", weights, WEIGHTS), ("probability", probability, PROBABILITIES),
        ):  # fmt: skip
            if value not in known:
                raise ValueError(f"{name}={value!r} is not allowed: choose {' or '.join(map(repr, known))}.")
        change = Change.of(change_fn)
        if site == "rho" and change.name == "log-odds":
            raise ValueError("change_fn='log-odds' compares probabilities: for expression choose 'log-fold'.")
        bound = _bound(delta, site, change, needed=mode == "change" and m1_domain_fn is None)
        for name, number in (("pseudocounts", pseudocounts), ("threshold_counts", threshold_counts)):
            if number is not None and not check_number(name, number) >= 0:
                raise ValueError(f"{name}={number!r} is not allowed: give a number of at least 0.")
        if not 0 < check_number("fdr_target", fdr_target) < 1:
            raise ValueError(f"fdr_target={fdr_target!r} is not allowed: give a rate between 0 and 1, such as 0.05.")
        if m1_domain_fn is not None and not callable(m1_domain_fn):
            raise ValueError(f"m1_domain_fn={m1_domain_fn!r} is not a function of draws of the change.")
        if unit == "cell" and calibrated:
            raise ValueError("calibrated=True is of means of groups: choose unit='group', or leave it out.")
        if use_permutation and unit == "group":
            raise ValueError("use_permutation=True pairs cells anew: choose unit='cell', or leave it out.")
        n_draws = number_of_draws(1 if n_samples_overall is not None else n_samples, n_samples_overall)
        if n_draws < 2:
            raise ValueError(f"n_samples={n_draws} is not allowed: a test needs at least 2 draws.")
        if isinstance(m_permutation, bool) or int(m_permutation) != m_permutation or m_permutation < 1:
            raise ValueError(f"m_permutation={m_permutation!r} is not allowed: give a whole number of at least 1.")
        n_pairs = int(m_permutation) if use_permutation else None
        batches1, batches2 = _batches(spec, batch_correction, batchid1, batchid2)
        most = max(len(batches1 or ()), len(batches2 or ()))
        if most > n_draws:
            raise ValueError(f"n_samples={n_draws} is fewer than the {most} batches named: give more draws.")
        return cls(
            site=site, mode=mode, change=change, delta=bound, pseudocounts=pseudocounts,
            threshold_counts=threshold_counts, test_mode=test_mode, two_sided=two_sided, m1_domain_fn=m1_domain_fn,
            levels=_levels(cred_interval_lvls), unit=unit,
            calibrated=unit == "group" if calibrated is None else calibrated,
            weights=weights, n_samples=n_draws, n_pairs=n_pairs, probability=probability,
            batch_correction=batch_correction, batches1=batches1, batches2=batches2, fdr_target=fdr_target,
            all_stats=all_stats, features=features, batch_size=batch_size, seed=seed,
        )  # fmt: skip


def _bound(delta: float | str | None, site: str, change: Change, needed: bool) -> float | None:
    if delta is None:
        return None
    if delta == "default":
        if (site, change.name) not in DEFAULT_DELTA and needed:
            raise ValueError(f"change_fn={change.name!r} has no default bound: give delta on its scale, or None.")
        return DEFAULT_DELTA.get((site, change.name), np.nan)
    if not check_number("delta", delta) > 0:
        raise ValueError(f"delta={delta!r} is not allowed: give a change above 0, or None to estimate it.")
    return float(delta)


def _levels(given: Sequence[float] | float | None) -> tuple[float, ...]:
    if given is None:
        return ()
    levels = tuple(np.atleast_1d(np.asarray(given, dtype=object)).tolist())
    for level in levels:
        if not 0 < check_number("cred_interval_lvls", level) < 1:
            raise ValueError(f"cred_interval_lvls holds {level!r}: give probabilities such as 0.9.")
    return levels


def _batches(
    spec: DataSpec, batch_correction: bool, batchid1: Any, batchid2: Any
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    codes = []
    for name, given in (("batchid1", batchid1), ("batchid2", batchid2)):
        if given is not None and not batch_correction:
            raise ValueError(f"{name} is given and batch_correction=False: set batch_correction=True, or leave it out.")
        found = spec.batch_codes(name, given)
        codes.append(None if found is None else tuple(dict.fromkeys(found)))
    first, second = codes
    # Batches named for one group are those of both.
    return first or second, second or first
