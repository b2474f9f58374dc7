"""Report of a predictive check: tables, and one page with the pictures."""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pyro_multivi import plots
from pyro_multivi._optional import require
from pyro_multivi._version import __version__
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.files import write_whole
from pyro_multivi.plots.latent import as_words
from pyro_multivi.posterior.checks.result import (
    FAILS,
    NO_TEST,
    PredictiveCheck,
    expected_outside,
    p_value_text,
    verdict,
    verdict_in_words,
)
from pyro_multivi.processes.group import alone, is_first_process

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name of the page within the folder.
PAGE = "check.html"
# Width of one panel in inches; pixels per inch on the page, where letters are as large as the text, and in the file.
_PANEL, _PAGE_DPI, _FILE_DPI = 4.2, 100, 150
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
img { max-width: 100%; height: auto; display: block; margin: .5em 0 2em; }
.wide { overflow-x: auto; margin: .5em 0 2em; }
table { border-collapse: collapse; font-size: 14px; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th.name, td.name { text-align: left; }
tr.fails td { background: #fdf0e6; }
p, dl { max-width: 52em; }
dt { font-weight: 600; }
dd { margin: 0 0 .5em 1.5em; }
nav ul { columns: 2; max-width: 52em; padding-left: 1.2em; }
a { color: #005a8c; }
@media (max-width: 900px) { table { font-size: 13px; } th, td { padding: .25em .3em; } }
"""


class Picture(NamedTuple):
    """A picture of the page: heading, a sentence on how to read it, functions that draw side by side into ``ax``."""

    title: str
    help: str
    panels: Sequence[Callable[..., Any]]


def check_and_report(
    model: MULTIVI, out: Path, *, labels: str | None = None, **arguments: Any
) -> tuple[PredictiveCheck, list[str]]:
    """Check a model and write tables and a page; of several processes the first writes.

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
    if not is_first_process():
        return check, []
    out.mkdir(parents=True, exist_ok=True)
    # Aside first: where the disk is full, what was there stays as it was.
    with tempfile.TemporaryDirectory(prefix=".check-", dir=out) as aside:
        written = [path.name for path in check.to_csv(aside)]
        # The other processes, if there are any, have gone on.
        with alone():
            write_whole(Path(aside) / PAGE, page(model, check, labels).encode())
        for name in (*written, PAGE):
            os.replace(Path(aside) / name, out / name)
    return check, [*written, PAGE]


def page(model: MULTIVI, check: PredictiveCheck, labels: str | None = None) -> str:
    """Self-contained HTML page of a check."""
    sections = _sections(model, check, labels)
    contents = (f"<li><a href='#s{place}'>{html.escape(title)}</a></li>" for place, (title, _) in enumerate(sections))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Predictive check</title><style>{_STYLE}</style></head><body>",
        "<h1>Predictive check</h1>",
        f"<p>{html.escape(repr(model))}</p>",
        f"<p>{check.n_samples} replicates of {check.n_cells} {check.setting}, pyro-multivi {__version__}.</p>",
        f"<p><strong>{html.escape(_verdict(check.summary()))}</strong></p>",
        *(f"<p><strong>Not checked:</strong> {html.escape(note)}.</p>" for note in check.notes),
        f"<nav><ul>{''.join(contents)}</ul></nav>",
        *(f"<h2 id='s{place}'>{html.escape(title)}</h2>\n{body}" for place, (title, body) in enumerate(sections)),
    ]
    return "\n".join([*parts, "</body></html>"])


def _sections(model: MULTIVI, check: PredictiveCheck, labels: str | None) -> list[tuple[str, str]]:
    """Headings and bodies of the page, in order."""
    summary = check.summary()
    found = [
        (
            "Statistics of the data and of replicates",
            _help(
                f"A row counts the features, cells or groups whose observed value lies outside the central "
                f"{check.level:.0%} of its replicates. It {FAILS} (shaded) if these are more than twice the share "
                f"expected under the right model, beyond chance; {NO_TEST}: no test. Terms are defined at the end."
            )
            + _table(_readable(summary), [word == FAILS for word in map(verdict, summary["fails"])])
            if len(summary)
            else "",
        )
    ]
    if len(check.totals):
        totals = check.totals[check.totals["by"] == "all"].drop(columns=["by", "group"])
        text = "Mean and standard deviation over all cells of their depth and of the number of their features."
        found.append(("Cells, summed up", _help(text) + _table(_with_p_values(totals, check.n_samples))))
    if len(check.scores):
        text = (
            "Small ece and largest_coverage_gap are good, and coverage_90 near 0.9; brier below brier_of_region_rates."
        )
        found.append(("Calibration in numbers", _help(text) + _table(_scores(check.scores))))
    for picture in pictures(model, check, labels):
        width, image = _png(picture)
        alt = html.escape(picture.title, quote=True)
        image = f"<img alt='{alt}' width='{width}' src='data:image/png;base64,{image}'>"
        found.append((picture.title, _help(picture.help) + image))
    for name, table in check.feature_tables.items():
        text = f"The {name} whose observed value lies farthest from the replicates, in widths of their interval."
        shown = _with_p_values(worst(table), check.n_samples)
        found.append((f"{name.capitalize()} reproduced worst", _help(text) + _table(shown)))
    terms = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in _terms(check).items())
    return [*((title, body) for title, body in found if body), ("Terms", f"<dl>{terms}</dl>")]


def _terms(check: PredictiveCheck) -> dict[str, str]:
    """Words of the page and of its tables."""
    s, level = check.n_samples, f"{check.level:.0%}"
    return {
        "replicate": "Counts that the model would have measured in the same cells: latents drawn from the posterior of "
        "each cell, counts from the likelihood.",
        "observed, replicated": "Value of a statistic in the data, and its mean over replicates. In every picture the "
        "observed value is on the vertical axis.",
        "lower, upper": f"Ends of the central {level} of the replicates.",
        "p-value": f"Share of the {s} replicates above the observed value, equal ones counted by half: near 0 the data "
        f"are larger than the model expects, near 1 smaller. Its standard error is that of a share of {s}, "
        f"{0.5 / s**0.5:.2f} in the middle; beyond all replicates it is only known to be {p_value_text(0.0, s)}.",
        "outside, data above, data below": f"Features, cells or groups whose observed value lies outside the central "
        f"{level} of its replicates, by p-value: above it, or below it.",
        "expected": f"Share outside under the right model. With {s} replicates it is "
        f"{expected_outside(s, check.level):.1%}.",
        "uniformity": "Kolmogorov's distance of the p-values from uniform ones: 0 is best, 1 is worst. Statistics of "
        "single cells are never uniform, because state and depth of a cell are inferred from its own counts.",
        FAILS: "More than twice the expected share lie outside, and more than chance would put there (binomial).",
        NO_TEST: "The depth of a cell is inferred from just these counts, so that its replicates repeat it: neither "
        "agreement nor a small difference tells anything of the model.",
        "mean, variance, cv, zero_fraction": "Over cells, of the counts of a gene or protein: cv is the standard "
        "deviation over the mean, zero_fraction the share of cells without a count.",
        "detection_rate": "Share of cells in which a region is open.",
        "expression_depth, detected_genes, accessible_regions": "Of a cell: sum of its gene counts, number of genes "
        "with a count, number of open regions.",
        "by": "Statistics within the cells of each batch, or of each group of the labels.",
        "held-out cells": "Cells that the model was not trained on.",
        "hidden accessibility, hidden expression": "A modality of paired cells is hidden from the model and predicted "
        "from the other.",
        "ece": "Expected calibration error: mean gap between the predicted probability of regions to be open and the "
        "share that is, over bins of the prediction.",
        "brier, brier_of_region_rates": "Mean squared error of the predicted probabilities, and that of a constant "
        "rate for each region.",
        "predicted_rate, observed_rate": "Mean probability of a region to be open, and share of open regions.",
        "coverage_90, largest_coverage_gap": "Share of counts inside their 90 % intervals, and the largest difference "
        "between probability and share over intervals of all widths; expected_1: of counts whose expectation is at "
        "least 1.",
    }


def pictures(model: MULTIVI, check: PredictiveCheck, labels: str | None = None) -> list[Picture]:
    """Pictures of the tables that a check has, and of training."""
    found = _pictures_of_statistics(check)
    latent = np.asarray(model.get_latent_representation())
    groups = None if labels is None else as_words(model.adata.obs[labels])
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
            "black line are right, points below it too confident that regions are open, points above it not confident "
            "enough. Bars are 95 % intervals of the shares. Hidden accessibility was predicted from RNA.",
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
            "Each point is a feature. On the line its mean is right, above it the prediction is too low; the colour "
            "(yellow is good, grey: the feature does not vary) shows whether the prediction is also high in the right "
            "cells.",
            [partial(plots.imputed_against_measured, check.imputed, modality) for modality in hidden],
        ),
        Picture(
            "Training and latent space",
            "Curves that still fall mean that training was too short, a validation curve that rises that it was too "
            "long; the right picture shows all cells in the two widest directions of the latent space.",
            # A training that was interrupted in its first epoch has no history.
            [partial(plots.training_history, model.history, "elbo")] * bool(model.history)
            + [partial(plots.latent_scatter, latent, groups)],
        ),
    ]
    return [picture for picture in found if picture.panels]


