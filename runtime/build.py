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

from barriers.rdep import RdepTuning
from capture_cache.arena import Arena, DeviceArena, HostArena
from capture_cache.errors import CorruptBundle, CudaError, NotRestorable, StoreError
from capture_cache.fingerprint import Fingerprint
from capture_cache.manifest import Manifest
from capture_cache.restore_driver import Driver
from capture_cache.store import Bundle, Store
from graphs.aot import AotLauncher
from graphs.attention_choice import AttentionCut
from graphs.buffers import transport_config, vocabulary_config
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
from runtime.assemble import exchange_launcher, list_kernels, make_step
from runtime.attention_tuning import AttentionTuner
from runtime.bundle_names import GRAPHS, LIVE, SKIPPED
from runtime.config import RuntimeConfig, told_to_ranks
from runtime.engine import Engine, reset_state
from runtime.fingerprint import fingerprint
from runtime.ranks import Ranks
from runtime.record import Recording, record
from runtime.selection import Selection, choose, with_attention
from runtime.tuning import Tuner, check_kernels, pinned, record_calls, share
from runtime.weights import Found as FoundWeights
from runtime.weights import find as find_weights
from runtime.weights import left_alone, origin_of
from runtime.weights import load as load_packed_weights

# (kind of work, pieces in all, piece); no pieces at all: that work begins
Progress = Callable[[str, int, object], None]
_CHUNK_BYTES = 64 << 20
COMPILE_TIMEOUT_S = 1800.0  # how long the other ranks wait for rank 0 to compile


def _no_progress(*_: object) -> None:
    """Nobody watches."""


def build(
    options: RuntimeConfig, progress: Progress = _no_progress, *, replace: bool = False
) -> Engine:
    """Build, capture, prove and record.

    Args:
        replace: a stored bundle of the same capture must not be used: replace it.
    Raises:
        ValueError: options, config or weights; says which and what would do.
        CaptureError, ArenaError, CompileError, StoreError, RankError: named, with the remedy.
    """
    resources = ExitStack()
    try:
        return _Builder(options, progress, resources, replace).run()
    except BaseException:
        # A lost context cannot be tidied up; the first error is the one to tell.
        with suppress(CudaError):
            resources.close()
        raise


