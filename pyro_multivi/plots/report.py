"""Report of a predictive check: tables, and one page with the pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pyro_multivi import plots
from pyro_multivi._files import whole_file
from pyro_multivi._optional import require
from pyro_multivi._version import __version__
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.posterior.checks.result import PredictiveCheck

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Tables of features.
_FEATURES = tuple(modality.features for modality in MODALITIES)
#: Name of the page within the folder.
PAGE = "check.html"
# Width of one panel in inches, and dots per inch: at normal size letters are as large as the text.
_PANEL, _DPI = 4.2, 100
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; height: auto; display: block; margin: .5em 0 2em; }
table { border-collapse: collapse; margin: .5em 0 2em; font-size: 14px; }
th, td { padding: .25em .8em; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.fails td { background: #fdf0e6; }
p.help { max-width: 52em; }
"""


class Picture(NamedTuple):
    """A picture of the page: heading, a sentence on how to read it, functions that draw side by side into ``ax``."""

    title: str
    help: str
    panels: Sequence[Callable[..., Any]]


def check_and_report(
    model: MULTIVI, out: Path, *, labels: str | None = None, **arguments: Any
) -> tuple[PredictiveCheck, list[str]]:
    """Check a model and write tables and a page.

    Parameters
    ----------
    model
        Trained model with its data.
    out
        Folder to write to; created if it does not exist.
    labels
        Column of obs that groups statistics and colours the latent space.
    **arguments
        Arguments of :meth:`~pyro_multivi.MULTIVI.posterior_predictive_check`.

    Returns
    -------
    PredictiveCheck, list
        Result of the check, and names of the written files.

    Raises
    ------
    ImportError
        Without the extra ``plot``.
    """
    require("matplotlib.figure", "plot")
    check = model.posterior_predictive_check(groupby=labels, **arguments)
    out.mkdir(parents=True, exist_ok=True)
    written = [path.name for path in check.to_csv(out)]
    with whole_file(out / PAGE) as part:
        part.write_text(page(model, check, labels), encoding="utf-8")
    return check, [*written, PAGE]


def page(model: MULTIVI, check: PredictiveCheck, labels: str | None = None) -> str:
    """Self-contained HTML page of a check."""
    summary = check.summary()
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>Predictive check</title><style>{_STYLE}</style></head><body>",
        "<h1>Predictive check</h1>",
        f"<p>{html.escape(repr(model))}</p>",
        f"<p>{check.n_samples} replicates of {check.n_cells} {check.setting}, pyro-multivi {__version__}. "
        f"{_verdict(summary)}</p>",
        *(f"<p><strong>Not checked:</strong> {html.escape(note)}.</p>" for note in check.notes),
        "<h2>Statistics of the data and of replicates</h2>",
        f"<p class='help'>A replicate is what the model would have measured in the same cells; a good model puts "
        f"{check.level:.0%} of the observed values inside the central {check.level:.0%} of its replicates, and a "
        f"statistic fails here (shaded) if more than {2 * (1 - check.level):.0%} lie outside, beyond "
        "chance. Statistics of single cells are easy to pass, because the depth and "
        "state of a cell are inferred from its own counts.</p>",
        _table(_readable(summary), summary["fails"].tolist() if len(summary) else []),
        "<h2>Calibration in numbers</h2>",
        "<p class='help'>ece is the mean gap between predicted and actual share of open regions, brier the mean "
        "squared error of the probabilities (it should be below brier_of_region_rates, what a constant rate per region "
        "scores), coverage_90 the share of counts inside 90 % intervals, of all counts and of those whose "
        "expectation is at least 1.</p>",
        _table(_scores(check.scores)),
    ]
    for picture in pictures(model, check, labels):
        parts += [
            f"<h2>{html.escape(picture.title)}</h2>",
            f"<p class='help'>{html.escape(picture.help)}</p>",
            f"<img alt='{html.escape(picture.title, quote=True)}' src='data:image/png;base64,{_png(picture)}'>",
        ]
    for name in _FEATURES:
        table = getattr(check, name)
        if len(table):
            parts += [
                f"<h2>{name.capitalize()} reproduced worst</h2>",
                f"<p class='help'>The {name} whose observed value lies farthest from the replicates, in widths of "
                "their interval.</p>",
                _table(worst(table)),
            ]
    return "\n".join([*parts, "</body></html>"])


