"""Names that the compiler writes into a bundle and the player reads."""

from __future__ import annotations

ROPE_FILE = "data/rope_table"
# Symbols beside the arena's entries: what holds them, and the ranks' memory.
DEVICE_WHOLE, HOST_WHOLE, PEERS = "arena", "pinned", "peers"
# Kinds of `Manifest.restore`: graphs that can be restored; none, and why not; none, as was asked.
GRAPHS, LIVE, SKIPPED = "graphs", "live", "skipped"
SKIP_WEIGHTS = "skip"  # as `--weights`: leave the weights as they are, for measurements


def weights_file(rank: int) -> str:
    """The graph that fills a preset's weights on a rank."""
    return f"graph/weights{rank}"
