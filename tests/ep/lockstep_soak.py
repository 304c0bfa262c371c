"""Whole runtimes, each rank with arrivals of its own: idle, prefilling and decoding side by side.

    torchrun --standalone --nproc-per-node N -m tests.ep.lockstep_soak [--steps 10000] [--model …]

Ranks share nothing but the number of steps. Each asks the same few prompts again and again, at
random moments and among random neighbours, with stretches in which it has nothing to do at all; on
a GPU every run of a prompt must give the bits of its first (the twin's bits hold within a key, so
there the tokens must). Exit 1 if one differs, or if some pattern of idle ranks never came.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from typing import Any

import numpy as np

from runtime import Runtime, SamplingParams

PROMPTS = 12
DEADLINE_S = 20.0


class Asker:
    """One rank's arrivals, and what came of them."""

    def __init__(self, runtime: Runtime, rank: int, *, exact: bool) -> None:
        self.runtime, self.exact = runtime, exact
        rng = np.random.default_rng(rank)
        vocab = runtime.model_config.vocab_size
        self.prompts = [rng.integers(0, vocab, n).tolist() for n in rng.integers(1, 60, PROMPTS)]
        self.lengths = [int(n) for n in rng.integers(1, 20, PROMPTS)]
        self.first: dict[int, list[Any]] = {}
        self.running: dict[int, tuple[int, list[Any]]] = {}
        self.compared = self.wrong = 0
        self._random = random.Random(rank)
        self._quiet = 0

    def step(self) -> bool:
        """Arrivals, then a step. Returns whether this rank had anything to do in it."""
        self._arrive()
        busy = self.runtime.num_running > 0
        out = self.runtime.step()
        bits = out.logprobs.view(np.int32).tolist() if self.exact else [0] * len(out.rows)
        for row, token, bit, ended in zip(
            out.rows.tolist(), out.tokens.tolist(), bits, out.finished.tolist(), strict=True
        ):
            prompt, got = self.running[row]
            got.append((token, bit))
            if ended:
                del self.running[row]
                self._compare(prompt, got)
        return busy

    def _arrive(self) -> None:
        if self._quiet > 0:
            self._quiet -= 1
            return
        if self._random.random() < 0.02:
            self._quiet = self._random.randrange(10, 60)  # long enough to run dry
        for _ in range(self._random.choice((0, 0, 0, 1, 1, 4))):
            if self.runtime.num_running == self.runtime.config.max_rows:
                return
            prompt = self._random.randrange(PROMPTS)
            params = SamplingParams(max_tokens=self.lengths[prompt], ignore_eos=True)
            self.running[self.runtime.add(self.prompts[prompt], params)] = (prompt, [])

    def _compare(self, prompt: int, got: list[Any]) -> None:
        want = self.first.setdefault(prompt, got)
        self.compared += want is not got
        self.wrong += want != got


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.lockstep_soak")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--store")
    args = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    options: dict[str, Any] = {
        "bs": 16 * world,
        "max_seq_len": 128,
        "device": args.device,
        "store": args.store,
        "ladder": "1,2,4,8,16,8+32,16+64",
        "verify": False,
        "deadline_s": DEADLINE_S,
    }
    options["bundle"] = False  # ranks compare notes through the group of a capturing engine
    if args.device == "cpu":
        options["overrides"] = ["dtype=float32"]
    patterns: Counter[int] = Counter()
    with Runtime.load(args.model, **options) as runtime:
        group = runtime.engine.ranks.group
        asker = Asker(runtime, group.rank, exact=args.device == "cuda")
        keys: Counter[str] = Counter()
        busy = []
        for _ in range(args.steps):
            busy.append(asker.step())
            keys[str(runtime.last_key)] += 1
        told = group.allgather("counts", [asker.compared, asker.wrong, dict(keys)])
        # A rank's busy steps as one number, to see which ranks were idle together.
        for at in range(0, args.steps, 2000):
            part = busy[at : at + 2000]
            word = hex(sum(1 << i for i, b in enumerate(part) if b))
            words = [int(p.value, 16) for p in group.allgather(f"busy {at}", word)]
            for i in range(len(part)):
                patterns[sum((w >> i & 1) << r for r, w in enumerate(words))] += 1
    compared, wrong = (sum(p.value[i] for p in told) for i in (0, 1))
    if group.rank == 0:
        print(f"keys by rank: {[p.value[2] for p in told]}")
        print(f"steps by busy ranks (bit r: rank r): {dict(sorted(patterns.items()))}")
        print(f"{compared} requests compared over {args.steps} steps, {wrong} differ")
    wanted = {0, (1 << world) - 1, *(1 << r for r in range(world))}
    wanted |= {((1 << world) - 1) ^ (1 << r) for r in range(world)}
    missing = sorted(wanted - set(patterns)) if args.steps >= 2000 else []
    if missing and group.rank == 0:
        print(f"FAILED: these patterns of busy ranks never came: {missing}")
    return int(bool(wrong) or not compared or bool(missing))


if __name__ == "__main__":
    sys.exit(main())
