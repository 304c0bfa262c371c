"""`python -m bench.sampling_cost`: what the row contract adds to a decode step.

The same captured step is replayed two steps ahead, as in service, over rows that ask for nothing,
for sampling and log-probs, for penalties and masks, or for all of it. Beside it stands the bare
step: the same graph with the plain greedy kernels and nothing else around the layers. Tokens and
log-probs of bare and greedy steps are compared first, bit for bit. Every mode is timed `--rounds`
times in turn, so that a drift of the clock meets all of them.

Log-probs of a prompt take a row of the key for each token. Two modes therefore hold half of the
step's tokens in one prompt, once without and once with them: the difference of those two is theirs,
for such a step reads less KV than one in which every row decodes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from graphs.keys import GraphKey, Ladder
from kernels.triton.sample import greedy, greedy_ref
from kernels.triton.state import mask_words
from runtime.build import build
from runtime.capture import TWIN_NOTE
from runtime.cli import Bar, add_selection, command, console, print_json, run, selection
from runtime.config import told_to_ranks
from runtime.driver import Runtime
from runtime.engine import Engine
from runtime.report import provenance
from runtime.sampling import SamplingParams, StepOutput

WARM_UP = 3
BARE = "bare step"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "logprobs": 5}
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.1, "presence_penalty": 0.2}
# Eight of sixteen tokens, none of which comes: no row ends, and each is compared in every step.
STOPS = {"stop_sequences": [[16 * i + j for j in range(16)] for i in range(8)]}
BIAS = {"logit_bias": {token: 0.5 for token in range(16)}}
EVERYTHING: dict[str, Any] = {
    **(SAMPLED | PENALTIES | BIAS),
    **{"mask": True, "top_k": 1000, "min_p": 0.01, "logprobs": 20},
}
# Settings that rows take in turn; "mask" is a token mask that allows half of the vocabulary.
# "return_logits" is for as many rows as `--logits-rows` has room for. "prompt": one prompt instead
# of half of the rows, whose tokens are half of each step's, or as many as fit: the report has it.
MODES: dict[str, list[dict[str, Any]]] = {
    BARE: [{}],
    "greedy": [{}],
    "greedy, 5 log-probs": [{"logprobs": 5}],
    "temperature": [{"temperature": 1.0}],
    "top-p, 5 log-probs": [SAMPLED],
    "mix": [
        {},
        SAMPLED,
        SAMPLED | PENALTIES,
        {"mask": True},
        SAMPLED | {"mask": True},
        BIAS | {"temperature": 0.7, "top_k": 50, "min_p": 0.05},
        {"stop_sequences": [[1, 2, 3]], "min_tokens": 1, "stop_token_ids": (0,)},
        {"logprobs": 20, "logprobs_mode": "processed", "temperature": 0.6},
    ],
    "everything, every row": [EVERYTHING],
    "stop sequences": [STOPS],
    "logits": [{"return_logits": True}],
    "everything, stop sequences, logits": [EVERYTHING | STOPS | {"return_logits": True}],
    "half of it a prompt": [{"prompt": True}],
    "the same, with its log-probs": [{"prompt": True, "prompt_logprobs": 0}],
    "the same, 20 alternatives": [{"prompt": True, "prompt_logprobs": 20}],
    "masks renewed each step": [{"mask": True, "renew": True, "temperature": 1.0}],
}


def parser() -> argparse.ArgumentParser:
    p = command("bench.sampling_cost", __doc__)
    add_selection(p)
    p.add_argument("--ctx-len", type=int, default=2000, help="KV tokens a row holds")
    p.add_argument("--steps", type=int, default=50, help="timed steps of a mode and round")
    p.add_argument("--rounds", type=int, default=3, help="times that every mode is timed")
    p.add_argument("--logits-rows", type=int, default=8, help="rows that return their logits")
    p.add_argument("--modes", nargs="+", choices=MODES, metavar="MODE", help="only these")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with told_to_ranks():
        for name in ("steps", "rounds"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    with Bar() as bar:
        engine = build(selection(args, verify=False, logits_rows=args.logits_rows), bar)
        with Runtime(engine) as runtime:
            bench = SamplingBench(runtime, args.ctx_len, args.steps)
            bar("check bits", 0)
            bench.check()
            chosen = [m for m in MODES if m == BARE or m in (args.modes or MODES)]
            times: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
            bar("time", 0)
            for _ in range(args.rounds):
                for name in chosen:
                    times[name].append(bench.time_mode(name))
                    bar("time", args.rounds * len(chosen), name)
            report = _report(engine, args, times) | {"prompt_part": bench.prompt_part}
    _show(report, engine)
    if args.json:
        print_json(report)
    return 0


class SamplingBench:
    """Drives one runtime, all rows decoding, in the key of pure decode that holds them.

    Attributes:
        prompt_part: tokens of a step that are a prompt's, in modes with one.
    """

    def __init__(self, runtime: Runtime, ctx_len: int, steps: int) -> None:
        self.runtime, self.engine = runtime, runtime.engine
        self.ctx_len, self.steps = ctx_len, steps
        self.rows = self.engine.config.max_rows
        self.key = self.engine.ladder.select(self.rows, self.rows)
        runtime.ladder = Ladder([self.key])  # a prompt must not take the step to a larger one
        self._rng = rng = np.random.default_rng(0)
        words = mask_words(self.engine.model_config.vocab_size)
        self.masks = rng.integers(-(2**31), 2**31, (2, words), dtype=np.int64).astype(np.int32)
        self._prompt_steps = WARM_UP + steps + 2
        fit = (self.engine.config.max_seq_len - 2) // self._prompt_steps
        self.prompt_part: int = max(1, min(self.rows // 2, fit))
        self.engine.fill_kv(seed=0)

    def check(self) -> None:
        """Plain greedy rows get the bits of the bare step.

        Raises:
            RuntimeError: they do not.
        """
        with bare_step(self.engine, self.key):
            want = self._outputs()
        got = self._outputs()
        if want != got:
            raise RuntimeError(
                "greedy rows have other tokens or log-probs than those of the bare step; the times "
                "mean nothing"
            )

    def _outputs(self) -> list[list[bytes]]:
        """Bits of short requests, each request's by itself."""
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        found: dict[int, list[bytes]] = {}
        for i in range(self.rows):
            found[self.runtime.add([i % 7], params)] = []
        while self.runtime.num_running:
            out = self.runtime.step()
            for row, token, logprob in zip(out.rows, out.tokens, out.logprobs, strict=True):
                found[int(row)].append(token.tobytes() + logprob.tobytes())
        return list(found.values())

    def time_mode(self, mode: str) -> dict[str, float]:
        """Median microseconds of a step, end to end, and of the host's part of it."""
        if mode == BARE:
            with bare_step(self.engine, self.key):
                return self._time(mode)
        return self._time(mode)

    def _time(self, mode: str) -> dict[str, float]:
        rows = self._occupy(mode)
        renewed = rows if MODES[mode][0].get("renew") else []
        ends: list[int] = []
        host: list[float] = []
        launched = [self._launch(renewed), self._launch(renewed)]
        for i in range(WARM_UP + self.steps):
            self.runtime.wait()
            start = time.perf_counter()
            out = self.runtime.collect()
            host.append(launched[i] + time.perf_counter() - start)
            self._check_output(mode, out)
            entry = self.runtime.last_entry
            assert entry is not None
            ends.append(entry.end_ns)
            if len(launched) < WARM_UP + self.steps:
                launched.append(self._launch(renewed))
        self._release()
        step_us = np.diff(ends)[WARM_UP - 1 :] / 1e3
        return {
            "step_us": float(np.median(step_us)),
            "p99_us": float(np.percentile(step_us, 99)),
            "host_us": float(np.median(host[WARM_UP:])) * 1e6,
        }

    def _check_output(self, mode: str, out: StepOutput) -> None:
        """Raises RuntimeError if the step did not do what it is timed for."""
        if (out.tokens < 0).any():
            raise RuntimeError(f"{mode}: a row ended with an error; the times mean nothing")
        wish = MODES[mode][0]
        logits = min(self.rows, self.engine.config.logits_rows) * wish.get("return_logits", 0)
        scored = (self.rows - len(out)) * ("prompt_logprobs" in wish)
        told = 0 if out.prompt is None else len(out.prompt.tokens)
        if (len(out.logits), told) != (logits, scored):
            raise RuntimeError(
                f"{mode}: expected logits of {logits} rows and log-probs of {scored} prompt tokens "
                f"in a step, got {len(out.logits)} and {told}; the times mean nothing"
            )

    def _launch(self, renewed: list[int]) -> float:
        start = time.perf_counter()
        for row in renewed:
            self.runtime.set_token_mask(row, self.masks[row % 2])
        self.runtime.launch()
        seconds = time.perf_counter() - start
        if self.runtime.last_key != self.key:
            raise RuntimeError(f"expected key {self.key}, the driver took {self.runtime.last_key}")
        return seconds

    def _occupy(self, mode: str) -> list[int]:
        most = WARM_UP + self.steps + 1
        taken: list[int] = []
        decoding, logits = self.rows, self.engine.config.logits_rows
        if MODES[mode][0].get("prompt"):
            decoding -= self._add_prompt(dict(MODES[mode][0]))
        for i in range(decoding):
            wish = dict(MODES[mode][i % len(MODES[mode])])
            masked = wish.pop("mask", False)
            for name in ("renew", "prompt", "prompt_logprobs"):
                wish.pop(name, None)
            if wish.get("return_logits"):
                wish["return_logits"] = logits > 0
                logits -= 1
            params = SamplingParams(max_tokens=most, ignore_eos=True, seed=i, **wish)
            taken += self.runtime.occupy(1, self.ctx_len, most, params)
            if masked:
                self.runtime.set_token_mask(taken[-1], self.masks[i % 2])
        return taken

    def _add_prompt(self, wish: dict[str, Any]) -> int:
        """A prompt that every timed step takes a part of; how many tokens of each step that is."""
        part, steps = self.prompt_part, self._prompt_steps
        prompt = self._rng.integers(0, self.engine.model_config.vocab_size, part * steps + 1)
        wish.pop("prompt")
        self.runtime.add(prompt, SamplingParams(ignore_eos=True, max_tokens=1, **wish))
        return part

    def _release(self) -> None:
        while self.runtime.num_in_flight:
            self.runtime.collect()
        for row in range(self.rows):
            self.runtime.cancel(row)
        self.runtime.step()  # carries the cancels to the device


