"""Comparison of models by the likelihood of held-out cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_multivi.api.arguments import Data, Indices
from pyro_multivi.api.base import PREDICTION_BATCH
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.data.checks import caution, check_type, check_whole, checked, shown
from pyro_multivi.data.loader import Minibatches, measured
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, Modality, modelled
from pyro_multivi.isolation import isolated
from pyro_multivi.posterior.engine.likelihood import (
    MarginalLikelihood,
    cells_for_likelihood,
    marginal_likelihood,
    observed_sites,
)


@isolated()
@checked
def compare_models(
    models: Mapping[str, MULTIVI],
    adata: Data | None = None,
    indices: Indices = None,
    n_mc_samples: int = 200,
    batch_size: int = PREDICTION_BATCH,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare models by the log-likelihood of the same held-out cells.

    The marginal likelihood of each cell, log p(x, y | s), is estimated by importance sampling, as in
    :meth:`~pyro_multivi.MULTIVI.get_marginal_ll`; proteins, and other extra modalities that the models have, are part
    of the counts. Cells differ far more than models do, so the error that counts is that of the differences between
    models within cells.

    A model of open or closed regions beside one that counts fragments (``accessibility_likelihood``) explains other
    data. Then all are compared on the counts, for which a probability to be open stands for the Poisson count that is
    above zero as often, and beside that on what is open alone: which likelihood suits the data is the best of the
    former. Of data without a count above 1 only what is open is compared.

    Parameters
    ----------
    models
        Trained models by name.
    adata
        Other cells to compare on; default: the data of training, which all models must share.
    indices
        Cells to compare on. Default: those that training held out, which must be the same for all models
        (train them with the same ``seed`` and sizes); with ``adata`` all of its cells.
    n_mc_samples
        Draws per cell.
    batch_size
        Cells at a time.
    seed
        Seed of the draws.

    Returns
    -------
    DataFrame
        One row per model, best first, in nats per cell:

        ========================================= =========================================================
        ``log_likelihood``, ``standard_error``    mean over cells, and its error from the choice of cells
        ``monte_carlo_error``                     part of the error that more draws would remove, at least; see
                                                  :meth:`~pyro_multivi.MULTIVI.get_marginal_ll`
        ``difference``, ``difference_error``      from the best model, with the paired standard error
        ``n_cells``                               number of cells
        ``open_log_likelihood``,                  with both kinds of models: the same of open or closed regions,
        ``open_difference``,                      and from the model that is best at it
        ``open_difference_error``
        ``gene_likelihood``, ``n_hidden``,        options and size of the model
        ``accessibility_likelihood``,
        ``n_latent``, ``n_parameters``
        ========================================= =========================================================

    Raises
    ------
    ValueError
        If there are fewer than two models, they hold out different cells or none, have different features, extra
        modalities or counts, their programs observe different sites, or they differ in ``library``: with ``"observed"``
        the depth is given that others predict.

    Examples
    --------
    >>> import pyro_multivi as pm
    >>> adata = pm.simulate_multiome((60, 20, 20), n_genes=30, n_regions=50, seed=0)
    >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    >>> models = {name: pm.MULTIVI(adata, gene_likelihood=name, n_hidden=16, n_latent=3) for name in ("nb", "poisson")}
    >>> for model in models.values():
    ...     model.train(max_epochs=2, progress_bar=False)
    >>> table = pm.compare_models(models, n_mc_samples=20)
    >>> table.index.tolist(), table["n_cells"].tolist()
    (['nb', 'poisson'], [10, 10])
    """
    if not isinstance(models, Mapping) or len(models) < 2:
        raise ValueError(
            f"models={shown(models)} is not allowed: give a dictionary of at least two trained models, such as "
            "{'zinb': a, 'nb': b}."
        )
    for name, model in models.items():
        check_type(f"models[{name!r}]", model, MULTIVI)
    if adata is None and indices is None:
        indices = _same_held_out(models)
    (first, reference), *others = models.items()
    cells = reference._cells(adata, indices, batch_size)
    for other, model in others:
        of_other = _Candidate(other, model, model._cells(adata, indices, batch_size))
        _check_comparable(_Candidate(first, reference, cells), of_other)
    _warn_of_training_cells(models, cells)
    check_whole("n_mc_samples", n_mc_samples, 2)
    size = cells_for_likelihood(batch_size, n_mc_samples)

    def scored(reading: str | None) -> tuple[dict[str, MarginalLikelihood], NDArray[np.float64]]:
        """Log-likelihoods by model, and those of the best model."""
        found = {
            name: marginal_likelihood(model.program, model._cells(adata, indices, size), n_mc_samples, seed, reading)
            for name, model in models.items()
        }
        return found, max((one.log_likelihood for one in found.values()), key=np.mean)

    is_mixed = len({model.program.config.counts_fragments for model in models.values() if model.spec.n_regions}) > 1
    has_counts = cells.table.y is not None and cells.table.y.largest > 1
    scores, best = scored(("counts" if has_counts else "open") if is_mixed else None)
    opened, best_opened = scored("open") if is_mixed else ({}, best)
    rows = []
    for name, score in scores.items():
        of_open = _open_columns(opened[name].log_likelihood, best_opened) if is_mixed else {}
        rows.append(
            {"model": name, **_score_columns(score, best), **of_open, **_model_columns(models[name], len(best))}
        )
    return pd.DataFrame(rows).set_index("model").sort_values("log_likelihood", ascending=False)


