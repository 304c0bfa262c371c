"""Promise 3 on the device: a request has the same bits in any company, row, key and chunking."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from runtime import Runtime
from tests.fuzz import MOST_TOKENS, Fuzz
from tests.gpu.conftest import Load
from tests.gpu.models import LADDERS, options_of
from tests.serving import Request, alone, make_requests, serve

# One takes four attention splits (of 320 tokens here), one comes to its second while it decodes;
# others end at and around page boundaries.
LENGTHS = (1100, 1, 37, 63, 64, 65, 250, 7, 300, 128)
TOKENS = (24, 31, 20)


def requests_of(name: str) -> list[Request]:
    assert max(LENGTHS) + max(TOKENS) <= options_of(name)["max_seq_len"]
    return make_requests(np.random.default_rng(4), LENGTHS, 2048, TOKENS)


COMPANY: dict[str, Callable[[Runtime, list[Request]], list[str]]] = {
    "alone": lambda r, q: [a.bits for a in alone(r, q)],
    "all": lambda r, q: [a.bits for a in serve(r, q)],
    "reversed, ahead": lambda r, q: [a.bits for a in serve(r, q[::-1], ahead=2)][::-1],
    "three at a time": lambda r, q: [a.bits for a in serve(r, q, most=3)],
}


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("bf16", "triton"),
        ("fp8", "triton"),
        ("wide", "triton"),
        ("wide", "flashinfer"),
        ("wide", "hopper"),
    ],
)
def test_bits_do_not_depend_on_company_row_key_or_chunking(
    name: str, attention: str, load: Load, needs: Callable[[str, str], None]
) -> None:
    needs(name, attention)
    requests = requests_of(name)
    want: list[str] = []
    for ladder in LADDERS:
        with load(name, ladder=ladder, attention=attention, prefix_cache=False) as runtime:
            for how, run in COMPANY.items():
                got = run(runtime, requests)
                want = want or got
                differ = [n for n, a, b in zip(LENGTHS, got, want, strict=True) if a != b]
                assert not differ, f"ladder {ladder}, {how}: prompts of {differ} tokens differ"
    assert len(set(want)) == len(want)


@pytest.mark.parametrize("attention", ["triton", "flashinfer", "hopper"])
def test_bits_where_no_row_can_have_a_second_split(
    attention: str, load: Load, needs: Callable[[str, str], None]
) -> None:
    """There is no merge then, and attention may leave padded tokens as they were."""
    needs("wide", attention)
    rng = np.random.default_rng(5)
    requests = make_requests(rng, (1, 37, 64, 200, 100), 2048, TOKENS)
    with load("wide", attention=attention, max_seq_len=256, prefix_cache=False) as runtime:
        assert runtime.engine.config.splits == 1
        want = [a.bits for a in alone(runtime, requests)]
        assert [a.bits for a in serve(runtime, requests)] == want
        assert [a.bits for a in serve(runtime, requests[::-1])][::-1] == want


def test_bits_do_not_depend_on_the_process_memory_or_number_of_pages(load: Load) -> None:
    requests = requests_of("fp8")[1:5]
    bits = []
    for options in ({}, {"num_pages": 40}, {"max_seq_len": 1024}):
        with load("fp8", **options) as runtime:
            bits.append([a.bits for a in serve(runtime, requests)])
    assert bits[0] == bits[1] == bits[2]


@pytest.mark.parametrize(
    ("name", "reservation", "prefix_cache"),
    [("bf16", "full", False), ("bf16", "full", True), ("fp8", "lazy", True)],
)
def test_300_random_calls_give_the_bits_of_each_request_alone(
    name: str, reservation: str, prefix_cache: bool, load: Load
) -> None:
    seed = 0
    print(f"seed {seed}")
    lengths = (1, 63, 64, 65, 130, 20, 190, 7, 100, 40)
    requests = make_requests(np.random.default_rng(seed), lengths, 2048, (MOST_TOKENS,))
    pages = 9 if reservation == "lazy" else 13  # so few that some step runs short
    options = {"num_pages": pages, "reservation": reservation, "prefix_cache": prefix_cache}
    with load(name, **options) as runtime:
        prompts = list(zip(requests, alone(runtime, requests), strict=True))
        fuzz = Fuzz(runtime, prompts, seed=seed, tolerance=0.0, check_every=4)
        fuzz.run(300)
        print(dict(sorted(fuzz.seen.items())))
        short = ["step out of pages"] * (reservation == "lazy")
        short += ["OutOfPages"] * (reservation == "full" and not prefix_cache)
        for what in ("length", "stop", "ahead", *short):
            assert fuzz.seen[what], f"never happened: {what}"
