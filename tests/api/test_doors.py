"""A three-way mosaic gives the same model, bit for bit, through whichever door it comes."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.cli import main

pytestmark = pytest.mark.usefixtures("no_pictures")

DOORS = ("mudata", "organized", "objects", "files", "file names", "command line")
PATTERNS = {"rna": "expression", "multi": "paired", "atac": "accessibility"}


def trained(data: AnnData, epochs: int, **setup: str) -> pm.MULTIVI:
    verb = pm.MULTIVI.setup_anndata if isinstance(data, AnnData) else pm.MULTIVI.setup_mudata
    verb(data, **setup)
    model = pm.MULTIVI(data, n_hidden=8, n_latent=2, seed=3)
    model.train(epochs, seed=3, accelerator="cpu", progress_bar=False)
    return model


def through(door: str, mosaic: AnnData, epochs: int, folder: Path) -> pm.MULTIVI:
    """The model of a mosaic whose cells are in the order of PATTERNS."""
    genes = (mosaic.var["feature_types"] == "Gene Expression").to_numpy()
    pattern = mosaic.obs["modality"]
    if door == "mudata":
        mudata = pytest.importorskip("mudata")
        parts = {
            "rna": mosaic[(pattern != "accessibility").to_numpy(), genes].copy(),
            "atac": mosaic[(pattern != "expression").to_numpy(), ~genes].copy(),
        }
        with mudata_as_given():
            mdata = mudata.MuData(parts)
        assert mdata.obs_names.tolist() == mosaic.obs_names.tolist()
        return trained(mdata, epochs)
    columns = {"rna": genes, "multi": np.ones(len(genes), bool), "atac": ~genes}
    samples = {name: mosaic[(pattern == word).to_numpy(), columns[name]].copy() for name, word in PATTERNS.items()}
    if door == "organized":
        joined = pm.organize_multiome_anndatas(samples["multi"], samples["rna"], samples["atac"])
        return trained(joined[mosaic.obs_names].copy(), epochs, modality_key="modality")
    for sample in samples.values():
        del sample.obs["modality"]
    if door == "objects":
        return trained(pm.join_samples(samples), epochs, modality_key="modality")
    paths = {name: folder / f"{name}.h5ad" for name in samples}
    for name, path in paths.items():
        samples[name].write_h5ad(path)
    if door == "command line":
        status = main([
            "train", *map(str, paths.values()), "--out", str(folder / "out"), "--min-fraction", "0", "--seed", "3",
            "--max-epochs", str(epochs), "--n-hidden", "8", "--n-latent", "2", "--accelerator", "cpu", "--quiet",
        ])  # fmt: skip
        assert status == 0
        return pm.MULTIVI.load(folder / "out" / "model")
    given = paths if door == "files" else list(paths.values())
    return trained(pm.join_samples(given), epochs, modality_key="modality")


def check_door(door: str, mosaic: AnnData, reference: pm.MULTIVI, epochs: int, folder: Path) -> None:
    model = through(door, mosaic, epochs, folder)
    expected, found = reference.program.state_dict(), model.program.state_dict()
    assert expected.keys() == found.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert different == []
    assert model.spec.gene_names == reference.spec.gene_names
    assert model.spec.region_names == reference.spec.region_names
    assert model.spec.n_cells == reference.spec.n_cells


def in_order(adata: AnnData) -> AnnData:
    """The cells in the order of PATTERNS, nothing else."""
    place = adata.obs["modality"].astype(str).map({word: at for at, word in enumerate(PATTERNS.values())})
    ordered = adata[np.argsort(place.to_numpy(), kind="stable")]
    return AnnData(ordered.X.copy(), obs=ordered.obs[["modality"]].copy(), var=ordered.var[["feature_types"]].copy())


@pytest.fixture(scope="module")
def simulated():
    mosaic = in_order(pm.simulate_multiome((60, 15, 15), n_genes=30, n_regions=50, seed=0))
    return mosaic, trained(mosaic.copy(), 2, modality_key="modality")


@pytest.mark.parametrize("door", DOORS)
def test_simulated_mosaic_through_each_door(simulated, door, tmp_path):
    check_door(door, *simulated, 2, tmp_path)


@pytest.fixture(scope="module")
def real(shared_data):
    mosaic = in_order(anndata.read_h5ad(shared_data / "multiome_mosaic150.h5ad"))
    return mosaic, trained(mosaic.copy(), 1, modality_key="modality")


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
def test_real_mosaic_through_each_door(real, door, tmp_path):
    check_door(door, *real, 1, tmp_path)
