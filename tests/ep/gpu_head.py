"""A head cut by vocabulary on GPUs, to the bit, beside `rdep` on the same signals; then timed.

    torchrun --nproc-per-node N -m tests.ep.gpu_head [--steps 2000] [--only replays]

Every logit must be the whole head's, whatever the other ranks' keys; operands are small whole
numbers, so the product has no rounding. Exit code 1 if a scenario failed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch

from barriers.config import GroupConfig
from barriers.device_watch import DeviceWatch
from barriers.errors import BarrierTimeout
from barriers.group import RankGroup
from barriers.rdep import Rdep, load_rdep, peer_views
from barriers.symmetric_device import DeviceMemory
from barriers.transport import TransportConfig
from barriers.vocabulary import VocabularyConfig
from barriers.vocabulary_peers import HeadTuning, VocabularyPeers, load_head
from bench.transport_cases import Tokens, make_gains, make_tokens, run_experts
from capture_cache.driver import Device, wait_stream
from capture_cache.layout import ArenaLayout, Entry, Section

DEADLINE_MS = 3000
KEYS = (1, 2, 8, 32, 64)
TUNINGS = (
    HeadTuning(),
    HeadTuning(share_blocks=0, pull_blocks=132, pdl=False),
    HeadTuning(share_blocks=1024, send_threads=64, pull_threads=128, pull_blocks=1056),
)


class Bed:
    """One rank: a head's exchange and a layer's, in one peer memory, on one stream."""

    def __init__(
        self,
        group: RankGroup,
        device: Device,
        *,
        tuning: HeadTuning = TUNINGS[0],
        deadline_ms: int = DEADLINE_MS,
        **sizes: int | str,
    ) -> None:
        self.group, self.cuda = group, torch.device("cuda", device.ordinal)
        rank, world = group.rank, group.world
        wanted = {"capacity": max(KEYS), "hidden": 1024, "vocab": 129280, **sizes}
        self.config = config = VocabularyConfig(rank, world, **wanted)  # type: ignore[arg-type]
        self.layer_config = layer = TransportConfig(
            rank, world, config.capacity, config.hidden, num_experts=8 * world, top_k=4
        )
        specs = (*Rdep.buffers(layer), *VocabularyPeers.buffers(config))
        layout = ArenaLayout.build([Entry(*spec) for spec in specs], [Section("peers")])
        with ExitStack() as opened:
            memory = DeviceMemory(group, device, layout.device_bytes)
            opened.callback(memory.close)
            self.watch = DeviceWatch(memory, deadline_ms=deadline_ms)
            opened.callback(self.watch.close)
            opened.callback(torch.cuda.synchronize)
            views = peer_views(layout, memory.payload, self.cuda)
            base, stride = memory.base, memory.stride
            kernels, layer_kernels = load_head(device, config, tuning), load_rdep(device, layer)
            self.exchange = VocabularyPeers(
                config, views, kernels, base=base, stride=stride, tuning=tuning
            )
            self.layer = Rdep(layer, views, layer_kernels, base=base, stride=stride)
            self.head = self._whole_numbers(config.vocab, config.hidden, seed=7).float()
            self.gains = make_gains(layer, self.cuda)
            torch.cuda.synchronize()
            self.close = opened.pop_all().close
        group.barrier("the exchange is made")

    def final(self, count: int, seed: int) -> torch.Tensor:
        """act [count, H] of this rank."""
        rows = self._whole_numbers(count, self.config.hidden, seed=100 * seed + self.config.rank)
        return rows.to(getattr(torch, self.config.act_dtype))

    def want(self, final: torch.Tensor) -> torch.Tensor:
        return final.float() @ self.head.T

    def multiply(self, rows: torch.Tensor) -> None:
        """The product of all ranks' rows with this rank's slice."""
        begin, end = self.config.begin, self.config.end
        part = self.exchange.part[:, : end - begin]
        part.copy_(rows.float() @ self.head[begin:end].T)

    def logits(self, final: torch.Tensor, *, opens_step: bool = False) -> torch.Tensor:
        out = torch.full((len(final), self.config.vocab), float("nan"), device=self.cuda)
        self.multiply(self.exchange.gather(final, opens_step=opens_step))
        self.exchange.scatter(self.exchange.part, out)
        return out

    def experts(self, t: Tokens) -> torch.Tensor:
        """A layer on the same signals, which opens the step."""
        received = self.layer.dispatch(t.x, None, t.ids, t.weights, opens_step=True)
        y = t.x.new_empty(received.ids.numel(), t.x.shape[1])
        run_experts(self.layer_config, received, self.gains, y)
        out = torch.full_like(t.x, float("nan"))
        self.layer.combine(out, y, received, t.ids, t.shared)
        return out

    def finish(self) -> None:
        """Wait for the device, for a bounded time, and raise what went wrong there."""
        wait_stream(torch.cuda.current_stream().cuda_stream, 20.0, "waiting for an exchange")
        self.watch.check()

    def _whole_numbers(self, rows: int, columns: int, *, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randint(-8, 9, (rows, columns), generator=generator, dtype=torch.int8)
        return numbers.to(self.cuda)


Make = Callable[..., Bed]


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `run` on the current stream."""
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph


