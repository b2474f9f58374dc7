"""Commands and options of the command line. Nothing heavy is imported here: help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from pyro_multivi._version import __version__
from pyro_multivi.data.modality import MODALITIES, PROTEIN

_FEATURE_TYPES = "var column of feature types (default: feature_types)"
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command_parser() -> argparse.ArgumentParser:
    """Parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pyro-multivi",
        description="MultiVI: one latent state per cell from RNA, ATAC or both.",
        epilog="Files, columns and keys that are written, and exit statuses: tutorials/command_line.md.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_demo, _train, _check, _differential, _map, _describe, _convert):
        add(commands)
    return parser


def _demo(commands: _Commands) -> None:
    parser = commands.add_parser("demo", help="analyse the built-in real cells from start to end")
    _add_training(parser)
    parser.set_defaults(labels="cell_type", from_disk=False)


def _train(commands: _Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train on files of yours",
        description="Train on one file, or on several samples: each may have RNA, ATAC or both. Of a modality the "
        "features are kept that all samples with it have; the rest is counted (--features union keeps all). Barcodes "
        "that occur in more than one sample get the name of theirs behind.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help=".h5ad, .h5mu, .zarr, 10x .h5 (Cell Ranger ARC) or a folder with .mtx. Of several each is a sample, named "
        "after its file, or as NAME=PATH says",
    )
    parser.add_argument("--labels", help="obs column, categories or numbers, that colours the picture (default: none)")
    _add_setup(parser)
    parser.add_argument(
        "--min-fraction",
        type=float,
        default=0.01,
        help="leave out features detected in a smaller share of the cells measured (default: 0.01)",
    )
    _add_data(parser)
    _add_model(parser)
    _add_training(parser)


