"""Noise that belongs to a cell: the same in whatever minibatches the cells come.

Every number is a hash of the seed, the site, the cell's position in its data set, the number of
the draw and the component (a counter-based generator). So a cell's draws depend neither on ``batch_size`` nor on
the other cells, the first draws of many are those of few, and no global random state is read or moved.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pyro.distributions as dist
import torch
import torch.distributions as torchdist
from torch import Tensor

from pyro_multivi.isolation import generators_kept

# SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers that scatters neighbours.
# Its constants as signed integers, because torch has no unsigned arithmetic; products wrap.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
# Standard Normal quantiles of 16 bits.
_COARSE = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) * 2.0**-16).float()
# 52 bits and a half fit a double exactly, so that no number is 0 or 1.
_BITS = 52


@dataclass(frozen=True)
class CellNoise:
    """Noise of some cells.

    Attributes
    ----------
    index
        Position of each cell in its data set, (B,), int64.
    seed
        Any whole number.
    first
        Number of the first draw: draws 5 to 9 are those numbers of the first ten.
    """

    index: Tensor
    seed: int
    first: int = 0

    def uniform(self, site: str, n_samples: int, event_shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers in (0, 1), (S, B, *event_shape), float64.

        Examples
        --------
        >>> both, last = CellNoise(torch.tensor([4, 7]), seed=1), CellNoise(torch.tensor([7]), seed=1)
        >>> torch.equal(both.uniform("z", 3, (2,))[:, 1:], last.uniform("z", 5, (2,))[:3])
        True
        """
        bits = self._bits(site, n_samples, torch.Size(event_shape).numel())
        unit = (_shifted(bits, 64 - _BITS).double() + 0.5) * 2.0**-_BITS
        return unit.reshape(n_samples, len(self.index), *event_shape)

    def of(self, index: Tensor) -> CellNoise:
        """Noise of other things than cells, such as features, at positions (n,): shared by all cells of a draw."""
        return CellNoise(index, self.seed, self.first)

    def coarse_normal(self, site: str, n_samples: int, n_components: int) -> Tensor:
        """Standard Normal numbers, (S, B, n), float32, of 16 bits each: for sums of many, in a tenth of the time.

        Examples
        --------
        >>> CellNoise(torch.arange(1000), seed=1).coarse_normal("w", 10, 6).std().round(decimals=2)
        tensor(1.)
        """
        # Four numbers of each hash.
        bits = self._bits(site, n_samples, -(-n_components // 4)).view(torch.int16)[..., :n_components]
        return _COARSE.to(bits.device)[bits.int() + 2**15]

    def _bits(self, site: str, n_samples: int, n_components: int) -> Tensor:
        """Hashes, (S, B, n), int64."""
        device = self.index.device
        root = torch.tensor([_signed(self.seed)], device=device)
        stream = _mix(_mix(root) + zlib.crc32(site.encode()))
        cell_b = _mix(stream + self.index)
        draw_s = torch.arange(self.first, self.first + n_samples, device=device)
        draw_sb = _mix(cell_b + draw_s[:, None])
        return _mix(draw_sb[..., None] + torch.arange(n_components, device=device))

    def draw(self, site: str, fn: dist.TorchDistribution, of_cells: bool = True) -> Tensor:
        """A draw from ``fn``, whose batch shape is (S, B).

        Normals, uniforms, everything with an inverse cumulative distribution function, and
        transformations of these are drawn from this noise. Anything else is drawn by torch from a seed that the
        first cell, or the first draw, determines: such draws depend on how the cells, or the draws, are cut.

        Parameters
        ----------
        site
            Name of the site.
        fn
            Its distribution.
        of_cells
            False for what all cells share, of batch shape (S, 1): no cell may enter its seed.
        """
        if of_cells or fn.batch_shape[1:] == (1,):
            source = self if of_cells else replace(self, index=self.index.new_full((1,), -1))
            value = _from_noise(fn, lambda shape: source.uniform(site, shape[0], tuple(shape[2:])))
            if value is not None:
                return value
        device = self.index.device
        with generators_kept(device):
            torch.manual_seed(self.torch_seed(site, of_cells))
            drawn: Tensor = fn.sample()
        return drawn

    def torch_seed(self, site: str, of_cells: bool = True) -> int:
        """Seed for torch's generator, from the seed, the site and, with ``of_cells``, the first cell."""
        cell = int(self.index[0]) if of_cells and len(self.index) else -1
        root = _mix(torch.tensor([_signed(self.seed)]))
        return int(_mix(_mix(_mix(root + zlib.crc32(site.encode())) + cell) + self.first))


class MirroredNoise(CellNoise):
    """Noise of an average: the same points for every cell, each beside its mirror image (antithetic).

    Averages over an even number of draws have the mean of a Normal exactly, and differences between cells are not those
    of their noise.

    Examples
    --------
    >>> noise = MirroredNoise(torch.tensor([4, 7]), seed=1)
    >>> drawn = noise.draw("z", dist.Normal(torch.zeros(6, 2), 1.0))
    >>> torch.equal(drawn[:, 0], drawn[:, 1]), torch.allclose(drawn[0::2], -drawn[1::2])
    (True, True)
    """

    def uniform(self, site: str, n_samples: int, event_shape: tuple[int, ...] = ()) -> Tensor:
        """Numbers in (0, 1), (S, B, *event_shape), float64; those of an odd draw are 1 less those of the one before."""
        pair, end = self.first // 2, (self.first + n_samples + 1) // 2
        points = CellNoise(torch.zeros_like(self.index), self.seed, pair).uniform(site, end - pair, event_shape)
        return torch.stack([points, 1 - points], 1).flatten(0, 1)[self.first % 2 :][:n_samples]


def _from_noise(fn: torchdist.Distribution, uniform: Callable[[torch.Size], Tensor]) -> Tensor | None:
    """Draw by transforming uniform numbers, of shape ``fn.shape()``; None if there is no such transform."""
    if isinstance(fn, dist.Delta):
        return fn.v
    if isinstance(fn, (torchdist.Independent, dist.MaskedDistribution)):
        return _from_noise(fn.base_dist, uniform)
    shape = fn.batch_shape + fn.event_shape
    if isinstance(fn, torchdist.Normal):
        return fn.loc + fn.scale * _normal(uniform(shape), fn.loc)
    if isinstance(fn, torchdist.MultivariateNormal):
        unit = _normal(uniform(shape), fn.loc)
        return fn.loc + (fn.scale_tril @ unit[..., None])[..., 0]
    if isinstance(fn, torchdist.TransformedDistribution):
        base = _from_noise(fn.base_dist, uniform)
        if base is not None:
            for transform in fn.transforms:
                base = transform(base)
        return base
    try:
        like: Tensor = fn.mean
        # Rounded to float32 the largest uniform numbers are 1, whose quantile may be infinite.
        unit = uniform(shape).to(like.dtype).clamp(max=1 - torch.finfo(like.dtype).eps / 2)
        return fn.icdf(unit)
    except NotImplementedError:
        return None


def _normal(unit: Tensor, like: Tensor) -> Tensor:
    return torch.special.ndtri(unit).to(like.dtype)


def _mix(x: Tensor) -> Tensor:
    x = x + _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shifted to the right as an unsigned number: torch would drag the sign along."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number
