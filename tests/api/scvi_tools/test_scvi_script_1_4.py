"""A script for scvi-tools 1.4, start to end, with nothing changed but its import: MuData."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import pyro_multivi as scvi
from pyro_multivi.api.scvi_tools.arguments import train_arguments
from pyro_multivi.api.scvi_tools.devices import load_arguments
from pyro_multivi.model import MULTIVI
from pyro_multivi.training import FitOptions, resolve_device


@pytest.fixture
def mdata():
    """Padded with zeros, as scvi-tools 1.4 demands; batches are numbers."""
    mdata = scvi.simulate_multiome((80, 0, 0), 20, 30, n_batches=2, n_types=2, seed=2, return_mudata=True)
    mdata.obs["batch"] = [3 if name == "batch_0" else 1 for name in mdata.obs["batch"]]
    return mdata


def test_the_script(mdata, tmp_path, capsys, caplog):
    scvi.settings.seed = 420
    scvi.settings.num_threads = 1
    scvi.settings.batch_size = 32
    scvi.settings.jax_preallocate_gpu_memory = False  # of no effect, as others of scvi-tools
    MULTIVI.setup_mudata(
        mdata,
        batch_key="batch",
        modalities={"rna_layer": "rna", "atac_layer": "atac", "protein_layer": None},
    )
    vae = MULTIVI(mdata, n_hidden=8, n_latent=3, modality_penalty="None", modality_weights="equal")
    vae.view_anndata_setup(hide_state_registries=True)
    assert '"batch_key": "batch"' in capsys.readouterr().out
    assert vae.adata_manager.adata is mdata
    assert "batch" in vae.adata_manager.data_registry
    assert vae.adata_manager.data_registry.batch == {"mod_key": None, "attr_name": "obs", "attr_key": "batch"}
    assert (vae.summary_stats.n_vars, vae.summary_stats.n_atac, vae.summary_stats.n_batch) == (20, 30, 2)
    assert (vae.n_genes, vae.n_regions) == (20, 30)
    assert vae.module is vae.program

    with caplog.at_level(logging.WARNING, "pyro_multivi"):
        vae.train(
            max_epochs=2,
            accelerator="auto",
            devices=1,
            train_size=0.8,
            validation_size=0.1,
            batch_size=np.int64(16),
            adversarial_mixing=False,
            datasplitter_kwargs={"pin_memory": False, "drop_last": False},
            plan_kwargs={"reduce_lr_on_plateau": False, "lr": 4e-4},
            check_val_every_n_epoch=None,
            precision="32",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            strategy="auto",
        )
    assert f"train(): defaults are lr={1000 * FitOptions.lr:g}e-3" in caplog.text
    sizes = [len(vae.train_indices), len(vae.validation_indices), len(vae.test_indices)]
    assert sizes == [64, 8, 8]
    everyone = np.concatenate([vae.train_indices, vae.validation_indices, vae.test_indices])
    assert sorted(everyone) == list(range(80))
    assert np.isfinite(vae.get_elbo(indices=vae.validation_indices, batch_size=None).item())
    assert vae.get_reconstruction_error(indices=vae.validation_indices)["reconstruction_loss_expression"] > 0

    mdata.obsm["X_multivi"] = vae.get_latent_representation(batch_size=None)
    # A number is the name of a batch, as in the column, not its position.
    by_number = vae.get_normalized_expression(transform_batch=3, gene_list=mdata.mod["rna"].var_names[:2])
    by_name = vae.get_normalized_expression(transform_batch="3", gene_list=mdata.mod["rna"].var_names[:2])
    np.testing.assert_array_equal(by_number, by_name)
    accessibility = vae.get_normalized_accessibility(
        normalize_cells=True, normalize_regions=True, transform_batch=[1, 3]
    )
    assert accessibility.shape == (80, 30)
    assert vae.get_region_factors().shape == (30,)
    with caplog.at_level(logging.WARNING, "pyro_multivi"):
        for _ in range(2):
            assert vae.get_library_size_factors()["accessibility"].shape == (80,)
    assert caplog.text.count("'expression' is in counts") == 1

    vae.save(tmp_path / "models", prefix="run1_", overwrite=True, save_anndata=True)
    MULTIVI.view_setup_args(tmp_path / "models", prefix="run1_")
    assert '"kind": "mudata"' in capsys.readouterr().out
    again = MULTIVI.load(tmp_path / "models", prefix="run1_", accelerator="cpu", device="auto")
    np.testing.assert_array_equal(again.get_latent_representation(), vae.get_latent_representation())
    np.testing.assert_array_equal(again.validation_indices, vae.validation_indices)


def test_differences_are_told_to_scripts_for_scvi_tools_alone(mdata, monkeypatch, caplog):
    MULTIVI.setup_mudata(mdata)
    model = MULTIVI(mdata, n_hidden=4, n_latent=2)
    monkeypatch.delitem(sys.modules, "pyro_multivi.model")
    with caplog.at_level(logging.WARNING, "pyro_multivi"):
        model.train(1, progress_bar=False)
        model.get_library_size_factors()
    assert not caplog.records


def test_warnings_name_the_line_of_the_caller(mdata):
    mdata.obs["cell"] = mdata.obs_names
    with pytest.warns(UserWarning, match="has 80 categories for 80 cells") as caught:
        MULTIVI.setup_mudata(mdata, batch_key="cell")
    assert caught[0].filename == __file__


def test_positions_are_those_of_scvi_tools(mdata):
    MULTIVI.setup_mudata(mdata, None, None, None, "batch")
    assert scvi.model.MULTIVI(mdata, n_hidden=4, n_latent=2).summary_stats.n_batch == 2
    adata = scvi.simulate_multiome((60, 0, 0), 10, 12, n_batches=2)
    adata.obs["size"] = 2.0
    MULTIVI.setup_anndata(adata, None, "batch", "size")
    assert MULTIVI(adata, n_hidden=4, n_latent=2).get_setup_arg("size_factor_keys") == ["size", None]


def test_proteins_are_a_modality_or_a_matrix_of_obsm():
    mdata = scvi.data.synthetic_iid(20, n_genes=10, n_proteins=5, n_regions=0, return_mudata=True)
    MULTIVI.setup_mudata(
        mdata, batch_key="batch", modalities={"rna_layer": "rna", "protein_layer": "protein_expression"}
    )
    assert MULTIVI(mdata, n_hidden=4, n_latent=2, protein_dispersion="protein-batch").n_proteins == 5
    adata = scvi.data.synthetic_iid(20, n_genes=10, n_proteins=5, n_regions=0)
    adata.var["feature_types"] = "Gene Expression"
    keys = {"protein_expression_obsm_key": "protein_expression", "protein_names_uns_key": "protein_names"}
    MULTIVI.setup_anndata(adata, batch_key="batch", **keys)
    assert MULTIVI(adata, n_hidden=4, n_latent=2).n_proteins == 5


def test_seed_of_the_settings_is_that_of_models_made_afterwards(mdata):
    MULTIVI.setup_mudata(mdata, batch_key="batch")
    before = torch.random.get_rng_state()

    def trained(**given):
        model = MULTIVI(mdata, n_hidden=4, n_latent=2, **given)
        model.train(1, enable_progress_bar=False, **given)
        return model.get_latent_representation()

    default = trained()
    scvi.settings.seed = 5
    np.testing.assert_array_equal(trained(), trained(seed=5))
    assert not np.array_equal(trained(), default)
    np.testing.assert_array_equal(trained(seed=0), default)
    scvi.settings.seed = None
    np.testing.assert_array_equal(trained(), default)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_messages_of_a_level_appear_once_it_is_set():
    script = (
        "import pyro_multivi as scvi\nscvi.settings.verbosity = {level!r}\n"
        "adata = scvi.simulate_multiome((60, 0, 0), 5, 6)\n"
        "scvi.MULTIVI.setup_anndata(adata, modality_key='modality')"
    )
    said = {
        level: subprocess.run(
            [sys.executable, "-c", script.format(level=level)], capture_output=True, text=True, check=True
        ).stderr
        for level in ("info", "error")
    }
    assert said["info"].count("setup of an AnnData") == 1
    assert not said["error"]


def test_devices_by_the_words_of_scvi_tools(monkeypatch):
    for given, device in (
        ({"accelerator": "gpu"}, "cuda"),
        ({"accelerator": "gpu", "device": "auto"}, "cuda"),
        ({"accelerator": "gpu", "device": 1}, "cuda:1"),
        ({"accelerator": "auto", "device": 0}, "cuda:0"),
        ({"accelerator": "cpu", "device": "auto"}, "cpu"),
        ({"use_gpu": False}, "cpu"),
        ({"use_gpu": True}, "cuda"),
        ({"use_gpu": 0}, "cuda:0"),
        ({"use_gpu": np.int64(1)}, "cuda:1"),
        ({"use_gpu": "cuda:1"}, "cuda:1"),
        ({"use_gpu": "cuda"}, "cuda"),
        ({"use_gpu": None, "accelerator": "cpu"}, "cpu"),
        ({"accelerator": "auto", "device": "auto"}, "auto"),
    ):
        load_arguments(given)
        assert given == {"device": device}
    with pytest.raises(ValueError, match="accelerator='tpu' is not allowed"):
        load_arguments({"accelerator": "tpu"})
    for given, meant in (
        ({"use_gpu": 0}, {"accelerator": "gpu", "devices": [0]}),
        ({"use_gpu": "cuda:1"}, {"accelerator": "gpu", "devices": [1]}),
        ({"use_gpu": True}, {"accelerator": "gpu"}),
        ({"use_gpu": False}, {"accelerator": "cpu"}),
        ({"use_gpu": None}, {"accelerator": "auto"}),
    ):
        assert train_arguments(given) == []
        assert given == meant
    for wrong in (-1, "cuda:x", "tpu", 0.5):
        for take in (train_arguments, load_arguments):
            with pytest.raises(ValueError, match=f"use_gpu={wrong!r} is not allowed: give True, False, the number"):
                take({"use_gpu": wrong})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("gpu", [1]) == torch.device("cuda:1")
    assert resolve_device("gpu", 1) == torch.device("cuda")
    for several in ([0, 1], -1):
        with pytest.raises(ValueError, match=rf"devices={re.escape(str(several))} .*torchrun --nproc-per-node 2\."):
            resolve_device("gpu", several)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("gpu", -1) == torch.device("cuda")
    assert resolve_device("auto", "-1") == torch.device("cuda")


def test_a_patience_in_the_place_of_early_stopping_and_keys_that_change_nothing(mdata):
    scvi.model.MULTIVI.setup_mudata(mdata)
    model = scvi.model.MULTIVI(mdata, n_hidden=4, n_latent=2)
    with pytest.warns(UserWarning, match="early_stopping=15: it is on; .* give early_stopping_patience=15"):
        model.train(1, early_stopping=15, datasplitter_kwargs={"drop_dataset_tail": False, "drop_last": False})
    with pytest.warns(UserWarning, match="drop_dataset_tail=True: every training cell is used in each epoch"):
        model.train(1, datasplitter_kwargs={"drop_dataset_tail": True})


def test_settings_refuse_what_they_do_not_know():
    for name, value in {"seed": -1, "seed ": 1.5, "batch_size": 0, "num_threads": "2", "verbosity": "loudest"}.items():
        with pytest.raises(ValueError, match=rf"settings\.{name.strip()}="):
            setattr(scvi.settings, name.strip(), value)
    with pytest.raises(AttributeError, match="settings has no 'sed'"):
        scvi.settings.sed = 3
    assert "seed=None" in repr(scvi.settings)


def test_data_says_what_it_has():
    with pytest.raises(AttributeError, match="readers here are organize_cite_seq_10x, .*, read_10x_atac"):
        scvi.data.pbmc_dataset  # noqa: B018
    assert scvi.data.read_h5ad
    assert scvi.data.read_10x_atac


@pytest.mark.parametrize(
    ("namespace", "name", "instead"),
    [
        (scvi, "criticism", r"posterior_predictive_check\(\)"),
        (scvi, "external", "import scvi-tools itself"),
        (scvi.model, "PEAKVI", "import scvi-tools itself"),
        (scvi.model, "utils", "scanpy.tl.umap"),
        (scvi.train, "LoudEarlyStopping", "stops early and keeps the best weights itself"),
    ],
)
def test_what_is_not_here_says_what_there_is_in_its_place(namespace, name, instead):
    assert not hasattr(namespace, name)
    with pytest.raises(AttributeError, match=rf"no attribute '{name}': .*{instead}"):
        getattr(namespace, name)
