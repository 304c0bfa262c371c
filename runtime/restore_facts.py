"""What a bundle's manifest says of the arena, ladder, step and the ranks' memory, checked."""

from __future__ import annotations

from typing import Any

from capture_cache.dataclass import dataclass
from capture_cache.errors import CorruptBundle
from capture_cache.files import REMEDY
from capture_cache.layout import ArenaLayout
from capture_cache.store import Bundle
from graphs.keys import Ladder
from graphs.step_config import StepConfig
from runtime.bundle_names import GRAPHS
from runtime.opening import NotRestored


@dataclass(frozen=True)
class PeerFacts:
    """The ranks' shared memory, as it was at capture.

    Attributes:
        base: address of this rank's part.
        payload_bytes: of each rank.
        words_at: offsets into the payload of the words that each exchange has for itself: the
            rank, then zeros.
    """

    base: int
    payload_bytes: int
    words_at: tuple[int, ...]

    @classmethod
    def of(cls, told: Any, shown: str) -> PeerFacts | None:
        """From `Manifest.restore`; None where ranks share nothing. Raises CorruptBundle."""
        if told is None:
            return None
        try:
            facts = cls(**{**told, "words_at": tuple(told["words_at"])})
            inside = all(0 <= at < facts.payload_bytes for at in facts.words_at)
            sound = 0 < facts.base < 1 << 57 and inside
        except (KeyError, TypeError) as e:
            raise CorruptBundle(f"{shown}: memory of the ranks is malformed: {e}") from e
        if not sound:
            raise CorruptBundle(f"{shown}: memory of the ranks makes no sense: {facts}")
        return facts


@dataclass(frozen=True)
class Facts:
    """What the manifest says beside the files."""

    layout: ArenaLayout
    arena_base: int
    ladder: Ladder
    step: StepConfig
    peers: PeerFacts | None

    @classmethod
    def of(cls, bundle: Bundle, rank: int) -> Facts:
        """Raises NotRestored: it holds no graphs; CorruptBundle: malformed."""
        told, layout = bundle.manifest.restore, bundle.manifest.arena
        try:
            kind = told["kind"]
            if kind != GRAPHS:
                raise NotRestored(f"the bundle holds no graphs: {told['reason']}")
            step = StepConfig(**told["step"], ep_rank=rank)
            peers = PeerFacts.of(told["peers"], str(bundle.path))
            base, ladder = told["arena_base"], Ladder.parse(told["ladder"], step.max_rows)
            whole = isinstance(base, int) and 0 < base < 1 << 57
        except (KeyError, TypeError, ValueError) as e:
            raise CorruptBundle(f"{bundle.path}: what to restore is malformed: {e!r}") from e
        if layout is None or not whole:
            raise CorruptBundle(
                f"{bundle.path}: expected an arena table and its address, got "
                f"{'none' if layout is None else 'a table'} and {base!r}; {REMEDY}"
            )
        return cls(layout, base, ladder, step, peers)
