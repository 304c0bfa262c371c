"""`rdep` on GPUs, to the bit, in graphs, with every rank at another key; DeepEP beside it.

    torchrun --nproc-per-node N -m tests.ep.gpu_transport [--steps 10000] [--only deepep]

What a rank gets from `rdep` must be the oracle's bits whatever the others do; from DeepEP, where it
is installed, near float64 and the same bits in any company. Exit code 1 if a scenario failed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence

import torch

from barriers.config import GroupConfig
from barriers.deepep import DeepEpMissing
from barriers.errors import BarrierTimeout
from barriers.group import RankGroup
from barriers.rdep import RdepTuning
from barriers.rdep_ref import dispatch_ref, quantize_ref, relative_error
from barriers.transport import TransportConfig
from bench.transport_cases import (
    Tokens,
    make_gains,
    make_tokens,
    oracle,
    reference,
    run_experts,
)
from bench.transport_modes import Subject, make_subject
from capture_cache.driver import Device

MAX_ERROR = 3e-3
DEADLINE_MS = 3000
DEEPSEEK = {"hidden": 7168, "num_experts": 256, "top_k": 8}
TUNINGS = (
    RdepTuning(),
    RdepTuning(share_blocks=0, pdl=False),
    RdepTuning(share_blocks=1024, send_threads=64, pull_threads=128),
    RdepTuning(bulk_pull=True, sum_blocks=7),
)


class Bed:
    """All ranks, one GPU each, and a transport on it at a time."""

    def __init__(self, group: RankGroup, device: Device) -> None:
        self.group, self.device = group, device
        self.cuda = torch.device("cuda", device.ordinal)

    def config(self, capacity: int, **sizes: object) -> TransportConfig:
        merged = {**DEEPSEEK, **sizes, "capacity": capacity}
        return TransportConfig(rank=self.group.rank, world=self.group.world, **merged)  # type: ignore[arg-type]

    def subject(
        self,
        config: TransportConfig,
        *tunings: RdepTuning,
        deadline_ms: int = DEADLINE_MS,
        mode: str = "rdep",
    ) -> Subject:
        chosen = tunings or (RdepTuning(),)
        subject = make_subject(
            mode, config, self.group, self.device, deadline_ms=deadline_ms, tunings=chosen
        )
        self.group.barrier("transport is made")
        return subject

    def tokens(self, config: TransportConfig, counts: Sequence[int], seed: int) -> list[Tokens]:
        return [make_tokens(config, r, n, self.cuda, seed=seed) for r, n in enumerate(counts)]


def layer(
    subject: Subject, t: Tokens, gains: torch.Tensor, *, prequantized: bool = False
) -> torch.Tensor:
    """One layer with its experts; may be captured unless `prequantized`, which needs the host."""
    transport = subject.transport
    x, scale = quantize_ref(t.x) if prequantized else (t.x, None)
    received = transport.dispatch(x, scale, t.ids, t.weights, layer=1)
    y = t.x.new_empty(received.ids.numel(), t.x.shape[1])
    run_experts(transport.config, received, gains, y)
    out = torch.full_like(t.x, float("nan"))
    transport.combine(out, y, received, t.ids, t.shared, layer=1)
    return out


def check(
    bed: Bed, subject: Subject, every: list[Tokens], gains: torch.Tensor, what: str
) -> torch.Tensor:
    """A layer against the oracle's bits and float64; its rows as they were sent."""
    config, own = subject.transport.config, every[bed.group.rank]
    want = dispatch_ref(
        config, [t.x for t in every], [t.ids for t in every], [t.weights for t in every]
    )[config.rank]
    received = subject.transport.dispatch(own.x, None, own.ids, own.weights, layer=1)
    subject.finish()
    listed = want.ids >= 0
    assert torch.equal(received.ids, want.ids), f"{what}: ids"
    assert torch.equal(received.weights[listed], want.weights[listed]), f"{what}: weights"
    rows = listed.any(1)
    got, sent = (r.x.view(torch.uint8)[rows] for r in (received, want))
    assert torch.equal(got, sent), f"{what}: rows, {int((got != sent).sum())} bytes differ"
    if want.scale is not None and received.scale is not None:
        assert torch.equal(received.scale[rows], want.scale[rows]), f"{what}: scales"
    bed.group.barrier("rows are compared")  # the next dispatch overwrites them
    out = layer(subject, own, gains)
    subject.finish()
    expected = oracle(config, every, gains)[config.rank]
    assert torch.equal(out, expected), (
        f"{what}: {int((out != expected).any(1).sum())} of {len(own)} tokens differ from the oracle"
    )
    live = (own.ids >= 0).any(1)
    if live.any():
        error = relative_error(out[live], reference(config, own, gains)[live])
        limit = MAX_ERROR if config.act_dtype == "bfloat16" else MAX_ERROR / 4
        assert error < limit, f"{what}: relative error {error:.1e}"
    return out


