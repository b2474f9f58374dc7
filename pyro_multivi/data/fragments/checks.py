"""Checks of counts of fragments, of models that count them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pyro_multivi.data.modality import ATAC
from pyro_multivi.data.sparse import MOST_COUNTS, SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable

# Counts above 1 that fragments of this density would have: with so many expected, that there is none is no chance.
_EXPECTED = 10.0
# Standard deviations by which even counts have to outnumber odd ones.
_CLEAR = 5.0
# Cells read at once from disk.
_AT_ONCE = 4096
_MEND = "give counts of fragments, or leave accessibility_likelihood out ('bernoulli': open or not)"


def check_fragments(table: CellTable, region_names: Sequence[str]) -> None:
    """Refuse data that are no counts of fragments.

    Raises
    ------
    ValueError
        If a value is not whole or too large, or size factors of ATAC are given.
    """
    counts = table.y
    if ATAC.size_factor_in(table) is not None:
        raise ValueError(
            "size_factor_key names size factors of ATAC, which are factors of a probability: of fragments each cell's "
            "number is inferred. Give those of RNA alone, or leave accessibility_likelihood out."
        )
    if counts is None:
        return
    if counts.whole and counts.largest <= MOST_COUNTS:
        return
    for first, block in _blocks(counts):
        values = block.val
        for what, wrong in (
            ("not a whole number", values != values.floor() if values.is_floating_point() else values < 0),
            (f"above {MOST_COUNTS:,}", values > MOST_COUNTS),
        ):
            if bool(wrong.any()):
                at = int(wrong.int().argmax())
                row = int(torch.searchsorted(block.crow, torch.tensor(at, dtype=block.crow.dtype), right=True)) - 1
                name = table.cell_names[first + row] if table.cell_names else str(first + row)
                raise ValueError(
                    f"ATAC holds values that are {what}, for instance {float(values[at]):g} for cell {name!r} and "
                    f"region {str(region_names[int(block.col[at])])!r}, and accessibility_likelihood counts "
                    f"fragments: {_MEND}."
                )


def _blocks(counts: SparseCounts | StoredCounts) -> Iterator[tuple[int, SparseCounts]]:
    """Counts of some cells at a time, and the position of the first of them."""
    if isinstance(counts, SparseCounts):
        yield 0, counts
        return
    for part in torch.arange(counts.shape[0]).split(_AT_ONCE):
        yield int(part[0]), counts.select_rows(part)


def fragment_cautions(table: CellTable) -> Iterator[str]:
    """Sentences on counts that are hardly those of fragments: binary ones, and reads, each with what to do."""
    counts = table.y
    n = 0 if counts is None else int(counts.crow[-1])
    if counts is None or not n:
        return
    density = n / max(1, int(table.has_atac.sum()) * counts.shape[1])
    if counts.largest <= 1:
        if n * density / 2 > _EXPECTED:
            yield (
                "ATAC holds no count above 1, as if it were binary, and accessibility_likelihood counts fragments, "
                f"which then says no more than open or not: {_MEND}."
            )
        return
    even = even_share(counts)
    if even is not None:
        yield (
            f"{even:.0%} of the ATAC counts above zero are even numbers, as of reads, two of which come from one "
            "fragment: no counts of fragments have more even than odd numbers. pyro_multivi.reads_to_fragments(adata) "
            "makes a layer of fragments of them, to be named in the setup."
        )


def even_share(counts: SparseCounts | StoredCounts) -> float | None:
    """Share of the counts above zero that are even, if there are clearly more of these than odd ones; else None.

    Of a Poisson count, whatever its mean and so of any mixture of them, an odd value is likelier than an even one above
    zero: odd - even = exp(-m) - exp(-2 m).
    """
    n = int(counts.crow[-1])
    n_even = sum(int((block.val % 2 == 0).sum()) for _, block in _blocks(counts))
    return n_even / n if 2 * n_even - n > _CLEAR * n**0.5 else None
