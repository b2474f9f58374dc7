"""``pyro-multivi describe``: a saved model, without its tensors."""

from __future__ import annotations

import argparse

from pyro_multivi.api.saving.summary import describe as describe_model
from pyro_multivi.cli.messages import in_options


def describe(options: argparse.Namespace) -> None:
    """Print what a saved model is."""
    print(in_options(describe_model(options.model), vars(options)))
