"""Errors and warnings of the library in the words of the command line: options where it speaks of arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: Arguments whose option has another name, and what else stands for an argument.
_OPTIONS = {
    "categorical_covariate_keys": "--categorical-covariate",
    "continuous_covariate_keys": "--continuous-covariate",
    "protein_expression_obsm_key": "--protein",
    "rna_layer": "--layer",
    "atac_layer": "--layer",
    "dir_path": "MODEL",
    "groupby": "--labels",
    "out": "OUT",
    "stores": "DATA",
}
#: Arguments of the setup, which a saved model has from the options of its training.
_OF_SETUP = ("batch_key", "modality_key", "feature_type_key", "feature_masks", "panel_key")
#: Advice in Python that has its option.
_ADVICE = (
    (
        r"Drop them: .*",
        "Leave them out with --min-counts 1, or the empty barcodes of a raw matrix with --min-counts 500.",
    ),
    (r"feature_type_values=\{[^}]*\}", "--rna WORD, --atac WORD"),
    (r"write \w+\.var\[.*?\] = 'Gene Expression' \(or 'Peaks'\)", "give --feature-type rna (or atac)"),
    (r"modalities=\{[^}]*\}", "--rna NAME and --atac NAME"),
    (r"round them, .* = .*?\.?$", "round them with --round."),
    (r"may be rounded: .* = .*?\.?$", "may be rounded with --round."),
    (r" looks like counts, put them there: (\S+) = .*", r" looks like counts: put them into \1 of the file."),
    (r": \S+\.raw looks like counts, .*", ": raw looks like counts: copy it to a layer of the file, and give --layer."),
    (
        r"pyro_multivi\.reads_to_fragments\(adata\) makes a layer of fragments of them, to be named in the setup",
        "--reads-to-fragments makes fragments of them",
    ),
    (
        r"pyro_multivi\.organize_cite_seq_10x\(adata\) makes proteins of them",
        "In Python pyro_multivi.organize_cite_seq_10x(data) makes proteins of them",
    ),
    (r"layer=None", "no --layer"),
    (r"samples\[(.+?)\](\.obs|: )", r"sample \1\2"),
    (r"modalities\['protein_layer'\](=| is)", r"--protein "),
    (r"feature_type_values\['genes'\] is|modalities\['rna_layer'\] is", "--rna"),
    (r"feature_type_values\['regions'\] is|modalities\['atac_layer'\] is", "--atac"),
    (r"give another sample_key, or name the sample so", "say what the sample is called, NAME=PATH"),
    (r"stores has more than one called (.*): name them, .*", r"more than one store is called \1: give NAME=PATH."),
    (r"pyro_multivi\.convert_stores\(IN, 'OUT\.zarr'\), or (on the command line )?", ""),
    (r"samples has more than one called (.*): name them, .*", r"more than one sample is called \1: give NAME=PATH."),
    (r" To train on, call train\(\) once more.*", ""),
    (r"resume=True", "--resume"),
    (
        r"held_out=True, but no cell is known to be held out: .*",
        "no cell is known to be held out: give the data of training, or --all-cells.",
    ),
    (
        r"If you trust that class, import it and give program_class=.*",
        "Commands take models of the package's own program alone: open it in Python, by "
        "pyro_multivi.MULTIVI.load(MODEL, data, ...) with the class.",
    ),
    (r"reference_model is not trained", "the model is not trained"),
    (r"[Cc]all (reference_)?model\.train\(\) first", "train it with pyro-multivi train"),
    (r"Give the folder that MULTIVI\.save wrote", "Give the folder 'model' in the --out of pyro-multivi train"),
    (r",? or None( to estimate it)?(?=[.,]|$)", ""),
    (r"perhaps by layer\.", "perhaps in a layer: give --layer NAME."),
    (r"Give layer, one of", "Give --layer, one of"),
    (r"^stores: ", "DATA: "),
    (r"load_query_data\(query, model, freeze_expression=False\) and train\(\) align a batch", "--align moves it"),
    (r"load_query_data\(\.\.\., freeze_expression=False\) chooses more to be trained", "--align trains more"),
    (r"MULTIVI\.load_query_data\(adata, model\)", "pyro-multivi map MODEL QUERY"),
    (r"key='([^']*)' is not in obs of the reference", r"--labels \1 is not in obs of the reference"),
)


def in_options(message: object, arguments: Iterable[str]) -> str:
    """A text with the options of a command in place of the arguments that they set.

    Examples
    --------
    >>> in_options("batch_key='doner' is not in adata.obs.", ["batch_key", "seed"])
    "--batch-key 'doner' is not in obs."
    """
    text = str(message)
    for pattern, option in _ADVICE:
        text = re.sub(pattern, option, text)
    options = {name: f"--{name.replace('_', '-')}" for name in arguments}
    for name, option in (_OPTIONS | options).items():
        text = re.sub(rf"(?<![\w.-]){name}=", f"{option} ", text)
        if "_" in name:
            text = re.sub(rf"(?<![\w.-]){name}\b(?!\()", option, text)
    for name in set(_OF_SETUP) - set(options):
        option = f"the model's --{name.replace('_', '-')}"
        text = re.sub(rf"(?<![\w.-]){name}\b(?!=)", option, re.sub(rf"(?<![\w.-]){name}=", f"{option} ", text))
    text = re.sub(r"\b[am]data\.(?=obs|var|X|layers|raw|mod)(?!\w+_make_unique)", "", text)
    return re.sub(r"\b[am]data\b(?![\w.\[(/]| =)", "the file", text)
