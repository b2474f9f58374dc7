"""From what the workers reported to Markdown. Pure functions, standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Metric(NamedTuple):
    """Meaning of a score.

    Attributes
    ----------
    group
        Of protocol.GROUPS: from which results it is computed.
    best
        ``max`` or ``min``.
    baseline
        Where the mean of the measured cells is to be found: a score, or a number; None for none.
    """

    group: str
    best: Callable[[Iterable[float]], float]
    baseline: str | float | None = None

    def gain(self, found: float, other: float) -> float:
        """By how much ``found`` is better."""
        return found - other if self.best is max else other - found

    def reaches(self, found: float, target: float) -> bool:
        """Whether it is at least as good."""
        return self.gain(found, target) >= 0


METRICS: dict[str, Metric] = {
    "knn_celltype_purity": Metric("latent", max),
    "ari_kmeans": Metric("latent", max),
    "silhouette_celltype": Metric("latent", max),
    "modality_mixing": Metric("latent", max),
    "batch_mixing": Metric("latent", max),
    "foscttm_paired": Metric("latent", min),
    "twin_foscttm": Metric("latent", min),
    "twin_label_transfer": Metric("latent", max),
    "atac_imputed_auprc_per_cell": Metric("accessibility", max, "atac_base_auprc_per_cell"),
    "atac_imputed_auroc_per_cell": Metric("accessibility", max, "atac_base_auroc_per_cell"),
    "atac_imputed_auroc_per_region_top2000": Metric("accessibility", max, 0.5),
    "atac_imputed_auroc_per_region_in_depth_strata": Metric("accessibility", max, 0.5),
    "atac_imputed_poisson_nll_per_count": Metric("accessibility", min, "atac_base_poisson_nll_per_count"),
    "rna_imputed_poisson_nll_per_count": Metric("expression", min, "rna_base_poisson_nll_per_count"),
    "rna_imputed_spearman_per_gene_top1000": Metric("expression", max, 0.0),
    "rna_imputed_spearman_per_cell": Metric("expression", max, "rna_base_spearman_per_cell"),
}
#: Scores of cells that all have both modalities.
PAIRED_METRICS: dict[str, Metric] = {
    "ari_leiden": Metric("latent", max),
    "ami_leiden": Metric("latent", max),
    "label_transfer": Metric("latent", max),
    "batch_mixing": Metric("latent", max),
}
# Order of columns.
_KINDS = ("rival", "linear", "regression", "peer", "ours")


def render(records: Sequence[Record]) -> str:
    """One table per data set: every system, and ours against the best setting of scvi-tools.

    Parameters
    ----------
    records
        One per run: ``data``, ``seed``, ``system`` (its name), ``kind`` (peer for scvi-tools, ours, linear) and
        ``result`` or, if it failed, ``failed`` and ``detail``.

    Returns
    -------
    str
        Scores are mean ± standard deviation over seeds. The best setting of scvi-tools is chosen for each
        metric by its mean; gains are taken within seeds, and above 0 ours is better.
    """
    parts = []
    for data in dict.fromkeys(r["data"] for r in records):
        here = [r for r in records if r["data"] == data]
        done = [r for r in here if r.get("result")]
        if done:
            parts += [_heading(data, done), "", *_scores(done), "", *_gaps(done)]
        parts += [f"- {r['system']}, seed {r['seed']}: {r['failed']} ({r['detail']})" for r in here if r.get("failed")]
        parts.append("")
    return "\n".join(parts)


def _scores(done: Sequence[Record]) -> list[str]:
    systems = _systems(done)
    peers = [name for name, kind in systems.items() if kind == "peer"]
    ours = [name for name, kind in systems.items() if kind == "ours"]
    against = ours if peers else []
    header = ["metric", "", "mean of the measured", *systems, *(f"{name}: gain over best peer" for name in against)]
    rows = [header, ["---", "---"] + ["---:"] * (len(header) - 2)]
    for name, metric in METRICS.items():
        found = {system: _by_seed(done, system, _score(name)) for system in systems}
        if not any(found.values()):
            continue
        row = [name, "↑" if metric.best is max else "↓", _spread(_baseline(done, metric).values())]
        row += [_spread(found[system].values()) for system in systems]
        best = best_setting({peer: found[peer] for peer in peers if found[peer]}, metric)
        row += [_gain(found[system], found[best], metric) if best else "–" for system in against]
        rows.append(row)
    seconds = {system: _by_seed(done, system, lambda result: result["seconds"]) for system in systems}
    row = ["training, s", "↓", "", *(_spread(seconds[system].values()) for system in systems)]
    best = best_setting({peer: seconds[peer] for peer in peers if seconds[peer]}, Metric("", min))
    rows.append(row + [_ratio(seconds[best], seconds[system]) if best else "–" for system in against])
    return _table(rows)


def _gaps(done: Sequence[Record]) -> list[str]:
    """Share of the way from the mean of the measured cells to the true rates: simulated cells only."""
    systems = _systems(done)
    header = ["share of the gap closed", "mean of the measured", "true rates", *systems]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, metric in METRICS.items():
        oracle = _over_seeds(done, name.replace("imputed", "oracle"))
        if metric.baseline is None or not oracle:
            continue
        base = _baseline(done, metric)
        row = [name, _spread(base.values()), _spread(oracle.values())]
        gap = {seed: metric.gain(oracle[seed], base[seed]) for seed in oracle}
        for system in systems:
            found = _by_seed(done, system, _score(name))
            row.append(_spread(metric.gain(found[s], base[s]) / gap[s] for s in found if gap.get(s, 0) > 0))
        rows.append(row)
    return [*_table(rows), ""] if len(rows) > 2 else []


def render_rivals(records: Sequence[Record], metrics: Mapping[str, Metric] = METRICS, every: bool = False) -> str:
    """One table per data set: ours beside the best of all other systems, its name, and the gain over it.

    Parameters
    ----------
    records
        As for :func:`render`.
    metrics
        Scores to show.
    every
        Whether to show all other systems rather than the best one of each score only.

    Returns
    -------
    str
        Scores are mean ± standard deviation over seeds. The best is chosen for each score by its mean over the seeds
        that ours has, from systems that have them all and the mean of the measured. Gains are taken within seeds,
        mean ± standard error; above 0 ours is better.
    """
    parts = []
    for data in dict.fromkeys(r["data"] for r in records):
        done = [r for r in records if r["data"] == data and r.get("result")]
        kinds = _systems(done)
        ours = [name for name, kind in kinds.items() if kind == "ours"]
        others = [name for name, kind in kinds.items() if kind != "ours"]
        if not ours or not others:
            continue
        header = ["metric", "", "mean of the measured", *(others if every else [])]
        for name in ours:
            header += [name, *([] if every else ["best other"]), "gain over the best"]
        rows = [header, ["---", "---"] + ["---:"] * (len(header) - 2)]
        for name, metric in metrics.items():
            found = {system: _by_seed(done, system, _score(name)) for system in kinds}
            if not any(found[system] for system in ours):
                continue
            row = [name, "↑" if metric.best is max else "↓", _spread(_baseline(done, metric).values())]
            row += [_spread(found[system].values()) for system in others] if every else []
            for system in ours:
                rivals = {other: found[other] for other in others}
                if isinstance(metric.baseline, str):
                    rivals["mean of the measured"] = _baseline(done, metric)
                seeds = found[system].keys()
                rivals = {
                    other: {s: at[s] for s in seeds} for other, at in rivals.items() if seeds and at.keys() >= seeds
                }
                best = best_setting(rivals, metric)
                row.append(_spread(found[system].values()))
                if best is None:
                    row += ["–"] if every else ["–", "–"]
                    continue
                gain = _paired_gain(found[system], rivals[best], metric)
                row += [f"{gain} ({best})"] if every else [f"{_spread(rivals[best].values())} {best}", gain]
            rows.append(row)
        if all(row[2] == "–" for row in rows[2:]):
            rows = [[*row[:2], *row[3:]] for row in rows]
        parts += [_heading(data, done), "", *_table(rows), ""]
    return "\n".join(parts)


def _paired_gain(found: Mapping[int, float], other: Mapping[int, float], metric: Metric) -> str:
    """Mean gain ± its standard error over seeds."""
    gains = [metric.gain(found[seed], other[seed]) for seed in found]
    text = f"{statistics.mean(gains):+.4f}"
    return text if len(gains) == 1 else f"{text} ± {statistics.stdev(gains) / math.sqrt(len(gains)):.4f}"


def render_times(records: Sequence[Record], names: Sequence[str]) -> str:
    """Seconds of training until ours is as good as scvi-tools at its end, for each of its settings.

    Parameters
    ----------
    records
        As for :func:`render`; those of ours with ``checkpoints``, whose seconds leave scoring out.
    names
        Metrics to reach, each alone and all at once.
    """
    parts = []
    for data in dict.fromkeys(r["data"] for r in records):
        done = [r for r in records if r["data"] == data and r.get("result")]
        systems = _systems(done)
        header = ["", "to reach", "peer, s", "ours, s", "ours, epochs", "peer / ours", "reached"]
        rows = [header, ["---", "---", "---:", "---:", "---:", "---:", "---:"]]
        for peer in (name for name, kind in systems.items() if kind == "peer"):
            for system in (name for name, kind in systems.items() if kind == "ours"):
                for wanted in [*([name] for name in names), list(names)]:
                    rows.append([f"{system} against {peer}", *_time_row(done, peer, system, wanted)])
                rows.append([f"{system} against {peer}", *_mean_time_row(done, peer, system, names)])
        if len(rows) > 2:
            parts += [_heading(data, done), "", *_table(rows), ""]
    return "\n".join(parts)


def _time_row(done: Sequence[Record], peer: str, system: str, wanted: Sequence[str]) -> list[str]:
    """One line of :func:`render_times`."""
    theirs, mine = (_by_seed(done, name, lambda result: result) for name in (peer, system))
    seeds = [seed for seed in mine if seed in theirs]
    seconds, epochs, spent = {}, {}, {}
    for seed in seeds:
        targets = {name: theirs[seed]["scores"][name] for name in wanted}
        first = first_reached(mine[seed], targets)
        if first is not None:
            seconds[seed], epochs[seed], spent[seed] = first["seconds"], first["epochs"], theirs[seed]["seconds"]
    label = wanted[0] if len(wanted) == 1 else "all of these at once"
    times = [_spread(values.values()) for values in (spent, seconds, epochs)]
    return [label, *times, _ratio(spent, seconds), f"{len(seconds)} of {len(seeds)}"]


def _mean_time_row(done: Sequence[Record], peer: str, system: str, wanted: Sequence[str]) -> list[str]:
    """The line of :func:`render_times` for scores that are means over the seeds, ours after the same epochs in each."""
    theirs, mine = (_by_seed(done, name, lambda result: result) for name in (peer, system))
    seeds = [seed for seed in mine if seed in theirs]
    spent = [theirs[seed]["seconds"] for seed in seeds]
    row = ["all at once, means over seeds", _spread(spent)]
    if not seeds:
        return [*row, "–", "–", "–", "no"]
    targets = {name: statistics.mean(theirs[seed]["scores"][name] for seed in seeds) for name in wanted}
    looked = {point["epochs"] for seed in seeds for point in _path(mine[seed])}
    # From where all have been looked at.
    start = max(_path(mine[seed])[0]["epochs"] for seed in seeds)
    for epochs in sorted(epoch for epoch in looked if epoch >= start):
        points = [_after(mine[seed], epochs) for seed in seeds]
        found = {name: statistics.mean(point["scores"][name] for point in points) for name in wanted}
        if all(METRICS[name].reaches(found[name], targets[name]) for name in wanted):
            seconds = [point["seconds"] for point in points]
            ratio = statistics.mean(spent) / statistics.mean(seconds)
            return [*row, _spread(seconds), str(epochs), f"{_spread([ratio])}×", "yes"]
    return [*row, "–", "–", "–", "no"]


def _path(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A run during training and at its end."""
    return [*result.get("checkpoints", []), result]


