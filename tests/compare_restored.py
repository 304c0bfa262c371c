"""Compare what `tests.restore_program` printed in two runs, rank by rank.

python -m tests.compare_restored CAPTURED.txt RESTORED.txt
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def results(path: str) -> dict[int, dict[str, Any]]:
    """The reports in a log, by rank; other programs' prefixes are skipped."""
    found = {}
    for line in Path(path).read_text().splitlines():
        at = line.find("RESULT ")
        if at >= 0:
            report = json.loads(line[at + len("RESULT ") :])
            found[report["rank"]] = report
    return found


def main(argv: list[str]) -> int:
    captured, restored = results(argv[0]), results(argv[1])
    wrong = []
    if not captured or captured.keys() != restored.keys():
        wrong.append(f"ranks {sorted(captured)} captured, {sorted(restored)} restored")
    for rank in sorted(captured.keys() & restored.keys()):
        a, b = captured[rank], restored[rank]
        if (a["from"], b["from"]) != ("capture", "bundle"):
            wrong.append(f"rank {rank}: from {a['from']}, {b['from']}: {b['reason']}")
        if b["torch"] or b["triton"]:
            wrong.append(f"rank {rank}: torch or triton was imported")
        steps = [
            i for i, (x, y) in enumerate(zip(a["digests"], b["digests"], strict=True)) if x != y
        ]
        if steps:
            wrong.append(f"rank {rank}: differs from step {steps[0]} on")
        for report in (a, b):
            if report["keys"] != report["ladder"]:
                wrong.append(f"rank {rank}: keys {report['keys']} of {report['ladder']} were run")
        print(f"rank {rank}: {len(a['digests'])} steps, keys {a['keys']}")
    print("\n".join(wrong) or "restored equals captured")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
