"""Options of differential tests: none of a method is left out."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest

from pyro_multivi import MULTIVI
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.posterior.differential.request import DifferentialRequest


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_a_request_takes_every_option_of_a_method(modality):
    arguments = set(inspect.signature(getattr(MULTIVI, f"differential_{modality.name}")).parameters)
    cells = {"self", "adata", "groupby", "group1", "group2", "idx1", "idx2", modality.list_argument, "silent"}
    options = {field.name for field in fields(DifferentialRequest)} - {"modality", "features"}
    assert arguments - cells == options - ({"two_sided", "probability"} if modality is RNA else set())
