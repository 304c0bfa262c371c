"""A head cut by vocabulary: its sizes, its oracle, its checks, and gloo ranks over collectives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from barriers import vocabulary_ref as ref
from barriers.vocabulary import VocabularyConfig, check_gather, check_scatter
from barriers.vocabulary_allgather import VocabularyAllGather
from barriers.vocabulary_peers import VocabularyPeers
from tests.cpu.gloo_ranks import run_gloo_ranks

SMALL = VocabularyConfig(rank=0, world=4, capacity=6, hidden=48, vocab=1003)
VOCABS = (1003, 1024, 130, 1)  # not divisible; whole slices; ranks without a column; hardly one


def whole_numbers(shape: tuple[int, ...], dtype: str, seed: int) -> torch.Tensor:
    """Small enough that every sum of products is exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(getattr(torch, dtype))


def finals_of(config: VocabularyConfig, counts: list[int], seed: int) -> list[torch.Tensor]:
    """Final rows of every rank."""
    return [
        whole_numbers((n, config.hidden), config.act_dtype, 100 * seed + r)
        for r, n in enumerate(counts)
    ]


def head_of(config: VocabularyConfig) -> torch.Tensor:
    return whole_numbers((config.vocab, config.hidden), config.act_dtype, 7)


def counts_of(config: VocabularyConfig, step: int) -> list[int]:
    """Other rows on each rank, the capacity and one row among them."""
    return [1 + (5 * r + 5 - step) % config.capacity for r in range(config.world)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": 9}, "1 to 8 ranks"),
        ({"rank": 4}, "rank 4 of 4"),
        ({"capacity": 0}, "at least 1 sampling row, got 0"),
        ({"hidden": 100}, "multiple of 16, got 100"),
        ({"vocab": 0}, "at least 1 column, got 0"),
        ({"act_dtype": "float64"}, "got 'float64'"),
    ],
)
def test_config_refuses(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("vocab", [*VOCABS, 129280, 102400])
def test_slices_are_the_vocabulary_in_order(world: int, vocab: int) -> None:
    ranks = ref.ranks_of(replace(SMALL, world=world, vocab=vocab))
    columns = [c for r in ranks for c in range(r.begin, r.end)]
    assert columns == list(range(vocab))
    for r in ranks:
        assert r.per == ranks[0].per
        assert r.per % 128 == 0
        assert r.per * world - vocab < world * 128, "no more padding than it takes"
        assert r.begin == r.end or r.begin == r.rank * r.per, "a column's place follows from per"
        assert (r.begin, r.end) == ranks[0].columns_of(r.rank)


def test_deepseek_slices() -> None:
    config = VocabularyConfig(rank=7, world=8, capacity=64, hidden=7168, vocab=129280)
    assert (config.per, config.begin, config.end) == (16256, 113792, 129280)


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("vocab", VOCABS)
def test_oracle_is_the_whole_head(world: int, vocab: int) -> None:
    config = replace(SMALL, world=world, vocab=vocab)
    head, counts = head_of(config), counts_of(config, 0)
    finals = finals_of(config, counts, 1)
    rows = ref.gather_ref(config, finals)
    parts = [ref.product_ref(c, rows, head) for c in ref.ranks_of(config)]
    for final, logits in zip(finals, ref.scatter_ref(config, parts, counts), strict=True):
        assert torch.equal(logits, (final.double() @ head.double().T).float())


def test_oracle_puts_rows_where_their_rank_is() -> None:
    config = replace(SMALL, world=3)
    finals = finals_of(config, [2, 6, 1], 3)
    rows = ref.gather_ref(config, finals).view(3, 6, -1)
    for source, final in enumerate(finals):
        assert torch.equal(rows[source, : len(final)], final)
        assert not rows[source, len(final) :].any()


# -- shapes that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("final", "message"),
    [
        (torch.zeros(2, 48), r"final must be torch.bfloat16 \(2, 48\), contiguous, got"),
        (torch.zeros(2, 32).bfloat16(), r"torch.bfloat16 \(2, 32\)"),
        (torch.zeros(48, 2).bfloat16().T, "strides"),
        (torch.zeros(7, 48).bfloat16(), "7 rows do not fit the capacity 6"),
        (torch.zeros(0, 48).bfloat16(), "at least one row, got none"),
    ],
)
def test_gather_names_what_is_wrong(final: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"gather: .*{message}"):
        check_gather(SMALL, final)


PART = torch.zeros(24, 256)


