"""DeepEP in the captured step: live, whole, every kernel listed, nothing between its calls."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from barriers.deepep import DeepEpLowLatency, DeepEpNormal, ParityError
from barriers.transport import Local
from bench.transport_cases import make_tokens
from capture_cache.arena import HostArena
from capture_cache.errors import CaptureError
from graphs.buffers import transport_config
from graphs.capture import GraphSet, TwinBackend
from graphs.checkpoint import random_weights
from graphs.devices import bind_views
from graphs.keys import GraphKey
from graphs.ops import Ops
from graphs.prove import Prover
from graphs.rope import rope_table
from graphs.weights import add_part_views
from runtime.assemble import make_step
from runtime.config import RuntimeConfig
from runtime.selection import Selection, choose
from tests.cpu.fake_deepep import FrozenBackend
from tests.cpu.upstream import CPU, Transport, fake, install


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


ROOT = Path(__file__).resolve().parents[2]


def select(transport: str, *, fp8: bool, world: int = 1, on_device: bool = False) -> Selection:
    """A DeepSeek of 4 layers, the last with experts: an odd number of exchanges a step."""
    sizes = {
        "intermediate_size": 256,
        "moe_intermediate_size": 128,
        "num_attention_heads": 2,
        "q_lora_rank": 96,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "vocab_size": 512,
        "hidden_size": 2048,
        "quantization": "fp8" if fp8 else "none",
    }
    options = RuntimeConfig(
        model="deepseek-v3",
        bs=4 * world,
        ladder="1,4,4+8",
        max_seq_len=64,
        page_size=16,
        layers=4,
        overrides=tuple(f"{k}={v}" for k, v in sizes.items()),
        device="auto" if on_device else "cpu",
        ep_size=world if on_device else None,
        transport="deepep" if on_device else "auto",
    )
    selection = choose(options, compile_only=on_device)
    return replace(selection, step=dataclasses.replace(selection.step, transport=transport))


def graphs_of(
    selection: Selection, transport: Transport, views: dict[str, torch.Tensor], backend: TwinBackend
) -> GraphSet:
    views["rope_table"].copy_(rope_table(selection.model, selection.step.max_seq_len))
    add_part_views(views)
    random_weights(selection.model, views, seed=0)
    for name in ("stop_ids", "mailbox"):
        views[name].fill_(-1)
    return GraphSet(make_step(selection, Ops(None), views, transport), selection.ladder, backend)


@pytest.fixture
def arena() -> Iterator[list[HostArena]]:
    opened: list[HostArena] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("kind", [DeepEpLowLatency, DeepEpNormal])
def test_the_whole_step_is_captured_live_and_proved(
    kind: type[Transport], fp8: bool, arena: list[HostArena]
) -> None:
    selection = select(kind.name, fp8=fp8)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
    transport = (
        DeepEpLowLatency.open(config, views, None)
        if kind is DeepEpLowLatency
        else DeepEpNormal.open(config, views, None, None)
    )
    backend = FrozenBackend(fake(transport))
    graphs = graphs_of(selection, transport, views, backend)
    graphs.warm_up()
    graphs.capture()
    assert backend.live == sorted(selection.ladder.keys, reverse=True)
    assert graphs.live.startswith(transport.name)
    prover = Prover(graphs, replays=3)
    for key in selection.ladder.keys:
        prover.prove(key)
    with graphs.stamped(GraphKey(4, 4)):
        assert backend.live[-1] == GraphKey(4, 4)
    assert fake(transport).stale == 0


def test_no_capture_begins_or_ends_between_calls(arena: list[HostArena]) -> None:
    selection = select("deepep", fp8=True)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)
    transport = DeepEpLowLatency.open(config, views, None)
    graphs = graphs_of(selection, transport, views, FrozenBackend(fake(transport)))
    graphs.warm_up()
    tokens = make_tokens(config, 0, 1, CPU)
    topk = tokens.ids.long()
    transport.send(tokens.x, topk, tokens.weights)
    with pytest.raises(ParityError, match=r"capturing key 4\+8 after a dispatch without"):
        graphs.capture()
    transport.collect(tokens.x, torch.zeros(16 * 12, 2048, dtype=torch.bfloat16))
    graphs.capture()
    transport.send(tokens.x, topk, tokens.weights)
    with pytest.raises(ParityError, match="a replay after a dispatch without"):
        graphs.replay(GraphKey(1, 1))


def test_storable_transports_are_captured_strictly(arena: list[HostArena]) -> None:
    """Without a transport that allocates, allocations in a capture stay forbidden."""
    selection = select("local", fp8=True)
    arena.append(HostArena(selection.layout))
    views = bind_views(arena[0], selection.layout, "cpu")
    config = transport_config(selection.model, selection.step, selection.ladder.max_tokens)

    class Strict(TwinBackend):
        def capture_live(self, *_: object) -> None:  # type: ignore[override]
            raise CaptureError("a pool for a step that needs none")

    graphs = graphs_of(selection, Local(config, None), views, Strict())  # type: ignore[arg-type]
    graphs.warm_up()
    graphs.capture()
    assert graphs.live == ""


LISTING = """
import json, sys
from runtime.assemble import list_kernels
from tests.cpu.test_deepep_step import select
requests = list_kernels(select(sys.argv[1], fp8=True, world=4, on_device=True), "sm_90", ["triton"])
print(json.dumps({r.spec.name: dict(r.spec.constexprs).get("TOP_K") for r in requests.requests}))
"""


@pytest.mark.parametrize(
    ("name", "top_k", "pairs"), [("deepep", 1, 4 * 4 * 12), ("deepep-normal", 8, 4 * 12 * 8)]
)
def test_every_kernel_of_a_capture_is_listed(name: str, top_k: int, pairs: int) -> None:
    """On a machine without upstream: experts see one choice a row, or K."""
    shapes = dict(_shapes(select(name, fp8=True, world=4, on_device=True)))
    assert shapes["expert_y"] == (pairs, 2048)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LISTING, name],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout.splitlines()[-1])
    assert listed["_gate_up_kernel"] == top_k
    assert ("_combine" in listed) == (name == "deepep-normal")


def _shapes(selection: Selection) -> Iterator[tuple[str, tuple[int, ...]]]:
    for place in selection.layout.places:
        yield place.entry.name, place.entry.shape
