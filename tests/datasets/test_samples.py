"""Several samples joined: features that all have, masks for what a sample lacks, and what is refused."""

from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.datasets.samples import join_samples

GENES, PEAKS = "Gene Expression", "Peaks"


def cells(counts, names, features, types=None, **obs):
    var = pd.DataFrame(index=features)
    if types is not None:
        var["feature_types"] = types
    return AnnData(sp.csr_matrix(np.array(counts, np.float32)), obs=pd.DataFrame(obs, index=names), var=var)


@pytest.fixture
def multi():
    return cells([[1, 2, 3, 4], [5, 6, 7, 8]], ["c1", "c2"], ["p1", "gA", "p2", "gB"], [PEAKS, GENES, PEAKS, GENES])


@pytest.fixture
def rna():
    return cells([[10, 20, 30]], ["r1"], ["gB", "gC", "gA"], [GENES] * 3)


@pytest.fixture
def atac():
    return cells([[1, 0], [0, 9]], ["a1", "a2"], ["p2", "p1"], [PEAKS] * 2)


def test_features_that_all_samples_with_a_modality_have_are_kept(multi, rna, atac, caplog):
    rna.X[0, 0] = 0
    joined = join_samples({"rna": rna, "multi": multi, "atac": atac})
    # Genes and peaks in the order of the first sample that has them: gC is not in both samples with RNA.
    assert joined.var_names.tolist() == ["gB", "gA", "p1", "p2"]
    assert joined.var["feature_types"].tolist() == [GENES, GENES, PEAKS, PEAKS]
    expected = [[0, 30, 0, 0], [4, 2, 1, 3], [8, 6, 5, 7], [0, 0, 0, 1], [0, 0, 9, 0]]
    np.testing.assert_array_equal(joined.X.toarray(), expected)
    assert joined.X.dtype == np.float32
    assert joined.obs["sample"].tolist() == ["rna", "multi", "multi", "atac", "atac"]
    assert joined.obs["sample"].cat.categories.tolist() == ["rna", "multi", "atac"]
    assert joined.obs["modality"].tolist() == ["expression", "paired", "paired", "accessibility", "accessibility"]
    kept = joined.uns["pyro_multivi"]["samples"]
    assert kept["genes"].tolist() == [3, 2, 0]
    assert kept["genes_kept"].tolist() == [2, 2, 0]
    assert kept["regions_kept"].tolist() == [0, 2, 2]
    assert kept["accessibility"].tolist() == [0, 0, 2]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "1 of the 3 genes of sample 'rna' are left out: not all samples with RNA have them")
    ]


def test_union_of_the_same_features_is_their_intersection(multi):
    samples = {"one": multi, "two": multi[:, ::-1].copy()}
    shared, union = join_samples(samples), join_samples(samples, features="union")
    assert (shared.X != union.X).nnz == 0
    pd.testing.assert_frame_equal(shared.obs, union.obs)
    pd.testing.assert_frame_equal(shared.var, union.var)
    pd.testing.assert_frame_equal(shared.uns["pyro_multivi"]["samples"], union.uns["pyro_multivi"]["samples"])


def test_a_modality_without_counts_is_not_measured(multi, rna):
    multi.X = sp.csr_matrix(multi.X.toarray() * [0, 1, 0, 1])
    joined = join_samples([multi, rna[:, ["gA", "gB"]]])
    assert joined.var_names.tolist() == ["gA", "gB"]
    assert joined.obs["modality"].tolist() == ["expression"] * 3
    assert joined.obs["sample"].tolist() == ["sample_0", "sample_0", "sample_1"]


def test_barcodes_of_two_samples_get_their_names(multi, rna):
    rna.obs_names = ["c2"]
    joined = join_samples({"A": multi, "B": rna[:, ["gA", "gB"]]})
    assert joined.obs_names.tolist() == ["c1", "c2_A", "c2_B"]
    multi.obs_names = ["c2_B", "c2"]
    with pytest.raises(ValueError, match="obs_names of all samples together holds names more than once: 'c2_B'"):
        join_samples({"A": multi, "B": rna[:, ["gA", "gB"]]})


