"""Work that several processes do in turn, and whose results all of them have."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.processes.group import current

#: Results by name. Numbers come back as arrays without dimensions.
Arrays = dict[str, NDArray[Any]]
Item = TypeVar("Item")


def shared_map(
    compute: Callable[[Item], Arrays], items: Sequence[Item], desc: str | None = None, silent: bool = True
) -> list[Arrays]:
    """Results for all items, of which each process computes every n-th; the first shows a bar unless ``silent``.

    Examples
    --------
    >>> shared_map(lambda number: {"square": np.array(number**2)}, [1, 2, 3])[2]
    {'square': array(9)}
    """
    processes = current()
    items_here = items[processes.turn]
    mine = [compute(item) for item in tqdm(items_here, desc, disable=silent or not processes.is_first)]
    found = gather_arrays(mine)
    return [found[place % processes.size][place // processes.size] for place in range(len(items))]


def by_minibatch(compute: Callable[[Cells], Arrays], minibatches: Iterable[Cells]) -> list[Arrays]:
    """Results for minibatches in order; those of :class:`Minibatches` are shared among processes."""
    if not isinstance(minibatches, Minibatches) or not current().are_several:
        return [compute(cells) for cells in minibatches]
    return shared_map(lambda index: compute(minibatches.cut(index)), minibatches.parts())


def minibatches_in_turn(minibatches: Minibatches) -> Iterator[tuple[int, Cells]]:
    """Every n-th minibatch, with the position of its first cell among all; in one process alone each of them.

    For sums over cells: every process adds up its own, and then they are added.
    """
    starts = [0, *accumulate(minibatches.sizes())]
    if not current().are_several:
        yield from zip(starts, minibatches, strict=False)
        return
    for start, index in list(zip(starts, minibatches.parts(), strict=False))[current().turn]:
        yield start, minibatches.cut(index)


def joined(found: Sequence[Arrays], axis: int = 0) -> Arrays:
    """Results of cells, one after the other."""
    return {name: np.concatenate([part[name] for part in found], axis) for name in (found[0] if found else ())}


def gather_arrays(mine: Sequence[Arrays], to_first: bool = False) -> list[list[Arrays]]:
    """Arrays of each process in turn; with ``to_first`` only the first has them, the others none."""
    if not current().are_several:
        return [list(mine)]
    return [_unpacked(content) for content in current().gather_bytes(_packed(mine), to_first)]


def _packed(results: Sequence[Arrays]) -> bytes:
    plain = [{name: np.asarray(array) for name, array in result.items()} for result in results]
    described = [[(name, array.dtype.str, array.shape) for name, array in result.items()] for result in plain]
    header = json.dumps(described).encode()
    content = [array.tobytes() for result in plain for array in result.values()]
    return b"".join([len(header).to_bytes(8, "little"), header, *content])


def _unpacked(content: bytearray) -> list[Arrays]:
    start = 8 + int.from_bytes(content[:8], "little")
    results = []
    for described in json.loads(content[8:start]):
        result = {}
        for name, dtype, shape in described:
            count = int(np.prod(shape, dtype=np.int64))
            values = np.frombuffer(content, np.dtype(dtype), count, start) if count else np.empty(0, np.dtype(dtype))
            result[name] = values.reshape(shape)
            start += values.nbytes
        results.append(result)
    return results
