"""Last layer of a decoder, kept as its factors and multiplied out only where values are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from pyro.ops.provenance import extract_provenance
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_multivi.data.checks import check_type
from pyro_multivi.distributions.kernels.buffers import POOL

Link = Literal["softmax", "sigmoid", "softplus", "identity"]

# Features per block when a readout is streamed. At 1000 cells a block of float32 takes 16 MB.
STREAM_WIDTH = 4096


def apply_link(logits: Tensor, link: Link) -> Tensor:
    """Values of a link at logits of all features, (..., F)."""
    if link == "softmax":
        return logits.softmax(-1)
    if link == "sigmoid":
        return logits.sigmoid()
    if link == "softplus":
        return torch.nn.functional.softplus(logits, threshold=40.0)
    return logits


class Readout(torch.Tensor):
    """``link(hidden @ weight.T + bias)``, not yet multiplied out.

    It behaves as an ordinary floating tensor of shape (..., F): any operation on it sees
    the dense values and is differentiable with respect to ``hidden``, ``weight`` and ``bias``.
    Its shape, ``expand`` and ``detach`` cost nothing. The likelihoods of this package use the
    factors instead and work block by block, so that the cells x features matrix of a large
    data set is never formed.

    Parameters
    ----------
    hidden
        Last hidden layer, shape (..., H).
    weight
        Shape (F, H).
    bias
        Shape (F,).
    link
        Function applied to the logits: "softmax" (over features), "sigmoid", "softplus" or
        "identity".
    gemm_dtype
        Precision of the matrix products; None means that of ``hidden``. With
        ``torch.bfloat16`` only the products are in reduced precision.

    Raises
    ------
    ValueError
        If the shapes do not fit together or the link is unknown.
    TypeError
        If the three tensors differ in dtype, or on an attempt to change the readout in place.

    Examples
    --------
    >>> hidden, weight = torch.ones(2, 3), torch.zeros(5, 3)
    >>> p = Readout(hidden, weight, torch.zeros(5), "sigmoid")
    >>> p.shape
    torch.Size([2, 5])
    >>> p.select(torch.tensor([0, 4])).shape
    torch.Size([2, 2])
    >>> (2 * p).sum()
    tensor(10.)
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    link: Link
    gemm_dtype: torch.dtype | None

    @staticmethod
    def __new__(  # noqa: D102  see the class
        cls, hidden: Tensor, weight: Tensor, bias: Tensor, link: Link, gemm_dtype: torch.dtype | None = None
    ) -> Readout:
        for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            check_type(name, value, Tensor)
        if not isinstance(link, str) or link not in get_args(Link):
            raise ValueError(f"link must be one of {', '.join(get_args(Link))}, got {link!r}")
        if gemm_dtype is not None:
            check_type("gemm_dtype", gemm_dtype, torch.dtype)
        if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:] or bias.shape != weight.shape[:1]:
            raise ValueError(
                "hidden, weight and bias must have shapes (..., H), (F, H) and (F,), "
                f"got {tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        if not hidden.dtype == weight.dtype == bias.dtype:
            raise TypeError(
                "hidden, weight and bias must have one dtype, "
                f"got {hidden.dtype}, {weight.dtype} and {bias.dtype}; cast them, or use gemm_dtype"
            )
        made: Readout = torch.Tensor._make_wrapper_subclass(
            cls, (*hidden.shape[:-1], weight.shape[0]), dtype=hidden.dtype, device=hidden.device
        )
        return made

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, link: Link, gemm_dtype: torch.dtype | None = None
    ) -> None:
        if not torch.is_grad_enabled():
            # As a tensor made now would be: PyTorch's distributions compute some parameters later, and with gradients.
            hidden, weight, bias = hidden.detach(), weight.detach(), bias.detach()
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.link, self.gemm_dtype = link, gemm_dtype

    def with_hidden(self, hidden: Tensor) -> Readout:
        """Readout of another hidden layer, (..., H), by the same weights."""
        return self._with(hidden, self.weight, self.bias)

    def of_features(self, features: Tensor, link: Link | None = None) -> Readout:
        """Readout of some features, at positions (k,), int64; a softmax is one over these."""
        return Readout(self.hidden, self.weight[features], self.bias[features], link or self.link, self.gemm_dtype)

    def of_cells(self, rows: Tensor) -> Readout:
        """Readout (S, k, F) of some cells of one of shape (S, B, F), at positions (k,), int64."""
        return self.with_hidden(self.hidden[:, rows])

    def _with(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Readout:
        return Readout(hidden, weight, bias, self.link, self.gemm_dtype)

    def _logits_at(self, features: slice | Tensor) -> Tensor:
        """Logits of some features only, shape (..., k)."""
        weight, bias = self.weight[features], self.bias[features]
        if self.gemm_dtype is None:
            return torch.nn.functional.linear(self.hidden, weight, bias)
        product = self.hidden.to(self.gemm_dtype) @ weight.to(self.gemm_dtype).T
        return product.to(self.hidden.dtype) + bias

    def logits(self) -> Tensor:
        """Dense values before the link, shape (..., F)."""
        return self._logits_at(slice(None))

    def dense(self) -> Tensor:
        """Dense values, shape (..., F), differentiable in all factors."""
        return apply_link(self.logits(), self.link)

    def log_normalizer(self) -> Tensor:
        """Log of the softmax denominator, shape (...), summed block by block.

        Raises
        ------
        ValueError
            If the link is not "softmax".
        """
        if self.link != "softmax":
            raise ValueError(f"only a readout with link 'softmax' has a normalizer, got {self.link!r}")
        total: Tensor | None = None
        for features in self._slices(STREAM_WIDTH):
            part = self._logits_at(features).logsumexp(-1)
            total = part if total is None else torch.logaddexp(total, part)
        if total is None:
            raise ValueError("a softmax needs at least one feature, this readout has 0")
        return total

    def select(self, features: Any, index: Any = None) -> Tensor:
        """Dense values at some features, shape (..., k).

        Costs only those features; a softmax streams over the others for its denominator.

        Parameters
        ----------
        features
            Positions in [0, F), shape (k,), int64.
        index
            Makes this the ordinary ``Tensor.select(dim, index)`` of the dense values.
        """
        if index is not None:
            return self.dense().select(features, index)
        logits = self._logits_at(features)
        if self.link == "softmax":
            return (logits - self.log_normalizer().unsqueeze(-1)).exp()
        return apply_link(logits, self.link)

    def blocks(self, width: int = STREAM_WIDTH, which: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
        """Dense values of ``width`` features at a time, as (features, values of shape (..., width)).

        ``which`` of the blocks are evaluated: by default all.
        """
        normalizer = self.log_normalizer().unsqueeze(-1) if self.link == "softmax" else None
        for features in list(self._slices(width))[which]:
            if torch.is_grad_enabled() or self.gemm_dtype is not None:
                logits = self._logits_at(features)
                yield features, apply_link(logits, self.link) if normalizer is None else (logits - normalizer).exp()
            else:
                yield features, self._evaluate(features, normalizer)

    def _evaluate(self, features: slice, normalizer: Tensor | None) -> Tensor:
        """Dense values of a block, in memory that is used again once they are released."""
        values = self._pooled_logits(features)
        if normalizer is not None:
            return values.sub_(normalizer).exp_()
        return values.sigmoid_() if self.link == "sigmoid" else apply_link(values, self.link)

    def _pooled_logits(self, features: slice) -> Tensor:
        hidden, weight, bias = self.hidden, self.weight[features], self.bias[features]
        values = POOL.take((*hidden.shape[:-1], len(bias)), hidden.dtype, hidden.device)
        torch.addmm(bias, hidden.reshape(-1, hidden.shape[-1]), weight.t(), out=values.view(-1, len(bias)))
        return values

    def _slices(self, width: int) -> Iterator[slice]:
        n_features = self.weight.shape[0]
        return (slice(start, min(start + width, n_features)) for start in range(0, n_features, width))

    def as_subclass(self, cls: Any) -> Any:
        """The dense values as another tensor class (Pyro's provenance tracking calls this)."""
        return self.dense().as_subclass(cls)

    def __deepcopy__(self, memo: Any) -> Readout:
        # A copy of values: cut off from the graph, as a non-leaf tensor cannot be deep-copied.
        return self._with(*(part.detach().clone() for part in (self.hidden, self.weight, self.bias)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = (part.detach() for part in (self.hidden, self.weight, self.bias))
        return Readout, (*parts, self.link, self.gemm_dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Readout(shape={tuple(self.shape)}, link={self.link!r})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _LAZY and isinstance(args[0], Readout):
            return _LAZY[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")):
            raise TypeError(f"a Readout cannot be changed in place ({name}); call .dense() and change that")

        def dense(value: Any) -> Any:
            return value.dense() if isinstance(value, Readout) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Beneath autograd the dense values would silently lose their gradient.
        raise RuntimeError(f"{func} needs the values of a Readout; pass it .dense() instead")


def _expand(readout: Readout, *sizes: Any) -> Tensor:
    shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if shape[-1] not in (-1, readout.shape[-1]):
        return readout.dense().expand(shape)  # one feature repeated: no longer a readout
    if len(shape) == readout.dim() and all(n in (-1, m) for n, m in zip(shape, readout.shape, strict=True)):
        return readout
    hidden = readout.hidden.expand(*shape[:-1], -1)
    return readout._with(hidden, readout.weight, readout.bias)


def _detach(readout: Readout) -> Readout:
    return readout._with(readout.hidden.detach(), readout.weight.detach(), readout.bias.detach())


def _requires_grad(readout: Readout) -> bool:
    return any(part.requires_grad for part in (readout.hidden, readout.weight, readout.bias))


@extract_provenance.register(Readout)
def _extract_provenance(readout: Readout) -> tuple[Readout, frozenset[Any]]:
    # Pyro's inspection taints tensors with the sites they came from; a readout's are its factors'.
    parts: tuple[Any, frozenset[Any]] = extract_provenance((readout.hidden, readout.weight, readout.bias))
    (hidden, weight, bias), provenance = parts
    return (readout._with(hidden, weight, bias), provenance) if provenance else (readout, provenance)


# Answered by the wrapper itself, without its values.
_METADATA = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "layout", "ndim", "is_leaf", "grad_fn", "is_sparse", "is_sparse_csr",
        "is_cuda", "is_cpu", "is_meta", "is_nested", "is_quantized", "itemsize", "nbytes",
    )]
    + [getattr(torch.Tensor, name) for name in (
        "dim", "ndimension", "size", "numel", "nelement", "stride", "is_contiguous", "element_size",
        "is_floating_point", "is_complex", "is_conj", "is_neg", "get_device", "__len__", "__hash__",
    )]
    + [torch.is_floating_point, torch.is_complex, torch.numel]
)  # fmt: skip
_LAZY: dict[Any, Any] = {
    torch.Tensor.expand: _expand,
    torch.Tensor.detach: _detach,
    torch.detach: _detach,
    torch.Tensor.requires_grad.__get__: _requires_grad,  # type: ignore[attr-defined]
}
