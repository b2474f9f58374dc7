import ast
import json
import re
from contextlib import nullcontext

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.register import setup_anndata, setup_mudata
from pyro_multivi.data.setup.spec import DataSpec

mudata = pytest.importorskip("mudata")

RNA = {"rna_layer": "rna", "atac_layer": "atac"}


@pytest.fixture(autouse=True)
def new_update() -> None:
    """Do not pull columns on update: the old behaviour warns, and warnings are errors."""
    with mudata_as_given():
        yield


def make_part(cells: list[str], prefix: str, width: int, seed: int) -> ad.AnnData:
    counts = np.random.default_rng(seed).poisson(2.0, (len(cells), width)).astype(np.float32)
    counts[:, 0] += 1
    return ad.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame(index=[f"{prefix}{i}" for i in range(width)]),
    )


@pytest.fixture
def parts() -> dict[str, ad.AnnData]:
    """Cells c0..c5 with RNA, c4..c9 with ATAC, the latter in another order."""
    rna = make_part([f"c{i}" for i in range(6)], "g", 3, seed=0)
    atac = make_part([f"c{i}" for i in (9, 4, 7, 6, 5, 8)], "p", 4, seed=1)
    return {"rna": rna, "atac": atac}


@pytest.fixture
def mdata(parts):
    mdata = mudata.MuData(parts)
    mdata.obs["batch"] = [f"b{int(name[1:]) % 2}" for name in mdata.obs_names]
    return mdata


def expected_rows(part: ad.AnnData, cells: pd.Index) -> np.ndarray:
    """Dense counts in the order of ``cells``, zeros where a cell is absent."""
    frame = pd.DataFrame(part.X.toarray(), index=part.obs_names)
    return frame.reindex(cells).fillna(0).to_numpy()


@pytest.mark.parametrize("order", [("rna", "atac"), ("atac", "rna")])
def test_unpaired_cells_need_no_padding(parts, order):
    mdata = mudata.MuData({name: parts[name] for name in order})
    report = setup_mudata(mdata, modalities=RNA)
    assert report.n_cells == {"paired": 2, "expression": 4, "accessibility": 4}
    assert (report.n_genes, report.n_regions) == (3, 4)
    spec = DataSpec.of(mdata)
    table = spec.table(mdata)
    cells = mdata.obs_names
    assert list(table.cell_names) == cells.tolist()
    np.testing.assert_array_equal(table.x.to_dense(), expected_rows(parts["rna"], cells))
    np.testing.assert_array_equal(table.y.to_dense(), expected_rows(parts["atac"], cells))
    assert table.has_rna.tolist() == cells.isin(parts["rna"].obs_names).tolist()
    assert table.has_atac.tolist() == cells.isin(parts["atac"].obs_names).tolist()


def test_names_of_modalities_are_known_without_saying(parts):
    mdata = mudata.MuData({"GEX": parts["rna"], "peaks": parts["atac"], "hto": make_part(["c0"], "h", 2, 2)})
    setup_mudata(mdata)
    setup = DataSpec.of(mdata).setup
    assert (setup.rna_modality, setup.atac_modality) == ("GEX", "peaks")
    mdata = mudata.MuData({"a": parts["rna"], "b": parts["atac"]})
    with pytest.raises(ValueError, match=r"cannot be seen from their names: 'a', 'b'. Give modalities="):
        setup_mudata(mdata)
    setup_mudata(mdata, modalities={"rna_layer": "a", "atac_layer": "b"})
    assert DataSpec.of(mdata).region_names == ("p0", "p1", "p2", "p3")


@pytest.mark.parametrize("name", ["rna", "atac"])
def test_one_modality_alone(mdata, name):
    setup_mudata(mudata.MuData({name: mdata.mod[name]}))
    alone = mudata.MuData({name: mdata.mod[name]})
    report = setup_mudata(alone, modalities={f"{name}_layer": name})
    assert (report.n_genes > 0, report.n_regions > 0) == (name == "rna", name == "atac")


def padded(parts, cells):
    return {
        name: ad.AnnData(sp.csr_matrix(expected_rows(part, cells)), obs=pd.DataFrame(index=cells), var=part.var.copy())
        for name, part in parts.items()
    }


