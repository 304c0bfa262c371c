"""What a runtime begins with: every row free, step 0, nothing published.

The buffers that hold state between steps, and the byte that each is filled with; both the compiler
and the player go by this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

RESET: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("phase", "seq_len", "last_token", "limit", "page_table"), 0),
        **dict.fromkeys(("row_params", "deadline_ns", "counts"), 0),
        **dict.fromkeys(("step", "fault", "poison", "pending", "ring_step"), 0),
        # -1: no token, no step
        **dict.fromkeys(("stop_ids", "stop_sequences", "tail", "mask_step", "mailbox"), 0xFF),
    }
)
