"""The ELBO that training maximises by default."""

from __future__ import annotations

from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence


class MeanFieldELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO``, whose loss the host does not look at.

    Pyro reads the number behind the loss twice a step, for which a GPU has to be waited for. Value and
    gradients are the same, and so are its checks while validation is on.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(torch.tensor(1.0), 1.0))
    >>> with pyro.validation_enabled(False):
    ...     MeanFieldELBO().differentiable_loss(model, guide)
    tensor(1.5439)
    """

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, a scalar to differentiate."""
        if is_validation_enabled():
            checked: Tensor = super().differentiable_loss(model, guide, *args, **kwargs)
            return checked
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            loss = loss - _elbo(model_trace, guide_trace) / self.num_particles
        return loss


def _elbo(model_trace: Trace, guide_trace: Trace) -> Any:
    """Evidence lower bound of a pair of traces, KL terms in closed form where there is one."""
    sites: dict[str, Any] = {name: site for name, site in model_trace.nodes.items() if site["type"] == "sample"}
    drawn: dict[str, Any] = {name: site for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
    elbo: Any = 0.0
    for name, site in sites.items():
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        guided = drawn[name]
        try:
            kl = scale_and_mask(kl_divergence(guided["fn"], site["fn"]), guided["scale"], guided["mask"])
            elbo = elbo - kl.sum()
        except NotImplementedError:
            elbo = elbo + site["log_prob_sum"] - guided["score_parts"].entropy_term.sum()
    for name, guided in drawn.items():
        if name not in sites:
            # A factor of the guide.
            elbo = elbo - guided["score_parts"].entropy_term.sum()
    return elbo
