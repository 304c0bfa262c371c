"""The parser of commands that may run as one of several ranks: what it refuses, the others hear."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from capture_cache.command import Parser
from capture_cache.command import command as plain_command
from runtime.config import tell_ranks
from runtime.other_engines import unknown_arguments


class RankParser(Parser):
    """Tells the other ranks, too, which would wait for this one."""

    def parse_args(  # type: ignore[override]  # argparse's has overloads for its namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse's; options of other engines are told what does the same here."""
        found: argparse.Namespace
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(unknown_arguments(rest, list(self._option_string_actions)))
        return found

    def error(self, message: str) -> NoReturn:
        self._print_message(self.error_text(message), sys.stderr)
        tell_ranks(message)  # which may take a while, where they have not come yet
        self.exit(2)


def command(module: str, doc: str | None) -> Parser:
    """As `capture_cache.command.command`, for commands that may run as one of several ranks."""
    return plain_command(module, doc, RankParser)
