"""What ranks do in the model checker: their moves, their memory, and what may not happen.

An agent is one graph running on one rank. What crosses the link is under way until a move lets it
arrive; payloads and signals are each in order between two agents, as stores to one address are.

The reduced machine takes fewer moves and reaches a violation exactly where the full one does:

- An agent looks at all words of a wait in one move. A look changes nothing that others see, so if
  a word that satisfies a wait goes on satisfying it, the looks before the last can wait for it.
  That "if" is checked after every move, as a property like the others.
- It reads all its peers' payloads in one move, too. That each is right is checked in every state
  from the end of the wait to that move: where one is wrong, the full machine can read it there.
- Payloads arrive as they are sent. The full machine may let them arrive at any moment until the
  sender signals, for a signal waits for them (`release`, without which there is no reduction). Too
  late is found when the wait ends: its sender has not entered. Too early cannot be earlier.

`Machine.merged` says which of its states stands for a state of the full machine; tests compare the
two sets, state by state, for two and three ranks. For four, `python -m barriers.model --exact`
does: `tag` has 14,641,693 states, for which these 161,154 stand and no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ROUNDS = 3
_WRITE, _SIGNAL, _WAIT, _READ = range(4)  # what an agent does next in its round
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


Move = tuple[str, int, tuple[int, ...]]  # what, whose, and which peers it concerns


class Violation(Exception):
    """A rank did what it must not."""


class Machine:
    """The moves of all agents; an agent is one graph running on one rank.

    A state is a byte string: round, phase and lanes left of each agent; words [rank, rank];
    payloads [agent, agent, parity]; payloads and signals under way [agent, agent]. Indices are
    (to, from) for memory and (from, to) for what is under way.
    """

    def __init__(self, protocol: Protocol, ranks: int, *, reduced: bool) -> None:
        if reduced and not protocol.release:
            raise ValueError(
                f"{protocol.name}: signals that overtake payloads need the full machine; explore "
                "with reduced=False"
            )
        self.protocol, self.ranks, self.reduced = protocol, ranks, reduced
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

    def moves(self, s: bytes) -> Iterator[tuple[Move, bytes]]:
        """Every move that is possible in `s`, and the state after it. Raises Violation."""
        for move, after in self._moves(s):
            if self.reduced and s[self.words : self.payloads] != after[self.words : self.payloads]:
                self._check_waits(s, after)
            yield move, after

    def merged(self, s: bytes) -> bytes:
        """The reduced machine's state that stands for `s`: payloads have arrived, and whoever has
        begun to look or to read has it all before him."""
        n = bytearray(s)
        for a in range(self.agents):
            for p in self.peers[a]:
                while n[self._under_way(self.payloads_flying, a, p)]:
                    self._land_payload(n, a, p)
            if n[self.left + a]:
                n[self.left + a] = self.lanes[a]
        return bytes(n)

    def _moves(self, s: bytes) -> Iterator[tuple[Move, bytes]]:
        for a in range(self.agents):
            yield from self._arrivals(s, a)
            if s[self.round + a] < ROUNDS:
                yield from (self._write, self._signal, self._wait, self._read)[s[self.phase + a]](
                    s, a
                )

    def _check_waits(self, s: bytes, after: bytes) -> None:
        """Raises Violation where a word satisfied a wait and does no longer."""
        for a in range(self.agents):
            if s[self.phase + a] == after[self.phase + a] == _WAIT:
                for p in self.peers[a]:
                    if self._arrived(s, a, p) and not self._arrived(after, a, p):
                        raise Violation(
                            f"{self._name(a)} saw {self._shown(s[self._word(a, p)])} from "
                            f"{self._name(p)}, enough to leave barrier {s[self.round + a] + 1}, "
                            f"and now sees {self._shown(after[self._word(a, p)])}"
                        )

    def describe(self, s: bytes, move: Move, after: bytes) -> str:
        """A move out of `s`, for a reader."""
        what, a, peers = move
        name, number = self._name(a), s[self.round + a] + 1
        who = " and ".join(self._name(p) for p in peers)
        if what == "write":
            return f"{name} writes payload {number} to its peers"
        if what == "signal":
            return f"{name} enters barrier {number} and signals"
        if what == "wait":
            left = "" if after[self.left + a] and after[self.phase + a] == _WAIT else ", and leaves"
            words = " and ".join(str(self._shown(s[self._word(a, p)])) for p in peers)
            return f"{name} sees {words} from {who} in barrier {number}{left}"
        if what == "read":
            return f"{name} reads payload {number} of {who}"
        if what == "payload":
            value = self._written(s, a) - s[self._under_way(self.payloads_flying, a, peers[0])] + 1
            return f"payload {value} of {name} arrives at {who}"
        word = self._word(peers[0], a)
        number = self._entered(s, a) - s[self._under_way(self.signals_flying, a, peers[0])] + 1
        return (
            f"signal {number} of {name} arrives at {who}: its word goes from "
            f"{self._shown(s[word])} to {self._shown(after[word])}"
        )

    def is_done(self, s: bytes) -> bool:
        return all(s[self.round + a] == ROUNDS for a in range(self.agents))

    def check_end(self, s: bytes) -> None:
        """Raises Violation where memory does not allow another round like the first."""
        want = {"tag": _ZERO, "epoch": (_FIRST_EPOCH + ROUNDS) % _EPOCHS, "phase": ROUNDS}
        for to in range(self.ranks):
            for source in range(self.ranks):
                word = s[self._word(to, source)]
                if to != source and word != want[self.protocol.kind]:
                    raise Violation(
                        f"at the end the word of rank {source} at rank {to} is "
                        f"{self._shown(word)}, not {self._shown(want[self.protocol.kind])}"
                    )

    # ------------------------------------------------------------------ an agent's own moves

    def _write(self, s: bytes, a: int) -> Iterator[tuple[Move, bytes]]:
        n = bytearray(s)
        n[self.phase + a] = _SIGNAL
        for p in self.peers[a]:
            n[self._under_way(self.payloads_flying, a, p)] += 1
            if self.reduced:
                self._land_payload(n, a, p)
        yield ("write", a, ()), bytes(n)

    def _signal(self, s: bytes, a: int) -> Iterator[tuple[Move, bytes]]:
        flying = (s[self._under_way(self.payloads_flying, a, p)] for p in self.peers[a])
        if self.protocol.release and any(flying):
            return
        n = bytearray(s)
        n[self.phase + a], n[self.left + a] = _WAIT, self.lanes[a]
        for p in self.peers[a]:
            n[self._under_way(self.signals_flying, a, p)] += 1
            if self.protocol.kind == "tag" and self.protocol.reset == "shadow":
                n[self._word(a, p)] += 1
        yield ("signal", a, ()), bytes(n)

    def _wait(self, s: bytes, a: int) -> Iterator[tuple[Move, bytes]]:
        waiting = [p for p in self.peers[a] if s[self.left + a] >> p & 1]
        seen = [p for p in waiting if self._arrived(s, a, p)]
        if self.reduced:
            if seen == waiting:
                yield ("wait", a, tuple(seen)), self._pass(s, a, seen)
            return
        for p in seen:
            yield ("wait", a, (p,)), self._pass(s, a, [p])

    def _pass(self, s: bytes, a: int, seen: list[int]) -> bytes:
        n = bytearray(s)
        for p in seen:
            n[self.left + a] &= ~(1 << p)
        if n[self.left + a]:
            return bytes(n)
        for p in self.peers[a]:
            if self._entered(s, p) <= s[self.round + a]:
                words = ", ".join(
                    f"{self._shown(s[self._word(a, p)])} from {self._name(p)}" for p in seen
                )
                raise Violation(
                    f"{self._name(a)} sees {words} in barrier {s[self.round + a] + 1} and leaves "
                    f"it, although {self._name(p)} has not entered it"
                )
            if self.protocol.reset == "late":
                n[self._word(a, p)] += 1
        n[self.phase + a], n[self.left + a] = _READ, self.lanes[a]
        return bytes(n)

    def _read(self, s: bytes, a: int) -> Iterator[tuple[Move, bytes]]:
        want = s[self.round + a] + 1
        left = [p for p in self.peers[a] if s[self.left + a] >> p & 1]
        for group in [left] if self.reduced else [[p] for p in left]:
            n = bytearray(s)
            for p in group:
                got = s[self._payload(a, p, want)]
                if got != want:
                    raise Violation(
                        f"{self._name(a)} reads payload {got} of {self._name(p)} after barrier "
                        f"{want}"
                    )
                n[self.left + a] &= ~(1 << p)
            if not n[self.left + a]:
                n[self.phase + a] = _WRITE
                n[self.round + a] += 1
            yield ("read", a, tuple(group)), bytes(n)

    # ------------------------------------------------------------------ what is under way

    def _arrivals(self, s: bytes, a: int) -> Iterator[tuple[Move, bytes]]:
        for p in self.peers[a]:
            if s[self._under_way(self.payloads_flying, a, p)]:
                n = bytearray(s)
                self._land_payload(n, a, p)
                yield ("payload", a, (p,)), bytes(n)
            at = self._under_way(self.signals_flying, a, p)
            if s[at]:
                n = bytearray(s)
                word = self._word(p, a)
                n[word] = self._signalled(n[word], self._entered(s, a) - s[at] + 1)
                n[at] -= 1
                yield ("arrival", a, (p,)), bytes(n)

    def _land_payload(self, n: bytearray, a: int, p: int) -> None:
        """The oldest payload from `a` to `p` arrives."""
        at = self._under_way(self.payloads_flying, a, p)
        value = self._written(n, a) - n[at] + 1
        n[at] -= 1
        n[self._payload(p, a, value)] = value

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

    def _written(self, s: bytes | bytearray, a: int) -> int:
        """Payloads that `a` has written."""
        return s[self.round + a] + (s[self.phase + a] > _WRITE)

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
