"""One process that loads, runs each key, then random requests, and prints a digest of each step.

    python -m tests.restore_program OPTIONS STEPS        (or under torchrun, every rank alike)

OPTIONS is JSON for `Runtime.load`. The same options and seed must print the same digests, whether
the graphs were captured or restored.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator

import numpy as np

from graphs.keys import Ladder
from runtime import Runtime, SamplingParams, StepOutput


def main(argv: list[str]) -> int:
    options, steps = json.loads(argv[0]), int(argv[1])
    rank = int(os.environ.get("RANK", "0"))
    runtime = Runtime.load(**options)
    rng = np.random.default_rng((7, rank))
    digests, whole, seen = [], hashlib.sha256(), set()
    for out in _steps(runtime, rng, steps):
        seen.add(str(runtime.last_key))
        order = np.argsort(out.rows)
        for values in (out.rows, out.tokens, out.logprobs):
            whole.update(np.ascontiguousarray(values[order]).tobytes())
        digests.append(whole.hexdigest())
    report = {
        "rank": rank,
        "digests": digests,
        "keys": sorted(seen),
        "ladder": sorted(map(str, runtime.ladder.keys)),
        "from": runtime.loaded_from,
        "reason": runtime.load_reason,
        "torch": "torch" in sys.modules,
        "triton": "triton" in sys.modules,
        "stages": runtime.engine.stages,
    }
    runtime.close()
    sys.stdout.write("RESULT " + json.dumps(report) + "\n")
    sys.stdout.flush()
    return 0


def _steps(runtime: Runtime, rng: np.random.Generator, steps: int) -> Iterator[StepOutput]:
    """Steps of each key alone, then `steps` of random requests on all of them."""
    ladder = runtime.ladder
    for key in ladder.keys:
        runtime.ladder = Ladder([key])
        for _ in range(key.rows):
            token = rng.integers(0, runtime.model_config.vocab_size, 1)
            runtime.add(token, SamplingParams(max_tokens=2, ignore_eos=True))
        while runtime.num_running:
            yield runtime.step()
    runtime.ladder = ladder
    for _ in range(steps):
        _add_some(runtime, rng)
        yield runtime.step()


def _add_some(runtime: Runtime, rng: np.random.Generator) -> None:
    longest = runtime.config.max_seq_len // 3
    while runtime.num_running < runtime.config.max_rows and rng.random() < 0.6:
        prompt = rng.integers(0, runtime.model_config.vocab_size, int(rng.integers(1, longest)))
        params = SamplingParams(max_tokens=int(rng.integers(1, longest)), ignore_eos=True)
        try:
            runtime.add(prompt, params)
        except RuntimeError:  # no pages left: steps go on without
            break
    if not runtime.num_running:
        runtime.add([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
