r"""Last layers of the decoders along the leading directions of their hidden layers, and what counts say of them.

For feature j the information of the counts of cell n on its logit is :math:`f_{nj} = (\partial\mu/\partial a)^2 / v`,
with :math:`\mu` and v the mean and variance of a count: exact for Poisson, negative binomial and Bernoulli counts, a
little low with zero inflation. Directions are the leading eigenvectors of :math:`\sum_n f_n h_n h_n^T` of the hidden
layers h under the prior of the weights, :math:`f_n` summed over features, so that all features share them (as in
Kronecker-factored Laplace approximations; Ritter et al. 2018). In them each feature has its own information
:math:`F_{jk} = \sum_n f_{nj} \phi_k(h_n)^2`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, measured, spread
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import Modality
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.base import CellDistribution
from pyro_multivi.posterior.engine.draws import Latents, draw_latents, model_trace
from pyro_multivi.posterior.engine.replicates import counts_of
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

# Cells that directions and information are taken from: more change the standard deviations by a few per cent. Their
# entries are bounded too, which keeps the fit within the time of an epoch.
_DIRECTION_CELLS, _MOST, _ENTRIES = 512, 4096, 2**28
_AT_ONCE = 128
# Fewer cells say nothing about a layer of 128 units.
_FEWEST = 10
# Features of a block: 2 MB for 128 cells.
_WIDTH = 4096


class LastLayer(NamedTuple):
    """Leading directions of a modality's last hidden layer, and cells that tell of its weights.

    Attributes
    ----------
    modality
        The modality.
    cells
        Positions of training cells that have it, (n,).
    share
        Number of training cells that have it over n.
    vectors, offset
        Coordinates of a hidden layer h, in units of the prior of its weights: ``h @ vectors.T + offset``, (K, H) and
        (K,). They are centred.
    """

    modality: Modality
    cells: Tensor
    share: float
    vectors: Tensor
    offset: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, train: Minibatches, modality: Modality, most: int) -> LastLayer | None:
        """Directions of a modality, ``most`` at most.

        None where fewer than ten cells were measured, where the likelihood is not one of this package given rho or p
        itself, and where rho or p is no readout of a hidden layer.
        """
        every = measured(train, modality)
        n_features = modality.n_features_in(program.config)
        index = spread(every, min(_MOST, max(_DIRECTION_CELLS, _ENTRIES // n_features)))
        if len(index) < _FEWEST:
            return None
        hidden_parts, weights = [], []
        for part in spread(index, _DIRECTION_CELLS).split(_AT_ONCE):
            decoded = Decoded.of(program, train.cut(part), modality)
            if decoded is None:
                return None
            hidden_parts.append(decoded.readout.hidden[0] * unit(program))
            weights.append(torch.stack([found.sum(1) for _, found, _ in decoded.evidence()]).sum(0))
        hidden, weight = torch.cat(hidden_parts).double(), torch.cat(weights).double()
        # Around the mean, which belongs to the intercept.
        centre = weight @ hidden / weight.sum().clamp(min=1e-12)
        centred = hidden - centre
        _, vectors = torch.linalg.eigh((centred * weight[:, None]).T @ centred)
        vectors = vectors.flip(1)[:, :most].T
        offset = -(vectors @ centre)
        dtype = hidden_parts[0].dtype
        return cls(modality, index, len(every) / len(index), (vectors * unit(program)).to(dtype), offset.to(dtype))

    def fits_buffers(self, program: MultiVIProgram) -> bool:
        """Whether the hidden layer has the width that the program's buffers are made for."""
        directions: Tensor = getattr(program, f"{self.modality.key}_weight_directions")
        return self.vectors.shape[1] == directions.shape[1] - 1

    def evidence(self, program: MultiVIProgram, train: Minibatches, *, joint: bool = False) -> Evidence:
        """Information that the counts of the cells have of each feature's weights in these directions.

        Parameters
        ----------
        joint
            Whether also that of each pair of weights.
        """
        information: list[Tensor] = []
        score: list[Tensor] = []
        weight = None
        for number, part in enumerate(self.cells.split(_AT_ONCE)):
            decoded = Decoded.of(program, train.cut(part), self.modality)
            assert decoded is not None
            weight = decoded.readout.weight
            phi = torch.nn.functional.linear(decoded.readout.hidden[0], self.vectors, self.offset)
            phi = torch.nn.functional.pad(phi, (0, 1), value=1.0) * self.share**0.5
            squares = (phi[:, :, None] * phi[:, None]).flatten(1) if joint else phi.square()
            for place, (_, found, of_cells) in enumerate(decoded.evidence()):
                sums = found.T @ squares, of_cells.T @ phi * self.share**0.5
                if not number:
                    information.append(sums[0])
                    score.append(sums[1])
                else:
                    information[place] += sums[0]
                    score[place] += sums[1]
        assert weight is not None
        fitted_fk, of_features = weight @ self.vectors.T / unit(program) ** 2, torch.cat(information)
        if not joint:
            return Evidence(of_features, torch.cat(score), fitted_fk)
        of_pairs = of_features.unflatten(1, (-1, fitted_fk.shape[1] + 1))
        return Evidence(of_pairs.diagonal(dim1=1, dim2=2), torch.cat(score), fitted_fk, of_pairs)


