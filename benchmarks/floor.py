"""The floor of a training step on this machine: its matrix products and its optimiser, nothing else.

Every output is allocated beforehand. The products of a decoder's last layer (forward, gradient of the
hidden layer, gradient of the weight) and of an encoder's first layer (forward, gradient of the weight)
are run in one piece and in blocks of features that stay in the cache; the faster way counts.
"""

from __future__ import annotations

import torch
from measure import median_seconds, report, task
from torch import Tensor

# Features per block: with 128 cells, 2 MB of float32.
_WIDTH = 4096


def readout_seconds(n_features: int, n_hidden: int, n_cells: int, dtype: torch.dtype) -> float:
    """Seconds of the three products of a decoder's last layer."""
    hidden = torch.rand(n_cells, n_hidden).to(dtype)
    weight = torch.rand(n_features, n_hidden).to(dtype)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products(width: int) -> float:
        # The upstream gradient has the shape of the output and would be formed in its place.
        block = torch.empty(n_cells * min(width, n_features), dtype=dtype)

        def run() -> None:
            grad_hidden.zero_()
            for first in range(0, n_features, width):
                rows = slice(first, min(first + width, n_features))
                part = block[: n_cells * (rows.stop - first)].view(n_cells, -1)
                torch.mm(hidden, weight[rows].T, out=part)
                grad_hidden.addmm_(part, weight[rows], alpha=1e-6)  # small: repeated runs must not overflow
                torch.mm(part.T, hidden, out=grad_weight[rows])

        return median_seconds(run)

    return min(products(width) for width in {_WIDTH, max(n_features, _WIDTH)})


def first_layer_seconds(n_features: int, n_hidden: int, n_cells: int, dtype: torch.dtype) -> float:
    """Seconds of the two products of an encoder's first layer, its input dense."""
    counts = torch.rand(n_cells, n_features).to(dtype)
    weight = torch.rand(n_features, n_hidden).to(dtype)
    hidden, grad_hidden = torch.empty(n_cells, n_hidden, dtype=dtype), torch.rand(n_cells, n_hidden).to(dtype)
    grad_weight = torch.empty_like(weight)

    def products(width: int) -> float:
        def run() -> None:
            hidden.zero_()
            for first in range(0, n_features, width):
                rows = slice(first, min(first + width, n_features))
                hidden.addmm_(counts[:, rows], weight[rows])
                torch.mm(counts[:, rows].T, grad_hidden, out=grad_weight[rows])

        return median_seconds(run)

    return min(products(width) for width in {_WIDTH, max(n_features, _WIDTH)})


def optimizer_seconds(n_genes: int, n_regions: int, n_hidden: int) -> float:
    """Seconds of a fused AdamW step over float32 parameters of the model's sizes."""
    wide = [(n_genes, n_hidden)] * 3 + [(n_regions, n_hidden)] * 2  # encoder, rho and pi; encoder and p
    vectors = [(n_genes,)] * 3 + [(n_regions,)] * 2  # two biases and theta; bias and region factors
    hidden = [(n_hidden, n_hidden)] * 8
    parameters: list[Tensor] = [torch.rand(shape, requires_grad=True) for shape in wide + vectors + hidden]
    for parameter in parameters:
        parameter.grad = torch.rand_like(parameter)
    return median_seconds(torch.optim.AdamW(parameters, fused=True).step)


def main() -> None:
    """Measure one task."""
    job = task()
    torch.set_num_threads(job["threads"])
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[job["precision"]]
    n_genes, n_regions, n_hidden = job["n_genes"], job["n_regions"], job["n_hidden"]
    shared = (n_hidden, job["batch_size"], dtype)
    report(
        {
            "versions": {"torch": torch.__version__},
            # rho and pi over genes, p over regions
            "decoder_seconds": 2 * readout_seconds(n_genes, *shared) + readout_seconds(n_regions, *shared),
            "encoder_seconds": first_layer_seconds(n_genes, *shared) + first_layer_seconds(n_regions, *shared),
            "optimizer_seconds": optimizer_seconds(n_genes, n_regions, n_hidden),
        }
    )


if __name__ == "__main__":
    main()
