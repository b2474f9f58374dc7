"""What model and guide owe each other, said on the first minibatch in a modeler's words."""

from __future__ import annotations

import re
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_multivi import ContractError, MultiVIProgram
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable
from pyro_multivi.training import FitOptions, check_contract, fit
from pyro_multivi.training.contract import warn_of_unlearned


class WithSpeed(MultiVIProgram):
    """A latent of each cell, w, and one that all share, v; complete, in the model's order."""

    def region_factors(self):
        pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return super().region_factors()

    def guide_shared(self):
        pyro.sample("v", dist.Normal(torch.zeros(2), 0.5).to_event(1))

    def observe_extra(self, cells, z, s):
        w = pyro.sample("w", dist.Normal(torch.zeros(len(cells), 4), 1.0).to_event(1))
        pyro.sample("seen", dist.Normal(w, 1.0).to_event(1), obs=torch.ones(len(cells), 4))

    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 4), 0.5).to_event(1))


class NoGuideSite(WithSpeed):
    def guide_extra(self, cells, s):
        pass


class NoSharedGuideSite(WithSpeed):
    def guide_shared(self):
        pass


class InnerPlate(MultiVIProgram):
    def observe_extra(self, cells, z, s):
        with pyro.plate("parts", 4, dim=-2):
            pyro.sample("seen", dist.Normal(z.sum(-1), 1.0), obs=torch.ones(4, len(cells)))


class OuterPlate(MultiVIProgram):
    """Numbers that all cells share in a plate of their own, where draws of the posterior would stand for cells."""

    def region_factors(self):
        with pyro.plate("regions", self.config.n_regions):
            return pyro.sample("r_logit", dist.Normal(0.0, 1.0)).sigmoid()

    def guide_shared(self):
        with pyro.plate("regions", self.config.n_regions):
            pyro.sample("r_logit", dist.Normal(self.region_logit, 1.0))


class PyroParam(WithSpeed):
    def guide_extra(self, cells, s):
        scale = pyro.param("speed_scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 4), scale).to_event(1))


class NoModelSite(WithSpeed):
    def guide_extra(self, cells, s):
        super().guide_extra(cells, s)
        pyro.sample("speed", dist.Normal(torch.zeros(len(cells)), 1.0))


class OtherOrder(WithSpeed):
    def mix(self, experts):
        pyro.sample("w", dist.Normal(torch.zeros(12, 4), 0.5).to_event(1))
        return super().mix(experts)

    def guide_extra(self, cells, s):
        pass


class OutsideThePlate(WithSpeed):
    """w of the guide is drawn where what all cells share is."""

    def guide_shared(self):
        super().guide_shared()
        pyro.sample("w", dist.Normal(torch.zeros(4), 0.5).to_event(1))

    def guide_extra(self, cells, s):
        pass


class UndeclaredBatch(WithSpeed):
    def guide_shared(self):
        pyro.sample("v", dist.Normal(torch.zeros(2), 0.5))


class NoEvent(WithSpeed):
    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 4), 0.5))


class NoEventInModel(WithSpeed):
    def z_prior(self, s):
        return dist.Normal(s.new_zeros(len(s), self.config.latent), 1.0)


class OneComponentNoEvent(WithSpeed):
    """A last dimension of 1 fits into any plate: Pyro says nothing and counts each cell twelve times."""

    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 1), 0.5))


class OtherWidth(WithSpeed):
    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 5), 0.5).to_event(1))


class OtherData(WithSpeed):
    def observe_extra(self, cells, z, s):
        w = pyro.sample("w", dist.Normal(torch.zeros(len(cells), 4), 1.0).to_event(1))
        pyro.sample("seen", dist.Normal(w, 1.0).to_event(1), obs=torch.ones(len(cells), 3))


class Discrete(WithSpeed):
    def observe_extra(self, cells, z, s):
        pyro.sample("w", dist.Poisson(torch.ones(len(cells))))

    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Poisson(2 * torch.ones(len(cells))))


class SecondPlate(WithSpeed):
    """A latent of each cell that is drawn before the state, in a plate of its own."""

    def model(self, cells):
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            pyro.sample("u", dist.Normal(torch.zeros(len(cells)), 1.0))
        super().model(cells)


class DrawnTwice(WithSpeed):
    """Both decoders ask for the same latent."""

    def transform(self, z):
        return z + pyro.sample("u", dist.Normal(z.new_zeros(z.shape[:-1]), 1.0))[..., None]


