"""A rank that cannot start tells the others why, so that they do not wait for it at the start.

It comes to the meeting point like any rank, and leaves its reason there: with rank 0, who tells all
the others; or as rank 0, to each of them who comes.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping
from typing import Any

from barriers.config import GroupConfig
from barriers.errors import RankError
from barriers.packets import address_of, check_user, open_socket, receive, tell

PATIENCE_S = 15.0  # for the others to come; they may still import
MAX_REASON = 600  # characters
_TICK_S = 0.02


def tell_failure(config: GroupConfig, reason: str, *, wait_s: float = PATIENCE_S) -> None:
    """Tell the other ranks of a run that this one cannot start.

    They raise `RankError` with the reason, at once. Never raises: whoever calls this has an error
    of its own to tell. Not for a rank that has met the others: they see it leave.

    Args:
        reason: what went wrong here, in one line.
        wait_s: how long others may take to come; with all of them there it takes milliseconds.
    """
    if config.world == 1:
        return
    deadline = time.monotonic() + min(wait_s, config.timeout_s)
    with contextlib.suppress(OSError), open_socket() as link:
        if config.rank:
            if _retry(lambda: link.connect(address_of(config.name)), deadline):
                hello = {"rank": config.rank, "world": config.world}
                tell(link, {**hello, "failed": reason[:MAX_REASON]})
        elif _retry(lambda: link.bind(address_of(config.name)), deadline):
            link.listen(config.world)
            others = set(range(1, config.world))
            turn_away(link, verdict_on(0, reason), others, deadline)


def verdict_on(rank: int, reason: str) -> dict[str, Any]:
    """What the others are told, as `RankGroup` reads it."""
    text = f"rank {rank} could not start: {reason[:MAX_REASON]}; correct that and start all ranks"
    return {"error": f"{text} again", "ranks": [rank]}


def turn_away(
    listener: socket.socket, verdict: Mapping[str, Any], others: set[int], deadline: float
) -> None:
    """Give the verdict to each of the ranks `others`, as they come."""
    while others and time.monotonic() < deadline:
        listener.settimeout(_TICK_S)
        # Nobody came; or a stranger did, or someone who left again: neither ends the waiting.
        with contextlib.suppress(OSError, RankError, KeyError, TypeError, ValueError):
            link, _ = listener.accept()
            with link:
                link.settimeout(1.0)
                check_user(link)
                hello, _ = receive(link)
                tell(link, verdict)
                others.discard(int(hello["rank"]))


def _retry(act: Any, deadline: float) -> bool:
    """Until it works; rank 0 may not be there yet, or an earlier listener not yet gone."""
    while True:
        try:
            act()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_TICK_S)