@contextmanager
def bare_step(engine: Engine, key: GraphKey) -> Iterator[None]:
    """Within it, replays of `key` choose greedily and do nothing else that a row may ask for."""
    graphs, ops = engine.graphs, engine.graphs.step.ops
    launch = ops.launch
    names = ("sample_tok", "part_max", "part_arg", "part_sum", "out_token", "out_logprob")

    def choose(b: dict[str, torch.Tensor]) -> None:
        outs = {name: b[name] for name in names}
        if launch is None:
            greedy_ref(b["logits"], **outs)
        else:
            greedy(launch, b["logits"], **outs)

    replaced: dict[str, Callable[..., None]] = {"sample": choose}
    replaced |= dict.fromkeys(("copy_masks", "count_tokens", "answer"), _nothing)
    kept = {name: getattr(ops, name) for name in replaced}
    # Its kernels must exist before a capture, which may not compile; alone they harm nothing.
    if engine.launcher is not None:
        engine.launcher.thaw()
    graphs.backend.eager(lambda: choose(graphs.step.buffers.for_key(key)))
    if engine.launcher is not None:
        engine.launcher.freeze()
    for name, op in replaced.items():
        setattr(ops, name, op)
    captured = graphs.backend.capture(key, lambda: graphs.step.run(key))
    whole, graphs.graphs[key] = graphs.graphs[key], captured
    try:
        yield
    finally:
        graphs.backend.synchronize()
        graphs.graphs[key] = whole
        for name, op in kept.items():
            setattr(ops, name, op)