class _Builder:
    """One build; each method is a stage."""

    def __init__(
        self, options: RuntimeConfig, progress: Progress, resources: ExitStack, replace: bool
    ) -> None:
        self.options, self.progress, self.resources = options, progress, resources
        self.replace = replace
        self.store = Store(options.store_path)
        self.seconds: dict[str, float] = {}
        self.weights_note = ""

    @contextmanager
    def _timed(self, name: str, *, told: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        if told:
            self.progress(name, 0, "")
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> Engine:
        with self._timed("select", told=False):  # mostly where options are refused
            with told_to_ranks():
                selection = choose(self.options)
                check_kernels(self.options, selection)
                weights = find_weights(self.options, selection.model, selection.source)
                self.weights_note = weights.note
                self._check_store(selection.on_device)
                fields = self._fields(selection)
            ranks, selection = self._meet(selection, fields)
        launcher = _launcher(self.store, selection) if selection.on_device else None
        if launcher is not None and self.options.kernels != "default":
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
            self._load_weights(selection, weights, arena, views, launcher)
            reset_state(views)
            backend.synchronize()
        with self._timed("transport"):
            graphs = self._make_graphs(selection, views, launcher, backend, ranks)
        self.resources.callback(graphs.close)
        engine = Engine(selection, self.options, ranks, graphs, launcher, self.resources)
        if isinstance(backend, CudaBackend) and launcher is not None:
            with self._timed("tune"):
                engine.choices = self._tune(engine, views, launcher, backend)
        if engine.ranks.rank == 0:  # what is known by now may ask for more than what is on record
            self._check_store(selection.on_device, engine.choices)
        self._capture(engine)
        engine.reset_state()
        ranks.meet("captured")
        with self._timed("store"):
            self._record(engine, arena)
        engine.stages, engine.weights_note = self.seconds, self.weights_note
        return engine

    def _check_store(self, on_device: bool, choices: KernelChoices | None = None) -> None:
        """Raises StoreError if the capture could not be stored, unless nothing needs storing.

        Args:
            choices: the capture's kernels; None: not known yet.
        """
        try:
            self.store.check_writable()
        except StoreError:
            if self.replace or self.options.kernels == "tune":
                raise
            if self._stored(fingerprint(self.options, on_device=on_device), choices) is None:
                raise

    def _fields(self, selection: Selection) -> dict[str, str]:
        """What every rank must have been started with."""
        options, step = self.options, selection.step
        fields = {
            "model": selection.model.digest(),
            "weights": f"{options.model} seed {options.seed}",
            "ladder": str(selection.ladder),
            "max seq len": str(step.max_seq_len),
            "page size": str(step.page_size),
            "attention": step.attention,
            "transport": step.transport,
            "pdl": f"{step.pdl} overlap {step.overlap}",
            "kernels": f"{options.kernels} {options.allow_inexact}",
            "verify": f"{options.verify} {options.proof_replays}",
            "deadline": f"{options.deadline_s} s",
        }
        if options.num_ranks > 1:  # versions, driver, chip, sources, rows: what a bundle depends on
            facts = fingerprint(options, on_device=selection.on_device)
            fields |= {n: str(v) for n, v in facts.fields if n not in (*fields, "model config")}
        return fields

    def _meet(self, selection: Selection, fields: dict[str, str]) -> tuple[Ranks, Selection]:
        """Come together with the other ranks; the KV cache is as large as the smallest can have."""
        ranks = Ranks(self.options.ranks, fields, deadline_s=self.options.deadline_s)
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
        found: FoundWeights,
        arena: Arena,
        views: dict[str, torch.Tensor],
        launcher: AotLauncher | None,
    ) -> None:
        model, step = selection.model, selection.step
        views["rope_table"].copy_(rope_table(model, step.max_seq_len))
        if found.packed is not None and self._load_packed(selection, found, arena):
            return
        if selection.source.path is None:
            random_weights(
                model,
                views,
                seed=self.options.seed,
                launch=launcher,
                ep_rank=step.ep_rank,
                ep_size=step.ep_size,
            )
            return
        load_checkpoint(
            selection.source.path,
            model,
            views,
            ep_rank=step.ep_rank,
            ep_size=step.ep_size,
            progress=_in_chunks(self.progress, "load"),
        )

    def _load_packed(self, selection: Selection, found: FoundWeights, arena: Arena) -> bool:
        """Whether they could be used; the store's, if damaged, are told of and left alone.

        Raises CorruptBundle: given ones are damaged.
        """
        assert found.packed is not None
        try:
            with _driver(selection) as driver:
                load_packed_weights(
                    found.packed,
                    arena,
                    self.options,
                    rank=selection.step.ep_rank,
                    driver=driver,
                    store=self.store,
                    progress=_in_chunks(self.progress, "load"),
                )
        except CorruptBundle as e:
            if found.given:
                raise
            self.weights_note = left_alone(found.plain, e)
            return False
        return True

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
            launch = None if launcher is None else exchange_launcher(selection, launcher)
            tuning = RdepTuning(sum_pdl=not selection.step.overlap)
            shared = vocabulary_config(selection.model, selection.step, selection.ladder.max_rows)
            transport = ranks.transport(
                selection.step.transport, sizes, views, launch, self.store, tuning, shared
            )
        ops = ChosenOps(Ops(launcher), KernelChoices())
        step = make_step(selection, ops, views, transport, backend.branch, ranks.vocabulary)
        if launcher is None:
            return GraphSet(step, selection.ladder, backend)  # the twin compiles nothing
        return GraphSet(step, selection.ladder, backend, forbid_compile=launcher.freeze)

    def _tune_attention(
        self, selection: Selection, launcher: AotLauncher, ranks: Ranks
    ) -> Selection:
        """Choose kernel and cut on rank 0, for all; the KV cache is then sized again."""
        options, chosen = self.options, ""
        if ranks.rank == 0:
            pins = pinned(options)
            if pins is None:
                backend = CudaBackend(torch.device("cuda"))
                timer = GraphTimer(backend.stream, target_us=300.0, replays=5)
                tuner = AttentionTuner(
                    selection, options, self.store, launcher, backend, timer, self.progress
                )
                cut = tuner.choose() if options.kernels == "tune" else tuner.stored()
                chosen = "" if cut is None else str(cut)
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
        choices: KernelChoices | None
        choices, selection, step = None, engine.selection, engine.graphs.step
        if engine.ranks.rank == 0 and self.options.kernels == "auto" and not self.store.records():
            choices = KernelChoices()  # nothing was ever measured: as most runtimes start
        elif engine.ranks.rank == 0:
            timer = GraphTimer(backend.stream, target_us=300.0, replays=5)
            tuner = Tuner(
                selection, self.options, self.store, launcher, backend, timer, self.progress
            )
            choices = tuner.choose(record_calls(selection, views))
            choices = tuner.confirm(choices, step, views)
            if choices.origin != "default":
                cut = AttentionCut(selection.step.attention, selection.step.cut)
                choices = dataclasses.replace(choices, attention=str(cut))
            engine.reset_state()
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

    def _record(self, engine: Engine, arena: Arena) -> None:
        """Write the bundle: fingerprint, arena, ledger, kernels, and graphs if they can be."""
        launcher = engine.launcher
        engine.ledger = make_ledger(
            engine.model_config,
            engine.config,
            engine.ladder,
            engine.graphs.graphs,
            engine.proofs,
            launcher.kernels if launcher else {},
            choices=engine.choices,
            live=engine.graphs.live,
        )
        facts = engine.fingerprint()
        first = engine.ranks.rank == 0 and not self.replace
        stored = first and self._stored(facts, engine.choices) is not None
        if engine.ranks.group.allgather("record", stored)[0].value:
            engine.bundle_note = (
                "the same capture is on record"
                if self.options.bundle
                else "captured without a bundle, as asked; what is on record stays"
            )
            return  # a store may well be read-only by now
        recording = self._recording(engine, arena)
        if engine.ranks.rank:
            return  # one bundle serves all ranks
        model = origin_of(engine.selection.source) or engine.selection.source.name
        record = engine.ledger.to_json() | {"stages_s": self.seconds, "model": model}
        kernels = tuple(launcher.used) if launcher else ()
        manifest = Manifest(
            facts, engine.selection.layout, record, kernels, restore=recording.restore
        )
        self.store.publish(facts, manifest, recording.files, replace_existing=True)

    def _stored(self, facts: Fingerprint, choices: KernelChoices | None) -> Bundle | None:
        """The bundle on record, unless this capture has more to say.

        Args:
            choices: this capture's; None: not known yet, taken to be those on record.
        """
        try:
            stored = self.store.load(facts)
        except CorruptBundle:
            return None  # replaced
        if stored is None:
            return None
        restore = stored.manifest.restore
        kind = restore.get("kind") if isinstance(restore, dict) else None
        if kind == GRAPHS and not self.options.bundle:
            return stored  # never graphs for none
        if choices is not None and _kernels_of(stored.manifest.ledger) != choices.kernels:
            return None  # something was measured since
        return None if kind == SKIPPED and self.options.bundle else stored

    def _recording(self, engine: Engine, arena: Arena) -> Recording:
        if not self.options.bundle:
            return self._without(engine, SKIPPED, "captured without a bundle, as asked")
        if not isinstance(arena, DeviceArena):
            return self._without(engine, LIVE, "the CPU twin has no graphs to restore")
        try:
            total = len(engine.ladder.keys)
            recording = record(engine, arena, lambda key: self.progress("bundle", total, key))
        except NotRestorable as e:
            return self._without(engine, LIVE, str(e))
        engine.bundle_note = f"{sum(map(len, recording.files.values())):,} bytes"
        return recording

    def _without(self, engine: Engine, kind: str, reason: str) -> Recording:
        engine.bundle_note = f"no graphs stored: {reason}"
        return Recording({}, {"kind": kind, "reason": reason})