def _after(result: Mapping[str, Any], epochs: int) -> Mapping[str, Any]:
    """A run after so many epochs: as it was looked at last; one that has ended stays at its end."""
    return [point for point in _path(result) if point["epochs"] <= epochs][-1]


def first_reached(result: Mapping[str, Any], targets: Mapping[str, float]) -> Mapping[str, Any] | None:
    """The first checkpoint, or else the end, at which every target is reached; None if there is none."""
    for point in _path(result):
        if all(METRICS[name].reaches(point["scores"][name], value) for name, value in targets.items()):
            return point
    return None


def best_setting(found: Mapping[str, Mapping[int, float]], metric: Metric) -> str | None:
    """The setting with the best mean over seeds."""
    means = {name: statistics.mean(values.values()) for name, values in found.items()}
    return next((name for name in means if means[name] == metric.best(means.values())), None)


def _systems(done: Iterable[Record]) -> dict[str, str]:
    """Kinds by name: those without training, then scvi-tools, then ours."""
    kinds = {r["system"]: r["kind"] for r in done}
    return dict(sorted(kinds.items(), key=lambda item: _KINDS.index(item[1])))


def _by_seed(done: Iterable[Record], system: str, figure: Callable[[Mapping[str, Any]], Any]) -> dict[int, Any]:
    found = {r["seed"]: figure(r["result"]) for r in done if r["system"] == system}
    return {seed: value for seed, value in found.items() if value is not None}