def _nothing(*_: object, **__: object) -> None:
    """Stands where the bare step has no operation."""


def _report(
    engine: Engine, args: argparse.Namespace, times: dict[str, list[dict[str, float]]]
) -> dict[str, Any]:
    def over_rounds(rounds: list[dict[str, float]], name: str) -> NDArray[np.float64]:
        return np.array([r[name] for r in rounds])

    bare = float(np.median(over_rounds(times[BARE], "step_us")))
    modes = {}
    for mode, rounds in times.items():
        step_us = over_rounds(rounds, "step_us")
        modes[mode] = {
            "step_us": float(np.median(step_us)),
            "rounds_us": step_us.tolist(),
            "p99_us": float(np.median(over_rounds(rounds, "p99_us"))),
            "host_us": float(np.median(over_rounds(rounds, "host_us"))),
            "added_us": float(np.median(step_us)) - bare,
            "added": float(np.median(step_us)) / bare - 1.0,
        }
    return provenance(engine.device_name) | {
        "model": args.model,
        "overrides": args.override,
        "layers": engine.model_config.num_layers,
        "vocab": engine.model_config.vocab_size,
        "rows": engine.config.max_rows,
        "ctx_len": args.ctx_len,
        "logits_rows": engine.config.logits_rows,
        "steps": args.steps,
        "rounds": args.rounds,
        "attention": engine.config.attention,
        "times_mean_something": engine.selection.on_device,
        "modes": modes,
    }


def _show(report: dict[str, Any], engine: Engine) -> None:
    table = Table(
        title=f"{report['rows']} rows, {report['layers']} layers, context {report['ctx_len']}, "
        f"{report['device']}"
    )
    for column in ("rows ask for", "step us", "p99 us", "more us", "more", "host us"):
        table.add_column(column, justify="left" if column == "rows ask for" else "right")
    for mode, t in report["modes"].items():
        table.add_row(
            mode,
            f"{t['step_us']:.1f}",
            f"{t['p99_us']:.1f}",
            f"{t['added_us']:+.1f}",
            f"{t['added']:+.2%}",
            f"{t['host_us']:.0f}",
        )
    console.print(table)
    if not engine.selection.on_device:
        console.print(TWIN_NOTE)


if __name__ == "__main__":
    run(main)
