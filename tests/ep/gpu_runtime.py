"""Whole runtimes on GPU ranks, one transport after the other: proved, and with the same tokens.

    torchrun --standalone --nproc-per-node N -m tests.ep.gpu_runtime [--transports rdep,deepep]

DeepSeek-V3's shapes with few layers and experts. Capture proves that replays are the eager step to
the bit; then each rank decodes prompts of its own. Transports round in other places, so tokens
may part where two of them are as good as equally likely, and only there. Exit code 1 on a failure;
a transport whose package is not here is skipped, and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

import numpy as np

from barriers.deepep import DeepEpMissing
from runtime import Runtime, SamplingParams

GAP = 0.1  # nats between two tokens that are as good as equally likely
LENGTHS = (3, 40, 17, 100, 64, 1)
NEW_TOKENS = 12
OVERRIDES = ("n_routed_experts=64", "vocab_size=32000")

Answers = dict[int, list[tuple[int, float]]]


def decode(transport: str, args: argparse.Namespace, store: str) -> tuple[Answers, str, float]:
    """(token, log-prob) of each prompt; what the ledger says of the capture; ms a step."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rng = np.random.default_rng(rank)
    prompts = [rng.integers(0, 32000, n).tolist() for n in LENGTHS]
    with Runtime.load(
        "deepseek-v3",
        bs=8 * world,
        ladder="1,4,8,8+64",
        layers=args.layers,
        overrides=OVERRIDES,
        max_seq_len=512,
        store=store,
        transport=transport,
        proof_replays=20,
        deadline_s=30.0,
    ) as rt:
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        answers: Answers = {rt.add(prompt, params): [] for prompt in prompts}
        steps, began = 0, time.perf_counter()
        for _ in range(args.steps):  # the same number on every rank, the last ones idle
            out = rt.step()
            steps += 1
            for row, token, logprob in zip(
                out.rows.tolist(), out.tokens.tolist(), out.logprobs.tolist(), strict=True
            ):
                answers[row].append((token, logprob))
        took = (time.perf_counter() - began) / steps * 1e3
        assert not rt.num_running, "raise --steps"
        ledger = rt.engine.ledger
        assert ledger is not None
        return answers, ledger.live, took


def compare(answers: Answers, wanted: Answers, what: str) -> str:
    """How far the tokens agree; raises where they part without a tie."""
    same = total = 0
    for row, expected in wanted.items():
        got = answers[row]
        assert len(got) == len(expected) == NEW_TOKENS, f"{what}: {len(got)} tokens in row {row}"
        total += NEW_TOKENS
        for i, ((token, logprob), (want, wanted_logprob)) in enumerate(
            zip(got, expected, strict=True)
        ):
            gap = abs(logprob - wanted_logprob)
            assert gap < GAP, f"{what}: row {row}, token {i}: {gap:.3f} nats from rdep's"
            if token != want:
                break  # a tie: from here on the texts differ
            same += 1
    assert same > total // 2, f"{what}: only {same} of {total} tokens are rdep's"
    return f"{same} of {total} tokens are those of the first transport"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.gpu_runtime")
    parser.add_argument("--transports", default="rdep,deepep,deepep-normal")
    parser.add_argument("--layers", type=int, default=6)  # three of them with experts: odd
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    rank, failed = int(os.environ["RANK"]), 0
    wanted: Answers | None = None
    with tempfile.TemporaryDirectory() as store:
        for transport in args.transports.split(","):
            try:
                answers, live, took = decode(transport, args, store)
                if wanted is None:
                    wanted, verdict = answers, "first"
                else:
                    verdict = compare(answers, wanted, transport)
                assert bool(live) == transport.startswith("deepep"), f"ledger says {live!r}"
                line = f"ok: {verdict}; {took:.2f} ms a step; {live or 'storable'}"
            except DeepEpMissing as e:
                line = f"SKIPPED: {e}"
            except AssertionError as e:
                failed, line = 1, f"FAILED: {e}"
            if rank == 0 or line.startswith("FAILED"):
                print(f"{transport} on rank {rank}: {line}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
