"""Discrete latents that Pyro's ``TraceEnum_ELBO`` sums out."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyro_multivi import ContractError, MultiVIProgram


class Assigned(MultiVIProgram):
    """Each cell belongs to one of three types, of which a number is observed; the guide enumerates them."""

    def __init__(self, config):
        super().__init__(config)
        self.prior_logits, self.type_logits = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def observe_extra(self, cells, z, s):
        c = pyro.sample("c", dist.Categorical(logits=self.prior_logits.expand(len(cells), 3)))
        pyro.sample("marker", dist.Normal(torch.tensor([-1.0, 0.0, 3.0])[c], 1.0), obs=torch.full((len(cells),), 0.5))

    def guide_extra(self, cells, s):
        types = dist.Categorical(logits=self.type_logits.expand(len(cells), 3))
        pyro.sample("c", types, infer={"enumerate": "parallel"})


class Drawn(Assigned):
    """The same, with a draw of each type."""

    def guide_extra(self, cells, s):
        pyro.sample("c", dist.Categorical(logits=self.type_logits.expand(len(cells), 3)))


class OnlyInTheModel(Assigned):
    def observe_extra(self, cells, z, s):
        with pyro.poutine.infer_config(config_fn=lambda _: {"enumerate": "parallel"}):
            super().observe_extra(cells, z, s)

    def guide_extra(self, cells, s):
        pass


def test_the_history_counts_each_cell_once(build, train):
    model = train(build(program_class=Assigned), 1, elbo=TraceEnum_ELBO(max_plate_nesting=1), lr=1e-6)
    found = {site: model.history[f"reconstruction_{site}_train"].iloc[0, 0] for site in ("marker", "expression")}
    model = train(build(program_class=Drawn), 1, elbo=Trace_ELBO(), lr=1e-6)
    plain = {site: model.history[f"reconstruction_{site}_train"].iloc[0, 0] for site in ("marker", "expression")}
    # One draw of c per cell.
    assert found["marker"] == pytest.approx(plain["marker"], rel=0.3)
    assert found["expression"] == pytest.approx(plain["expression"], rel=0.02)


def test_training_learns_the_enumerated_types(build, train):
    model = train(build(program_class=Assigned), 40, elbo=TraceEnum_ELBO(max_plate_nesting=1), lr=0.05)
    assert model.program.type_logits.argmax() == 1
    # q(c) is the posterior, so that the ELBO is exact in c.
    log_joint = model.program.prior_logits.log_softmax(-1) - 0.5 * (0.5 - torch.tensor([-1.0, 0.0, 3.0])) ** 2
    torch.testing.assert_close(model.program.type_logits.softmax(-1), log_joint.softmax(-1), atol=0.1, rtol=0.0)


@pytest.mark.parametrize("elbo", [None, TraceEnum_ELBO(max_plate_nesting=1)], ids=["mean field", "enumeration"])
def test_what_only_the_model_enumerates_is_refused(build, train, elbo):
    with pytest.raises(ContractError, match=r"'c' of the model is enumerated.*'z', 'l', 'd'.*MixtureSameFamily"):
        train(build(program_class=OnlyInTheModel), 1, elbo=elbo)
