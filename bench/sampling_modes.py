"""`python -m bench.sampling_modes`: what each thing a request may ask for adds to a step.

Times the sampling operations alone, as a graph, over random logits at a model's vocabulary: first
the greedy kernels of a bare step, then all operations with every row asking for one more thing.
Tokens of the first and the last replay are compared first. Token masks lie in pinned host memory.
Stop sequences, returned logits and log-probs of prompts are the work of other kernels (`settle`,
`answer`) or of further rows: `bench.sampling_cost` times them within whole steps.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.table import Table

from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.compile import KernelCompiler
from kernels.triton import sample
from kernels.triton.draw_pipeline import row_tensors, sample_step, scratch_tensors
from kernels.triton.launch import Launcher
from kernels.triton.logits_counts import count_tokens
from kernels.triton.logits_process import MASKED, MAX_BIAS, PROCESSED_LOGPROBS
from kernels.triton.sample import num_chunks
from runtime.cli import command, console, print_json, run
from runtime.config import RuntimeConfig
from runtime.report import provenance

MODES = ("bare greedy", "greedy", "temperature", "top-k 50", "top-p 0.95", "both", "everything")
WARM_UP, REPLAYS = 5, 30
Buffers = dict[str, torch.Tensor]


def parser() -> argparse.ArgumentParser:
    p = command("bench.sampling_modes", __doc__)
    p.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    p.add_argument("--vocab", type=int, default=129280)
    p.add_argument("--spread", type=float, default=3.0, help="standard deviation of the logits")
    p.add_argument("--store", help="where compiled kernels are kept")
    p.add_argument("--json", action="store_true")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError("the times are of a device; none was found")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    compiler = KernelCompiler(
        Store(RuntimeConfig("tiny", store=args.store).store_path),
        f"sm_{properties.major}{properties.minor}",
    )
    launcher = AotLauncher(compiler, num_sms=properties.multi_processor_count)
    lines = []
    for rows in args.rows:
        for mode in MODES:
            buffers = _buffers(rows, args.vocab, args.spread)
            _ask(buffers, mode)
            lines.append(
                {"rows": rows, "mode": mode} | _time(_step(launcher, mode, buffers), buffers)
            )
    report = provenance(properties.name) | {"vocab": args.vocab, "lines": lines}
    _show(report)
    if args.json:
        print_json(report)
    return 0


def _buffers(rows: int, vocab: int, spread: float) -> Buffers:
    """A step of `rows` rows that ask for nothing."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    b = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
        for table in (row_tensors(rows, vocab), scratch_tensors(rows, vocab))
        for name, (shape, dtype) in table.items()
    }
    b["logits"] = torch.randn(rows, vocab, generator=generator, device="cuda") * spread
    index = torch.arange(rows, dtype=torch.int32, device="cuda")
    b |= {"sample_tok": index, "sample_row": index, "tok_pos": index, "tok_row": index}
    b |= {"tok_id": index, "out_token": index.clone(), "out_logprob": torch.zeros_like(b["top_p"])}
    parts = torch.zeros(rows, num_chunks(vocab), device="cuda")
    b |= {"part_max": parts, "part_sum": parts.clone(), "part_arg": parts.int()}
    b["stop_ids"] = torch.full((rows, 16), -1, dtype=torch.int32, device="cuda")
    b["token_mask"] = torch.full((rows, -(-vocab // 32)), -2, dtype=torch.int32).pin_memory()
    for name in ("top_p", "repetition"):
        b[name].fill_(1.0)
    b["forced"].fill_(-1)
    return b


def _ask(b: Buffers, mode: str) -> None:
    """Let every row ask for what `mode` names."""
    if "greedy" in mode:
        return
    b["temperature"].fill_(0.8)
    if mode in ("top-k 50", "both", "everything"):
        b["top_k"].fill_(50)
    if mode in ("top-p 0.95", "both", "everything"):
        b["top_p"].fill_(0.95)
    if mode == "everything":
        b["min_p"].fill_(0.01)
        b["repetition"].fill_(1.1)
        b["presence"].fill_(0.1)
        b["frequency"].fill_(0.1)
        b["flags"].fill_(int(MASKED) | int(PROCESSED_LOGPROBS))
        b["top_n"].fill_(20)
        b["min_len"].fill_(1 << 20)
        b["bias_count"].fill_(MAX_BIAS)
        b["bias_ids"].copy_(torch.arange(MAX_BIAS, device="cuda").expand_as(b["bias_ids"]) * 400)


def _step(launcher: Launcher, mode: str, b: Buffers) -> Callable[[], None]:
    if mode == "bare greedy":
        names = ("part_max", "part_arg", "part_sum", "out_token", "out_logprob")
        return lambda: sample.greedy(
            launcher, b["logits"], b["sample_tok"], **{name: b[name] for name in names}
        )
    counted = [n for n in inspect.signature(count_tokens).parameters if n != "launch"]

    def step() -> None:
        count_tokens(launcher, **{name: b[name] for name in counted})
        sample_step(launcher, b)

    return step


def _time(step: Callable[[], None], b: Buffers) -> dict[str, Any]:
    """Median microseconds of a replay.

    Raises:
        RuntimeError: replays gave different tokens, or a row failed.
    """
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    b["frequency"].zero_()  # counts grow from replay to replay, their penalty must not
    times, tokens = [], []
    for _ in range(WARM_UP + REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
        tokens.append(b["out_token"].tolist())
    if tokens[1] != tokens[-1] or min(tokens[-1]) < 0:
        raise RuntimeError(
            f"expected the same valid tokens each time, got {tokens[1]}, {tokens[-1]}"
        )
    low, median, high = np.percentile(times[WARM_UP:], [10, 50, 90])
    return {"median_us": float(median), "p10_us": float(low), "p90_us": float(high)}


def _show(report: dict[str, Any]) -> None:
    table = Table(title=f"sampling alone, vocabulary {report['vocab']}, {report['device']}")
    for column in ("rows", "every row asks for", "median us", "p10 … p90"):
        table.add_column(column, justify="right")
    for line in report["lines"]:
        spread = f"{line['p10_us']:.1f} … {line['p90_us']:.1f}"
        table.add_row(str(line["rows"]), line["mode"], f"{line['median_us']:.1f}", spread)
    console.print(table)


if __name__ == "__main__":
    run(main)
