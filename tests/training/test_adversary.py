"""Adversarial mixing: its effect, its penalty and gradients, and data without two origins."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pytest
import torch
from numpy.typing import NDArray
from pyro.infer import Trace_ELBO

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.table import CellTable
from pyro_multivi.training import Adversary, FitOptions, NegativeELBO

SMALL = {"n_hidden": 12, "n_latent": 3}
BRIEF = {"max_epochs": 2, "progress_bar": False, "batch_size": 32}


@pytest.fixture
def model(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    return pm.MULTIVI(mosaic, **SMALL)


def batches(cells) -> Minibatches:
    """The cells of ``make_cells`` as a training set."""
    table = CellTable(
        x=cells.x, y=cells.y, has_rna=cells.has_rna, has_atac=cells.has_atac, design=cells.design,
        batch_code=cells.design[:, :2].argmax(-1), n_genes=7, n_regions=9,
    )  # fmt: skip
    return Minibatches(table)


def accuracy_of_groups(z_nk: NDArray[np.float32], group: NDArray[np.bool_]) -> float:
    """Share of the cells that a linear classifier (least squares) puts into the right one of two groups."""
    design = np.column_stack([z_nk, np.ones(len(z_nk))])
    coefficients = np.linalg.lstsq(design, np.where(group, 1.0, -1.0), rcond=None)[0]
    return float(((design @ coefficients > 0) == group).mean())


class BlindDecoders(pm.MultiVIProgram):
    """The decoders do not get the batch: z has to carry what differs between batches."""

    def expression(self, z, s):
        return super().expression(z, torch.zeros_like(s))

    def accessibility(self, z, s):
        return super().accessibility(z, torch.zeros_like(s))


@pytest.mark.slow
def test_training_with_it_mixes_batches():
    adata = pm.simulate_multiome((120, 0, 0), n_genes=40, n_regions=60, n_batches=2, batch_effect=1.0, seed=1)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    of_first = (adata.obs["batch"] == "batch_0").to_numpy()
    found = {}
    for mixing in (False, True):
        # A penalty between the experts would empty the state of so small a model by itself.
        model = pm.MULTIVI(adata, program_class=BlindDecoders, modality_penalty=None, **SMALL)
        model.train(
            max_epochs=80, lr=1e-2, batch_size=16, train_size=1.0, progress_bar=False,
            adversarial_mixing=mixing, adversarial_target="batch", adversarial_weight=200.0,
        )  # fmt: skip
        found[mixing] = accuracy_of_groups(model.get_latent_representation(give_mean=False), of_first)
    assert found[False] > 0.9
    assert found[True] < found[False] - 0.2


def test_what_lies_apart_is_drawn_together(make_cells, make_program):
    """Three clouds, one of each measurement pattern, that may move as a whole; nothing but the penalty moves them."""
    cells = make_cells((20, 20, 20))
    adversary = Adversary(make_program(), batches(cells))
    pattern = cells.has_rna.long() + 2 * cells.has_atac.long() - 1
    centre = torch.nn.Parameter(torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]))
    optimizer = torch.optim.Adam([centre], lr=5e-3)
    spread = []
    for _ in range(1000):
        optimizer.zero_grad()
        adversary.penalty(centre[pattern] + torch.randn(60, 3), cells).backward()
        optimizer.step()
        adversary.learn()
        spread.append(torch.pdist(centre.detach()).max().item())
    assert spread[0] > 3.5
    assert max(spread[-100:]) < 1.5


def test_a_new_one_costs_nothing(make_cells, make_program):
    cells = make_cells()
    adversary = Adversary(make_program(), batches(cells))
    # RNA only, ATAC only, both.
    assert torch.allclose(adversary.share, torch.tensor([3, 4, 5]) / 12)
    assert adversary.penalty(torch.randn(12, 3), cells).item() == pytest.approx(0, abs=1e-6)
    record = adversary.pop_record()
    entropy = -sum(share * math.log(share) for share in (3 / 12, 4 / 12, 5 / 12))
    assert record == pytest.approx({"adversary_train": 0, "classifier_train": entropy}, abs=1e-6)


def test_penalty_by_hand(make_cells, make_program):
    cells = make_cells()
    adversary = Adversary(make_program(), batches(cells), FitOptions(adversarial_target="batch"))
    assert adversary.share.tolist() == [0.5, 0.5]
    with torch.no_grad():
        adversary.classifier[-1].bias.copy_(torch.tensor([0.8, 0.2]).log())
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert adversary.penalty(torch.randn(12, 3), cells).item() == pytest.approx(expected, rel=1e-5)
    # Draws on the left, as of a vectorised ELBO, are averaged over.
    assert adversary.penalty(torch.randn(4, 12, 3), cells).item() == pytest.approx(expected, rel=1e-5)
    adversary.learn()
    surprise = -(math.log(0.8) + math.log(0.2)) / 2
    assert adversary.pop_record() == pytest.approx({"adversary_train": expected, "classifier_train": surprise})


def test_the_classifier_learns(make_cells, make_program):
    cells = make_cells()
    adversary = Adversary(make_program(), batches(cells))
    z = torch.randn(12, 3) + 3 * cells.has_rna[:, None] - 3 * cells.has_atac[:, None]
    for _ in range(100):
        adversary.penalty(z, cells)
        adversary.learn()
    adversary.pop_record()
    assert adversary.penalty(z, cells).item() > 1
    assert adversary.pop_record()["classifier_train"] < 0.1


def test_gradients_reach_the_program_or_the_classifier_never_both(make_cells, make_program):
    cells, program = make_cells(), make_program()
    adversary = Adversary(program, batches(cells), FitOptions(adversarial_schedule="constant", adversarial_weight=3.0))
    with torch.no_grad():
        adversary.classifier[-1].weight.normal_()
    gradients = {}
    for name, objective in (("with", NegativeELBO(program, adversary=adversary)), ("without", NegativeELBO(program))):
        assert {id(p) for p in objective.parameters()} == {id(p) for p in program.parameters()}
        program.zero_grad()
        torch.manual_seed(1)
        objective(cells).backward()
        gradients[name] = {key: parameter.grad.clone() for key, parameter in program.named_parameters()}
    assert all(parameter.grad is None for parameter in adversary.classifier.parameters())
    changed = {key for key in gradients["with"] if not torch.equal(gradients["with"][key], gradients["without"][key])}
    # Through z alone: the encoders change, what lies behind z does not.
    assert changed
    assert all(key.startswith(("rna_first_layer", "atac_first_layer", "rna_expert", "atac_expert")) for key in changed)
    before = {key: (p.detach().clone(), p.grad.clone()) for key, p in program.named_parameters()}
    weights = [parameter.detach().clone() for parameter in adversary.classifier.parameters()]
    adversary.learn()
    after = zip(weights, adversary.classifier.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in after)
    for key, parameter in program.named_parameters():
        assert torch.equal(parameter, before[key][0])
        assert torch.equal(parameter.grad, before[key][1])


def test_it_reads_what_the_decoders_read(make_cells, make_program):
    cells, program = make_cells(), make_program(latent_distribution="ln")
    adversary = Adversary(program, batches(cells))
    seen = []
    penalty = adversary.penalty
    adversary.penalty = lambda z, cells: seen.append(z) or penalty(z, cells)
    NegativeELBO(program, adversary=adversary)(cells)
    assert torch.allclose(seen[0].sum(-1), torch.ones(12))


def test_no_elbo_holds_it(model):
    model.train(
        **BRIEF, n_epochs_kl_warmup=None,
        adversarial_mixing=True, adversarial_weight=7.0, adversarial_schedule="constant",
    )  # fmt: skip
    rows = {name: frame[name].to_numpy() for name, frame in model.history.items()}
    assert (rows["adversary_train"] > 0).all()
    penalties = rows["alignment_train"] + rows["mixing_train"] + 7 * rows["adversary_train"]
    np.testing.assert_allclose(rows["train_loss"], rows["elbo_train"] + penalties, rtol=1e-5)
    assert not any("adversary" in name or "classifier" in name for name in rows if name.endswith("validation"))


@pytest.mark.parametrize(("schedule", "expected"), [("warmup", [0.0, 0.5]), ("constant", [1.0, 1.0])])
def test_schedules(model, schedule, expected):
    model.train(
        **BRIEF, n_epochs_kl_warmup=2, adversarial_mixing=True, adversarial_weight=1e4, adversarial_schedule=schedule
    )
    rows = model._history.rows
    for row, weight in zip(rows, expected, strict=True):
        kl = row["kl_weight"] * row["kl_local_train"]
        of_training = row["alignment_train"] + row["mixing_train"]
        rest = row["train_loss"] - row["reconstruction_loss_train"] - kl - of_training
        assert rest == pytest.approx(1e4 * weight * row["adversary_train"], rel=1e-2, abs=1e-2)


def test_off_by_default(model):
    model.train(**BRIEF)
    assert "adversary_train" not in model.history
    model.train(**BRIEF, adversarial_mixing=False, adversarial_target="batch")
    assert "adversary_train" not in model.history


@pytest.mark.usefixtures("global_rng_untouched")
def test_same_seed_same_curve(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    curves = []
    for seed in (3, 3, 4):
        model = pm.MULTIVI(mosaic, **SMALL)
        model.train(**BRIEF, adversarial_mixing=True, seed=seed)
        curves.append([{k: v for k, v in row.items() if k != "seconds"} for row in model._history.rows])
    assert curves[0] == curves[1]
    assert curves[0] != curves[2]


def test_the_noise_is_that_of_training_without(mosaic):
    # In the warm-up's first epoch the adversary weighs nothing: everything else must be as without it.
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    rows = []
    for mixing in (True, False):
        model = pm.MULTIVI(mosaic, **SMALL)
        model.train(max_epochs=1, progress_bar=False, adversarial_mixing=mixing)
        rows.append(model._history.rows[0])
    for name in rows[1].keys() - {"seconds"}:
        assert rows[0][name] == rows[1][name]


def test_going_on_after_saving_starts_a_new_classifier(model, mosaic, tmp_path):
    model.train(**BRIEF, adversarial_mixing=True)
    model.train(**BRIEF, adversarial_mixing=True)
    assert len(model.history["adversary_train"]) == 4
    parameters = {name for name, _ in model.program.named_parameters()}
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", mosaic)
    assert {name for name, _ in loaded.program.named_parameters()} == parameters
    assert not any("classifier" in name for name in loaded.program.state_dict())
    loaded.train(**BRIEF, adversarial_mixing=True)
    assert len(loaded.history["adversary_train"]) == 6


def test_any_elbo(model):
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    model.train(**BRIEF, adversarial_mixing=True, elbo=elbo)
    assert np.isfinite(model.history["adversary_train"]).all(axis=None)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"adversarial_target": "donor"}, "adversarial_target='donor' is not allowed: choose 'modality' or 'batch'"),
        ({"adversarial_schedule": "cosine"}, "adversarial_schedule='cosine' .* 'warmup' or 'constant'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight=-1.0 is not allowed: give a number of at least 0"),
        ({"adversarial_weight": math.nan}, "adversarial_weight=nan"),
    ],
)
def test_bad_choices_are_refused(model, choice, message):
    with pytest.raises(ValueError, match=message):
        model.train(**BRIEF, adversarial_mixing=True, **choice)
    assert not model.is_trained


def test_a_weight_of_0_is_no_adversary(build):
    plain, weightless = build(), build()
    plain.train(**BRIEF)
    weightless.train(
        **BRIEF, adversarial_mixing=True, plan_kwargs={"scale_adversarial_loss": 0.0, "weight_decay": 1e-3}
    )
    assert "adversary_train" not in weightless.history
    assert weightless.history["elbo_train"].equals(plain.history["elbo_train"])


def test_one_batch_is_warned_of_for_batch_alone(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, **SMALL)
    with pytest.warns(UserWarning, match="no effect.*all training cells are of one batch.*batch_key") as said:
        model.train(**BRIEF, adversarial_mixing=True, adversarial_target="batch")
    assert len(said) == 1
    assert said[0].filename == __file__
    assert "adversary_train" not in model.history
    model.train(**BRIEF, adversarial_mixing=True)
    assert "adversary_train" in model.history
    assert np.isfinite(model.history["train_loss"]).all(axis=None)


def test_without_unpaired_cells_training_is_as_without_an_adversary(mosaic):
    paired = mosaic[mosaic.obs["modality"] == "paired"].copy()
    pm.MULTIVI.setup_anndata(paired, batch_key="batch", modality_key="modality")
    model, other = pm.MULTIVI(paired, **SMALL), pm.MULTIVI(paired, **SMALL)
    with pytest.warns(UserWarning, match="no effect.*the same modalities were measured.*adversarial_target='batch'"):
        model.train(**BRIEF, adversarial_mixing=True)
    other.train(**BRIEF, adversarial_mixing=None)
    np.testing.assert_array_equal(model.get_latent_representation(), other.get_latent_representation())
    with pytest.warns(UserWarning, match="no effect"), pytest.raises(ValueError, match="'adversary_train' is not rec"):
        model.train(**BRIEF, adversarial_mixing=True, early_stopping_monitor="adversary_train")
    model.train(**BRIEF, adversarial_mixing=True, adversarial_target="batch")
    assert "adversary_train" in model.history


def test_a_batch_without_training_cells_is_no_class(make_cells):
    # Three batches in the data, the middle one in the held-out cells only.
    cells = make_cells()
    design = torch.eye(3)[torch.tensor([0, 2] * 6)]
    table = CellTable(
        x=cells.x, y=cells.y, has_rna=cells.has_rna, has_atac=cells.has_atac, design=design,
        batch_code=design.argmax(-1), n_genes=7, n_regions=9, n_batch=3,
    )  # fmt: skip
    program = pm.MultiVIProgram(pm.ProgramConfig(n_genes=7, n_regions=9, n_batch=3, n_covariates=3, n_latent=3))
    adversary = Adversary(program, Minibatches(table), FitOptions(adversarial_target="batch"))
    assert adversary.share.tolist() == [0.5, 0.5]
    with pyro.validation_enabled(False):
        adversary.penalty(torch.randn(12, 3), table.batch(torch.arange(12)))
    adversary.learn()
    assert adversary.pop_record()["classifier_train"] == pytest.approx(math.log(2), rel=1e-5)
