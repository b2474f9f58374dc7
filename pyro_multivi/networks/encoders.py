"""Encoders: from measured counts to the arguments of the guide's distributions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.networks.layers import CountsLinear, CovariateStack, NormActivate, layer_options
from pyro_multivi.networks.panels import MissingInput

# exp of a larger number is far outside any plausible variance, and would soon overflow float32.
_MAX_LOG_VARIANCE = 20.0


class HiddenState(NamedTuple):
    """Encoder hidden state of the cells in which a modality was measured.

    Attributes
    ----------
    rows
        Positions of these cells in the minibatch, shape (b,), int64; None if they are all of it.
    hidden
        First hidden layer, shape (b, n_hidden).
    s
        Covariates given to the encoder, shape (b, n_covariates).
    log_depth
        Log of the total count, or of the number of open regions, shape (b,).
    """

    rows: Tensor | None
    hidden: Tensor
    s: Tensor
    log_depth: Tensor

    def scatter(self, values: Tensor, elsewhere: Tensor) -> Tensor:
        """Copy of ``elsewhere`` (B, ...) with ``values`` (b, ...) in the rows of the measured cells."""
        if self.rows is None:
            return values
        return elsewhere.index_copy(0, self.rows, values.to(elsewhere.dtype))


class HiddenStates(NamedTuple):
    """First hidden layer of the encoders by modality; None where the model has no features of it."""

    rna: HiddenState | None
    atac: HiddenState | None


class SharedFirstLayer(nn.Module):
    """First layer of a modality, shared by its state encoder and its depth encoder.

    One pass over the counts, by far the widest operation of an encoder, serves both. Only cells in
    which the modality was measured are encoded, so its networks never see a made-up zero.

    Parameters
    ----------
    n_covariates
        Length of s given to the encoder; 0 hides s from it.
    input_dropout_rate
        Share of a cell's non-zero features that are left out in training; the others are scaled up.
    **options
        Other arguments of :class:`~pyro_multivi.networks.layers.NormActivate`.
    """

    def __init__(
        self, n_features: int, n_hidden: int, *, n_covariates: int, input_dropout_rate: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        self.input_dropout = nn.Dropout(input_dropout_rate)
        self.counts = CountsLinear(n_features, n_hidden)
        self.covariates = nn.Linear(n_covariates, n_hidden, bias=False) if n_covariates else None
        self.after = NormActivate(n_hidden, activation=nn.LeakyReLU(), **options)

    def forward(
        self,
        counts: Tensor,
        measured: Tensor,
        s: Tensor,
        log_depth: Tensor,
        rows: Tensor | None = None,
        missing: MissingInput | None = None,
    ) -> HiddenState:
        """Encode the measured cells.

        Parameters
        ----------
        counts
            Encoder input, shape (B, n_features), sparse or dense.
        measured
            Shape (B,), bool.
        s
            Covariates, shape (B, n_covariates); ignored when the encoder does not take them.
        log_depth
            Shape (B,).
        rows
            Positions of the measured cells if they are known, shape (b,), int64, ascending; sparse counts of the
            other cells are then assumed to be empty.
        missing
            Correction for features that were not measured; None where all were.
        """
        are_known = rows is not None
        rows = measured.nonzero().squeeze(-1) if rows is None else rows
        if len(rows) == len(measured):
            rows = None
        else:
            if not isinstance(counts, SparseCounts):
                counts = counts[rows]
            else:
                counts = counts.without_empty(rows) if are_known else counts.select_rows(rows)
            s, log_depth = s[rows], log_depth[rows]
        if self.input_dropout.p and self.training:
            if isinstance(counts, SparseCounts):
                counts = counts.with_values(self.input_dropout(counts.val))
            else:
                counts = self.input_dropout(counts)
        hidden = self.counts(counts)
        if missing is not None:
            code = missing.code if rows is None else missing.code[rows]
            counted = missing.scale[code][:, None] * (hidden - self.counts.bias)
            hidden = counted + self.counts.bias + (missing.input @ self.counts.weight)[code]
        if self.covariates is None:
            s = s[..., :0]
        else:
            hidden = hidden + self.covariates(s)
        return HiddenState(rows, self.after(hidden), s, log_depth)


class NormalHead(nn.Module):
    """Expert of one modality: a diagonal Normal over the latent state, from the encoder's hidden state."""

    def __init__(
        self, n_hidden: int, n_latent: int, n_layers: int, *, n_covariates: int, inject_everywhere: bool, **options: Any
    ) -> None:
        super().__init__()
        injected = n_covariates if inject_everywhere else 0
        self.stack = CovariateStack(
            n_hidden, n_hidden, n_layers, n_covariates=injected, inject_everywhere=inject_everywhere, **options
        )
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_variance = nn.Linear(n_hidden, n_latent)

    def forward(self, encoded: HiddenState) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (b, n_latent)."""
        hidden = self.stack(encoded.hidden, encoded.s)
        scale = (0.5 * self.log_variance(hidden).clamp(max=_MAX_LOG_VARIANCE)).exp()
        return self.loc(hidden), scale


def expert_head(config: Any) -> NormalHead:
    """Expert of one modality of a program, the layers behind its first, by the program's configuration."""
    return NormalHead(
        config.hidden, config.latent, config.n_layers_encoder - 1,
        inject_everywhere=config.deeply_inject_covariates, **layer_options(config, "encoder"),
    )  # fmt: skip


class LibraryHead(nn.Module):
    """Network for the arguments of a depth variable, from the encoder's hidden state.

    The layer normalisation before it hides a cell's depth, so the head gets the log depth and only
    learns departures from it: an untrained head already returns the observed depth.

    Parameters
    ----------
    n_out
        Number of arguments; the first starts at the log depth, the others at ``start``.
    start
        Initial value of the other arguments.
    """

    def __init__(self, n_hidden: int, n_out: int, start: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(n_hidden + 1, n_hidden)
        self.out = nn.Linear(n_hidden, n_out)
        nn.init.zeros_(self.out.weight)
        with torch.no_grad():
            self.out.bias.fill_(start)
            self.out.bias[0] = 0.0

    def forward(self, encoded: HiddenState, centre: Tensor) -> Tensor:
        """Arguments, shape (b, n_out); ``centre`` is the typical log depth of the data."""
        depth = (encoded.log_depth - centre)[:, None]
        hidden = nn.functional.leaky_relu(self.hidden(torch.cat([encoded.hidden, depth], -1)))
        out: Tensor = self.out(hidden)
        return torch.cat([out[:, :1] + encoded.log_depth[:, None], out[:, 1:]], -1)