class FromTheLeft(WithSpeed):
    """Dimensions of z are counted from the left: right in training, which has one draw."""

    def accessibility(self, z, s):
        return super().accessibility(torch.cat([z[:, :1], z[:, 1:] * s[:, :1]], 1), s)


class SetsDrawnShort(MultiVIProgram):
    """Dispersions that all cells share without the dimension of the sets: (S, 1, G), where cells would stand."""

    def log_dispersions(self):
        return self.log_theta + pyro.sample("g", dist.Normal(torch.zeros(7), 1.0).to_event(1))

    def guide_shared(self):
        pyro.sample("g", dist.Normal(torch.zeros(7), 0.5).to_event(1))


CASES = [
    (NoGuideSite, "'w' of the model is a latent that the guide does not have; it has 'v', 'z', .*guide_extra"),
    (NoSharedGuideSite, "'v' of the model is a latent that the guide does not have.*guide_shared"),
    (NoModelSite, "'speed' of the guide is no latent of the model, whose latents are 'v', 'z', .*auxiliary"),
    (OtherOrder, "'w' comes in another order: the guide draws 'v', 'w', 'z', .*, the model 'v', 'z', .*Trace_ELBO"),
    (OutsideThePlate, "'w' lies in the plate 'cells' in the model and in no plate in the guide.*guide_extra"),
    (UndeclaredBatch, r"'v' of the guide has batch shape \(2,\) outside of the plate 'cells': expected \(\).*to_event"),
    (NoEvent, r"'w' of the guide has a batch shape that ends in 4 .* 12 cells: expected \(12,\).*\.to_event\(1\)"),
    (NoEventInModel, r"'z' of the model has a batch shape that ends in 3 .*\.to_event\(1\)"),
    (OneComponentNoEvent, r"'w' of the guide has batch shape \(12, 12\).*expected \(12,\).*\.to_event\(1\)"),
    (OuterPlate, r"'r_logit' of the guide lies in the plate 'regions': expected none, .* -2.*\.to_event\(...\)"),
    (OtherWidth, r"'w' has event shape \(4,\) in the model and \(5,\) in the guide"),
    (OtherData, r"'seen' of the model is observed with shape \(12, 3\), and its distribution Normal .*\(12, 4\)"),
    (Discrete, r"'w' of the guide is drawn from Poisson, whose draws are not repar.*, or elbo=Trace_ELBO\(\)\.$"),
    (InnerPlate, "'seen' of the model lies in the plate 'parts' beside that of cells: .*dimension -2.*to_event"),
    (PyroParam, "Parameter 'speed_scale' of the guide comes from pyro.param .* nn.Parameter, .* of PyroParam"),
    (SecondPlate, r"The model enters the plate 'cells' twice.* model\(cells\) calls inside its plate"),
    (DrawnTwice, "'u' is in the model twice: expected one .*called more than once"),
    (FromTheLeft, r"model of FromTheLeft does not accept several draws .* make: .*z is \(S, B, K\).*z\[..., 0\]"),
    (SetsDrawnShort, r"model of SetsDrawnShort does not accept several draws .* all cells share \(S, 1, ...\)"),
]  # fmt: skip


def program_of(program_class, make_program):
    return program_class(make_program().config).eval()


