"""What tests of DeepEP's transports share: a transport over the model of upstream."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from barriers.deepep import DeepEpLowLatency, DeepEpNormal
from barriers.transport import TransportConfig, received_shape
from bench.transport_cases import Tokens, run_experts
from tests.cpu.fake_deepep import FakeBuffer

CPU = torch.device("cpu")
SMALL = TransportConfig(rank=0, world=1, capacity=6, hidden=2048, num_experts=8, top_k=3)
MAX_ERROR = 3e-3
Transport = DeepEpLowLatency | DeepEpNormal


def allocate(config: TransportConfig, kind: type[Transport]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype))
        for _, name, shape, dtype in kind.buffers(config)
    }


def make(config: TransportConfig, kind: type[Transport], group: object = None) -> Transport:
    """A warm transport over the model of upstream, as `open` makes it."""
    buffers = allocate(config, kind)
    if kind is DeepEpLowLatency:
        return DeepEpLowLatency.open(config, buffers, group)
    return DeepEpNormal.open(config, buffers, group, None)


def fake(transport: Transport) -> FakeBuffer:
    assert isinstance(transport.upstream, FakeBuffer)
    return transport.upstream


def layer(transport: Transport, t: Tokens, gains: torch.Tensor) -> torch.Tensor:
    """One layer with its experts; what nobody may read is NaN."""
    received = transport.dispatch(t.x, None, t.ids, t.weights)
    rows, choices = received.ids.shape
    config = transport.config
    assert (rows, choices) == received_shape(transport.name, config, t.x.shape[0])
    y = torch.empty(rows * choices, config.hidden, dtype=torch.bfloat16)
    run_experts(config, received, gains, y)
    out = torch.full_like(t.x, float("nan"))
    transport.combine(out, y, received, t.ids, t.shared)
    return out


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `import deep_ep` find the model of upstream."""
    package = ModuleType("deep_ep")
    package.Buffer = FakeBuffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", package)