def test_padded_object_is_the_same_as_the_unpadded(mdata, parts):
    full = mudata.MuData(padded(parts, mdata.obs_names))
    # One column from mudata 0.4 on.
    has_rna, has_atac = (np.ravel(mdata.obsm[name]) for name in ("rna", "atac"))
    full.obs["how"] = np.select([has_rna & has_atac, has_rna], ["multiome", "rna"], "atac")
    setup_mudata(mdata)
    want = DataSpec.of(mdata).table(mdata)
    for arguments in ({}, {"modality_key": "how"}):
        report = setup_mudata(full, modalities=RNA, **arguments)
        assert report.inferred is not bool(arguments)
        have = DataSpec.of(full).table(full)
        assert want.has_rna.tolist() == have.has_rna.tolist()
        assert want.has_atac.tolist() == have.has_atac.tolist()
        np.testing.assert_array_equal(want.y.to_dense(), have.y.to_dense())


def test_mark_against_the_structure(mdata):
    mdata.obs["how"] = "paired"
    with pytest.raises(
        ValueError, match=r"4 cells are marked in 'how' as having RNA, yet are not in mdata.mod\['rna'\].X"
    ):
        setup_mudata(mdata, modality_key="how")


def test_layers_and_columns_of_a_modality(mdata, parts):
    full = mudata.MuData(padded(parts, mdata.obs_names))
    full.mod["rna"].layers["counts"] = full.mod["rna"].X.copy()
    full.mod["rna"].X = full.mod["rna"].X * 0.5
    full.mod["rna"].obs["site"] = [f"s{i % 3}" for i in range(10)]
    full.mod["atac"].obs["age"] = np.arange(10.0)
    full.obs["site"] = "other"
    setup_mudata(
        full,
        rna_layer="counts",
        batch_key="site",
        continuous_covariate_keys=["age"],
        modalities={**RNA, "batch_key": "rna", "continuous_covariate_keys": "atac"},
    )
    spec = DataSpec.of(full)
    assert spec.batch_categories == ("s0", "s1", "s2")
    assert spec.continuous_mean == (4.5,)
    assert spec.table(full).batch_code.tolist() == [i % 3 for i in range(10)]
    setup_mudata(full, rna_layer="counts", batch_key="site", modalities=RNA)
    assert DataSpec.of(full).batch_categories == ("other",)


def test_column_of_a_modality_that_lacks_cells(mdata):
    mdata.mod["rna"].obs["site"] = "s"
    with pytest.raises(
        ValueError,
        match=r"batch_key='site' lies in mdata.mod\['rna'\].obs, where 4 of 10 cells are absent: .*mdata.obs",
    ):
        setup_mudata(mdata, batch_key="site", modalities={**RNA, "batch_key": "rna"})
    with pytest.raises(
        ValueError,
        match=r"batch_key='site' is not in mdata.obs. .*It is in mdata.mod\['rna'\].obs. Put a column with a value",
    ):
        setup_mudata(mdata, batch_key="site", modalities=RNA)


def test_column_of_a_modality_that_has_all_cells(mdata):
    whole = mdata[mdata.mod["rna"].obs_names].copy()
    whole.mod["rna"].obs["site"] = "s"
    with pytest.raises(ValueError, match=r"It is in mdata.mod\['rna'\].obs. Name that modality") as caught:
        setup_mudata(whole, batch_key="site", modalities=RNA)
    place = ast.literal_eval(re.search(r"modalities=(\{.*\})\.", str(caught.value))[1])
    setup_mudata(whole, batch_key="site", modalities={**RNA, **place})


def test_a_column_of_all_cells_is_in_no_modality(mdata):
    mdata.obs["site"] = "s"
    modalities = {**RNA, "batch_key": "rna"}
    with pytest.raises(ValueError, match=r"It is in mdata.obs. Leave 'batch_key' out of modalities in the setup.$"):
        setup_mudata(mdata, batch_key="site", modalities=modalities)
    setup_mudata(mdata, batch_key="site", modalities=RNA)


