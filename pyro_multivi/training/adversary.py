"""Mixing by an adversary: a classifier tries to tell from z where a cell comes from, the program to confuse it.

A term of training only. Model and guide know nothing of it, and no reported ELBO holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram

TARGETS = ("modality", "batch")
SCHEDULES = ("warmup", "constant")

_N_HIDDEN = 32
# Faster than the program, whose z it has to follow. More than one step for each of the program's gained nothing.
_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class AdversaryOptions:
    """What is to be mixed, and how strongly.

    Attributes
    ----------
    target
        What the classifier reads off z: ``"modality"``, which of RNA and ATAC were measured in a
        cell, or ``"batch"``.
    weight
        Of the penalty, which is in nats per cell, in the loss.
    schedule
        ``"warmup"``: the weight grows with that of the KL terms. ``"constant"``: it is there from
        the first step.

    Raises
    ------
    ValueError
        If a choice is not allowed.
    """

    target: str = "modality"
    weight: float = 1.0
    schedule: str = "warmup"

    def __post_init__(self) -> None:
        for name, found, allowed in (
            ("adversarial_target", self.target, TARGETS),
            ("adversarial_schedule", self.schedule, SCHEDULES),
        ):
            if found not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{name}={found!r} is not allowed: choose {choices}.")
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"adversarial_weight={self.weight} is not allowed: give a finite number above 0, "
                "or adversarial_mixing=False for no adversary."
            )


class Adversary:
    r"""A classifier of the origin of cells, and the penalty for what it can tell.

    With :math:`c` the origins present in the training cells, :math:`f_c` their shares and
    :math:`q(c \mid z)` the classifier, a cell costs

    .. math:: KL(f \,\|\, q(\cdot \mid z)) = \sum_c f_c \log \frac{f_c}{q(c \mid z)}

    nats: nothing where z does not tell, the more the surer the classifier is, right or wrong. Unlike
    the classifier's own loss with its sign turned round, this is bounded from below and its gradient
    does not fade when the classifier has won.

    Parameters
    ----------
    program
        The program to mix; not kept.
    train
        The training cells: origins and their shares.
    options
        Default: :class:`AdversaryOptions`.
    seed
        Of the classifier's initial weights.

    Raises
    ------
    ValueError
        If all training cells have the same origin.

    Notes
    -----
    The classifier belongs to one run of training and is saved nowhere: going on, and going on with a
    model that was loaded, starts a new one. A new one says :math:`q = f` for every z, so that it costs nothing
    until it has learned something.

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
    >>> Adversary(program, Minibatches(table), AdversaryOptions("batch")).share
    tensor([0.7500, 0.2500])
    """

    def __init__(
        self, program: MultiVIProgram, train: Minibatches, options: AdversaryOptions | None = None, seed: int = 0
    ) -> None:
        self.options = options or AdversaryOptions()
        self._n_batch = program.config.n_batch
        table, index = train.table, train.index.cpu()
        origin = self._origin(table.has_rna[index], table.has_atac[index], table.design[index])
        found, count = origin.unique(return_counts=True)
        if len(found) < 2:
            raise ValueError(self._nothing_to_mix())
        # From what _origin says to 0 ... C - 1, the origins present.
        place = torch.zeros(int(found.max()) + 1, dtype=torch.long)
        place[found] = torch.arange(len(found))
        self._place = place.to(train.device)
        #: Share of each origin among the training cells, (C,).
        self.share = (count / count.sum()).to(train.device)
        # The classifier's weights come from a seed of their own: with or without, the program sees the same noise.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.classifier = _classifier(program.config.latent, self.share.cpu()).to(train.device)
        self._optimizer = torch.optim.Adam(self.classifier.parameters(), lr=_LEARNING_RATE)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._sums = torch.zeros(3, device=train.device)

    def penalty(self, z: Tensor, cells: Cells) -> Tensor:
        """Mean over cells of KL(f || q(. | z)), in nats; its gradient reaches z and not the classifier.

        Parameters
        ----------
        z
            What the decoders read of the latent state, (..., B, K).
        cells
            The minibatch.
        """
        origin = self._place[self._origin(cells.has_rna, cells.has_atac, cells.design)].expand(z.shape[:-1])
        fixed = {name: parameter.detach() for name, parameter in self.classifier.named_parameters()}
        log_q = functional_call(self.classifier, fixed, (z,)).log_softmax(-1)  # (..., B, C)
        cost: Tensor = (self.share * (self.share.log() - log_q)).sum(-1).mean()
        self._seen = z.detach(), origin
        with torch.no_grad():
            surprise = -log_q.gather(-1, origin.unsqueeze(-1)).mean()
            self._sums += len(cells) * torch.stack([cost, surprise, torch.ones_like(cost)])
        return cost

    def learn(self) -> None:
        """One step of the classifier on the z that the latest penalty was computed from."""
        assert self._seen is not None, "learn() follows penalty()"
        z, origin = self._seen
        self._seen = None
        self._optimizer.zero_grad(set_to_none=True)
        logits = self.classifier(z).flatten(0, -2)
        nn.functional.cross_entropy(logits, origin.flatten()).backward()
        self._optimizer.step()

    def pop_record(self) -> dict[str, float]:
        """Means per cell since the last call, for the history.

        ``adversary_train`` is the penalty before its weight; ``classifier_train`` the classifier's own
        loss, at most about the entropy of the shares f, which it has when z tells nothing.
        """
        penalty, surprise, n = self._sums.tolist()
        self._sums.zero_()
        return {"adversary_train": penalty / n, "classifier_train": surprise / n}

    def _origin(self, has_rna: Tensor, has_atac: Tensor, design: Tensor) -> Tensor:
        """A number for the origin of each cell, (n,), int64."""
        if self.options.target == "batch":
            return design[:, : self._n_batch].argmax(-1)
        return has_rna.long() + 2 * has_atac.long()

    def _nothing_to_mix(self) -> str:
        if self.options.target == "batch":
            return (
                "adversarial_target='batch' needs training cells of two batches at least, and they are all of one: "
                "give batch_key to setup_anndata or setup_mudata, choose adversarial_target='modality', or leave "
                "adversarial_mixing out."
            )
        return (
            "adversarial_target='modality' mixes cells in which different modalities were measured, and it is the "
            "same in all training cells: choose adversarial_target='batch', or leave adversarial_mixing out."
        )


def _classifier(n_latent: int, share: Tensor) -> nn.Sequential:
    """Two hidden layers; at first it answers with the shares, whatever it is shown."""
    layers: list[nn.Module] = []
    for n_in in (n_latent, _N_HIDDEN):
        layers += [nn.Linear(n_in, _N_HIDDEN), nn.LeakyReLU()]
    last = nn.Linear(_N_HIDDEN, len(share))
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(share.log())
    return nn.Sequential(*layers, last)
