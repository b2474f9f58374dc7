"""Every public method and argument of scvi-tools' MULTIVI 1.4.2: the same, taken as ours, left out aloud, or refused.

``multivi_1_4_2.json`` was made from the sources of scvi-tools 1.4.2: for each argument its default there and what
happens here. Arguments of ``train`` include those of scvi-tools' and Lightning's Trainer.
"""

from __future__ import annotations

import ast
import inspect
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pyro_multivi as pm

TABLE = json.loads((Path(__file__).parent / "multivi_1_4_2.json").read_text())
METHODS = TABLE["methods"]
#: Values, other than scvi-tools' default, of arguments that are taken as ours; of all others any value will do.
VALUES: dict[str, Any] = {
    "accelerator": "cpu", "use_gpu": False, "plan_kwargs": {"lr": 1e-2}, "datasplitter_kwargs": {"train_size": 0.8},
    "enable_progress_bar": False, "gradient_clip_val": 1.0,
    "lr": 1e-2, "weight_decay": 1e-2, "eps": 1e-7, "n_epochs_kl_warmup": 3, "n_steps_kl_warmup": 3,
    "adversarial_classifier": False, "scale_adversarial_loss": 0.5, "train_size": 0.8, "validation_size": 0.1,
    "shuffle_set_split": False, "batch_size": 8, "external_indexing": [range(24)],
}  # fmt: skip
#: Methods with another order of arguments than in scvi-tools, or the argument of theirs that has no place here.
OTHER_PLACES = {
    "get_marginal_ll": "it is an error for scvi-tools' MULTIVI",
    "get_elbo": "after dataloader",
    "get_reconstruction_error": "after dataloader",
    "load": "after accelerator",
}
ARGUMENTS = [(method, name) for method, rows in METHODS.items() for name in rows]
IN_DICTIONARIES = [(kind, name) for kind in ("plan_kwargs", "datasplitter_kwargs") for name in TABLE[kind]]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    adata = pm.simulate_multiome((24, 0, 0), n_genes=6, n_regions=8, n_batches=2, n_types=2, n_proteins=3, seed=0)
    mdata = pm.simulate_multiome((12, 0, 0), n_genes=30, n_regions=60, return_mudata=True)
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}
    pm.MULTIVI.setup_anndata(adata, **keys)
    model = pm.MULTIVI(adata, n_hidden=4, n_latent=2)
    model.train(1, train_size=0.8, progress_bar=False)
    folder = tmp_path_factory.mktemp("scvi")
    model.save(folder / "model", save_anndata=True)
    plain = pm.simulate_multiome((12, 0, 0), n_genes=30, n_regions=60)
    return SimpleNamespace(adata=adata, plain=plain, mdata=mdata, model=model, folder=folder)


def call(world: SimpleNamespace, method: str, **given: Any) -> None:
    """Call a method with what it needs besides."""
    needed: dict[str, dict[str, Any]] = {
        "__init__": {"adata": world.adata, "n_hidden": 4, "n_latent": 2},
        "train": {"max_epochs": 1, "progress_bar": False},
        "save": {"dir_path": world.folder / "again", "overwrite": True},
        "load": {"dir_path": world.folder / "model"},
        "load_query_data": {"adata": world.adata, "reference_model": world.model},
        "setup_anndata": {"adata": world.plain},
        "setup_mudata": {"mdata": world.mdata, "modalities": {"rna_layer": "rna", "atac_layer": "atac"}},
        "get_marginal_ll": {"n_mc_samples": 2},
        "differential_expression": {"groupby": "cell_type", "n_samples": 20},
        "differential_accessibility": {"groupby": "cell_type", "n_samples": 20},
    }
    chosen = {**needed.get(method, {}), **given}
    if method == "train" and "enable_progress_bar" in given:
        del chosen["progress_bar"]
    if method == "train":
        model = pm.MULTIVI(world.adata, n_hidden=4, n_latent=2)
        model.train(**chosen)
    elif method == "__init__":
        pm.MULTIVI(**chosen)
    else:
        getattr(world.model, method)(**chosen)


def check(world: SimpleNamespace, method: str, name: str, verdict: str, given: dict[str, Any]) -> None:
    """What happens to a value that is not the default."""
    if verdict == "refused":
        with pytest.raises(TypeError, match=rf"{name}\b.*: ") as refusal:
            call(world, method, **given)
        assert "unexpected keyword" not in str(refusal.value)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(world, method, **given)
    said = [str(each.message) for each in caught if name in str(each.message)]
    assert len(said) == (verdict == "warned"), said
    assert all(each.filename == __file__ for each in caught if name in str(each.message))