@pytest.mark.parametrize(
    ("part", "out", "message"),
    [
        (PART[:23], torch.zeros(2, 1003), r"part must be torch.float32 \(24, 256\)"),
        (PART.half(), torch.zeros(2, 1003), "got torch.float16"),
        (PART.clone(), torch.zeros(2, 1003), "the exchange's own `part`"),
        (PART, torch.zeros(2, 1024), r"out must be torch.float32 \(2, 1003\)"),
        (PART, torch.zeros(2, 1003).half(), "out must be .* got torch.float16"),
        (PART, torch.zeros(1003, 2).T, "contiguous columns"),
        (PART, torch.zeros(1, 1003).expand(2, 1003), "contiguous columns"),
        (PART, torch.zeros(7, 1003), "7 rows do not fit the capacity 6"),
        (PART, torch.zeros(0, 1003), "at least one row, got none"),
    ],
)
def test_scatter_names_what_is_wrong(part: torch.Tensor, out: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"scatter: .*{message}"):
        check_scatter(SMALL, part, out, PART)


def test_rows_further_apart_fit() -> None:
    check_scatter(SMALL, PART, torch.zeros(3, 1100)[:, :1003], PART)


@pytest.mark.parametrize("cls", [VocabularyAllGather, VocabularyPeers])
def test_buffers_are_the_same_on_every_rank(
    cls: type[VocabularyAllGather] | type[VocabularyPeers],
) -> None:
    first, last = (list(cls.buffers(replace(SMALL, rank=r))) for r in (0, 3))
    assert first == last
    shapes = {name: (shape, dtype) for _, name, shape, dtype in first}
    assert shapes["head_rows"] == ((24, 48), "bfloat16")
    assert shapes["head_part"] == ((24, 256), "float32")


def test_only_peer_memory_is_symmetric() -> None:
    assert {s for s, *_ in VocabularyPeers.buffers(SMALL)} == {"peers"}
    assert {s for s, *_ in VocabularyAllGather.buffers(SMALL)} == {"scratch"}


# -- over collectives: eight processes, every scenario in one start ------------------------------

WORLDS = tuple(range(1, 9))


@pytest.mark.slow
def test_allgather_ranks(tmp_path: Path) -> None:
    run_gloo_ranks(max(WORLDS), _rank_main, str(tmp_path / "store"))


class Meetings:
    """Writes down what ranks meet for."""

    def __init__(self) -> None:
        self.told: list[tuple[int, str, bool]] = []

    @contextmanager
    def collectives(self, layer: int, operation: str, *, opens_step: bool) -> Iterator[None]:
        self.told.append((layer, operation, opens_step))
        yield


def _rank_main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    ranks = max(WORLDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    groups = {world: dist.new_group(list(range(world))) for world in WORLDS}
    for world, group in groups.items():
        if rank >= world:
            continue
        for vocab in VOCABS:
            _check_steps(replace(SMALL, rank=rank, world=world, vocab=vocab), group)
    for act in ("float16", "float32"):
        _check_steps(replace(SMALL, rank=rank, world=ranks, act_dtype=act), dist.group.WORLD)
    with pytest.raises(ValueError, match=f"this is rank {rank} of {ranks}.*share the head"):
        VocabularyAllGather(replace(SMALL, rank=0, world=2), {}, dist.group.WORLD)
    dist.barrier()
    dist.destroy_process_group()


def _check_steps(config: VocabularyConfig, group: object) -> None:
    buffers = {
        # 0x7f in every byte: a large number wherever nothing is written.
        name: torch.full(shape, 0x7F7F7F7F, dtype=torch.int32).view(torch.float32).to(_dtype(dtype))
        for _, name, shape, dtype in VocabularyAllGather.buffers(config)
    }
    meetings = Meetings()
    exchange = VocabularyAllGather(config, buffers, group, meetings)
    head = head_of(config)
    for step in range(3):
        counts = counts_of(config, step)
        finals = finals_of(config, counts, step)
        final, count = finals[config.rank], counts[config.rank]
        rows = exchange.gather(final, opens_step=step == 1)
        want = ref.gather_ref(config, finals).view(config.world, config.capacity, -1)
        got = rows.view(config.world, config.capacity, -1)
        for source, sent in enumerate(counts):
            assert torch.equal(got[source, :sent], want[source, :sent]), (config, step, source)
        exchange.part.copy_(ref.product_ref(config, rows, head))
        wide = torch.full((count, config.vocab + 5), float("nan"))
        out = wide[:, : config.vocab]
        exchange.scatter(exchange.part, out)
        assert torch.equal(out, (final.double() @ head.double().T).float()), (config, step)
        assert wide[:, config.vocab :].isnan().all(), "columns past the vocabulary were written"
    assert meetings.told == [
        told for step in range(3) for told in ((-1, "head", step == 1), (-1, "sample", False))
    ]


def _dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, name)
    return dtype
