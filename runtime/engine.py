"""From options to something that replays: model, arena, weights, graphs, proof, ledger.

The stages run in one order and each is timed; an engine is never half built (what was mapped is
released if a later stage fails).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from capture_cache.arena import Arena, DeviceArena, HostArena
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout
from capture_cache.manifest import Manifest
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.attention import Attention, FlashinferAttention, TritonAttention
from graphs.buffers import StaticBuffers, StepConfig, arena_layout, default_cut, kv_bytes_per_token
from graphs.capture import CudaBackend, GraphBackend, GraphSet, TwinBackend
from graphs.checkpoint import ModelSource, load_checkpoint, random_weights, resolve_model
from graphs.compile import KernelCompiler
from graphs.devices import bind_views
from graphs.fingerprint import fingerprint
from graphs.flashinfer_mla import FlashinferMla
from graphs.keys import GraphKey, Ladder
from graphs.ledger import Ledger, make_ledger
from graphs.model_config import ModelConfig, parse_overrides
from graphs.ops import Ops
from graphs.prove import Proof, Prover
from graphs.rope import rope_table
from graphs.step import DecodeStep
from graphs.weights import weight_table
from kernels.triton.state import DECODE, HEADER, MailboxLayout
from runtime.config import RuntimeConfig

# (kind of work, pieces in all, piece)
Progress = Callable[[str, int, object], None]
# Left for the driver, the graphs themselves and libraries when the KV cache takes what is free.
RESERVED_BYTES = 3 << 30


def _no_progress(*_: object) -> None:
    """Nobody watches."""


@dataclass
class Stages:
    """Seconds spent in each stage of a build, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Selection:
    """What is going to be built, before any memory is touched."""

    source: ModelSource
    model: ModelConfig
    step: StepConfig
    ladder: Ladder
    on_device: bool
    attention_reason: str

    @property
    def layout(self) -> ArenaLayout:
        return arena_layout(self.model, self.step, self.ladder)


def choose(options: RuntimeConfig, *, compile_only: bool = False) -> Selection:
    """Settle model, sizes, ladder and attention.

    Raises:
        ValueError: options that contradict each other or the model.
    """
    model, source = resolve_model(
        options.model, layers=options.layers, overrides=parse_overrides(options.overrides)
    )
    if options.max_seq_len > model.max_position:
        raise ValueError(
            f"max_seq_len {options.max_seq_len} exceeds the model's {model.max_position} "
            f"positions; "
            "lower --max-seq-len"
        )
    rows = options.rows_per_rank
    ladder = Ladder.parse(options.ladder, rows) if options.ladder else Ladder.default(rows)
    on_device = compile_only or _on_device(options.device)
    attention, reason = _attention(options, model, on_device and not compile_only)
    step = StepConfig(
        max_rows=rows,
        max_seq_len=options.max_seq_len,
        num_pages=2,
        page_size=options.page_size,
        cut=default_cut(options.max_seq_len),
        ep_size=options.ep_size,
        attention=attention,
    )
    pages = options.num_pages or _default_pages(model, step, ladder, on_device and not compile_only)
    step = dataclasses.replace(step, num_pages=pages)
    return Selection(source, model, step, ladder, on_device, reason)


def _on_device(device: str) -> bool:
    if device == "cpu":
        return False
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ValueError(
            "--device cuda: torch sees no CUDA device; use --device cpu for the CPU twin"
        )
    return available


def _attention(options: RuntimeConfig, model: ModelConfig, on_device: bool) -> tuple[str, str]:
    if options.attention == "triton" or not on_device:
        if options.attention == "flashinfer":
            raise ValueError("--attention flashinfer needs a CUDA device; leave it at auto")
        return "triton", "asked for" if options.attention == "triton" else "not on a device"
    usable, reason = FlashinferMla.available(model)
    if options.attention == "flashinfer" and not usable:
        raise ValueError(f"--attention flashinfer cannot be used here: {reason}")
    return ("flashinfer" if usable else "triton"), reason