def _add_setup(parser: argparse.ArgumentParser) -> None:
    """Options on where counts and columns lie."""
    parser.add_argument("--layer", metavar="NAME", help="layer with the raw counts (default: X)")
    parser.add_argument("--batch-key", metavar="KEY", help="obs column of batches (default: all cells are of one)")
    parser.add_argument("--batch-from-file", action="store_true", help="each file is a batch, called like its sample")
    parser.add_argument(
        "--features",
        choices=["intersection", "union"],
        default="intersection",
        help="of several samples: features that all have, or any, masked in samples that lack them (default: "
        "intersection)",
    )
    parser.add_argument(
        "--from-disk",
        action="store_true",
        help="read the counts of .h5ad and .zarr files as they are needed, so that memory does not grow with them",
    )
    parser.add_argument(
        "--feature-masks", metavar="KEY", help="varm table of the features measured in each batch (default: all are)"
    )
    parser.add_argument(
        "--panel-key", metavar="KEY", help="obs column that names the columns of that table (default: --batch-key)"
    )
    parser.add_argument(
        "--modality-key",
        metavar="KEY",
        help="obs column saying paired, expression or accessibility (default: what a cell has counts of)",
    )
    parser.add_argument("--feature-type-key", default="feature_types", metavar="KEY", help=_FEATURE_TYPES)
    for modality in MODALITIES:
        parser.add_argument(
            f"--{modality.key}",
            metavar="NAME",
            help=f"what {modality.assay} is called: modality of an .h5mu, else word of the column of feature types "
            "(default: any usual name)",
        )
    parser.add_argument(
        f"--{PROTEIN}",
        metavar="NAME",
        help="counts of proteins: key of obsm, or modality of an .h5mu; of one file, not --from-disk (default: none)",
    )
    parser.add_argument(
        "--categorical-covariate",
        action="append",
        default=[],
        metavar="KEY",
        help="obs column of categories to account for; may be repeated (default: none)",
    )
    parser.add_argument(
        "--continuous-covariate",
        action="append",
        default=[],
        metavar="KEY",
        help="obs column of numbers to account for; may be repeated (default: none)",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the model."""
    parser.add_argument(
        "--n-latent", type=int, help="dimension of the latent state (default: 20, or --n-hidden where that is less)"
    )
    parser.add_argument("--n-hidden", type=int, help="width of hidden layers (default: 128)")
    parser.add_argument("--gene-likelihood", default="zinb", help="zinb, nb or poisson (default: zinb)")
    parser.add_argument(
        "--accessibility-likelihood",
        default="bernoulli",
        help="bernoulli (open or not), or poisson or nb of counts of fragments (default: bernoulli)",
    )
    parser.add_argument(
        "--fully-paired",
        action=argparse.BooleanOptionalAction,
        help="learn the states from all modalities together, without the two penalties below (default: where every "
        "cell has all that the data have of RNA, ATAC and proteins, two or more)",
    )
    parser.add_argument(
        "--mixing-weight",
        type=float,
        help="weight, in nats, of a penalty for paired, RNA-only and ATAC-only cells whose states lie apart; 0 where "
        "they come from different tissues (default: 4, unless --fully-paired)",
    )
    parser.add_argument(
        "--contrast-weight",
        type=float,
        help="weight of the term by which the two halves of a cell find each other among other cells (default: 2.5, "
        "unless --fully-paired)",
    )
    parser.add_argument(
        "--latent-prior",
        default="normal",
        help="normal, or mixture, of which each batch has its own weights, for batches that lack types of cells "
        "(default: normal)",
    )


def _check(commands: _Commands) -> None:
    parser = commands.add_parser("check", help="compare a trained model's replicates with the data")
    _add_saved_model(parser)
    parser.add_argument(
        "data", nargs="*", metavar="DATA", help="its data, as for train; or demo for the built-in cells"
    )
    _add_data(parser)
    parser.add_argument("--out", required=True, type=_path, help="folder for tables and check.html; made if not there")
    _add_overwrite(parser)
    parser.add_argument("--n-samples", type=int, default=100, help="replicates (default: 100)")
    parser.add_argument("--all-cells", action="store_true", help="all cells, not only those held out of training")
    parser.add_argument("--labels", metavar="KEY", help="obs column: statistics also within its groups (default: none)")
    parser.add_argument("--hidden-depth", default="observed", help="observed (default), predicted or prior")
    _add_seed(parser)


def _differential(commands: _Commands) -> None:
    parser = commands.add_parser("differential", help="genes, regions or proteins in which groups of cells differ")
    _add_saved_model(parser)
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="its data, as for train, or demo for the built-in cells; not needed if the folder holds them",
    )
    _add_data(parser)
    parser.add_argument("--groupby", required=True, help="obs column of the groups")
    parser.add_argument("--group1", action="append", metavar="NAME", help="may be repeated (default: all)")
    parser.add_argument("--group2", metavar="NAME", help="compare with this group (default: all other cells)")
    parser.add_argument(
        "--modality",
        choices=[*(modality.name for modality in MODALITIES), PROTEIN],
        help="genes, regions or proteins (default: genes, if the model has any)",
    )
    parser.add_argument("--out", required=True, type=_path, help="table to write: .csv or .parquet")
    _add_overwrite(parser)
    parser.add_argument("--mode", default="change", help="change or vanilla (default: change)")
    parser.add_argument("--unit", default="group", help="group or cell: compare means or cells (default: group)")
    parser.add_argument("--delta", type=float, help="least change (default: 0.25 log2; 0.05 detected)")
    parser.add_argument("--fdr-target", type=float, default=0.05, help="false discovery rate (default: 0.05)")
    parser.add_argument(
        "--batch-correction",
        action=argparse.BooleanOptionalAction,
        help="decode both groups in the same batches (default: where they lie unevenly over the batches)",
    )
    parser.add_argument("--n-samples", type=int, default=5000, help="draws of each group (default: 5000)")
    _add_seed(parser)
    _add_quiet(parser)


def _map(commands: _Commands) -> None:
    parser = commands.add_parser(
        "map",
        help="place cells of a query among those of a saved model, and carry labels over to them",
        description="Map a query, cells of new batches with RNA, ATAC or both, onto a saved model. Features are found "
        "by name; those that the query lacks count as not measured. The table has the cells' latent states, and with "
        "--labels the label of their neighbours and its confidence.",
    )
    _add_saved_model(parser)
    parser.add_argument("query", nargs="+", metavar="QUERY", help="cells to map, as for train")
    parser.add_argument("--batch", metavar="NAME", help="batch of the query (default: as its column of batches says)")
    parser.add_argument(
        "--labels", metavar="KEY", help="obs column of the model's own cells to carry over (default: none)"
    )
    parser.add_argument(
        "--reference", nargs="+", default=[], metavar="DATA", help="those cells (default: those in the model's folder)"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="least confidence of a label (default: 0.5)")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="share of cells like the reference's called unknown (default: 0.05)"
    )
    parser.add_argument("--n-neighbors", type=int, default=15, help="cells whose labels count (default: 15)")
    parser.add_argument("--max-epochs", type=int, default=0, help="train what is new in the query (default: 0, not)")
    parser.add_argument(
        "--align",
        action="store_true",
        help="train the encoders' first layers too, 100 epochs if no other number is given: moves the cells of a batch "
        "that lies apart, such as another donor",
    )
    _add_data(parser)
    parser.add_argument("--out", required=True, type=_path, help="table to write: .csv or .parquet")
    _add_overwrite(parser)
    _add_seed(parser)
    _add_quiet(parser)


def _describe(commands: _Commands) -> None:
    parser = commands.add_parser("describe", help="what a saved model is, without loading it")
    _add_saved_model(parser)


def _convert(commands: _Commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="write files as one .zarr that is read fast from disk",
        description="Write a file, or several as one data set, by cells and compressed, in blocks. The same command "
        "goes on where it was interrupted. In Python pyro_multivi.open_stores(OUT) opens what it wrote.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="as for train; several have to be .h5ad or .zarr",
    )
    parser.add_argument("target", metavar="OUT", help="folder to write, .zarr")
    parser.add_argument("--layer", metavar="NAME", help="layer with the raw counts (default: X)")
    parser.add_argument("--feature-type-key", default="feature_types", metavar="KEY", help=_FEATURE_TYPES)
    _add_quiet(parser)


def _path(text: str) -> Path:
    """A path of an option, refused at once where a script or the shell has left it unfinished."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: is a variable of the script not set?")
    if text.startswith("~"):
        raise argparse.ArgumentTypeError(f"{text!r} begins with '~', which the shell has not replaced: write $HOME.")
    return Path(text)


