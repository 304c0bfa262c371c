"""A model checker for the barriers: every interleaving of a few ranks, in plain Python.

Each rank runs `ROUNDS` rounds of: write a payload to every peer, barrier, read what the peers wrote
(into one of two buffers, by parity of the round, as the transports do). What crosses the link takes
its time: a payload or a signal that was sent arrives at any later moment, in order only with its
own kind to the same peer, unless a release holds the signal back until the payloads have
arrived. Lanes of a wait look at their words one by one.

Checked in every reachable state: nobody leaves a barrier that a peer has not entered; every read
sees the payload of its own round; some rank can always go on until all are done; and at the
end the memory is as at the start (epoch: as if it had started now), so that what holds for
three barriers holds for any number. `MUTANTS` are wrong on purpose: the checker must find each
of them out, with a trace.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field

from barriers.model_machine import ROUNDS, Machine, Protocol, Violation

PROTOCOLS = (
    Protocol("tag", "tag"),
    Protocol("tag, reset after the wait", "tag", reset="late"),
    Protocol("epoch", "epoch"),
    Protocol("phase, count given anew each time", "phase"),
)
MUTANTS = (
    Protocol("tag waiting for == 0", "tag", exact=True),
    Protocol("tag without its reset", "tag", reset=""),
    Protocol("phase under replay", "phase", replayed=True),
    Protocol("two graphs on one signal matrix", "tag", graphs=2),
    Protocol("tag signalled without a release", "tag", release=False),
)


@dataclass(frozen=True)
class Result:
    """What exploring a protocol gave.

    Attributes:
        states: distinct states seen.
        violation: what went wrong, or "".
        trace: one line for each move that leads there.
    """

    protocol: Protocol
    ranks: int
    states: int
    violation: str = ""
    trace: tuple[str, ...] = field(default=(), repr=False)


def explore(
    protocol: Protocol, ranks: int, *, reduced: bool = False, keep: set[bytes] | None = None
) -> Result:
    """Visit every state that `ranks` ranks can reach, shortest traces first.

    Args:
        reduced: merge moves that nobody else can tell apart (`barriers.model_machine` says why
            that loses nothing): for four ranks, which have 14.6 million states in full.
        keep: gets every state.
    """
    machine = Machine(protocol, ranks, reduced=reduced)
    start = machine.start()
    came_from = {start: b""}
    queue = deque([start])
    while queue:
        s = queue.popleft()
        stuck = True
        try:
            for _, after in machine.moves(s):
                stuck = False
                if after not in came_from:
                    came_from[after] = s
                    queue.append(after)
            if stuck and not machine.is_done(s):
                raise Violation("no rank can go on")
            if stuck:
                machine.check_end(s)
        except Violation as e:
            return Result(protocol, ranks, len(came_from), str(e), _trace(machine, came_from, s))
    if keep is not None:
        keep.update(came_from)
    return Result(protocol, ranks, len(came_from))


def compare(protocol: Protocol, ranks: int) -> tuple[Result, Result, int]:
    """The protocol in full and reduced, and how many states only one of them reaches: 0 is right.

    A state of the full machine counts as the one of the reduced machine that stands for it.
    """
    full, reduced = set[bytes](), set[bytes]()
    results = (
        explore(protocol, ranks, keep=full),
        explore(protocol, ranks, reduced=True, keep=reduced),
    )
    machine = Machine(protocol, ranks, reduced=False)
    return *results, len({machine.merged(s) for s in full} ^ reduced)


def _trace(machine: Machine, came_from: dict[bytes, bytes], s: bytes) -> tuple[str, ...]:
    lines = []
    while before := came_from[s]:
        lines.append(
            next(machine.describe(before, m, n) for m, n in machine.moves(before) if n == s)
        )
        s = before
    return tuple(reversed(lines))


def main(argv: list[str] | None = None) -> int:
    """Check every protocol and find every mutant out; prints a table and each mutant's trace."""
    parser = argparse.ArgumentParser(prog="barriers.model", description=__doc__)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="four ranks in full, too, and their states compared with the reduced machine's: 14.6 "
        "million states, half an hour and gigabytes for each protocol",
    )
    exact = parser.parse_args(argv).exact
    failed = False
    for protocol in PROTOCOLS:
        for ranks in (2, 3, 4):
            began = time.monotonic()
            reduced = ranks > 3
            apart = 0
            if reduced and exact:
                result, less, apart = compare(protocol, ranks)
                failed |= bool(less.violation) or bool(apart)
            else:
                result = explore(protocol, ranks, reduced=reduced)
            failed |= bool(result.violation)
            print(
                f"{protocol.name:36} {ranks} ranks x {ROUNDS} barriers: {result.states:8} states"
                f"{' (reduced)' if reduced and not exact else ''}, "
                f"{time.monotonic() - began:.1f} s: {result.violation or 'holds'}"
                + (f"; {apart} states only one machine reaches" if apart else "")
            )
    for mutant in MUTANTS:
        result = explore(mutant, 2)
        failed |= not result.violation
        print(f"\nmutant: {mutant.name}: {result.violation or 'NOT FOUND OUT'}")
        for number, line in enumerate(result.trace, 1):
            print(f"  {number:2}. {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
