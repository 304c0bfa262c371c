"""The named outcomes of ranks; every message names ranks, what was expected and got, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class RankError(RuntimeError):
    """Something is wrong between ranks; `ranks` are those at fault, as far as this rank knows."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.ranks = tuple(ranks)

    def __reduce__(self) -> tuple[type[RankError], tuple[str, tuple[int, ...]]]:
        return type(self), (self.message, self.ranks)


class RankMismatch(RankError):
    """Ranks were started with different configurations, or not all on one node."""


class RanksMissing(RankError):
    """Ranks did not come to a meeting of hosts in time, or their processes ended."""


class BarrierTimeout(RankError):
    """A barrier's deadline passed; `ranks` are late. The run is poisoned: close it."""


class StepMismatch(RankError):
    """Ranks met in one barrier from different steps: one of them skipped or repeated a step."""


class BarrierAborted(RankError):
    """This host stopped its own device's wait, to close before the deadline."""


def name_ranks(ranks: Sequence[int]) -> str:
    """ "rank 3" or "ranks 0, 3"."""
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks)) or 'none'}"
