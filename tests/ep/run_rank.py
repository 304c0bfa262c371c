"""One rank of a run on the CPU or a GPU: decodes its share of some prompts, prints tokens as JSON.

Started by tests with torchrun's environment. Arguments: model, options as JSON, prompts as JSON,
steps. Gaps are from the best log-prob to the second, nats.
"""

from __future__ import annotations

import json
import os
import sys

from runtime import Runtime, SamplingParams


def main(model: str, options: str, prompts: str, steps: str) -> None:
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    mine = {i: p for i, p in enumerate(json.loads(prompts)) if i % world == rank}
    tokens: dict[int, list[int]] = {i: [] for i in mine}
    logprobs: dict[int, list[float]] = {i: [] for i in mine}
    gaps: dict[int, list[float]] = {i: [] for i in mine}
    with Runtime.load(model, **json.loads(options)) as rt:
        waiting, running = dict(mine), {}
        for step in range(int(steps)):
            # Uneven arrivals: ranks are idle, prefill and decode in the same step.
            if waiting and rt.num_running < rt.config.max_rows and (step + rank) % 3 == 0:
                i = next(iter(waiting))
                params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
                running[rt.add(waiting.pop(i), params)] = i
            out = rt.step()
            best = out.top.logprobs.tolist() if out.top is not None else []
            for row, token, logprob, done, (first, second) in zip(
                out.rows.tolist(),
                out.tokens.tolist(),
                out.logprobs.tolist(),
                out.finished.tolist(),
                best,
                strict=True,
            ):
                tokens[running[row]].append(token)
                logprobs[running[row]].append(logprob)
                gaps[running[row]].append(first - second)
                if done:
                    del running[row]
        assert not waiting, "raise the number of steps"
        assert not running, "raise the number of steps"
    told = {"rank": rank, "tokens": tokens, "logprobs": logprobs, "gaps": gaps}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
