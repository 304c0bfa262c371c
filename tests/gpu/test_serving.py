"""Queue, prefix cache, preemption and weight updates on the device: the bits of each alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from kernels.triton.weight_tiles import as_rows
from runtime import Runtime, SamplingParams
from tests.contract import Ask, ask_all, everything, random_prompt
from tests.gpu.conftest import Load
from tests.queued import submit_all
from tests.serving import Request, serve
from tests.soak import Soak

VOCAB = 2048
CASES = [("bf16", "triton"), ("fp8", "triton"), ("wide", "flashinfer"), ("wide", "hopper")]


def asks_of(most: int) -> list[Ask]:
    """Every setting, prompts of up to 200 tokens, `most` new tokens."""
    asks = everything(VOCAB, longest=200)
    return [replace(ask, params=replace(ask.params, max_tokens=most)) for ask in asks]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_a_cached_prefix_gives_the_same_bits(
    name: str, attention: str, load: Load, needs: Callable[[str, str], None]
) -> None:
    needs(name, attention)
    system = random_prompt(1100, 7, VOCAB)  # more than one attention split
    asks = [
        replace(ask, prompt=(*system[: 200 * i], *ask.prompt))
        for i, ask in enumerate(asks_of(12)[:6])
    ]
    asks += asks_of(12)[6:]
    with load(name, attention=attention, prefix_cache=False) as runtime:
        want = [ask_all(runtime, [ask])[0].bits for ask in asks]
    with load(name, attention=attention) as runtime:
        for _ in range(2):
            for ask, bits in zip(asks, want, strict=True):
                assert ask_all(runtime, [ask])[0].bits == bits, ask.params
        assert runtime.stats().prefix_hits > 20
        together = submit_all(runtime, asks, ahead=2)
        assert [got.bits for got in together] == want


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_preempted_requests_have_the_bits_of_each_alone(
    name: str,
    attention: str,
    prefix_cache: bool,
    load: Load,
    needs: Callable[[str, str], None],
) -> None:
    needs(name, attention)
    asks = asks_of(150)
    with load(name, attention=attention, prefix_cache=False) as runtime:
        want = [ask_all(runtime, [ask])[0].bits for ask in asks]
    options: dict[str, Any] = {"num_pages": 14, "reservation": "lazy"}
    with load(name, attention=attention, prefix_cache=prefix_cache, **options) as runtime:
        got = submit_all(runtime, asks, ahead=2)
        assert runtime.stats().preemptions
    for ask, answer, bits in zip(asks, got, want, strict=True):
        assert answer.bits == bits, ask.params


def test_a_day_of_2000_steps(load: Load) -> None:
    """Arrivals, cancels, too few pages; every token compared with the request's own, alone."""
    with (
        load("fp8", prefix_cache=False) as alone,
        load("fp8", num_pages=9, reservation="lazy", ageing_steps=64) as runtime,
    ):

        @cache
        def answers(prompt: tuple[int, ...], most: int) -> tuple[list[int], list[np.float32]]:
            got = serve(alone, [Request(prompt, most)])[0]
            return got.tokens, got.logprobs

        soak = Soak(
            runtime, answers, seed=1, arrivals=0.08, max_prompt=150, max_new=100, most_waiting=12
        )
        soak.run(2000)
        stats = runtime.stats()
        print(stats, dict(sorted(soak.seen.items())))
        assert stats.preemptions
        assert stats.prefix_hits


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_weights_are_replaced_where_captured_graphs_read_them(name: str, load: Load) -> None:
    requests = [Request(random_prompt(n, n, VOCAB), 12) for n in (5, 70, 130)]
    with load(name) as runtime:
        weights = runtime.engine.graphs.step.weights
        places = {n: t.data_ptr() for n, t in weights.items()}
        head = as_rows(weights["head"]).clone()
        layers = runtime.model_config.num_layers
        norms = {f"model.layers.{i}.input_layernorm.weight": i for i in range(layers)}

        def bits() -> list[str]:
            return [a.bits for a in serve(runtime, requests)]

        def new(scale: float) -> list[tuple[str, torch.Tensor]]:
            named = [(n, weights[f"layers.{i}.attn_norm"] * scale) for n, i in norms.items()]
            return [*named, ("lm_head.weight", head.flip(0) if scale == 2.0 else head)]

        before = bits()
        runtime.update_weights(new(2.0))
        changed = bits()
        runtime.update_weights(new(0.5))
        assert bits() == before, "powers of two come back exactly"
        assert changed != before
        assert places == {n: t.data_ptr() for n, t in weights.items()}


def host_us(runtime: Runtime, rows: int) -> float:
    runtime.occupy(rows, 100, 1000)
    for _ in range(3):
        runtime.step()
    before = runtime.stats()
    runtime.launch()
    for _ in range(300):
        runtime.launch()
        runtime.collect()
    runtime.collect()
    after = runtime.stats()
    for row in range(runtime.config.max_rows):
        runtime.cancel(row)
    runtime.step()
    spent = after.host_us_per_step * after.steps - before.host_us_per_step * before.steps
    return spent / (after.steps - before.steps)


def test_host_time_does_not_grow_with_rows(load: Load) -> None:
    """Printed for the record; generous, for machines differ."""
    rows = 256
    with load("bf16", bs=rows, ladder=f"8,{rows},{rows}+64", max_seq_len=1280) as runtime:
        few, many = host_us(runtime, 8), host_us(runtime, rows)
        print(f"host us a step: {few:.1f} at 8 rows, {many:.1f} at {rows}")
        assert many < 2 * few + 10
        params = SamplingParams(max_tokens=4, ignore_eos=True)
        runtime.submit([1, 2, 3], params)
        while runtime.num_running:
            runtime.step()
