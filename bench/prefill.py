"""`python -m bench.prefill`: what prompts cost beside decoding rows, what a cached prefix saves.

For every key with room for prompt tokens: one long prompt is computed chunk by chunk beside rows
that decode; told are prompt tokens a second and how much longer the step is than the same rows'
step without a prompt. Then the same prompt is asked for twice: the second time its full pages come
from the prefix cache, and its first token must be the first time's.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from graphs.keys import GraphKey
from runtime.build import build
from runtime.capture import TWIN_NOTE
from runtime.cli import (
    Bar,
    add_selection,
    command,
    console,
    longest,
    print_json,
    run,
    selection,
)
from runtime.config import told_to_ranks
from runtime.driver import Runtime
from runtime.report import provenance
from runtime.sampling import SamplingParams


def parser() -> argparse.ArgumentParser:
    p = command("bench.prefill", __doc__)
    add_selection(p)
    p.add_argument("--ctx-len", type=int, default=2000, help="KV tokens a decoding row holds")
    p.add_argument("--prompt-len", type=int, default=2000, help="tokens of each prompt")
    p.add_argument("--repeats", type=int, default=3, help="prompts of each kind")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with told_to_ranks():
        _check(args)
    with Bar() as bar:
        engine = build(selection(args, verify=False), bar)
        with Runtime(engine, engine.options.scheduling) as runtime:
            report = provenance(engine.device_name) | {
                "model": args.model,
                "overrides": args.override,
                "layers": engine.model_config.num_layers,
                "ctx_len": args.ctx_len,
                "prompt_len": args.prompt_len,
                **_time(PrefillBench(runtime, args), bar),
                "times_mean_something": engine.selection.on_device,
            }
    _show(report)
    if not engine.selection.on_device:
        console.print(TWIN_NOTE)
    if args.json:
        print_json(report)
    return 0


def _time(bench: PrefillBench, bar: Bar) -> dict[str, Any]:
    """Chunks of every mixed key, then whole prompts."""
    keys = [k for k in bench.engine.ladder.keys if k.tokens > k.rows > 1]
    chunks = []
    bar("chunks", 0)
    for key in keys:
        chunks.append(bench.time_chunks(key))
        bar("chunks", len(keys), key)
    bar("whole prompts", 0)
    return {"chunks": chunks, "prefix": bench.time_prefix()}


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError: lengths that do not fit."""
    if args.repeats < 1 or args.prompt_len < 2:
        raise ValueError(
            f"expected --repeats of at least 1 and --prompt-len of at least 2, got {args.repeats} "
            f"and {args.prompt_len}"
        )
    seq_len = longest(args)
    most = seq_len - 2
    if not 1 <= args.ctx_len <= most or args.prompt_len > most:
        raise ValueError(
            f"--ctx-len {args.ctx_len}, --prompt-len {args.prompt_len}: expected 1 … {most} and "
            f"2 … {most} (--max-seq-len {seq_len}); give shorter ones, or raise "
            "--max-seq-len"
        )


class PrefillBench:
    """Drives one runtime; every call leaves it idle."""

    def __init__(self, runtime: Runtime, args: argparse.Namespace) -> None:
        self.runtime, self.engine, self.args = runtime, runtime.engine, args
        self._rng = np.random.default_rng(0)
        self.engine.fill_kv(seed=0)

    def time_chunks(self, key: GraphKey) -> dict[str, Any]:
        """One prompt after the other beside `key.rows - 1` decoding rows, in steps of `key`."""
        decoding = key.rows - 1
        self.runtime.occupy(decoding, self.args.ctx_len, self._room())
        self._span()
        alone = float(np.median([self._span() for _ in range(5)]))
        spans: list[float] = []
        for _ in range(self.args.repeats):
            self.runtime.add(self._prompt(), SamplingParams(max_tokens=1))
            while self.runtime.num_running > decoding:
                span = self._span()
                if self.runtime.last_key == key:
                    spans.append(span)
        for row in range(self.engine.config.max_rows):
            self.runtime.cancel(row)
        self.runtime.step()
        if not spans:
            return {"key": str(key), "decode_us": alone, "step_us": None}
        chunk, step_us = key.tokens - decoding, float(np.median(spans))
        return {
            "key": str(key),
            "chunk_tokens": chunk,
            "decode_us": alone,
            "step_us": step_us,
            "more_us": step_us - alone,
            "prompt_tokens_per_s": chunk / step_us * 1e6,
            "us_per_prompt_token": (step_us - alone) / chunk,
        }

    def time_prefix(self) -> list[dict[str, Any]]:
        """First token of a prompt that is new, and of the same prompt once more.

        Raises:
            RuntimeError: the two differ.
        """
        cases = []
        for _ in range(self.args.repeats):
            prompt = self._prompt()
            first, again = self._first_token(prompt), self._first_token(prompt)
            if first["token"] != again["token"]:
                raise RuntimeError(
                    f"a cached prefix changed a token: {first['token']} computed, "
                    f"{again['token']} from the cache; report it"
                )
            cases.append({"new": first, "again": again})
        return cases

    def _first_token(self, prompt: NDArray[np.int64]) -> dict[str, Any]:
        before, began = self.runtime.stats(), time.perf_counter()
        self.runtime.add(prompt, SamplingParams(max_tokens=1))
        added = time.perf_counter()
        self.runtime.launch()
        launched = time.perf_counter()
        token = self.runtime.collect().tokens.tolist()
        while not token:
            token = self.runtime.step().tokens.tolist()
        ended, after = time.perf_counter(), self.runtime.stats()
        return {
            "token": token[0],
            "steps": after.steps - before.steps,
            "pages_found": after.prefix_hits - before.prefix_hits,
            "ms": (ended - began) * 1e3,
            "add_us": (added - began) * 1e6,
            "launch_us": (launched - added) * 1e6,
        }

    def _prompt(self) -> NDArray[np.int64]:
        size: int = self.args.prompt_len
        return self._rng.integers(0, self.engine.model_config.vocab_size, size)

    def _room(self) -> int:
        """Tokens that a decoding row may still get."""
        room: int = self.engine.config.max_seq_len - self.args.ctx_len
        return room

    def _span(self) -> float:
        """Microseconds of one step by the graph's own clock."""
        self.runtime.step()
        entry = self.runtime.last_entry
        assert entry is not None
        return (entry.end_ns - entry.begin_ns) / 1e3


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"prompts beside decoding rows, {report['device']}")
    names = ("chunk tokens", "decode us", "with chunk us", "more us", "prompt tok/s")
    for column in ("key", *names):
        table.add_column(column, justify="right")
    for c in report["chunks"]:
        if c["step_us"] is None:
            table.add_row(c["key"], "-", f"{c['decode_us']:.0f}", "never filled", "-", "-")
            continue
        numbers = (c["decode_us"], c["step_us"], c["more_us"], c["prompt_tokens_per_s"])
        table.add_row(c["key"], str(c["chunk_tokens"]), *(f"{n:,.0f}" for n in numbers))
    console.print(table)
    for kind in ("new", "again"):
        cases = [c[kind] for c in report["prefix"]]
        ms, add, launch = (
            float(np.median([c[name] for c in cases])) for name in ("ms", "add_us", "launch_us")
        )
        console.print(
            f"prompt of {report['prompt_len']} tokens, {kind}: first token after {ms:.2f} ms in "
            f"{cases[0]['steps']} steps, {cases[0]['pages_found']} pages from the cache; host: add "
            f"{add:.0f} us, launch {launch:.0f} us"
        )


if __name__ == "__main__":
    run(main)