def test_samples_are_untouched_and_nothing_is_shared(multi, atac):
    before = [each.copy() for each in (multi, atac)]
    joined = join_samples([multi, atac])
    joined.X.data[:] = -1
    joined.obs["sample"] = "changed"
    for sample, copy in zip((multi, atac), before, strict=True):
        assert (sample.X != copy.X).nnz == 0
        pd.testing.assert_frame_equal(sample.obs, copy.obs)
        pd.testing.assert_frame_equal(sample.var, copy.var)


def test_patterns_stated_in_a_sample_are_kept(multi, rna):
    multi.obs["kind"] = ["both assays", "rna"]
    multi.X = sp.csr_matrix([[1, 0, 1, 0], [0, 6, 0, 8]], dtype=np.float32)
    joined = join_samples([multi, rna[:, ["gA", "gB"]]], modality_key="kind", modality_values={"both assays": "paired"})
    # A paired cell without a count of RNA, as the column says.
    assert joined.obs["kind"].tolist() == ["paired", "expression", "expression"]
    with pytest.raises(ValueError, match="modality_key='knd' is not in obs of any sample. Did you mean 'kind'"):
        join_samples([multi], modality_key="knd")
    multi.obs["kind"] = ["expression", "paired"]
    with pytest.raises(ValueError, match=r"samples\['m'\]: 1 cells are marked in 'kind' as not having ATAC"):
        join_samples({"m": multi}, modality_key="kind")


def test_layer_and_words_of_the_samples_are_those_of_the_result(multi, atac):
    for sample in (multi, atac):
        sample.layers["counts"] = sample.X.copy()
        sample.X = sample.X * np.float32(0.1)
        sample.var["kind"] = sample.var.pop("feature_types").astype(str).replace({PEAKS: "tiles"})
    given = {"layer": "counts", "feature_type_key": "kind", "feature_type_values": {"regions": "tiles"}}
    joined = join_samples([multi, atac], **given)
    assert joined.X is None
    report = pm.MULTIVI.setup_anndata(joined, modality_key="modality", **given)
    assert (report.n_genes, report.n_regions, report.n_cells["accessibility"]) == (2, 2, 2)
    # What the join wrote stays beside the setup.
    assert joined.uns["pyro_multivi"]["samples"]["cells"].tolist() == [2, 2]
    with pytest.raises(
        ValueError, match=r"samples\['sample_0'\]: adata.X holds RNA values that are not a whole number"
    ):
        join_samples([multi, atac], **{**given, "layer": None})


def test_columns_of_obs(multi, rna, tmp_path, caplog):
    multi.obs["donor"], rna.obs["donor"] = pd.Categorical(["d1", "d2"]), pd.Categorical(["d3"])
    multi.obs["cluster"], rna.obs["cluster"] = [1, 2], ["T"]
    multi.obs["depth"], rna.obs["depth"] = [1.5, 2.5], [True]
    multi.obs["day"] = [1.5, 2.5]
    joined = join_samples({"A": multi, "B": rna[:, ["gA", "gB"]]})
    assert joined.obs["donor"].tolist() == ["d1", "d2", "d3"]
    assert joined.obs["cluster"].tolist() == ["1", "2", "T"]
    np.testing.assert_array_equal(joined.obs["depth"], [1.5, 2.5, 1])
    np.testing.assert_array_equal(joined.obs["day"], [1.5, 2.5, np.nan])
    assert "column 'cluster' of obs holds numbers in one sample and words in another" in caplog.text
    joined.write_h5ad(tmp_path / "joined.h5ad")
    again = pm.read(tmp_path / "joined.h5ad")
    pd.testing.assert_frame_equal(again.uns["pyro_multivi"]["samples"], joined.uns["pyro_multivi"]["samples"])
    multi.obs["sample"] = "A"
    assert join_samples({"A": multi}).obs["sample"].tolist() == ["A", "A"]
    with pytest.raises(
        ValueError, match="column 'sample' with 'A' where 'B' is to be written: give another sample_key"
    ):
        join_samples({"B": multi})
    assert join_samples({"B": multi}, sample_key="file").obs["sample"].tolist() == ["A", "A"]