def _score(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: result["scores"].get(name)


def _over_seeds(done: Iterable[Record], name: str) -> dict[int, float]:
    """A score that is the same for every system."""
    return {r["seed"]: r["result"]["scores"][name] for r in done if name in r["result"]["scores"]}


def _baseline(done: Sequence[Record], metric: Metric) -> dict[int, float]:
    if isinstance(metric.baseline, str):
        return _over_seeds(done, metric.baseline)
    return {} if metric.baseline is None else {r["seed"]: metric.baseline for r in done}


def _gain(found: Mapping[int, float], other: Mapping[int, float], metric: Metric) -> str:
    gains = [metric.gain(found[seed], other[seed]) for seed in found if seed in other]
    return _spread(gains, "+")


def _ratio(above: Mapping[int, float], below: Mapping[int, float]) -> str:
    ratios = [above[seed] / below[seed] for seed in above if seed in below]
    return f"{_spread(ratios)}×" if ratios else "–"


def _spread(values: Iterable[float], sign: str = "") -> str:
    """Mean ± standard deviation, with the digits that the mean deserves."""
    found = list(values)
    if not found:
        return "–"
    mean = statistics.mean(found)
    if not math.isfinite(mean):
        return str(mean)
    # Four digits after the point for small scores, three for most, fewer for seconds.
    decimals = 4 if abs(mean) < 0.1 else max(0, min(3, 3 - math.floor(math.log10(abs(mean)))))
    text = f"{mean:{sign}.{decimals}f}"
    return text if len(found) == 1 else f"{text} ± {statistics.stdev(found):.{decimals}f}"


def _heading(data: str, done: Sequence[Record]) -> str:
    sizes = done[0]["result"]
    seeds = sorted({r["seed"] for r in done})
    features = f"{sizes['n_genes']} genes × {sizes['n_regions']} regions"
    return f"### {data}\n\n{sizes['n_cells']} cells, {features}; seeds {', '.join(map(str, seeds))}."


def _table(rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]
