"""What `rdep` tells its peers, counted on the device: the bytes of a dispatch, and its barriers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from barriers.rdep import RdepTuning
from barriers.transport import TransportConfig
from bench.transport_cases import Tokens, make_gains, make_tokens, run_experts, wire_bytes
from capture_cache.driver import Device
from tests.ep.loopback import Loopback

DEEPSEEK = TransportConfig(
    rank=1, world=4, capacity=24, hidden=7168, num_experts=64, top_k=8, fp8=True
)
SMALL = replace(DEEPSEEK, hidden=144, world=2, num_experts=8, top_k=3, capacity=9)
CONFIGS = {
    "deepseek, 4 ranks": DEEPSEEK,
    "8 ranks": replace(DEEPSEEK, world=8, rank=5),
    "small, 2 ranks": SMALL,
    "plain bf16": replace(SMALL, fp8=False),
}
TUNINGS = {
    "default": RdepTuning(),
    "the last block signals": RdepTuning(share_blocks=0),
    "every block signals": RdepTuning(share_blocks=1024, send_threads=64),
}
PATTERNS = (0x7F, 0x55)  # a byte that was written differs from one of them


@pytest.fixture(autouse=True)
def _stream() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield
        torch.cuda.synchronize()


def _tokens(config: TransportConfig, what: str) -> Tokens:
    cuda = torch.device("cuda", torch.cuda.current_device())
    t = make_tokens(config, config.rank, config.capacity - 1, cuda, seed=5)
    if what == "some padded":
        t.ids[1::3] = -1
    elif what == "all padded":
        t.ids[:] = -1
    return t


def _layer(loop: Loopback, t: Tokens, *, opens_step: bool = False) -> torch.Tensor:
    config = loop.config
    received = loop.transport.dispatch(t.x, None, t.ids, t.weights, opens_step=opens_step)
    y = t.x.new_empty(received.ids.numel(), config.hidden)
    run_experts(config, received, make_gains(config, t.x.device), y)
    out = torch.full_like(t.x, float("nan"))
    loop.transport.combine(out, y, received, t.ids, t.shared)
    return out


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_is_two_barriers(name: str, tuning: str) -> None:
    config = CONFIGS[name]
    loop = Loopback(config, Device(torch.cuda.current_device()), TUNINGS[tuning])
    loop.arm()
    for layers, what in enumerate(("all", "some padded", "all padded", "all", "all padded"), 1):
        _layer(loop, _tokens(config, what), opens_step=layers == 1)
        once_a_peer = [2 * layers] * (config.world - 1)
        assert loop.signals() == (once_a_peer, once_a_peer), f"{what}, {layers} layers"


def _written(loop: Loopback, t: Tokens, slot: int) -> torch.Tensor:
    """bool: bytes of a slot's payload that a dispatch of `t` writes."""
    _dispatch(loop, t)  # ids of rows past these were taken back, if a larger key had been before
    found = torch.zeros_like(loop.payload(slot), dtype=torch.bool)
    for pattern in PATTERNS:
        loop.poison(pattern)
        before = loop.payload(slot)
        _dispatch(loop, t)
        found |= loop.payload(slot) != before
    return found


def _dispatch(loop: Loopback, t: Tokens) -> None:
    loop.arm()
    loop.transport.dispatch(t.x, None, t.ids, t.weights)
    torch.cuda.synchronize()


def _expected(loop: Loopback, t: Tokens, slot: int) -> dict[str, torch.Tensor]:
    """By buffer, which of its elements a dispatch may write in a peer's slot, and must."""
    config = loop.config
    first = (config.rank + slot) % config.world * config.local_experts
    theirs = (t.ids >= first) & (t.ids < first + config.local_experts)
    own = slice(config.rank * config.capacity, config.rank * config.capacity + len(t))
    made = {n: torch.zeros(v.shape, dtype=torch.bool) for n, v in loop.views[slot].items()}
    made["ep_recv_x"][own][theirs.any(1).cpu()] = True
    if config.fp8:
        made["ep_recv_scale"][own][theirs.any(1).cpu()] = True
    made["ep_recv_ids"][own] = True  # -1 for a padded token: all that is said of it
    made["ep_recv_weights"][own] = theirs.cpu()
    made["ep_recv_count"][config.rank] = True
    return made


@pytest.mark.parametrize("what", ["all", "some padded", "all padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_send_nothing(name: str, what: str) -> None:
    config = CONFIGS[name]
    loop = Loopback(config, Device(torch.cuda.current_device()), RdepTuning())
    t, total = _tokens(config, what), 0
    for slot in range(1, config.world):
        written = _written(loop, t, slot)
        wanted = torch.zeros_like(written)
        start = loop.slots[slot].data_ptr() + loop.slots.shape[1] - len(written)
        for buffer, elements in _expected(loop, t, slot).items():
            view = loop.views[slot][buffer]
            at, size = view.data_ptr() - start, view.element_size()
            spread = elements.to(written.device).flatten().repeat_interleave(size)
            wanted[at : at + len(spread)] = spread
        assert torch.equal(written, wanted), f"slot {slot}: {int((written != wanted).sum())} bytes"
        total += int(written.sum())
    assert total - 4 * (config.world - 1) <= wire_bytes(config, t.ids)[0]
    for id_row, row in zip(t.ids.tolist(), _ids_at(loop, 1, len(t)), strict=True):
        assert max(id_row) >= 0 or row == [-1] * config.top_k


def _ids_at(loop: Loopback, slot: int, count: int) -> list[list[int]]:
    first = loop.config.rank * loop.config.capacity
    rows: list[list[int]] = loop.views[slot]["ep_recv_ids"][first : first + count].tolist()
    return rows


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_rows_are_not_summed(name: str) -> None:
    """Of a rank's own rows only those with one of its experts get a partial sum; and nothing of a
    layer's second half is written to a peer but the signal."""
    config = CONFIGS[name]
    loop = Loopback(config, Device(torch.cuda.current_device()), RdepTuning())
    t = _tokens(config, "some padded")
    own = slice(config.rank * config.capacity, config.rank * config.capacity + len(t))
    for pattern in PATTERNS:
        loop.arm()
        loop.poison(pattern)
        for view in loop.views[1:]:
            view["ep_partial"].zero_()  # no peer has anything for this rank
        received = loop.transport.dispatch(t.x, None, t.ids, t.weights)
        torch.cuda.synchronize()
        peers = [loop.payload(slot) for slot in range(1, config.world)]
        y = t.x.new_empty(received.ids.numel(), config.hidden)
        run_experts(config, received, make_gains(config, t.x.device), y)
        out = torch.full_like(t.x, float("nan"))
        loop.transport.combine(out, y, received, t.ids, t.shared)
        torch.cuda.synchronize()
        for slot, before in enumerate(peers, 1):
            assert torch.equal(loop.payload(slot), before), "a peer's memory was written"
        partial = loop.views[0]["ep_partial"].view(torch.uint8)
        written = (partial != pattern).any(1)
        mine = torch.zeros_like(written)
        mine[own] = (t.ids // config.local_experts == config.rank).any(1)
        assert torch.equal(written, mine), "partial sums of rows without an expert here"
        padded = (t.ids < 0).all(1)
        assert torch.equal(out[padded], t.shared[padded])
        assert not out.isnan().any()