def _score_columns(score: MarginalLikelihood, best: NDArray[np.float64]) -> dict[str, float]:
    by_cell, error = score
    return {
        "log_likelihood": by_cell.mean(),
        "standard_error": _error_of_mean(by_cell),
        "monte_carlo_error": float(np.sqrt(np.square(error).sum()) / len(by_cell)),
        "difference": (by_cell - best).mean(),
        "difference_error": _error_of_mean(by_cell - best),
    }


def _open_columns(by_cell: NDArray[np.float64], best: NDArray[np.float64]) -> dict[str, float]:
    return {
        "open_log_likelihood": by_cell.mean(),
        "open_difference": (by_cell - best).mean(),
        "open_difference_error": _error_of_mean(by_cell - best),
    }


def _model_columns(model: MULTIVI, n_cells: int) -> dict[str, Any]:
    config = model.program.config
    return {
        "n_cells": n_cells,
        "gene_likelihood": config.gene_likelihood if RNA in modelled(config) else "",
        "accessibility_likelihood": config.accessibility_likelihood if config.n_regions else "",
        "n_hidden": config.hidden,
        "n_latent": config.latent,
        "n_parameters": sum(part.numel() for part in model.program.parameters()),
    }


def _same_held_out(models: Mapping[str, MULTIVI]) -> list[str]:
    """Names of the cells that all models hold out."""
    (first, one), *others = models.items()
    held_out = _held_out(one)
    if not held_out:
        raise ValueError(
            f"models[{first!r}] holds out no cell that is known: train with validation_size above 0, or give indices."
        )
    for name, model in others:
        if set(held_out) != set(_held_out(model)):
            raise ValueError(
                f"models[{first!r}] and models[{name!r}] hold out different cells: train both with the same seed, "
                "train_size and validation_size, or give indices that neither was trained on."
            )
    return held_out


def _held_out(model: MULTIVI) -> list[str]:
    names = model._training_table().cell_names
    return [names[position] for position in model.validation_indices.tolist()]


def _warn_of_training_cells(models: Mapping[str, MULTIVI], cells: Minibatches) -> None:
    """Warn where cells chosen by the caller are ones that a model was trained on, by their names."""
    compared = set(cells.cell_names)
    for name, model in models.items():
        split = model._whole_split
        trained = 0 if split is None else len(compared.intersection(split.trained_besides(())))
        if trained:
            caution(
                f"{trained} of the {cells.n_cells} cells compared were trained on by models[{name!r}]: that favours "
                "models that fit training cells closely. Leave out indices and adata to compare held-out cells.",
            )
            return


class _Candidate(NamedTuple):
    """A model of a comparison, and the cells that it is given."""

    name: str
    model: MULTIVI
    cells: Minibatches


def _check_comparable(one: _Candidate, other: _Candidate) -> None:
    """Refuse two models whose likelihoods are of different counts, or given different ones."""
    pair = f"models[{one.name!r}] and models[{other.name!r}]"
    shared = _check_same_measurements(pair, one, other)
    libraries = one.model.program.config.library, other.model.program.config.library
    if libraries[0] != libraries[1]:
        raise ValueError(
            f"{pair} have library={libraries[0]!r} and library={libraries[1]!r}: one is given the depth that the other "
            "must predict. Compare models with the same library."
        )
    _check_same_data(pair, one, other, shared)


