"""Configuration of a program: defaults, refused choices, and what a choice changes in others."""

from __future__ import annotations

import json

import pytest
import torch

from pyro_multivi import ProgramConfig
from pyro_multivi.networks.experts import Expert


def config(**changes):
    return ProgramConfig(**{"n_genes": 100, "n_regions": 400, **changes})


def test_default_widths():
    # Not the square root of the regions: that is too narrow for few of them.
    assert (config().hidden, config().latent) == (128, 20)
    assert (config(n_regions=10**6).hidden, config(n_regions=10**6).latent) == (128, 20)
    assert (config(n_hidden=30).hidden, config(n_hidden=30).latent) == (30, 20)
    # Never wider than the layer that it is read from.
    assert (config(n_hidden=12).latent, config(n_hidden=1).latent) == (12, 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gene_likelihood": "zimb"}, r"gene_likelihood='zimb' is not allowed.*'zinb', 'nb'.*Did you mean 'zinb'"),
        ({"dispersion": "gene_batch"}, "Did you mean 'gene-batch'"),
        ({"latent_distribution": "lognormal"}, "latent_distribution"),
        ({"modality_weights": None}, "modality_weights=None"),
        ({"modality_penalty": "jeffreys"}, "Did you mean 'Jeffreys'"),
        ({"use_batch_norm": True}, "use_batch_norm=True"),
        ({"use_layer_norm": "all"}, "use_layer_norm"),
        ({"library": "none"}, "library='none'"),
        ({"n_genes": 0, "n_regions": 0}, "at least one gene or region"),
        ({"n_genes": -1}, "n_genes=-1"),
        ({"n_hidden": 0}, "n_hidden=0"),
        ({"n_hidden": 8.0}, "n_hidden=8.0"),
        ({"n_latent": True}, "n_latent=True"),
        ({"n_layers_encoder": 0}, "n_layers_encoder=0"),
        ({"n_layers_decoder": -2}, "n_layers_decoder=-2"),
        ({"n_batch": 0}, "n_batch=0"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"dropout_rate": -0.1}, "dropout_rate=-0.1"),
        ({"region_dropout_rate": 1.0}, "region_dropout_rate=1.0"),
        ({"dispersion": "gene-label"}, "gene-label.*labels_key"),
        ({"fully_paired": True, "n_regions": 0}, "fully_paired=True with n_genes=100 and n_regions=0.*Leave it out"),
    ],
)
def test_impossible_choices_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        config(**changes)


def test_a_config_survives_json():
    one = config(modality_penalty=None, gene_likelihood="negative_binomial")
    assert ProgramConfig(**json.loads(json.dumps(one.to_dict()))) == one
    assert one.gene_likelihood == "nb"
    assert one.modality_penalty == "None"


def test_a_fully_paired_program_learns_from_both_modalities_together(make_program):
    """As the paper's guide without a penalty; weights that are given, and another penalty, stay."""
    one = config(fully_paired=True)
    assert (one.modality_penalty, one.contrast, one.mixing) == ("None", 0, 0)
    assert config(fully_paired=True, mixing_weight=1.0).modality_penalty == "contrastive"
    assert config(fully_paired=True, modality_penalty="Jeffreys").modality_penalty == "Jeffreys"
    flags = torch.ones(200, dtype=torch.bool)
    both = {name: Expert(torch.zeros(200, 4), torch.ones(200, 4), flags) for name in ("rna", "atac")}
    program = make_program(fully_paired=True).train()
    assert all(expert.measured.all() for expert in program.seen(both).values())
    assert not all(expert.measured.all() for expert in make_program().train().seen(both).values())
