"""Wrong values of every argument of every public function: refused by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_multivi as pm
from pyro_multivi import distributions, plots, posterior, training
from pyro_multivi.data.checks import shown
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.checks.result import PredictiveCheck
from pyro_multivi.training.fit import evaluate

NAN, INF, HUGE = float("nan"), float("inf"), 10**30
THING = object()
#: Wrong values of the arguments that are annotated as one plain type; None is one more where it is not allowed.
PLAIN: dict[str, tuple[Any, ...]] = {
    "int": (-1, 2.5, NAN, INF, HUGE, "16", b"16", "", True, [3], [], {3}, {}, slice(0, 3), THING, np.array([1, 2])),
    "float": ("0.5", "", b"1", True, NAN, INF, -INF, HUGE**10, [0.1], [], {}, {0.1}, THING, np.array([0.1, 0.2])),
    "bool": ("yes", "", 1, 0.0, NAN, [], [True], {}, THING, np.array([True, False])),
    "str": (5, 0.5, True, b"a", ["a"], [], {"a"}, {}, THING, np.array(["a", "b"])),
    "OutPath": (5, True, "", b"x", ["x"], "a\0b", {}, THING),
    "str | os.PathLike[str]": (5, True, "", b"x", ["x"], "a\0b", {}, THING),
    "str | torch.device": (5, True, "", "nonsense", "cuda:99", "meta", b"cpu", ["cpu"], THING),
}
#: Words that an argument does not know, and numbers outside its range, beside those of its type.
BEYOND: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, -1e-9),
    **dict.fromkeys(("eps", "gradient_clip", "effect_sd"), (0, 0.0, -1.0)),
    "adversarial_weight": (-1.0, -1e-9),
    **dict.fromkeys(("weight_decay", "early_stopping_min_delta", "pseudocounts", "threshold_counts"), (-1.0, -1e-9)),
    **dict.fromkeys(("contrast_weight", "mixing_weight", "effect_size", "batch_effect", "library_sd"), (-1.0,)),
    **dict.fromkeys(("mean_library", "inverse_dispersion"), (0.0, -1.0)),
    **dict.fromkeys(("train_size", "validation_size", "threshold", "alpha", "type_separation"), (-0.1, 1.1)),
    **dict.fromkeys(("differential_fraction", "dropout", "dropout_rate", "mean_accessibility"), (-0.1, 1.1)),
    "region_dropout_rate": (-0.1, 1.0),
    **dict.fromkeys(("return_interval", "level", "fdr_target"), (0.0, 1.0, -0.5, 95)),
    **dict.fromkeys(("key",), ("nonsense", "")),
    **dict.fromkeys(
        ("gene_likelihood", "accessibility_likelihood", "dispersion", "latent_distribution", "library"),
        ("nonsense", ""),
    ),
    **dict.fromkeys(("modality_weights", "modality_penalty", "use_batch_norm", "use_layer_norm"), ("nonsense", "")),
    **dict.fromkeys(("accelerator", "precision", "adversarial_target", "adversarial_schedule"), ("nonsense", "")),
    **dict.fromkeys(("mode", "test_mode", "unit", "weights", "probability", "hidden_depth"), ("nonsense", "")),
    **dict.fromkeys(("layer", "batch_key", "labels_key", "feature_type_key"), ("nonsense", "")),
    "features": ("nonsense", ""),
    **dict.fromkeys(("protein_layer", "protein_expression_obsm_key", "protein_names_uns_key"), ("nonsense", "")),
    "protein_dispersion": ("nonsense", "", "protein-label"),
    "stained": (0.0, -0.1, 1.1),
    **dict.fromkeys(("rna_layer", "atac_layer", "statistic", "quantity", "comparison"), ("nonsense", "")),
    **dict.fromkeys(("n_genes", "n_regions"), (3,)),
    "modality": ("nonsense", "", "rna"),
    "early_stopping_monitor": ("nonsense", ""),
}
_CELLS = (1.5, "nobody", "", ["nobody"], [HUGE], [10**6], {1, 2}, slice(0, 3), [[1], [2]], [], {}, [True], [1.5],
          [None], [[1], [2, 3]], b"x", THING, [THING], NAN, np.zeros((2, 2), dtype=int))  # fmt: skip
_NAMES = (5, "nonsense", "", ["nonsense"], [5], True, 1.5, b"x", THING, [None])
_BATCHES = (5, -1, HUGE, "nonsense", "", 1.5, True, [], ["nonsense"], [1.5], NAN, b"x", THING)
_GROUPBY = (5, True, "nonsense", "", ["nonsense"], [], ["cell_type", 5], {}, b"x", THING, [["cell_type"]])
_FRAME = (5, None, "x", [1], {}, THING, pd.DataFrame(), np.zeros((2, 2)))
_TENSOR = (5, 0.5, None, "x", [1.0], THING, np.ones(3), torch.tensor(NAN), torch.full((1, 3), NAN))
_DATA = (5, "x", [1], {}, True, THING, pd.DataFrame(), np.zeros((2, 2)))
_CLASS = (5, None, "x", int, True, THING, pm.ProgramConfig)
#: Wrong values of all other arguments.
OTHER: dict[str, tuple[Any, ...]] = {
    "adata": _DATA,
    "mdata": (*_DATA, None),
    "stores": (5, True, THING, [], {}, [5], {"a": 5}, np.zeros((2, 2)), pd.DataFrame()),
    "samples": (5, "x", True, THING, [], {}, [5], {"a": 5}, np.zeros((2, 2)), pd.DataFrame()),
    "reference_model": (5, None, {}, True, THING, pd.DataFrame(), np.zeros((2, 2))),
    "query": (*_DATA, None),
    **dict.fromkeys(("multi_anndata", "rna_anndata", "atac_anndata"), _DATA),
    **dict.fromkeys(("protein_list", "feature_list"), _CELLS),
    **dict.fromkeys(("indices", "gene_list", "region_list", "idx1", "idx2"), _CELLS),
    **dict.fromkeys(("transform_batch", "batchid1", "batchid2"), _BATCHES),
    "library_size": (0, -1, NAN, INF, "nonsense", "", None, True, [1.0], [], {}, {1.0}, ["a"] * 24, [NAN] * 24, THING),
    "groupby": _GROUPBY,
    **dict.fromkeys(("group1", "group2"), ("nonsense", "", 5, NAN, {"nonsense"}, ["nonsense"], [], {}, THING)),
    "delta": ("big", "", 0, -1, NAN, INF, True, [0.1], {}, THING, np.array([0.1, 0.2])),
    "change_fn": (5, "nonsense", "", None, ["log-fold"], True, lambda a: a, THING),
    "m1_domain_fn": (5, "nonsense", [len], True, THING),
    "cred_interval_lvls": (0, 1, 2, NAN, "a", "", [2], ["a"], [[0.5]], True, {0.9}, {}, THING),
    "statistics": (5, 1.5, "nonsense", "", [], ["nonsense"], [5], True, {"mean": len}, {"a": 5}, THING),
    "sites": (5, 1.5, "nonsense", "", [], ["nonsense"], [5], True, THING),
    "intervene": (5, "z", [1], {"nonsense": torch.ones(1)}, {"s": 5}, {5: torch.ones(1)}, True, THING),
    "callbacks": (3, [3], "nonsense", lambda *_: None, True, THING),
    "checkpoint_every": (0, -1, 2.5, NAN, True, "", "10", "0 min", "-1 min", "ten min", b"1", [1], {}, THING),
    "resume": (5, 1.5, "", b"x", [True], {}, None, THING),
    "devices": (7, -3, 1.5, True, "x", "", None, [0], {}, THING),
    "external_indexing": (5, "nonsense", [], {}, {1}, True, THING, [0], ["nobody"], [[1.5]], [["nobody"]], [[0], 5],
                          np.zeros((2, 2)), [[0], THING]),
    "elbo": (5, "nonsense", Trace_ELBO, True, [], THING),
    "program_class": _CLASS,
    "program_options": (5, "x", [1], {"nonsense": 1}, {5: 1}, {"n_latent": 3}, True, THING),
    "size_factor_key": (5, 1.5, "nonsense", "", ["a", "b", "c"], [], [5], {"a"}, True, b"x", THING),
    **dict.fromkeys(("categorical_covariate_keys", "continuous_covariate_keys"), _NAMES),
    **dict.fromkeys(("extra_obsm_keys", "extra_modalities"), _NAMES),
    "modality_values": (5, "x", [1], {"a": "nonsense"}, {"a": 5}, {"a": None}, True, THING),
    "feature_type_values": (5, "x", [1], {"nonsense": "a"}, {"genes": 5}, {"genes": [5]}, True, THING),
    **dict.fromkeys(("feature_masks", "panel_key"), ("nonsense", "", 5, True, ["batch"], THING)),
    "modalities": (5, "x", [1], {"nonsense": "rna"}, {"rna_layer": "nonsense"}, {"rna_layer": 5}, True, THING),
    "mudata_modalities": (5, "rna", ("rna",), ("rna", "x", "y"), (1, 2), None, True, THING),
    "models": (5, None, "x", {}, [1, 2], {"a": 5, "b": 6}, True, THING),
    "n_cells": (5, None, "abc", (1, 2), (-1, 1, 1), (0, 0, 0), (1.5, 1, 1), (True, 1, 1), {}, THING, ("1", 1, 1)),
    **dict.fromkeys(("table", "histogram", "reliability", "coverage", "imputed"), _FRAME),
    "ax": (5, "x", [1], True, THING),
    "labels": (5, "x", "", ["a"], [], {}, True, THING),
    "latent": (5, None, "x", [1.0], [["a", "b"]], np.zeros((0, 2)), np.full((3, 2), NAN), {}, THING),
    "xy": (5, None, "x", [1.0], [["a", "b"]], np.zeros((0, 2)), np.full((3, 2), NAN), {}, THING),
    "colourings": (5, None, "x", [1], {}, True, THING),
    "summary": (5, "x", [1], {}, THING, pd.DataFrame(), np.zeros((2, 2))),
    "history": (5, "x", [1], True, THING),
    "program": _CLASS,
    "config": (5, None, "x", {}, pm.ProgramConfig, THING),
    "cells": (5, None, True, THING),
    "train": (5, None, [], True, THING),
    **dict.fromkeys(("validation", "options", "optimizer_state", "checkpoints"), (5, "x", [1], True, THING)),
    "extra": (5, None, "x", [1], {"a": -1}, {"a": 0}, {"a": "3"}, {5: 3}, True, THING),
    **dict.fromkeys(("rho", "library", "theta", "gate_logits", "p", "cell_factor", "size", "rate"), _TENSOR),
    "region_factor": (5, 0.5, "x", [1.0], THING, np.ones(3), torch.tensor([2.0, -1.0, NAN])),
    **dict.fromkeys(("hidden", "weight", "bias"), (5, None, "x", [1.0], THING, np.ones(3), torch.ones(7, 9))),
    "fragments": (-1, NAN, INF, "x", [1], {1}, THING),
    "link": (5, None, "nonsense", "", True, ["softmax"], THING),
    "gemm_dtype": (5, "float32", True, THING, np.float32),
}  # fmt: skip
#: Public, and made or called by the package itself, or without arguments of the user's.
EXEMPT = {
    "MULTIVI.get_normalized_accessibility": "another name of get_accessibility_estimates",
    **dict.fromkeys(
        ("BrokenModelError", "ContractError", "NotTrainedError", "TrainingDiverged", "StoreChangedError"), "an error"
    ),
    **dict.fromkeys(("PALETTE", "__version__", "settings"), "no function"),
    **dict.fromkeys(("Estimate", "History", "Adversary", "NegativeELBO", "AnnealLatents"), "made by the package"),
    **dict.fromkeys(("check_contract", "kl_weight", "measured_only"), "a step of the training loop or the model"),
}
#: Functions that know the allowed values of an argument of several.
CHECKED_BY = {"n_genes": "MULTIVI", "n_regions": "MULTIVI", "early_stopping_monitor": "MULTIVI.train"}
#: Arguments that torch checks.
OF_TORCH = {"validate_args"}


def _named() -> dict[str, Any]:
    found = {name: getattr(module, name) for module in (pm, plots, posterior, training, distributions)
             for name in module.__all__}  # fmt: skip
    found["evaluate"] = evaluate
    for owner in (pm.MULTIVI, PredictiveCheck):
        members = inspect.getmembers(owner, callable)
        found |= {f"{owner.__name__}.{name}": value for name, value in members if not name.startswith("_")}
    return {name: value for name, value in found.items() if name not in EXEMPT}


#: Public functions and classes by name.
PUBLIC = _named()


def arguments(name: str) -> dict[str, inspect.Parameter]:
    """Arguments of a public function, without those of torch."""
    parameters = inspect.signature(PUBLIC[name]).parameters
    return {key: each for key, each in parameters.items() if key not in OF_TORCH and key != "self"}


def wrong_values(function: str, argument: str, annotation: str) -> Iterator[Any]:
    """Wrong values of an argument, by its type or by its name."""
    kind = annotation.removesuffix(" | None")
    special = function in ("PoissonCounts", "NegativeBinomialCounts", "ZeroInflatedNegativeBinomialCounts")
    if kind not in PLAIN or special:
        yield from OTHER[argument]
        return
    sizes = ("n_genes", "n_regions", "n_proteins", "n_labels", "n_covariates")
    zero = argument in ("seed", "start", "least", "max_epochs", *sizes) or "warmup" in argument
    yield from () if kind != "int" or zero else (0,)
    # Draws are written as 1e3: a float that holds a whole number of them will do.
    draws = argument.startswith("n_samples") or argument in ("n_mc_samples", "n_particles", "m_permutation")
    yield from () if kind != "int" or draws else (16.0,)
    yield from PLAIN[kind]
    # Checked against the data, or against what the first minibatch records.
    if function == CHECKED_BY.get(argument, function):
        yield from BEYOND.get(argument, ())
    if kind == annotation and argument != "batch_size":
        yield None


def _call(world: SimpleNamespace, name: str) -> dict[str, Any]:
    """Arguments with which a call would work, and quickly."""
    genes, program = (world.check.genes, world.model.program)
    rho, one = torch.full((1, 3), 1 / 3), torch.ones(1)
    differential = {"groupby": "cell_type", "n_samples": 20, "batch_correction": True}
    calls: dict[str, dict[str, Any]] = {
        "MULTIVI": {"adata": world.adata, "n_hidden": 4, "n_latent": 2},
        "ProgramConfig": {"n_genes": 8, "n_regions": 10},
        "MultiVIProgram": {"config": program.config},
        "MULTIVI.setup_anndata": {"adata": world.adata},
        "MULTIVI.setup_mudata": {"mdata": world.mdata, "modalities": {"rna_layer": "rna", "atac_layer": "atac"}},
        "MULTIVI.train": {"max_epochs": 1, "accelerator": "cpu", "progress_bar": False, "train_size": 0.5},
        "MULTIVI.save": {"dir_path": world.folder / "again", "overwrite": True},
        "MULTIVI.load": {"dir_path": world.folder / "model", "adata": world.adata},
        "MULTIVI.to_device": {"device": "cpu"},
        "MULTIVI.load_query_data": {"adata": world.adata, "reference_model": world.model},
        "MULTIVI.prepare_query_anndata": {"adata": world.plain, "reference_model": world.model},
        "MULTIVI.prepare_query_mudata": {"mdata": world.mdata, "reference_model": world.model},
        "MULTIVI.transfer_labels": {"query": world.adata, "key": "cell_type"},
        **{key: {"registry_key": "X"} for key in ("MULTIVI.data_registry", "MULTIVI.get_state_registry")},
        "MULTIVI.get_from_registry": {"adata": world.adata, "registry_key": "X"},
        "MULTIVI.get_setup_arg": {"setup_arg": "batch_key"},
        "MULTIVI.get_anndata_manager": {"adata": world.adata},
        **{key: {"dir_path": world.folder / "model"}
           for key in ("MULTIVI.view_setup_args", "MULTIVI.load_registry", "describe")},
        "MULTIVI.posterior_predictive_check": {"n_samples": 40},
        "MULTIVI.differential_expression": differential,
        "MULTIVI.differential_accessibility": differential,
        "MULTIVI.differential_protein_expression": differential,
        "MULTIVI.differential_extra": {"name": "protein", **differential},
        "MULTIVI.get_extra_estimates": {"name": "protein"},
        "MULTIVI.get_marginal_ll": {"n_mc_samples": 2},
        "MULTIVI.to_inference_data": {"n_samples": 2, "indices": [0, 1]},
        "compare_models": {"models": {"a": world.model, "b": world.model}, "n_mc_samples": 2},
        "join_samples": {"samples": [world.plain, world.mdata]},
        "convert_stores": {"stores": world.folder / "store.h5ad", "out": world.folder / "new.zarr"},
        "open_stores": {"stores": [world.folder / "store.h5ad"]},
        "organize_multiome_anndatas": {"multi_anndata": world.plain},
        "organize_cite_seq_10x": {"adata": world.plain.copy()},
        "reads_to_fragments": {"adata": world.plain.copy()},
        "read": {"path": world.folder}, "read_10x_h5": {"path": world.folder}, "read_10x_mtx": {"folder": world.folder},
        "simulate_multiome": {"n_cells": (4, 0, 0), "n_genes": 4, "n_regions": 4},
        "PredictiveCheck.to_csv": {"folder": world.folder},
        "resolve_device": {"accelerator": "cpu"},
        "fit": {"program": program, "train": Minibatches(world.model._table)},
        "evaluate": {"program": program, "cells": []},
        "draw": {"program": program, "cells": world.model.minibatch()},
        "PoissonCounts": {"rho": rho, "library": one},
        "NegativeBinomialCounts": {"rho": rho, "library": one, "theta": torch.ones(3)},
        "ZeroInflatedNegativeBinomialCounts": {
            "rho": rho, "library": one, "theta": torch.ones(3), "gate_logits": torch.zeros(3)},
        "ScaledBernoulli": {"p": rho, "cell_factor": one},
        "PoissonFragments": {"p": rho, "size": one, "rate": torch.ones(3)},
        "NegativeBinomialFragments": {"p": rho, "size": one, "rate": torch.ones(3), "theta": torch.ones(3)},
        "Readout": {"hidden": torch.ones(2, 3), "weight": torch.ones(4, 3), "bias": torch.ones(4), "link": "softmax"},
        "observed_against_replicated": {"table": genes, "statistic": "mean"},
        "p_value_histogram": {"table": genes, "statistic": "mean"},
        "rootogram": {"histogram": world.check.histogram},
        "calibration_curve": {"reliability": world.check.reliability},
        "coverage_curve": {"coverage": world.check.coverage},
        "imputed_against_measured": {"imputed": world.check.imputed, "modality": "expression"},
        "latent_scatter": {"latent": np.zeros((3, 2))}, "principal_plane": {"latent": np.zeros((3, 2))},
        "neighbour_embedding": {"latent": np.eye(5)},
        "check_summary": {"summary": world.check.summary()},
        "overview": {
            "xy": np.eye(2), "directions": "axis", "colourings": {"cells": None}, "history": world.model.history},
        "training_history": {"history": world.model.history},
        "volcano": {"table": world.table}, "top_features": {"table": world.table},
    }  # fmt: skip
    return calls.get(name, {})


def _bound(world: SimpleNamespace, name: str) -> Callable[..., Any]:
    owner = {"MULTIVI": world.model, "PredictiveCheck": world.check}.get(name.partition(".")[0])
    return getattr(owner, name.partition(".")[2]) if "." in name else PUBLIC[name]


def cases(name: str) -> list[tuple[str, Any]]:
    """Every argument of a public function with each of its wrong values."""
    return [
        (argument, value)
        for argument, parameter in arguments(name).items()
        for value in wrong_values(name, argument, str(parameter.annotation))
    ]


def _parts(value: Any) -> list[str]:
    """Texts by which a message may show a value: itself, its class or shape, or something that it holds or lacks."""
    found = [
        shown(value),
        type(value).__name__,
        str(() if isinstance(value, type) else tuple(getattr(value, "shape", ()))),
    ]
    if isinstance(value, pd.DataFrame):
        found += ["lacks the columns", "holds no changes"]
    elif isinstance(value, torch.Tensor) and not value.dim():
        found.append("one number")
    elif isinstance(value, (list, tuple, set, dict)):
        held = [*value, *value.values()] if isinstance(value, dict) else [*value]
        found += [f"({len(held)},)", f"a mask of {len(held)} ", *(text for part in held for text in _parts(part))]
        found += [] if held else ["empty", "selects no", "at least one"]
    elif callable(value):
        found.append("takes 1 arguments")
    elif isinstance(value, str) and value:
        found.append(f"not {value}.")
    return found


def test_every_public_argument_is_swept():
    """A new argument of a public function has to say what is wrong for it: in PLAIN by its type, or in OTHER."""
    lacking = [
        f"{name}({argument}: {parameter.annotation})"
        for name in PUBLIC
        for argument, parameter in arguments(name).items()
        if str(parameter.annotation).removesuffix(" | None") not in PLAIN and argument not in OTHER
    ]
    assert lacking == []
    assert sum(len(cases(name)) for name in PUBLIC) > 3500


@pytest.mark.parametrize("name", PUBLIC)
def test_wrong_values_are_refused_by_name(world, name):
    function, valid = _bound(world, name), _call(world, name)
    before = torch.get_rng_state()
    problems = []
    for argument, value in cases(name):
        given = {**valid, argument: value}
        if argument in ("idx1", "idx2"):
            given = {**{key: kept for key, kept in given.items() if key != "groupby"}, "idx1": [0], argument: value}
        try:
            function(**given)
            problems.append(f"{argument}={shown(value)} is accepted")
        except (TypeError, ValueError, KeyError, IndexError) as error:
            message = str(error)
            if argument not in message or not any(part in message for part in _parts(value)):
                problems.append(f"{argument}={shown(value)}: {type(error).__name__}: {message[:150]}")
        except Exception as error:
            problems.append(f"{argument}={shown(value)}: {type(error).__name__}: {str(error)[:150]}")
    assert not problems, "\n".join(problems)
    assert torch.equal(torch.get_rng_state(), before)