# -- scenarios -------------------------------------------------------------------------------------


def shapes(bed: Bed) -> None:
    """Every format, width and number of choices, at sizes around the blocks' edges."""
    for sizes in (
        {},
        {"fp8": False},
        {"act_dtype": "float32", "hidden": 1040},
        {"act_dtype": "float32", "hidden": 144, "fp8": False, "top_k": 1},
        {"act_dtype": "float16", "hidden": 4096, "top_k": 16},
        {"hidden": 16, "top_k": 3},
    ):
        config = bed.config(33, **sizes)
        subject, gains = bed.subject(config, *TUNINGS), make_gains(config, bed.cuda)
        assert subject.retune is not None
        try:
            for tuning in TUNINGS:
                subject.retune(tuning)
                bed.group.barrier("tuned")
                for counts in ([33] * config.world, [1 + 5 * r for r in range(config.world)]):
                    every = bed.tokens(config, counts, seed=len(counts) + counts[0])
                    check(bed, subject, every, gains, f"{sizes} {tuning} {counts}")
        finally:
            subject.close()


def routing(bed: Bed) -> None:
    """All tokens to one expert, to one rank, to nobody; padding between real tokens."""
    config = bed.config(64)
    subject, gains = bed.subject(config), make_gains(config, bed.cuda)
    try:
        for target in range(config.world):
            every = bed.tokens(config, [64] * config.world, seed=target)
            first = target * config.local_experts
            for t in every:
                t.ids[:] = torch.arange(first, first + config.top_k, device=bed.cuda)
                t.ids[::2, 1:] = -1  # half of them to one expert alone
            check(bed, subject, every, gains, f"all to rank {target}")
        every = bed.tokens(config, [64] * config.world, seed=9)
        for t in every:
            t.ids[1::3] = -1
        out = check(bed, subject, every, gains, "padding between")
        own = every[bed.group.rank]
        assert torch.equal(out[1::3], own.shared[1::3]), "a padded token was summed"
        for t in every:
            t.ids[:] = -1
        check(bed, subject, every, gains, "nobody")
    finally:
        subject.close()


def padding(bed: Bed) -> None:
    """A padded token, and a token without an expert on a rank, leave that rank's memory alone but
    for its ids. (tests/gpu/test_rdep_alone.py looks at every byte.)"""
    config = bed.config(33)
    subject = bed.subject(config)
    try:
        every = bed.tokens(config, [33 - 4 * r for r in range(config.world)], seed=2)
        for rank, t in enumerate(every):
            t.ids[1::3] = -1
            if rank % 2:
                t.ids[:] = -1
        own = every[bed.group.rank]
        want = dispatch_ref(
            config, [t.x for t in every], [t.ids for t in every], [t.weights for t in every]
        )[config.rank]
        received = want
        for pattern in (None, 0x7F, 0x55):
            if pattern is not None:
                for part in (received.x, received.scale, received.weights):
                    assert part is not None
                    part.view(torch.uint8).fill_(pattern)
            subject.finish()
            bed.group.barrier("receive areas are poisoned")
            received = subject.transport.dispatch(own.x, None, own.ids, own.weights, layer=1)
            subject.finish()
            assert torch.equal(received.ids, want.ids), "ids"
            if pattern is not None:
                quiet = (want.ids < 0).all(1)
                for part in (received.x, received.scale):
                    assert part is not None
                    assert (part.view(torch.uint8)[quiet] == pattern).all(), "a padded row was sent"
                untold = received.weights[want.ids < 0].view(torch.uint8)
                assert (untold == pattern).all(), "a weight of nobody's choice was sent"
            bed.group.barrier("receive areas are looked at")
    finally:
        subject.close()


