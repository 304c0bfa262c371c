"""One call in a thread beside the caller's own work."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Aside:
    """Runs `work` at once; `wait` is where it ends."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep-aside", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end; raises what went wrong."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for the end, whatever it was. Idempotent."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as e:  # told by `wait`
            self._failure = e
