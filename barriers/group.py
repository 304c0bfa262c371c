"""Ranks of one node meet over a Unix socket, compare their configurations, and pass open files.

Rank 0 listens on an abstract socket (it leaves no file, and goes with its process); the others
connect to it, and it relays. The listener closes once all ranks have come, so the name is free
again even while a stopped process of an earlier run lives on. Every wait has a deadline and names
the ranks that are missing: rank 0 tells those who wait whom it waits for, so all say the same.

This is for starting and for diagnosis. No step of a run goes through here.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from barriers.config import GroupConfig, all_fields, compare_fields
from barriers.errors import RankError, RankMismatch, RanksMissing, name_ranks
from barriers.members import Member
from barriers.packets import address_of, check_user, close_all, open_socket, receive, tell
from barriers.refusal import PATIENCE_S, turn_away, verdict_on

MAX_VALUE_BYTES = 4096  # of one rank's part of a gathering; all parts must fit in one packet
_TICK_S = 0.1  # how often rank 0 tells the others whom it waits for
_GRACE_S = 1.0  # the others wait this much longer, so that rank 0's verdict reaches them first


@dataclass(frozen=True)
class Part:
    """What one rank brought to a gathering; the files are this process's own to close."""

    value: Any
    fds: tuple[int, ...]


class _CannotStart(Exception):
    """A rank came to say that it does not."""

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank, self.reason = rank, reason