def _at_least_0(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is not allowed: give a whole number of at least 0.")
    return number


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--feature-type",
        choices=[modality.key for modality in MODALITIES],
        help="type of all features, for a file that does not say it (default: none)",
    )
    parser.add_argument(
        "--min-counts",
        type=_at_least_0,
        default=0,
        metavar="N",
        help="leave out cells with fewer counts, such as empty barcodes (default: 0, none)",
    )
    parser.add_argument("--round", action="store_true", help="round counts that are not whole numbers")
    parser.add_argument(
        "--reads-to-fragments", action="store_true", help="count fragments, half of the reads, of each region"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=_path, help="folder to write to; made if it is not there")
    _add_overwrite(parser)
    parser.add_argument(
        "--max-epochs",
        type=int,
        default=200,
        help="passes over the training cells at most; training ends before where nothing is gained (default: 200; in "
        "Python 500)",
    )
    parser.add_argument("--batch-size", type=int, help="cells in a step (default: 128, fewer for small data)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default: 0.002)")
    _add_seed(parser)
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or gpu (default: auto, a GPU if there is one)")
    parser.add_argument(
        "--precision", default="fp32", help="fp32, or bf16: large matrix products in bfloat16 (default: fp32)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="on a CPU, run likelihoods as loops that Numba compiles, which is faster"
    )
    _add_quiet(parser)
    parser.add_argument(
        "--checkpoint",
        type=_path,
        metavar="DIR",
        help="folder for the state of training, which --resume goes on from (default: none is kept)",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=lambda text: int(text) if text.isdecimal() else text,
        metavar="N",
        help="epochs, or minutes as 30min, from one checkpoint to the next (default: 10min)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the latest checkpoint in DIR, if there is one; give all other options again. A finished "
        "training is not done again",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only say what memory, time (from a few steps) and disk training would take; nothing is written",
    )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")


def _add_saved_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=_path, metavar="MODEL", help="folder of a saved model")


def _add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: 0)")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
