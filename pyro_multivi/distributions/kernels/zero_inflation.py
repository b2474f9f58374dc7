r"""Zero inflation of a block of zero counts.

With the gate logit h, NB(0) the probability of a zero count and sig the logistic function,

    log p(0) = log(sig(h) + sig(-h) NB(0)),

and w = sig(h - log NB(0)) is the posterior probability of a dropout: slopes are those of the NB
times 1 - w, and d/dh = w - sig(h). A count above zero is no dropout: w = 0 there.

Two methods give the same numbers. The quick one works with probabilities: with e = exp(h),

    p(0) = (e + NB(0)) / (1 + e),    1 - w = NB(0) / (e + NB(0)),    w - sig(h) = 1 / (1 + e) - (1 - w),

exact to rounding as long as no p(0) comes near to underflow, which it detects. The other works
with logarithms throughout and takes three times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_multivi.distributions.kernels.blocks import Block, sum_of_logs
from pyro_multivi.distributions.kernels.products import LOG2_E

Inflated = tuple[Tensor, Tensor, Tensor]  # value, kept, by_gate: see inflate


def inflate(block: Block, gate_mn: Tensor, log2_nb_mn: Tensor, spare_mn: Tensor) -> Inflated | None:
    """Inflate zeros by probabilities, the quick method.

    Parameters
    ----------
    gate_mn
        Gate logits in units of log(2), shape (m, n).
    log2_nb_mn
        log NB(0) in units of log(2).
    spare_mn
        A third buffer of that shape; all three are overwritten.

    Returns
    -------
    value
        Sum over the zero counts of log p(0), shape (n,).
    kept
        1 - w, shape (m, n).
    by_gate
        d log p(0) / dh, shape (m, n); for other counts -sig(h).

    None is returned if some p(0) is too small for this method.
    """
    # Where this binds and matters, p(0) is too small as well.
    limit = 120.0 if gate_mn.dtype == torch.float32 else 1000.0
    e = gate_mn.clamp_(-limit, limit).exp2_()
    by_gate = torch.add(e, 1.0, out=spare_mn).reciprocal_()  # sig(-h)
    kept = log2_nb_mn.exp2_()
    e.add_(kept)
    kept.div_(e)
    probability = e.mul_(by_gate)
    probability.view(-1).index_fill_(0, block.flat, 1.0)
    kept.view(-1).index_fill_(0, block.flat, 1.0)
    value = sum_of_logs(probability)
    return None if value is None else (value, kept, by_gate.sub_(kept))


def inflate_in_logs(block: Block, gate_mn: Tensor, log2_nb_mn: Tensor, spare_mn: Tensor) -> Inflated:
    """Inflate zeros by logarithms, in any range; see :func:`inflate`."""
    gate, log_nb = gate_mn.div_(LOG2_E), log2_nb_mn.div_(LOG2_E)
    zero = gate.new_zeros(())
    # log p(0) = log NB(0) + softplus(h - log NB(0)) - softplus(h)
    dropout = torch.sub(gate, log_nb, out=spare_mn)
    logs = log_nb.add_(torch.logaddexp(dropout, zero)).sub_(torch.logaddexp(gate, zero))
    logs.view(-1).index_fill_(0, block.flat, 0.0)
    value = logs.sum(0)
    kept = dropout.neg_().sigmoid_()
    kept.view(-1).index_fill_(0, block.flat, 1.0)
    return value, kept, gate.neg_().sigmoid_().sub_(kept)
