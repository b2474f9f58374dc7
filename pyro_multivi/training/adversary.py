"""Adversarial mixing: a classifier of a cell's origin from z, and a penalty for what it can tell.

A term of training only: neither the model, nor the guide, nor any reported ELBO holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_multivi.data.checks import caution
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells, pattern_code
from pyro_multivi.data.table import CellTable
from pyro_multivi.processes.group import current
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training.distributed.shared_steps import sum_gradients
from pyro_multivi.training.options import FitOptions

_N_HIDDEN = 32
# Faster than the program, whose z it has to follow. More than one step for each of the program's gained nothing.
_LEARNING_RATE = 5e-3

_ONE_ORIGIN = {
    "batch": "all training cells are of one batch, and adversarial_target='batch' mixes batches; batch_key of "
    "setup_anndata or setup_mudata says what they are",
    "modality": "the same modalities were measured in all training cells, and adversarial_target='modality' mixes "
    "cells with different ones; adversarial_target='batch' mixes batches",
}


class OneOriginError(ValueError):
    """Training cells that are all of the origin to be mixed."""


#: Columns that it adds to the history.
RECORDED = ("adversary_train", "classifier_train")


class Adversary:
    r"""Classifier of the origin of cells, trained beside the program, and the penalty that hides the origin from it.

    With :math:`c` the origins present in the training cells, :math:`f_c` their shares and
    :math:`q(c \mid z)` the classifier, a cell costs

    .. math:: KL(f \,\|\, q(\cdot \mid z)) = \sum_c f_c \log \frac{f_c}{q(c \mid z)}

    nats: nothing where z does not tell, the more the surer the classifier is, right or wrong. Unlike the negative of
    the classifier's own loss, this is bounded from below and its gradient does not fade when the classifier has won.

    Parameters
    ----------
    program
        The program to mix; not kept.
    train
        Training cells, which have the origins and their shares.
    options
        ``adversarial_target`` is the origin, ``seed`` that of the classifier's initial weights.

    Raises
    ------
    OneOriginError
        If all training cells have the same origin.

    Notes
    -----
    The classifier belongs to one run of training and is in its checkpoints only: going on starts a new one. A new one
    says :math:`q = f` for every z, so that it costs nothing until it has learned something.

    References
    ----------
    Ganin et al. (2016), Domain-adversarial training of neural networks, JMLR 17: the idea. scvi-tools'
    MULTIVI trains with one whose target is its batch.

    Examples
    --------
    >>> from pyro_multivi import MultiVIProgram, ProgramConfig
    >>> from pyro_multivi.data.table import CellTable
    >>> table = CellTable(x=None, y=None, has_rna=torch.tensor([False] * 4), has_atac=torch.tensor([False] * 4),
    ...                   design=torch.eye(2)[[0, 0, 0, 1]], batch_code=torch.tensor([0, 0, 0, 1]),
    ...                   n_genes=2, n_regions=0)
    >>> program = MultiVIProgram(ProgramConfig(n_genes=2, n_regions=0, n_batch=2, n_covariates=2))
    >>> Adversary(program, Minibatches(table), FitOptions(adversarial_target="batch")).share
    tensor([0.7500, 0.2500])
    """

    def __init__(self, program: MultiVIProgram, train: Minibatches, options: FitOptions | None = None) -> None:
        self.options = options or FitOptions()
        self._n_batch = program.config.n_batch
        origins, count = self._origin(train.table)[train.index.cpu()].unique(return_counts=True)
        if len(origins) < 2:
            raise OneOriginError(_ONE_ORIGIN[self.options.adversarial_target])
        self._origins = origins.to(train.device)
        #: Share of each origin among the training cells, (C,).
        self.share = (count / count.sum()).to(train.device)
        # The classifier's weights come from a seed of their own: with or without, the program sees the same noise.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            first, second = nn.Linear(program.config.latent, _N_HIDDEN), nn.Linear(_N_HIDDEN, _N_HIDDEN)
            last = nn.Linear(_N_HIDDEN, len(count))
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(self.share.log())
        self.classifier = nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), last).to(train.device)
        self._optimizer = torch.optim.Adam(self.classifier.parameters(), lr=_LEARNING_RATE)
        self._last: tuple[Tensor, Tensor] | None = None
        self._sums = torch.zeros(3, device=train.device)

    @classmethod
    def wanted(cls, program: MultiVIProgram, train: Minibatches, options: FitOptions) -> Adversary | None:
        """The adversary that a training asks for; None without, or with a warning where there is nothing to mix."""
        if not options.adversarial_mixing or not options.adversarial_weight:
            return None
        try:
            return cls(program, train, options)
        except OneOriginError as error:
            caution(f"adversarial_mixing=True has no effect, and training goes on without an adversary: {error}.")
            return None

    def penalty(self, z: Tensor, cells: Cells) -> Tensor:
        """Mean over cells of KL(f || q(. | z)), in nats; its gradient reaches z and not the classifier.

        Parameters
        ----------
        z
            Input of the decoders, (..., B, K).
        """
        origin = torch.searchsorted(self._origins, self._origin(cells)).expand(z.shape[:-1])
        fixed = {name: parameter.detach() for name, parameter in self.classifier.named_parameters()}
        log_q = functional_call(self.classifier, fixed, (z,)).log_softmax(-1)  # (..., B, C)
        cost: Tensor = (self.share * (self.share.log() - log_q)).sum(-1).mean()
        with torch.no_grad():
            surprise = -log_q.gather(-1, origin.unsqueeze(-1)).mean()
            self._sums += len(cells) * torch.stack([cost, surprise, torch.ones_like(cost)])
        self._last = z.detach(), origin
        return cost

    def learn(self, share: float = 1.0) -> None:
        """Take one step of the classifier on the z that the latest penalty was computed from.

        Parameters
        ----------
        share
            Part of the minibatch's cells that this process has.
        """
        assert self._last is not None, "learn() follows penalty()"
        (z, origin), self._last = self._last, None
        self._optimizer.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(self.classifier(z).flatten(0, -2), origin.flatten())
        loss.backward()
        sum_gradients(current(), list(self.classifier.parameters()), loss, share)
        self._optimizer.step()

    def pop_record(self) -> dict[str, float]:
        """Means per cell since the last call, for the history.

        ``adversary_train`` is the penalty before its weight; ``classifier_train`` the classifier's own
        loss, at most about the entropy of the shares f, which it has when z tells nothing.
        """
        current().sum_([self._sums])
        penalty, surprise, n = self._sums.tolist()
        self._sums.zero_()
        return dict(zip(RECORDED, (penalty / n, surprise / n), strict=True))

    def state(self) -> dict[str, Any]:
        """All that it has learned and recorded between two steps, not copied."""
        return {
            "classifier": self.classifier.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "sums": current().gather(self._sums),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.classifier.load_state_dict(state["classifier"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._sums.copy_(state["sums"][current().rank])

    def _origin(self, cells: Cells | CellTable) -> Tensor:
        """A number for the origin of each cell, (n,), int64."""
        if self.options.adversarial_target == "batch":
            return cells.design[:, : self._n_batch].argmax(-1)
        return pattern_code(cells)