def _default_pages(model: ModelConfig, step: StepConfig, ladder: Ladder, on_device: bool) -> int:
    """Every row at full length, or what device memory allows."""
    wanted = step.max_rows * step.max_pages + 1
    if not on_device:
        return wanted
    free, _ = torch.cuda.mem_get_info()
    page_bytes = kv_bytes_per_token(model) * step.page_size
    room = free - arena_layout(model, step, ladder).device_bytes - RESERVED_BYTES
    pages = min(wanted, room // page_bytes)
    if pages < step.max_pages + 1:
        raise ValueError(
            f"device memory: {free / 2**30:.1f} GiB free leaves room for {max(0, pages)} KV pages "
            f"after "
            f"weights and scratch, and one row of max_seq_len needs {step.max_pages + 1}; lower "
            "--max-seq-len, --bs or --layers"
        )
    return int(pages)


class Engine:
    """Captured graphs over a filled arena, and the host's views of mailbox and ring.

    Attributes:
        mailbox: int32 [2, words]; ring: int32 [slots, words]; ring_step: int64 [slots].
        stages: seconds of each stage of the build.
        proofs: one per key, empty if not verified.
    """

    ring_header = HEADER

    def __init__(
        self,
        selection: Selection,
        options: RuntimeConfig,
        arena: Arena,
        graphs: GraphSet,
        launcher: AotLauncher | None,
        stages: Stages,
    ) -> None:
        self.selection, self.options = selection, options
        self.model_config, self.config = selection.model, selection.step
        self.ladder = selection.ladder
        self.deadline_s = options.deadline_s
        self.graphs, self.launcher, self.stages = graphs, launcher, stages
        self._arena = arena
        buffers = graphs.step.buffers
        self.mailbox_layout: MailboxLayout = buffers.mailbox_layout
        self.mailbox: NDArray[np.int32] = buffers["mailbox"].numpy()
        self.ring: NDArray[np.int32] = buffers["ring"].numpy()
        self.ring_step: NDArray[np.int64] = buffers["ring_step"].numpy()
        self.proofs: dict[GraphKey, Proof] = {}
        self.ledger: Ledger | None = None
        self.replay = graphs.replay
        self.check_alive = graphs.backend.check_alive

    @classmethod
    def build(cls, options: RuntimeConfig, progress: Progress = _no_progress) -> Engine:
        """Build, capture, prove and record.

        Raises:
            ValueError: options, config or weights; says which and what would do.
            CaptureError, ArenaError, CompileError, StoreError: named, with the remedy.
        """
        stages = Stages()
        with stages.timed("select"):
            selection = choose(options)
            if options.ep_size > 1:
                raise ValueError(
                    f"--ep-size {options.ep_size}: this version captures on one rank; "
                    "it can compile for more with --compile-only"
                )
        store = Store(options.store_path)
        with stages.timed("arena"):
            arena = _map(selection)
        launcher = _launcher(store) if selection.on_device else None
        try:
            return cls._build_in(arena, launcher, selection, options, store, stages, progress)
        except BaseException:
            arena.close()
            raise

    @classmethod
    def _build_in(
        cls,
        arena: Arena,
        launcher: AotLauncher | None,
        selection: Selection,
        options: RuntimeConfig,
        store: Store,
        stages: Stages,
        progress: Progress,
    ) -> Engine:
        device = torch.device("cuda" if selection.on_device else "cpu")
        views = bind_views(arena, selection.layout, device)
        backend: GraphBackend = CudaBackend(device) if selection.on_device else TwinBackend()
        with stages.timed("weights"), backend.on_stream():
            _load_weights(selection, options, views, launcher, progress)
            _reset_state(views)
            backend.synchronize()
        step = make_step(selection, Ops(launcher), views)
        graphs = GraphSet(
            step,
            selection.ladder,
            backend,
            forbid_compile=launcher.freeze if launcher else lambda: None,
        )
        engine = cls(selection, options, arena, graphs, launcher, stages)
        total = len(selection.ladder.keys)
        with stages.timed("warm up"):
            graphs.warm_up(lambda kind, key: progress(kind, total, key))
        with stages.timed("capture"):
            graphs.capture(lambda kind, key: progress(kind, total, key))
        with stages.timed("prove"):
            if options.verify:
                engine._prove(progress)
        with backend.on_stream():
            _reset_state(views)
            backend.synchronize()
        with stages.timed("store"):
            engine._record(store)
        return engine

    def _prove(self, progress: Progress) -> None:
        replays = self.options.proof_replays or (100 if self.selection.on_device else 2)
        prover = Prover(self.graphs, replays=replays, seed=self.options.seed)
        for key in reversed(self.ladder.keys):
            self.proofs[key] = prover.prove(key)
            progress("prove", len(self.ladder.keys), key)

    def _record(self, store: Store) -> None:
        """Write the manifest: fingerprint, arena table, ledger, kernels."""
        self.ledger = make_ledger(
            self.model_config,
            self.config,
            self.ladder,
            self.graphs.graphs,
            self.proofs,
            self.launcher.kernels if self.launcher else {},
        )
        facts = self.fingerprint()
        kernels = tuple(self.launcher.used) if self.launcher else ()
        record = self.ledger.to_json() | {"stages_s": self.stages.seconds}
        manifest = Manifest(facts, self.selection.layout, record, kernels)
        store.publish(facts, manifest, {}, replace_existing=True)

    @property
    def device_name(self) -> str:
        if not self.selection.on_device:
            return "CPU twin"
        return torch.cuda.get_device_name()

    def fingerprint(self) -> Fingerprint:
        return fingerprint(
            self.selection.source,
            self.model_config,
            self.config,
            self.ladder,
            self.selection.layout,
            on_device=self.selection.on_device,
        )

    def adopt(self, rows: list[int], length: int, limit: int, pages: list[list[int]]) -> None:
        """Put rows into the decode phase with `length` tokens in their pages; waits."""
        b, stream = self.graphs.step.buffers, self.graphs.backend.on_stream
        index = torch.tensor(rows)
        with stream():
            for name, value in (("phase", DECODE), ("seq_len", length), ("limit", limit)):
                b[name][index] = value
            b["stop_ids"][index] = -1
            for row, held in zip(rows, pages, strict=True):
                b["page_table"][row, : len(held)] = torch.tensor(held, dtype=torch.int32)
            self.graphs.backend.synchronize()

    def fill_kv(self, *, seed: int) -> None:
        """Random values in the whole KV cache, the null page left as it is; waits."""
        b = self.graphs.step.buffers
        with self.graphs.backend.on_stream():
            gen = torch.Generator(b["x"].device).manual_seed(seed)
            for layer in range(self.model_config.num_layers):
                b[f"kv.{layer}"][self.config.page_size :].normal_(generator=gen)
            self.graphs.backend.synchronize()

    def read_stamps(self, count: int) -> NDArray[np.int64]:
        """The first `count` timestamps of the last stamped step, ns; waits."""
        with self.graphs.backend.on_stream():
            stamps: NDArray[np.int64] = self.graphs.step.buffers["stamps"][:count].cpu().numpy()
        return stamps.copy()

    def close(self) -> None:
        """Release graphs, then memory. Idempotent."""
        self.graphs.close()
        self._arena.close()


def _map(selection: Selection) -> Arena:
    if not selection.on_device:
        return HostArena(selection.layout)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return DeviceArena(selection.layout, device=torch.cuda.current_device())


def _launcher(store: Store) -> AotLauncher:
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return AotLauncher(
        KernelCompiler(store, f"sm_{major}{minor}"), num_sms=properties.multi_processor_count
    )


def make_step(selection: Selection, ops: Ops, views: dict[str, torch.Tensor]) -> DecodeStep:
    """The step over bound views; on `meta` views it can be listed but not run."""
    model, step = selection.model, selection.step
    names = [*weight_table(model, ep_size=step.ep_size), "rope_table"]
    weights = {name: views[name] for name in names}
    buffers = StaticBuffers(
        model, step, selection.ladder, {n: t for n, t in views.items() if n not in weights}
    )
    kind = FlashinferAttention if step.attention == "flashinfer" else TritonAttention
    attention: Attention = kind(model, step, ops)
    return DecodeStep(model, step, ops, buffers, weights, attention, on_device=selection.on_device)


def _load_weights(
    selection: Selection,
    options: RuntimeConfig,
    views: dict[str, torch.Tensor],
    launcher: AotLauncher | None,
    progress: Progress,
) -> None:
    model, step = selection.model, selection.step
    views["rope_table"].copy_(rope_table(model, step.max_seq_len))
    if selection.source.is_preset:
        random_weights(
            model,
            views,
            seed=options.seed,
            launch=launcher,
            ep_rank=step.ep_rank,
            ep_size=step.ep_size,
        )
        return
    assert selection.source.path is not None
    load_checkpoint(
        selection.source.path,
        model,
        views,
        ep_rank=step.ep_rank,
        ep_size=step.ep_size,
        progress=lambda done, total: progress("load", total, ""),
    )


def _reset_state(views: dict[str, torch.Tensor]) -> None:
    """Every row free, step 0, nothing published. The null page keeps the proof's poison."""
    for name in (
        "phase",
        "seq_len",
        "last_token",
        "limit",
        "page_table",
        "step",
        "fault",
        "poison",
    ):
        views[name].zero_()
    views["stop_ids"].fill_(-1)
    views["mailbox"].fill_(-1)
    views["ring_step"].zero_()
