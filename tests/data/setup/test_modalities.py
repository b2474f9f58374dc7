import ast
import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.data.setup.register import setup_anndata
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.vocabulary import SPELLINGS, spelled


@pytest.fixture
def adata() -> ad.AnnData:
    """Two paired cells, two with RNA, two with ATAC; the second paired cell was observed without a peak."""
    counts = np.ones((6, 5), dtype=np.float32)
    counts[1, 2:] = 0
    counts[2:4, 2:] = 0
    counts[4:6, :2] = 0
    return ad.AnnData(
        counts,
        obs=pd.DataFrame(
            {"modality": ["paired"] * 2 + ["expression"] * 2 + ["accessibility"] * 2}, index=list("abcdef")
        ),
        var=pd.DataFrame({"feature_types": ["Gene Expression"] * 2 + ["Peaks"] * 3}, index=list("ghpqr")),
    )


def test_stated_modalities_keep_an_observed_empty_cell(adata):
    report = setup_anndata(adata, modality_key="modality")
    assert report.n_cells == {"paired": 2, "expression": 2, "accessibility": 2}
    assert not report.inferred
    assert report.notes == ()
    table = DataSpec.of(adata).table(adata)
    assert table.has_atac.tolist() == [True, True, False, False, True, True]
    assert table.has_rna.tolist() == [True, True, True, True, False, False]


def test_inferred_modalities_take_it_as_missing_and_say_so(adata):
    report = setup_anndata(adata)
    assert report.n_cells == {"paired": 1, "expression": 3, "accessibility": 2}
    assert report.inferred
    assert any(
        note.startswith("3 cells have no count in adata.X: taken as not measured for ATAC") for note in report.notes
    )
    assert any(
        "An observed cell without any count would be taken as missing: give modality_key" in note
        for note in report.notes
    )
    assert DataSpec.of(adata).table(adata).has_atac.tolist() == [True, False, False, False, True, True]


def test_density_is_over_measured_cells(adata):
    report = setup_anndata(adata, modality_key="modality")
    assert report.density == {"RNA": 1.0, "ATAC": 0.75}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (("Multiome", "GEX", "Peaks"), None),
        (("RNA+ATAC", "scRNA-seq", "scATAC-seq"), None),
        (("both", "gene_expression", "Chromatin Accessibility"), None),
        (("10x arc", "rna", "my word"), {"10x arc": "paired", "my word": "accessibility"}),
        # Said by the user wins over what is known.
        (("rna", "both", "atac"), {"rna": "paired", "both": "expression"}),
    ],
)
def test_spellings(adata, words, values):
    adata.obs["how"] = pd.Categorical(np.repeat(words, 2))
    report = setup_anndata(adata, modality_key="how", modality_values=values)
    assert report.n_cells == {"paired": 2, "expression": 2, "accessibility": 2}


def test_no_spelling_has_two_meanings():
    every = [spelling for group in SPELLINGS.values() for spelling in group]
    assert len(every) == len(set(every))
    for meaning, group in SPELLINGS.items():
        assert {spelled(word.upper()) for word in group} == {meaning}


@pytest.mark.parametrize(("word", "nearest"), [("expresion", "Did you mean 'expression'"), ("42", "Known: 'paired'")])
def test_unknown_word(adata, word, nearest):
    adata.obs["modality"] = adata.obs["modality"].replace("expression", word)
    with pytest.raises(ValueError, match=rf"holds '{word}', .* {nearest}.*modality_values={{'{word}': 'paired'}}"):
        setup_anndata(adata, modality_key="modality")


def test_counts_where_none_were_measured(adata):
    adata.obs.loc[["a", "e"], "modality"] = "expression"
    with pytest.raises(ValueError, match=r"2 cells are marked in 'modality' as not having ATAC, .*adata.X: 'a', 'e'"):
        setup_anndata(adata, modality_key="modality")


def test_modality_that_the_object_lacks_is_reported(adata):
    genes = adata[:4, :2].copy()
    report = setup_anndata(genes, modality_key="modality")
    assert report.n_cells == {"paired": 0, "expression": 4, "accessibility": 0}
    assert report.notes == (
        "2 cells are marked in 'modality' as having ATAC, which is not in these data: taken as not measured.",
    )


def test_cell_left_with_nothing_by_its_mark(adata):
    with pytest.raises(ValueError, match=r"2 of 6 cells have nothing measured, .*: 'e', 'f'"):
        setup_anndata(adata[:, :2].copy(), modality_key="modality")


def test_cells_whose_only_features_have_an_unknown_word(adata):
    """The cells have been measured: to drop them is the second advice."""
    adata.var["feature_types"] = adata.var["feature_types"].astype(str).replace("Peaks", "tiles")
    with pytest.raises(ValueError, match=r"'tiles' of adata.var\['feature_types'\] count as neither") as caught:
        setup_anndata(adata)
    values = ast.literal_eval(re.search(r"feature_type_values=(\{.*?\})", str(caught.value))[1])
    assert setup_anndata(adata, feature_type_values=values).n_regions == 3


def test_modality_nobody_has_is_reported(adata):
    with pytest.warns(UserWarning, match=r"No cell was measured for ATAC: nothing can be learned about the 3 regions"):
        report = setup_anndata(adata[2:4].copy())
    assert report.n_regions == 3
    assert any("No cell was measured for ATAC" in note for note in report.notes)


@pytest.mark.parametrize("word", ["tiles", np.nan])
def test_a_number_of_features_of_a_word_that_is_not_known(adata, word):
    adata.var["feature_types"] = ["Gene Expression"] * 2 + [word] * 3
    adata = adata[:4].copy()
    with pytest.warns(UserWarning, match="3 features are left out"):
        setup_anndata(adata)
    with pytest.raises(ValueError, match="n_regions=3, but the data set up has 0: 3 features are of neither") as error:
        DataSpec.of(adata, {RNA: 2, ATAC: 3})
    mend = re.search(r"feature_type_values=(\{.*?\})", str(error.value))
    setup_anndata(adata, feature_type_values=ast.literal_eval(mend[1]))
    assert DataSpec.of(adata, {RNA: 2, ATAC: 3}).n_regions == 3
