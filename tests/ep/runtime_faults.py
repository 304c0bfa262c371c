"""What happens to whole runtimes when one rank is killed, stopped, or does not take a step.

    python -m tests.ep.runtime_faults --world N [--device cpu|cuda] [--cases kill,stop,skip,reopen]
                                        [--transport auto|allgather]

One supervisor starts all ranks of each case, and right after it the same ranks again, at the same
meeting point and on the same GPUs, while a stopped victim is still there. Exit 0: every survivor
raised `BarrierTimeout` with the victim's number in time, closed, ended by that exception, and the
healthy run after it gave the tokens of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from barriers.errors import RankError
from runtime import Runtime, SamplingParams

ROOT = Path(__file__).resolve().parents[2]
CASES = ("healthy", "kill", "stop", "skip", "reopen")
DEADLINE_S = 1.5
STEPS, FAULT_STEP = 24, 10
CHILD_S = 120.0
MARK = "RESULT "


@dataclass
class Result:
    """What a rank tells the supervisor."""

    rank: int
    error: str = ""
    message: str = ""
    ranks: list[int] = field(default_factory=list)
    raised_after_s: float = 0.0  # from the last finished step to the exception
    closed_after_s: float = 0.0
    tokens: list[int] = field(default_factory=list)


def victim_of(world: int) -> int:
    return world - 1


# ------------------------------------------------------------------------------ a rank


def run_child(case: str, options: dict[str, Any]) -> None:
    """One rank; ends by the exception that it tells."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if case == "reopen":  # the first runtime fails; its process goes on with a second one
        first = Result(rank)
        with contextlib.suppress(RankError):
            _serve(rank, world, "skip", options, first)
        wanted = ("", []) if rank == victim_of(world) else ("BarrierTimeout", [victim_of(world)])
        if (first.error, first.ranks) != wanted:
            raise SystemExit(f"first runtime: expected {wanted}, got {first}")
        case = "healthy"
    result = Result(rank)
    try:
        _serve(rank, world, case, options, result)
    finally:
        print(MARK + json.dumps(asdict(result)), flush=True)


def _serve(rank: int, world: int, case: str, options: dict[str, Any], result: Result) -> None:
    runtime = Runtime.load("tiny", **options)
    last = time.monotonic()
    try:
        prompt = [(7 * rank + 3 * i) % 512 for i in range(20)]
        runtime.add(prompt, SamplingParams(max_tokens=STEPS - 4, ignore_eos=True))
        for step in range(STEPS):
            if rank == victim_of(world) and step == FAULT_STEP and case != "healthy":
                _fault(case, runtime, options)
                if case == "skip":
                    return
            result.tokens += runtime.step().tokens.tolist()
            last = time.monotonic()
    except RankError as e:
        result.error, result.message, result.ranks = type(e).__name__, str(e), list(e.ranks)
        result.raised_after_s = time.monotonic() - last
        raise
    finally:
        began = time.monotonic()
        runtime.close()
        result.closed_after_s = time.monotonic() - began


def _fault(case: str, runtime: Runtime, options: dict[str, Any]) -> None:
    if case == "kill" and options["device"] == "cuda":
        runtime.launch()  # a step takes less time than a thread takes to start
        os.kill(os.getpid(), signal.SIGKILL)
    elif case == "kill":  # in the middle of a later step: the main thread goes on
        threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
    elif case == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "skip":
        time.sleep(DEADLINE_S + 1.0)


# -------------------------------------------------------------------------- supervisor