class RankGroup:
    """All ranks of a run, connected.

    Args:
        config: this rank's place.
        fields: what every rank must have been started with, such as model, fingerprint and ladder,
            as short strings. Host and world are compared, too.

    Raises:
        RankMismatch: two ranks differ; names the field, both values and both ranks.
        RanksMissing: not all ranks came in time.
        RankError: a rank said that it cannot start (`barriers.refusal`), or the meeting point is
            taken by another run.
    """

    def __init__(self, config: GroupConfig, fields: Mapping[str, str] | None = None) -> None:
        self.rank, self.world, self.config = config.rank, config.world, config
        self.members: tuple[Member, ...] = ()
        self._links: dict[int, socket.socket] = {}  # rank 0: by rank; the others: only {0: …}
        try:
            if self.rank == 0:
                self._accept_all()
            else:
                self._connect()
            me = Member.current(self.rank)
            parts = self.allgather(
                "start",
                {"member": [me.pid, me.started, me.pid_namespace], "fields": all_fields(fields)},
            )
            self.members = tuple(Member(r, *p.value["member"]) for r, p in enumerate(parts))
            compare_fields([p.value["fields"] for p in parts])
        except BaseException:
            self.close()
            raise

    def allgather(
        self,
        what: str,
        value: Any,
        fds: Sequence[int] = (),
        timeout_s: float | None = None,
    ) -> list[Part]:
        """Give every rank's value and files to every rank; all ranks call this alike.

        Args:
            what: names the meeting in messages; must agree between ranks.
            value: anything JSON can hold, up to 4 KiB.
            fds: open files; the receivers get duplicates of their own, rank by rank.

        Returns:
            One part a rank, by rank; this rank's own part included (its files duplicated, too).

        Raises:
            RanksMissing: a rank did not come in time, or its process ended.
            RankError: ranks are at different meetings.
        """
        message = {"what": what, "value": value, "fds": len(fds)}
        if len(json.dumps(message)) > MAX_VALUE_BYTES:
            raise ValueError(f"{what}: expected at most {MAX_VALUE_BYTES} bytes of JSON, got more")
        wait_s = self.config.timeout_s if timeout_s is None else timeout_s
        if self.rank == 0:
            return self._serve(message, fds, wait_s)
        return self._ask(message, fds, wait_s)

    def barrier(self, what: str, timeout_s: float | None = None) -> None:
        """Wait until every host is here; raises as `allgather`."""
        self.allgather(what, None, timeout_s=timeout_s)

    def agree(self, what: str, error: str | None, timeout_s: float | None = None) -> None:
        """Raise on every rank if any rank brings an error.

        Raises:
            RankError: quotes the failed ranks' errors; and as `allgather`.
        """
        parts = self.allgather(what, None if error is None else error[:600], timeout_s=timeout_s)
        failed = {r: p.value for r, p in enumerate(parts) if p.value is not None}
        if failed:
            told = "; ".join(f"rank {r}: {text}" for r, text in failed.items())
            raise RankError(f"{what} failed on {name_ranks(tuple(failed))}: {told}", tuple(failed))

    def describe(self, ranks: Sequence[int]) -> str:
        """What is known of these ranks' processes, as " (rank 3: process 71 has ended)", or ""."""
        known = []
        for member in self.members:
            state = member.state() if member.rank in ranks else ""
            if state:
                known.append(f"rank {member.rank}: process {member.pid} {state}")
        return f" ({'; '.join(known)})" if known else ""

    def close(self) -> None:
        """Leave; idempotent, and waits for nobody."""
        for link in self._links.values():
            link.close()
        self._links = {}

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- meeting

    def _accept_all(self) -> None:
        """Rank 0: bind the name, take one connection from every other rank, free the name."""
        if self.world == 1:
            return
        deadline = time.monotonic() + self.config.timeout_s
        with open_socket() as listener:
            self._bind(listener, deadline)
            listener.listen(self.world)
            while len(self._links) < self.world - 1:
                missing = [r for r in range(1, self.world) if r not in self._links]
                for link in self._links.values():
                    tell(link, {"waiting": missing}, wait_s=0.0)
                if time.monotonic() > deadline:
                    self._give_up("start", missing, self.config.timeout_s)
                listener.settimeout(_TICK_S)
                try:
                    self._admit(listener.accept()[0])
                except TimeoutError:
                    continue
                except _CannotStart as e:
                    self._pass_on(e, listener, deadline)

    def _pass_on(self, failed: _CannotStart, listener: socket.socket, deadline: float) -> NoReturn:
        """Rank 0: a rank cannot start. Tell those who are here, and those who still come."""
        verdict = verdict_on(failed.rank, failed.reason)
        for link in self._links.values():
            tell(link, verdict)
        others = set(range(1, self.world)) - {failed.rank, *self._links}
        turn_away(listener, verdict, others, min(deadline, time.monotonic() + PATIENCE_S))
        _raise(verdict)

    def _bind(self, listener: socket.socket, deadline: float) -> None:
        while True:
            try:
                listener.bind(address_of(self.config.name))
                return
            except OSError as e:
                if time.monotonic() > deadline:
                    raise RankError(
                        f"rank 0 cannot listen at {self.config.name!r} ({e.strerror}): another run "
                        "of this host uses the name; end it, or set another MASTER_PORT",
                        (0,),
                    ) from e
                time.sleep(_TICK_S)

    def _admit(self, link: socket.socket) -> None:
        """Rank 0: take a newcomer, or tell everyone why not."""
        try:
            link.settimeout(1.0)
            check_user(link)
            hello, _ = receive(link)
            rank, world = int(hello["rank"]), int(hello["world"])
        except (OSError, RankError, KeyError, TypeError, ValueError):
            link.close()  # not a rank of ours: a stranger must not end the run
            return
        problem = None
        if world != self.world or not 0 < rank < self.world:
            problem = (
                f"rank 0 was started in a world of {self.world}, but rank {rank} in a world of "
                f"{world}; start all ranks alike"
            )
        elif rank in self._links:
            problem = (
                f"rank {rank} came twice to {self.config.name!r}: two runs share the name; "
                "set another MASTER_PORT"
            )
        if problem is None and "failed" in hello:
            link.close()
            raise _CannotStart(rank, str(hello["failed"]))
        if problem is None:
            self._links[rank] = link
            return
        for other in (*self._links.values(), link):
            tell(other, {"mismatch": problem, "ranks": [rank]})
        link.close()
        raise RankMismatch(problem, (rank,))

    def _connect(self) -> None:
        """Another rank: reach rank 0, which may not be there yet."""
        deadline = time.monotonic() + self.config.timeout_s
        while True:
            link = open_socket()
            try:
                link.connect(address_of(self.config.name))
                break
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError) as e:
                link.close()
                if time.monotonic() > deadline:
                    raise RanksMissing(
                        f"waited {self.config.timeout_s:.1f} s at start: rank 0 is missing at "
                        f"{self.config.name!r}; start it on this host and network namespace",
                        (0,),
                    ) from e
                time.sleep(0.02)
        self._links[0] = link
        link.settimeout(1.0)
        check_user(link)
        tell(link, {"rank": self.rank, "world": self.world})

    def _serve(self, message: dict[str, Any], fds: Sequence[int], wait_s: float) -> list[Part]:
        """Rank 0: collect every rank's part, then send all of them to all."""
        got: dict[int, tuple[dict[str, Any], list[int]]] = {0: (message, [os.dup(f) for f in fds])}
        deadline = time.monotonic() + wait_s
        try:
            with selectors.DefaultSelector() as waiting:
                for rank, link in self._links.items():
                    waiting.register(link, selectors.EVENT_READ, rank)
                told = 0.0
                while waiting.get_map():
                    missing = [r for r in range(self.world) if r not in got]
                    now = time.monotonic()
                    if now > deadline:
                        self._give_up(message["what"], missing, wait_s)
                    if now > told + _TICK_S:
                        told = now
                        for rank in got:
                            if rank:
                                tell(self._links[rank], {"waiting": missing}, wait_s=0.0)
                    for key, _ in waiting.select(_TICK_S):
                        got[key.data] = self._part(key.data, message["what"])
                        waiting.unregister(key.fileobj)
            reply = {"parts": [got[r][0] for r in range(self.world)]}
            everything = [fd for r in range(self.world) for fd in got[r][1]]
            for rank, link in self._links.items():
                tell(link, reply, everything, f"rank {rank} left during {message['what']}")
            return [Part(got[r][0]["value"], tuple(got[r][1])) for r in range(self.world)]
        except BaseException:
            close_all([fd for _, held in got.values() for fd in held])
            raise

    def _part(self, rank: int, what: str) -> tuple[dict[str, Any], list[int]]:
        """Rank 0: one rank's part of the meeting `what`."""
        try:
            message, fds = receive(self._links[rank])
        except (OSError, RanksMissing) as e:
            self._end(
                {
                    "missing": f"rank {rank} left during {what}{self.describe([rank])}; "
                    "see its own output, then start all ranks again",
                    "ranks": [rank],
                },
                e,
            )
        if message.get("what") != what or message.get("fds") != len(fds):
            close_all(fds)
            self._end(
                {
                    "error": f"rank 0 is at {what!r}, rank {rank} at {message.get('what')!r}; "
                    "start all ranks with the same program",
                    "ranks": [rank],
                }
            )
        return message, fds

    def _give_up(self, what: str, missing: Sequence[int], wait_s: float) -> NoReturn:
        text = f"waited {wait_s:.1f} s at {what}: {_are_missing(missing)}{self.describe(missing)}"
        self._end(
            {"missing": f"{text}; see their output, then start all ranks again", "ranks": missing}
        )

    def _end(self, verdict: Mapping[str, Any], cause: BaseException | None = None) -> NoReturn:
        """Rank 0: tell everyone who still listens, and raise the same here."""
        for link in self._links.values():
            tell(link, verdict)
        _raise(verdict, cause)

    def _ask(self, message: dict[str, Any], fds: Sequence[int], wait_s: float) -> list[Part]:
        """Another rank: send its part to rank 0 and wait for all of them."""
        link, what = self._links[0], message["what"]
        tell(link, message, fds)  # should it fail, rank 0 may have left word why
        deadline = time.monotonic() + wait_s + _GRACE_S
        missing, heard = [0], 0.0
        while True:
            link.settimeout(_TICK_S)
            try:
                reply, files = receive(link)
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                if time.monotonic() - heard > _GRACE_S:  # not even rank 0 says anything
                    missing = [0]
                raise RanksMissing(
                    f"waited {wait_s:.1f} s at {what}: {_are_missing(missing)}"
                    f"{self.describe(missing)}; see their output, then start all ranks again",
                    missing,
                ) from None
            except OSError as e:
                raise RanksMissing(
                    f"rank 0 left during {what}{self.describe([0])}; see its own output", (0,)
                ) from e
            if "parts" in reply:
                return _deal(reply["parts"], files)
            close_all(files)
            if "waiting" not in reply:
                _raise(reply)
            missing, heard = list(reply["waiting"]), time.monotonic()


def _deal(messages: Sequence[Mapping[str, Any]], fds: list[int]) -> list[Part]:
    parts, at = [], 0
    for message in messages:
        count = int(message["fds"])
        parts.append(Part(message["value"], tuple(fds[at : at + count])))
        at += count
    if at != len(fds):
        close_all(fds)
        raise RankError(
            f"expected {at} files from rank 0, got {len(fds)}; raise the limit of open files "
            "(ulimit -n)",
            (0,),
        )
    return parts


def _raise(verdict: Mapping[str, Any], cause: BaseException | None = None) -> NoReturn:
    kinds = {"mismatch": RankMismatch, "missing": RanksMissing, "error": RankError}
    for key, kind in kinds.items():
        if key in verdict:
            raise kind(str(verdict[key]), list(verdict.get("ranks", ()))) from cause
    raise RankError(f"unexpected answer from rank 0: {dict(verdict)!r:.200}", (0,)) from cause


def _are_missing(ranks: Sequence[int]) -> str:
    return f"{name_ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} missing"