@pytest.mark.parametrize(
    ("argument", "key", "modality"),
    [
        ("batch_key", "site", {}),
        ("batch_key", "site", {"batch_key": "rna"}),
        ("batch_key", "rna:site", {}),
        ("categorical_covariate_keys", "atac:site", {}),
        ("continuous_covariate_keys", "rna:age", {}),
        ("continuous_covariate_keys", "atac:copied", {}),  # which mudata would have copied, had it been told to
    ],
)
def test_a_column_that_modalities_have_between_them_is_to_be_gathered(mdata, argument, key, modality):
    for part in mdata.mod.values():
        number = np.array([int(name[-1]) for name in part.obs_names])
        part.obs["site"] = pd.Categorical([f"s{n}" for n in number // 4])
        part.obs["age"] = part.obs["copied"] = number.astype(float)
        mdata.obs = mdata.obs.join(part.obs.add_prefix("rna:" if "c0" in part.obs_names else "atac:"))
    del mdata.obs["atac:copied"]
    with pytest.raises(ValueError, match=rf"{argument}='{key}' .* Gather it from the modalities, ") as caught:
        setup_mudata(mdata, modalities={**RNA, **modality}, **{argument: key})
    line, _, then = re.search(r"Gather it from the modalities, (.*?)(, and give (.*))?\.$", str(caught.value)).groups()
    exec(line)
    name = key.rpartition(":")[2]
    assert then == (None if name == key else f"{argument}={name!r}")
    setup_mudata(mdata, modalities=RNA, **{argument: name})
    number = np.array([int(cell[-1]) for cell in mdata.obs_names])
    assert mdata.obs[name].tolist() == ([f"s{n}" for n in number // 4] if name == "site" else number.tolist())


@pytest.mark.parametrize("lacking", [0, 3])
def test_a_column_that_no_modality_has_for_some_cells_is_not_to_be_gathered(mdata, lacking):
    mdata.mod["rna"].obs["site"] = "s"
    mdata.mod["atac"].obs["site"] = ["s"] * (6 - lacking) + [None] * lacking
    with pytest.raises(ValueError, match="batch_key='site' is not in mdata.obs") as caught:
        setup_mudata(mdata, modalities=RNA, batch_key="site")
    assert ("Gather it" in str(caught.value)) == (lacking == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modalities": {"rna": "rna"}}, r"modalities has the key 'rna', .*Known: 'rna_layer', 'atac_layer'"),
        ({"modalities": {"rna_layer": "RNA"}}, r"modalities\['rna_layer'\] is 'RNA', .*Did you mean 'rna'\?"),
        ({"modalities": {"rna_layer": "rna", "atac_layer": "rna"}}, r"'rna' cannot be both RNA and ATAC"),
        ({"modalities": {"rna_layer": "rna"}, "atac_layer": "x"}, r"atac_layer='x' was given, but modalities"),
        ({"rna_layer": "counts"}, r"rna_layer='counts' is not in mdata.mod\['rna'\].layers. There are none."),
        ({"batch_key": "Batch"}, r"batch_key='Batch' is not in mdata.obs. Did you mean 'batch'\?"),
    ],
)
def test_wrong_arguments(mdata, arguments, message):
    with pytest.raises(ValueError, match=message):
        setup_mudata(mdata, **arguments)


def test_wrong_counts_and_their_place(mdata):
    mdata.mod["rna"].layers["umis"] = mdata.mod["rna"].X.copy()
    mdata.mod["rna"].X = mdata.mod["rna"].X * 0.5
    with pytest.raises(ValueError, match=r"mdata.mod\['rna'\].X holds RNA .*give rna_layer='umis'"):
        setup_mudata(mdata)


def test_nothing_measured_and_how_to_drop_it():
    cells = [f"c{i}" for i in range(6)]
    parts = {"rna": make_part(cells, "g", 3, seed=0), "atac": make_part(cells, "p", 4, seed=1)}
    for name, empty in (("rna", ["c1", "c2", "c4"]), ("atac", ["c2", "c4", "c5"])):
        parts[name].X = sp.csr_matrix(parts[name].X.toarray() * ~parts[name].obs_names.isin(empty)[:, None])
    mdata = mudata.MuData(parts)
    with pytest.raises(ValueError, match=r"2 of 6 cells .*: 'c2', 'c4'. Drop them: mdata = ") as caught:
        setup_mudata(mdata)
    namespace = {"mdata": mdata, "np": np, "pd": pd}
    exec(str(caught.value).split("Drop them: ")[1], namespace)
    assert setup_mudata(namespace["mdata"]).n_cells == {"paired": 2, "expression": 1, "accessibility": 1}


def test_a_listed_cell_without_counts_is_measured(mdata):
    atac = mdata.mod["atac"]
    atac.X = sp.csr_matrix(atac.X.toarray() * ~atac.obs_names.isin(["c4", "c8"])[:, None])
    report = setup_mudata(mdata)
    assert report.n_cells == {"paired": 2, "expression": 4, "accessibility": 4}
    assert not report.inferred


def test_stale_object(mdata):
    mdata.mod["rna"] = mdata.mod["rna"].copy()
    mdata.mod["rna"].obs_names = ["new", *mdata.mod["rna"].obs_names[1:]]
    with pytest.raises(ValueError, match=r"1 cells of mdata.mod\['rna'\] are not in .*: 'new'. Call mdata.update"):
        setup_mudata(mdata)


def test_shared_features_instead_of_cells(parts):
    with pytest.raises(ValueError, match="mdata.axis is 1"):
        setup_mudata(mudata.MuData({"rna": parts["rna"], "atac": make_part(["d0", "d1"], "g", 3, 2)}, axis=1))


def test_wrong_objects(mdata, parts):
    with pytest.raises(TypeError, match=r"adata is a MuData: use setup_mudata"):
        setup_anndata(mdata)
    with pytest.raises(TypeError, match=r"mdata must be a MuData, got AnnData: use setup_anndata"):
        setup_mudata(parts["rna"])


def test_only_one_key_is_written_and_it_survives_h5mu(mdata, tmp_path):
    mdata.mod["rna"].obsm["X_pca"] = np.ones((6, 2))
    before = mdata.copy()
    obs, var = mdata.obs.copy(), mdata.var.copy()  # A copy by mudata 0.4 has another type of strings.
    setup_mudata(mdata, batch_key="batch", modalities=RNA)
    DataSpec.of(mdata).table(mdata)
    assert list(mdata.uns) == ["pyro_multivi"]
    assert list(mdata.uns["pyro_multivi"]) == ["setup"]
    assert json.loads(mdata.uns["pyro_multivi"]["setup"])["kind"] == "mudata"
    pd.testing.assert_frame_equal(mdata.obs, obs)
    pd.testing.assert_frame_equal(mdata.var, var)
    assert set(mdata.obsm) == set(before.obsm)
    for name in mdata.mod:
        new, old = mdata.mod[name], before.mod[name]
        pd.testing.assert_frame_equal(new.obs, old.obs)
        np.testing.assert_array_equal(new.X.toarray(), old.X.toarray())
        assert set(new.obsm) == set(old.obsm)
        assert not new.uns
    mdata.write(tmp_path / "m.h5mu")
    again = mudata.read_h5mu(tmp_path / "m.h5mu")
    assert DataSpec.of(again) == DataSpec.of(mdata)
    backed = mudata.read_h5mu(tmp_path / "m.h5mu", backed="r")
    np.testing.assert_array_equal(
        DataSpec.of(backed).table(backed).y.to_dense(), DataSpec.of(mdata).table(mdata).y.to_dense()
    )
    backed.file.close()


@pytest.mark.parametrize("pull", [False, True])
def test_view_becomes_its_own_and_its_parent_stays(mdata, pull):
    view = mdata[["c9", "c0", "c4"]]
    set_options = getattr(mudata, "set_options", None)  # mudata 0.4 has no such option: nothing is pulled.
    with set_options(pull_on_update=None) if pull and set_options else nullcontext():
        setup_mudata(view)
    assert not view.is_view
    assert list(view.obs.columns) == ["batch"]
    assert "pyro_multivi" not in mdata.uns
    assert DataSpec.of(view).n_cells == {"paired": 1, "expression": 1, "accessibility": 1}


def test_other_mudata_without_a_modality(mdata):
    mdata.mod["rna"].obs["age"] = 1.0
    setup_mudata(mdata, batch_key="batch", modalities=RNA)
    spec = DataSpec.of(mdata)
    alone = mudata.MuData({"atac": mdata.mod["atac"][:, ::-1].copy()})
    alone.obs["batch"] = "b1"
    table = spec.table(alone)
    assert table.x is None
    assert not table.has_rna.any()
    np.testing.assert_array_equal(table.y.to_dense(), mdata.mod["atac"].X.toarray())
    with pytest.raises(ValueError, match=r"mdata has none of the modalities 'rna', 'atac'; it has 'protein'"):
        spec.table(mudata.MuData({"protein": mdata.mod["rna"]}))


def test_anndata_for_a_model_of_a_mudata(mdata):
    setup_mudata(mdata)
    spec = DataSpec.of(mdata)
    rna = mdata.mod["rna"].copy()
    with pytest.raises(TypeError, match=r"A MuData was set up and an AnnData was given .*'feature_types'"):
        spec.table(rna)
    rna.var["feature_types"] = "Gene Expression"
    table = spec.table(rna)
    assert table.has_rna.all()
    assert not table.has_atac.any()
    np.testing.assert_array_equal(table.x.to_dense(), rna.X.toarray())


def test_mudata_for_a_model_of_an_anndata(mdata, parts):
    kinds = {"rna": "Gene Expression", "atac": "Peaks"}
    for name, part in parts.items():
        part.var["feature_types"] = kinds[name]
    both = ad.concat(padded(parts, mdata.obs_names).values(), axis=1)
    both.var["feature_types"] = ["Gene Expression"] * 3 + ["Peaks"] * 4
    setup_anndata(both)
    spec = DataSpec.of(both)
    one, other = spec.table(both), spec.table(mdata)
    np.testing.assert_array_equal(one.x.to_dense(), other.x.to_dense())
    np.testing.assert_array_equal(one.y.to_dense(), other.y.to_dense())
    assert one.has_rna.tolist() == other.has_rna.tolist()