@pytest.mark.parametrize(("method", "name"), ARGUMENTS)
def test_every_argument_is_known(world, method, name):
    default, verdict = METHODS[method][name]
    own = inspect.signature(getattr(pm.MULTIVI, method)).parameters
    if verdict == "same":
        assert name in own
    elif name == "freeze_classifier":
        check(world, method, name, verdict, {name: False})
    elif name not in VALUES or method not in ("train", "load", "load_query_data"):
        check(world, method, name, verdict, {name: "another"})
    else:
        check(world, method, name, verdict, {name: VALUES[name]})
    if default is not None and verdict != "same" and name not in ("enable_progress_bar", "accelerator"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(world, method, **{name: ast.literal_eval(default)})


@pytest.mark.parametrize(("argument", "name"), IN_DICTIONARIES)
def test_every_entry_of_the_dictionaries_is_known(world, argument, name):
    default, verdict = TABLE[argument][name]
    check(world, "train", name, verdict, {argument: {name: VALUES.get(name, "another")}})
    # Defaults that scvi-tools sets anew in train(), and those that reduce_lr_on_plateau=False leaves without effect.
    if default is not None and not name.startswith("lr_") and name not in ("n_epochs_kl_warmup", "eps"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(world, "train", **{argument: {name: ast.literal_eval(default)}})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in OTHER_PLACES])
def test_arguments_have_their_place(method):
    own = [name for name in inspect.signature(getattr(pm.MULTIVI, method)).parameters if name not in ("self", "cls")]
    shared = [name for name in METHODS[method] if name in own]
    theirs = list(METHODS[method])
    for place, name in enumerate(theirs):
        if name not in shared:
            break  # What comes after an argument that is not here is given by name.
        if own.index(name) != place:
            assert inspect.signature(getattr(pm.MULTIVI, method)).parameters[name].kind.name == "KEYWORD_ONLY", name


@pytest.mark.parametrize("name", TABLE["absent"])
def test_a_method_that_is_not_here_says_what_to_use(world, name):
    for owner in (pm.MULTIVI, world.model):
        assert not hasattr(owner, name)
        with pytest.raises(AttributeError, match=rf"MULTIVI has no {name}: .{{20}}"):
            getattr(owner, name)


@pytest.mark.parametrize("name", TABLE["attributes"])
def test_every_attribute_is_known(world, name):
    if TABLE["attributes"][name] == "same":
        getattr(world.model, name)
    else:
        with pytest.raises(AttributeError, match=f"MULTIVI has no {name}: "):
            getattr(world.model, name)


def test_what_is_given_to_train_comes_before_the_dictionaries(world, monkeypatch):
    given = []
    monkeypatch.setattr(
        "pyro_multivi.api.training.FitOptions.from_arguments", lambda found: given.append(found) or 1 / 0
    )
    model = pm.MULTIVI(world.adata, n_hidden=4, n_latent=2)
    for arguments in ({"lr": 1e-2}, {}):
        with pytest.raises(ZeroDivisionError):
            model.train(
                3, plan_kwargs={"lr": 1e-1, "n_epochs_kl_warmup": 7, "scale_adversarial_loss": 2.0}, **arguments
            )
    with pytest.raises(ZeroDivisionError):
        model.train(3, 1e-3, plan_kwargs={"lr": 1e-1})
    assert [each["lr"] for each in given] == [1e-2, 1e-1, 1e-3]
    assert [each["n_epochs_kl_warmup"] for each in given] == [7, 7, 1]
    assert given[0]["adversarial_weight"] == 2.0


def test_one_warning_tells_of_all(world):
    with pytest.warns(UserWarning, match="without effect here") as caught:
        call(world, "train", logger=True, strategy="ddp", plan_kwargs={"reduce_lr_on_plateau": True})
    assert len(caught) == 1
    assert all(name in str(caught[0].message) for name in ("logger=True", "strategy='ddp'", "reduce_lr_on_plateau"))


def test_an_unknown_argument_is_still_an_error(world):
    with pytest.raises(TypeError, match="max_epoch"):
        world.model.train(max_epoch=3)
    with pytest.raises(TypeError, match="plan_kwargs has the key 'learning_rate'"):
        world.model.train(plan_kwargs={"learning_rate": 3})
    with pytest.raises(TypeError, match="datasplitter_kwargs='x'"):
        world.model.train(datasplitter_kwargs="x")
