"""A stored bundle back on the device, with neither torch nor triton.

    driver initialised ──► bundle found and checked ──► arena mapped ──► weights ──► first key built
      (in a thread)          (meanwhile: the context)                        ──► its golden step
                                                              other keys are built in a thread

Whatever is not as the bundle says ends in `NotRestored` with the reason, before a runtime exists:
the caller captures again, and says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture_cache.arena import DeviceArena
from capture_cache.errors import ArenaError, CorruptBundle, CudaError, FingerprintMismatch
from capture_cache.files import REMEDY
from capture_cache.fingerprint import Fingerprint
from capture_cache.layout import ArenaLayout
from capture_cache.restore import Code, Files, build_graph, symbol_table
from capture_cache.restore_driver import Driver
from capture_cache.store import Bundle, Store
from graphs.keys import GraphKey, Ladder
from graphs.model_config import ModelConfig, parse_overrides
from graphs.model_source import ModelSource, resolve_model
from graphs.step_config import StepConfig
from runtime.bundle_names import (
    DEVICE_WHOLE,
    GRAPHS,
    HOST_WHOLE,
    ROPE_FILE,
    SKIP_WEIGHTS,
    WEIGHTS_FILE,
)
from runtime.config import RuntimeConfig
from runtime.driver import StepFailed
from runtime.fingerprint import absent_packages, fingerprint
from runtime.golden import golden_step
from runtime.player import Keys, Player
from runtime.weights import find as find_weights
from runtime.weights import load as load_packed_weights

_SKIPPED = "weights skipped, for measurement only: no golden step, and its tokens mean nothing"
_FILLING = "filling the weights"


class NotRestored(RuntimeError):
    """There is nothing to restore, or it cannot be used; the message is the reason.

    Attributes:
        replace: what is stored must be replaced by the next capture.
    """

    def __init__(self, reason: str, *, replace: bool = False) -> None:
        super().__init__(reason)
        self.replace = replace


def restore(options: RuntimeConfig, *, lib: Any = None) -> Player:
    """Restore the bundle that is valid for `options` here.

    Args:
        lib: driver functions; by default those of the machine.

    Raises:
        NotRestored: no valid bundle, or one that cannot be restored: capture instead.
        ValueError: options or a model that cannot be run.
    """
    resources = ExitStack()
    try:
        return _Restore(options, resources, lib).run()
    except BaseException:
        with suppress(CudaError):
            resources.close()
        raise


@dataclass(frozen=True)
class Facts:
    """What the manifest says beside the files."""

    layout: ArenaLayout
    arena_base: int
    ladder: Ladder
    step: StepConfig

    @classmethod
    def of(cls, bundle: Bundle) -> Facts:
        """Raises NotRestored: it holds no graphs; CorruptBundle: malformed."""
        told, layout = bundle.manifest.restore, bundle.manifest.arena
        try:
            kind = told["kind"]
            if kind != GRAPHS:
                raise NotRestored(f"the bundle holds no graphs: {told['reason']}")
            step = StepConfig(**told["step"])
            base, ladder = told["arena_base"], Ladder.parse(told["ladder"], step.max_rows)
            whole = isinstance(base, int) and 0 < base < 1 << 57
        except (KeyError, TypeError, ValueError) as e:
            raise CorruptBundle(f"{bundle.path}: what to restore is malformed: {e!r}") from e
        if layout is None or not whole:
            raise CorruptBundle(
                f"{bundle.path}: expected an arena table and its address, got "
                f"{'none' if layout is None else 'a table'} and {base!r}; {REMEDY}"
            )
        return cls(layout, base, ladder, step)


class _Restore:
    """One restore; each method is a stage."""

    def __init__(self, options: RuntimeConfig, resources: ExitStack, lib: Any) -> None:
        self.options, self.resources, self.lib = options, resources, lib
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage; what is wrong with the bundle becomes the reason to capture again."""
        start = time.perf_counter()
        try:
            yield
        except (CorruptBundle, StepFailed) as e:
            raise NotRestored(str(e), replace=True) from e
        except CudaError as e:
            short = e.name == "CUDA_ERROR_OUT_OF_MEMORY"
            raise NotRestored(str(e), replace=not short) from e
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def run(self) -> Player:
        options = self.options
        if options.num_ranks > 1:
            raise NotRestored("this version restores runs of one rank only")
        opening = _Opening(options.local_rank, self.lib)
        self.resources.callback(opening.close)
        with self._stage("model"):
            model, source = resolve_model(
                options.model, layers=options.layers, overrides=parse_overrides(options.overrides)
            )
        with self._stage("fingerprint"):
            current = fingerprint(options, on_device=True, driver=opening.wait_driver)
        with self._stage("bundle"):
            bundle = self._find(current)
            facts = Facts.of(bundle)
            files = Files(bundle.files, str(bundle.path))
        with self._stage("context"):
            driver = opening.wait_context()
        with self._stage("arena"):
            arena = self._map(driver, facts)
            stream = driver.create_stream()
            self.resources.callback(driver.destroy_stream, stream)
            symbols = symbol_table(files.program, partial(_address, arena))
        code = Code(driver, files)
        self.resources.callback(code.close)
        keys = Keys(driver, code, files, symbols, stream, facts.ladder)
        self.resources.callback(keys.close)
        player = Player(
            *(options, driver, arena, stream, keys, facts.step, model, facts.ladder, self.resources)
        )
        with self._stage("weights"):
            checkable = self._load_packed(driver, arena, files, model, source)
            if not checkable:
                checkable = self._load_weights(driver, arena, files, source, code, symbols, stream)
            player.reset_state()
        first = facts.ladder.keys[0]
        with self._stage("first key"):
            keys.exec_of(first)
        with self._stage("golden"):
            reason = _SKIPPED
            if checkable:
                check_golden(player, first)
                reason = f"the golden step of key {first} agrees"
        player.load_reason = f"bundle {bundle.path.name[:16]}: {reason}"
        player.stages = self.seconds
        keys.build_rest()
        return player

    def _find(self, current: Fingerprint) -> Bundle:
        """The bundle of these options, every hash checked."""
        store = Store(self.options.store_path)
        # An installation that lacks what captured may still play.
        found = store.find(current, unset=absent_packages())
        bundle = None if found is None else store.load(found)
        if bundle is not None:
            return bundle
        try:
            return store.require(current)  # tells what differs
        except FingerprintMismatch as e:
            raise NotRestored(str(e)) from e

    def _map(self, driver: Driver, facts: Facts) -> DeviceArena:
        try:
            arena = DeviceArena(facts.layout, memory=driver, base=facts.arena_base, exact=True)
        except ArenaError as e:
            raise NotRestored(f"the arena cannot be mapped: {e}") from e
        self.resources.callback(arena.close)
        return arena

    def _load_packed(
        self,
        driver: Driver,
        arena: DeviceArena,
        files: Files,
        model: ModelConfig,
        source: ModelSource,
    ) -> bool:
        """Fill the weights from packed ones; whether there are any."""
        if self.options.weights == SKIP_WEIGHTS:
            return False
        packed = find_weights(self.options, model, source).packed
        if packed is None:
            return False
        store = Store(self.options.store_path)
        rank = self.options.ranks.rank
        load_packed_weights(packed, arena, self.options, rank=rank, driver=driver, store=store)
        driver.upload(arena.view_spec("rope_table").ptr, _rope(files, arena))
        return True

    def _load_weights(
        self,
        driver: Driver,
        arena: DeviceArena,
        files: Files,
        source: ModelSource,
        code: Code,
        symbols: NDArray[np.uint64],
        stream: int,
    ) -> bool:
        """Fill the weights; whether a golden step can be expected to agree."""
        rope, place = _rope(files, arena), arena.view_spec("rope_table")
        if self.options.weights == SKIP_WEIGHTS:
            driver.upload(place.ptr, rope)
            return False
        if not source.is_preset or not files.has(WEIGHTS_FILE):
            raise NotRestored(
                f"the weights of {source.name} are not in the bundle and no packed ones were found;"
                " pack them with python -m runtime.pack"
            )
        section = next(e for e in arena.layout.extents if e.section.name == "weights")
        driver.fill(arena.base + section.offset, 0, section.nbytes, stream)
        graph = build_graph(driver, code, files.graph(WEIGHTS_FILE), symbols, "the weights' graph")
        try:
            driver.launch(graph, stream, _FILLING)
            driver.wait(stream, _FILLING)
        finally:
            driver.drop_exec(graph)
        driver.upload(place.ptr, rope)
        return True