class Supervisor:
    """Starts the ranks of one case after another and judges how they end."""

    def __init__(self, world: int, device: str, store: str, transport: str = "auto") -> None:
        self.world, self.victim = world, victim_of(world)
        self.options = {
            "bs": 4 * world,
            "max_seq_len": 128,
            "device": device,
            "store": store,
            "ladder": "1,4,4+32",
            "verify": False,
            "deadline_s": DEADLINE_S,
            "transport": transport,
        }
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._port = str(s.getsockname()[1])
        self._stopped: list[subprocess.Popen[str]] = []
        self._healthy: list[list[int]] | None = None
        self.failures: list[str] = []

    def run(self, cases: list[str]) -> list[str]:
        """Every case and a healthy one after it; returns what went wrong."""
        before = leftovers()
        try:
            for case in cases:
                self._case(case)
                if case not in ("healthy", "reopen"):
                    self._case("healthy")
        finally:
            for child in self._stopped:
                child.kill()
                child.wait()
        left = leftovers() - before
        if left:
            self.failures.append(f"left behind: {sorted(left)}")
        return self.failures

    def _case(self, case: str) -> None:
        children = [self._start(case, rank) for rank in range(self.world)]
        results: list[Result | None] = []
        end = time.monotonic() + CHILD_S
        for rank, child in enumerate(children):
            if rank == self.victim and case == "stop":
                self._stopped.append(child)
                results.append(None)
                continue
            try:
                out, err = child.communicate(timeout=max(1.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                out, err = child.communicate()
                self.failures.append(f"{case}, rank {rank}: no end within {CHILD_S} s")
            lines = [line[len(MARK) :] for line in out.splitlines() if line.startswith(MARK)]
            results.append(Result(**json.loads(lines[-1])) if lines else None)
            problem = self._judge(case, rank, child.returncode, results[-1])
            if problem:
                self.failures.append(f"{case}, rank {rank}: {problem}"[:400])
                print(f"{case}, rank {rank}:\n{out}\n{err}", file=sys.stderr, flush=True)
            self._tell(case, rank, results[-1])
        if case in ("healthy", "reopen"):
            self._compare([r.tokens if r else [] for r in results])

    def _start(self, case: str, rank: int) -> subprocess.Popen[str]:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
        env |= {"LOCAL_WORLD_SIZE": str(self.world), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self._port}
        words = ["--world", str(self.world), "--child", case, json.dumps(self.options)]
        return subprocess.Popen(
            [sys.executable, "-m", "tests.ep.runtime_faults", *words],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _judge(self, case: str, rank: int, code: int | None, result: Result | None) -> str | None:
        """What is wrong with how a rank ended, if anything."""
        is_victim = rank == self.victim
        if is_victim and case == "kill":
            return None if code == -signal.SIGKILL else f"the victim ended with {code}"
        if result is None:
            return f"ended with {code} and told nothing"
        if case in ("healthy", "reopen") or (is_victim and case == "skip"):
            fine = code == 0 and not result.error
            return None if fine else f"expected a clean end, got {code}: {result.message}"
        if result.error != "BarrierTimeout" or result.ranks != [self.victim]:
            return f"expected BarrierTimeout of rank {self.victim}, got {result}"
        if code != 1:
            return f"expected to end by the exception (exit 1), got {code}"
        if result.raised_after_s > DEADLINE_S + 1.0 or result.closed_after_s > 2.0:
            return f"raised after {result.raised_after_s:.2f} s, closed in {result.closed_after_s}"
        return None

    def _compare(self, tokens: list[list[int]]) -> None:
        if self._healthy is None:
            self._healthy = tokens
        elif tokens != self._healthy:
            self.failures.append(f"a healthy run gave other tokens: {tokens}, {self._healthy}")

    def _tell(self, case: str, rank: int, result: Result | None) -> None:
        if result is None:
            text = "ended without a word, as it should"
        elif result.error:
            text = f"after {result.raised_after_s:.2f} s: {result.message}"
        else:
            text = f"{len(result.tokens)} tokens"
        print(f"{case:8} rank {rank}: {text}", flush=True)


def leftovers() -> set[str]:
    """Names that outlive processes: shared memory and abstract sockets of ours."""
    names = {w for w in Path("/proc/net/unix").read_text().split() if w.startswith("@lockstep")}
    return names | {str(f) for f in Path("/dev/shm").glob("*lockstep*")}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.runtime_faults")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--transport", default="auto", help="auto, rdep or allgather")
    parser.add_argument("--store", help="default: a temporary one")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child[0], json.loads(args.child[1]))
        return 0
    with tempfile.TemporaryDirectory() as store:
        supervisor = Supervisor(args.world, args.device, args.store or store, args.transport)
        failures = supervisor.run(args.cases.split(","))
    print("\n".join(f"FAILED: {f}" for f in failures) or "all cases held")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
