"""One process that loads, runs each key, then random requests, and prints a digest of each step.

    python -m tests.restore_program OPTIONS STEPS        (or under torchrun, every rank alike)

OPTIONS is JSON for `Runtime.load`. The same options and seed must print the same digests, whether
the graphs were captured or restored: of tokens and log-probs, of alternatives, scores of prompts
and logits, for requests of any settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from graphs.keys import Ladder
from kernels.triton.state import mask_words
from runtime import Runtime, SamplingParams, StepOutput


def main(argv: list[str]) -> int:
    options, steps = json.loads(argv[0]), int(argv[1])
    rank = int(os.environ.get("RANK", "0"))
    runtime = Runtime.load(**options)
    rng = np.random.default_rng((7, rank))
    digests, whole, seen = [], hashlib.sha256(), set()
    for out in _steps(runtime, rng, steps):
        seen.add(str(runtime.last_key))
        for values in _values(out):
            whole.update(np.ascontiguousarray(values).tobytes())
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


def _values(out: StepOutput) -> Iterator[np.ndarray]:
    """Everything that a step gave, in an order of its own."""
    order = np.argsort(out.rows)
    yield from (values[order] for values in (out.rows, out.tokens, out.logprobs))
    yield out.finish_reasons[order].astype("S9")
    if out.top is not None:
        yield from (values[order] for values in (out.top.counts, out.top.ids, out.top.logprobs))
    for row in sorted(out.logits):
        yield out.logits[row]
    if out.prompt is not None:
        p = out.prompt
        order = np.lexsort((p.positions, p.rows))
        yield from (values[order] for values in (p.rows, p.positions, p.tokens, p.logprobs))
        if p.top is not None:
            yield from (values[order] for values in (p.top.counts, p.top.ids, p.top.logprobs))


def _settings(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Nothing at all, or anything that a request may ask for; seeded, and without a clock."""
    if rng.integers(4) == 0:
        return {}
    maybe: dict[str, Any] = {
        "temperature": float(rng.uniform(0.3, 2.0)),
        "top_k": int(rng.integers(1, 50)),
        "top_p": float(rng.uniform(0.3, 1.0)),
        "min_p": float(rng.uniform(0.0, 0.2)),
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {int(token): 2.0 for token in rng.integers(0, vocab, 4)},
        "logprobs": int(rng.integers(0, 21)),
        "logprobs_mode": "processed",
        "prompt_logprobs": int(rng.integers(0, 21)),
        "return_logits": True,
        "stop_sequences": [rng.integers(0, vocab, 1).tolist()],
        "stop_token_ids": rng.integers(0, vocab, 2).tolist(),
        "forced_tokens": rng.integers(0, vocab, 1).tolist(),
    }
    chosen = {name: value for name, value in maybe.items() if rng.integers(2)}
    return chosen | {"seed": int(rng.integers(2**63))}


def _add_some(runtime: Runtime, rng: np.random.Generator) -> None:
    longest = runtime.config.max_seq_len // 3
    while runtime.num_running < runtime.config.max_rows and rng.random() < 0.6:
        prompt = rng.integers(0, runtime.model_config.vocab_size, int(rng.integers(1, longest)))
        vocab = runtime.model_config.vocab_size
        settings = {"max_tokens": int(rng.integers(1, longest)), "ignore_eos": True}
        params = SamplingParams(**(settings | _settings(rng, vocab)))
        mask = rng.integers(-(2**31), 2**31, mask_words(vocab)).astype(np.int32)
        try:
            row = runtime.add(prompt, params)
        except RuntimeError:  # no pages left, or no room for logits: steps go on without
            break
        if rng.integers(4) == 0:
            runtime.set_token_mask(row, mask)
    if not runtime.num_running:
        runtime.add([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
