"""From what the workers reported to one Markdown table per case. Pure functions, standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Figure = Callable[[Mapping[str, Any]], float]


def _epoch(result: Mapping[str, Any]) -> float:
    # The first epoch also pays for buffers, caches and lazy imports.
    return statistics.median(result["epoch_seconds"][1:])


def _step(result: Mapping[str, Any]) -> float:
    return _epoch(result) / result["n_steps"]


def _megabytes(key: str) -> Figure:
    return lambda result: result[key] / 1e6


#: Row, part of the benchmark, and the figure in a worker's result.
FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("training step, s", "train", _step),
    ("epoch, s", "train", _epoch),
    ("training, peak memory, MB", "train", _megabytes("peak_bytes")),
    ("imports, memory, MB", "train", _megabytes("import_bytes")),
    ("latent of {n_predict} cells, s", "predict", lambda r: r["latent_seconds"]),
    ("accessibility of {n_predict} cells × {n_regions} regions, s", "predict", lambda r: r["accessibility_seconds"]),
    ("that accessibility, peak memory, MB", "predict", _megabytes("accessibility_peak_bytes")),
)


def floor_seconds(result: Mapping[str, Any]) -> float:
    """All of the floor of a step."""
    return floor_without_encoder(result) + float(result["encoder_seconds"])


def floor_without_encoder(result: Mapping[str, Any]) -> float:
    """The floor of a step if the encoders' first layers cost nothing."""
    return float(result["decoder_seconds"] + result["optimizer_seconds"])


#: Row and the floor in the result of floor.py.
FLOORS: tuple[tuple[str, Figure], ...] = (
    ("floor", floor_seconds),
    ("floor without encoders", floor_without_encoder),
)


def render(case: Mapping[str, Any], records: Sequence[Record]) -> str:
    """One case as Markdown.

    Parameters
    ----------
    case
        ``name``, ``n_genes``, ``n_regions``, ``n_train``, ``n_predict``, ``n_hidden``, ``n_latent``, ``batch_size``.
    records
        One per worker: ``system`` (peer for scvi-tools, ours, floor), ``precision`` (fp32, bf16, also with +compile),
        ``part`` (train, predict), ``round``, and ``result`` or, if it failed, ``failed`` and ``detail``.

    Returns
    -------
    str
        Heading, table, and a list of what failed. Values are medians over rounds. A ratio is the median
        of the ratios within rounds, with their smallest and largest.
    """
    precisions = sorted(
        {r["precision"] for r in records if r["system"] == "ours"}, key=lambda name: (arithmetic(name) != "fp32", name)
    )
    with_peer = any(r["system"] == "peer" for r in records)
    header = [""] + (["peer"] if with_peer else [])
    for precision in precisions:
        header += [f"ours, {precision}"] + (["peer / ours"] if with_peer else [])
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for label, part, figure in FIGURES:
        here = [r for r in records if r["part"] == part]
        if not here:
            continue
        peer = _of(here, "peer")
        row = [label.format(**{key: _grouped(value) for key, value in case.items()})]
        row += [_value(peer, figure)] if with_peer else []
        for precision in precisions:
            ours = _of(here, "ours", precision)
            row.append(_value(ours, figure))
            if with_peer:
                row.append(_ratio(peer, figure, ours, figure))
        rows.append(row)
    if any(r["system"] == "floor" for r in records):
        rows += _floor_rows(records, precisions, with_peer)
    lines = [_heading(case), "", *("| " + " | ".join(row) + " |" for row in rows)]
    notes = _failures(records)
    if any(r.get("result") is not None and r["result"].get("peak_reset") is False for r in records):
        notes.append("- This kernel lets no process forget its peak: peaks of prediction include training before it.")
    return "\n".join([*lines, "", *notes, ""] if notes else [*lines, ""])


def arithmetic(precision: str) -> str:
    """Precision of the matrix products: compiling changes nothing about them."""
    return precision.removesuffix("+compile")


def _floor_rows(records: Sequence[Record], precisions: Iterable[str], with_peer: bool) -> list[list[str]]:
    rows = []
    for label, floor in FLOORS:
        seconds, ratio = [f"{label}, training step, s"], [f"ours / {label}"]
        if with_peer:
            seconds.append("")
            ratio.append("")
        for precision in precisions:
            below, ours = _of(records, "floor", arithmetic(precision)), _of(records, "ours", precision, "train")
            seconds.append(_value(below, floor))
            ratio.append(_ratio(ours, _step, below, floor))
            if with_peer:
                seconds.append("")
                ratio.append("")
        rows += [seconds, ratio]
    return rows


def _of(
    records: Iterable[Record], system: str, precision: str | None = None, part: str | None = None
) -> dict[int, Record]:
    """Records of a system by round. scvi-tools has one precision only."""
    return {
        r["round"]: r
        for r in records
        if r["system"] == system and precision in (None, r["precision"]) and part in (None, r["part"])
    }


def _value(records: Mapping[int, Record], figure: Figure) -> str:
    values = list(_values(records, figure).values())
    if values:
        return _number(statistics.median(values))
    return next((str(r["failed"]) for r in records.values() if r.get("failed")), "–")


def _ratio(above: Mapping[int, Record], top: Figure, below: Mapping[int, Record], bottom: Figure) -> str:
    """Median of the ratios within rounds in which both ran, and their range."""
    tops, bottoms = _values(above, top), _values(below, bottom)
    ratios = [tops[n] / bottoms[n] for n in sorted(tops.keys() & bottoms.keys())]
    if not ratios:
        return "–"
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f})"


def _values(records: Mapping[int, Record], figure: Figure) -> dict[int, float]:
    """The figure in each round that ended well."""
    return {n: figure(r["result"]) for n, r in records.items() if r.get("result") is not None}


def _number(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def _grouped(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def _heading(case: Mapping[str, Any]) -> str:
    of = {key: _grouped(value) for key, value in case.items()}
    return (
        f"### {of['name']}\n\n{of['n_genes']} genes × {of['n_regions']} regions, {of['n_train']} cells for training; "
        f"hidden {of['n_hidden']}, latent {of['n_latent']}, minibatches of {of['batch_size']}."
    )


def _failures(records: Iterable[Record]) -> list[str]:
    return [
        f"- {r['system']}, {r['precision']}, {r['part']}, round {r['round'] + 1}: {r['failed']} ({r['detail']})"
        for r in records
        if r.get("failed")
    ]