def shapes(make: Make) -> None:
    """Every type and tuning; whole slices, odd vocabularies, ranks without a column."""
    for sizes in (
        {},
        {"vocab": 102400, "act_dtype": "float16"},
        {"vocab": 1003, "hidden": 144, "act_dtype": "float32"},
        {"vocab": 130, "hidden": 16},
    ):
        for tuning in TUNINGS:
            bed = make(tuning=tuning, **sizes)
            try:
                for seed in range(4):
                    count = 1 + (bed.config.rank * 29 + 63 - 20 * seed) % max(KEYS)
                    final = bed.final(count, seed)
                    got = bed.logits(final, opens_step=True)
                    bed.finish()
                    assert torch.equal(got, bed.want(final)), f"{sizes} {tuning} {count} rows"
            finally:
                bed.close()


def replays(make: Make, steps: int) -> None:
    """Graphs of several keys, each rank at another one in every step, behind a layer of rdep."""
    bed = make()
    wrong = torch.zeros(2, dtype=torch.int64, device=bed.cuda)
    try:
        graphs, kept = [], []
        for key in KEYS:
            tokens = make_tokens(bed.layer_config, bed.config.rank, key, bed.cuda, seed=key)
            final = bed.final(key, key)
            want, layer = bed.want(final), bed.experts(tokens)
            assert torch.equal(bed.logits(final), want), f"{key} rows, eager"

            def step(
                tokens: Tokens = tokens,
                final: torch.Tensor = final,
                layer: torch.Tensor = layer,
                want: torch.Tensor = want,
            ) -> None:
                wrong[0] += (bed.experts(tokens) != layer).any()
                wrong[1] += (bed.logits(final) != want).any()

            graphs.append(capture(step))
            kept.append(step)  # and with it what the graph reads
        bed.finish()
        bed.group.barrier("graphs are captured")
        choose = random.Random(bed.config.rank)
        for count in range(steps):
            choose.choice(graphs).replay()
            if count % 16 == 15:
                bed.finish()
        bed.finish()
        assert wrong.tolist() == [0, 0], f"{wrong.tolist()} of {steps} layers and heads are wrong"
    finally:
        bed.close()


def late_rank(make: Make) -> None:
    """One rank stays away from the one exchange or the other: the rest name it, and where."""
    for operation in ("head", "sample"):
        bed = make(deadline_ms=500)
        missing = bed.config.world - 1
        try:
            final = bed.final(max(KEYS), 1)
            bed.logits(final)
            bed.finish()
            bed.group.barrier("all are well")
            began = time.monotonic()
            if bed.config.rank == missing:
                if operation == "sample":
                    bed.multiply(bed.exchange.gather(final))
                bed.finish()
                continue
            bed.logits(final)
            try:
                bed.finish()
            except BarrierTimeout as e:
                assert e.ranks == (missing,), e  # noqa: PT017
                assert f", {operation}: rank {missing} is late" in str(e), e  # noqa: PT017
                assert 0.4 < time.monotonic() - began < 2, "not at the deadline"  # noqa: PT017
            else:
                raise AssertionError("nobody was missed")
        finally:
            bed.group.barrier("everybody has looked")
            bed.close()


def times(make: Make) -> None:
    """Microseconds of each exchange as a graph of 32, all ranks at one key; prints, checks nothing.

    The floor is what crosses the link, at 353 GB/s a GPU.
    """
    bed = make(hidden=7168)
    config, inner = bed.config, 32
    try:
        for key in KEYS:
            final = bed.final(key, key)
            out = torch.empty(key, config.vocab, device=bed.cuda)

            def both(final: torch.Tensor = final, out: torch.Tensor = out) -> None:
                for _ in range(inner):
                    bed.exchange.gather(final)
                    bed.exchange.scatter(bed.exchange.part, out)

            graph = capture(both)
            bed.group.barrier("captured")
            taken = []
            for _ in range(20):
                begin, end = (
                    torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
                    for _ in range(2)
                )
                begin.record()
                graph.replay()
                end.record()
                bed.finish()
                taken.append(1e3 * begin.elapsed_time(end) / inner)
            others = config.world - 1
            wire = others * key * (config.hidden * 2 + 4 * config.vocab / config.world)
            if config.rank == 0:
                print(
                    f"{key} rows, {config.world} ranks: both {statistics.median(taken):.1f} us, "
                    f"wire alone {wire / 353e3:.1f} us",
                    flush=True,
                )
    finally:
        bed.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ep.gpu_head")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--only", help="scenarios whose name begins with this")
    args = parser.parse_args()
    place = GroupConfig.from_env(os.environ)
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", place.rank)))
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]
    failed = 0
    with RankGroup(place) as group:
        device = Device(torch.cuda.current_device())

        def make(**options: object) -> Bed:
            return Bed(group, device, **options)  # type: ignore[arg-type]

        scenarios: list[tuple[str, Callable[[], None]]] = [
            ("shapes", lambda: shapes(make)),
            ("replays", lambda: replays(make, args.steps)),
            ("times", lambda: times(make)),
        ]
        if place.world > 1:
            scenarios.append(("late rank", lambda: late_rank(make)))
        for name, run in scenarios:
            if args.only is not None and not name.startswith(args.only):
                continue
            began, error = time.monotonic(), None
            try:
                run()
            except Exception as e:  # told below; the next scenario makes an exchange of its own
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
