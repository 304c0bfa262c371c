"""`absorb_v` over what attention left in splits: against its oracle, and alone as in company."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.triton.launch import Launcher
from kernels.triton.mla_absorb_v import Parts, absorb_v, absorb_v_ref, takes_parts
from kernels.triton.mla_decode import merge, merge_ref

HEADS, VALUE, LATENT, CUT = 128, 128, 512, 1088
BF16, F32 = torch.bfloat16, torch.float32
Inputs = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Parts]


def _inputs(tokens: int, splits: int) -> Inputs:
    """As attention leaves them: what no token has is NaN."""
    made = torch.Generator().manual_seed(7)
    edges = torch.tensor([CUT + 1, 0, 1, CUT, 2 * CUT, splits * CUT])[:tokens]
    length = torch.randint(1, splits * CUT + 1, (tokens,), generator=made)
    length[: len(edges)] = edges
    used = -(-length // CUT)
    o = torch.randn(tokens, HEADS, LATENT, generator=made)
    part_o = torch.randn(tokens, splits, HEADS, LATENT, generator=made)
    lse = torch.randn(tokens, splits, HEADS, generator=made) * 8
    unused = torch.arange(splits) >= torch.where(used > 1, used, 0)[:, None]
    o[used != 1] = float("nan")
    part_o[unused], lse[unused] = float("nan"), float("nan")
    w_uv = torch.randn(HEADS, VALUE, LATENT, generator=made) * LATENT**-0.5
    args = o.to(BF16), length.to(torch.int32), w_uv.to(BF16)
    return args, Parts(part_o.to(BF16), lse, CUT)


def _outputs(tokens: int) -> dict[str, torch.Tensor]:
    width = HEADS * VALUE
    return {
        "out": torch.zeros(tokens, width, dtype=BF16),
        "out_q": torch.zeros(tokens, width).to(torch.float8_e4m3fn),
        "out_scale": torch.zeros(tokens, width // 128),
    }


def _run(launch: Launcher, inputs: Inputs, tokens: slice) -> dict[str, torch.Tensor]:
    (o, length, w_uv), parts = inputs
    args = (o[tokens].cuda(), length[tokens].cuda(), w_uv.cuda())
    some: Any = Parts(parts.o[tokens].cuda(), parts.lse[tokens].cuda(), parts.cut)
    outs = {name: t.cuda() for name, t in _outputs(args[0].shape[0]).items()}
    if not takes_parts(args[0].shape[0], some.o.shape[1], dv=VALUE, dc=LATENT, act_bytes=2):
        merge(launch, args[1], some.o, some.lse, cut=some.cut, out=args[0])
        some = None
    absorb_v(launch, *args, parts=some, **outs)
    return {name: t.cpu() for name, t in outs.items()}


FEW = [(tokens, splits) for tokens in (1, 2, 3, 6, 8) for splits in (2, 8, 13, 32)]


@pytest.mark.parametrize(
    ("tokens", "splits"), [*FEW, (32, 2), (32, 3), (32, 4), (70, 2), (70, 4), (70, 13)]
)
def test_absorb_v_merges(tokens: int, splits: int, launcher: Launcher) -> None:
    inputs = _inputs(tokens, splits)
    got, want = _run(launcher, inputs, slice(None)), _outputs(tokens)
    (o, length, w_uv), parts = inputs
    merge_ref(length, parts.o, parts.lse, cut=parts.cut, out=o)
    absorb_v_ref(o, length, w_uv, **want)
    for name in ("out", "out_scale"):
        a, b = got[name].float(), want[name].float()
        assert torch.isfinite(a).all()
        limit = 2**-6 * (b.abs() + b.square().mean().sqrt())
        assert ((a - b).abs() <= limit).all(), name
    assert (got["out_q"].float() != want["out_q"].float()).float().mean() <= 0.03


@pytest.mark.parametrize("splits", [2, 4, 8, 13, 32])
def test_a_tokens_bits_do_not_depend_on_how_many_there_are(splits: int, launcher: Launcher) -> None:
    """Of few tokens a program merges the splits itself, of many a kernel of its own does."""
    inputs = _inputs(130, splits)
    want = _run(launcher, inputs, slice(None))
    few = slice(0, 1), slice(2, 4), slice(3, 6), slice(3, 8), slice(0, 8), slice(100, 101)
    for some in (*few, slice(90, 122), slice(60, 125)):
        got = _run(launcher, inputs, some)
        for name, tensor in got.items():
            same = tensor.view(torch.uint8), want[name][some].contiguous().view(torch.uint8)
            assert torch.equal(*same), (name, some)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9])
def test_absorb_v_of_few_tokens_without_splits(tokens: int, launcher: Launcher) -> None:
    (o, length, w_uv), _ = _inputs(130, 2)
    o = o.nan_to_num()
    o[length == 0] = float("nan")
    want, got = _outputs(130), _outputs(tokens)
    for outs in (want, got):
        some = slice(0, outs["out"].shape[0])
        on_device = {name: t.cuda() for name, t in outs.items()}
        absorb_v(launcher, o[some].cuda(), length[some].cuda(), w_uv.cuda(), **on_device)
        outs.update({name: t.cpu() for name, t in on_device.items()})
    for name, tensor in got.items():
        same = tensor.view(torch.uint8), want[name][:tokens].contiguous().view(torch.uint8)
        assert torch.equal(*same), name
