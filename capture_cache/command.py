"""How every command of ours refuses: one line of stderr, `error: …`, and 2 or 1 as exit code.

Standard library alone, for commands that load no torch.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

CLOSED_PIPE = 141  # as a shell reports a program that SIGPIPE ended


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; `--help` has the page of all options."""

    def error_text(self, message: str) -> str:
        return f"error: {message}; see {self.prog} --help\n"

    def error(self, message: str) -> NoReturn:
        self.exit(2, self.error_text(message))


def command(module: str, doc: str | None, kind: type[Parser] = Parser) -> Parser:
    """The parser of `python -m module`; options are spelled out, never guessed from a prefix."""
    return kind(prog=f"python -m {module}", description=doc, allow_abbrev=False)


def error_line(error: Exception) -> str:
    """The line that a command ends with: `error: NAME: message`.

    An argument that cannot be used is a plain ValueError, which has no name worth telling.
    """
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"error: {name}{error}"


def exit_code(error: Exception) -> int:
    """2 for what was asked: an argument, a config, a checkpoint; 1 for what went wrong later."""
    return 2 if isinstance(error, ValueError) else 1


def written(main: Callable[[], int]) -> int:
    """The exit code of `main`, once all that it printed is written.

    A reader that went away, as `head` does, ends the command without a word; a disk that is full is
    an error like others. Python itself would print a traceback for either.
    """
    try:
        code = main()
        sys.stdout.flush()
    except OSError as error:
        if not _is_of_output(error):
            raise
        # What is left in the buffer would be tried again, and told of, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return CLOSED_PIPE
        print(f"error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _is_of_output(error: OSError) -> bool:
    """Whether it was stdout that could not be written: no other file of ours fails unnamed."""
    if isinstance(error, BrokenPipeError):
        output = select.poll()
        output.register(sys.stdout, select.POLLOUT)
        return any(event & select.POLLERR for _, event in output.poll(0))  # nobody reads it
    return error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