def neighbours(bed: Bed) -> None:
    """A token's bits: alone, in company, at another row, quantised by someone else, run again."""
    config = bed.config(64)
    subject, gains = bed.subject(config), make_gains(config, bed.cuda)
    try:
        own = bed.tokens(config, [32] * config.world, seed=4)[bed.group.rank]
        first = layer(subject, own, gains)
        for _ in range(20):
            assert torch.equal(layer(subject, own, gains), first), "runs differ"
        assert torch.equal(layer(subject, own, gains, prequantized=True), first), "quantiser"
        flipped = Tokens(
            *(t.flip(0).contiguous() for t in (own.x, own.shared, own.ids, own.weights))
        )
        assert torch.equal(layer(subject, flipped, gains).flip(0), first), "row"
        idle = bed.tokens(config, [1] * config.world, seed=0)[bed.group.rank]
        idle.ids.fill_(-1)
        for busy in range(config.world):
            mine = busy == bed.group.rank
            out = layer(subject, own if mine else idle, gains)
            assert not mine or torch.equal(out, first), "idle neighbours changed a token"
        subject.finish()
    finally:
        subject.close()


def replays(bed: Bed, steps: int) -> None:
    """Graphs of several keys, each rank at another one in every step, idle ones among them."""
    config = bed.config(64)
    subject, gains = bed.subject(config), make_gains(config, bed.cuda)
    stream = torch.cuda.current_stream()
    wrong = torch.zeros(1, dtype=torch.int64, device=bed.cuda)
    try:
        graphs = []
        for key in (1, 2, 8, 32, 64):
            own = bed.tokens(config, [key] * config.world, seed=key)[bed.group.rank]
            if key <= 2:
                own.ids.fill_(-1)  # nothing to do: padded tokens of the smallest keys
            expected = layer(subject, own, gains)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                wrong += (layer(subject, own, gains) != expected).any()
            graphs.append((graph, own, expected))
        subject.finish()
        bed.group.barrier("graphs are captured")
        choose = random.Random(bed.group.rank)
        for step in range(steps):
            graphs[choose.randrange(len(graphs))][0].replay()
            if step % 16 == 15:
                subject.finish()
        subject.finish()
        assert int(wrong) == 0, f"{int(wrong)} of {steps} steps gave other bits"
    finally:
        subject.close()


def late_rank(bed: Bed) -> None:
    """One rank stays away: every other one names it, at the deadline and not before."""
    if bed.group.world == 1:
        return
    config, missing = bed.config(8), bed.group.world - 1
    subject, gains = bed.subject(config, deadline_ms=500), make_gains(config, bed.cuda)
    try:
        own = bed.tokens(config, [8] * config.world, seed=1)[bed.group.rank]
        if bed.group.rank != missing:
            began = time.monotonic()
            layer(subject, own, gains)
            try:
                subject.finish()
            except BarrierTimeout as e:
                assert e.ranks == (missing,), e  # noqa: PT017
                assert "layer 1, dispatch" in str(e), e  # noqa: PT017
                assert 0.4 < time.monotonic() - began < 1.5, "not at the deadline"  # noqa: PT017
            else:
                raise AssertionError("nobody was missed")
    finally:
        subject.close()


def library(bed: Bed, mode: str, steps: int) -> None:
    """DeepEP: one buffer, then sums, company, and replays with eager layers between."""
    if bed.group.world not in (2, 4, 8):
        raise DeepEpMissing(f"{mode} serves 2, 4 or 8 ranks, here are {bed.group.world}")
    for fp8 in (True, False) if mode == "deepep-normal" else (True,):  # NVSHMEM starts once
        config = bed.config(64, fp8=fp8)
        subject = bed.subject(config, mode=mode)
        _library_sums(bed, subject)
        _library_company(bed, subject)
        _library_replays(bed, subject, steps)
        subject.transport.require_settled("the end")
        bed.group.barrier("before the end")  # which is upstream's own meeting; not after a failure
        subject.close()


def _library_sums(bed: Bed, subject: Subject) -> None:
    """Against float64: other counts on each rank, padding, all to one rank, nobody."""
    config, rank = subject.transport.config, bed.group.rank
    gains = make_gains(config, bed.cuda)
    for seed, counts in enumerate(
        ([64] * config.world, [1 + 21 * r % 64 for r in range(config.world)], [3] * config.world)
    ):
        for what in ("random", "padding between", "all to one rank", "nobody"):
            own = bed.tokens(config, counts, seed=seed)[rank]
            if what == "padding between":
                own.ids[1::3] = -1
            elif what == "all to one rank":
                first = seed % config.world * config.local_experts
                own.ids[:] = torch.arange(first, first + config.top_k, device=bed.cuda)
            elif what == "nobody":
                own.ids[:] = -1
            outs = [layer(subject, own, gains) for _ in range(3)]
            subject.finish()
            told = f"{what}, {counts} rows"
            error = relative_error(outs[0], reference(config, own, gains))
            assert error < MAX_ERROR, f"{told}: relative error {error:.1e}"
            assert all(torch.equal(out, outs[0]) for out in outs[1:]), f"{told}: runs differ"


