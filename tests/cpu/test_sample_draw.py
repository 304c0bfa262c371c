"""Seeded draws: the hash, the variates, and frequencies that match the probabilities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kernels.triton import sample
from kernels.triton.draw_random import (
    exponential,
    exponential_of_words,
    exponential_of_words_ref,
    exponential_ref,
    philox_ref,
)
from tests.cpu.sample_rows import (
    DRAWN,
    LAUNCH,
    LOGITS,
    ONE_IS_LEFT,
    STEPS,
    Buffers,
    Row,
    Step,
    check_frequencies,
    probabilities,
    step_buffers,
)

BOTH = pytest.mark.parametrize("step", STEPS)
I32 = torch.int32
OUTPUTS = ("out_token", "out_logprob", "top_ids", "top_logprobs")


# -- the hash -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], want: list[int]) -> None:
    """Known answers of Philox4x32-10 (Random123's own)."""
    words = philox_ref([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [w.item() for w in words] == want


@triton.jit
def _exponential(seed, position, out, N: tl.constexpr):
    token = tl.arange(0, N)
    value = exponential(tl.load(seed), tl.load(seed + 1), tl.load(position), token)
    tl.store(out + token, value)


@triton.jit
def _of_words(w0, w1, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(w0 + i).to(tl.uint32, bitcast=True)
    tl.store(out + i, exponential_of_words(a, tl.load(w1 + i).to(tl.uint32, bitcast=True)))


@pytest.mark.parametrize(("seed", "position"), [((0, 0), 0), ((-1, 5), 131071), ((7, -9), 12)])
def test_kernel_and_oracle_hash_alike(seed: tuple[int, int], position: int) -> None:
    s, p, out = torch.tensor(seed, dtype=I32), torch.tensor([position], dtype=I32), torch.empty(512)
    _exponential[(1,)](s, p, out, N=512)
    want = exponential_ref(s[None], p, torch.arange(512, dtype=I32))[0]
    torch.testing.assert_close(out, want, rtol=1e-6, atol=0)


def test_small_and_large_variates_are_right() -> None:
    words = torch.tensor(
        [[0, 0], [0, 1 << 31], [1, 0], [1 << 20, 7], [1 << 28, 0], [(1 << 28) - 1, 0], [1 << 31, 0]]
        + [[0xFFFFFF00, 0], [0xFFFFFFFF, 0xFFFFFFFF]]
    )
    v = (words[:, 0].double() + (words[:, 1].double() + 0.5) / 2**32) / 2**32
    want = -torch.log1p(-v.clamp(max=1 - 2**-24))
    want[:3] = v[:3]  # fp64 itself rounds there
    got = exponential_of_words_ref(words[:, 0], words[:, 1])
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    out, padded = torch.empty(16), torch.zeros(16, 2, dtype=torch.int64)
    padded[: len(words)] = words
    low = padded.to(torch.int64).numpy().astype(np.uint32).view(np.int32)
    w0, w1 = (torch.from_numpy(low[:, i].copy()) for i in (0, 1))
    _of_words[(1,)](w0, w1, out, N=16)
    torch.testing.assert_close(out[: len(words)], got, rtol=1e-6, atol=0)


def test_variates_are_exponential_and_independent() -> None:
    seed = torch.tensor([[3, 4]] * 400, dtype=I32)
    e = exponential_ref(seed, torch.arange(400, dtype=I32), torch.arange(500, dtype=I32)).double()
    for power, moment in ((1, 1.0), (2, 2.0), (3, 6.0)):
        assert abs((e**power).mean().item() / moment - 1) < 0.03
    u = torch.exp(-e).flatten().sort().values
    steps = torch.arange(1, len(u) + 1) / len(u)
    assert (u - steps).abs().max().item() * len(u) ** 0.5 < 1.63  # Kolmogorov, 1 %
    rows, cols = e - 1, e.T - 1
    for a, b in ((rows[1:], rows[:-1]), (cols[1:], cols[:-1])):
        assert abs((a * b).mean().item()) < 4 / e.numel() ** 0.5


# -- frequencies ----------------------------------------------------------------------------------

SEEDS = (0, 1, 2**63 + 5, 2**64 - 1)
DRAWS = 100_000


def _draws(logits: torch.Tensor, row: Row, draws: int = DRAWS) -> torch.Tensor:
    """Tokens at many positions over several seeds, by the oracle (the kernels hash alike)."""
    each = draws // len(SEEDS)
    order = [i for i in range(len(SEEDS)) for _ in range(each)]
    b = step_buffers(logits.expand(draws, -1), [replace(row, seed=s) for s in SEEDS], order=order)
    b["tok_pos"][2:] = torch.arange(each, dtype=I32).repeat(len(SEEDS))
    STEPS[1](b)
    return b["out_token"]


@pytest.mark.parametrize("row", DRAWN, ids=str)
def test_frequencies_match_the_probabilities(row: Row) -> None:
    check_frequencies(_draws(LOGITS, row).numpy(), row)


@pytest.mark.parametrize(("row", "left"), ONE_IS_LEFT, ids=str)
def test_corners_that_leave_one_token(row: Row, left: set[int]) -> None:
    assert set(_draws(LOGITS, row, 2000).tolist()) == left


def test_a_long_tail_is_drawn_as_often_as_it_weighs() -> None:
    """500 tokens of 2e-5 each: together a hundredth of what the first one weighs."""
    logits = torch.full((8000, 501), float(np.log(2e-5)))
    logits[:, 0] = 0.0
    b = step_buffers(logits, [Row(temperature=1.0)], order=[0] * len(logits))
    b["tok_pos"][2:] = torch.arange(len(logits), dtype=I32)
    STEPS[1](b)
    expected = len(logits) * 0.01 / 1.01
    assert abs((b["out_token"] != 0).sum().item() - expected) < 3 * expected**0.5


# -- rows -----------------------------------------------------------------------------------------

MIX = [
    Row(temperature=0.8, seed=1, top_n=3),
    Row(top_n=2),
    Row(temperature=1.0, top_k=20, top_p=0.9, seed=2**40, processed_logprobs=True, top_n=20),
    Row(temperature=1.3, min_p=0.05, seed=4, position=77, processed_logprobs=True),
    Row(temperature=0.7, allowed=range(0, 2500, 7), repetition=1.2, prompt=(0, 7), seed=9),
]


def _mix(vocab: int = 2500) -> torch.Tensor:
    return torch.randn(len(MIX), vocab, generator=torch.Generator().manual_seed(3)) * 3


def _run(step: Step, logits: torch.Tensor, rows: list[Row], order: list[int]) -> Buffers:
    b = step_buffers(logits, rows, order=order)
    step(b)
    return b


def test_kernels_and_oracle_agree() -> None:
    order = list(range(len(MIX)))
    one, two = (_run(step, _mix(), MIX, order) for step in STEPS)
    assert torch.equal(one["out_token"], two["out_token"])
    assert torch.equal(one["top_ids"], two["top_ids"])
    for name in ("out_logprob", "top_logprobs"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_place_or_its_neighbours() -> None:
    logits = _mix()
    b = _run(STEPS[0], logits, MIX, [0, 1, 2, 3, 4])
    rows = [MIX[i] for i in (4, 2, 0)]
    other = _run(STEPS[0], logits[[2, 2, 0, 4, 0]], rows, [1, -1, -1, 0, 2])
    for s, same in ((2, 0), (4, 3), (0, 4)):
        for name in OUTPUTS:
            assert torch.equal(b[name][s], other[name][same]), (name, s)
    assert other["out_token"][[1, 2]].tolist() == [-1, -1]
    assert other["out_logprob"][[1, 2]].tolist() == [0.0, 0.0]
    assert (other["top_ids"][[1, 2]] == -1).all()


@BOTH
def test_a_draw_depends_on_seed_and_position_alone(step: Step) -> None:
    row = Row(temperature=1.0, seed=11, position=5)
    others = [replace(row, seed=12), replace(row, position=6), replace(row, seed=11 + 2**32)]
    # With equal logits a draw is the noise itself.
    b = _run(step, torch.zeros(5, 3000), [row, row, *others], [0, 1, 2, 3, 4])
    first, again, *rest = b["out_token"].tolist()
    assert first == again
    assert len({first, *rest}) == 4


@BOTH
def test_a_forced_run_has_the_bits_of_the_sampled_run(step: Step) -> None:
    logits, order = _mix(), [0, 1, 2, 3, 4]
    drawn = _run(step, logits, MIX, order)
    tokens = drawn["out_token"].tolist()
    rows = [replace(row, forced=t) for row, t in zip(MIX, tokens, strict=True)]
    again = _run(step, logits, rows, order)
    for name in OUTPUTS:
        assert torch.equal(drawn[name], again[name]), name


@BOTH
def test_log_probs_of_forced_tokens(step: Step) -> None:
    """Any token of the model's distribution; -inf where the processed one does not keep it."""
    row = Row(temperature=0.5, top_k=10)
    logits = _mix()[:1].repeat(4, 1)
    ids = logits[0].sort(descending=True).indices[[0, 9, 10, 2000]].tolist()
    rows = [replace(row, forced=i) for i in ids]
    raw = _run(step, logits, rows, [0, 1, 2, 3])
    want = logits[0].double().log_softmax(0)[ids]
    assert raw["out_token"].tolist() == ids
    torch.testing.assert_close(raw["out_logprob"].double(), want, rtol=1e-5, atol=1e-5)
    rows = [replace(r, processed_logprobs=True) for r in rows]
    processed = _run(step, logits, rows, [0, 1, 2, 3])
    p = torch.from_numpy(probabilities(logits[0].numpy(), row)).log()[ids]
    torch.testing.assert_close(processed["out_logprob"].double(), p, rtol=1e-5, atol=1e-5)
    assert processed["out_logprob"][2:].tolist() == [float("-inf")] * 2


@BOTH
def test_greedy_is_what_it_was(step: Step) -> None:
    """Plain greedy rows, forced or not: the bits of `sample.greedy`."""
    logits = _mix()
    b = _run(step, logits, [Row()] * 5, [0, 1, 2, 3, 4])
    names = ("logits", "sample_tok", "part_max", "part_arg", "part_sum")
    arguments = {name: b[name] for name in names}
    token, logprob = torch.empty(5, dtype=I32), torch.empty(5)
    if step is STEPS[0]:
        sample.greedy(LAUNCH, **arguments, out_token=token, out_logprob=logprob)
    else:
        sample.greedy_ref(**arguments, out_token=token, out_logprob=logprob)
    assert torch.equal(b["out_token"], token)
    assert torch.equal(b["out_logprob"].view(I32), logprob.view(I32))
