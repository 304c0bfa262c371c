"""The parser of commands that may run as one of several ranks: what it refuses, the others hear."""

from __future__ import annotations

import sys
from typing import NoReturn

from capture_cache.command import Parser
from capture_cache.command import command as plain_command
from runtime.config import tell_ranks


class RankParser(Parser):
    """Tells the other ranks, too, which would wait for this one."""

    def error(self, message: str) -> NoReturn:
        self._print_message(self.error_text(message), sys.stderr)
        tell_ranks(message)  # which may take a while, where they have not come yet
        self.exit(2)


def command(module: str, doc: str | None) -> Parser:
    """As `capture_cache.command.command`, for commands that may run as one of several ranks."""
    return plain_command(module, doc, RankParser)
