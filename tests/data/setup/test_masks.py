"""Features that were measured in some batches only: masks of varm, panels of the table, report, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.spec import DataSpec

BATCHES = ["a", "a", "b", "b", "c", "c"]
#: Genes g0..g3 and regions p0..p2 that each batch measured; c has no RNA.
MEASURED = pd.DataFrame(
    {
        "a": [True, True, False, True, True, True, True],
        "b": [True, False, True, True, True, False, True],
        "c": [False, False, False, False, True, False, True],
    },
    index=[f"g{n}" for n in range(4)] + [f"p{n}" for n in range(3)],
)


@pytest.fixture
def adata() -> AnnData:
    mask = MEASURED[BATCHES].to_numpy().T
    counts = np.random.default_rng(0).integers(1, 9, mask.shape) * mask
    types = ["Gene Expression"] * 4 + ["Peaks"] * 3
    return AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"batch": BATCHES, "donor": list("xxyyyy")}, index=[f"c{n}" for n in range(6)]),
        var=pd.DataFrame({"feature_types": types}, index=MEASURED.index),
        varm={"measured": MEASURED},
    )


def test_each_cell_has_the_panel_of_its_batch(adata):
    report = pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")
    table = DataSpec.of(adata).table(adata)
    for panels, columns, cells in (
        (table.rna_panels, slice(0, 4), range(4)),
        (table.atac_panels, slice(4, 7), range(6)),
    ):
        found = panels.measured[panels.code].numpy()
        for cell in cells:
            assert found[cell].tolist() == MEASURED[BATCHES[cell]].tolist()[columns]
    # b and c measured the same regions: one panel for both.
    assert len(table.atac_panels.measured) == 2
    assert report.panels == {"a": {"genes": 3, "regions": 3}, "b": {"genes": 3, "regions": 2}, "c": {"regions": 2}}
    assert "  measured    b: 3 of 4 genes, 2 of 3 regions; the others are masked there" in str(report)
    # All values that were measured are above 0.
    assert report.density == {"RNA": 1.0, "ATAC": 1.0}


def test_panels_may_be_another_column_than_the_batches(adata):
    adata.obs["kit"] = adata.obs["batch"]
    pm.MULTIVI.setup_anndata(adata, batch_key="donor", feature_masks="measured", panel_key="kit")
    spec = DataSpec.of(adata)
    assert spec.batch_categories == ("x", "y")
    assert len(spec.table(adata).rna_panels.measured) == 2
    # What says which were measured belongs to the data: another mask is another table.
    before = spec.table(adata).rna_panels.measured.clone()
    adata.X = sp.csr_matrix(adata.X.toarray() * (adata.var_names != "g3"))
    adata.varm["measured"] = MEASURED.assign(a=MEASURED["a"] & (MEASURED.index != "g3"))
    assert not torch.equal(before, spec.table(adata).rna_panels.measured)


def test_masks_that_leave_out_nothing_are_as_none(adata):
    adata = adata[:2].copy()
    adata.varm["measured"] = MEASURED.assign(a=True)
    adata.X = sp.csr_matrix(np.ones(adata.shape, np.float32))
    report = pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")
    assert DataSpec.of(adata).table(adata).rna_panels is None
    assert report.panels == {}


def test_masks_lie_in_the_modalities_of_a_mudata(adata):
    rna, atac = adata[:4, :4].copy(), adata[:, 4:].copy()
    with mudata_as_given() as mudata:
        mdata = mudata.MuData({"rna": rna, "atac": atac})
    mdata.obs["batch"] = BATCHES
    report = pm.MULTIVI.setup_mudata(mdata, batch_key="batch", feature_masks="measured")
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")
    one, two = (DataSpec.of(data).table(data) for data in (mdata, adata))
    assert one.difference(two) is None
    assert report.panels["c"] == {"regions": 2}
    del mdata.mod["rna"].varm["measured"]
    pm.MULTIVI.setup_mudata(mdata, batch_key="batch", feature_masks="measured")
    table = DataSpec.of(mdata).table(mdata)
    assert table.rna_panels is None
    assert table.atac_panels is not None


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"feature_masks": "mesured"}, r"feature_masks='mesured' is not in adata.varm.* Did you mean 'measured'"),
        (None, {"feature_masks": "measured", "batch_key": None}, "give panel_key, the column of obs"),
        (None, {"panel_key": "batch"}, "panel_key='batch' names the panels of feature_masks, which is not given"),
        (None, {"feature_masks": "measured", "panel_key": "kit"}, "panel_key='kit' is not in adata.obs"),
        (MEASURED.to_numpy(), {}, r"adata.varm\['measured'\] must be a DataFrame"),
        (MEASURED.astype(float), {}, r"column 'a' is of type float64.*astype\(bool\)"),
        (MEASURED.rename(columns={"b": "B2"}), {}, r"has no column for 'b' \(2 cells with RNA\)"),
        (
            MEASURED.assign(b=MEASURED["b"] & (MEASURED.index > "p")),
            {},
            "none of the genes was measured in 'b', of which 2",
        ),
        (MEASURED.assign(a=MEASURED["a"] & (MEASURED.index != "g1")), {}, "counts of genes .* of 'g1' in cell 'c0'"),
    ],
)
def test_masks_that_cannot_be_right(adata, change, arguments, message):
    if change is not None:
        adata.varm["measured"] = change
    given = {"batch_key": "batch", **({"feature_masks": "measured"} if change is not None else {}), **arguments}
    with pytest.raises(ValueError, match=message):
        pm.MULTIVI.setup_anndata(adata, **given)


@pytest.mark.parametrize("dtype", ["boolean", "object", float])
def test_gaps_of_masks_are_not_made_true(adata, dtype):
    gap = MEASURED["b"].astype(object)
    gap[~MEASURED["b"]] = None
    adata.varm["measured"] = MEASURED.assign(b=gap.astype(dtype))
    with pytest.raises(ValueError, match=r"column 'b' is of type .* and has \d gaps. If what has gaps") as caught:
        pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")
    exec(str(caught.value).split("measured: ")[1][:-1])
    pd.testing.assert_frame_equal(adata.varm["measured"], MEASURED)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")


def test_two_columns_of_one_name(adata):
    adata.varm["measured"] = MEASURED.set_axis(["a", "b", "a"], axis=1)
    with pytest.raises(ValueError, match="more than one column called 'a'"):
        pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")


def test_a_feature_that_no_batch_measured(adata):
    part = adata[adata.obs["batch"] == "b"].copy()
    with pytest.raises(
        ValueError, match=r"1 genes were measured in no batch with cells.*'g1'.*leave them out"
    ) as error:
        pm.MULTIVI.setup_anndata(part, batch_key="batch", feature_masks="measured")
    assert "adata = adata[:, adata.varm['measured'][adata.obs['batch'].unique()].any(axis=1)].copy()" in str(
        error.value
    )
    kept = part[:, part.varm["measured"][part.obs["batch"].unique()].any(axis=1)].copy()
    assert kept.n_vars == 5
    assert pm.MULTIVI.setup_anndata(kept, batch_key="batch", feature_masks="measured").panels == {}


def test_other_cells_without_masks_are_not_taken_for_zeros(adata):
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", feature_masks="measured")
    spec, other = DataSpec.of(adata), adata.copy()
    del other.varm["measured"]
    with pytest.raises(ValueError, match=r"adata.varm has no such key.*load_query_data"):
        spec.table(other)


def test_masked_features_are_no_zeros_of_a_batch(recwarn):
    whole = pm.simulate_multiome((80, 0, 0), n_genes=20, n_regions=20, n_batches=2, seed=0)
    first = (whole.obs["batch"] == "batch_0").to_numpy()
    x = whole.X.toarray()
    x[np.ix_(first, np.arange(8))] = 0
    whole.X = sp.csr_matrix(x)
    with pytest.warns(UserWarning, match=r"have no count in the .* mask them \(feature_masks\)"):
        pm.MULTIVI.setup_anndata(whole, batch_key="batch")
    masks = pd.DataFrame({"batch_0": np.arange(40) >= 8, "batch_1": True}, index=whole.var_names)
    whole.varm["measured"] = masks
    recwarn.clear()
    pm.MULTIVI.setup_anndata(whole, batch_key="batch", feature_masks="measured")
    assert not len(recwarn)
