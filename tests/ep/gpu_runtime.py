"""Whole runtimes on GPU ranks, one transport after the other: proved, and with the same tokens.

    torchrun --standalone --nproc-per-node N -m tests.ep.gpu_runtime [--transports rdep,deepep]

DeepSeek-V3's shapes with few layers and experts. Capture proves that replays are the eager step to
the bit; then each rank decodes prompts of its own, and all log-probs behind every token are kept.
With random weights two experts are often as good as tied, so what one transport rounds otherwise
moves a whole expert in the next layer: a right transport is near the first one, not on it. DeepEP's
low-latency mode moves more: it quantises the norm's bf16 output, which flips a few per cent of the
e4m3 values that all others make of its fp32 result. So tokens must be the same until one that the
first transport holds to be about as likely, and log-probs of the same text must be near by their
median and 90th percentile. That each transport adds up right is for `tests.ep.gpu_transport` to
say, against float64. Exit code 1 on a failure; a transport whose package is not here is skipped,
and says so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from barriers.deepep import DeepEpMissing
from barriers.rdep import RdepTuning
from capture_cache.driver import Device
from runtime import Runtime, SamplingParams
from tests.ep.loopback import Loopback

# Nats: of |log-prob - the first transport's| the median and the 90th percentile; and how much less
# likely the first transport may have held the token at which the texts part.
NEAR = {"deepep": (0.3, 1.0, 1.0)}
NEAR_ELSE = (0.05, 0.5, 1.0)
LENGTHS = (3, 40, 17, 100, 64, 1)
NEW_TOKENS = 12
OVERRIDES = ("n_routed_experts=64", "vocab_size=32000")


@dataclass(frozen=True)
class Said:
    """One token, and the log-probs (float32 [vocab]) of all that could have come."""

    token: int
    logprobs: NDArray[np.float32]


Answers = dict[int, list[Said]]


def decode(transport: str, args: argparse.Namespace, store: str) -> tuple[Answers, str, float]:
    """What each prompt got; what the ledger says of the capture; ms a step."""
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
        bundle=False,  # the logits are read from the step's buffers
    ) as rt:
        params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        answers: Answers = {rt.add(prompt, params): [] for prompt in prompts}
        took = []
        for _ in range(args.steps):  # the same number on every rank, the last ones idle
            began = time.perf_counter()
            out = rt.step()
            took.append(time.perf_counter() - began)
            behind = logprobs_by_row(rt)
            for row, token in zip(out.rows.tolist(), out.tokens.tolist(), strict=True):
                answers[row].append(Said(token, behind[row]))
        assert not rt.num_running, "raise --steps"
        check_idle(rt)
        if transport == "rdep":
            check_barriers(rt)
        ledger = rt.engine.ledger
        assert ledger is not None
        return answers, ledger.live, float(np.median(took)) * 1e3


def check_idle(rt: Runtime) -> None:
    """Two steps in which every token of every rank is padding: no expert may be listed, read into a
    hidden activation, or write a result."""
    backend, b = rt.engine.graphs.backend, rt.engine.graphs.step.buffers
    results = [b[n] for n in ("expert_h_q", "expert_h_s", "expert_y")]
    with backend.on_stream():
        for buffer in results:
            buffer.view(torch.uint8).fill_(0x7F)
        b["offsets"].fill_(77)
        backend.synchronize()
    for _ in range(2):
        rt.step()
    assert rt.last_key is not None
    assert (b.for_key(rt.last_key)["topk_ids"] == -1).all(), "a padded row chose an expert"
    assert (b["offsets"] == 0).all(), f"idle ranks have pairs: {b['offsets'].tolist()}"
    for buffer in results:
        assert (buffer.view(torch.uint8) == 0x7F).all(), "an expert ran for a padded row"


def check_barriers(rt: Runtime) -> None:
    """A whole step signals twice a layer with experts, and never else: counted on the device, on a
    step whose peers are memory of this GPU."""
    step, backend = rt.engine.graphs.step, rt.engine.graphs.backend
    own = step.transport
    with backend.on_stream():
        device = Device(torch.cuda.current_device())
        loop = Loopback(own.config, device, RdepTuning(sum_pdl=not rt.config.overlap))
        loop.arm()
        backend.synchronize()
    step.replace_transport(loop.transport)
    try:
        for key in rt.ladder.keys:
            backend.eager(lambda key=key: step.run(key))
    finally:
        step.replace_transport(own)
    model = rt.model_config
    barriers = 2 * (model.num_layers - model.first_k_dense_replace) * len(rt.ladder.keys)
    want = [barriers] * (own.config.world - 1)
    assert loop.signals() == (want, want), f"expected {want} signals, got {loop.signals()}"


def logprobs_by_row(rt: Runtime) -> dict[int, NDArray[np.float32]]:
    """Of the step that was collected last."""
    assert rt.last_key is not None
    buffers = rt.engine.graphs.step.buffers.for_key(rt.last_key)
    rows = buffers["sample_row"].tolist()
    live = [i for i, row in enumerate(rows) if row >= 0]
    logprobs = buffers["logits"][live].log_softmax(-1).cpu().numpy()
    return {rows[i]: logprobs[n] for n, i in enumerate(live)}


def compare(answers: Answers, wanted: Answers, what: str) -> str:
    """How near the answers are; raises where they are not near enough."""
    median_nats, high_nats, tie_nats = NEAR.get(what, NEAR_ELSE)
    same = total = 0
    moved, partings, relative = [], [], []
    for row, expected in wanted.items():
        got = answers[row]
        assert len(got) == len(expected) == NEW_TOKENS, f"{what}: {len(got)} tokens in row {row}"
        total += NEW_TOKENS
        for a, b in zip(got, expected, strict=True):
            # The text before is the same, so all that could come can be compared.
            moved.append(abs(float(a.logprobs[b.token] - b.logprobs[b.token])))
            relative.append(float((a.logprobs - b.logprobs).std() / b.logprobs.std()))
            if a.token != b.token:
                partings.append(float(b.logprobs[b.token] - b.logprobs[a.token]))
                break
            same += 1
    median, high = np.quantile(moved, (0.5, 0.9))
    found = (
        f"{same} of {total} tokens are those of the first transport; of {len(moved)} compared "
        f"|d log-prob| median {median:.3f}, p90 {high:.3f}, max {max(moved):.3f} nats, logits "
        f"{np.median(relative):.1%} apart; parted {len(partings)} times, at gaps up to "
        f"{max(partings, default=0.0):.3f} nats"
    )
    bounds = f"expected median <= {median_nats}, p90 <= {high_nats}, gaps <= {tie_nats}"
    near = median <= median_nats and high <= high_nats  # NaN is not
    near = near and all(gap <= tie_nats for gap in partings)
    assert near, f"{bounds}, got {found}"
    return found


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
