"""`Runtime`, what users call: load, requests, steps, pause and drain, new weights, numbers.

Its parts, each knowing only the one before: `runtime.stepping` (launch and collect),
`runtime.submission` (requests come and go), and here what concerns the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.sampling import StepOutput
from runtime.stats import RuntimeStats
from runtime.stepping import MAX_IN_FLIGHT, StepFailed
from runtime.submission import Submission

if TYPE_CHECKING:
    from graphs.keys import Ladder
    from runtime.opening import Opening

__all__ = ["MAX_IN_FLIGHT", "Runtime", "StepFailed"]

RUNNING_ROWS = ("refuse", "keep", "recompute")


class Runtime(Submission):
    """Continuous batching over captured decode graphs.

    Use `Runtime.load`; the constructor takes an engine that is ready to replay.

    Args:
        engine: captured graphs with their mailbox, ring and ladder.
        scheduling: how requests share rows, pages and steps. With `reservation` "lazy" a step may
            run short of pages: requests of `submit` are then preempted, and where only those of
            `add` are left, `launch` raises `OutOfPages`.
    """

    @classmethod
    def load(
        cls,
        model: str,
        bs: int = 256,
        max_seq_len: int = 4096,
        num_pages: int | None = None,
        device: str = "auto",
        store: str | None = None,
        opening: Opening | None = None,
        **config: Any,
    ) -> Runtime:
        """Load a model, capture its graphs (or take what the store holds), and be ready to step.

        Args:
            model: Hugging Face directory (config.json + safetensors) or a preset name.
            bs: global decode batch; rows of a rank are `bs / ep_size`.
            max_seq_len: tokens of prompt and output together.
            num_pages: KV pages of 64 tokens; default: what the rows can use, or what memory allows.
            device: "auto", "cuda" or "cpu" (the CPU twin: for correctness only).
            store: directory of compiled kernels and manifests.
            opening: the device as it is being opened: begin with `runtime.opening.Opening()` before
                other imports to have the first step sooner.
            **config: see `runtime.config.RuntimeConfig`.
        Raises:
            ValueError: an option, the model's config or its weights are not usable; says which.

        A valid bundle is restored, without torch; else the graphs are captured, and stored.
        `loaded_from` says which it was, and `load_reason` why.
        """
        from runtime.config import RuntimeConfig
        from runtime.load import load_engine

        named: dict[str, Any] = {"bs": bs, "max_seq_len": max_seq_len, "num_pages": num_pages}
        named |= {"device": device, "store": store}
        options = RuntimeConfig.of(model=model, defaults=named, **config)
        return cls(load_engine(options, opening=opening), options.scheduling)

    @property
    def loaded_from(self) -> str:
        """ "bundle" or "capture"."""
        return str(self.engine.loaded_from)

    @property
    def load_reason(self) -> str:
        """Why it was loaded from there, as a sentence."""
        return str(self.engine.load_reason)

    @property
    def ladder(self) -> Ladder:
        """The keys that steps choose from."""
        return self._scheduler.ladder

    @ladder.setter
    def ladder(self, ladder: Ladder) -> None:
        self._scheduler.ladder = ladder

    # ------------------------------------------------------------------ pause, drain, weights

    def pause(self) -> None:
        """No further step is launched until `resume`; those in flight are still to be collected.

        Requests may come and go meanwhile. Idempotent.
        """
        self._check_open()
        self._paused = True

    def resume(self) -> None:
        """Launch again. Idempotent."""
        self._check_open()
        self._paused = False

    def drain(self) -> list[StepOutput]:
        """Step until every request that has begun has ended; the queue waits meanwhile.

        Returns:
            What those steps gave, the ones in flight before among them.
        Raises:
            RuntimeError: paused, or several ranks, which must step together.
            OutOfPages: as `launch`.
        """
        self._check_launch()
        if self.engine.config.ep_size > 1:
            raise RuntimeError(
                "drain() steps this rank alone and the others would be waited for; call step() on "
                "every rank until all of them have num_running 0"
            )
        scheduler = self._scheduler
        outputs: list[StepOutput] = []
        scheduler.look_at_queue()
        scheduler.draining = True
        try:
            while self._in_flight or scheduler.has_begun:
                if len(self._in_flight) < MAX_IN_FLIGHT and scheduler.has_begun:
                    self.launch()
                if len(self._in_flight) == MAX_IN_FLIGHT or not scheduler.has_begun:
                    outputs.append(self.collect())
        finally:
            scheduler.draining = False
            scheduler.look_at_queue()
        return outputs

    def update_weights(
        self, source: str | Path | Iterable[tuple[str, Any]], *, running: str = "refuse"
    ) -> None:
        """Replace weights in place: every address stays, so every captured graph stays valid.

        All of it is checked before the first byte is written. The prefix cache is emptied.

        Args:
            source: a checkpoint directory, or (Hugging Face name, array or tensor) pairs; pairs
                may be some of the model's tensors, the rest stays as it is.
            running: what becomes of requests in rows: "refuse" them, "keep" them with the KV that
                they have, or "recompute" their KV with the new weights, tokens so far included.
        Raises:
            ValueError: not this model's tensors, or not finite; nothing was changed.
            RuntimeError: steps are in flight, or requests are running and `running` is "refuse".
            OutOfPages: recomputing needs more pages than there are; nothing was changed.
        """
        self._check_open()
        if running not in RUNNING_ROWS:
            raise ValueError(f"running must be one of {', '.join(RUNNING_ROWS)}, got {running!r}")
        if self._in_flight:
            raise RuntimeError(
                f"{len(self._in_flight)} steps are in flight; collect() them before "
                "update_weights()"
            )
        requests = list(self._scheduler.running())
        if self._scheduler.has_begun and running == "refuse":
            raise RuntimeError(
                f"{self._scheduler.num_begun} requests are running on the old weights; drain() "
                "first, or say running='keep' or running='recompute'"
            )
        if running == "recompute":
            self._scheduler.reserve_restart()
        self.engine.update_weights(source)
        self.pages.forget_all()
        for request in requests:
            if running == "recompute":
                self._scheduler.restart(request)
            else:
                request.cacheable = False  # its KV is of the old weights

    # ------------------------------------------------------------------ numbers, end

    def stats(self) -> RuntimeStats:
        """What has been done so far and what is held now; free of device work."""
        counters, pool = self._counters, self.pages
        waiting, running = self.num_waiting, self.num_running - self.num_waiting
        return RuntimeStats(
            submitted=counters.submitted,
            waiting=waiting,
            running=running,
            finished=dict(counters.finished),
            in_flight=len(self._in_flight),
            pages_total=pool.capacity,
            pages_used=pool.capacity - pool.num_free,
            pages_cached=pool.num_cached,
            pages_free=pool.num_free - pool.num_cached,
            prefix_hits=counters.prefix_hits,
            prefix_misses=counters.prefix_misses,
            prefix_evictions=pool.cache.evictions,
            preemptions=counters.preemptions,
            tokens_prefilled=counters.tokens_prefilled,
            tokens_decoded=counters.tokens_decoded,
            longest_wait_steps=counters.longest_wait_steps,
            steps=self._next_step,
            steps_by_key={str(key): n for key, n in sorted(counters.steps_by_key.items())},
            host_us_per_step=counters.host_ns / 1e3 / max(1, self._next_step),
        )

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
