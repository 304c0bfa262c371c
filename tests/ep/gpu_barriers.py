"""What happens to GPU ranks when one of them is killed, stopped, skips a step or is elsewhere.

    torchrun --standalone --nproc-per-node N -m tests.ep.gpu_barriers
    python -m tests.ep.gpu_barriers --world N            # without torchrun

Each process given by torchrun supervises: for every case it starts the real rank as a child (the
child of one rank is the victim), and looks at how it ends. After each case the same ranks run a
healthy one, at once, at the same meeting point, while a stopped victim is still there. Exit 0:
every survivor named the victim in time and ended by that exception with an idle GPU, and nothing
was left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from barriers.config import GroupConfig
from barriers.device_barrier import DeviceBarrier
from barriers.device_code import compile_barriers, load_kernels
from barriers.device_watch import DeviceWatch
from barriers.errors import RankError
from barriers.group import RankGroup
from barriers.symmetric import CONTROL_BYTES
from barriers.symmetric_device import DeviceMemory
from bench.rank_harness import DeviceGraph, DeviceStream
from capture_cache.driver import Device, check, cuda

DEADLINE_MS = 1000
LAYERS = 30
STEPS = 40
LONG_STEPS = 50_000  # more than a victim that is killed can have queued
QUEUED = 500  # steps in its queue when it is killed: it dies in the middle of one
FAULT_STEP = 20
WORDS = 512
SCRATCH_BYTES = 4096
CHILD_S = 45.0  # for one case
MARK = "RESULT "
# case → what survivors end with: exception, step (None: any), operation; None: nothing
CASES: dict[str, tuple[str, int | None, str] | None] = {
    "healthy": None,
    "kill": ("BarrierTimeout", None, ""),
    "stop": ("BarrierTimeout", FAULT_STEP, "step"),
    "skip": ("BarrierTimeout", STEPS - 1, "step"),
    "elsewhere": ("StepMismatch", FAULT_STEP, "step"),
    "abort": ("BarrierAborted", FAULT_STEP, "step"),
    "reopen": None,
}
_EXCHANGE = ("ptr", "i64", "i32", "i64", "i32", "i32", "ptr", "i32", "i32", "ptr")


@dataclass
class Result:
    """What a child tells its supervisor."""

    case: str
    rank: int
    error: str = ""
    message: str = ""
    ranks: tuple[int, ...] = ()
    raised_after_s: float = 0.0  # from the last finished step to the exception
    idle_after_s: float = 0.0  # from there until its GPU was idle
    wrong_words: int = 0
    steps: int = 0


class Runtime:
    """A rank's stand-in for a runtime: one graph a step, two barriers a layer, checked payloads."""

    def __init__(self, config: GroupConfig, device: Device, *, deadline_ms: int) -> None:
        self.group = RankGroup(config, {"test": "gpu_barriers", "layers": str(LAYERS)})
        world = self.group.world
        self.memory = DeviceMemory(self.group, device, SCRATCH_BYTES + 8 * world * WORDS)
        self.watch = DeviceWatch(self.memory, deadline_ms=deadline_ms)
        self.stream = DeviceStream()
        self.barrier = DeviceBarrier(self.memory)
        module = compile_barriers("barrier_ab.cu", device.arch)
        exchange = load_kernels(device, module, {"exchange": _EXCHANGE}, num_warps=8)
        advance = load_kernels(device, module, {"advance": ("ptr", "i32", "ptr")})
        self._exchange, self._advance = exchange["exchange"], advance["advance"]
        self._round = self.memory.payload
        self._errors = self.memory.payload + 16
        self.graph: DeviceGraph | None = self.stream.capture(self._launch_step)
        self.group.barrier("all are captured")

    def _launch_step(self) -> None:
        memory, group, stream = self.memory, self.group, self.stream.handle
        inbox = CONTROL_BYTES + SCRATCH_BYTES
        where = (memory.base, memory.stride, group.world, inbox, WORDS, group.rank)
        self.barrier.launch(stream, operation="step", opens_step=True)
        for layer in range(LAYERS):
            values = (*where, self._round, layer, 0, self._errors)
            self._exchange.launch((WORDS // 256, group.world - 1), values, stream)
            self.barrier.launch(stream, layer=layer, operation="dispatch")
            self.barrier.launch(stream, layer=layer, operation="combine")
        self.advance(LAYERS)

    def advance(self, rounds: int) -> None:
        values = (self._round, rounds, self.watch.step_address)
        self._advance.launch((1,), values, self.stream.handle)

    def step(self) -> None:
        """Launch one step and wait for it."""
        assert self.graph is not None
        self.graph.launch()
        self.wait()

    def wait(self) -> None:
        self.stream.wait("a step", DEADLINE_MS / 1000 + 10, self.watch)

    def wrong_words(self) -> int:
        cu, value = cuda(), ctypes.c_uint64()
        at = cu.CUdeviceptr(self._errors)
        check(cu.cuMemcpyDtoH(ctypes.addressof(value), at, 8), "reading the errors")
        return value.value

    def close(self) -> None:
        if self.graph is not None:
            self.graph.close()
            self.graph = None
        self.barrier.close()
        self.watch.close()
        self.memory.close()
        self.stream.close()
        self.group.close()


# ------------------------------------------------------------------------------ a rank


def victim_of(world: int) -> int:
    return world // 2


def run_child(case: str) -> None:
    """One rank of one case; ends by the exception that it tells."""
    config = GroupConfig.from_env(os.environ, timeout_s=30.0)
    device = Device(int(os.environ["LOCAL_RANK"]))
    if case == "reopen":  # the first runtime fails, its process goes on with a second one
        with contextlib.suppress(RankError):
            _run_steps(config, device, "skip")
        config = replace(config, name=f"{config.name}/again")
    _run_steps(config, device, "healthy" if case == "reopen" else case)
    device.close()


def _run_steps(config: GroupConfig, device: Device, case: str) -> None:
    is_victim = config.rank == victim_of(config.world)
    deadline_ms = 30_000 if case == "abort" else DEADLINE_MS
    runtime = Runtime(config, device, deadline_ms=deadline_ms)
    result = Result(case, config.rank)
    last = time.monotonic()
    try:
        for step in range(LONG_STEPS if case == "kill" else STEPS):
            if step == FAULT_STEP and is_victim:
                _fault(case, runtime)
            if step == FAULT_STEP and case == "abort":
                threading.Timer(0.3, runtime.watch.abort).start()
            if is_victim and case == "skip" and step == STEPS - 1:
                time.sleep(deadline_ms / 1000 + 1.0)  # the others wait for its last step
                break
            runtime.step()
            result.steps, last = step + 1, time.monotonic()
        result.wrong_words = runtime.wrong_words()
    except RankError as e:
        result.error, result.message, result.ranks = type(e).__name__, str(e), e.ranks
        result.raised_after_s = time.monotonic() - last
        raise
    finally:
        began = time.monotonic()
        runtime.stream.wait("running dry", DEADLINE_MS / 1000 + 5)
        result.idle_after_s = time.monotonic() - began
        runtime.close()
        print(MARK + json.dumps(asdict(result)), flush=True)


def _fault(case: str, runtime: Runtime) -> None:
    if case == "kill":
        assert runtime.graph is not None
        for _ in range(QUEUED):
            runtime.graph.launch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "elsewhere":
        runtime.advance(0)  # its step number goes on without a step
    elif case == "abort":
        time.sleep(2.0)  # the others stop waiting for it
        raise SystemExit(0)


# -------------------------------------------------------------------------- supervisors


class Supervisor:
    """Starts one rank's children, case by case, together with the other supervisors."""

    def __init__(self, config: GroupConfig) -> None:
        meeting = replace(config, name=f"{config.name}/supervisors", timeout_s=CHILD_S + 30)
        self.group = RankGroup(meeting)
        self.rank, self.world = config.rank, config.world
        self.stopped: list[subprocess.Popen[str]] = []
        self.failures: list[str] = []

    def run(self, cases: list[str]) -> int:
        before = _leftovers()
        for case in cases:
            self._one(case)
            if CASES[case] is not None:
                self._one("healthy")  # at once, at the same meeting point
        for child in self.stopped:
            child.kill()
            child.wait()
        self.group.barrier("all children have ended")
        time.sleep(0.5)
        left = _leftovers() - before - {_abstract(self.group)}
        if left:
            self.failures.append(f"left behind: {sorted(left)}")
        parts = self.group.allgather("verdict", self.failures[:8])
        failures = [f for p in parts for f in p.value]
        if self.rank == 0:
            print(_gpus())
            print("\n".join(f"FAILED: {f}" for f in failures) or "all cases held")
        self.group.close()
        return int(bool(failures))

    def _one(self, case: str) -> None:
        self.group.barrier(f"case {case}")
        is_victim = self.rank == victim_of(self.world)
        command = [sys.executable, "-m", "tests.ep.gpu_barriers", "--child", case]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output = errors = ""
        if is_victim and case == "stop":
            self.stopped.append(child)  # stays until the end
        else:
            try:
                output, errors = child.communicate(timeout=CHILD_S)
            except subprocess.TimeoutExpired:
                child.kill()
                output, errors = child.communicate()
                self.failures.append(f"rank {self.rank}, {case}: no end within {CHILD_S} s")
        lines = [ln[len(MARK) :] for ln in output.splitlines() if ln.startswith(MARK)]
        result = Result(**json.loads(lines[-1])) if lines else None
        problem = self._judge(case, is_victim, child.returncode, result)
        if problem:
            self.failures.append(f"rank {self.rank}, {case}: {problem}"[:300])
            print(f"rank {self.rank}, {case}:\n{output}\n{errors}", file=sys.stderr, flush=True)
        elif result is not None:
            text = (
                f"after {result.raised_after_s:.2f} s: {result.message}" if result.error else "ok"
            )
            print(f"rank {self.rank}, {case:9}: {text}", flush=True)

    def _judge(
        self, case: str, is_victim: bool, code: int | None, result: Result | None
    ) -> str | None:
        """What is wrong with how a child ended, if anything."""
        expected = CASES[case]
        if is_victim and case in ("kill", "stop", "abort"):
            want = {"kill": -signal.SIGKILL, "stop": None, "abort": 0}[case]
            return None if code == want else f"the victim ended with {code}, not {want}"
        if result is None:
            return f"ended with {code} and told nothing"
        if result.wrong_words:
            return f"{result.wrong_words} wrong words"
        if expected is None or (is_victim and case == "skip"):
            fine = code == 0 and not result.error
            return None if fine else f"expected a clean end, got {code}, {result.message}"
        return _judge_survivor(expected, is_victim, self.world, code, result)


def _judge_survivor(
    expected: tuple[str, int | None, str],
    is_victim: bool,
    world: int,
    code: int | None,
    result: Result,
) -> str | None:
    error, step, operation = expected
    victim = victim_of(world)
    blamed = tuple(r for r in range(world) if r != victim) if is_victim else (victim,)
    limit_s = 1.3 if error == "BarrierAborted" else DEADLINE_MS / 1000 + 1.0
    if result.error != error:
        return f"expected {error}, got {result.error or 'nothing'}: {result.message}"
    if tuple(result.ranks) != blamed:
        return f"expected ranks {blamed} to be named, got {result.ranks}"
    if step is not None and not is_victim and f"in step {step}" not in result.message:
        return f"expected step {step}, got {result.message}"
    if operation and operation not in result.message:
        return f"expected operation {operation!r}, got {result.message}"
    if code != 1:
        return f"expected to end by the exception (exit 1), got {code}"
    if result.raised_after_s > limit_s:
        return f"raised after {result.raised_after_s:.2f} s, later than {limit_s} s"
    if result.idle_after_s > 0.5:
        return f"its GPU was busy for {result.idle_after_s:.2f} s more"
    return None


def _leftovers() -> set[str]:
    """Names that outlive processes: shared memory, temporary files of ours, abstract sockets."""
    sockets = Path("/proc/net/unix").read_text().split()
    names = {w for w in sockets if w.startswith("@lockstep")}
    for folder in (Path("/dev/shm"), Path("/tmp")):
        names |= {str(f) for f in folder.glob("*lockstep*")}
    return names


def _abstract(group: RankGroup) -> str:
    """The supervisors' own name, should a socket of theirs still show it."""
    from barriers.packets import address_of

    return "@" + address_of(group.config.name)[1:].decode()


def _gpus() -> str:
    """What the GPUs do, for the reader; not judged, since others may use them."""
    query = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"GPUs at the end: unknown ({e})"
    return f"GPUs at the end (index, busy, memory):\n{done.stdout.strip()}"


@contextlib.contextmanager
def _own_supervisors(world: int, argv: list[str]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """What torchrun would start."""
    port = str(20_000 + os.getpid() % 20_000)
    started = []
    try:
        for rank in range(world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            command = [sys.executable, "-m", "tests.ep.gpu_barriers", *argv]
            started.append(subprocess.Popen(command, env=env))
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.ep.gpu_barriers", description=__doc__)
    parser.add_argument("--world", type=int, help="start this many supervisors, without torchrun")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases: list[Any] = args.cases.split(",")
    unknown = [c for c in cases if c not in CASES]
    if unknown:
        parser.error(f"no such cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.child:
        run_child(args.child)
        return 0
    if args.world:
        with _own_supervisors(args.world, ["--cases", args.cases]) as started:
            return max(abs(process.wait()) for process in started)
    config = GroupConfig.from_env(os.environ, timeout_s=60.0)
    if config.world < 2:
        parser.error("expected ranks: start with torchrun --nproc-per-node N, or give --world N")
    return Supervisor(config).run(cases)


if __name__ == "__main__":
    sys.exit(main())
