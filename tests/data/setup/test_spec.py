import json
import logging
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.setup.register import setup_anndata
from pyro_multivi.data.setup.spec import DataSpec


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(1).poisson(2.0, (6, 7)).astype(np.float32)
    counts[:, [0, 6]] += 1
    return ad.AnnData(
        counts,
        obs=pd.DataFrame(
            {
                "batch": pd.Categorical(list("cabcab"), categories=list("cabz")),
                "donor": [2, 10, 2, 10, 2, 10],
                "age": [1.0, 2.0, 3.0, 4.0, 5.0, 9.0],
                "constant": 0.1,
                "type": list("TTBBNN"),
                "modality": "paired",
            },
            index=[f"cell{i}" for i in range(6)],
        ),
        var=pd.DataFrame(
            {"feature_types": ["Gene Expression"] * 3 + ["Peaks"] * 4},
            index=["g0", "g1", "g2", "p0", "p1", "p2", "p3"],
        ),
    )


@pytest.fixture
def spec(adata) -> DataSpec:
    setup_anndata(
        adata,
        batch_key="batch",
        modality_key="modality",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age", "constant"],
        labels_key="type",
    )
    return DataSpec.of(adata)


def test_spec_holds_names_and_categories(spec):
    assert spec.gene_names == ("g0", "g1", "g2")
    assert spec.region_names == ("p0", "p1", "p2", "p3")
    assert spec.batch_categories == ("a", "b", "c")  # sorted, without the unused one
    assert spec.categorical == {"donor": ("10", "2")}
    assert spec.label_categories == ("B", "N", "T")
    assert (spec.n_genes, spec.n_regions, spec.n_batch, spec.n_labels) == (3, 4, 3, 3)
    assert spec.design_width == 7
    assert spec.kind == "anndata"
    assert spec.n_cells == {"paired": 6, "expression": 0, "accessibility": 0}


def test_json_round_trip_is_exact(spec):
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert Setup.from_dict(json.loads(json.dumps(spec.setup.to_dict()))) == spec.setup


def test_design_is_batch_then_categories_then_standardised_numbers(spec, adata):
    table = spec.table(adata)
    batch = np.eye(3)[[2, 0, 1, 2, 0, 1]]
    donor = np.eye(2)[[1, 0, 1, 0, 1, 0]]
    age = adata.obs["age"].to_numpy()
    expected = np.column_stack([batch, donor, (age - age.mean()) / age.std(), np.zeros(6)])
    np.testing.assert_allclose(table.design, expected, rtol=1e-6, atol=1e-7)
    assert table.batch_code.tolist() == [2, 0, 1, 2, 0, 1]
    assert table.label.tolist() == [2, 2, 0, 0, 1, 1]
    np.testing.assert_array_equal(table.x.to_dense(), adata.X[:, :3])
    np.testing.assert_array_equal(table.y.to_dense(), adata.X[:, 3:])
    assert table.x.col.dtype == table.y.col.dtype
    assert str(table.x.col.dtype) == "torch.int32"
    assert list(table.cell_names) == adata.obs_names.tolist()


def test_without_batches_there_is_one(adata):
    setup_anndata(adata)
    spec = DataSpec.of(adata)
    assert spec.batch_categories == ("all",)
    assert spec.table(adata).design.tolist() == [[1.0]] * 6


def test_other_object_in_another_order_with_more_features(spec, adata):
    more = ad.AnnData(
        np.full((6, 2), 3, dtype=np.float32),
        obs=adata.obs,
        var=pd.DataFrame({"feature_types": ["Peaks", "Gene Expression"]}, index=["pX", "gX"]),
    )
    other = ad.concat([more, adata], axis=1, merge="same")[::-1, ::-1].copy()
    assert "pyro_multivi" not in other.uns
    expected, got = spec.table(adata[::-1]), spec.table(other)
    for name in ("x", "y"):
        want, have = getattr(expected, name), getattr(got, name)
        np.testing.assert_array_equal(want.to_dense(), have.to_dense())
        assert want.col.tolist() == have.col.tolist()  # ascending within a row
    np.testing.assert_array_equal(expected.design, got.design)


@pytest.mark.parametrize(("columns", "rna"), [(slice(0, 3), True), (slice(3, 7), False)])
def test_other_object_without_a_modality(spec, adata, columns, rna, caplog):
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        table = spec.table(adata[:, columns])
    assert bool(table.has_rna.all()) is rna
    assert bool(table.has_atac.any()) is not rna
    cells = table.batch(torch.tensor([4, 0]))
    assert cells.x.shape == (2, 3)
    assert cells.y.shape == (2, 4)
    assert "which is not in these data: taken as not measured" in caplog.text


