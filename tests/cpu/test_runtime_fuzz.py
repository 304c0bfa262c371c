"""2,000 random calls: no page leaked or shared, no free page read, every answer as if alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cpu.twins import MAX_SEQ_LEN, PAGE, VOCAB, load_micro
from tests.fuzz import MOST_TOKENS, Fuzz, happenings
from tests.serving import Answer, Request, alone, make_requests

OPERATIONS = 2000
NUM_PROMPTS = 20
NUM_PAGES = 17  # sixteen to give out, and six rows may want thirty


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[tuple[Request, Answer]]:
    """Prompts of one token to four pages, and their answers, each computed alone."""
    rng = np.random.default_rng(0)
    lengths = [1, PAGE - 1, PAGE, PAGE + 1, *rng.integers(1, 4 * PAGE, NUM_PROMPTS - 4).tolist()]
    assert max(lengths) + MOST_TOKENS <= MAX_SEQ_LEN
    requests = make_requests(rng, lengths, VOCAB, (MOST_TOKENS,))
    with load_micro(checkpoint) as runtime:
        return list(zip(requests, alone(runtime, requests), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("reservation", ["full", "lazy"])
@pytest.mark.parametrize("seed", [0])
def test_random_calls(
    seed: int, reservation: str, checkpoint: Path, prompts: list[tuple[Request, Answer]]
) -> None:
    print(f"seed {seed}")
    with load_micro(checkpoint, num_pages=NUM_PAGES, reservation=reservation) as runtime:
        # Keys differ in the last bits on the twin, so log-probs do too.
        fuzz = Fuzz(runtime, prompts, seed=seed, tolerance=1e-4)
        fuzz.run(OPERATIONS)
        print(dict(sorted(fuzz.seen.items())))
        for what in happenings(runtime):
            assert fuzz.seen[what], f"never happened: {what}"
        assert bool(fuzz.seen["step out of pages"]) == (reservation == "lazy")
