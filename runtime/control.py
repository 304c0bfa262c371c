"""What a whole run does at once: pause, resume, drain, new weights.

Ranks take every step together, so none of these may be decided by one of them alone: with several
ranks each of these calls is one that all ranks make alike, at the same step, and it happens on all
of them or, with the same error everywhere, on none. The hosts meet in these calls only, never in a
step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from barriers.errors import RankError, name_ranks
from runtime.requests import Request
from runtime.sampling import StepOutput
from runtime.stepping import MAX_IN_FLIGHT
from runtime.submission import Submission
from runtime.turns import stepping_call

RUNNING_ROWS = ("refuse", "keep", "recompute")
DRAIN_ROUND = 16  # steps between two meetings of a drain: what a rank that is done idles at most
PATIENCE_S = 600.0  # for ranks that read weights, or come back from a pause
_MAX_TOLD = 600  # characters of an error that are passed on


class Control(Submission):
    """The part of `runtime.driver.Runtime` that all ranks do together."""

    @stepping_call
    def pause(self) -> None:
        """No further step is launched until `resume`; those in flight are still to be collected.

        Requests may come and go meanwhile. Idempotent. Several ranks: all call it, at the same
        step.

        Raises:
            RankError: a rank did not come within the deadline, or is at another step.
        """
        self._check_open()
        if not self._paused:
            self._together("pause()", timeout_s=self.engine.deadline_s)
            self._paused = True

    @stepping_call
    def resume(self) -> None:
        """Launch again. Idempotent. Several ranks: all call it; it waits for the last of them.

        Raises:
            RankError: a rank did not come within ten minutes.
        """
        self._check_open()
        if self._paused:
            self._together("resume()", timeout_s=PATIENCE_S)
            self._paused = False

    @stepping_call
    def drain(self, *, waiting: bool = False) -> list[StepOutput]:
        """Step until every request that has begun has ended; the queue is held meanwhile.

        Several ranks: all call it, at the same step, and take the same number of steps: one that
        is done steps on with nothing in them until all are. They agree on how many every few steps.

        Args:
            waiting: requests in the queue are to end too, so that `num_running` is 0 at the end.
        Returns:
            What those steps gave, the ones in flight before among them.
        Raises:
            RuntimeError: paused.
            OutOfPages: as `launch`. Make room and call it again, on this rank alone and before the
                deadline, for the other ranks are waiting in their next step: it goes on
                where it was, and returns what it had, too (of requests cancelled since, as well).
            RankError: a rank did not come within the deadline, or is at another step.
        """
        if not isinstance(waiting, bool):
            raise TypeError(f"waiting must be True or False, got {waiting!r}")
        self._check_launch()
        scheduler = self._scheduler
        try:
            scheduler.draining = not waiting
            scheduler.look_at_queue()
            while self._next_step < self._drain_until or self._agree_on_steps(waiting):
                if len(self._in_flight) == MAX_IN_FLIGHT:
                    self._collect_one()
                self._launch()
            self._collect_rest()
        finally:
            scheduler.draining = False
            scheduler.look_at_queue()
        outputs, self._drained = self._drained, []
        return outputs

    def _agree_on_steps(self, waiting: bool) -> int:
        """How many more steps all ranks take before they meet again; 0: all are done."""
        alone = self.config.ep_size == 1
        if not alone:  # who meets others must know what its last steps ended
            self._collect_rest()
        elif len(self._in_flight) == MAX_IN_FLIGHT:
            self._collect_one()
        with self.lock:
            need = self._scheduler.steps_to_drain(waiting=waiting)
        told = min(need, 1 if alone else DRAIN_ROUND)
        steps = max(self._together("drain()", told, timeout_s=self.engine.deadline_s))
        self._drain_until = self._next_step + int(steps)
        return int(steps)

    def _collect_rest(self) -> None:
        while self._in_flight:
            self._collect_one()

    def _collect_one(self) -> None:
        self._drained.append(self._collect())
        self._amid = ""

    @stepping_call
    def update_weights(
        self, source: str | Path | Iterable[tuple[str, Any]], *, running: str = "refuse"
    ) -> None:
        """Replace weights in place: every address stays, so every captured graph stays valid.

        All of it is checked before the first byte is written. The prefix cache is emptied. Several
        ranks: all call it; each keeps its part of what it is given (of the experts it need be given
        no others), and if one rank refuses, none writes.

        Args:
            source: a checkpoint directory, or (Hugging Face name, array or tensor) pairs; pairs
                may be some of the model's tensors, the rest stays as it is.
            running: what becomes of requests in rows: "refuse" them, "keep" them with the KV that
                they have, or "recompute" their KV with the new weights, tokens so far included.
        Raises:
            ValueError, TypeError: not this model's tensors, or not finite; nothing was changed.
            RuntimeError: steps are in flight, or requests are running and `running` is "refuse".
            OutOfPages: recomputing needs more pages than there are; nothing was changed.
            RankError: with several ranks, in the place of all these and on every rank: which rank
                refused, and why; or ranks were given different tensors.

        A failure while writing (a file that is cut short meanwhile, say) ends the runtime.
        """
        self._check_open()
        update, refusal = None, None
        held: dict[Request, int] = {}
        try:
            self._check_update(running)
            update = self.engine.prepare_weights(source)
            if running == "recompute":
                with self.lock:
                    held = self._scheduler.reserve_restart()
        except Exception as error:
            refusal = error
        try:
            told = update.shared_digest if update is not None else ""
            if len(set(self._together("update_weights()", told, refusal, PATIENCE_S))) > 1:
                raise RankError(
                    "update_weights(): ranks were given different tensors, experts aside, which "
                    "would part their copies; nothing was changed: give all ranks the same"
                )
        except BaseException:
            if update is not None:
                update.discard()
            with self.lock:
                self._scheduler.keep_only(held)
            raise
        assert update is not None
        self._amid = "update_weights()"
        try:
            self._write(update)
        except Exception as error:  # some weights are new and some are not
            self._end_with(error)
            raise
        with self.lock:
            self._forget_old_kv(running)
        self._amid = ""

    def _check_update(self, running: str) -> None:
        """Raises ValueError, RuntimeError: it cannot be done now."""
        if running not in RUNNING_ROWS:
            raise ValueError(f"running must be one of {', '.join(RUNNING_ROWS)}, got {running!r}")
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} steps are in flight; collect() them before "
                "update_weights()"
            )
        if self._scheduler.has_begun and running == "refuse":
            raise RuntimeError(
                f"{self._scheduler.num_begun} requests are running on the old weights; drain() "
                "first, or say running='keep' or running='recompute'"
            )

    def _write(self, update: Any) -> None:
        """Write a checked update; raises on every rank if one cannot."""
        failure = None
        try:
            update.apply()
        except Exception as error:
            failure = error
        self._together("writing new weights", None, failure, PATIENCE_S)

    def _forget_old_kv(self, running: str) -> None:
        self.pages.forget_all()
        for request in list(self._scheduler.running()):
            if running == "keep":
                request.cacheable = False  # its KV is of the old weights
            else:  # with "refuse", of another thread meanwhile: its prefix may have been cached
                self._scheduler.restart(request)

    def _together(
        self,
        what: str,
        told: Any = None,
        refusal: Exception | None = None,
        timeout_s: float = PATIENCE_S,
    ) -> list[Any]:
        """What every rank told, by rank; all ranks call this alike.

        Args:
            refusal: why this rank cannot; then none does.
        Raises:
            RankError: a rank refused, or is at another step: the same on every rank, which may go
                on. Or a rank did not come, which ends this runtime.
            Exception: `refusal` itself, of a rank alone.
        """
        if self.config.ep_size == 1:
            if refusal is not None:
                raise refusal
            return [told]
        reason = None if refusal is None else f"{type(refusal).__name__}: {refusal}"[:_MAX_TOLD]
        try:
            parts = self.engine.gather(what, [self._next_step, reason, told], timeout_s)
        except Exception as error:  # who comes late would find what was left of this meeting
            self._end_with(error)
            raise
        except BaseException as interrupt:
            self._interrupted(what, interrupt)
            raise
        refused = {rank: part[1] for rank, part in enumerate(parts) if part[1] is not None}
        if refused:
            reasons = "; ".join(f"rank {rank}: {reason}" for rank, reason in refused.items())
            raise RankError(
                f"{what} was refused by {name_ranks(tuple(refused))}, so no rank does it: "
                f"{reasons}",
                tuple(refused),
            ) from refusal
        steps = [part[0] for part in parts]
        if len(set(steps)) > 1:
            at = ", ".join(f"rank {rank} at step {step}" for rank, step in enumerate(steps))
            raise RankError(
                f"{what} is for all ranks at the same step, got {at}; call step() (or launch()) "
                "equally often on every rank before it"
            )
        return [part[2] for part in parts]