def check_golden(player: Player, key: GraphKey) -> None:
    """Run a key's golden step; the rows must be free, and are so afterwards.

    Raises:
        NotRestored: it gives other bits than at capture.
        CorruptBundle, CudaError, StepFailed: it cannot be run.
    """
    golden = player.keys.golden(key)
    digest = golden_step(player, key, golden.ids)
    if digest != golden.digest:
        raise NotRestored(
            f"the golden step of key {key} gave {digest[:16]}, expected {golden.digest[:16]}: "
            "the bundle must not be used here",
            replace=True,
        )


def _rope(files: Files, arena: DeviceArena) -> NDArray[np.uint8]:
    """The rope table's bytes; raises CorruptBundle."""
    rope, place = np.frombuffer(files.read(ROPE_FILE), np.uint8), arena.view_spec("rope_table")
    if rope.nbytes != place.nbytes:
        raise CorruptBundle(
            f"{ROPE_FILE}: expected {place.nbytes} bytes, got {rope.nbytes}; {REMEDY}"
        )
    return rope


def _address(arena: DeviceArena, name: str) -> int:
    """Of a symbol; raises CorruptBundle."""
    if name == DEVICE_WHOLE:
        return arena.base
    if name == HOST_WHOLE:
        return arena.host_base
    try:
        return arena.ptr(name)
    except ArenaError as e:
        raise CorruptBundle(
            f"the program names memory {name!r}, which is not in the arena; {REMEDY}"
        ) from e


class _Opening:
    """The driver and the device's context, made in a thread: together they take 200 ms."""

    def __init__(self, ordinal: int, lib: Any) -> None:
        self._ordinal, self._lib = ordinal, lib
        self._driver: Driver | None = None
        self._failure: Exception | None = None
        self._initialised = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lockstep-open", daemon=True)
        self._thread.start()

    def wait_driver(self) -> Driver:
        """A driver that can be asked about devices; raises NotRestored."""
        self._initialised.wait()
        self._check()
        assert self._driver is not None
        return self._driver

    def wait_context(self) -> Driver:
        """The opened driver, its context current in this thread; raises NotRestored."""
        self._thread.join()
        driver = self.wait_driver()
        driver.make_current()
        return driver

    def close(self) -> None:
        """Release the context."""
        self._thread.join()
        if self._driver is not None:
            self._driver.close()

    def _run(self) -> None:
        try:
            driver = Driver(self._lib)
            driver.init()
            if driver.num_devices() <= self._ordinal:
                raise CudaError("no such device", f"opening device {self._ordinal}", "use another")
            self._driver = driver
            self._initialised.set()
            driver.open(self._ordinal)
        except CudaError as e:
            self._failure = e
        finally:
            self._initialised.set()

    def _check(self) -> None:
        if self._failure is not None:
            raise NotRestored(str(self._failure)) from self._failure
