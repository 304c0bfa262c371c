"""Random numbers of a draw: a counter-based hash of (seed, position, token), nothing else.

Philox4x32-10 with the request's 64-bit seed as key and (token, position, 0, 0) as counter. Two of
its words make one exponential variate, so that small ones, which decide the draw, are as exact as
large ones: the relative error is that of fp32 down to 2**-65. Values above 16.6 (one in 1.7e7) are
drawn as 16.6; they lose to any other token of comparable probability.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ALMOST_ONE = tl.constexpr(1.0 - 2.0**-24)
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_TERMS = 9  # of the series of -log(1 - v) for v < 1/16: relative error 1e-11


@triton.jit
def exponential_of_words(w0, w1):
    """A standard exponential variate from two random uint32 blocks."""
    # Both sums are of one sign: a small v keeps the precision of its second word.
    v = w0.to(tl.float32) * 2.3283064365386963e-10  # 2**-32
    v += (w1.to(tl.float32) + 0.5) * 5.421010862427522e-20  # 2**-64
    v = tl.minimum(v, ALMOST_ONE)
    # log(1 - v) would round small v away.
    series = v * 0.0 + 1.0 / 9
    for k in tl.static_range(8, 0, -1):
        series = series * v + 1.0 / k
    return tl.where(v < 0.0625, series * v, -tl.log(1.0 - v))


@triton.jit
def exponential(seed_low, seed_high, position, token):
    """A standard exponential variate per token.

    Args:
        seed_low, seed_high, position: int32 scalars.
        token: int32 block.
    """
    zero = token.to(tl.uint32, bitcast=True) * 0
    w0, w1, _, _ = tl.philox_impl(
        token.to(tl.uint32, bitcast=True),
        zero + position.to(tl.uint32, bitcast=True),
        zero,
        zero,
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    return exponential_of_words(w0, w1)


def philox_ref(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox4x32-10 on words held in int64 tensors; returns four words likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The product may wrap to a negative number; its 64 bits are right.
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD
        c2, c3 = (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _KEY_A & _WORD, k1 + _KEY_B & _WORD
    return [c0, c1, c2, c3]


def exponential_ref(
    seed: torch.Tensor, position: torch.Tensor, token: torch.Tensor
) -> torch.Tensor:
    """`exponential` of rows: seed int32 [n, 2], position int32 [n], token int32 [V] give fp32
    [n, V]."""
    n = len(position)
    zero = torch.zeros(n, len(token), dtype=torch.int64)
    word = seed.long() & _WORD
    w0, w1, _, _ = philox_ref(
        [zero + token.long(), zero + (position.long() & _WORD)[:, None], zero, zero],
        [word[:, :1], word[:, 1:]],
    )
    return exponential_of_words_ref(w0, w1)


def exponential_of_words_ref(w0: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """`exponential_of_words` on words held in int64 tensors."""
    v = w0.float() * 2.0**-32 + (w1.float() + 0.5) * 2.0**-64
    v = v.clamp(max=ALMOST_ONE.value)
    series = torch.full_like(v, 1 / _TERMS)
    for k in range(_TERMS - 1, 0, -1):
        series = series * v + 1 / k
    return torch.where(v < 0.0625, series * v, -torch.log(1 - v))
