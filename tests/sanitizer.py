"""Runs `tests.sanitized` under compute-sanitizer, or over fenced memory, and reads what they say.

Errors are counted by kernel. Those in kernels of ours fail the check; those in torch's or
flashinfer's are reported beside them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.guarded import UNCACHED
from tests.planted import EXPECTED

SANITIZER = "compute-sanitizer"
PLANTED = "planted"
CUDA_BIN = "/usr/local/cuda/bin"
# Options that not every release knows are left out where its help does not name them.
COMMON = (
    "--target-processes=application-only",
    "--report-api-errors=no",
    "--show-backtrace=no",
    "--print-limit=10000",
    "--kernel-name-exclude kns=at6native",  # torch's own: seen by everybody else
)
OPTIONS = {
    "memcheck": ("--padding=512", "--destroy-on-device-error=kernel", "--check-bulk-copy=yes"),
    "racecheck": ("--racecheck-report=analysis",),
    "synccheck": (),
}
REFUSED = ("Device not supported", "not supported on", "Unable to find", "InsufficientPermissions")
# What begins a finding of any tool, and the kernel that it is in.
FINDING = re.compile(
    r"^=+ +(?P<what>Invalid|Misaligned|Barrier error|Error: |Warning: |Race|Program hit|Illegal"
    r"|Out-of-range|Uninitialized|Internal)(?P<rest>.*)$"
)
AT = re.compile(r"\bat (?P<kernel>[A-Za-z_][\w:<>, ]*?)(\(.*?\))?\+0x[0-9a-f]+")
SUMMARY = re.compile(r"^=+ +((ERROR|RACECHECK) SUMMARY: .*)$", re.MULTILINE)


def findings(text: str) -> list[tuple[str, str]]:
    """(kernel, what) of every finding in a sanitizer's output; kernel "" where it names none."""
    found: list[tuple[str, str]] = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        match = FINDING.match(line)
        if match is None:
            continue
        what = (match["what"] + match["rest"]).strip()
        where = AT.search(line) or next(
            (at for later in _body(lines[i + 1 :]) if (at := AT.search(later))), None
        )
        found.append((where["kernel"].strip() if where else "", _plain(what)))
    return found


def _body(lines: Sequence[str]) -> Iterable[str]:
    """The lines that belong to a finding: up to the next one, or an empty one."""
    for line in lines:
        if FINDING.match(line) or not line.strip("= "):
            return
        yield line


def _plain(what: str) -> str:
    """Without addresses, so that equal findings are equal."""
    return re.sub(r"0x[0-9a-f]+", "…", re.sub(r"\b\d{4,}\b", "…", what))


def check(tool: str, names: Sequence[str], store: Path, *, timeout_s: float) -> dict[str, Any]:
    """Run one check; the report says what ran, what was found, and `exit`."""
    if tool == "fence":
        parts = [fence(side, names, store, timeout_s) for side in ("end", "start")]
        return {"tool": tool, "exit": max(p["exit"] for p in parts), "sides": parts}
    path = shutil.which(SANITIZER) or shutil.which(SANITIZER, path=CUDA_BIN)
    if path is None:
        return {"tool": tool, "exit": 2, "reason": f"no {SANITIZER} on PATH or in {CUDA_BIN}"}
    chosen = _known(path, (*COMMON, *OPTIONS[tool]))
    watched = [path, f"--tool={tool}", *(word for option in chosen for word in option.split(" "))]
    report: dict[str, Any] = {"tool": tool, "options": chosen}
    if tool in EXPECTED:
        ran, text = _sanitize(watched, [PLANTED], store, timeout_s)
        seen = sorted({kernel for kernel, _ in findings(text)})
        report["planted"] = seen
        if EXPECTED[tool] not in seen:
            tails = {"log_tail": text[-3000:], "stderr_tail": ran["errors"][-2000:]}
            return (
                report
                | tails
                | {
                    "exit": 2,
                    "reason": f"{tool} did not find {EXPECTED[tool]}: it sees nothing here",
                }
            )
    ran, text = _sanitize(watched, names, store, timeout_s)
    return report | verdict(ran, text)