@contextmanager
def _driver(selection: Selection) -> Iterator[Driver | None]:
    """Driver calls in torch's own context; None for the CPU twin."""
    if not selection.on_device:
        yield None
        return
    driver = Driver()
    driver.init()
    driver.open(torch.cuda.current_device())
    try:
        yield driver
    finally:
        driver.close()


def _in_chunks(progress: Progress, kind: str) -> Callable[[int, int], None]:
    """Bytes (done, in all) told as pieces of 64 MiB, as `progress` counts."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        pieces = max(1, -(-total // _CHUNK_BYTES))
        while told < (pieces if done >= total else done // _CHUNK_BYTES):
            told += 1
            progress(kind, pieces, "x 64 MiB")

    return tell


def _kernels_of(ledger: Any) -> tuple[str | None, str]:
    """`KernelChoices.kernels` of a stored capture; of none if it does not say."""
    try:
        return KernelChoices.from_json(ledger["choices"], origin="stored").kernels
    except (KeyError, TypeError, ValueError):
        return None, ""


def _launcher(store: Store, selection: Selection) -> AotLauncher:
    major, minor = torch.cuda.get_device_capability()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return AotLauncher(
        KernelCompiler(store, f"sm_{major}{minor}"),
        num_sms=properties.multi_processor_count,
        pdl=MODES[selection.step.pdl],
    )
