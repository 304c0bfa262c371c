"""Barriers between CPU ranks, what a late rank is called, and the device code without a device."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from barriers.config import GroupConfig
from barriers.device_barrier import KINDS
from barriers.device_code import BARRIER_PARAMS, compile_barriers
from barriers.device_watch import STATE_AT, State
from barriers.errors import BarrierAborted, BarrierTimeout, StepMismatch
from barriers.group import RankGroup
from barriers.host_barrier import HostBarrier
from barriers.spawn import Outcome, run_ranks
from barriers.symmetric import CONTROL_BYTES, HostMemory
from barriers.watch import (
    ABORTED,
    DEADLINE,
    NO_LAYER,
    OPERATIONS,
    STEP_MISMATCH,
    Late,
    Record,
    Watch,
)
from capture_cache.errors import CudaError
from capture_cache.kernel import param_bytes
from capture_cache.nvrtc import nvrtc_version

DEADLINE_MS = 500
PARITIES = 2
FAULT_STEP = 20


# ------------------------------------------------------------------------ CPU ranks


def _litmus(config: GroupConfig, kind: str, rounds: int) -> int:
    """Every round each rank writes to its peers, waits, and counts what is not as it should be."""
    with RankGroup(config) as group:
        world, rank = group.world, group.rank
        memory = HostMemory(group, 8 * PARITIES * world)
        boxes = [memory.payload(r, np.int64).reshape(PARITIES, world) for r in range(world)]
        barrier = HostBarrier(memory, kind, deadline_ms=10_000)
        wrong = 0
        for i in range(rounds):
            for peer in range(world):
                boxes[peer][i % PARITIES, rank] = 1000 * i + rank
            barrier.wait(step=i)
            expected = 1000 * i + np.arange(world)
            wrong += int((boxes[rank][i % PARITIES] != expected).sum())
        group.barrier("done")
        return wrong


@pytest.mark.parametrize(("kind", "world"), [("tag", 3), ("epoch", 2)])
def test_what_peers_wrote_is_there_after_the_barrier(kind: str, world: int) -> None:
    outcomes = run_ranks(world, _litmus, kind, 400, timeout_s=40)
    assert [(o.value, o.error) for o in outcomes] == [(0, None)] * world


def _steps(config: GroupConfig, kind: str, victim: int, fault: str) -> int:
    """Two barriers a step; the victim kills itself, stops, or skips a step. Returns its steps."""
    group = RankGroup(config, {"model": "none"})
    barrier = HostBarrier(HostMemory(group, 64), kind, deadline_ms=DEADLINE_MS)
    step = 0
    try:
        while step < 2 * FAULT_STEP:
            if config.rank == victim and step == FAULT_STEP:
                if fault == "skip":
                    step += 1
                elif fault in ("kill", "stop"):
                    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
            barrier.wait(step=step, layer=7, operation="dispatch", opens_step=True)
            barrier.wait(step=step, layer=7, operation="combine")
            step += 1
    except (BarrierTimeout, StepMismatch) as e:
        began = time.monotonic()
        with pytest.raises(type(e)):
            barrier.wait(step=step)  # poisoned: at once
        assert time.monotonic() - began < 0.2
        raise
    finally:
        group.close()
    return step


def _survivors(outcomes: list[Outcome], victim: int) -> list[Outcome]:
    return [o for rank, o in enumerate(outcomes) if rank != victim]


@pytest.mark.parametrize(("fault", "state"), [("kill", "has ended"), ("stop", "is stopped")])
def test_survivors_name_a_rank_that_is_gone(fault: str, state: str) -> None:
    victim, name = 1, f"test-{os.getpid()}-{fault}"
    outcomes = run_ranks(3, _steps, "tag", victim, fault, timeout_s=40, linger_s=3, name=name)
    for outcome in _survivors(outcomes, victim):
        error = outcome.error
        assert isinstance(error, BarrierTimeout), outcome
        assert error.ranks == (victim,)
        place = f"waited 0.5 s in step {FAULT_STEP}, layer 7, dispatch"
        assert f"{place}: rank 1 is late (rank 1: process" in str(error)
        assert state in str(error)
    if fault == "stop":
        return
    # The same ranks meet at the same place again, at once.
    again = run_ranks(3, _steps, "tag", victim, "none", timeout_s=40, name=name)
    assert [(o.value, o.error) for o in again] == [(2 * FAULT_STEP, None)] * 3


def test_survivors_name_a_rank_that_skips_a_step() -> None:
    outcomes = run_ranks(3, _steps, "epoch", 2, "skip", timeout_s=40, linger_s=3)
    for outcome in _survivors(outcomes, 2):
        error = outcome.error
        assert isinstance(error, StepMismatch), outcome
        assert error.ranks == (2,)
        assert f"is in step {FAULT_STEP}, layer 7, dispatch" in str(error)
        assert f"rank 2 is in step {FAULT_STEP + 1}" in str(error)
    error = outcomes[2].error
    assert isinstance(error, StepMismatch)
    assert error.ranks == (0, 1)


def test_unknown_kind_and_deadline_are_refused() -> None:
    with RankGroup(GroupConfig(0, 1, "alone")) as group:
        memory = HostMemory(group, 8)
        with pytest.raises(ValueError, match="one of tag, epoch, got 'phase'"):
            HostBarrier(memory, "phase")
        with pytest.raises(ValueError, match="at least 1 ms"):
            HostBarrier(memory, deadline_ms=0)


# --------------------------------------------------------------------------- naming


def _late(stop: int, **changes: object) -> Late:
    fields = {"layer": 7, "operation": "combine", "ranks": (0, 3), "peer_step": 9, **changes}
    return Late(stop=stop, rank=2, step=812, waited_s=10.0, **fields)  # type: ignore[arg-type]


def test_the_sentence_of_a_deadline() -> None:
    error = _late(DEADLINE).failure()
    assert isinstance(error, BarrierTimeout)
    sentence = "rank 2 waited 10.0 s in step 812, layer 7, combine: ranks 0, 3 are late"
    assert str(error).startswith(sentence)


def test_the_sentence_outside_of_layers() -> None:
    error = _late(DEADLINE, layer=NO_LAYER, operation="head", ranks=(1,)).failure()
    assert str(error).startswith("rank 2 waited 10.0 s in step 812, head: rank 1 is late")


def test_the_sentence_of_another_step() -> None:
    error = _late(STEP_MISMATCH, ranks=(1,)).failure()
    assert isinstance(error, StepMismatch)
    assert str(error).startswith("rank 2 is in step 812, layer 7, combine: rank 1 is in step 9")


def test_processes_are_described() -> None:
    error = _late(ABORTED).failure(lambda ranks: f" (I know {list(ranks)})")
    assert isinstance(error, BarrierAborted)
    assert "(I know [0, 3])" in str(error)


def test_watch_reads_the_devices_record() -> None:
    record = Record()
    watch = Watch(record, rank=3, world=4)
    watch.check()
    record.layer, record.operation, record.step = 7, OPERATIONS.index("combine"), 812
    record.missing, record.waited_ns = 0b0110, 10_000_000_000  # slots 1 and 2 of rank 3
    watch.check()  # nothing is published yet
    record.stop = DEADLINE
    with pytest.raises(BarrierTimeout, match="ranks 0, 1 are late") as caught:
        watch.check()
    assert caught.value.ranks == (0, 1)


def test_watch_can_be_polled_a_million_times_a_second() -> None:
    watch = Watch(Record(), rank=0, world=2)
    began = time.perf_counter()
    for _ in range(10_000):
        watch.check()
    assert (time.perf_counter() - began) / 10_000 < 5e-6  # measured 0.1 us on a quiet core


# ---------------------------------------------------------------------- device code


def _need_nvrtc() -> None:
    try:
        nvrtc_version()
    except CudaError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_device_code_compiles_without_a_device(arch: str) -> None:
    _need_nvrtc()
    module = compile_barriers("barriers.cu", arch)  # its static_asserts compare the layouts
    assert set(module.kernels) == {f"barrier_{kind}" for kind in KINDS}
    for facts in module.kernels.values():
        assert facts.param_bytes == param_bytes(BARRIER_PARAMS)
        assert facts.local_bytes == 0, "spills"
        assert facts.registers <= 40


@pytest.mark.parametrize("spacing", [1, 8])
def test_the_benchmarks_kernels_compile(spacing: int) -> None:
    _need_nvrtc()
    module = compile_barriers("barrier_ab.cu", "sm_90", spacing=spacing)
    assert all(facts.local_bytes == 0 for facts in module.kernels.values())


def test_importing_it_loads_neither_torch_nor_a_driver() -> None:
    modules = "group spawn symmetric symmetric_device host_barrier device_barrier model"
    code = "; ".join(f"import barriers.{m}" for m in modules.split())
    code += "; import sys; print([m for m in ('torch', 'triton', 'cuda') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_control_block_holds_the_state() -> None:
    assert STATE_AT + ctypes.sizeof(State) <= CONTROL_BYTES


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_device_code_on_an_emulated_warp(tmp_path: Path) -> None:
    """cuda/barrier.cuh as it is, its lanes as threads; emulated_warp.cpp says what is checked."""
    here = Path(__file__).parent
    binary = tmp_path / "emulated_warp"
    build = ["g++", "-std=c++17", "-O1", "-pthread", "-Wno-unknown-pragmas", "-o", str(binary)]
    include = here.parents[1] / "barriers" / "cuda"
    subprocess.run([*build, f"-I{include}", str(here / "emulated_warp.cpp")], check=True)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
