"""A cut head over peer memory on one GPU: what a rank tells its peers; all ranks in one process.

Peers are plain memory (tests/ep/loopback.py), their signals given in advance, so no wait waits;
where all ranks play, the test carries between them what NVLink would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from barriers import vocabulary_ref as ref
from barriers.vocabulary import VocabularyConfig
from barriers.vocabulary_peers import HeadTuning
from capture_cache.driver import Device
from tests.ep.loopback import HeadLoopback

DEEPSEEK = VocabularyConfig(rank=1, world=4, capacity=24, hidden=7168, vocab=129280)
SMALL = replace(DEEPSEEK, hidden=144, world=3, capacity=9, vocab=1003)
CONFIGS = {
    "deepseek, 4 ranks": DEEPSEEK,
    "8 ranks": replace(DEEPSEEK, world=8, rank=5, capacity=8),
    "odd vocabulary, 3 ranks": SMALL,
    "ranks without columns": replace(SMALL, world=4, vocab=130),
    "fp32, 2 ranks": replace(SMALL, world=2, act_dtype="float32"),
    "one rank": replace(SMALL, world=1, rank=0),
}
TUNINGS = {
    "default": HeadTuning(),
    "the last block signals": HeadTuning(share_blocks=0, pull_blocks=7),
    "every block signals": HeadTuning(share_blocks=1024, send_threads=64, pull_threads=32),
}
PATTERNS = (0x7F, 0x55)  # a byte that was written differs from one of them


@pytest.fixture(autouse=True)
def _stream() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
        torch.cuda.synchronize()


def _loop(config: VocabularyConfig, tuning: str = "default") -> HeadLoopback:
    loop = HeadLoopback(config, Device(torch.cuda.current_device()), TUNINGS[tuning])
    loop.arm()
    return loop


def _whole_numbers(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Small enough that every sum of products is exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-8, 9, shape, generator=generator).to(getattr(torch, dtype))
    return numbers.to(torch.device("cuda", torch.cuda.current_device()))


def _final(config: VocabularyConfig, count: int, seed: int) -> torch.Tensor:
    return _whole_numbers((count, config.hidden), config.act_dtype, seed)


def _logits(config: VocabularyConfig, count: int, *, pitch: int | None = None) -> torch.Tensor:
    """fp32 [count, pitch] of NaN."""
    device = torch.device("cuda", torch.cuda.current_device())
    return torch.full((count, pitch or config.vocab), float("nan"), device=device)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_two_barriers(name: str, tuning: str) -> None:
    config = CONFIGS[name]
    loop = _loop(config, tuning)
    for steps, count in enumerate((config.capacity, 1, config.capacity - 1, 2), 1):
        loop.exchange.gather(_final(config, count, steps), opens_step=steps == 1)
        between = [2 * steps] * (config.world - 1), [2 * steps - 1] * (config.world - 1)
        # What peers owe for the pull is put down before it begins.
        assert loop.signals() == between, f"{count} rows, between the two of step {steps}"
        loop.exchange.scatter(loop.exchange.part, _logits(config, count))
        once_a_peer = [2 * steps] * (config.world - 1)
        assert loop.signals() == (once_a_peer, once_a_peer), f"{count} rows, {steps} steps"


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_own_rows_are_sent(name: str, tuning: str) -> None:
    config = CONFIGS[name]
    loop = _loop(config, tuning)
    final = _final(config, config.capacity - 1, 3)
    first = config.rank * config.capacity
    for pattern in PATTERNS:
        loop.poison(pattern)
        torch.cuda.synchronize()
        before = [loop.payload(slot) for slot in range(config.world)]
        loop.exchange.gather(final)
        torch.cuda.synchronize()
        for slot in range(config.world):
            rows = loop.views[slot]["head_rows"]
            assert torch.equal(rows[first : first + len(final)], final), f"slot {slot}"
            # Take them back: then nothing else may differ.
            rows[first : first + len(final)].view(torch.uint8).fill_(pattern)
            assert torch.equal(loop.payload(slot), before[slot]), f"slot {slot}: other bytes"


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_every_ranks_columns_in_order(name: str, tuning: str) -> None:
    """Of rows that are whole pieces of 16 bytes apart, and of others; nothing else is written."""
    config = CONFIGS[name]
    loop = _loop(config, tuning)
    parts = [torch.empty(0)] * config.world
    for slot, view in enumerate(loop.views):
        part = view["head_part"]
        generator = torch.Generator().manual_seed(slot)
        part.copy_(torch.randn(part.shape, generator=generator))
        parts[(config.rank + slot) % config.world] = part
    for count in {config.capacity, 1}:
        counts = [count] * config.world
        want = ref.scatter_ref(config, parts, counts)[config.rank]
        for pitch in (config.vocab, config.vocab + 1, -(-config.vocab // 4) * 4 + 8):
            before = [loop.payload(slot) for slot in range(config.world)]
            wide = _logits(config, count, pitch=pitch)
            loop.exchange.gather(_final(config, 1, 0))
            # A gather changes rows; take them from the payloads that are compared.
            for slot in range(config.world):
                loop.views[slot]["head_rows"].zero_()
            loop.exchange.scatter(loop.exchange.part, wide[:, : config.vocab])
            torch.cuda.synchronize()
            assert torch.equal(wide[:, : config.vocab], want), f"{count} rows, pitch {pitch}"
            assert wide[:, config.vocab :].isnan().all(), "columns past the vocabulary"
            for slot in range(config.world):
                assert torch.equal(loop.payload(slot), before[slot]), f"slot {slot} was written"


@pytest.mark.parametrize("name", CONFIGS)
def test_all_ranks_get_the_whole_heads_logits(name: str) -> None:
    """Three steps of all ranks, each with its own number of rows."""
    config = replace(CONFIGS[name], hidden=272)
    loops = [_loop(c) for c in ref.ranks_of(config)]
    head = _whole_numbers((config.vocab, config.hidden), config.act_dtype, 7)
    world, capacity = config.world, config.capacity
    for step in range(3):
        counts = [1 + (5 * r + capacity - 1 - step) % capacity for r in range(world)]
        finals = [_final(config, n, 10 * step + r) for r, n in enumerate(counts)]
        rows = [
            loop.exchange.gather(final, opens_step=True)
            for loop, final in zip(loops, finals, strict=True)
        ]
        for source, loop in enumerate(loops):  # the wire
            sent = slice(source * capacity, source * capacity + counts[source])
            for slot in range(1, world):
                rows[(source + slot) % world][sent] = loop.views[slot]["head_rows"][sent]
        for loop, got in zip(loops, rows, strict=True):
            begin, end = loop.config.begin, loop.config.end
            torch.mm(
                got.float(), head[begin:end].float().T, out=loop.exchange.part[:, : end - begin]
            )
        for rank, loop in enumerate(loops):  # the wire
            for slot in range(1, world):
                loop.views[slot]["head_part"].copy_(loops[(rank + slot) % world].exchange.part)
        for loop, final in zip(loops, finals, strict=True):
            out = _logits(config, len(final))
            loop.exchange.scatter(loop.exchange.part, out)
            want = final.float() @ head.float().T
            assert torch.equal(out, want), f"step {step}, rank {loop.config.rank}"


@pytest.mark.parametrize("name", ["deepseek, 4 ranks", "odd vocabulary, 3 ranks"])
def test_replays_follow_their_inputs(name: str) -> None:
    """Captured once, both kernels and a product between; replayed with other rows."""
    config = replace(CONFIGS[name], hidden=272)
    loop = _loop(config)
    count = config.capacity - 1
    final, out = _final(config, count, 0), _logits(config, count)
    head = _whole_numbers((config.per, config.hidden), "float32", 7)

    def step() -> None:
        rows = loop.exchange.gather(final)
        torch.mm(rows.float(), head.T, out=loop.exchange.part)
        loop.exchange.scatter(loop.exchange.part, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    theirs = [v["head_part"] for v in loop.views[1:]]
    first = config.rank * config.capacity
    for seed in range(1, 5):
        final.copy_(_final(config, count, seed))
        for slot, part in enumerate(theirs):
            part.fill_(100 * seed + slot)
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for holder in range(config.world):
            begin, end = config.columns_of(holder)
            slot = (holder - config.rank) % config.world
            own = (final.float() @ head.T)[:, : end - begin]
            want = own if slot == 0 else torch.full_like(own, 100 * seed + slot - 1)
            assert torch.equal(out[:, begin:end], want), f"replay {seed}, rank {holder}'s columns"
        assert torch.equal(loop.exchange.part[first : first + count], final.float() @ head.T)
    assert loop.signals() == ([10] * (config.world - 1),) * 2
