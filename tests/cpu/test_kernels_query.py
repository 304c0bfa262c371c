"""The fused absorbed query: against the two products it replaces, and row by row."""

from __future__ import annotations

import pytest
import torch

from kernels.triton.mla_query import fuses_query, latent_query, latent_query_ref
from tests.cpu.test_kernels_linear import (
    BF16,
    F16,
    FP8,
    LAUNCH,
    compile_for_both,
    compiled,
    exact_in_tiles,
    meta,
    quantized,
    rand,
    weight,
)

HEADS, DN, DR, DC, RANK = 3, 64, 64, 160, 200  # heads that straddle scale blocks; partial tiles
MAX_LEN = 40
I32 = torch.int32
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def _inputs(tokens: int, dn: int = DN) -> tuple[torch.Tensor, ...]:
    xq, xs = quantized(tokens, RANK, 3)
    w, ws = weight(HEADS * (dn + DR), RANK)
    w_uk = (rand(HEADS, dn, DC, seed=6) / dn**0.5).half()
    row = torch.arange(tokens, dtype=I32)
    row[2:3] = -1
    pos = (torch.arange(tokens) * 7 % MAX_LEN).to(I32)
    return xq, xs, w, ws, w_uk, pos, row, rand(MAX_LEN, DR, seed=8)


def _run(args: tuple[torch.Tensor, ...], interleave: bool) -> torch.Tensor:
    tokens, heads = args[0].shape[0], args[4].shape[0]
    wide = torch.full((tokens + 1, heads, DC + DR), 777.0, dtype=F16)
    latent_query(LAUNCH, *args, interleave=interleave, out=wide[:tokens])
    assert (wide[tokens:] == 777.0).all()
    return wide[:tokens].clone()


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 16, 17, 65])
def test_matches_the_oracle(tokens: int, interleave: bool) -> None:
    args = _inputs(tokens)
    want = torch.empty(tokens, HEADS, DC + DR, dtype=F16)
    latent_query_ref(*args, interleave=interleave, out=want)
    got = _run(args, interleave)
    scale = float(want.float().square().mean().sqrt())
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3 * scale)
    if tokens > 2:
        assert not got[2].any(), "a padded token's query is zeros"


def test_heads_of_two_scale_blocks() -> None:
    args = _inputs(4, dn=128)
    want = torch.empty(4, HEADS, DC + DR, dtype=F16)
    latent_query_ref(*args, interleave=True, out=want)
    got = _run(args, interleave=True)
    scale = float(want.float().square().mean().sqrt())
    torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3 * scale)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    _, xs, _, ws, w_uk, pos, row, table = _inputs(37)
    # Exact inside a tile, as the interpreter's order is BLAS's there: see `exact_in_tiles`.
    xq = exact_in_tiles(37, RANK, seed=1).to(FP8)
    w = exact_in_tiles(HEADS * (DN + DR), RANK, seed=2).to(FP8)
    w_uk = (torch.arange(DC) % DN == torch.arange(DN)[:, None]).half().repeat(HEADS, 1, 1)
    whole = _run((xq, xs, w, ws, w_uk, pos, row, table), interleave=True)
    for tokens in (1, 16, 20):
        some = slice(37 - tokens, 37)
        args = (xq[some], xs[some], w, ws, w_uk, pos[some], row[some], table)
        assert torch.equal(_run(args, interleave=True), whole[some])


def test_what_is_fused() -> None:
    assert fuses_query(128, 64, 512, fp8=True, act_bytes=2)
    assert not fuses_query(128, 64, 512, fp8=False, act_bytes=2)
    assert not fuses_query(128, 64, 512, fp8=True, act_bytes=4)
    assert not fuses_query(96, 64, 512, fp8=True, act_bytes=2)
    args = _inputs(2)
    with pytest.raises(ValueError, match="use linear_fp8 and absorb_q"):
        latent_query(LAUNCH, *args, interleave=True, out=torch.empty(2, HEADS, DC + DR))
    with pytest.raises(ValueError, match=r"w and out must be \(384, 200\) and \(2, 3, 224\)"):
        latent_query(LAUNCH, *args, interleave=True, out=torch.empty(3, HEADS, DC + DR).half())


def test_real_shapes_compile_without_spills() -> None:
    built = compiled("tests.cpu.test_kernels_query")
    assert {b["arch"] for b in built} == {90, 100}
    assert not [b for b in built if b["stack_bytes"] or b["shared_bytes"] > 227 * 1024]
    assert not [b for b in built if not b["mma"]]


def _real_shapes(launch: object) -> None:
    for tokens in (1, 32, 64):
        xq, xs = meta(tokens, 1536, dtype=FP8), meta(tokens, 12)
        w, ws = meta(24576, 1536, dtype=FP8), meta(192, 12)
        rows = meta(tokens, dtype=I32)
        w_uk, out = meta(128, 128, 512, dtype=BF16), meta(tokens, 128, 576, dtype=BF16)
        latent_query(
            launch,  # type: ignore[arg-type]
            *(xq, xs, w, ws, w_uk, rows, rows, meta(4096, 64)),
            interleave=True,
            out=out,
        )


if __name__ == "__main__":
    compile_for_both(_real_shapes)