@pytest.mark.parametrize(("program_class", "message"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_broken_is_named(make_program, make_cells, program_class, message):
    with pytest.raises(ContractError, match=message):
        check_contract(program_of(program_class, make_program), make_cells())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("hook", ["observe_extra(cells, z, s)", "guide_extra(cells, s)"])
def test_a_hook_that_leaves_out_the_proteins_is_named(make_program, make_cells, hook):
    own = type("Own", (MultiVIProgram,), {hook.partition("(")[0]: lambda self, *arguments: None})
    program = own(make_program(extra={"protein": 2}, proteins=True).config).eval()
    measured = Measurement(torch.ones(12, 2), torch.ones(12, dtype=torch.bool))
    with pytest.raises(ContractError, match=f"'protein_background' .* of Own .*Call super.*{re.escape(hook)}"):
        check_contract(program, make_cells().replace(extra={"protein": measured}))


@pytest.mark.parametrize("program_class", [MultiVIProgram, WithSpeed])
@pytest.mark.parametrize(
    "elbo", [None, Trace_ELBO(), TraceMeanField_ELBO(num_particles=2)], ids=["default", "any", "mean field"]
)
def test_what_is_whole_passes(make_program, make_cells, program_class, elbo):
    check_contract(program_of(program_class, make_program), make_cells(), elbo)


@pytest.mark.parametrize("choices", [
    {"n_genes": 0}, {"n_regions": 0}, {"library": "observed"}, {"dispersion": "gene-cell"},
    {"modality_weights": "cell", "modality_penalty": "MMD"}, {"latent_distribution": "ln", "use_batch_norm": "both"},
], ids=str)  # fmt: skip
def test_every_choice_of_ours_passes(make_program, make_cells, choices):
    sizes = {name: size for name, size in choices.items() if name in ("n_genes", "n_regions")}
    check_contract(make_program(**choices), make_cells(**sizes))


@pytest.mark.parametrize("program_class", [OtherOrder, Discrete])
def test_what_another_elbo_allows_is_allowed(make_program, make_cells, program_class):
    check_contract(program_of(program_class, make_program), make_cells(), Trace_ELBO())


def test_a_helper_of_the_guide_is_no_latent(make_program, make_cells):
    class Helped(WithSpeed):
        def guide_extra(self, cells, s):
            pyro.sample("u", dist.Normal(torch.zeros(len(cells)), 1.0), infer={"is_auxiliary": True})
            super().guide_extra(cells, s)

    check_contract(program_of(Helped, make_program), make_cells())


def test_looking_moves_nothing(make_program, make_cells):
    program = make_program(use_batch_norm="both").train()
    state = {name: value.clone() for name, value in program.state_dict().items()}
    noise, grad = torch.get_rng_state(), torch.is_grad_enabled()
    check_contract(program, make_cells())
    assert torch.equal(noise, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad
    assert program.training
    assert all(module.training for module in program.modules())
    assert all(torch.equal(value, state[name]) for name, value in program.state_dict().items())
    assert all(p.grad is None for p in program.parameters())


# ---------------------------------------------------------------------- in the training loop


def minibatches(cells):
    table = CellTable(
        x=SparseCounts.from_dense(cells.x.to_dense()), y=SparseCounts.from_dense(cells.y.to_dense()),
        has_rna=cells.has_rna, has_atac=cells.has_atac, design=cells.design,
        batch_code=cells.design[:, :2].argmax(1), n_genes=7, n_regions=9, label=cells.label,
    )  # fmt: skip
    return Minibatches(table, batch_size=12)


def test_training_refuses_a_broken_contract_before_the_first_step(make_program, make_cells):
    program = program_of(NoGuideSite, make_program)
    before = {name: value.clone() for name, value in program.state_dict().items()}
    with pytest.raises(ContractError, match="'w' of the model"):
        fit(program, minibatches(make_cells()), options=FitOptions(2, progress_bar=False))
    assert all(torch.equal(value, before[name]) for name, value in program.state_dict().items())
    assert not program.training


def test_only_the_first_minibatch_of_a_call_is_checked(make_program, make_cells, monkeypatch):
    # The package exports a function of the name of this module.
    loop = sys.modules["pyro_multivi.training.fit"]
    calls = []
    monkeypatch.setattr(loop, "check_contract", lambda *given: calls.append(given))
    program = program_of(WithSpeed, make_program)
    fit(program, minibatches(make_cells()), options=FitOptions(3, progress_bar=False))
    assert len(calls) == 1


class Forgetful(WithSpeed):
    """Its parameter is copied on the way into the graph."""

    def __init__(self, config):
        super().__init__(config)
        self.offset = nn.Parameter(torch.zeros(()))

    def z_prior(self, s):
        zero = s.new_zeros(*s.shape[:-1], self.config.latent)
        return dist.Normal(zero + self.offset.detach(), 1.0).to_event(1)


def test_a_parameter_without_gradient_is_named(make_program, make_cells):
    program = program_of(Forgetful, make_program)
    with pytest.warns(UserWarning, match=r"Forgetful that got no gradient .*: 'offset'\. .*\.detach\(\)"):
        fit(program, minibatches(make_cells()), options=FitOptions(1, progress_bar=False))


@pytest.mark.parametrize("freeze", [False, True])
def test_a_parameter_that_learns_or_is_frozen_is_not(make_program, make_cells, freeze):
    program = program_of(Forgetful if freeze else WithSpeed, make_program)
    if freeze:
        program.offset.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The warm-up starts at a weight of 0: that is a gradient, too.
        options = FitOptions(1, progress_bar=False, n_epochs_kl_warmup=5)
        fit(program, minibatches(make_cells()), options=options)
    with pytest.warns(UserWarning, match="and [0-9]+ more"):
        warn_of_unlearned(program)  # no gradient is left after training
