"""One process that loads, answers, takes new weights, answers again, and prints digests of both.

    python -m tests.update_program OPTIONS        (or under torchrun, every rank alike)

OPTIONS is JSON for `Runtime.load`. The same options must print the same digests, whether the graphs
were captured or restored; ranks drain, pause and update together, with rows in different states.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys

import numpy as np
from numpy.typing import NDArray

from barriers.errors import RankError
from runtime import Runtime, SamplingParams

LENGTHS = (5, 70, 130)


def answers(runtime: Runtime, rank: int) -> str:
    """Digest of what some prompts get; ranks have more or fewer of them."""
    vocab, rng = runtime.model_config.vocab_size, np.random.default_rng(rank)
    got: dict[int, list[bytes]] = {}
    for n in LENGTHS[: 3 - rank % 3]:
        params = SamplingParams(max_tokens=12 + 9 * rank, ignore_eos=True)
        got[runtime.submit(rng.integers(0, vocab, n).tolist(), params)] = []
    for out in [runtime.step(), *runtime.drain(waiting=True)]:
        for i, request in enumerate(out.requests.tolist()):
            got[request].append(out.tokens[i].tobytes() + out.logprobs[i].tobytes())
    whole = hashlib.sha256()
    for said in got.values():
        whole.update(b"".join(said))
    return whole.hexdigest()


def new_weights(runtime: Runtime) -> list[tuple[str, NDArray[np.float32]]]:
    """The norms and the head, the same on every rank."""
    cfg, rng = runtime.model_config, np.random.default_rng(0)
    names = [f"model.layers.{i}.input_layernorm.weight" for i in range(cfg.num_layers)]
    norms = [(name, rng.uniform(0.5, 2, cfg.hidden_size)) for name in names]
    head = rng.normal(0, 0.05, (cfg.vocab_size, cfg.hidden_size))
    return [(n, a.astype(np.float32)) for n, a in [*norms, ("lm_head.weight", head)]]


def refused(runtime: Runtime, rank: int) -> str:
    """What it is told when the last rank alone has a value that is not finite."""
    world, pairs = runtime.config.ep_size, new_weights(runtime)
    if rank == world - 1:
        pairs[0][1][3] = np.nan
    try:
        runtime.update_weights(pairs)
    except (RankError, ValueError) as error:
        return str(error)
    return ""


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    with Runtime.load(**json.loads(argv[0])) as runtime:
        report = {"rank": rank, "from": runtime.loaded_from, "reason": runtime.load_reason}
        report["before"] = answers(runtime, rank)
        torch_before = "torch" in sys.modules
        runtime.pause()
        refusal = refused(runtime, rank)
        runtime.resume()
        again = answers(runtime, rank)
        runtime.update_weights(new_weights(runtime))
        report |= {"refusal": refusal, "again": again, "after": answers(runtime, rank)}
        report |= {"torch": torch_before, "steps": runtime.stats().steps}
    sys.stdout.write("RESULT " + json.dumps(report) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
