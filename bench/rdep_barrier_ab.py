"""Barriers between the GPUs of one node, side by side: right first, then how fast.

    torchrun --standalone --nproc-per-node N -m bench.rdep_barrier_ab [--json] [--replays 100000]

Checks: in every replay each rank writes values made from the round to its peers, passes the
barrier, and its peers compare them on the device; the phase barrier must be seen to fail at that
under replay. Times: eager, in a graph, in a graph with work in between that needs the peers' data,
and in one kernel; torch's symmetric-memory barrier and NCCL's 16-byte all-reduce in the same run.

Every wait has a deadline, and the whole run one: what was measured until then is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from barriers.config import GroupConfig
from barriers.errors import RankError
from barriers.group import RankGroup
from bench.barrier_cases import FLIGHT, NODE, BarrierCases
from bench.barrier_others import time_others
from capture_cache.command import error_line, exit_code
from capture_cache.driver import Device, driver_version
from capture_cache.errors import CudaError
from capture_cache.nvrtc import nvrtc_version
from runtime.rank_command import command
from runtime.report import provenance

Results = dict[str, dict[str, Any]]
_OTHERS_S = 12.0  # for torch and NCCL, beyond the limit of our own cases


def judge(results: Results) -> list[str]:
    """What is wrong; empty if every check held."""
    wrong = []
    checks = {n: r for n, r in results.items() if n.startswith("litmus") or n == "phase, eager"}
    for name, result in checks.items():
        if "error" in result:
            wrong.append(f"{name}: did not finish")
        elif result["errors"]:
            wrong.append(f"{name}: {result['errors']:.0f} wrong words")
    if not checks:
        wrong.append("nothing was checked")
    if not results.get("phase under replay", {}).get("errors"):
        wrong.append("phase under replay: expected to fail, was not seen to")
    return wrong


def floor_us(results: Results) -> float | None:
    """An empty node and one flight over the link: what no barrier of its own node can beat."""
    parts = [results.get(name, {}).get("one_us") for name in (NODE, FLIGHT)]
    return None if None in parts else round(sum(p for p in parts if p is not None), 3)


def table(results: Results) -> str:
    lines = [f"{'case':36} {'us':>8} {'max':>8} {'added':>8}  checks"]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"{name:36} {r['error']}")
            continue
        cells = [r.get("one_us", r.get("replay_us")), r.get("one_us_max", r.get("replay_us_max"))]
        shown = [f"{c:8.3f}" if c is not None else f"{'-':>8}" for c in (*cells, r.get("added_us"))]
        checks = f"{r['errors']:.0f} wrong words" if "errors" in r else ""
        if "replays" in r:
            checks += f" in {r['replays']:.0f} replays"
        lines.append(f"{name:36} {' '.join(shown)}  {checks}")
    return "\n".join(lines)


def report(about: dict[str, Any], results: Results, args: argparse.Namespace) -> int:
    """Print the table, the verdict and the JSON; returns the exit code."""
    wrong = judge(results)
    floor = floor_us(results)
    everything = {**about, "floor_us": floor, "wrong": wrong, "results": results}
    print(f"{about['world']} ranks on {about['device']}, commit {about['commit']}")
    print(table(results))
    print(f"floor (an empty node and one flight): {floor} us")
    print("\n".join(f"WRONG: {w}" for w in wrong) or "every check held")
    if args.out:
        Path(args.out).write_text(json.dumps(everything, indent=1) + "\n")
    if args.json:
        print(json.dumps(everything))
    sys.stdout.flush()
    return int(bool(wrong))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command("bench.rdep_barrier_ab", __doc__)
    parser.add_argument("--replays", type=int, default=100_000, help="of the payload litmus")
    parser.add_argument("--deadline-ms", type=int, default=2000, help="of every wait")
    parser.add_argument("--limit-s", type=float, default=40.0, help="no case starts after this")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch and NCCL")
    parser.add_argument("--shared-gpu", action="store_true", help="let ranks share a GPU (a test)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--out", help="write the JSON to this file, too")
    args = parser.parse_args(argv)
    if args.replays < 1 or args.deadline_ms < 1 or args.limit_s <= 0:
        parser.error("--replays, --deadline-ms and --limit-s must be positive")
    return args


def alike(args: argparse.Namespace) -> dict[str, str]:
    """Options that decide which cases a rank comes to and how long it waits there."""
    names = ("replays", "deadline_ms", "limit_s", "no_torch", "shared_gpu")
    return {f"--{name.replace('_', '-')}": str(getattr(args, name)) for name in names}


def open_together(group: RankGroup, ordinal: int) -> Device:
    """This rank's GPU; raises RankError on all ranks, with the reason, where one has none."""
    device, error = None, None
    try:
        device = Device(ordinal)
    except CudaError as e:
        error = str(e)
    group.agree("opening the GPU", error)
    assert device is not None
    return device


def main(argv: list[str] | None = None) -> int:
    args, began = parse(argv), time.monotonic()
    try:
        config = GroupConfig.from_env(os.environ, timeout_s=40.0)
    except (ValueError, RankError) as e:
        print(error_line(e), file=sys.stderr)
        return exit_code(e)
    if config.world < 2:
        print(
            "error: expected ranks, got one; start with torchrun --nproc-per-node N",
            file=sys.stderr,
        )
        return 2
    try:
        group = RankGroup(config, alike(args))
        ordinal = 0 if args.shared_gpu else int(os.environ.get("LOCAL_RANK", config.rank))
        device = open_together(group, ordinal)
        cases = BarrierCases(
            group,
            device,
            replays=args.replays,
            deadline_ms=args.deadline_ms,
            began=began,
            limit_s=args.limit_s,
            shared_gpu=args.shared_gpu,
        )
    except (RankError, CudaError) as e:
        print(error_line(e), file=sys.stderr)
        return exit_code(e)
    return _run(cases, args)


def _run(cases: BarrierCases, args: argparse.Namespace) -> NoReturn:
    """Run everything and end the process."""
    group, results = cases.group, cases.bench.results
    about = {
        **provenance(cases.device.name),
        "world": group.world,
        "driver": driver_version(),
        "nvrtc": ".".join(map(str, nvrtc_version())),
    }

    def end(code: int) -> NoReturn:
        # Without the tear-down of libraries, which may wait for other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def out_of_time() -> None:
        results["the run"] = {"error": "did not end in time"}
        if group.rank == 0:
            report(about, results, args)
        end(1)  # a library's wait cannot be ended otherwise

    last_resort = threading.Timer(args.limit_s + _OTHERS_S, out_of_time)
    last_resort.daemon = True
    last_resort.start()
    try:
        cases.run()
        if not args.no_torch:
            group.barrier("others' barriers")
            results.update(time_others(cases.device.ordinal))
    except Exception as e:  # what was measured until then is worth printing
        results["the run"] = {"error": f"ended early: {type(e).__name__}: {e}"[:500]}
    last_resort.cancel()
    end(report(about, results, args) if group.rank == 0 else 0)


if __name__ == "__main__":
    sys.exit(main())
