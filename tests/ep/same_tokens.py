"""Whole runtimes on several ranks give the tokens of one rank, on GPUs or on the twin.

    python -m tests.ep.same_tokens --worlds 2,4 [--device cuda] [--dtypes float32,bfloat16]

It starts the ranks itself. Each prompt's greedy tokens must be those of one rank, up to one where
that rank's two best tokens were closer than the bound (ranks add partial sums in another order, so
what is as good as tied may turn); log-probs of the same text must be within it, too. Exit 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (3, 70, 17, 1, 40, 9, 33, 5)
STEPS, CHILD_S = 100, 150.0
# Nats; median of all differences, greatest gap at which texts may part. In float32 only the order
# of sums differs; in bf16 one rounding may choose another of two experts that are as good as tied.
BOUNDS = {"float32": (1e-5, 1e-3), "bfloat16": (0.05, 1.0)}
Answers = dict[str, dict[str, list[float]]]


def decode(world: int, options: dict[str, Any]) -> Answers:
    """Tokens, log-probs and gaps by prompt, from `world` processes."""
    rng = np.random.default_rng(0)
    prompts = json.dumps([rng.integers(0, 512, n).tolist() for n in LENGTHS])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(world):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        words = ["tests.ep.run_rank", "tiny", json.dumps(options), prompts, str(STEPS)]
        command = [sys.executable, "-m", *words]
        children.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE))
    answers: Answers = {"tokens": {}, "logprobs": {}, "gaps": {}}
    try:
        for child in children:
            out, _ = child.communicate(timeout=CHILD_S)
            if child.returncode:
                raise SystemExit(f"a rank of {world} ended with {child.returncode}")
            told = json.loads(out.splitlines()[-1])
            for name, values in answers.items():
                values |= told[name]
    finally:
        for child in children:
            child.kill()
    return answers


def compare(one: Answers, several: Answers, dtype: str) -> tuple[str, list[str]]:
    """What was found, and what is wrong with it."""
    median_bound, most = BOUNDS[dtype]
    wrong, moved, partings, same = [], [], [], 0
    for prompt, tokens in one["tokens"].items():
        got = several["tokens"].get(prompt, [])
        if len(got) != len(tokens):
            wrong.append(f"prompt {prompt}: {len(got)} tokens, expected {len(tokens)}")
            continue
        for i, token in enumerate(tokens):
            if got[i] != token:
                partings.append(one["gaps"][prompt][i])
                break
            moved.append(abs(several["logprobs"][prompt][i] - one["logprobs"][prompt][i]))
            same += 1
    total = sum(len(t) for t in one["tokens"].values())
    median, gap = float(np.median(moved)), max(partings, default=0.0)
    if not (median <= median_bound and gap <= most and max(moved) <= 2 * most):  # NaN is not
        wrong.append(f"expected a median of {median_bound} and gaps of {most} nats at most")
    found = (
        f"{same} of {total} tokens are those of one rank, {len(partings)} texts part at gaps up to "
        f"{gap:.4f} nats; log-probs differ by {median:.2g} (median), {max(moved):.2g} at most"
    )
    if same < total // 2:
        wrong.append("too little was left to compare")
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.same_tokens")
    parser.add_argument("--worlds", default="2,4", help="comma-separated")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dtypes", default=",".join(BOUNDS), help="comma-separated")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as store:
        fixed = {"bs": 4, "max_seq_len": 128, "device": args.device, "store": store}
        for dtype in args.dtypes.split(","):
            options = fixed | {"overrides": [f"dtype={dtype}"], "proof_replays": 2}
            one = decode(1, options | {"ladder": "1,2,4,4+16"})
            for world in map(int, args.worlds.split(",")):
                rows = 4 // world
                keys = ",".join(str(n) for n in (1, 2) if n <= rows)
                several = decode(world, options | {"ladder": f"{keys},{rows}+16"})
                found, wrong = compare(one, several, dtype)
                failed |= bool(wrong)
                print(f"{dtype}, {world} ranks: {found}", flush=True)
                print("".join(f"FAILED: {w}\n" for w in wrong), end="", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
