"""Command line: ``pyro-multivi demo``, ``train``, ``check``, ``differential``, ``map``, ``describe``, ``convert``."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout

from pyro_multivi.cli.messages import in_options
from pyro_multivi.cli.parser import command_parser

#: Module and function of each command. They are imported when they run, so that help need not wait for torch.
_COMMANDS = {
    "demo": ("train", "demo"),
    "train": ("train", "train"),
    "check": ("check", "check"),
    "differential": ("differential", "differential"),
    "map": ("map", "map_query"),
    "describe": ("describe", "describe"),
    "convert": ("convert", "convert"),
}
# Commands that one process does alone; the others share their work among those of torchrun.
_ALONE = ("describe", "convert")
#: Errors of what was typed or of what a file holds, and of the machine. Any other is a fault of ours, with its trace.
_EXPECTED = (ValueError, TypeError, KeyError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


def _is_first_process() -> bool:
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return True
    # Not before: it imports torch.
    from pyro_multivi.processes.group import is_first_process

    return is_first_process()


class _Said(logging.Handler):
    """Log lines of the library from level WARNING on, as lines of the command."""

    def __init__(self, say: Callable[[object], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"note: {record.getMessage()}")


@contextmanager
def _log_to(say: Callable[[object], None]) -> Iterator[None]:
    logger, handler = logging.getLogger("pyro_multivi"), _Said(say)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = command_parser().parse_args(arguments)

    def say(message: object) -> None:
        print(f"pyro-multivi: {in_options(' '.join(str(message).split()), vars(options))}", file=sys.stderr)

    try:
        with warnings.catch_warnings(), ExitStack() as silence:
            is_first = _is_first_process()
            if not is_first:
                if options.command in _ALONE:
                    return 0
                # Of the processes of torchrun the first alone says what all find; each says why it fails.
                silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
                warnings.simplefilter("ignore")
            # Of other packages to those who program with them.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
            silence.enter_context(_log_to(say if is_first else lambda _: None))
            module, name = _COMMANDS[options.command]
            run: Callable[[argparse.Namespace], None] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            run(options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except BrokenPipeError:
        # Who read the output, such as head, has ended: no fault, and Python is not to tell of it at its end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except _EXPECTED as error:
        # The person who typed the command needs the library's message, not a trace.
        say(error.args[0] if isinstance(error, KeyError) and error.args else error or type(error).__name__)
        return 1
    return 0
