"""The player on a fake GPU: what it loads, in which order, what it refuses, and what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime.load as load_module
from capture_cache.arena import ARENA_BASE
from capture_cache.errors import CorruptBundle, CudaError
from capture_cache.restore import Parts
from graphs.keys import GraphKey, Ladder, NotCaptured
from kernels.triton.intake_rows import admit
from kernels.triton.rows import RowState
from runtime import Runtime, SamplingParams
from runtime.aside import Aside
from runtime.config import RuntimeConfig
from runtime.player import Player
from runtime.restore import NotRestored, check_golden, restore
from runtime.restored_keys import Keys
from runtime.row_params import admission
from tests.cpu.played import LADDER, OPTIONS, Gpu, publish_bundle

ROOT = Path(__file__).resolve().parents[2]


def options(root: Path, **changes: object) -> RuntimeConfig:
    return RuntimeConfig.of(**(OPTIONS | {"store": str(root)} | changes))


def test_a_bundle_is_played(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = Gpu()
    player = restore(options(tmp_path), lib=gpu)
    assert gpu.launched == ["fill", "publish"], "weights, then the golden step"
    assert "golden step of key 1 agrees" in player.load_reason
    with Runtime(player) as runtime:
        assert runtime.loaded_from == "bundle"
        runtime.add([1, 2, 3], SamplingParams(max_tokens=2))
        assert len(runtime.step()) == 0
        assert runtime.last_key == GraphKey(8, 2)
        assert len(runtime.step()) == 0
        player.keys.wait()
        assert sorted(map(str, player.keys.seconds)) == sorted(LADDER.split(","))
    assert not gpu.execs
    assert not gpu.graphs
    assert not gpu.libraries
    assert not gpu.mapped
    assert not gpu.reserved
    assert not gpu.pinned


def test_weights_and_table_are_filled(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    assert player.read("embed")[:4].tolist() == [0x11] * 4
    assert not player.read("embed")[4:].any()
    assert set(player.read("rope_table").tolist()) == {7}
    player.close()


def test_rows_begin_free(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    assert not player.read("phase").any()
    assert set(player.read("stop_ids").tolist()) == {0xFF}
    player.close()


def test_adopted_rows_are_what_the_device_would_have_made_of_them(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    params = SamplingParams(
        max_tokens=9,
        temperature=0.7,
        seed=1 << 40,
        stop_token_ids=(3, 4),
        stop_sequences=((5, 6), (7,)),
        logit_bias={8: 1.5, 9: -2.0},
    )
    wanted = admission(params, np.arange(5, dtype=np.int32), (3, 4), 1 << 40)
    places = player._arena.layout.by_name
    state = {}
    for name in RowState.names():
        entry = places[name].entry
        raw = torch.from_numpy(player.read(name))
        state[name] = raw.view(getattr(torch, entry.dtype)).view(entry.shape)
    admit(RowState.of(state), 1, torch.from_numpy(wanted.record))
    state["phase"][1], state["seq_len"][1], state["last_token"][1] = 2, 5, 0
    state["page_table"][1, 0] = 3
    player.adopt(5, {1: (wanted, [3])})
    for name in RowState.names():
        assert player.read(name).tolist() == state[name].view(torch.uint8).flatten().tolist(), name
    player.close()


def fake_views(gpu: Gpu, player: Player) -> dict[str, torch.Tensor]:
    """The weights in the fake GPU's memory, as torch sees a real one's."""
    views = {}
    for place in player._arena.layout.places:
        if place.entry.section == "weights":
            raw = gpu.at(player._arena.ptr(place.entry.name), place.nbytes)
            dtype = getattr(torch, place.entry.dtype)
            views[place.entry.name] = torch.from_numpy(raw).view(dtype).view(place.entry.shape)
    return views


def test_new_weights_in_a_restored_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the old ones were; a key that is built later plays on, its golden step not asked."""
    publish_bundle(tmp_path)
    gpu = Gpu()
    player = restore(options(tmp_path), lib=gpu)
    monkeypatch.setattr("runtime.player_weights.weight_views", lambda *_: fake_views(gpu, player))
    cfg = player.model_config
    norm = torch.arange(cfg.hidden_size, dtype=torch.float32)
    with Runtime(player) as runtime:
        before = {name: player.read(name) for name in ("embed", "final_norm")}
        with pytest.raises(ValueError, match="model.norm.weight: expected shape"):
            runtime.update_weights([("model.norm.weight", norm[1:])])
        assert (player.read("final_norm") == before["final_norm"]).all(), "nothing was changed"
        runtime.update_weights([("model.norm.weight", norm)])
        stored = norm.to(getattr(torch, player._arena.view_spec("final_norm").dtype))
        assert player.read("final_norm").tobytes() == stored.view(torch.uint8).numpy().tobytes()
        assert (player.read("embed") == before["embed"]).all()
        runtime.add([1, 2, 3], SamplingParams(max_tokens=2))
        runtime.step()
        player.keys.wait()
        assert sorted(map(str, player.keys.seconds)) == sorted(LADDER.split(","))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_new_weights_need_a_torch_that_sees_the_gpu(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    with Runtime(player) as runtime, pytest.raises(ValueError, match="torch .* sees no GPU here"):
        runtime.update_weights(str(tmp_path))


def test_skipped_weights_skip_the_golden_step_and_say_so(tmp_path: Path) -> None:
    publish_bundle(tmp_path, digest="00" * 32)
    gpu = Gpu()
    player = restore(options(tmp_path, weights="skip"), lib=gpu)
    assert gpu.launched == []
    assert "weights skipped" in player.load_reason
    player.close()


def test_a_key_that_is_not_in_the_ladder_is_refused(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    with pytest.raises(NotCaptured, match="key 3 was not captured"):
        player.replay(GraphKey(3, 3))
    player.close()


def test_every_key_has_a_golden_step(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    for key in player.ladder.keys:
        check_golden(player, key)
    player.close()


def test_keys_that_cannot_be_built_are_told_and_nothing_waits_for_good(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = Gpu()
    player = restore(options(tmp_path), lib=gpu)
    gpu.fail["cuGraphInstantiateWithFlags"] = 2
    with pytest.raises(CudaError, match="instantiating the graph of key 2"):
        player.keys.wait()
    with pytest.raises(CudaError, match="instantiating the graph of key 2"):
        player.check_alive()
    del gpu.fail["cuGraphInstantiateWithFlags"]
    player.replay(GraphKey(2, 2))  # who wants it builds it
    player.close()


def test_a_player_is_closed_while_keys_are_built(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    restore(options(tmp_path), lib=Gpu()).close()


class SlowGpu(Gpu):
    """Instantiation takes as long as the other thread could need."""

    def cuGraphInstantiateWithFlags(self, out: int, graph: int, flags: int) -> None:
        time.sleep(0.3)
        super().cuGraphInstantiateWithFlags(out, graph, flags)


def test_the_second_thread_makes_what_the_first_instantiates(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = SlowGpu()
    player = restore(options(tmp_path), lib=gpu)
    player.keys.wait()
    assert {"decode", "lay out", "nodes", "edges", "drop"} <= player.keys.ahead.seconds.keys()
    assert len(gpu.execs) == len(player.ladder.keys)
    assert not gpu.graphs, "each is dropped once it is instantiated"
    player.close()


def test_a_graph_that_the_second_thread_cannot_make_is_made_by_the_first(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = SlowGpu()
    player = restore(options(tmp_path), lib=gpu)
    ahead = player.keys.ahead.seconds
    gpu.fail["cuGraphCreate"] = 2
    deadline = time.monotonic() + 30
    while not ("lay out" in ahead or player.keys._failure) and time.monotonic() < deadline:
        time.sleep(0.001)
    gpu.fail.clear()
    try:
        player.keys.wait()
    except CudaError:  # the first thread was quicker than this test
        assert player.keys._failure is not None
    for key in player.ladder.keys:
        player.keys.exec_of(key)
    player.close()
    assert not gpu.graphs
    assert not gpu.execs


class Gated:
    """A driver that does nothing but note whose graph is instantiated, and that waits in key 2."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.gate = threading.Event()

    def instantiate(self, graph: int, doing: str) -> int:
        self.order.append(doing.removeprefix("instantiating the graph of key "))
        if self.order[-1] == "2":
            self.gate.wait(20)
        return len(self.order)

    def ignore(self, *_: object) -> None: ...

    make_current = upload_graph = drop_graph = drop_exec = ignore


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Unmade(Keys):
    def _make(self, key: GraphKey, parts: Parts) -> int:
        return key.tokens


def test_a_key_that_a_step_wants_is_the_next_to_be_built() -> None:
    nothing: Any = None
    driver: Any = Gated()
    ladder = Ladder([GraphKey(n, n) for n in range(1, 10)])
    keys = Unmade(driver, nothing, nothing, nothing, 0, ladder, {})
    keys.build_rest(pause_s=0.0)
    until(lambda: driver.order == ["1", "2"])
    step = Aside(lambda: keys.exec_of(ladder.keys[-1]))
    until(keys._next.locked)
    driver.gate.set()
    step.wait()
    keys.wait()
    keys.close()
    assert driver.order[:4] == ["1", "2", "9", "3"], driver.order


class Slow(Unmade):
    """The maker takes its time with key 2.

    Attributes:
        made: (key, whether by the maker).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.made: list[tuple[int, bool]] = []
        self.ready = threading.Event()

    def _make(self, key: GraphKey, parts: Parts) -> int:
        self.made.append((key.tokens, parts is self.ahead))
        if key.tokens == 2:
            self.ready.wait(20)
            if self.fails and parts is self.ahead:
                raise CorruptBundle("what the maker reads is damaged")
        return key.tokens

    fails = False


@pytest.mark.parametrize("fails", [False, True])
def test_a_key_that_is_being_made_is_not_made_again_unless_that_fails(fails: bool) -> None:
    nothing: Any = None
    driver: Any = Gated()
    ladder = Ladder([GraphKey(n, n) for n in range(2, 5)])
    keys = Slow(driver, nothing, nothing, nothing, 0, ladder, {})
    keys.fails = fails
    maker = Aside(lambda: keys._make_ahead(ladder.keys))
    keys._turns.release()
    until(lambda: (2, True) in keys.made)
    step = Aside(lambda: keys.exec_of(ladder.keys[0]))
    until(keys._lock.locked)
    time.sleep(0.1)
    assert not driver.order, "it waits for the maker"
    driver.gate.set()
    keys.ready.set()
    step.wait()
    keys.close()
    maker.wait()
    assert driver.order == ["2"]
    assert [by for key, by in keys.made if key == 2] == ([True, False] if fails else [True])


def test_the_first_key_is_made_while_the_builder_pauses() -> None:
    nothing: Any = None
    driver: Any = Gated()
    ladder = Ladder([GraphKey(n, n) for n in range(3, 7)])
    keys = Slow(driver, nothing, nothing, nothing, 0, ladder, {})
    keys.build_rest(pause_s=1.0)
    until(lambda: bool(keys.made))
    time.sleep(0.1)
    assert keys.made == [(3, True)], "one key ahead, no more"
    assert not driver.order, "the builder pauses"
    keys.wait()
    keys.close()
    assert driver.order == ["3", "4", "5", "6"]


def test_a_key_that_could_not_be_built_can_be_asked_for_again() -> None:
    nothing: Any = None
    driver: Any = Gated()
    keys = Unmade(driver, nothing, nothing, nothing, 0, Ladder([GraphKey(1, 1)]), {})

    def refuse(*_: object) -> None:
        raise CudaError("no", "uploading", "nothing")

    driver.upload_graph = refuse
    with pytest.raises(CudaError):
        keys.exec_of(GraphKey(1, 1))
    driver.upload_graph = driver.ignore
    assert keys.exec_of(GraphKey(1, 1)) == 2
    keys.close()


def test_no_thread_begins_while_a_step_may_follow_the_load(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    player = restore(options(tmp_path), lib=Gpu())
    player.keys.wait()
    k = player.keys
    keys = Keys(k._driver, k._code, k._files, k._symbols, k._stream, k._ladder, {})
    first = k._ladder.keys[0]
    keys.exec_of(first)
    keys.build_rest(pause_s=600.0)
    time.sleep(0.2)
    assert not keys.ahead.seconds
    assert list(keys.seconds) == [first]
    keys.close()
    player.close()


def test_a_graph_that_cannot_be_uploaded_is_dropped(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = Gpu()
    player = restore(options(tmp_path), lib=gpu)
    player.keys.wait()
    k, there = player.keys, dict(gpu.execs)
    keys = Keys(k._driver, k._code, k._files, k._symbols, k._stream, k._ladder, {})
    gpu.fail["cuGraphUpload"] = 2
    with pytest.raises(CudaError, match="uploading a graph"):
        keys.exec_of(k._ladder.keys[0])
    assert gpu.execs == there
    player.close()


def test_every_key_is_checked_before_the_load_returns_where_asked(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = Gpu()
    player = restore(options(tmp_path, check_keys="all"), lib=gpu)
    assert gpu.launched == ["fill", *["publish"] * 3], "one golden step a key"
    assert "golden steps of all 3 keys agree" in player.load_reason
    assert len(player.keys.seconds) == 3
    assert not player.read("phase").any()
    player.close()


def test_other_bits_in_a_later_key_are_found_where_every_key_is_checked(tmp_path: Path) -> None:
    publish_bundle(tmp_path, digest={"2": "ab" * 32})
    restore(options(tmp_path), lib=Gpu()).close()
    message = "golden step of key 2 gave .*, expected abab"
    refused(tmp_path, message, replace=True, check_keys="all")


def test_keys_cannot_be_checked_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="check_keys='all' needs weights"):
        options(tmp_path, weights="skip", check_keys="all")


def refused(
    root: Path, message: str, *, replace: bool, gpu: Gpu | None = None, **changes: object
) -> None:
    gpu = gpu or Gpu()
    with pytest.raises(NotRestored, match=message) as caught:
        restore(options(root, **changes), lib=gpu)
    assert caught.value.replace is replace
    assert not gpu.mapped, "what was acquired is given back"
    assert not gpu.libraries


def test_an_empty_store(tmp_path: Path) -> None:
    refused(tmp_path, "holds no bundle", replace=False)


def test_a_bundle_of_other_options(tmp_path: Path) -> None:
    publish_bundle(tmp_path, max_seq_len=256)
    refused(tmp_path, "max seq len 256 → 128", replace=False)


def test_a_bundle_that_is_live_only(tmp_path: Path) -> None:
    publish_bundle(tmp_path, kind="live")
    refused(tmp_path, "holds no graphs: the test says so", replace=False)


def test_other_bits_in_the_golden_step(tmp_path: Path) -> None:
    publish_bundle(tmp_path, digest="ab" * 32)
    refused(tmp_path, "golden step of key 1 gave .*, expected abab", replace=True)


@pytest.mark.parametrize("name", ["program", "graph/t1r1", "golden/t1r1", "graph/weights0"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    publish_bundle(tmp_path, drop=name)
    what = "pack them" if name == "graph/weights0" else f"expected a file {name}"
    refused(tmp_path, what, replace=name != "graph/weights0")


@pytest.mark.parametrize("name", ["program", "graph/t8r2", "golden/t1r1", "manifest.json"])
def test_a_flipped_bit(tmp_path: Path, name: str) -> None:
    path = publish_bundle(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(tmp_path, "expected sha256|JSON", replace=True)


def test_an_arena_elsewhere(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    refused(tmp_path, f"expected the arena at {ARENA_BASE:#x}", replace=False, gpu=Gpu(taken=True))


def test_code_that_the_driver_refuses(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    gpu = Gpu()
    gpu.code = {}
    refused(tmp_path, "loading the code of kernel publish", replace=True, gpu=gpu)


def test_no_such_device(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    refused(tmp_path, "no such device", replace=False, gpu=Gpu(devices=0))


def test_skipping_weights_is_for_restores_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights='skip' measures a restore, and nothing was"):
        load_module.load_engine(options(tmp_path, device="cpu", weights="skip"))


def test_a_twin_says_why_it_was_captured(tmp_path: Path) -> None:
    chosen = {"model": "tiny", "layers": 1, "bs": 2, "max_seq_len": 128, "ladder": "2"}
    with Runtime.load(**chosen, device="cpu", store=str(tmp_path), verify=False) as runtime:
        assert runtime.loaded_from == "capture"
        assert "CPU twin" in runtime.load_reason


PROGRAM = """
import json, sys
from runtime import Runtime, SamplingParams
from runtime.aside import Aside
from runtime.config import RuntimeConfig
from runtime.player import Player
from runtime.restore import restore
from runtime.restored_keys import Keys
from tests.cpu.played import Gpu
with Runtime(restore(RuntimeConfig.of(**json.loads(sys.argv[1])), lib=Gpu())) as runtime:
    runtime.add([1], SamplingParams(max_tokens=2))
    runtime.step()
import runtime.load
found = {"torch", "triton", "cuda"} & set(sys.modules)
assert not found, found
"""


def test_a_restore_imports_neither_torch_nor_triton(tmp_path: Path) -> None:
    publish_bundle(tmp_path)
    command = [sys.executable, "-c", PROGRAM, json.dumps(OPTIONS | {"store": str(tmp_path)})]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
