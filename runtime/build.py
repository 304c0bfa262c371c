"""From options to an engine: model, ranks, arena, kernels, weights, graphs, proof, record.

The stages run in one order and each is timed. An engine is never half built: if a stage fails, what
the earlier ones acquired is released, last first.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from capture_cache.arena import Arena, DeviceArena, HostArena
from capture_cache.errors import CorruptBundle, CudaError
from capture_cache.manifest import Manifest
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.attention_choice import AttentionCut
from graphs.buffers import transport_config
from graphs.capture import CudaBackend, GraphBackend, GraphSet, TwinBackend
from graphs.checkpoint import load_checkpoint, random_weights
from graphs.choices import ChosenOps, KernelChoices
from graphs.compile import KernelCompiler, compile_all
from graphs.devices import bind_views
from graphs.ledger import make_ledger
from graphs.ops import Ops
from graphs.prove import Prover
from graphs.rope import rope_table
from graphs.timing import GraphTimer
from graphs.weights import add_part_views
from kernels.triton.overlap import MODES
from runtime.assemble import list_kernels, make_step
from runtime.attention_tuning import AttentionTuner
from runtime.config import RuntimeConfig
from runtime.engine import Engine
from runtime.ranks import Ranks
from runtime.selection import Selection, choose, with_attention
from runtime.tuning import Tuner, check_kernels, pinned, record_calls, share

# (kind of work, pieces in all, piece)
Progress = Callable[[str, int, object], None]
COMPILE_TIMEOUT_S = 1800.0  # how long the other ranks wait for rank 0 to compile


def _no_progress(*_: object) -> None:
    """Nobody watches."""


def build(options: RuntimeConfig, progress: Progress = _no_progress) -> Engine:
    """Build, capture, prove and record.

    Raises:
        ValueError: options, config or weights; says which and what would do.
        CaptureError, ArenaError, CompileError, StoreError, RankError: named, with the remedy.
    """
    resources = ExitStack()
    try:
        return _Builder(options, progress, resources).run()
    except BaseException:
        # A lost context cannot be tidied up; the first error is the one to tell.
        with suppress(CudaError):
            resources.close()
        raise


class _Builder:
    """One build; each method is a stage."""

    def __init__(self, options: RuntimeConfig, progress: Progress, resources: ExitStack) -> None:
        self.options, self.progress, self.resources = options, progress, resources
        self.store = Store(options.store_path)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> Engine:
        with self._timed("select"):
            selection = choose(self.options)
            check_kernels(self.options, selection)
            ranks, selection = self._meet(selection)
        launcher = _launcher(self.store, selection) if selection.on_device else None
        with self._timed("tune attention"):
            selection = self._tune_attention(selection, launcher, ranks)
        with self._timed("arena"):
            arena = self._map(selection)
            device = torch.device("cuda" if selection.on_device else "cpu")
            views = bind_views(arena, selection.layout, device)
            add_part_views(views)
        with self._timed("compile"):
            self._compile(selection, launcher, ranks)
        backend: GraphBackend = CudaBackend(device) if selection.on_device else TwinBackend()
        with self._timed("weights"), backend.on_stream():
            self._load_weights(selection, views, launcher)
            _reset_state(views)
            backend.synchronize()
        with self._timed("transport"):
            graphs = self._make_graphs(selection, views, launcher, backend, ranks)
        self.resources.callback(graphs.close)
        engine = Engine(selection, self.options, ranks, graphs, launcher, self.resources)
        if isinstance(backend, CudaBackend) and launcher is not None:
            with self._timed("tune"):
                engine.choices = self._tune(engine, views, launcher, backend)
        self._capture(engine)
        with backend.on_stream():
            _reset_state(views)
            backend.synchronize()
        ranks.meet("captured")
        with self._timed("store"):
            self._record(engine)
        engine.stages = self.seconds
        return engine

    def _meet(self, selection: Selection) -> tuple[Ranks, Selection]:
        """Come together with the other ranks; the KV cache is as large as the smallest can have."""
        options, step = self.options, selection.step
        fields = {
            "model": selection.model.digest(),
            "weights": f"{options.model} seed {options.seed}",
            "ladder": str(selection.ladder),
            "max seq len": str(step.max_seq_len),
            "page size": str(step.page_size),
            "attention": step.attention,
            "transport": step.transport,
            "pdl": f"{step.pdl} prefetch {step.prefetch}",
            "kernels": f"{options.kernels} {options.allow_inexact}",
            "verify": f"{options.verify} {options.proof_replays}",
        }
        ranks = Ranks(options.ranks, fields, deadline_s=options.deadline_s)
        self.resources.callback(ranks.close)
        return ranks, self._common_pages(selection, ranks)

    def _common_pages(self, selection: Selection, ranks: Ranks) -> Selection:
        step = selection.step
        pages = min(part.value for part in ranks.group.allgather("pages", step.num_pages))
        return dataclasses.replace(selection, step=dataclasses.replace(step, num_pages=pages))

    def _map(self, selection: Selection) -> Arena:
        arena: Arena
        if selection.on_device:
            arena = DeviceArena(selection.layout, device=torch.cuda.current_device())
        else:
            arena = HostArena(selection.layout)
        self.resources.callback(arena.close)
        return arena

    def _compile(self, selection: Selection, launcher: AotLauncher | None, ranks: Ranks) -> None:
        """Have every kernel in the store before any rank can wait for another."""
        if launcher is not None and ranks.rank == 0:
            requests = list_kernels(selection, launcher.arch, [selection.step.attention]).requests
            compile_all(
                requests,
                launcher.compiler,
                progress=lambda name: self.progress("compile", len(requests), name),
            )
        ranks.group.barrier("compiled", timeout_s=COMPILE_TIMEOUT_S)

    def _load_weights(
        self,
        selection: Selection,
        views: dict[str, torch.Tensor],
        launcher: AotLauncher | None,
    ) -> None:
        model, step = selection.model, selection.step
        experts = {"ep_rank": step.ep_rank, "ep_size": step.ep_size}
        views["rope_table"].copy_(rope_table(model, step.max_seq_len))
        if selection.source.path is None:
            random_weights(model, views, seed=self.options.seed, launch=launcher, **experts)
            return
        load_checkpoint(
            selection.source.path,
            model,
            views,
            **experts,
            progress=lambda _, total: self.progress("load", total, ""),
        )

    def _make_graphs(
        self,
        selection: Selection,
        views: dict[str, torch.Tensor],
        launcher: AotLauncher | None,
        backend: GraphBackend,
        ranks: Ranks,
    ) -> GraphSet:
        transport = None
        if selection.model.first_k_dense_replace < selection.model.num_layers:
            sizes = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
            transport = ranks.transport(
                selection.step.transport, sizes, views, launcher, self.store
            )
        ops = ChosenOps(Ops(launcher), KernelChoices())
        step = make_step(selection, ops, views, transport)
        if launcher is None:
            return GraphSet(step, selection.ladder, backend)  # the twin compiles nothing
        return GraphSet(step, selection.ladder, backend, forbid_compile=launcher.freeze)

    def _tune_attention(
        self, selection: Selection, launcher: AotLauncher | None, ranks: Ranks
    ) -> Selection:
        """Choose kernel and cut on rank 0, for all; the KV cache is then sized again."""
        options = self.options
        if launcher is None or options.kernels == "default":
            return selection
        chosen = ""
        if ranks.rank == 0:
            pins = pinned(options)
            if pins is None:
                backend = CudaBackend(torch.device("cuda"))
                timer = GraphTimer(backend.stream, target_us=300.0, replays=5)
                tuner = AttentionTuner(
                    selection, options, self.store, launcher, backend, timer, self.progress
                )
                chosen = str(tuner.choose())
                torch.cuda.empty_cache()
            else:
                chosen = pins.attention or ""
        parts = ranks.group.allgather("attention", chosen, timeout_s=COMPILE_TIMEOUT_S)
        if not parts[0].value:
            return selection
        selection = with_attention(options, selection, AttentionCut.parse(parts[0].value))
        return self._common_pages(selection, ranks)

    def _tune(
        self,
        engine: Engine,
        views: dict[str, torch.Tensor],
        launcher: AotLauncher,
        backend: CudaBackend,
    ) -> KernelChoices:
        """Choose kernels on rank 0, for all, and bind them to the step."""
        if self.options.kernels == "default":
            return KernelChoices()
        choices, selection, step = None, engine.selection, engine.graphs.step
        if engine.ranks.rank == 0:
            timer = GraphTimer(backend.stream, target_us=300.0, replays=5)
            tuner = Tuner(
                selection, self.options, self.store, launcher, backend, timer, self.progress
            )
            choices = tuner.choose(record_calls(selection, views))
            choices = tuner.confirm(choices, step, views)
            cut = AttentionCut(selection.step.attention, selection.step.cut)
            choices = dataclasses.replace(choices, attention=str(cut))
            with backend.on_stream():
                _reset_state(views)
                backend.synchronize()
            torch.cuda.empty_cache()  # inputs of measurements lay outside the arena
        choices = share(engine.ranks, choices)
        assert isinstance(step.ops, ChosenOps)
        step.ops.choices = choices
        return choices

    def _capture(self, engine: Engine) -> None:
        graphs, total = engine.graphs, len(engine.ladder.keys)
        with self._timed("warm up"):
            graphs.warm_up(lambda kind, key: self.progress(kind, total, key))
        with self._timed("capture"):
            graphs.capture(lambda kind, key: self.progress(kind, total, key))
        if not self.options.verify:
            return
        with self._timed("prove"):
            replays = self.options.proof_replays
            if replays is None:
                replays = 100 if engine.selection.on_device else 2
            prover = Prover(graphs, replays=replays, seed=self.options.seed)
            for key in reversed(engine.ladder.keys):
                engine.proofs[key] = prover.prove(key)
                self.progress("prove", total, key)

    def _record(self, engine: Engine) -> None:
        """Write the manifest: fingerprint, arena table, ledger, kernels."""
        launcher = engine.launcher
        engine.ledger = make_ledger(
            engine.model_config,
            engine.config,
            engine.ladder,
            engine.graphs.graphs,
            engine.proofs,
            launcher.kernels if launcher else {},
            engine.choices,
        )
        if engine.ranks.rank:
            return  # one bundle serves all ranks
        facts = engine.fingerprint()
        try:
            stored = self.store.load(facts)
            if stored is not None and _kernels_of(stored.manifest.ledger) == engine.choices.digest:
                return  # the same capture is on record; a store may well be read-only by now
        except CorruptBundle:
            pass  # replaced below
        record = engine.ledger.to_json() | {"stages_s": self.seconds}
        kernels = tuple(launcher.used) if launcher else ()
        manifest = Manifest(facts, engine.selection.layout, record, kernels)
        self.store.publish(facts, manifest, {}, replace_existing=True)


def _kernels_of(ledger: Any) -> str:
    """Digest of the kernels that a stored capture took; empty if it does not say."""
    try:
        return KernelChoices.from_json(ledger["choices"], origin="stored").digest
    except (KeyError, TypeError, ValueError):
        return ""


def _launcher(store: Store, selection: Selection) -> AotLauncher:
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return AotLauncher(
        KernelCompiler(store, f"sm_{major}{minor}"),
        num_sms=properties.multi_processor_count,
        pdl=MODES[selection.step.pdl],
    )


def _reset_state(views: dict[str, torch.Tensor]) -> None:
    """Every row free, step 0, nothing published. The null page keeps the proof's poison."""
    for name in ("phase", "seq_len", "last_token", "limit", "page_table", "step", "fault"):
        views[name].zero_()
    views["poison"].zero_()
    views["stop_ids"].fill_(-1)
    views["mailbox"].fill_(-1)
    views["ring_step"].zero_()