def pictures(model: MULTIVI, check: PredictiveCheck, labels: str | None = None) -> list[Picture]:
    """Pictures of the tables that a check has, and of training."""
    found: list[Picture] = []
    for things in (*_FEATURES, "cells"):
        table, title = getattr(check, things), things.capitalize()
        if not len(table):
            continue
        names = list(pd.unique(table["statistic"]))
        found.append(
            Picture(
                f"{title}: observed against replicated",
                f"Each point is one of the {things}, its bar the central {check.level:.0%} of replicates: "
                "points above the line have more in the data than the model expects, points below less.",
                [partial(plots.observed_against_replicated, table, name, level=check.level) for name in names],
            )
        )
        if things != "cells":
            found.append(
                Picture(
                    f"{title}: p-values",
                    "Level bars are right; a peak at 0 means that the data exceed the replicates, at 1 that they fall "
                    "short, in the middle that the model is more scattered than the data.",
                    [partial(plots.p_value_histogram, table, name) for name in names],
                )
            )
    latent = np.asarray(model.get_latent_representation())
    kinds = None if labels is None else model.adata.obs[labels].astype(str).to_numpy()
    hidden = pd.unique(check.imputed["modality"]) if len(check.imputed) else ()
    found += [
        Picture(
            "Counts of genes: rootogram",
            "Blue bars hang from the orange curve of the model and should end on the zero line: one that ends "
            "above it is a count rarer in the data than in the model, one that reaches below is more frequent.",
            [partial(plots.rootogram, check.histogram, start=start) for start in (0, 2) if len(check.histogram)],
        ),
        Picture(
            "Is predicted accessibility reliable?",
            "Of the regions predicted open with a probability of 20 %, 20 % should be open: points on the "
            "black line are right, points below it too confident that regions are open. Hidden accessibility was "
            "predicted from RNA.",
            [partial(plots.calibration_curve, check.reliability)] if len(check.reliability) else [],
        ),
        Picture(
            "Are intervals of expression wide enough?",
            "A curve below the line means intervals that are too narrow, above it too wide; where most counts are "
            "0 any model is right, so look at counts expected to be at least 1.",
            [partial(plots.coverage_curve, check.coverage)] if len(check.coverage) else [],
        ),
        Picture(
            "Predicted from the other modality, against measured",
            "On the line the mean of a feature is right; the colour (yellow is good) shows whether the prediction "
            "is also high in the right cells.",
            [partial(plots.imputed_against_measured, check.imputed, modality) for modality in hidden],
        ),
        Picture(
            "Training and latent space",
            "Curves that still fall mean that training was too short, a validation curve that rises that it was too "
            "long; the right picture shows all cells in the two widest directions of the latent space.",
            [partial(plots.training_history, model.history, "elbo"), partial(plots.latent_scatter, latent, kinds)],
        ),
    ]
    return [picture for picture in found if picture.panels]


def worst(table: pd.DataFrame, n: int = 5) -> pd.DataFrame:
    """Rows of the ``n`` features of each statistic that lie farthest from their replicates."""
    width = (table["upper"] - table["lower"]).clip(lower=1e-12)
    distance = (table["observed"] - table["replicated"]).abs() / width
    ordered = table.assign(distance=distance).sort_values("distance", ascending=False, kind="stable")
    feature = table.columns[1]
    chosen = ordered.dropna(subset=["distance"]).groupby("statistic", sort=False).head(n)
    rank = {name: place for place, name in enumerate(pd.unique(table["statistic"]))}
    chosen = chosen.sort_values("statistic", key=lambda names: names.map(rank), kind="stable")
    return chosen[["statistic", feature, "observed", "replicated", "lower", "upper", "p_value"]]


def _png(picture: Picture) -> str:
    figure_class: type[Figure] = require("matplotlib.figure", "plot").Figure
    n = len(picture.panels)
    columns = min(n, 2 if n in (2, 4) else 3)
    rows = -(-n // columns)
    wide = 1.3 if columns == 1 else 1.2
    figure = figure_class(figsize=(wide * _PANEL * columns, _PANEL * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for draw, ax in zip(picture.panels, axes, strict=False):
        draw(ax=ax)
    for ax in axes[n:]:
        ax.remove()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _verdict(summary: pd.DataFrame) -> str:
    if not len(summary):
        return ""
    whole = summary[~summary["table"].str.contains(" by ")]
    failed = [f"{row['statistic']} ({row['table']})" for row in whole.to_dict("records") if row["fails"]]
    if not failed:
        return "<strong>No statistic fails.</strong>"
    return f"<strong>{len(failed)} of {len(whole)} statistics fail:</strong> {html.escape(', '.join(failed))}."


def _readable(summary: pd.DataFrame) -> pd.DataFrame:
    if not len(summary):
        return summary
    shown = summary.copy()
    for name in ("data_above", "data_below", "expected"):
        shown[name] = [f"{value:.1%}" for value in summary[name]]
    shown["fails"] = ["fails" if value else "ok" for value in summary["fails"]]
    return shown.rename(columns=lambda name: str(name).replace("_", " "))


def _scores(scores: pd.DataFrame) -> pd.DataFrame:
    if not len(scores):
        return scores
    wide = scores.pivot(index="score", columns="setting", values="value")
    wide = wide.reindex(index=pd.unique(scores["score"]), columns=pd.unique(scores["setting"]))
    return wide.reset_index(names="score")


def _table(frame: pd.DataFrame, shaded: Sequence[bool] = ()) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, (float, np.floating)):
            return "" if np.isnan(value) else f"{value:.4g}"
        return html.escape(str(value))

    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in frame.columns)
    rows = []
    for number, row in enumerate(frame.itertuples(index=False)):
        kind = " class='fails'" if number < len(shaded) and shaded[number] else ""
        rows.append(f"<tr{kind}>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
