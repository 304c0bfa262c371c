"""Whose turn it is to step a runtime, and what an interrupt cut short.

Two guards, for two kinds of calls:

* A call that steps (`stepping_call`) is one thread's at a time. A second thread is refused and not
  made to wait: who collects which step would be a race.
* What changes requests, rows or pages holds `Turns.lock`, so requests come and go from any thread,
  between the host's part of one step and that of the next.

An interrupt (KeyboardInterrupt, SystemExit: what is no `Exception`) may come between any two calls.
Where it leaves something half done, the runtime has failed and says so; elsewhere it may go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import update_wrapper
from threading import get_ident
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class StepFailed(RuntimeError):
    """The device could not do a step as asked, or a step was interrupted; close the runtime."""


class Turns:
    """The part of `runtime.driver.Runtime` that knows who may change it now.

    Attributes:
        lock: held while requests, rows and pages change.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._stepper = 0  # the thread in a call that steps; 0: none
        self._amid = ""  # what that call is in the middle of; still there: it was cut short
        self._failure = ""

    def _interrupted(self, call: str, error: BaseException) -> None:
        """Remember that nobody knows what of `call` was done."""
        self._failure = (
            f"it was interrupted in a step, in the middle of {call} ({type(error).__name__})"
        )

    def _check_whole(self, call: str) -> None:
        """Raises StepFailed inside a step that is half done in this very thread."""
        if self._amid and self._stepper in (0, get_ident()):
            raise self._inside(call)

    def _taken(self, call: str, stepper: int) -> RuntimeError:
        """Why a call that steps cannot begin.

        Args:
            stepper: whom the caller found stepping, who may have ended since.
        """
        if stepper in (0, get_ident()):
            return self._inside(call)
        return RuntimeError(
            f"{call} was called while another thread is in a call that steps this runtime; nothing "
            "was done: let one thread step (others may submit and cancel), or take turns with a "
            "lock"
        )

    def _inside(self, call: str) -> StepFailed:
        what = self._amid or "a call that steps"
        return StepFailed(
            f"{call}: this runtime is in the middle of {what}, which was interrupted, or which "
            "called this (from a signal handler, say: set a flag there, and read it between "
            "steps); close it if that call has ended"
        )


R = TypeVar("R", bound=Turns)


def stepping_call(
    call: Callable[Concatenate[R, P], T],
) -> Callable[Concatenate[R, P], T]:
    """A method that one thread at a time may be in, of all methods made so.

    It sets `_amid` while what it does must not be cut short.

    Raises:
        RuntimeError: another thread is in one; nothing was changed.
        StepFailed: an earlier one was cut short.
    """
    name = f"{call.__name__.removeprefix('_')}()"

    def guarded(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        me = get_ident()
        # Threads change, and signals come, where a function begins or a loop begins again: not
        # between this test and the store, nor between the store and what follows it.
        stepper = self._stepper
        if stepper or self._amid:
            raise self._taken(name, stepper)
        self._stepper = me
        try:
            out = call(self, *args, **kwargs)
            self._amid = ""  # `collect` leaves it set: before Python 3.12 signals come here, too
            return out
        except Exception:
            self._amid = ""  # it names what failed, and has left things whole or ended the runtime
            raise
        except BaseException as interrupt:
            if self._amid:
                self._interrupted(self._amid, interrupt)
                self._amid = ""
            raise
        finally:
            self._stepper = 0

    update_wrapper(guarded, call).__name__ = name[:-2]
    return guarded


class Changing:
    """Around a change of requests outside a step: an interrupt in it ends the runtime."""

    __slots__ = ("_call", "_turns")

    def __init__(self, turns: Turns, call: str) -> None:
        self._turns, self._call = turns, call

    def __enter__(self) -> None:
        self._turns._check_whole(self._call)

    def __exit__(self, kind: type[BaseException] | None, error: Any, _: object) -> None:
        if error is not None and not isinstance(error, Exception):
            self._turns._interrupted(self._call, error)
