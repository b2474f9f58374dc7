r"""Start of training where a linear model ends.

With random weights, and decoders that know no difference between cells, the KL divergence wins over dimensions of z
before they say anything: of the five dimensions of 600 simulated cells training found three, and a linear model all.
So training starts from principal components: each encoder at the posterior mean of a Gaussian factor model
(:mod:`~pyro_multivi.networks.linear_start.factors`) of the components above the noise
(:mod:`~pyro_multivi.networks.linear_start.components`), each decoder at the regression of the counts on that state
(:mod:`~pyro_multivi.networks.linear_start.weights`), with the intercepts of a batch at its own means. These are start
values only: model and guide are as they were, and all of it is trained.
"""

from pyro_multivi.networks.linear_start.start import start_linearly

__all__ = ["start_linearly"]
