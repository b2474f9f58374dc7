"""Groups of several comparisons, taken apart, and put together from draws of their parts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_multivi.posterior.differential.cell_pairs import DrawSelection, pair_order
from pyro_multivi.posterior.differential.contrasts import Contrast, Partition, resolve_contrasts
from pyro_multivi.posterior.differential.group_draws import DrawKey, choose_evenly


def test_every_group_is_a_union_of_disjoint_parts():
    rng = np.random.default_rng(0)
    contrasts = []
    for _ in range(4):
        side = rng.integers(3, size=50)
        contrasts.append(Contrast(*(torch.from_numpy(np.flatnonzero(side == one)) for one in (1, 2))))
    parts = Partition.of(contrasts)
    everyone = torch.cat(parts.cells)
    assert len(torch.unique(everyone)) == len(everyone)
    for contrast, groups in zip(contrasts, parts.groups, strict=True):
        for index, numbers in zip((contrast.index1, contrast.index2), groups, strict=True):
            union = torch.cat([parts.cells[number] for number in numbers]).sort()[0]
            assert torch.equal(union, index)


def test_there_are_no_more_parts_than_groups():
    cells = [torch.arange(start, 30, 3) for start in range(3)]
    against_rest = [
        Contrast(cells[one], torch.cat([cells[two] for two in range(3) if two != one]).sort()[0]) for one in range(3)
    ]
    parts = Partition.of(against_rest)
    assert [part.tolist() for part in parts.cells] == [part.tolist() for part in cells]
    assert parts.groups == (((0,), (1, 2)), ((1,), (0, 2)), ((2,), (0, 1)))
    # A single comparison against the rest needs no more than two.
    assert len(Partition.of(against_rest[:1]).cells) == 2


def test_a_union_has_draws_of_its_parts_in_proportion_and_of_each_batch():
    keys, strata = [DrawKey(0, (0, 1)), DrawKey(1, (0, 1)), DrawKey(2, (0, 1))], [slice(0, 50), slice(50, 100)]
    values = {key: torch.arange(100.0)[:, None] + 1000 * key.part for key in keys}
    number = np.zeros(3)
    for seed in range(200):
        taken = DrawSelection.choose(np.random.default_rng(seed), keys, [7, 3, 1], strata).take(values)[:, 0]
        assert len(taken) == 100
        assert (taken[:50] % 1000 < 50).all()
        assert (taken[50:] % 1000 >= 50).all()
        assert len(taken.unique()) == 100
        number += np.bincount((taken // 1000).long().numpy(), minlength=3)
    np.testing.assert_allclose(number / number.sum(), np.array([7, 3, 1]) / 11, atol=0.005)


@pytest.mark.parametrize("n_pairs", [None, 500])
def test_pairs_share_a_batch(n_pairs):
    rng, strata = np.random.default_rng(0), [slice(0, 60), slice(60, 100)]
    order = pair_order(rng, 100, n_pairs, strata, torch.device("cpu"))
    if n_pairs is None:
        assert order is None
        order = pair_order(rng, 100, None, None, torch.device("cpu"))
        assert all(torch.equal(part.sort()[0], torch.arange(100)) for part in order)
    else:
        assert torch.equal(order[0] < 60, order[1] < 60)
        assert 0.5 < (order[0] < 60).double().mean() < 0.7


def test_any_draws_in_a_row_have_each_cell_nearly_as_often():
    chosen, number = choose_evenly(np.random.default_rng(0), 7, 50)
    for start in range(40):
        times = np.bincount(chosen[start : start + 10], minlength=7)
        assert np.ptp(times) <= 2
    for cell in range(7):
        assert number[chosen == cell].tolist() == list(range((chosen == cell).sum()))


def combinations(**more) -> pd.DataFrame:
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(["T", "B", "B", "T", None, "B"], categories=["T", "B", "NK"]),
            "donor": [10, 2, 10, 10, 2, 2],
            **more,
        }
    )
    return obs.set_axis([f"c{n}" for n in range(6)])


def test_groups_of_two_columns_are_their_combinations():
    obs = combinations()
    found = resolve_contrasts(obs, list(obs.index), ["type", "donor"])
    # In the order of the categories, numbers in that of numbers; the cell without a type is in no group and no rest.
    assert [(one.group1, one.index1.tolist(), one.index2.tolist()) for one in found] == [
        ("T, 10", [0, 3], [1, 2, 5]),
        ("B, 2", [1, 5], [0, 2, 3]),
        ("B, 10", [2], [0, 1, 3, 5]),
    ]
    (one,) = resolve_contrasts(obs, list(obs.index), ("type", "donor"), "B, 2", "T, 10")
    assert (one.comparison, one.index1.tolist(), one.index2.tolist()) == ("B, 2 vs T, 10", [1, 5], [0, 3])


def test_a_list_of_one_column_is_that_column():
    obs = combinations()
    alone, listed = (resolve_contrasts(obs, list(obs.index), groupby) for groupby in ("type", ["type"]))
    assert [one.comparison for one in alone] == [one.comparison for one in listed] == ["T vs Rest", "B vs Rest"]


def test_combinations_that_would_share_a_name_are_refused():
    obs = combinations(first=["a, b", "a"] * 3, second=["c", "b, c"] * 3)
    with pytest.raises(ValueError, match=r"groupby=\['first', 'second'\]: several combinations are named 'a, b, c'"):
        resolve_contrasts(obs, list(obs.index), ["first", "second"])


def test_a_name_of_several_columns_is_refused():
    obs = combinations()
    obs = pd.concat([obs, obs[["donor"]]], axis=1)
    with pytest.raises(ValueError, match="groupby='donor' is the name of several columns of obs"):
        resolve_contrasts(obs, list(obs.index), "donor")


@pytest.mark.parametrize("name", ["wanted", "limit", "torch", "names"])
def test_a_query_knows_no_variables_of_code(name):
    obs = combinations()
    limit = 2  # noqa: F841
    with pytest.raises(ValueError, match=f"idx1='donor > @{name}' names a variable by @, .* by an f-string"):
        resolve_contrasts(obs, list(obs.index), idx1=f"donor > @{name}")
    obs["sample"] = ["a@b", "c"] * 3
    assert resolve_contrasts(obs, list(obs.index), idx1="sample == 'a@b'")[0].index1.tolist() == [0, 2, 4]


def test_an_empty_name_is_a_name():
    obs = combinations(place=["", "", "x", "x", "", "x"])
    found = resolve_contrasts(obs, list(obs.index), "place")
    assert [(one.group1, one.comparison) for one in found] == [("", " vs Rest"), ("x", "x vs Rest")]
    assert resolve_contrasts(obs, list(obs.index), idx1=[0])[0].names == ("group 1", "group 2")


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ([0.0, 1.0, 2.0, np.nan], (0, np.int64(1))),
        (pd.array([0, 1, 2, None], dtype="Int64"), (0.0, 1.0)),
        (pd.Categorical([0, 1, 2, None]), (np.float64(0), 1)),
        (["0", "1", "2", None], (0.0, "1")),
        ([1.0, 0.0, 2.0, np.nan], ([0], 1)),
    ],
)
def test_a_number_names_a_group_in_either_spelling(values, given):
    obs = pd.DataFrame({"cluster": values}, index=list("wxyz"))
    (one,) = resolve_contrasts(obs, list(obs.index), "cluster", *given)
    assert one.comparison in ("0 vs 1", "0.0 vs 1.0")
    everything = resolve_contrasts(obs, list(obs.index), "cluster", None, given[1])
    assert len(everything) == 2


def test_categories_of_one_spelling_are_one_group():
    obs = pd.DataFrame({"cluster": pd.Categorical([1, "1", "b", "b"])}, index=list("wxyz"))
    found = resolve_contrasts(obs, list(obs.index), "cluster")
    assert [(one.comparison, one.index1.tolist()) for one in found] == [("1 vs Rest", [0, 1]), ("b vs Rest", [2, 3])]


def test_a_group_may_be_called_none():
    obs = pd.DataFrame({"drug": ["None", "A", "None", "B"]}, index=list("wxyz"))
    found = resolve_contrasts(obs, list(obs.index), "drug")
    assert [one.comparison for one in found] == ["A vs Rest", "B vs Rest", "None vs Rest"]
    found = resolve_contrasts(obs, list(obs.index), "drug", group2="None")
    assert [one.comparison for one in found] == ["A vs None", "B vs None"]


@pytest.mark.parametrize("group2", [["B", "T"], ["B"], np.array(["B", "T"]), pd.Series(["B"])])
def test_the_second_group_is_one(group2):
    obs = combinations()
    with pytest.raises(TypeError, match=r"group2=.* give one group, .* idx2=\"type in \['B', 'C'\]\""):
        resolve_contrasts(obs, list(obs.index), "type", "B", group2)


@pytest.mark.parametrize(
    "kind", [list, tuple, np.array, pd.Index, pd.Series, pd.Categorical, set, frozenset, dict.fromkeys, iter]
)
def test_several_groups_in_any_form(kind):
    obs = combinations()
    found = resolve_contrasts(obs, list(obs.index), "type", kind(["B", "T"]))
    assert [one.comparison for one in found] == ["B vs Rest", "T vs Rest"]


def test_a_continuous_column_is_no_grouping():
    score = np.linspace(0, 1, 30)
    obs = pd.DataFrame({"score": score, "number": np.arange(30) % 3 / 1.0}, index=[f"c{n}" for n in range(30)])
    with pytest.raises(ValueError, match=r"groupby='score' is a column of numbers with 30 values.*qcut"):
        resolve_contrasts(obs, list(obs.index), "score")
    obs["detected"] = pd.array(1000 + np.arange(30) // 2 * 2, dtype="Int64")  # 15 values, at most as many as half
    obs["n_counts"] = 1000 + np.arange(30)
    with pytest.raises(ValueError, match=r"groupby='n_counts' is a column of numbers with 30 values.*qcut"):
        resolve_contrasts(obs, list(obs.index), "n_counts")
    assert len(resolve_contrasts(obs, list(obs.index), "detected")) == 15
    assert len(resolve_contrasts(obs, list(obs.index), "score", group1=[score[0]])) == 1
    assert len(resolve_contrasts(obs, list(obs.index), "number")) == 3
