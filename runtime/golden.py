"""The golden step: a canned state, one step of one key on it, and the digest of what it publishes.

Taken at capture and again after a restore: other bits mean that the bundle must not be used. It
goes through the driver as any request does, on rows and pages that nobody holds yet.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capture_cache.bundle import Golden
from graphs.keys import GraphKey, Ladder
from runtime.driver import Runtime
from runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from runtime.replayer import Replayer

MAX_REQUESTS = 8  # enough to see rows apart, few enough for the smallest KV cache in use


def golden_ids(
    key: GraphKey, *, num_pages: int, max_seq_len: int, page_size: int, vocab: int
) -> NDArray[np.int32]:
    """Prompts of the canned state, int32 [requests, tokens], one page each at most."""
    requests = min(key.rows, num_pages - 1, MAX_REQUESTS)
    length = min(key.tokens // requests, page_size, max_seq_len - 1)
    rng = np.random.default_rng((key.tokens, key.rows))
    return rng.integers(0, vocab, (requests, length), dtype=np.int32)


def golden_step(engine: Replayer, key: GraphKey, ids: NDArray[np.int32]) -> str:
    """Run one step of `key` on the canned state, then free all rows; returns the digest.

    The engine's rows must be free and its step number 0; they are so again afterwards.

    Raises:
        StepFailed: the device reported a fault or went silent.
    """
    runtime = Runtime(engine)
    runtime.ladder = Ladder([key])  # this key, whatever smaller one would do
    for prompt in ids:
        runtime.add(prompt, SamplingParams(max_tokens=1, ignore_eos=True))
    out = runtime.step()
    engine.reset_state()
    digest = hashlib.sha256()
    order = np.argsort(out.rows)
    for values in (out.rows, out.tokens, out.logprobs):
        digest.update(np.ascontiguousarray(values[order]).tobytes())
    return digest.hexdigest()


def take_golden(engine: Replayer, key: GraphKey) -> Golden:
    """The golden step of a fresh capture."""
    config = engine.config
    ids = golden_ids(
        key,
        num_pages=config.num_pages,
        max_seq_len=config.max_seq_len,
        page_size=config.page_size,
        vocab=engine.model_config.vocab_size,
    )
    return Golden(key.tokens, key.rows, ids, golden_step(engine, key, ids))