class Evidence(NamedTuple):
    """Information that counts have of the weights of F features in K directions and of their intercepts.

    Attributes
    ----------
    information_fr, score_fr
        Information of the counts, and gradient of their log-likelihood at the fitted weights, (F, K + 1); the last is
        that of the intercept.
    fitted_fk
        Weights in units of their prior, without the intercept, (F, K).
    joint_frr
        Information of each pair of weights, (F, K + 1, K + 1), where it was asked for.
    """

    information_fr: Tensor
    score_fr: Tensor
    fitted_fk: Tensor
    joint_frr: Tensor | None = None

    def of_slopes(self) -> tuple[Tensor, Tensor]:
        """Information of the weights, and that times the weights for which the counts are likeliest, (F, K) each."""
        information_fk = self.information_fr[:, :-1]
        return information_fk, information_fk * self.fitted_fk + self.score_fr[:, :-1]


def unit(program: MultiVIProgram) -> float:
    """Standard deviation of a weight under a unit prior: that of H weights together is 1."""
    return float(program.config.hidden**-0.5)


class Decoded(NamedTuple):
    """A modality in B cells that have it, at some latents: last layer, distribution of counts, counts."""

    readout: Readout
    name: str
    fn: CellDistribution
    counts: Tensor
    counted: Panels | None

    @classmethod
    def of(
        cls, program: MultiVIProgram, cells: Cells, modality: Modality, latents: Latents | None = None
    ) -> Decoded | None:
        """Decode some cells, by default at a draw of their latents.

        None where the last layer of the decoder, or the likelihood, is unknown, as in a model of one's own that lacks
        a site, or whose likelihood is given something else than what the layer decodes.
        """
        with evaluation_mode(program):
            latents = draw_latents(program, cells) if latents is None else latents
            nodes: dict[str, Any] = dict(model_trace(program.model, cells, latents).nodes)
        name = modality.decoded
        if not {name, modality.counts} <= nodes.keys():
            return None
        readout, fn = nodes[name]["value"], nodes[modality.counts]["fn"]
        # A likelihood of something made of rho or p, such as its mixture with a background, has other derivatives.
        is_own = isinstance(fn, CellDistribution) and getattr(fn, name, None) is readout
        if not (isinstance(readout, Readout) and is_own):
            return None
        return cls(readout, name, fn, counts_of(program, cells, modality.counts)[0], modality.panels_in(cells))

    def evidence(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of features: information and score of the counts of each cell on the logit of each, (B, W)."""
        for features, fn in self.fn.blocks(_WIDTH):
            values, mean = getattr(fn, self.name), fn.mean
            # Of log rho or log p: the count's mean is proportional to it.
            slope = -(-values).expm1() / values.clamp(min=1e-12) if self.readout.link == "softplus" else 1 - values
            slope = mean * slope
            relative = slope / fn.variance.clamp(min=1e-12)
            if self.counted is not None:
                relative = relative * self.counted.measured[self.counted.code][:, features]
            yield features, (relative * slope)[0], (relative * (self.counts[:, features] - mean))[0]