def test_modality_inferred_where_the_column_is_absent(spec, adata, caplog):
    other = adata.copy()
    del other.obs["modality"]
    other.X[2, :3] = 0
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        table = spec.table(other)
    assert table.has_rna.tolist() == [True, True, False, True, True, True]
    assert "these data have no column 'modality'" in caplog.text


def test_some_features_missing(spec, adata):
    with pytest.raises(ValueError, match=r"adata.X lacks 2 of the model's 4 regions: 'p1', 'p3'. It has 2 regions"):
        spec.table(adata[:, ["g0", "g1", "g2", "p0", "p2"]])
    renamed = adata.copy()
    renamed.var_names = ["ENSG0", "ENSG1", "ENSG2", "p0", "p1", "p2", "p3"]
    with pytest.raises(
        ValueError, match=r"lacks 3 of the model's 3 genes: .*It has 3 genes: 'ENSG0'.*leave out all genes"
    ):
        spec.table(renamed)


def test_standardised_by_the_mean_of_the_model(spec, adata):
    one = spec.table(adata[5:6])
    age = adata.obs["age"].to_numpy()
    assert one.design[0, 5].item() == pytest.approx((9 - age.mean()) / age.std())


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("batch", "A", r"batch_key='batch' holds 'A' \(1 cells\), .*Did you mean 'a'\? Known: 'a', 'b', 'c'\. MULTIVI"),
        ("donor", 3, r"categorical_covariate_keys='donor' holds '3' .*Known: '10', '2'\. MULTIVI"),
        ("type", "NK", r"labels_key='type' holds 'NK' .*Known: 'B', 'N', 'T'\.$"),
        ("age", np.inf, r"continuous_covariate_keys='age' holds NaN or infinite values for 1 cells: 'cell2'"),
    ],
)
def test_unseen_values(spec, adata, column, value, message):
    other = adata.copy()
    other.obs[column] = other.obs[column].astype(object if column != "age" else float)
    other.obs.loc["cell2", column] = value
    with pytest.raises(ValueError, match=message):
        spec.table(other)


def test_a_column_whose_name_is_a_number(adata):
    adata.obs = adata.obs.rename(columns={"batch": 0})
    with pytest.raises(ValueError, match="batch_key='0' is not in adata.obs. Its name is no text: ") as caught:
        setup_anndata(adata, batch_key="0")
    exec(re.search(r"no text: (.*)\.$", str(caught.value))[1])
    setup_anndata(adata, batch_key="0")


@pytest.mark.parametrize("form", [list, pd.Categorical])
@pytest.mark.parametrize("argument", ["batch_key", "categorical_covariate_keys", "labels_key"])
def test_a_number_and_a_text_of_one_spelling_are_not_made_one(adata, argument, form):
    adata.obs["donor"] = form([1, "1", 2, 2, "1", 1])
    given = ["donor"] if argument == "categorical_covariate_keys" else "donor"
    message = rf"{argument}='donor' holds '1' both as a text .*obs\['donor'\].astype\(str\)"
    with pytest.raises(ValueError, match=message):
        setup_anndata(adata, **{argument: given})
    # One spelling that no cell has any more is no matter, nor is another text beside numbers.
    setup_anndata(adata[[0, 2, 3, 5]].copy(), **{argument: given})
    adata.obs["donor"] = form([1, "none", 2, 2, "none", 1])
    setup_anndata(adata, **{argument: given})


def test_missing_batch_column(spec, adata):
    other = adata.copy()
    del other.obs["batch"]
    with pytest.raises(ValueError, match="batch_key='batch' is not in adata.obs"):
        spec.table(other)


def test_counts_of_other_objects_are_checked(spec, adata):
    other = adata.copy()
    other.X = np.log1p(other.X)
    with pytest.raises(ValueError, match="RNA values that are not a whole number"):
        spec.table(other)


@pytest.mark.parametrize(
    ("layer", "kept"), [(None, "umis"), (None, "raw"), ("counts", "umis"), ("counts", "raw"), ("counts", "X")]
)
def test_advice_on_counts_of_a_model_names_no_argument_of_setup(adata, layer, kept):
    if layer is not None:
        adata.layers[layer] = adata.X.copy()
    setup_anndata(adata, layer=layer)
    spec, counts = DataSpec.of(adata), adata.X.copy()
    if kept == "raw":
        adata.raw = adata.copy()
    elif kept == "umis":
        adata.layers[kept] = counts
    logarithms = np.log1p(counts)
    adata.X = counts if kept == "X" else logarithms
    if layer is not None:
        adata.layers[layer] = logarithms
    with pytest.raises(ValueError, match=r"looks like counts, put them there: adata\.\S+ = adata\.\S+") as caught:
        spec.table(adata)
    assert "give layer" not in str(caught.value)
    exec(re.search(r"put them there: (.*)\.$", str(caught.value))[1])
    assert torch.equal(spec.table(adata).x.to_dense(), torch.from_numpy(counts[:, :3]))


