"""`Runtime`, what users call: load, requests, steps, pause and drain, new weights, numbers.

Its parts, each knowing only the one before: `runtime.stepping` (launch and collect),
`runtime.submission` (requests come and go), `runtime.control` (pause, drain, new weights), and here
what is left: how it is loaded, and its numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.control import Control
from runtime.stats import RuntimeStats
from runtime.stepping import MAX_IN_FLIGHT
from runtime.turns import StepFailed

if TYPE_CHECKING:
    from graphs.keys import Ladder
    from runtime.opening import Opening

__all__ = ["MAX_IN_FLIGHT", "Runtime", "StepFailed"]


class Runtime(Control):
    """Continuous batching over captured decode graphs.

    Use `Runtime.load`; the constructor takes an engine that is ready to replay.

    Threads: requests may come and go from any thread at any time, also while another one steps
    (`add`, `submit`, `cancel`, `cancel_request`, masks, seeds, `stats` and the counts); such a call
    waits for the host's part of a launch or a collect, never for the device (the CPU twin computes
    in its launch). Calls that step (`step`, `launch`, `collect`, `wait`, `drain`, `pause`,
    `resume`, `update_weights`, `occupy`, `close`) are one thread's at a time, today this one's,
    tomorrow another's: a second one meanwhile raises RuntimeError and changes nothing. A row
    may change hands between two calls of a thread that does not step: `submit` and ids are for
    those. Nothing here is to be called from a signal handler.

    An interrupt (Ctrl-C) while a step is waited for leaves the runtime able to go on, with the same
    tokens; one that cuts a launch or a collect short ends it (`StepFailed`).

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
        max_seq_len: int | None = None,
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
            max_seq_len: tokens of prompt and output together; default: 4096, or as many positions
                as the model has.
            num_pages: KV pages of 64 tokens; default: what the rows can use, or what memory allows.
            device: "auto", "cuda" or "cpu" (the CPU twin: for correctness only).
            store: directory of compiled kernels and manifests.
            opening: the device as it is being opened: begin with `runtime.opening.Opening()` before
                other imports to have the first step sooner.
            **config: see `runtime.config.RuntimeConfig`.
        Raises:
            ValueError: an option, the model's config or its weights are not usable; says which.
            CaptureError, ArenaError, CompileError, CudaError: the device could not be made ready.
            StoreError: the store cannot be written, and a capture is to be stored.
            RankError: ranks do not fit together, or one did not come.

        A valid bundle is restored, without torch; else the graphs are captured, and stored.
        `loaded_from` says which it was, and `load_reason` why.
        """
        from runtime.config import RuntimeConfig, told_to_ranks
        from runtime.load import load_engine

        named: dict[str, Any] = {"bs": bs, "max_seq_len": max_seq_len, "num_pages": num_pages}
        named |= {"device": device, "store": store}
        with told_to_ranks():
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
        if not isinstance(ladder, type(self._scheduler.ladder)):
            raise TypeError(
                f"a ladder is a graphs.keys.Ladder, got {ladder!r}; Ladder.parse(text, rows) makes "
                "one"
            )
        self._scheduler.ladder = ladder

    def stats(self) -> RuntimeStats:
        """What has been done so far and what is held now; free of device work."""
        with self.lock:
            return self._stats()

    def _stats(self) -> RuntimeStats:
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
