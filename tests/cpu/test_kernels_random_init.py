"""Seeded random tensors: the kernel's bits are the oracle's, and they look random."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kernels.triton.launch import JitLauncher
from kernels.triton.random_init import REF_CHUNK, fill_random, fill_random_ref

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
LAUNCH = JitLauncher()


def _both(size: int, dtype: torch.dtype, **numbers: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Kernel's and oracle's values; what follows them in memory must stay."""
    outs = []
    for fill in (lambda out: fill_random(LAUNCH, out, **numbers), None):
        buffer = torch.zeros(size + 3, dtype=dtype)
        if fill is None:
            fill_random_ref(buffer[:size], **numbers)
        else:
            fill(buffer[:size])
        assert (buffer[size:].float() == 0).all()
        outs.append(buffer[:size])
    return outs[0], outs[1]


def _ref(size: int, dtype: torch.dtype = F32, **numbers: Any) -> torch.Tensor:
    out = torch.empty(size, dtype=dtype)
    fill_random_ref(out, **numbers)
    return out


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_kernel_and_oracle_agree_bit_for_bit(size: int, dtype: torch.dtype, mean: float) -> None:
    got, want = _both(size, dtype, seed=-7, scale=0.1, mean=mean)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "mantissa"), [(BF16, 7), (FP8, 3)])
def test_narrow_dtypes_agree(dtype: torch.dtype, mantissa: int) -> None:
    """The interpreter truncates bf16 and drops e4m3's carry: bits are compared on the device."""
    got, want = (t.float() for t in _both(9000, dtype, seed=3, scale=448.0))
    fraction = want.abs().frexp().mantissa * 2 ** (mantissa + 1)
    no_carry = (fraction != 2**mantissa) & (want.abs() >= 2**-6)
    assert no_carry.float().mean() > 0.8
    apart = (got - want).abs() / want.abs()
    assert apart[no_carry].max() <= 2**-mantissa
    exact = _ref(9000, seed=3, scale=448.0)
    assert torch.equal(want, exact.to(dtype).float())


@pytest.mark.parametrize("offset", [0, 5, 2**31 - 2, 2**32 - 3, 2**40 + 1])
def test_a_tensor_may_be_filled_in_parts(offset: int) -> None:
    whole = _ref(100, seed=11, scale=1.0, offset=offset)
    parts = [_ref(40, seed=11, scale=1.0, offset=offset)]
    parts.append(_both(60, F32, seed=11, scale=1.0, offset=offset + 40)[0])
    assert torch.equal(whole, torch.cat(parts))


def test_oracle_does_not_depend_on_its_chunks() -> None:
    size = REF_CHUNK + 10
    whole = _ref(size, FP8, seed=1, scale=1.0)
    tail = _ref(10, FP8, seed=1, scale=1.0, offset=REF_CHUNK)
    assert torch.equal(whole[-10:].float(), tail.float())


def test_values_are_uniform_around_the_mean() -> None:
    x = _ref(1 << 16, seed=4, scale=0.25, mean=1.0)
    assert 0.75 < x.min() < 0.7501
    assert 1.2499 < x.max() < 1.25
    assert x.mean().item() == pytest.approx(1.0, abs=4 * 0.25 / math.sqrt(3 * (1 << 16)))
    assert x.var().item() == pytest.approx(0.25**2 / 3, rel=0.02)
    counts = torch.histc(x, 64, 0.75, 1.25)
    assert ((counts - 1024) ** 2 / 1024).sum() < 110  # chi-squared, 63 degrees: 1 in 4000


def test_neighbours_and_seeds_are_unrelated() -> None:
    n = 1 << 14
    a, b = _ref(n, seed=1, scale=1.0), _ref(n, seed=2, scale=1.0)
    far = _ref(n, seed=1, scale=1.0, offset=1 << 32)
    high = _ref(n, seed=1 + (1 << 32), scale=1.0)
    for x, y in ((a, b), (a, far), (a, high), (a[1:], a[:-1]), (a[128:], a[:-128])):
        assert abs((x * y).mean() * 3) < 5 / math.sqrt(n)


def test_seeds_do_not_make_new_kernels() -> None:
    specs = set()

    class Recorder:
        num_sms = 132
        pdl = 0

        def __call__(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
            numbers = [a for a in args if not isinstance(a, torch.Tensor)]
            # What a kernel is specialised on: width of an integer, and whether 16 divides it.
            specs.add(tuple((type(a), abs(a) < 2**31, a % 16 == 0) for a in numbers[:-1]))
            assert isinstance(numbers[-1], float)

    out = torch.empty(64, device="meta")
    for seed in range(40):
        for mean in (0.0, 1.0):
            fill_random(Recorder(), out, seed=seed << 4, scale=0.1 * (seed + 1), mean=mean)
    assert len(specs) == 1


def test_misuse_is_named() -> None:
    out = torch.empty(4, 4)
    with pytest.raises(ValueError, match="got scale 0.0, mean 1.0; fill a constant with fill_"):
        fill_random_ref(out, seed=0, scale=0.0, mean=1.0)
    with pytest.raises(ValueError, match="at most 64 scales"):
        fill_random(LAUNCH, out, seed=0, scale=0.01, mean=1.0)
    with pytest.raises(ValueError, match="scale must be above 0"):
        fill_random_ref(out, seed=0, scale=float("nan"))
    with pytest.raises(ValueError, match="contiguous tensor with elements"):
        fill_random_ref(out.T[1:], seed=0, scale=1.0)
    with pytest.raises(ValueError, match="got torch.int32"):
        fill_random_ref(out.int(), seed=0, scale=1.0)
    with pytest.raises(ValueError, match="offset must not be negative, got -1"):
        fill_random_ref(out, seed=0, scale=1.0, offset=-1)
