"""A stored bundle back on the device, with neither torch nor triton.

    driver initialised ──► bundle found ──► addresses reserved ──► memory mapped ──► weights
      (in a thread)     (meanwhile: context)   (in a thread: the first key built)      │
                   (in threads: its files read and checked) ────────────────────┴─► golden step
                                                                  other keys are built in threads

Whatever is not as the bundle says ends in `NotRestored` with the reason, before a runtime exists:
the caller captures again, and says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture_cache.arena import DeviceArena
from capture_cache.bundle import PROGRAM_FILE, Table, graph_file
from capture_cache.contents import Contents
from capture_cache.dataclass import dataclass
from capture_cache.errors import ArenaError, CorruptBundle, CudaError
from capture_cache.files import REMEDY
from capture_cache.fingerprint import Fingerprint
from capture_cache.restore_code import symbol_table
from capture_cache.restore_driver import Driver
from capture_cache.store import Loaded, Store
from graphs.keys import GraphKey
from graphs.model_config import ModelConfig
from graphs.model_source import ModelSource
from runtime.aside import Aside
from runtime.bundle_names import (
    DEVICE_WHOLE,
    HOST_WHOLE,
    PEERS,
)
from runtime.config import RuntimeConfig, told_to_ranks
from runtime.driver import StepFailed
from runtime.fingerprint import absent_packages, fingerprint
from runtime.golden import golden_step
from runtime.model import model_of
from runtime.opening import NotRestored, Opening
from runtime.player import Player
from runtime.preload import Preload
from runtime.restore_facts import Facts
from runtime.restored_weights import Target, fill_weights

if TYPE_CHECKING:
    from runtime.player_ranks import PlayerRanks

_SKIPPED = "weights skipped, for measurement only: no golden step, and its tokens mean nothing"


def restore(options: RuntimeConfig, *, lib: Any = None, opening: Opening | None = None) -> Player:
    """Restore the bundle that is valid for `options` here.

    Args:
        lib: driver functions; by default those of the machine.
        opening: the device as it is being opened, where somebody has begun; closed with the player.

    Raises:
        NotRestored: no valid bundle, or one that cannot be restored: capture instead.
        ValueError: options or a model that cannot be run.
    """
    resources = ExitStack()
    try:
        return _Restore(options, resources, opening or Opening(options.local_rank, lib)).run()
    except BaseException:
        with suppress(CudaError):
            resources.close()
        raise


@dataclass(frozen=True)
class _Found:
    """What is going to be restored."""

    model: ModelConfig
    source: ModelSource
    path: Path
    facts: Facts
    contents: Contents
    preload: Preload


@dataclass(frozen=True)
class _Mapped:
    """Where it is going to be; `backing` ends when there is memory."""

    driver: Driver
    arena: DeviceArena
    stream: int
    symbols: Table
    backing: Aside


class _Restore:
    """One restore; each method is a stage."""

    def __init__(self, options: RuntimeConfig, resources: ExitStack, opening: Opening) -> None:
        self.options, self.resources, self.opening = options, resources, opening
        self.ranks: PlayerRanks | None = None
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Time a stage; what is wrong becomes the reason to capture again."""
        start = time.perf_counter()
        try:
            yield
        except (CorruptBundle, StepFailed) as e:
            raise NotRestored(str(e), replace=True) from e
        except ArenaError as e:
            raise NotRestored(f"the arena cannot be mapped: {e}") from e
        except CudaError as e:
            raise NotRestored(str(e), replace=e.name != "CUDA_ERROR_OUT_OF_MEMORY") from e
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Stages after which no rank goes on unless all can; one that cannot tells the others."""
        failure = None
        try:
            yield
        except NotRestored as e:
            failure = e
        if self.ranks is not None:
            self._agree(what, "", failure)
        if failure is not None:
            raise failure

    def _agree(self, name: str, value: str, failure: NotRestored | None) -> None:
        """Raises NotRestored on every rank if any rank has a reason to."""
        assert self.ranks is not None
        with self._stage("waiting for ranks"):
            reason = self.ranks.agree(name, value, None if failure is None else str(failure))
        if reason is not None:
            raise NotRestored(reason, replace=failure is not None and failure.replace)

    def run(self) -> Player:
        options, world = self.options, self.options.ranks.world
        self.resources.callback(self.opening.close)
        if options.num_ranks != world:
            raise NotRestored(
                f"--ep-size {options.num_ranks}, but this is one of {world} processes"
            )
        found, failure = None, None
        try:
            with told_to_ranks(but=NotRestored):
                found = self._look()
        except NotRestored as e:
            failure = e
        if world > 1:
            with self._stage("ranks"):
                from runtime.player_ranks import PlayerRanks  # sockets and more, for ranks alone

                ranks = PlayerRanks(options)
            self.resources.callback(ranks.close)
            self.ranks = ranks
            self._agree("the bundle", found.path.name if found else "", failure)
        if failure is not None:
            raise failure
        assert found is not None
        return self._load(found)

    def _look(self) -> _Found:
        """Find the bundle and check it, while the driver comes up."""
        options = self.options
        with self._stage("model"):
            model, source = model_of(options)
        with self._stage("fingerprint"):
            current = fingerprint(options, on_device=True, driver=self.opening.wait_driver)
        with self._stage("bundle"):
            loaded = self._find(current)
        with self._stage("manifest"):
            contents = loaded.files
            assert isinstance(contents, Contents)
            self.resources.callback(contents.close)
            facts = Facts.of(Store.parse(loaded), options.ranks.rank)
            if PROGRAM_FILE not in contents:
                raise CorruptBundle(f"{loaded.path}: expected a file {PROGRAM_FILE}; {REMEDY}")
            preload = Preload(self.opening, contents, facts.ladder, str(loaded.path))
            self.resources.callback(preload.close)
        return _Found(model, source, loaded.path, facts, contents, preload)

    def _load(self, found: _Found) -> Player:
        facts, first = found.facts, found.facts.ladder.keys[0]
        mapped = self._map(found)
        driver, arena, stream = mapped.driver, mapped.arena, mapped.stream
        with self._together("the first key"):
            with self._stage("memory"):
                mapped.backing.wait()
            found.preload.mapped()
            with self._stage("first key"):
                code, keys = found.preload.wait()
            with self._stage("files"):  # before anything runs on the device
                found.contents.finish()
            player = Player(
                self.options,
                driver,
                arena,
                stream,
                keys,
                facts.step,
                found.model,
                facts.ladder,
                self.resources,
                self.ranks,
            )
            with self._stage("weights"):
                place = Target(driver, arena, code, mapped.symbols, stream)
                files = found.preload.files
                checkable = fill_weights(self.options, found.model, found.source, files, place)
                player.reset_state()
        reason = _SKIPPED
        if checkable:
            with self._together("the golden step"), self._stage("golden"):
                check_golden(player, first)
            reason = f"the golden step of key {first} agrees"
            if self.options.check_keys == "all":
                self._check_rest(player, facts.ladder.keys[1:])
                reason = f"the golden steps of all {len(facts.ladder.keys)} keys agree"
        player.load_reason = f"bundle {found.path.name[:16]}: {reason}"
        player.stages = self.seconds
        if self.options.check_keys != "all":
            keys.build_rest()
        return player

    def _map(self, found: _Found) -> _Mapped:
        """The bundle's addresses; what is behind them is on its way, and so is the first key."""
        facts, preload = found.facts, found.preload
        with self._together("addresses"):
            with self._stage("context"):
                driver = self.opening.wait_context()
            with self._stage("arena"):
                arena = DeviceArena(
                    facts.layout, memory=driver, base=facts.arena_base, exact=True, back=False
                )
                self.resources.callback(arena.close)
                stream = driver.create_stream()
                self.resources.callback(driver.destroy_stream, stream)
                self.resources.callback(preload.close)  # its graphs go before their memory
                backing = Aside(partial(_back, driver, arena))
                self.resources.callback(backing.close)
                # The ranks' memory has a fixed address, too: it will be there, or nothing will.
                peers = facts.peers.base if self.ranks is not None and facts.peers else 0
                find = partial(_address, arena, peers)
                symbols = symbol_table(preload.files.program, find)
                preload.place(symbols, stream)
        if self.ranks is not None and facts.peers is not None:
            from barriers.errors import RankError

            with self._stage("peers"):
                try:
                    self.ranks.share(driver, facts.peers, arena.ptr("step"))
                except RankError as e:  # raised on every rank
                    raise NotRestored(str(e)) from e
        return _Mapped(driver, arena, stream, symbols, backing)

    def _check_rest(self, player: Player, keys: Sequence[GraphKey]) -> None:
        with self._together("other keys"), self._stage("other keys"):
            player.keys.build_rest(pause_s=0.0)
            player.keys.wait()
        with self._together("other golden steps"), self._stage("other golden steps"):
            failures = list[str]()
            for key in keys:  # to the end: every rank must take as many steps as the others
                try:
                    check_golden(player, key)
                except NotRestored as e:
                    failures.append(str(e))
            if failures:
                raise NotRestored("; ".join(failures), replace=True)

    def _find(self, current: Fingerprint) -> Loaded:
        """The bundle of these options; its files are checked as they are read."""
        store = Store(self.options.store_path)
        # An installation that lacks what captured may still play.
        found = store.find(current, unset=absent_packages())
        loaded = None if found is None else store.read(found, _first_files(current))
        if loaded is None:
            raise NotRestored(store.explain_miss(current))
        return loaded


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


def _back(driver: Driver, arena: DeviceArena) -> None:
    driver.make_current()
    arena.back()


def _first_files(current: Fingerprint) -> tuple[str, ...]:
    """What the first step needs, small ones; its code follows from them."""
    key = GraphKey.parse(str(dict(current.fields)["ladder"]).split(",")[0])
    return PROGRAM_FILE, graph_file(key.tokens, key.rows)


def _address(arena: DeviceArena, peers: int, name: str) -> int:
    """Of a symbol; raises CorruptBundle."""
    if name == PEERS and peers:
        return peers
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