def test_repeated_columns_of_obs(multi):
    multi.obs = pd.DataFrame([["a", "b"]] * 2, columns=["donor", "donor"], index=multi.obs_names)
    with pytest.raises(ValueError, match=r"samples\['m'\]: adata.obs holds names more than once: 'donor'"):
        join_samples({"m": multi})
    with pytest.raises(ValueError, match="sample_key and modality_key are both 'x': give two columns"):
        join_samples({"m": multi}, sample_key="x", modality_key="x")


def test_a_cell_without_counts_in_a_sample_of_one_modality(multi, rna):
    rna.X = sp.csr_matrix(rna.shape, dtype=np.float32)
    joined = join_samples([multi, rna[:, ["gA", "gB"]]])
    assert joined.obs["modality"].tolist() == ["paired", "paired", "expression"]
    assert joined.n_vars == 4


def test_mudata_with_cells_missing_from_modalities(multi, rna):
    mudata = pytest.importorskip("mudata")
    genes = (multi.var["feature_types"] == GENES).to_numpy()
    parts = {"gex": multi[:, genes].copy(), "acc": multi[["c2"], ~genes].copy()}
    parts["gex"].obs["donor"] = ["d1", "d2"]
    with mudata_as_given():
        mixed = mudata.MuData(parts)
        unknown = mudata.MuData({"one": parts["gex"], "two": parts["acc"]})
    with pytest.raises(ValueError, match=r"samples\['m'\]: .*Give modalities="):
        join_samples({"m": unknown})
    given = {"rna_layer": "gex", "atac_layer": "acc"}
    joined = join_samples({"m": mixed, "rna": rna[:, ["gA", "gB"]]}, modalities=given)
    assert joined.obs["modality"].tolist() == ["expression", "paired", "expression"]
    np.testing.assert_array_equal(joined.X.toarray(), [[2, 4, 0, 0], [6, 8, 5, 7], [30, 10, 0, 0]])
    assert joined.obs["gex:donor"].tolist()[:2] == ["d1", "d2"]
    with pytest.raises(ValueError, match=r"modalities\['atac_layer'\] is 'ac', which no sample has. Did you"):
        join_samples({"m": mixed}, modalities={**given, "atac_layer": "ac"})


def test_paths_are_read_and_named(multi, rna, tmp_path):
    multi.write_h5ad(tmp_path / "A.h5ad")
    rna[:, ["gA", "gB"]].copy().write_h5ad(tmp_path / "B.h5ad")
    joined = join_samples([tmp_path / "A.h5ad", str(tmp_path / "B.h5ad")])
    assert joined.obs["sample"].tolist() == ["A", "A", "B"]
    with pytest.raises(ValueError, match="samples has more than one called 'A': name them, {'name': path"):
        join_samples([tmp_path / "A.h5ad", tmp_path / "A.h5ad"])
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*C.h5"):
        join_samples([tmp_path / "C.h5"])


def test_genes_by_names_and_by_identifiers(multi, rna):
    rna.var["symbol"] = rna.var_names
    rna.var_names = ["ENSG1", "ENSG2", "ENSG3"]
    with pytest.raises(ValueError, match=r"no gene is in all samples with RNA: .*adata.var_names = (.*)\.$") as caught:
        join_samples({"multi": multi, "rna": rna})
    exec(str(caught.value).rpartition(": ")[2].rstrip("."), {"adata": rna})
    assert join_samples({"multi": multi, "rna": rna}).n_vars == 4


def test_genes_of_one_name_and_different_identifiers(multi, rna):
    multi.var["gene_ids"], rna.var["gene_ids"] = ["p1", "ENSG1.4", "p2", "ENSG2"], ["ENSG2", "ENSG3", "ENSG1.5"]
    rna = rna[:, ["gA", "gB"]].copy()
    assert join_samples({"multi": multi, "rna": rna}).var["gene_ids"].tolist() == ["ENSG1.4", "ENSG2", "p1", "p2"]
    rna.var["gene_ids"] = ["ENSG9", "ENSG2"]
    with pytest.warns(
        UserWarning, match="1 genes of one name have other gene_ids in sample 'rna' than in 'multi', .*ENSG9"
    ):
        join_samples({"multi": multi, "rna": rna})


