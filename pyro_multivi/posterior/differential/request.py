"""Options of a differential test: declared once, and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from pyro_multivi.data.checks import check_number, shown
from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.posterior.differential.effect import Change

#: Default of ``delta`` on each scale of a modality: log2 units, or probability.
DEFAULT_DELTA: dict[AnyModality, dict[str, float]] = {
    RNA: {"log-fold": 0.25},
    ATAC: {"difference": 0.05, "log-fold": 0.25, "log-odds": 0.5},
}
_CHOICES = {
    "mode": ("change", "vanilla"),
    "test_mode": ("two", "three"),
    "unit": ("group", "cell"),
    "weights": ("uniform", "importance"),
    "probability": ("detected", "accessible"),
}


@dataclass(frozen=True, kw_only=True)
class DifferentialRequest:
    """Options of a differential test, with the names and the meaning that the methods of the model give them.

    Properties hold what follows from several options, or from one that may be left to its default.

    Attributes
    ----------
    modality
        The modality that is compared.
    features
        Positions of the features to report, (k,), int64; None for all.
    batch_correction
        None: where the groups lie unevenly over the batches.
    batchid1, batchid2
        Codes of the batches in which the groups are decoded.

    Raises
    ------
    ValueError
        If an option is out of range, misspelt, or contradicts another.
    """

    modality: AnyModality
    features: Tensor | None
    mode: str
    delta: float | str | None
    batch_size: int
    all_stats: bool
    batch_correction: bool | None
    batchid1: tuple[int, ...] | None
    batchid2: tuple[int, ...] | None
    fdr_target: float
    pseudocounts: float | None
    unit: str
    calibrated: bool | None
    test_mode: str
    change_fn: str | Callable[..., Any]
    m1_domain_fn: Callable[[Any], Any] | None
    cred_interval_lvls: Sequence[float] | float | None
    n_samples: int
    n_samples_overall: int | None
    use_permutation: bool
    m_permutation: int
    threshold_counts: float
    weights: str
    seed: int
    # Of accessibility only.
    two_sided: bool = True
    probability: str = "accessible"

    @classmethod
    def from_arguments(
        cls, modality: AnyModality, spec: DataSpec, features: Tensor | None, arguments: Mapping[str, Any]
    ) -> DifferentialRequest:
        """Take the options out of all arguments of a method, by name; batches may be given by name or position."""
        options = {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}
        for name in ("batchid1", "batchid2"):
            options[name] = spec.batch_codes(name, options[name])
        return cls(modality=modality, features=features, **options)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name}={shown(value)} is not allowed: choose {' or '.join(map(repr, known))}.")
        self._check_change()
        if self.modality == ATAC and not self.modality.binary and self.probability == "accessible":
            raise ValueError(
                "probability='accessible' compares p, of which counts of fragments tell only its product with the rate "
                "of the region: leave it out, to compare fragments."
            )
        for name in ("pseudocounts", "threshold_counts"):
            number = getattr(self, name)
            if number is not None and not check_number(name, number) >= 0:
                raise ValueError(f"{name}={number!r} is not allowed: give a number of at least 0.")
        if not 0 < check_number("fdr_target", self.fdr_target) < 1:
            raise ValueError(
                f"fdr_target={self.fdr_target!r} is not allowed: give a rate between 0 and 1, such as 0.05."
            )
        for level in self.levels:
            if not 0 < check_number("cred_interval_lvls", level) < 1:
                raise ValueError(f"cred_interval_lvls holds {level!r}: give probabilities such as 0.9.")
        if self.unit == "cell" and self.calibrated:
            raise ValueError("calibrated=True is of means of groups: choose unit='group', or leave it out.")
        if self.unit == "group" and self.use_permutation:
            raise ValueError("use_permutation=True pairs cells anew: choose unit='cell', or leave it out.")
        if self.n_draws < 2:
            raise ValueError(f"n_samples={self.n_draws} is not allowed: a test needs at least 2 draws.")
        for name in ("batchid1", "batchid2"):
            if getattr(self, name) is not None and self.batch_correction is False:
                raise ValueError(
                    f"{name} is given and batch_correction=False: set batch_correction=True, or leave it out."
                )
        most = max(len(batches or ()) for batches in self.batches)
        if most > self.n_draws:
            raise ValueError(f"n_samples={self.n_draws} is fewer than the {most} batches named: give more draws.")

    def _check_change(self) -> None:
        if self.change.name == "log-odds" and not self.modality.binary:
            raise ValueError(
                f"change_fn='log-odds' compares probabilities: for counts of {self.modality.name} choose 'log-fold'."
            )
        if self.m1_domain_fn is not None and not callable(self.m1_domain_fn):
            raise ValueError(f"m1_domain_fn={self.m1_domain_fn!r} is not a function of draws of the change.")
        if isinstance(self.delta, str) and self.delta == "default":
            needed = self.mode == "change" and self.m1_domain_fn is None
            if needed and self.change.name not in self.default_delta:
                raise ValueError(
                    f"change_fn={self.change.name!r} has no default bound: give delta on its scale, or None."
                )
        elif self.delta is not None and not check_number("delta", self.delta) > 0:
            raise ValueError(f"delta={self.delta!r} is not allowed: give a change above 0, or None to estimate it.")

    @cached_property
    def change(self) -> Change:
        """Scale of the change."""
        return Change.of(self.change_fn)

    @property
    def default_delta(self) -> dict[str, float]:
        """Default of ``delta`` on each scale; an extra modality has those of expression."""
        return DEFAULT_DELTA[self.modality if self.modality in DEFAULT_DELTA else RNA]

    @property
    def bound(self) -> float | None:
        """``delta`` as a number: None if it is to be estimated, NaN where no change is compared with a bound."""
        if self.mode == "vanilla":
            return np.nan
        if isinstance(self.delta, str):
            return self.default_delta.get(self.change.name, np.nan)
        return None if self.delta is None else check_number("delta", self.delta)

    @property
    def levels(self) -> tuple[float, ...]:
        """Probabilities of the credible intervals."""
        given = self.cred_interval_lvls
        return () if given is None else tuple(np.atleast_1d(np.asarray(given, dtype=object)).tolist())

    @property
    def corrects_by_counts(self) -> bool:
        """Whether means are corrected by counts and changes shrunk: ``calibrated``, or its default."""
        return self.unit == "group" if self.calibrated is None else self.calibrated

    @property
    def n_draws(self) -> int:
        """Posterior draws of each group."""
        return self.n_samples if self.n_samples_overall is None else self.n_samples_overall

    @property
    def n_pairs(self) -> int | None:
        """Pairs drawn anew at random from the draws; None pairs each draw once."""
        return int(self.m_permutation) if self.use_permutation else None

    @property
    def batches(self) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Batches in which each group is decoded, if any are named; those of one group are those of both."""
        return self.batchid1 or self.batchid2, self.batchid2 or self.batchid1
