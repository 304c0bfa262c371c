"""How every command of ours refuses: one line of stderr, `error: …`, and 2 or 1 as exit code.

Standard library alone, for commands that load no torch.
"""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong; `--help` has the page of all options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def command(module: str, doc: str | None) -> Parser:
    """The parser of `python -m module`; options are spelled out, never guessed from a prefix."""
    return Parser(prog=f"python -m {module}", description=doc, allow_abbrev=False)


def error_line(error: Exception) -> str:
    """The line that a command ends with: `error: NAME: message`.

    An argument that cannot be used is a plain ValueError, which has no name worth telling.
    """
    name = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"error: {name}{error}"


def exit_code(error: Exception) -> int:
    """2 for what was asked: an argument, a config, a checkpoint; 1 for what went wrong later."""
    return 2 if isinstance(error, ValueError) else 1
