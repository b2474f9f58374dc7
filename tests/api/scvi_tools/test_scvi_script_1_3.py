"""A script for scvi-tools 1.3, start to end, with nothing changed but its import: AnnData, ``batch_key="modality"``."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

import pyro_multivi as scvi

N_GENES, N_REGIONS = 20, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of Cell Ranger ARC, as ``scvi.data.read_10x_multiome`` reads it."""
    cells = scvi.simulate_multiome((150, 0, 0), N_GENES, N_REGIONS, seed=1)
    path = tmp_path_factory.mktemp("multiome") / "filtered_feature_bc_matrix"
    path.mkdir()
    scipy.io.mmwrite(path / "matrix.mtx", sp.coo_matrix(cells.X.T))
    (path / "barcodes.tsv").write_text("".join(f"CELL{number:04}-1\n" for number in range(cells.n_obs)))
    rows = [f"ENSG{place}\tGENE{place}\tGene Expression\tchr1\t{place}\t{place + 9}\n" for place in range(N_GENES)]
    rows += [f"chr2:{place}-{place + 9}\tchr2:{place}-{place + 9}\tPeaks\tchr2\t{place}\t{place + 9}\n"
             for place in range(N_REGIONS)]  # fmt: skip
    (path / "features.tsv").write_text("".join(rows))
    return path


def test_the_script(folder, tmp_path, capsys):
    scvi.settings.seed = 0
    scvi.settings.verbosity = "error"
    assert scvi.__version__

    adata = scvi.data.read_10x_multiome(folder)
    adata.var_names_make_unique()
    assert list(adata.var.columns) == ["ID", "modality", "chr", "start", "end"]
    assert adata.obs["batch_id"].unique().tolist() == [1]

    # A third of the cells keeps both modalities, a third each loses one.
    n = 50
    genes = adata.var["modality"] == "Gene Expression"
    adata_rna = adata[:n, genes].copy()
    adata_paired = adata[n : 2 * n].copy()
    adata_atac = adata[2 * n :, ~genes].copy()
    adata_mvi = scvi.data.organize_multiome_anndatas(adata_paired, adata_rna, adata_atac)
    assert adata_mvi.obs["modality"].value_counts().to_dict() == {"paired": 50, "expression": 50, "accessibility": 50}
    adata_mvi = adata_mvi[:, adata_mvi.var["modality"].argsort()].copy()

    with pytest.warns(UserWarning, match=r"batch_key='modality' says the same .*goes to modality_key='modality'"):
        scvi.model.MULTIVI.setup_anndata(adata_mvi, batch_key="modality")
    model = scvi.model.MULTIVI(
        adata_mvi,
        n_genes=(adata_mvi.var["modality"] == "Gene Expression").sum(),
        n_regions=(adata_mvi.var["modality"] == "Peaks").sum(),
        n_hidden=8,
        n_latent=3,
    )
    model.view_anndata_setup()
    assert f"{N_GENES} genes, {N_REGIONS} regions" in capsys.readouterr().out

    model.train(max_epochs=3, enable_progress_bar=False, save_best=True, check_val_every_n_epoch=None, use_gpu=False)
    for key in (
        "elbo_train", "elbo_validation", "reconstruction_loss_train", "reconstruction_loss_validation",
        "kl_local_train", "kl_global_train", "train_loss_epoch", "validation_loss",
    ):  # fmt: skip
        assert np.isfinite(model.history[key][key]).all()

    model_dir = tmp_path / "runs" / "multivi_pytorch"
    model.save(model_dir, overwrite=True, anndata=False)
    model = scvi.model.MULTIVI.load(model_dir, adata=adata_mvi)

    adata_mvi.obsm["X_multivi"] = model.get_latent_representation()
    assert adata_mvi.obsm["X_multivi"].shape == (3 * n, model.n_latent)
    imputed = model.get_normalized_expression(batch_size=None)
    assert list(imputed.columns) == list(adata_mvi.var_names[:N_GENES])
    assert model.get_accessibility_estimates().shape == (3 * n, N_REGIONS)
    assert model.get_normalized_expression(transform_batch="paired", gene_list=["GENE1"]).shape == (3 * n, 1)

    adata_mvi.obs["leiden"] = pd.Categorical(np.where(np.arange(3 * n) % 2, "a", "b"))
    de = model.differential_expression(groupby="leiden", group1="a", n_samples=50)
    da = model.differential_accessibility(groupby="leiden", group1="a", n_samples=50)
    assert {"proba_de", "lfc_mean"} <= {*de.columns}
    assert {"prob_da", "effect_size", "est_prob1", "emp_prob1"} <= {*da.columns}
