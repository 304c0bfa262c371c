"""One rank of `runtime.restore_bench` on the fake GPU, or one of the processes that it starts.

python -m tests.cpu.restored_rank OPTIONS              runs twice, prints what came of it
python -m tests.cpu.restored_rank OPTIONS NS OPENING   as runtime.restore_child
python -m tests.cpu.restored_rank NS GPU               as runtime.bare_driver
"""

from __future__ import annotations

import json
import sys

from runtime.bare_driver import main as bare
from runtime.config import RuntimeConfig
from runtime.restore_child import main as child
from runtime.restore_runs import Runs
from tests.cpu.played import Gpu


def main(argv: list[str]) -> int:
    if len(argv) == 2:
        return bare(argv, lib=Gpu(devices=2))
    if len(argv) > 1:
        return child(argv, lib=Gpu(devices=2))
    options = RuntimeConfig.of(**json.loads(argv[0]))
    program = (sys.executable, "-m", "tests.cpu.restored_rank")
    with Runs(options.ranks, program, bare=program) as runs:
        found = [runs.process(options) for _ in range(2)]
        alone = runs.bare_driver(options)
        store = runs.empty_store()
        assert not list(store.iterdir())
    print("RUNS " + json.dumps([found, str(store), alone]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
