"""ExtraModality: what a program needs of a modality besides RNA and ATAC, in one object."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pyro_multivi.data.checks import shown
from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.encoders import HiddenState, NormalHead, SharedFirstLayer, expert_head
from pyro_multivi.networks.experts import Expert
from pyro_multivi.networks.layers import CovariateStack, layer_options


class ExtraModality(nn.Module):
    """One modality besides RNA and ATAC: its expert of the state, its decoder, and its statements in model and guide.

    A subclass says what it observes, :meth:`observe`; what else it overrides is up to it. A program takes it by its
    class attribute ``extra_modalities = {"name": Subclass}``, the name being that of the matrix in the data
    (``extra_obsm_keys`` of :func:`~pyro_multivi.setup_anndata`, ``extra_modalities`` of ``setup_mudata``).

    Parameters
    ----------
    name
        Name in ``cells.extra``, and of the observed site.
    config
        :class:`~pyro_multivi.config.ProgramConfig` of the program.

    Attributes
    ----------
    estimated
        Last part of the name of the site, (B, F), that estimates and differential tests are of; see :meth:`site`.
    n_features
        Number of features F.
    """

    estimated: ClassVar[str] = "mean"

    def __init__(self, name: str, config: Any) -> None:
        super().__init__()
        if name not in config.extra:
            raise ValueError(
                f"The program models {name!r}, which the data do not have: they have {shown([*config.extra])}. Name it "
                f"at setup: extra_obsm_keys=[{name!r}] (of a MuData extra_modalities)."
            )
        self.name, self.n_features, self.config = name, int(config.extra[name]), config
        self.first_layer = SharedFirstLayer(self.n_features, config.hidden, **layer_options(config, "encoder"))
        self.head = expert_head(config)
        # As of the other modalities of a fully paired program: q(z) given this one alone, in cells that lack one.
        self.alone_head = expert_head(config) if config.fully_paired and self.has_own_head else None
        self.decoder = CovariateStack(
            config.latent, config.hidden, config.n_layers_decoder,
            inject_everywhere=config.deeply_inject_covariates, **layer_options(config, "decoder"),
        )  # fmt: skip

    @property
    def has_own_head(self) -> bool:
        """Whether :attr:`head` gives the expert: :meth:`expert` is not overridden."""
        return type(self).expert is ExtraModality.expert

    def site(self, part: str) -> str:
        """Name of one of its sites, ``"name_part"``."""
        return f"{self.name}_{part}"

    def measurement(self, cells: Cells | CellTable) -> Measurement:
        """Values, (B, F), and cells that were measured, (B,): none where the cells come without this modality."""
        if self.name in cells.extra:
            return cells.extra[self.name]
        like = cells.design
        return Measurement(like.new_zeros(len(cells), self.n_features), torch.zeros_like(cells.has_rna))

    def start_from(self, table: CellTable) -> None:
        """Set initial parameters from the data."""

    def start_batches_from(self, table: CellTable, n_known: int) -> None:
        """Set parameters of the batches from ``n_known`` on, those of a query, from its data."""

    def input(self, cells: Cells) -> Tensor:
        """Input of the encoder, (B, F); rows of cells that were not measured may hold any number."""
        return self.measurement(cells).values

    def encode(self, cells: Cells, s: Tensor) -> HiddenState:
        """Hidden state of the cells that have this modality."""
        return self.first_layer(self.input(cells), self.measurement(cells).measured, s, s.new_zeros(len(cells)))

    def expert(self, cells: Cells, s: Tensor) -> Expert:
        """Expert of this modality in q(z); the prior in cells that lack it."""
        return self._expert(self.head, cells, s)

    def expert_alone(self, cells: Cells, s: Tensor) -> Expert:
        """q(z) given this modality alone: :meth:`expert`, but in a fully paired program by a head of its own."""
        return self.expert(cells, s) if self.alone_head is None else self._expert(self.alone_head, cells, s)

    def _expert(self, head: NormalHead, cells: Cells, s: Tensor) -> Expert:
        state = self.encode(cells, s)
        loc, scale = head(state)
        prior = s.new_zeros(len(cells), self.config.latent)
        measured = self.measurement(cells).measured
        return Expert(state.scatter(loc, prior), state.scatter(scale, torch.ones_like(prior)), measured)

    def decode(self, z: Tensor, s: Tensor) -> Tensor:
        """Last hidden layer of the decoder, (..., B, H); ``z`` as :meth:`MultiVIProgram.transform` gives it."""
        return self.decoder(z, s)

    def realised(self, part: str, cells: Cells, z: Tensor, s: Tensor, noise: Any) -> Tensor | None:
        """Draws of a site's value in each cell itself, (S, B, F), for intervals; None: the decoded values are that.

        Override it where a decoded value is an expectation over something that differs between cells of one state.

        Parameters
        ----------
        part
            Last part of the name of the site.
        z
            Draws of the state, (S, B, K), as :meth:`MultiVIProgram.transform` gives them.
        s
            Design that the cells are decoded with, (B, D); that of their own is ``cells.design``.
        noise
            :class:`~pyro_multivi.posterior.engine.cell_noise.CellNoise` of the draws.
        """
        return None

    def observe(self, cells: Cells, z: Tensor, s: Tensor) -> None:
        """Sample statements of the model, inside the plate of cells."""
        raise NotImplementedError(
            f"{type(self).__name__} needs a method observe(cells, z, s) with its sample statements."
        )

    def guide(self, cells: Cells, s: Tensor) -> None:
        """Sample statements of the guide for latents that :meth:`observe` draws, in the same order."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.alone_head is not None and not any(name.startswith(f"{prefix}alone_head.") for name in state_dict):
            # Programs that were saved without it: its head answered for this modality alone.
            for name in [name for name in state_dict if name.startswith(f"{prefix}head.")]:
                state_dict[f"{prefix}alone_head.{name.removeprefix(f'{prefix}head.')}"] = state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *args)
