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

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

ROUNDS = 3
_WRITE, _SIGNAL, _WAIT, _READ = range(4)  # what an agent does next in its round
_PHASES = 4
_ZERO = 128  # of a signed word in a byte
_EPOCHS = 8  # counts wrap here, and start just below
_FIRST_EPOCH = _EPOCHS - 2


@dataclass(frozen=True)
class Protocol:
    """One way to write a barrier.

    Attributes:
        kind: "tag", "epoch" or "phase".
        reset: "shadow" adds to the own word beside the signal, "late" after the wait, "" never.
        exact: the tag wait asks for `== 0` instead of `<= 0`.
        replayed: the phase count is frozen, as in a graph that holds one barrier.
        release: a signal stays behind the payloads sent before it.
        graphs: graphs that a rank runs at a time, on one signal matrix.
    """

    name: str
    kind: str
    reset: str = "shadow"
    exact: bool = False
    replayed: bool = False
    release: bool = True
    graphs: int = 1


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


class _Violation(Exception):
    """A rank did what it must not."""


class _Machine:
    """The moves of all agents; an agent is one graph running on one rank.

    A state is a byte string: round, phase and lanes left of each agent; words [rank, rank];
    payloads [agent, agent, parity]; payloads and signals under way [agent, agent]. Indices are
    (to, from) for memory and (from, to) for what is under way.
    """

    def __init__(self, protocol: Protocol, ranks: int, coarse: bool) -> None:
        self.protocol, self.ranks, self.coarse = protocol, ranks, coarse
        agents = self.agents = ranks * protocol.graphs
        self.rank_of = [a % ranks for a in range(agents)]
        self.peers = [
            [p for p in range(agents) if p != a and p // ranks == a // ranks] for a in range(agents)
        ]
        self.lanes = [sum(1 << p for p in peers) for peers in self.peers]
        self.round, self.phase, self.left = 0, agents, 2 * agents
        self.words = 3 * agents
        self.payloads = self.words + ranks * ranks
        self.payloads_flying = self.payloads + 2 * agents * agents
        self.signals_flying = self.payloads_flying + agents * agents
        self.size = self.signals_flying + agents * agents

    def start(self) -> bytes:
        s = bytearray(self.size)
        first = {"tag": _ZERO, "epoch": _FIRST_EPOCH, "phase": 0}[self.protocol.kind]
        s[self.words : self.payloads] = bytes([first]) * (self.ranks * self.ranks)
        return bytes(s)

    def moves(self, s: bytes) -> Iterator[tuple[str, bytes]]:
        """Every move that is possible in `s`, and the state after it. Raises _Violation."""
        for a in range(self.agents):
            yield from self._arrivals(s, a)
            if s[self.round + a] < ROUNDS:
                yield from (self._write, self._signal, self._wait, self._read)[s[self.phase + a]](
                    s, a
                )

    def is_done(self, s: bytes) -> bool:
        return all(s[self.round + a] == ROUNDS for a in range(self.agents))

    def check_end(self, s: bytes) -> None:
        """Raises _Violation where memory does not allow another round like the first."""
        want = {"tag": _ZERO, "epoch": (_FIRST_EPOCH + ROUNDS) % _EPOCHS, "phase": ROUNDS}
        for to in range(self.ranks):
            for source in range(self.ranks):
                word = s[self._word(to, source)]
                if to != source and word != want[self.protocol.kind]:
                    raise _Violation(
                        f"at the end the word of rank {source} at rank {to} is "
                        f"{self._shown(word)}, not {self._shown(want[self.protocol.kind])}"
                    )

    # ------------------------------------------------------------------ an agent's own moves

    def _write(self, s: bytes, a: int) -> Iterator[tuple[str, bytes]]:
        n = bytearray(s)
        n[self.phase + a] = _SIGNAL
        for p in self.peers[a]:
            n[self._under_way(self.payloads_flying, a, p)] += 1
            if self.coarse:
                self._land_payload(n, a, p)
        yield f"{self._name(a)} writes payload {s[a] + 1} to its peers", bytes(n)

    def _signal(self, s: bytes, a: int) -> Iterator[tuple[str, bytes]]:
        flying = (s[self._under_way(self.payloads_flying, a, p)] for p in self.peers[a])
        if self.protocol.release and any(flying):
            return
        n = bytearray(s)
        n[self.phase + a], n[self.left + a] = _WAIT, self.lanes[a]
        for p in self.peers[a]:
            n[self._under_way(self.signals_flying, a, p)] += 1
            if self.protocol.kind == "tag" and self.protocol.reset == "shadow":
                n[self._word(a, p)] += 1
        yield f"{self._name(a)} enters barrier {s[a] + 1} and signals", bytes(n)

    def _wait(self, s: bytes, a: int) -> Iterator[tuple[str, bytes]]:
        waiting = [p for p in self.peers[a] if s[self.left + a] >> p & 1]
        seen = [p for p in waiting if self._arrived(s, a, p)]
        if self.coarse:  # a word that satisfies a wait goes on satisfying it: look at all at once
            if seen == waiting:
                yield self._pass(s, a, seen)
            return
        for p in seen:
            yield self._pass(s, a, [p])

    def _pass(self, s: bytes, a: int, seen: list[int]) -> tuple[str, bytes]:
        n = bytearray(s)
        for p in seen:
            n[self.left + a] &= ~(1 << p)
        words = ", ".join(f"{self._shown(s[self._word(a, p)])} from {self._name(p)}" for p in seen)
        label = f"{self._name(a)} sees {words} in barrier {s[a] + 1}"
        if n[self.left + a]:
            return label, bytes(n)
        for p in self.peers[a]:
            if self._entered(s, p) <= s[self.round + a]:
                raise _Violation(
                    f"{label} and leaves it, although {self._name(p)} has not entered it"
                )
            if self.protocol.reset == "late":
                n[self._word(a, p)] += 1
        n[self.phase + a], n[self.left + a] = _READ, self.lanes[a]
        return f"{label} and leaves it", bytes(n)

    def _read(self, s: bytes, a: int) -> Iterator[tuple[str, bytes]]:
        want = s[self.round + a] + 1
        left = [p for p in self.peers[a] if s[self.left + a] >> p & 1]
        for group in [left] if self.coarse else [[p] for p in left]:
            n = bytearray(s)
            for p in group:
                got = s[self._payload(a, p, want)]
                if got != want:
                    raise _Violation(
                        f"{self._name(a)} reads payload {got} of {self._name(p)} after barrier "
                        f"{want}"
                    )
                n[self.left + a] &= ~(1 << p)
            if not n[self.left + a]:
                n[self.phase + a] = _WRITE
                n[self.round + a] += 1
            who = " and ".join(self._name(p) for p in group)
            yield f"{self._name(a)} reads payload {want} of {who}", bytes(n)

    # ------------------------------------------------------------------ what is under way

    def _arrivals(self, s: bytes, a: int) -> Iterator[tuple[str, bytes]]:
        for p in self.peers[a]:
            if s[self._under_way(self.payloads_flying, a, p)]:
                n = bytearray(s)
                value = self._land_payload(n, a, p)
                yield f"payload {value} of {self._name(a)} arrives at {self._name(p)}", bytes(n)
            at = self._under_way(self.signals_flying, a, p)
            if s[at]:
                n = bytearray(s)
                word, number = self._word(p, a), self._entered(s, a) - s[at] + 1
                n[at] -= 1
                n[word] = self._signalled(n[word], number)
                yield (
                    f"signal {number} of {self._name(a)} arrives at {self._name(p)}: its word goes "
                    f"from {self._shown(s[word])} to {self._shown(n[word])}",
                    bytes(n),
                )

    def _land_payload(self, n: bytearray, a: int, p: int) -> int:
        """The oldest payload from `a` to `p` arrives; returns its value."""
        at = self._under_way(self.payloads_flying, a, p)
        written = n[self.round + a] + (n[self.phase + a] > _WRITE)
        value = written - n[at] + 1
        n[at] -= 1
        n[self._payload(p, a, value)] = value
        return value

    # ------------------------------------------------------------------ the protocols

    def _signalled(self, word: int, number: int) -> int:
        """A word after the `number`th signal (from 1) has arrived."""
        if self.protocol.kind == "tag":
            return word - 1
        if self.protocol.kind == "epoch":
            return (_FIRST_EPOCH + number) % _EPOCHS
        return 1 if self.protocol.replayed else number

    def _arrived(self, s: bytes, a: int, p: int) -> bool:
        """Whether agent `a`, waiting, takes what it sees for the arrival of `p`."""
        word, number = s[self._word(a, p)], s[self.round + a] + 1
        if self.protocol.kind == "tag":
            value = word - _ZERO + (self.protocol.reset == "late")
            return value == 0 if self.protocol.exact else value <= 0
        if self.protocol.kind == "epoch":
            return (word - _FIRST_EPOCH - number) % _EPOCHS < _EPOCHS // 2
        return word >= (1 if self.protocol.replayed else number)

    # ------------------------------------------------------------------ where things are

    def _entered(self, s: bytes, a: int) -> int:
        """Barriers that `a` has entered."""
        return s[self.round + a] + (s[self.phase + a] >= _WAIT)

    def _word(self, to: int, source: int) -> int:
        return self.words + self.rank_of[to] * self.ranks + self.rank_of[source]

    def _payload(self, to: int, source: int, number: int) -> int:
        return self.payloads + 2 * (to * self.agents + source) + number % 2

    def _under_way(self, base: int, source: int, to: int) -> int:
        return base + source * self.agents + to

    def _shown(self, word: int) -> int:
        return word - _ZERO if self.protocol.kind == "tag" else word

    def _name(self, a: int) -> str:
        graph = f", graph {'AB'[a // self.ranks]}" if self.protocol.graphs > 1 else ""
        return f"rank {self.rank_of[a]}{graph}"


def explore(protocol: Protocol, ranks: int, *, coarse: bool = False) -> Result:
    """Visit every state that `ranks` ranks can reach, shortest traces first.

    Args:
        coarse: payloads arrive at once, lanes and reads of a rank are one move. Fewer
            interleavings; signals still arrive one by one. For four ranks.
    """
    machine = _Machine(protocol, ranks, coarse)
    start = machine.start()
    came_from: dict[bytes, tuple[bytes, str]] = {start: (b"", "")}
    queue = deque([start])
    while queue:
        s = queue.popleft()
        stuck = True
        try:
            for label, after in machine.moves(s):
                stuck = False
                if after not in came_from:
                    came_from[after] = (s, label)
                    queue.append(after)
            if stuck and not machine.is_done(s):
                raise _Violation("no rank can go on")
            if stuck:
                machine.check_end(s)
        except _Violation as e:
            return Result(protocol, ranks, len(came_from), str(e), _trace(came_from, s))
    return Result(protocol, ranks, len(came_from))


def _trace(came_from: dict[bytes, tuple[bytes, str]], s: bytes) -> tuple[str, ...]:
    labels = []
    while came_from[s][1]:
        s, label = came_from[s]
        labels.append(label)
    return tuple(reversed(labels))


def main() -> int:
    """Check every protocol and find every mutant out; prints a table and each mutant's trace."""
    failed = False
    for protocol in PROTOCOLS:
        for ranks in (2, 3, 4):
            began = time.monotonic()
            result = explore(protocol, ranks, coarse=ranks > 3)
            failed |= bool(result.violation)
            print(
                f"{protocol.name:36} {ranks} ranks x {ROUNDS} barriers: {result.states:7} states"
                f"{' (coarse)' if ranks > 3 else ''}, {time.monotonic() - began:.1f} s: "
                f"{result.violation or 'holds'}"
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