def _pictures_of_statistics(check: PredictiveCheck) -> list[Picture]:
    """Statistics against those of replicates, and p-values of those of features."""
    found: list[Picture] = []
    for things, table in {**check.feature_tables, "cells": check.cells}.items():
        if not len(table):
            continue
        title, names = things.capitalize(), list(pd.unique(table["statistic"]))
        found.append(
            Picture(
                f"{title}: observed against replicated",
                f"Each point is one of the {things}, its bar the central {check.level:.0%} of replicates: "
                "points above the line have more in the data than the model expects, points below less. The numbers of "
                "points inside and outside are those of the table.",
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
    return found


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


def _png(picture: Picture) -> tuple[int, str]:
    """Width of a picture on the page in pixels, and the picture in base64."""
    figure_class: type[Figure] = require("matplotlib.figure", "plot").Figure
    n = len(picture.panels)
    # More than two panels side by side are too small to read on a narrow page.
    columns = min(n, 2)
    rows = -(-n // columns)
    width = (1.6 if columns == 1 else 1.2) * _PANEL * columns
    figure = figure_class(figsize=(width, _PANEL * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for draw, ax in zip(picture.panels, axes, strict=False):
        draw(ax=ax)
    for ax in axes[n:]:
        ax.remove()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_FILE_DPI)
    return round(width * _PAGE_DPI), base64.b64encode(file.getvalue()).decode("ascii")


def _verdict(summary: pd.DataFrame) -> str:
    if not len(summary):
        return ""
    failed = [
        f"{row['statistic']} ({row['table']})" for row in summary.to_dict("records") if verdict(row["fails"]) == FAILS
    ]
    return f"{verdict_in_words(summary)}.{' These are ' * bool(failed)}{', '.join(failed)}{'.' * bool(failed)}"


def _readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Summary with counts beside shares, and words for verdicts."""
    share = summary["data_above"] + summary["data_below"]
    return pd.DataFrame(
        {
            "table": summary["table"],
            "statistic": summary["statistic"],
            "outside": [f"{round(part * n)} of {n}" for part, n in zip(share, summary["n"], strict=True)],
            **{
                name.replace("_", " "): [f"{value:.1%}" for value in summary[name]]
                for name in ("data_above", "data_below", "expected")
            },
            "uniformity": summary["uniformity"],
            "verdict": [verdict(value) for value in summary["fails"]],
        }
    )


def _with_p_values(table: pd.DataFrame, n_samples: int) -> pd.DataFrame:
    """A table whose p-values are written to the precision that the replicates give."""
    return table.assign(p_value=[p_value_text(p, n_samples) for p in table["p_value"]]).rename(
        columns={"p_value": "p-value"}
    )


def _scores(scores: pd.DataFrame) -> pd.DataFrame:
    wide = scores.pivot(index="score", columns="setting", values="value")
    wide = wide.reindex(index=pd.unique(scores["score"]), columns=pd.unique(scores["setting"]))
    return wide.reset_index(names="score")


def _help(text: str) -> str:
    return f"<p class='help'>{html.escape(text)}</p>\n"


def _table(frame: pd.DataFrame, shaded: Sequence[bool] = ()) -> str:
    def row_of(values: Iterable[Any], tag: str) -> str:
        cells = (
            f"<{tag}{' class=name' * left}>{text(value)}</{tag}>" for value, left in zip(values, names, strict=True)
        )
        return "".join(cells)

    def text(value: Any) -> str:
        if isinstance(value, (float, np.floating)):
            return "" if np.isnan(value) else f"{value:.4g}"
        return html.escape(str(value))

    # Names stand first, in one column or two; numbers are aligned on the right.
    names = [
        place < 2 and not pd.api.types.is_numeric_dtype(frame.dtypes.iloc[place]) for place in range(frame.shape[1])
    ]
    rows = []
    for number, row in enumerate(frame.itertuples(index=False)):
        kind = " class='fails'" if number < len(shaded) and shaded[number] else ""
        rows.append(f"<tr{kind}>{row_of(row, 'td')}</tr>")
    table = f"<table><thead><tr>{row_of(frame.columns, 'th')}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<div class='wide'>{table}</div>"
