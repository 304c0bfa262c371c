"""The choice of decode attention, measured before there is an arena, whose layout follows from it.

What is timed is attention with W_UV after it, as a step launches them: `graphs.attention_timing`.
Kept in the store by model, number and length of rows, so that another ladder cannot come to other
bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence

import torch

from capture_cache.errors import CorruptBundle
from capture_cache.machine import here
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.attention_choice import AttentionCut, choose_attention, cuts_for, points_for
from graphs.attention_timing import TIMED, LayerTimes
from graphs.capture import GraphBackend
from graphs.compile import RecordingLauncher, compile_all
from graphs.flashinfer_mla import FlashinferMla
from graphs.hopper_mla import HopperMla
from graphs.ops import Ops
from graphs.timing import HostTimer, Timer
from runtime.config import RuntimeConfig
from runtime.selection import Selection

Progress = Callable[[str, int, object], None]


class AttentionTuner:
    """Chooses kernel and cut of decode attention, before there is an arena."""

    def __init__(
        self,
        selection: Selection,
        options: RuntimeConfig,
        store: Store,
        launcher: AotLauncher,
        backend: GraphBackend,
        timer: Timer,
        progress: Progress,
    ) -> None:
        self._model, self._step = selection.model, selection.step
        self._options, self._store = options, store
        self._launcher, self._backend, self._progress = launcher, backend, progress
        device = torch.device("cuda", torch.cuda.current_device())
        self._times = LayerTimes(
            *(Ops(launcher), self._model, self._step, timer),
            device=device,
            cache_bytes=int(torch.cuda.get_device_properties(device).L2_cache_size),
        )

    def stored(self) -> AttentionCut | None:
        """What was measured here before, if anything."""
        try:
            known = self._store.load_record(self._digest(self._found()))
            return None if known is None else AttentionCut.parse(str(known["choice"]))
        except (CorruptBundle, ValueError, KeyError):
            return None  # measured again, and replaced, when asked to

    def choose(self) -> AttentionCut:
        """From the store, or measured."""
        known = self.stored()
        if known is not None:
            return known
        found = self._found()
        digest = self._digest(found)
        points = points_for(self._step.max_rows, self._step.max_seq_len)
        self._compile(points)
        choice, times = choose_attention(found, points, self._measure)
        record = {
            "choice": str(choice),
            "timed": list(TIMED),
            "points": [list(p) for p in points],
            "us": times,
        }
        self._store.publish_record(digest, record)
        return choice

    def _found(self) -> list[AttentionCut]:
        """The default first; of a backend that is no default only its default cut."""
        step = self._step
        cuts = cuts_for(step.max_pages * step.page_size, step.page_size)
        others = [AttentionCut(step.attention, cut) for cut in cuts if cut != step.cut]
        if self._options.attention == "auto":
            others += [AttentionCut(b, step.cut) for b in self._backends() if b != step.attention]
        return [AttentionCut(step.attention, step.cut), *others]

    def _backends(self) -> list[str]:
        """Those that this process can run."""
        usable = {
            "hopper": HopperMla.available(self._model, self._step.page_size)[0],
            "flashinfer": FlashinferMla.available(self._model)[0],
            "triton": True,
        }
        return [name for name, can in usable.items() if can]

    def _digest(self, found: Sequence[AttentionCut]) -> str:
        facts = here(on_device=True, ordinal=self._options.local_rank) | {
            "model": self._model.digest(),
            "max rows": self._step.max_rows,
            "max seq len": self._step.max_seq_len,
            "page size": self._step.page_size,
            "pdl": self._step.pdl,
            "found": ", ".join(str(c) for c in found),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _compile(self, points: Sequence[tuple[int, int]]) -> None:
        recorder = RecordingLauncher(
            self._launcher.arch, num_sms=self._launcher.num_sms, pdl=self._launcher.pdl
        )
        listed = LayerTimes(
            *(Ops(recorder), self._model, self._step, HostTimer()),
            device=torch.device("meta"),
            cache_bytes=0,
        )
        for rows, context in points:
            for choice in self._found():
                listed(choice, rows, context)
        compile_all(
            recorder.requests,
            self._launcher.compiler,
            progress=lambda name: self._progress("compile", len(recorder.requests), name),
        )

    def _measure(self, choice: AttentionCut, rows: int, context: int) -> float:
        with self._backend.on_stream():
            us = self._times(choice, rows, context)
        torch.cuda.empty_cache()
        return us
