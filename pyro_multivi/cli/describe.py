"""``pyro-multivi describe``: a saved model, without its tensors."""

from __future__ import annotations

import argparse

from pyro_multivi.api.saving.summary import describe as describe_model


def describe(options: argparse.Namespace) -> None:
    """Print what a saved model is."""
    print(describe_model(options.model))