def _library_company(bed: Bed, subject: Subject) -> None:
    """A token's bits in company, alone, and at another row."""
    config, rank = subject.transport.config, bed.group.rank
    gains = make_gains(config, bed.cuda)
    own = bed.tokens(config, [32] * config.world, seed=4)[rank]
    first = layer(subject, own, gains)
    flipped = Tokens(*(t.flip(0).contiguous() for t in (own.x, own.shared, own.ids, own.weights)))
    assert torch.equal(layer(subject, flipped, gains).flip(0), first), "row"
    idle = bed.tokens(config, [1] * config.world, seed=0)[rank]
    idle.ids.fill_(-1)
    for busy in range(config.world):
        out = layer(subject, own if busy == rank else idle, gains)
        assert torch.equal(out, first if busy == rank else idle.shared), "idle neighbours"
    subject.finish()


def _library_replays(bed: Bed, subject: Subject, steps: int) -> None:
    """An odd number of layers a graph, each rank at another key, eager layers in between."""
    config = subject.transport.config
    gains, stream = make_gains(config, bed.cuda), torch.cuda.current_stream()
    wrong = torch.zeros(1, dtype=torch.int64, device=bed.cuda)
    pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
    keys = []
    for key in (1, 8, 32, 64):
        own = bed.tokens(config, [key] * config.world, seed=key)[bed.group.rank]
        if key == 1:
            own.ids.fill_(-1)
        expected = layer(subject, own, gains)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, pool=pool, capture_error_mode="thread_local"):
            for _ in range(3):
                wrong += (layer(subject, own, gains) != expected).any()
        keys.append((graph, own, expected))
    subject.finish()
    bed.group.barrier("graphs are captured")
    together, alone = random.Random(0), random.Random(bed.group.rank)
    for step in range(steps):
        graph, own, expected = alone.choice(keys)
        if together.random() < 0.1:  # all ranks make three layers in a step, each in its own way
            for _ in range(3):
                wrong += (layer(subject, own, gains) != expected).any()
        else:
            graph.replay()
        if step % 16 == 15:
            subject.finish()
    subject.finish()
    assert int(wrong) == 0, f"{int(wrong)} of {3 * steps} layers gave other bits"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.gpu_transport")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", help="scenarios whose name begins with this")
    args = parser.parse_args()
    steps = args.steps
    place = GroupConfig.from_env(os.environ)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place.rank)))
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    failed = 0
    with RankGroup(place) as group:
        bed = Bed(group, Device(torch.cuda.current_device()))
        scenarios: list[tuple[str, Callable[[], None]]] = [
            ("shapes", lambda: shapes(bed)),
            ("routing", lambda: routing(bed)),
            ("padding", lambda: padding(bed)),
            ("neighbours", lambda: neighbours(bed)),
            ("replays", lambda: replays(bed, steps)),
            ("late rank", lambda: late_rank(bed)),
            ("deepep low-latency", lambda: library(bed, "deepep", min(steps, 500))),
            ("deepep normal", lambda: library(bed, "deepep-normal", min(steps, 500))),
        ]
        scenarios = [s for s in scenarios if args.only is None or s[0].startswith(args.only)]
        for name, run in scenarios:
            began, error = time.monotonic(), None
            try:
                run()
            except DeepEpMissing as e:  # alike on all ranks
                if place.rank == 0:
                    print(f"{name}: SKIPPED: {e}", flush=True)
                continue
            except Exception as e:  # told below; the next scenario makes a transport of its own
                error = f"{type(e).__name__}: {e}"
            told = group.allgather(name, error and error[:600])
            errors = [f"rank {r}: {p.value}" for r, p in enumerate(told) if p.value]
            failed += bool(errors)
            if place.rank == 0:
                verdict = "ok" if not errors else "FAILED: " + "; ".join(errors)
                print(f"{name}: {verdict} ({time.monotonic() - began:.1f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
