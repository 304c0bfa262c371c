"""A part of the step that runs beside the rest: forked off one stream, joined to it again.

Invariants: what runs beside writes buffers that nothing on the main stream touches before the join,
and the first kernel after a fork or a join is launched in the ordinary way
(`kernels.triton.launch.Ordinary`, `RdepTuning.sum_pdl`): a dependent launch waits for what its own
stream launched before it, and nobody promises that it waits for another stream's event, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch


class Branch(Protocol):
    """One at a time: every `beside` is followed by its `join`."""

    def beside(self) -> AbstractContextManager[None]:
        """What is launched within it waits for all that was launched before, and for no more."""

    def join(self) -> None:
        """What is launched from here on waits for the branch as well."""


class InLine:
    """The CPU twin's: operations run at once, in the order they are written."""

    def beside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def join(self) -> None:
        """It has run already."""


class SideStream:
    """A second stream of a device; under capture, a second branch of the graph.

    Its events are made once: a capture may record them again and again, and each wait is for the
    latest.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._forked: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def beside(self) -> Iterator[None]:
        self._forked.record(torch.cuda.current_stream())
        self.stream.wait_event(self._forked)
        with torch.cuda.stream(self.stream):
            yield
            self._done.record(self.stream)

    def join(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)