def _check_same_measurements(pair: str, one: _Candidate, other: _Candidate) -> list[str]:
    """Refuse models of different features; return the extra modalities that both observe."""
    a, b = one.model, other.model
    for modality in MODALITIES:
        if set(modality.feature_names_in(a.spec)) != set(modality.feature_names_in(b.spec)):
            raise ValueError(
                f"{pair} have different {modality.features}: likelihoods of different counts cannot be compared."
            )
    extra = [sorted(each.name for each in model.program.modelled_extra) for model in (a, b)]
    if extra[0] != extra[1]:
        raise ValueError(
            f"{pair} have the extra modalities {extra[0]} and {extra[1]}: a likelihood of more counts is lower, "
            "whichever model is better. Set up both with the same."
        )
    # What a program of one's own observes.
    observed = [
        sorted(observed_sites(each.model.program, each.cells.cut(each.cells.index[:1]))) for each in (one, other)
    ]
    if observed[0] != observed[1]:
        raise ValueError(
            f"{pair} observe the sites {observed[0]} and {observed[1]}: likelihoods of different measurements cannot "
            "be compared. Compare models that observe the same."
        )
    shared = [name for name in a.spec.extra if name in b.spec.extra and name in {*extra[0], *observed[0]}]
    for name in shared:
        if set(a.spec.extra[name]) != set(b.spec.extra[name]):
            raise ValueError(
                f"{pair} have different features of {name!r}: likelihoods of different counts cannot be compared."
            )
    return shared


def _check_same_data(pair: str, one: _Candidate, other: _Candidate, extra: Sequence[str]) -> None:
    """Refuse different cells, counts or measured features; of extra modalities the values."""
    if list(one.cells.cell_names) != list(other.cells.cell_names):
        raise ValueError(f"{pair} were given different cells: compare them on the same, by name (indices=[...]).")
    # Size factors of RNA are part of the library.
    has_factors = [ATAC.size_factor_in(each.cells.table) is not None for each in (one, other)]
    totals = [[_totals(modality, each.cells) for modality in MODALITIES] for each in (one, other)]
    if has_factors[0] != has_factors[1] or not all(map(torch.equal, *totals)):
        raise ValueError(f"{pair} were given different counts or size factors: compare them on the same data.")
    for name in extra:
        values = [_extra_by_name(name, each) for each in (one, other)]
        if not values[0].equals(values[1]):
            raise ValueError(f"{pair} were given different values of {name!r}: compare them on the same data.")
    for modality in MODALITIES:
        counted = [_measured_by_name(modality, each) for each in (one, other)]
        if not counted[0].equals(counted[1]):
            raise ValueError(
                f"{pair} take different {modality.features} as measured: likelihoods of different counts cannot be "
                "compared. Set up both with the same feature_masks."
            )


def _measured_by_name(modality: Modality, each: _Candidate) -> pd.DataFrame:
    """Number of the cells in which each feature was measured, in the order of their names."""
    table, names = each.cells.table, modality.feature_names_in(each.model.spec)
    cells = measured(each.cells, modality)
    panels: Panels | None = modality.panels_in(table)
    sizes = torch.full((len(names),), len(cells)) if panels is None else panels.n_cells(cells)
    return pd.DataFrame({"cells": sizes.numpy()}, index=pd.Index(names)).sort_index()


def _extra_by_name(name: str, each: _Candidate) -> pd.DataFrame:
    """Values of an extra modality, (cells, features) in the order of the features' names, NaN where not measured."""
    values, measured = each.cells.table.extra[name].at(each.cells.index)
    known = torch.where(measured[:, None], values, torch.nan).numpy()
    return pd.DataFrame(known, columns=pd.Index(each.model.spec.extra[name])).sort_index(axis=1)


def _totals(modality: Modality, cells: Minibatches) -> torch.Tensor:
    counts = modality.counts_in(cells.table)
    return torch.zeros(0) if counts is None else counts.row_sums().double()[cells.index]


def _error_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
