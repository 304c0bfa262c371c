"""What tests of the driver share: its state, and calls that must not change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import Runtime
from tests.cpu.twins import ROWS, VOCAB, device_state, load_micro
from tests.serving import Answer, Request, alone, make_requests


def host_state(runtime: Runtime) -> dict[str, Any]:
    pages = runtime.pages
    return {
        "held": {row: list(pages.held(row)) for row in range(ROWS)},
        "free": pages.num_free,
        "running": runtime.num_running,
        "in flight": runtime.num_in_flight,
        "key": runtime.last_key,
    }


def assert_unchanged_by(
    runtime: Runtime, call: Callable[[], object], error: type[Exception]
) -> str:
    """`call` raises `error` and leaves host and device as they were; returns the message."""
    before, device = host_state(runtime), device_state(runtime)
    with pytest.raises(error) as refusal:
        call()
    assert host_state(runtime) == before
    for name, tensor in device_state(runtime).items():
        assert torch.equal(tensor.view(torch.uint8), device[name].view(torch.uint8)), name
    return str(refusal.value)


def finish(runtime: Runtime) -> dict[int, list[int]]:
    """Step until nothing runs; tokens by row, of requests that keep theirs."""
    tokens: dict[int, list[int]] = {}
    for _ in range(200):
        if not runtime.num_running and not runtime.num_in_flight:
            return tokens
        if not runtime.num_in_flight:
            runtime.launch()
        out = runtime.collect()
        for row, token in zip(out.rows.tolist(), out.tokens.tolist(), strict=True):
            tokens.setdefault(row, []).append(token)
    raise AssertionError(f"{runtime.num_running} requests never end")


def seven_requests(checkpoint: Path) -> list[tuple[Request, Answer]]:
    """Requests of one to three pages, and the answer of each alone."""
    requests = make_requests(np.random.default_rng(1), (20, 1, 16, 33, 5, 40, 15), VOCAB, (12,))
    with load_micro(checkpoint) as runtime:
        return list(zip(requests, alone(runtime, requests), strict=True))
