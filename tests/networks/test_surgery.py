"""Grown programs: every tensor is that of the old one, but for averages in new places."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from pyro_multivi import ProgramConfig
from pyro_multivi.networks.layers import BatchNorm
from pyro_multivi.networks.surgery import Growth, Training, add_intercepts
from pyro_multivi.program import MultiVIProgram

OLD, NEW = [["a", "b"], ["x", "y"]], [["a", "b", "c"], ["x", "y", "z"]]
CHOICES = {"n_genes": 5, "n_regions": 6, "n_hidden": 4, "n_latent": 2, "dispersion": "gene-batch"}
FROZEN = {
    "unfrozen": False,
    "freeze_dropout": False,
    "freeze_expression": True,
    "freeze_decoder_first_layer": True,
    "freeze_batchnorm_encoder": True,
    "freeze_batchnorm_decoder": True,
}


class WithBatchTensor(MultiVIProgram):
    """A program with tensors of its own: one for each batch, and one of another size."""

    width = 0

    def __init__(self, config):
        super().__init__(config)
        self.of_batches = nn.Parameter(torch.arange(3.0 * config.n_batch).reshape(config.n_batch, 3))
        self.other = nn.Parameter(torch.zeros(self.width * config.n_batch))


def programs(kind=MultiVIProgram, **choices):
    old = kind(ProgramConfig(**CHOICES, **choices, n_batch=2, n_covariates=5))
    new = kind(ProgramConfig(**CHOICES, **choices, n_batch=3, n_covariates=7))
    for tensor in (*old.parameters(), *old.buffers()):
        tensor.data.normal_()
    return old, new


@pytest.mark.parametrize("everywhere", [True, False])
def test_known_batches_are_decoded_as_before(everywhere):
    old, new = programs(encode_covariates=True, deeply_inject_covariates=everywhere)
    growth = Growth.of(OLD, NEW, n_continuous=1)
    state, parts = growth.state(old.state_dict(), new.state_dict())
    new.load_state_dict(state)
    s_old = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.3], [0.0, 1.0, 1.0, 0.0, -1.2]])
    s_new = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.3], [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, -1.2]])
    z = torch.randn(2, 2)
    for one, other in zip(old.eval().expression(z, s_old)[:2], new.eval().expression(z, s_new)[:2], strict=True):
        torch.testing.assert_close(one.dense(), other.dense())
    torch.testing.assert_close(
        new.library_log_mean, torch.cat([old.library_log_mean, old.library_log_mean.mean()[None]])
    )
    # Behind the deviation, the other depth and z.
    regression = torch.cat([old.rna_depth_regression, old.rna_depth_regression[-2:].mean()[None]])
    torch.testing.assert_close(new.rna_depth_regression, regression)
    assert parts["log_theta"] == (0, [2])
    assert parts["expression_decoder.stack.linear.0.weight"] == (1, [4, 7])
    assert ("expression_decoder.stack.linear.1.weight" in parts) == everywhere
    assert parts["rna_first_layer.covariates.weight"] == (1, [2, 5])
    assert parts["expression_decoder.rho.weight"] == (1, [6])


def test_intercepts_of_batches_come_with_the_second_batch():
    """A program of one batch has none: those of the known batch are 0, so that it is decoded as before."""
    old, new = (MultiVIProgram(ProgramConfig(**CHOICES, n_batch=n, n_covariates=n)) for n in (1, 3))
    for tensor in (*old.parameters(), *old.buffers()):
        tensor.data.normal_()
    known = old.state_dict()
    add_intercepts(known, new, n_batch=1)
    state, parts = Growth.of([["a"]], [["a", "b", "c"]], n_continuous=0).state(known, new.state_dict())
    new.load_state_dict(state)
    z = torch.randn(2, 2)
    rho = old.eval().expression(z, torch.ones(2, 1)).rho.dense()
    for batch in torch.eye(3):
        torch.testing.assert_close(new.eval().expression(z, batch.expand(2, -1)).rho.dense(), rho)
    assert parts["expression_decoder.rho.weight"] == parts["accessibility_decoder.p.weight"] == (1, [5, 6])
    torch.testing.assert_close(new.rna_weight_directions[:, [0, 1, 2, 3, 7]], old.rna_weight_directions)
    assert not new.rna_weight_directions[:, 4:7].any()


def test_gradients_of_old_columns_are_zero():
    old, new = programs()
    _, parts = Growth.of(OLD, NEW, n_continuous=1).state(old.state_dict(), new.state_dict())
    training = Training.chosen(new, parts, **FROZEN)
    again = Training.from_dict(training.to_dict(), new)
    assert again == training
    training.apply(new)
    (new.expression(torch.randn(3, 2), torch.rand(3, 7)).rho.dense()[:, 0].sum() + new.log_theta.sum()).backward()
    weight = new.expression_decoder.stack.linear[0]
    assert weight.weight.grad.any(0).nonzero().squeeze(1).tolist() == [4, 7]
    assert weight.bias.grad is None
    assert new.log_theta.grad.any(1).tolist() == [False, False, True]


def saved_and_read(program):
    file = io.BytesIO()
    torch.save(program, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_read])
def test_gradients_of_old_columns_are_zero_in_a_copy(copied):
    old, new = programs()
    parts = Growth.of(OLD, NEW, n_continuous=1).state(old.state_dict(), new.state_dict())[1]
    Training.chosen(new, parts, **FROZEN).apply(new)
    # One that the user froze for the time being is copied too.
    new.expression_decoder.rho.weight.requires_grad_(False)
    twin = copied(copied(new))
    assert not twin.expression_decoder.rho.weight.requires_grad
    twin.expression_decoder.rho.weight.requires_grad_(True)
    for name, parameter in twin.named_parameters():
        assert parameter.requires_grad == (name in parts)
        if name in parts:
            axis, places = parts[name]
            gradient = torch.autograd.grad(parameter.sum(), parameter)[0].movedim(axis, 0)
            assert gradient[places].eq(1).all()
            assert gradient.sum() == gradient[places].numel()


def test_tensors_of_a_custom_program():
    old, new = programs(WithBatchTensor)
    state, parts = Growth.of(OLD, NEW, n_continuous=1).state(old.state_dict(), new.state_dict())
    torch.testing.assert_close(state["of_batches"], torch.cat([old.of_batches, old.of_batches.mean(0)[None]]).detach())
    assert parts["of_batches"] == (0, [2])
    WithBatchTensor.width = 2
    try:
        old, new = programs(WithBatchTensor)
    finally:
        WithBatchTensor.width = 0
    with pytest.raises(ValueError, match=r"Tensor 'other' is \(4,\) in the reference and \(6,\)"):
        Growth.of(OLD, NEW, n_continuous=1).state(old.state_dict(), new.state_dict())


class ModulePerBatch(MultiVIProgram):
    def __init__(self, config):
        super().__init__(config)
        self.own = nn.ModuleList(nn.Linear(2, 3) for _ in range(config.n_batch))


def test_a_module_for_each_batch_is_named():
    old, new = programs(ModulePerBatch)
    with pytest.raises(ValueError, match=r"Tensor 'own.2.weight' is not in the reference, and is \(3, 2\) with"):
        Growth.of(OLD, NEW, n_continuous=1).state(old.state_dict(), new.state_dict())


class SeesBatches(MultiVIProgram):
    """A decoder of z and the batch, which other covariates do not enter, beside one of z and all of the design."""

    def __init__(self, config):
        super().__init__(config)
        self.narrow = nn.Linear(config.latent + config.n_batch, config.n_genes)
        self.wide = nn.Linear(config.latent + config.n_covariates, config.n_genes)


def test_a_network_that_sees_the_batch_alone():
    old, _ = programs(SeesBatches)
    # A new batch, and no new category: lengths do not tell what an axis is of.
    new, wider = (
        SeesBatches(ProgramConfig(**CHOICES, n_batch=n_batch, n_covariates=6)).state_dict() for n_batch in (3, 2)
    )
    growth = Growth.of(OLD, [NEW[0], OLD[1]], n_continuous=1)
    state, parts = growth.state(old.state_dict(), new, wider)
    narrow, wide = old.narrow.weight.detach(), old.wide.weight.detach()
    torch.testing.assert_close(state["narrow.weight"], torch.cat([narrow, narrow[:, 2:].mean(1, True)], 1))
    batch = wide[:, 2:4].mean(1, True)
    torch.testing.assert_close(state["wide.weight"], torch.cat([wide[:, :4], batch, wide[:, 4:]], 1))
    assert parts["narrow.weight"] == (1, [4])
    assert parts["wide.weight"] == (1, [4])


class SeesDesign(MultiVIProgram):
    """A last layer of z and the design, as that of the linear decoder in tutorials/recipes.md."""

    def __init__(self, config):
        super().__init__(config)
        self.expression_decoder.stack = nn.Identity()
        self.expression_decoder.rho = nn.Linear(config.latent + config.n_covariates, config.n_genes)
        self.size_weight_directions()


def test_a_last_layer_of_the_design_grows_by_a_new_category():
    old, _ = programs(SeesDesign)
    new = SeesDesign(ProgramConfig(**CHOICES, n_batch=2, n_covariates=6)).state_dict()
    state, parts = Growth.of(OLD, [OLD[0], NEW[1]], n_continuous=1).state(old.state_dict(), new)
    weight = old.expression_decoder.rho.weight.detach()
    grown = torch.cat([weight[:, :6], weight[:, 4:6].mean(1, True), weight[:, 6:]], 1)
    torch.testing.assert_close(state["expression_decoder.rho.weight"], grown)
    assert parts["expression_decoder.rho.weight"] == parts["rna_weight_directions"] == (1, [6])


def test_a_last_layer_of_the_design_gets_no_intercepts():
    """Not even where it grows by as many columns as there are batches."""
    old = SeesDesign(ProgramConfig(**CHOICES, n_batch=1, n_covariates=3))
    new = SeesDesign(ProgramConfig(**CHOICES, n_batch=2, n_covariates=5))
    known = old.state_dict()
    before = dict(known)
    add_intercepts(known, new, n_batch=1)
    assert known["expression_decoder.rho.weight"] is before["expression_decoder.rho.weight"]
    assert known["accessibility_decoder.p.weight"].shape[1] == CHOICES["n_hidden"] + 1


@pytest.mark.parametrize(
    "values",
    [
        {"parts": {"nonsense": None}, "dropout": True, "batch_norm": []},
        {"parts": {"log_theta": [0, [99]]}, "dropout": True, "batch_norm": []},
        {"parts": {"log_theta": [7, [0]]}, "dropout": True, "batch_norm": []},
        {"parts": {}, "dropout": 5, "batch_norm": []},
        {"parts": {}, "dropout": True, "batch_norm": ["nonsense"]},
    ],
)
def test_what_does_not_fit_the_program_is_refused(values):
    with pytest.raises(ValueError, match="no parameter|no part|none that is known"):
        Training.from_dict(values, programs()[1])


def test_frozen_batch_normalisation_stays_in_every_encoder():
    layers = {"use_batch_norm": "both", "n_layers_encoder": 2, "n_layers_decoder": 1}
    program = MultiVIProgram(ProgramConfig(**CHOICES, **layers, fully_paired=True, n_batch=1, n_covariates=1))
    training = Training.chosen(program, {}, **{**FROZEN, "freeze_expression": False})
    training.apply(program)
    norms = {f"{name}.": module for name, module in program.named_modules() if isinstance(module, BatchNorm)}
    # Of each modality: the first layer, the experts of both modalities and of one, and the decoder.
    assert len(norms) == 8
    assert all(module.frozen for module in norms.values())
    assert training.parts
    assert not any(name.startswith(tuple(norms)) for name in training.parts)
