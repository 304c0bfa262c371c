"""What the driver asks of whoever replays graphs: an engine that captured them, or the player."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig
from kernels.triton.state import MailboxLayout
from runtime.row_params import Admission


class NewWeights(Protocol):
    """Weights that have been checked and not written yet.

    Attributes:
        shared_digest: of what every rank must be given alike.
    """

    shared_digest: str

    def apply(self) -> None:
        """Write all of it where the old weights are; waits."""

    def discard(self) -> None:
        """Write nothing, and let go of the source."""


class Replayer(Protocol):
    """Graphs over a filled arena, and the host's views of it.

    Attributes:
        mailbox: int32 [2, words]; ring: int32 [slots, words]; ring_step: int64 [slots].
        forced_tokens, masks, ring_top, ring_logits: beside them, see `kernels.triton.state`.
        ring_header: words of a ring slot before its arrays.
        deadline_s: longest wait for a step.
        stages: seconds of each stage that made it.
        loaded_from: "bundle" or "capture"; load_reason: why, as a sentence.
    """

    ladder: Ladder
    config: StepConfig
    model_config: ModelConfig
    mailbox_layout: MailboxLayout
    mailbox: NDArray[np.int32]
    ring: NDArray[np.int32]
    ring_step: NDArray[np.int64]
    forced_tokens: NDArray[np.int32]
    masks: NDArray[np.int32]
    ring_top: NDArray[np.int32]
    ring_logits: NDArray[np.float32]
    ring_header: int
    deadline_s: float
    stages: dict[str, float]
    loaded_from: str
    load_reason: str
    replay: Callable[[GraphKey], None]

    def check_ranks(self) -> None: ...
    def check_alive(self) -> None: ...
    def reset_state(self) -> None: ...
    def adopt(self, length: int, rows: Mapping[int, tuple[Admission, list[int]]]) -> None: ...
    def gather(self, what: str, value: Any, timeout_s: float) -> list[Any]: ...
    def prepare_weights(self, source: str | Path | Iterable[tuple[str, Any]]) -> NewWeights: ...
    def close(self) -> None: ...
