"""Asking for weights ahead changes no bit: of a kernel, eager or replayed, and of requests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from kernels.triton.ahead import REQUEST
from kernels.triton.launch import Launcher
from tests.gpu.conftest import Load
from tests.gpu.models import options_of
from tests.gpu.test_kernels import CASES, TOKENS, Captured, bits, copied, run
from tests.serving import alone, make_requests, serve

ASKING = (
    *("add_rmsnorm", "gather_add_rmsnorm", "mla_prep", "latent_query", "mla_decode", "absorb_v"),
    *("route", "align"),
)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("name", ASKING)
def test_a_kernel_gives_the_same_bits(name: str, tokens: int, launcher: Launcher) -> None:
    case = CASES[name]
    plain, inputs = case.make(0, tokens), case.make(100, tokens)
    # Requests that end within their last one, and more than one program has.
    weights = tuple(torch.zeros(n, dtype=torch.uint8) for n in (200 * REQUEST + 48, REQUEST - 16))
    captured = Captured(case, launcher, plain | {"ahead": weights})
    for arguments in (inputs, plain):
        want = run(case, launcher, copied(case, arguments))
        got = captured.replay(copied(case, arguments))
        for output in case.outputs:
            assert torch.equal(bits(got[output]), bits(want[output])), output


@pytest.mark.parametrize(("name", "attention"), [("fp8", "triton"), ("wide", "flashinfer")])
def test_requests_get_the_same_bits(
    name: str, attention: str, load: Load, needs_flashinfer: Callable[[str], None]
) -> None:
    """Where kernels do not overlap nothing is asked for."""
    if attention == "flashinfer":
        needs_flashinfer(name)
    assert options_of(name)["max_seq_len"] >= 640
    requests = make_requests(np.random.default_rng(9), (600, 1, 65, 300), 2048, (24, 31))
    got = {}
    for mode in ("late", "off"):
        with load(name, attention=attention, pdl=mode) as runtime:
            got[mode] = [a.bits for a in (*serve(runtime, requests), *alone(runtime, requests))]
    assert got["late"] == got["off"]
