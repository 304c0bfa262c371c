"""The row contract against what others compute: numpy for the settings, transformers for the model.

Every logit and log-prob of a run is worked out again from the logits that the run returned, or by
`transformers` over the whole text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runtime import SamplingParams
from runtime.sampling import PROFILES
from tests.contract import Ask, Got, ask_all, mask_of
from tests.cpu.checkpoints import random_model, save_model, small_config
from tests.cpu.twins import VOCAB, load_micro

TOLERANCE = 2e-5  # of float32 log-probs against float64 over the same logits


def log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = x - x.max()
    result: NDArray[np.float64] = x - np.log(np.exp(x).sum())
    return result


def processed(
    raw: NDArray[np.float32], p: SamplingParams, prompt: list[int], output: list[int], mask: Any
) -> NDArray[np.float64]:
    """Log-probs of what is drawn from, by the book, in float64."""
    x = raw.astype(np.float64)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    for token in {*prompt, *output}:
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    if len(output) < p.min_tokens:
        x[list(p.stop_token_ids)] = -np.inf
    if mask is not None:
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(x)]
        x[allowed == 0] = -np.inf
    if p.temperature == 0.0:
        return log_softmax(x)
    x = x / p.temperature
    order = np.lexsort((np.arange(len(x)), -x))
    keep = np.ones(len(x), bool)
    if p.top_k:
        keep[order[p.top_k :]] = False
    if p.top_p < 1.0:
        probs = np.exp(log_softmax(np.where(keep, x, -np.inf)))[order]
        keep[order[np.cumsum(probs) - probs >= p.top_p]] = False
    if p.min_p > 0.0:
        keep &= x >= x.max() + np.log(p.min_p)
    return log_softmax(np.where(keep, x, -np.inf))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "bias": {"logit_bias": {1: 3.0, 5: float("-inf"), 63: -1.5}, "temperature": 1.0},
    "repetition": {"repetition_penalty": 1.7, "temperature": 1.2},
    "repetition below one": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5, "temperature": 1.0},
    "frequency": {"frequency_penalty": 0.8, "temperature": 0.5},
    "negative penalties": {"frequency_penalty": -0.5, "presence_penalty": -1.0, "temperature": 1.0},
    "min_tokens": {"min_tokens": 10, "stop_token_ids": tuple(range(10, 26)), "temperature": 2.0},
    "top_k": {"top_k": 4, "temperature": 1.5},
    "top_k 1": {"top_k": 1, "temperature": 1.5},
    "top_p": {"top_p": 0.5, "temperature": 1.5},
    "top_p tiny": {"top_p": 1e-6, "temperature": 1.5},
    "min_p": {"min_p": 0.3, "temperature": 1.5},
    "filters": {"top_k": 12, "top_p": 0.8, "min_p": 0.1, "temperature": 1.3},
    "all": {
        "temperature": 1.1,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {2: 1.0},
        "min_tokens": 6,
        "stop_token_ids": (1, 2, 3, 4, 5, 6),
    },
}


@pytest.mark.parametrize("masked", [False, True])
def test_settings_do_what_numpy_says(masked: bool, checkpoint: Path) -> None:
    rng = np.random.default_rng(0)
    mask = mask_of(rng.choice(VOCAB, 40, replace=False).tolist(), VOCAB) if masked else None
    asks = []
    for i, settings in enumerate(SETTINGS.values()):
        fixed = {"max_tokens": 16, "ignore_eos": True, "seed": i, "return_logits": True}
        fixed |= {"logprobs": 20, "logprobs_mode": "processed"}
        text = tuple(rng.integers(0, VOCAB, 1 + 5 * i % 30).tolist())
        asks.append(Ask(text, SamplingParams(**(fixed | settings)), mask))
    with load_micro(checkpoint) as runtime:
        answers = ask_all(runtime, asks, ahead=2)
    for (name, _), ask, got in zip(SETTINGS.items(), asks, answers, strict=True):
        assert len(got.logits) == len(got.tokens) >= ask.params.min_tokens, name
        for i, token in enumerate(got.tokens):
            before = got.tokens[:i]
            want = processed(got.logits[i], ask.params, list(ask.prompt), before, ask.mask)
            assert want[token] > -np.inf, f"{name}: token {i} could not be drawn"
            if ask.params.temperature == 0.0:
                assert want[token] == want.max(), name
            assert abs(got.logprobs[i] - want[token]) < TOLERANCE, f"{name}: token {i}"
            check_top(got.tops[i], want, name)


def check_top(
    top: tuple[list[int], list[float]],
    want: NDArray[np.float64],
    name: str,
    near: float = TOLERANCE,
) -> None:
    """The best 20, best first; those that cannot be drawn are no alternatives."""
    possible = int((want > -np.inf).sum())
    ids = [t for t in top[0] if t >= 0]
    assert len(ids) == min(20, possible), name
    best = np.sort(want)[::-1][: len(ids)]
    assert np.abs(np.array(top[1][: len(ids)]) - best).max() < near, name
    assert np.abs(want[ids] - best).max() < near, name
    assert all(lp == -np.inf for lp in top[1][len(ids) :]), name


def test_raw_logprobs_are_those_of_the_logits_whatever_is_set(checkpoint: Path) -> None:
    fixed = {"max_tokens": 12, "ignore_eos": True, "return_logits": True, "logprobs": 20, "seed": 3}
    asks = [Ask((1, 2, i), SamplingParams(**(fixed | s))) for i, s in enumerate(SETTINGS.values())]
    with load_micro(checkpoint) as runtime:
        answers = ask_all(runtime, asks)
    for name, got in zip(SETTINGS, answers, strict=True):
        for i, token in enumerate(got.tokens):
            want = log_softmax(got.logits[i].astype(np.float64))
            assert abs(got.logprobs[i] - want[token]) < TOLERANCE, name
            check_top(got.tops[i], want, name)


@pytest.mark.parametrize("name", ["micro", "q_lora", "tied"])
def test_logits_and_prompt_logprobs_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"tied": {"tie_word_embeddings": True}}.get(name, {})
    if name == "micro":
        changes = {"vocab_size": VOCAB, "q_lora_rank": None, "num_hidden_layers": 2}
    model = random_model(small_config(**changes), seed=3)
    vocab = model.config.vocab_size
    save_model(tmp_path, model)
    rng = np.random.default_rng(1)
    fixed: dict[str, Any] = {"max_tokens": 9, "ignore_eos": True, "prompt_logprobs": 20}
    asks = []
    for i, n in enumerate((1, 2, 16, 17, 40, 5)):
        settings = {"return_logits": True, "logprobs": 5 * (i % 3)}
        if i % 2:
            settings |= {"temperature": 1.0, "seed": i, "repetition_penalty": 1.5}
        if i == 4:
            settings |= {"forced_tokens": tuple(rng.integers(0, vocab, 9).tolist())}
        text = tuple(rng.integers(0, vocab, n).tolist())
        asks.append(Ask(text, SamplingParams(**(fixed | settings))))
    with load_micro(tmp_path) as runtime:
        answers = ask_all(runtime, asks, ahead=2)
    for ask, got in zip(asks, answers, strict=True):
        compare(model, ask, got)


def compare(model: Any, ask: Ask, got: Got) -> None:
    ids = [*ask.prompt, *got.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0].double()
    oracle, n = logits.log_softmax(-1).numpy(), len(ask.prompt)
    assert sorted(got.prompt) == list(range(1, n))
    for pos, (token, logprob, top) in got.prompt.items():
        assert token == ids[pos]
        assert abs(logprob - oracle[pos - 1, token]) < 1e-3
        check_top(top, oracle[pos - 1], "prompt", near=1e-3)
    for i, token in enumerate(got.tokens):
        assert np.abs(got.logits[i] - logits[n - 1 + i].numpy()).max() < 1e-3
        assert abs(got.logprobs[i] - oracle[n - 1 + i, token]) < 1e-3


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_return_what_their_use_needs(name: str, checkpoint: Path) -> None:
    with load_micro(checkpoint) as runtime:
        (got,) = ask_all(runtime, [Ask((1, 2, 3), SamplingParams.profile(name, max_tokens=5))])
    settings = PROFILES[name]
    assert len(got.logits) == 5 * settings.get("return_logits", False)
    assert {len(ids) for ids, _ in got.tops} == {settings.get("logprobs", 0)}