def _sanitize(
    watched: Sequence[str], names: Sequence[str], store: Path, timeout_s: float
) -> tuple[dict[str, Any], str]:
    """What the program said, and what the tool did."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [*watched, f"--log-file={log}", *_program("own", names, store)]
        ran = _run(command, timeout_s, {UNCACHED: "1"})
        return ran, log.read_text(errors="replace") if log.exists() else ""


def verdict(ran: Mapping[str, Any], text: str) -> dict[str, Any]:
    """What a sanitizer's log and the program's own lines come to."""
    launched = _launched(ran["lines"])
    ours, others = Counter[str](), Counter[str]()
    for kernel, what in findings(text):
        # Without a kernel it is the tool that speaks: its errors count, its warnings do not.
        mine = kernel in launched if kernel else not what.startswith("Warning")
        (ours if mine else others)[f"{kernel or '?'}: {what}"] += 1
    done = any(line.get("done") for line in ran["lines"])
    refused = [r for r in REFUSED if r in text or r in ran["errors"]] if not launched else []
    exit_code = 2 if refused else int(bool(ours or not done or ran["overwritten"]))
    return _report(ran, launched, exit_code) | {
        "finished": done,
        "refused": refused,
        "ours": dict(ours),
        "others": dict(others),
        "summary": [m[0] for m in SUMMARY.findall(text)],
        "log_tail": "" if exit_code == 0 else text[-3000:],
    }


def fence(side: str, names: Sequence[str], store: Path, timeout_s: float) -> dict[str, Any]:
    """One side of every tensor against unmapped addresses."""
    planted = _run(_program(side, [PLANTED], store), timeout_s, {})
    found = [line["kernel"] for line in planted["lines"] if "fault" in line]
    if found != [EXPECTED["fence"]]:
        return {
            "side": side,
            "exit": 2,
            "reason": f"expected a fault in {EXPECTED['fence']}, got one in {found}",
            "stderr_tail": planted["errors"][-2000:],
        }
    ran = _run(_program(side, names, store), timeout_s, {})
    done = [line for line in ran["lines"] if line.get("done")]
    faults = [line for line in ran["lines"] if "fault" in line]
    exit_code = int(not done or bool(faults) or bool(ran["overwritten"]))
    report = _report(ran, _launched(ran["lines"]), exit_code)
    return {"side": side, "finished": bool(done), "faults": faults} | report


def _report(ran: Mapping[str, Any], launched: Mapping[str, int], exit_code: int) -> dict[str, Any]:
    cases = [line for line in ran["lines"] if "config" in line]
    return {
        "exit": exit_code,
        "cases": [f"{c['config']} {c['key']}" for c in cases if "skipped" not in c],
        "skipped": {f"{c['config']} {c['key']}": c["skipped"] for c in cases if "skipped" in c},
        "kernels": len(launched),
        "launches": dict(launched),
        "overwritten": ran["overwritten"],
        "seconds": ran["seconds"],
        "case_seconds": {f"{c['config']} {c['key']}": c.get("seconds") for c in cases},
        "rc": ran["rc"],
        "stderr_tail": "" if exit_code == 0 else ran["errors"][-2000:],
    }


def _launched(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    total = Counter[str]()
    for line in lines:
        if "config" in line:
            total.update(line.get("launches", {}))
    return dict(sorted(total.items()))


def _program(memory: str, names: Sequence[str], store: Path) -> list[str]:
    configs = f"--configs={','.join(names)}"
    return [sys.executable, "-m", "tests.sanitized", f"--memory={memory}", configs,
            f"--store={store}"]  # fmt: skip


def _run(command: Sequence[str], timeout_s: float, env: Mapping[str, str]) -> dict[str, Any]:
    """Run to the end or to the time-out; what was printed until then counts."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=os.environ | dict(env))
        try:
            rc: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            rc = f"killed after {timeout_s:.0f} s"
        out.seek(0)
        err.seek(0)
        lines, errors = list(_json_lines(out.read())), err.read()
    overwritten = {
        f"{line['config']} {line['key']}": line["overwritten"]
        for line in lines
        if line.get("overwritten")
    }
    seconds = round(time.perf_counter() - began, 1)
    return {
        "rc": rc, "lines": lines, "errors": errors, "overwritten": overwritten, "seconds": seconds,
    }  # fmt: skip


def _json_lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        if line.startswith("{") and line.endswith("}"):
            yield json.loads(line)


def _known(path: str, options: Sequence[str]) -> list[str]:
    """The options that this release of the tool has."""
    text = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout
    return [option for option in options if re.split("[= ]", option)[0] in text]