def test_counts_in_x_for_a_model_of_a_layer(adata):
    other = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    setup_anndata(adata, layer="counts")
    spec = DataSpec.of(adata)
    with pytest.raises(ValueError, match="layer='counts' is not in .* There are none. adata.X looks") as caught:
        spec.table(other)
    exec(re.search(r"looks like counts: (.*), or layer=None", str(caught.value))[1], {"adata": other})
    assert torch.equal(spec.table(other).x.to_dense(), spec.table(adata).x.to_dense())
    del other.layers["counts"]
    other.X = np.log1p(other.X)
    with pytest.raises(ValueError, match=r"layer='counts' is not in adata.layers. There are none.$"):
        spec.table(other)


def test_model_of_one_modality_ignores_the_other(adata):
    genes = adata[:, :3].copy()
    setup_anndata(genes)
    table = DataSpec.of(genes).table(adata)
    assert table.y is None
    assert not table.has_atac.any()
    assert table.n_regions == 0


def test_size_factor_column_may_lack_with_its_modality(adata):
    adata.obs["depth"], adata.obs["open"] = 2.0, 0.25
    setup_anndata(adata, size_factor_key=["depth", "open"])
    spec = DataSpec.of(adata)
    peaks = adata[:, 3:].copy()
    del peaks.obs["depth"]
    assert spec.table(peaks).rna_size.tolist() == [2.0] * 6
    # Earlier versions kept no median.
    earlier = DataSpec.from_dict({name: kept for name, kept in spec.to_dict().items() if name != "typical_size"})
    assert earlier.table(peaks).rna_size.tolist() == [1.0] * 6
    del adata.obs["depth"]
    with pytest.raises(ValueError, match="size_factor_key='depth' is not in adata.obs"):
        spec.table(adata)


def test_a_whole_number_is_a_batch_before_it_is_a_position():
    floats = DataSpec(Setup("anndata"), ("g1",), (), batch_categories=("1.0", "2.0"))
    assert [floats.batch_code(batch) for batch in (1, 2, np.int64(1), 0, "2.0", 2.0)] == [0, 1, 0, 0, 1, 1]


def test_batch_code(spec):
    assert [spec.batch_code(name) for name in ("a", "c", 0, 2, np.int64(1))] == [0, 2, 0, 2, 1]
    with pytest.raises(ValueError, match=r"Batch 'C' is not known. Did you mean 'c'\?"):
        spec.batch_code("C")
    with pytest.raises(ValueError, match=r"Batch 3 is not known: positions go from 0 to 2"):
        spec.batch_code(3)
    with pytest.raises(TypeError, match=r"a name or a position, got True"):
        spec.batch_code(True)


def test_batch_code_of_numbers_as_names():
    spec = DataSpec(Setup("anndata"), ("g",), (), batch_categories=("0", "1", "3"))
    assert spec.batch_code(1) == 1
    assert spec.batch_code(2) == 2
    # A number that is a name is that name, as in scvi-tools, whatever its position.
    assert spec.batch_code(3) == spec.batch_code("3") == spec.batch_code(np.int64(3)) == 2


def test_batch_code_of_truth_values_and_fractions_as_names():
    spec = DataSpec(Setup("anndata"), ("g",), (), batch_categories=("0.5", "False", "True"))
    assert [spec.batch_code(name) for name in (0.5, False, True, np.bool_(True), np.float64(0.5))] == [0, 1, 2, 2, 0]
    assert spec.batch_codes("transform_batch", [True, 0.5]) == (2, 0)


def test_a_list_of_none_leaves_cells_in_their_batches(spec):
    assert spec.batch_codes("transform_batch", [None]) is None
    with pytest.raises(TypeError, match=r"transform_batch=\[None, 0\]: A batch is a name or a position, got None"):
        spec.batch_codes("transform_batch", [None, 0])


def test_wrong_object(spec):
    with pytest.raises(TypeError, match="adata must be an AnnData or a MuData, got"):
        spec.table([])
    with pytest.raises(TypeError, match=r"got 'cells.h5ad': read it first, adata = pyro_multivi.read\(path\)"):
        spec.table("cells.h5ad")
    with pytest.raises(TypeError, match=r"join several samples first, adata = pyro_multivi.join_samples"):
        spec.table([None])
