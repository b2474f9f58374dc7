"""Arguments of scvi-tools that have another name here, no meaning, or something in their place."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from pyro_multivi.api.scvi_tools.devices import of_use_gpu
from pyro_multivi.data.checks import caution, check_mapping, nearest, shown, unwrapped

logger = logging.getLogger("pyro_multivi")

P = ParamSpec("P")
R = TypeVar("R")

_ONE_DEVICE = "training runs on one device"
_LOADING = "counts stay sparse in memory, and no workers load them"
_HISTORY = "everything is recorded in model.history; for more give callbacks=[function of (epoch, row, program)]"
_KL = "KL terms have weight 1 after warm-up; scale them in a program of your own with pyro.poutine.scale"
_RATE = "the learning rate stays; the average of the latest weights (average_steps) takes the place of smaller steps"
_PARTS = "every epoch passes over all cells; give fewer cells, or max_epochs"


#: What means something else here than in scvi-tools though it is called alike; each is said once.
DIFFERENCES = {
    "train": (
        "train(): defaults are lr=2e-3, one epoch of KL warm-up, early stopping on the ELBO with a patience of 10 to "
        "30, no adversary, where scvi-tools 1.4 has lr=1e-4, 50 epochs, the reconstruction loss with 50, and "
        "adversarial_mixing=True."
    ),
    "effect_size": (
        "differential_accessibility(): effect_size and emp_effect are group 1 minus group 2, the opposite of "
        "scvi-tools; delta=0.05 is five percentage points, not a log2 ratio."
    ),
    "library_size": "get_library_size_factors(): 'expression' is in counts, where scvi-tools has a logarithm.",
    "n_samples_overall": (
        "n_samples_overall is the number of posterior draws averaged for each cell; scvi-tools draws so many cells."
    ),
    "seed": "Draws depend on the argument seed alone: the same call gives the same draws. For others give seed=1, 2.",
}
_said: set[str] = set()


def tell_difference(name: str) -> None:
    """Log one of the differences, once in a process, in scripts that say ``scvi.model.MULTIVI``."""
    if "pyro_multivi.model" in sys.modules and name not in _said:
        _said.add(name)
        logger.warning("%s See tutorials/from_scvi_tools.md.", DIFFERENCES[name])


@dataclass(frozen=True)
class Foreign:
    """An argument of scvi-tools that a function here does not have.

    Attributes
    ----------
    says
        What happens instead, or what to use, as the end of a sentence.
    same
        Values with which nothing is different: taken without a word.
    refused
        Any other value is an error; else it is left out with a warning.
    ours
        Argument here that gets the value, without a word.
    """

    says: str = ""
    same: tuple[Any, ...] = (None,)
    refused: bool = False
    ours: str = ""

    def take(self, name: str, value: Any) -> str:
        """A sentence on what happens to a value; empty if nothing is different."""
        found = unwrapped(value)
        if any(found is each or (type(found) is type(each) and found == each) for each in self.same):
            return ""
        sentence = f"{name}={shown(value)}: {self.says}"
        if self.refused:
            raise TypeError(f"{sentence}.")
        return sentence


def _refused(says: str, *same: Any) -> Foreign:
    return Foreign(says, (None, *same), refused=True)


def _left_out(says: str, *same: Any) -> Foreign:
    return Foreign(says, (None, *same))


#: Keys of ``plan_kwargs``.
PLAN: dict[str, Foreign] = {
    **{name: Foreign(ours=name) for name in ("lr", "weight_decay", "eps", "n_epochs_kl_warmup", "n_steps_kl_warmup")},
    "adversarial_classifier": Foreign(ours="adversarial_mixing"),
    "scale_adversarial_loss": Foreign(ours="adversarial_weight"),
    "optimizer": _left_out("the optimizer is Adam, with weight decay apart from the gradient", "Adam", "AdamW"),
    "optimizer_creator": _refused("the optimizer is Adam; for another train model.program in a loop of Pyro's SVI"),
    "update_only_decoder": _refused("freeze weights: model.program.get_parameter(name).requires_grad_(False)", False),
    "reduce_lr_on_plateau": _left_out(_RATE, False),
    **{name: Foreign(same=(), says=_RATE) for name in ("lr_factor", "lr_patience", "lr_threshold", "lr_min")},
    "lr_scheduler_metric": Foreign(same=(), says=_RATE),
    "max_kl_weight": _refused(_KL, 1.0, 1),
    "min_kl_weight": _refused(_KL, 0.0, 0),
    "compile": _left_out("torch.compile is not used; train(compile=True) runs loops that Numba compiles", False),
    "compile_kwargs": _left_out("torch.compile is not used; train(compile=True) runs loops that Numba compiles"),
    "on_step": _left_out(_HISTORY, False),
    "on_epoch": _left_out(_HISTORY, True),
}  # fmt: skip
#: Keys of ``datasplitter_kwargs``.
SPLITTER: dict[str, Foreign] = {
    "load_sparse_tensor": _left_out(_LOADING, True, False),
    "pin_memory": _left_out(_LOADING, False),
    "num_workers": _left_out(_LOADING, 0),
    "persistent_workers": _left_out(_LOADING, False),
    "prefetch_factor": _left_out(_LOADING),
    "drop_dataset_tail": _left_out("every training cell is used in each epoch", False),
    "drop_last": _left_out("the last minibatch of an epoch is used, however small", False),
    "distributed_sampler": _left_out(_ONE_DEVICE, False),
    **{name: Foreign(ours=name) for name in ("train_size", "validation_size", "shuffle_set_split", "batch_size")},
    "external_indexing": Foreign(ours="external_indexing"),
}
#: Arguments of Lightning's Trainer, of scvi-tools' own and of its older versions.
TRAIN: dict[str, Foreign] = {
    "enable_progress_bar": Foreign(ours="progress_bar"),
    "gradient_clip_val": Foreign(ours="gradient_clip"),
    "gradient_clip_algorithm": _refused("gradients are clipped by their norm", "norm"),
    "save_best": _left_out(
        "where cells are held out the weights of the epoch best for them are kept, with train_size=1 the latest", True
    ),
    "early_stopping_mode": _refused("all losses in the history are lower where they are better", "min"),
    "early_stopping_warmup_epochs": _left_out("early_stopping_patience counts from the first scored epoch", 0),
    "logger": _left_out(_HISTORY, False),
    "log_every_n_steps": _left_out(_HISTORY, 10),
    "log_save_dir": _left_out(_HISTORY),
    "default_root_dir": _left_out("training writes to no folder but checkpoint"),
    "learning_rate_monitor": _left_out(_HISTORY, False),
    "enable_checkpointing": _left_out("checkpoint='folder' writes checkpoints; a callback may call model.save", False),
    "checkpointing_monitor": _left_out("early_stopping_monitor decides which weights are best", "validation_loss"),
    "enable_model_summary": _left_out("print(model) and print(model.program) describe it", False),
    "weights_summary": _left_out("print(model) and print(model.program) describe it"),
    "num_sanity_val_steps": _left_out("validation begins with the first epoch", 0),
    "benchmark": _left_out("no network here has convolutions", True, False),
    "deterministic": _left_out("the same seed gives the same model on one device without it", True, False),
    "inference_mode": _left_out("validation needs no gradients anyway", True, False),
    "progress_bar_refresh_rate": _left_out("the bar is drawn by tqdm", 1),
    "simple_progress_bar": _left_out("the bar is drawn by tqdm", True, False),
    "detect_anomaly": _left_out("a loss that is not finite ends training with its cause (TrainingDiverged)", False),
    "profiler": _left_out("use torch.profiler around the call"),
    "strategy": _left_out(_ONE_DEVICE, "auto"),
    "num_nodes": _left_out(_ONE_DEVICE, 1),
    "sync_batchnorm": _left_out(_ONE_DEVICE, False),
    "use_distributed_sampler": _left_out(_ONE_DEVICE, True, False),
    "plugins": _refused("plug-ins of Lightning have nothing to act on"),
    "accumulate_grad_batches": _refused("give a larger batch_size", 1),
    "limit_train_batches": _refused(_PARTS, 1.0),
    "limit_val_batches": _refused(_PARTS, 1.0),
    "limit_test_batches": _left_out("cells that are neither trained on nor held out are not used", 1.0),
    "limit_predict_batches": _left_out("training predicts nothing", 1.0),
    "overfit_batches": _refused(_PARTS, 0.0, 0),
    "fast_dev_run": _refused("give max_epochs=1", False),
    "max_steps": _refused("give max_epochs", -1),
    "max_time": _refused("a callback that returns True ends training"),
    "min_epochs": _refused("give early_stopping=False, or a larger early_stopping_patience"),
    "min_steps": _refused("give early_stopping=False, or a larger early_stopping_patience"),
    "val_check_interval": _refused("validation cells are scored after epochs: check_val_every_n_epoch", 1.0),
    "reload_dataloaders_every_n_epochs": _left_out(_LOADING, 0),
    "barebones": _left_out("give progress_bar=False", False),
    "model_registry": _left_out(_HISTORY),
    "datamodule": _refused("data come from the object given to the constructor, which may be backed by a file"),
    "trainer_config": _refused("give its entries as arguments"),
    "plan_config": _refused("give its entries as plan_kwargs"),
    **{name: SPLITTER[name] for name in ("load_sparse_tensor", "pin_memory", "drop_last")},
}  # fmt: skip
CONSTRUCTOR: dict[str, Foreign] = {
    "n_input_proteins": _left_out("their number is that of the setup"),
    "protein_background_prior_mean": _refused(
        "it starts from the data; it is program.extra['protein'].background_log_mean"
    ),
    "protein_background_prior_scale": _refused("it is learned, from program.extra['protein'].background_log_sd"),
    "gene_dispersion": Foreign(ours="dispersion"),
    "model_depth": _refused("depth is always modelled; library='observed' takes that of RNA from the counts", True),
    "use_size_factor_key": _refused("size factors are used where size_factor_key was given to the setup", True, False),
    "extra_payload_autotune": _left_out("scvi.autotune has nothing to read from this model", False),
    "registry": _refused("give the data set up by setup_anndata or setup_mudata"),
    "datamodule": TRAIN["datamodule"],
}
SETUP_ANNDATA: dict[str, Foreign] = {
    "idx_layer": _left_out("cells are known by obs_names"),
}
SAVE: dict[str, Foreign] = {
    "save_kwargs": _left_out("the model is a folder of tensors and JSON, not written by torch.save"),
    "legacy_mudata_format": _left_out("models of one format are written", False),
    "datamodule": TRAIN["datamodule"],
    # scvi-tools takes any name here, and pipelines write this for save_anndata.
    "anndata": _left_out("save_anndata says whether data are saved", False),
    **dict.fromkeys(
        ("compression", "compression_opts", "as_dense", "dataset_kwargs"),
        _left_out("saved data are written uncompressed; for another form write them yourself and load(path, adata)"),
    ),
}  # fmt: skip
LOAD: dict[str, Foreign] = {
    "backup_url": _refused("nothing is downloaded: fetch the model and give its folder"),
    "datamodule": TRAIN["datamodule"],
    "allowed_classes_names_list": _left_out("the class is checked by program_class"),
}
QUERY: dict[str, Foreign] = {
    "registry": _refused("give the query as adata"),
    "datamodule": TRAIN["datamodule"],
    "inplace_subset_query_vars": _left_out("features are found by name, and the object is not changed", False),
    "freeze_classifier": _left_out("there is no classifier", True, False),
    "transfer_batch": _refused("batches that the reference does not know are new ones", True),
}
VAR_NAMES = {"legacy_mudata_format": _left_out("names come by modality", False)}
CELLS: dict[str, Foreign] = {
    "dataloader": _refused("give cells by adata and indices"),
    "data_loader_kwargs": _left_out(_LOADING),
}
TOTALVI: dict[str, Foreign] = {
    "sample_protein_mixing": _refused("the foreground enters by its probability", False),
    "gene_list": _refused("genes are those of get_normalized_expression"),
    "library_size": _refused("genes are those of get_normalized_expression", 1),
}
DIFFERENTIAL: dict[str, Foreign] = {
    "use_observed_batches": _refused("batch_correction=False decodes groups in their own batches", False),
    "filter_outlier_cells": _refused("choose cells by idx1 and idx2", False),
    "importance_weighting_kwargs": _left_out("weights='importance' has nothing to set"),
    "dataloader": CELLS["dataloader"],
    "mc_samples": _left_out("n_samples is the number of draws"),
}  # fmt: skip


def takes(
    table: Mapping[str, Foreign], translate: Callable[[dict[str, Any]], list[str]] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take arguments of scvi-tools that it does not have, by name.

    Parameters
    ----------
    table
        These arguments.
    translate
        Changes the named arguments of a call in place beforehand, and returns sentences for the warning.

    Warns
    -----
    UserWarning
        One for all arguments that are left out, with what happens instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own = inspect.signature(function).parameters

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            foreign = [name for name in kwargs if name not in own]
            if not foreign and translate is None:
                return function(*args, **kwargs)
            given: dict[str, Any] = dict(kwargs)
            positional = {*list(own)[: len(args)]}
            said = [] if translate is None else translate(given)
            said += _translated(given, [name for name in foreign if name in given], table, {*positional, *given})
            given = {name: value for name, value in given.items() if name not in positional or name in kwargs}
            if said:
                caution(f"Arguments of scvi-tools without effect here. {'. '.join(said)}.")
            return function(*args, **given)

        return run

    return decorate


def _translated(
    given: dict[str, Any], names: Iterable[str], table: Mapping[str, Foreign], before: Iterable[str]
) -> list[str]:
    """Take foreign arguments out of those of a call, and put ours in; what was given by our name stays."""
    said = []
    for name in names:
        entry = table.get(name)
        if entry is None:
            continue  # Python's own error names the function too.
        value = given.pop(name)
        if entry.ours:
            if value is not None and entry.ours not in before:
                given[entry.ours] = value
        else:
            said.append(entry.take(name, value))
    return [sentence for sentence in said if sentence]


def train_arguments(given: dict[str, Any]) -> list[str]:
    """Entries of ``plan_kwargs`` and ``datasplitter_kwargs`` as arguments of ``train``; those given there win."""
    said = []
    for argument, table in (("plan_kwargs", PLAN), ("datasplitter_kwargs", SPLITTER)):
        if argument not in given:
            continue
        entries = check_mapping(argument, given.pop(argument), "{'lr': 1e-3}" if table is PLAN else "{'drop_last': 3}")
        for key in entries:
            if key not in table:
                raise TypeError(f"{argument} has the key {key!r}. {nearest(key, table)}")
        if entries.get("scale_adversarial_loss") == "auto":
            del entries["scale_adversarial_loss"]  # It grows as the KL terms do, the default.
        said += _translated(entries, list(entries), table, ())
        for name, value in entries.items():
            given.setdefault(name, value)
    if "use_gpu" in given:
        accelerator, number = of_use_gpu(given.pop("use_gpu"))
        given.setdefault("accelerator", accelerator)
        if number is not None:
            given.setdefault("devices", [number])
    stop = unwrapped(given.get("early_stopping"))
    if isinstance(stop, int) and not isinstance(stop, bool) and stop > 1:
        given["early_stopping"] = True
        said.append(f"early_stopping={stop}: it is on; for a patience of {stop} give early_stopping_patience={stop}")
    return said


def scvi_columns(history: Any) -> dict[str, Any]:
    """Columns of scvi-tools' history made of those recorded, a frame."""
    found = dict.fromkeys(("train_loss_epoch", "train_loss_step"), history["train_loss"])
    found["kl_global_train"] = 0.0 * history["train_loss"]
    if "reconstruction_loss_validation" in history:
        names = [f"{name}_validation" for name in ("alignment", "mixing", "distillation")]
        parts = [history[name] for name in names if name in history]
        kl = history["kl_weight"] * history["kl_local_validation"]
        found["validation_loss"] = sum(parts, history["reconstruction_loss_validation"] + kl)
        found["kl_global_validation"] = 0.0 * history["elbo_validation"]
    return found


class Absent:
    """A method of scvi-tools that is not here: asking for it says what to use."""

    def __init__(self, name: str, says: str) -> None:
        self.message = f"MULTIVI has no {name}: {says}."

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError(self.message)

    def __set__(self, instance: object, value: object) -> None:
        self.__get__(instance)


#: Methods of scvi-tools' MULTIVI that are not here.
ABSENT: dict[str, str] = {
    "convert_legacy_save": "models of scvi-tools cannot be read; train one here",
    "get_aggregated_posterior": "posterior.draw(model.program, model.minibatch()) gives draws of all cells",
    "differential_abundance": "compare numbers of neighbours in the latent space, for instance by Milo",
    **dict.fromkeys(("register_manager", "deregister_manager"), "nothing is registered beside adata.uns"),
    "transfer_fields": "give other data to any method, adata=other: their columns are found by name",
    "update_setup_method_args": "call setup_anndata or setup_mudata again",
    "trainer": "training is not Lightning's; model.history has what was recorded",
    **dict.fromkeys(("run_name", "run_id"), "no runs are tracked; give callbacks to train"),
}