def test_samples_in_files_are_read_block_by_block(multi, rna, tmp_path):
    expected = join_samples([multi, rna[:, ["gA", "gB"]]]).X
    multi.write_h5ad(tmp_path / "A.h5ad")
    backed = anndata.read_h5ad(tmp_path / "A.h5ad", backed="r")
    rna.X = rna.X.toarray()
    assert (expected != join_samples([backed, rna[:, ["gA", "gB"]]]).X).nnz == 0
    backed.file.close()


def test_setup_of_several_samples_names_the_join(multi, rna):
    for verb in (pm.MULTIVI.setup_anndata, pm.MULTIVI.setup_mudata):
        with pytest.raises(TypeError, match="join several samples first, adata = pyro_multivi.join_samples"):
            verb({"multi": multi, "rna": rna})


def peaks(names):
    return cells(np.ones((2, len(names))), ["a", "b"], names, PEAKS)


def test_peaks_called_in_each_sample_are_refused():
    one = peaks([f"chr1:{start}-{start + 50}" for start in range(0, 1000, 100)])
    other = peaks([f"chr1:{start}-{start + 70}" for start in range(20, 1000, 100)])
    other.obs_names = ["c", "d"]
    message = (
        "10 regions of sample 'one' overlap .* such as 'chr1:0-50' with 'chr1:20-90'. Peaks that were called in each"
    )
    with pytest.raises(ValueError, match=message):
        join_samples({"one": one, "other": other})
    # Next to each other is not overlapping.
    beside = peaks([*one.var_names[:2], "chr1:50-100", "chr2:100-150"])
    beside.obs_names = ["c", "d"]
    assert join_samples({"one": one, "beside": beside}).n_vars == 2
    mostly = peaks([*one.var_names[:9], "chr1:920-980"])
    mostly.obs_names = ["c", "d"]
    with pytest.warns(UserWarning, match="1 regions of sample 'one' overlap"):
        assert join_samples({"one": one, "mostly": mostly}).n_vars == 9


def test_the_same_peaks_in_another_spelling():
    one, other = peaks(["chr1:100-200", "chr1:300-400"]), peaks(["1-100-200", "chr1_300_400"])
    other.obs_names = ["c", "d"]
    with pytest.raises(ValueError, match="They are the same intervals: write them alike in every sample") as caught:
        join_samples({"one": one, "other": other})
    mend = str(caught.value).partition("in every sample, ")[2].partition(". Only")[0]
    for sample in (one, other):
        exec(mend, {"adata": sample})
    assert join_samples({"one": one, "other": other}).var_names.tolist() == ["chr1:100-200", "chr1:300-400"]


def test_the_two_modalities_of_the_same_cells_as_two_samples(rna, atac):
    atac.obs_names = ["r1", "a2"]
    with pytest.warns(UserWarning, match="1 of the 1 cells of one modality have the same name in 'rna' and 'atac'"):
        joined = join_samples({"rna": rna, "atac": atac})
    assert joined.obs_names.tolist() == ["r1_rna", "r1_atac", "a2"]


def test_the_same_cells_as_two_samples():
    cells = pm.simulate_multiome((20, 0, 0), n_genes=10, n_regions=20, seed=0)
    says = "20 of the 20 cells have the same name and the same number of counts in 'one' and 'other'"
    with pytest.warns(UserWarning, match=says):
        assert join_samples({"one": cells, "other": cells[::-1].copy()}).n_obs == 40
    # Names that are numbers say nothing.
    other = pm.simulate_multiome((20, 0, 0), n_genes=10, n_regions=20, seed=1)
    assert join_samples({"one": cells, "other": other}).n_obs == 40


def test_what_is_no_sample(multi):
    with pytest.raises(TypeError, match=r"samples=.* is not allowed: .*an object alone need not be joined"):
        join_samples(multi)
    with pytest.raises(TypeError, match=r"samples\['x'\]: must be an AnnData, a MuData or a path, got 5"):
        join_samples({"x": 5})
    multi.X = sp.csr_matrix(multi.X.toarray() * [[0], [1]])
    with pytest.raises(ValueError, match=r"samples\['m'\]: 1 of 2 cells have nothing measured"):
        join_samples({"m": multi})
