"""Command line: ``pyro-multivi demo``, ``train``, ``check`` and ``differential``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from pyro_multivi.cli.parser import command_parser

#: Module and function of each command. They are imported when they run, so that help need not wait for torch.
_COMMANDS = {
    "demo": ("train", "demo"),
    "train": ("train", "train"),
    "check": ("check", "check"),
    "differential": ("differential", "differential"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = command_parser().parse_args(arguments)
    try:
        module, name = _COMMANDS[options.command]
        run: Callable[[argparse.Namespace], None] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
        run(options)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, MemoryError) as error:
        # The person who typed the command needs the library's message, not a trace.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"pyro-multivi: {message}", file=sys.stderr)
        return 1
    return 0
