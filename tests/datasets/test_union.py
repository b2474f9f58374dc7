"""Union of samples: every feature, and masks of what each sample measured."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, read_h5ad

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.datasets.samples import join_samples

GENES, PEAKS = "Gene Expression", "Peaks"


def cells(counts, names, features, types):
    var = pd.DataFrame({"feature_types": types}, index=features)
    return AnnData(sp.csr_matrix(np.array(counts, np.float32)), obs=pd.DataFrame(index=names), var=var)


@pytest.fixture
def samples():
    """A multiome, an RNA and an ATAC sample; each lacks features of another."""
    multi = cells([[1, 2, 3, 4], [5, 6, 7, 8]], ["c1", "c2"], ["p1", "gA", "p2", "gB"], [PEAKS, GENES, PEAKS, GENES])
    rna = cells([[10, 20, 30], [1, 1, 0]], ["r1", "r2"], ["gB", "gC", "gA"], [GENES] * 3)
    rna.var["chromosome"] = ["1", "2", "3"]
    atac = cells([[1, 2], [0, 9]], ["a1", "a2"], ["p3", "p1"], [PEAKS] * 2)
    return {"multi": multi, "rna": rna, "atac": atac}


def doors(samples, folder):
    """The same samples by every door."""
    yield dict(samples)
    paths = {}
    for name, sample in samples.items():
        paths[name] = folder / f"{name}.h5ad"
        sample.copy().write_h5ad(paths[name])
    yield paths
    yield [str(path) for path in paths.values()]
    multi = samples["multi"]
    with mudata_as_given() as mudata:
        parts = {"rna": multi[:, multi.var["feature_types"] == GENES], "atac": multi[:, ["p1", "p2"]]}
        yield {**samples, "multi": mudata.MuData({name: part.copy() for name, part in parts.items()})}


def test_every_feature_is_kept_and_what_a_sample_lacks_is_masked(samples):
    joined = join_samples(samples, features="union")
    assert joined.var_names.tolist() == ["gA", "gB", "gC", "p1", "p2", "p3"]
    expected = [[2, 4, 0, 1, 3, 0], [6, 8, 0, 5, 7, 0], [30, 10, 20, 0, 0, 0], [0, 1, 1, 0, 0, 0],
                [0, 0, 0, 2, 0, 1], [0, 0, 0, 9, 0, 0]]  # fmt: skip
    np.testing.assert_array_equal(joined.X.toarray(), expected)
    # Described by the first sample that has it.
    assert joined.var["chromosome"].isna().tolist() == [True, True, False, True, True, True]
    masks = joined.varm["pyro_multivi_measured"]
    assert masks["multi"].tolist() == [True, True, False, True, True, False]
    assert masks["rna"].tolist() == [True, True, True, False, False, False]
    assert masks["atac"].tolist() == [False, False, False, True, False, True]
    kept = joined.uns["pyro_multivi"]["samples"]
    assert kept["genes_kept"].tolist() == [2, 3, 0]
    assert kept["regions_kept"].tolist() == [2, 0, 2]


def test_setup_finds_the_masks_whatever_the_batches(samples, tmp_path):
    joined = join_samples(samples, features="union", sample_key="library")
    joined.obs["donor"] = list("xxxyyy")
    report = pm.MULTIVI.setup_anndata(joined, batch_key="donor", modality_key="modality")
    assert report.panels == {
        "atac": {"regions": 2}, "multi": {"genes": 2, "regions": 2}, "rna": {"genes": 3},
    }  # fmt: skip
    table = DataSpec.of(joined).table(joined)
    assert table.rna_panels.measured[table.rna_panels.code[0]].tolist() == [True, True, False]
    assert table.rna_panels.measured[table.rna_panels.code[2]].tolist() == [True, True, True]
    joined.write_h5ad(tmp_path / "joined.h5ad")
    again = read_h5ad(tmp_path / "joined.h5ad")
    assert DataSpec.of(again) == DataSpec.of(joined)
    assert table.difference(DataSpec.of(again).table(again)) is None


def test_every_door_gives_the_same(samples, tmp_path):
    first, *others = (join_samples(door, features="union") for door in doors(samples, tmp_path))
    for other in others:
        assert (first.X != other.X).nnz == 0
        pd.testing.assert_frame_equal(first.varm["pyro_multivi_measured"], other.varm["pyro_multivi_measured"])
        assert first.obs["sample"].tolist() == other.obs["sample"].tolist()


def test_samples_of_the_same_features_need_no_masks(samples):
    multi = samples["multi"]
    same = {"one": multi, "two": multi[:, ::-1].copy(), "genes": multi[:, ["gA", "gB"]].copy()}
    shared, union = join_samples(same), join_samples(same, features="union")
    assert (shared.X != union.X).nnz == 0
    assert not len(union.varm)
    assert list(union.uns["pyro_multivi"]) == ["samples"]


def test_samples_connected_by_a_third_are_joined_and_others_not(samples):
    left = cells([[1, 2]], ["l"], ["gX", "gA"], [GENES] * 2)
    right = cells([[1, 2]], ["r"], ["gC", "gY"], [GENES] * 2)
    assert join_samples({"left": left, "rna": samples["rna"], "right": right}, features="union").n_vars == 5
    with pytest.raises(ValueError, match=r"no gene is in all samples with RNA: 'left' has .*, 'right' has "):
        join_samples({"left": left, "right": right}, features="union")


def test_peaks_called_apart_are_regions_of_their_own(samples):
    one = cells([[1, 2]], ["a"], ["chr1:100-200", "chr1:500-600"], [PEAKS] * 2)
    two = cells([[1, 2]], ["b"], ["chr1:150-250", "chr1:510-590"], [PEAKS] * 2)
    with pytest.warns(UserWarning, match=r"overlap with regions of other samples.*a region of its own, masked where"):
        joined = join_samples({"one": one, "two": two}, features="union")
    assert joined.varm["pyro_multivi_measured"]["one"].tolist() == [True, True, False, False]
    two.var_names = ["chr1-100-200", "chr1-500-600"]
    with pytest.raises(ValueError, match="They are the same intervals: write them alike in every sample"):
        join_samples({"one": one, "two": two}, features="union")


def test_joined_samples_are_not_joined_again(samples):
    joined = join_samples(samples, features="union")
    with pytest.raises(ValueError, match=r"samples\['all'\]: .* Join the samples that it was made of"):
        join_samples({"all": joined, "more": samples["rna"]})
