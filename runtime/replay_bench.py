"""`python -m runtime.replay_bench`: time the captured graphs beside their floor.

Every key is driven as a user would drive it (`launch` / `collect`, two steps ahead) over rows that
hold `--ctx-len` tokens; a mixed key gets a fresh prompt chunk each step. Device times come from the
graph's own clock stamps, host times from the driver's calls without the wait between them: the
driver's Python, and CUDA's graph launch in it by itself.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from graphs.floor import READ_BYTES_PER_S, Floor, step_floor
from graphs.keys import GraphKey, Ladder
from runtime.bandwidth import read_bandwidth
from runtime.build import build
from runtime.capture import TWIN_NOTE
from runtime.cli import (
    Bar,
    add_selection,
    command,
    console,
    longest,
    model_positions,
    print_json,
    run,
    selection,
    writable_folder,
)
from runtime.config import told_to_ranks
from runtime.driver import Runtime
from runtime.engine import Engine
from runtime.report import provenance, write_files
from runtime.sampling import SamplingParams
from runtime.selection import chosen_ladder

CTX_LEN = 2000  # KV tokens
WARM_UP = 3  # steps before the ones that are timed
MARKS = {"python_us": 30.0, "idle_us": 3.0}  # at most, whatever the key


@dataclass(frozen=True)
class KeyTimes:
    """One key, timed. Microseconds; percentiles are over steps.

    Attributes:
        steps_us: every timed step, from its end back to the end of the one before, in order.
        idle_us: device time between the end of a step and the begin of the next.
        host_us: what `launch` and `collect` take, the wait for the device left out.
        graph_launch_us: of it, CUDA's call that launches the graph; on the CPU twin the step.
        python_us: the rest of it, the mark's business.
        floor: bytes that a step must read.
        floor_us: the same as time at the device's read bandwidth; None where that is not known.
    """

    key: str
    tokens: int
    rows: int
    p50_us: float
    p99_us: float
    span_us: float
    idle_us: float
    host_us: float
    graph_launch_us: float
    python_us: float
    new_tokens_per_s: float
    floor: Floor
    floor_us: float | None
    steps_us: list[float]

    @property
    def fraction(self) -> float | None:
        """Floor over time: 1.0 is the best that any kernel could do."""
        return None if self.floor_us is None else self.floor_us / self.p50_us

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {
            "floor": vars(self.floor) | {"total": self.floor.total},
            "fraction_of_floor": self.fraction,
        }


def parser() -> argparse.ArgumentParser:
    p = command("runtime.replay_bench", __doc__)
    add_selection(p)
    p.add_argument(
        "--ctx-len",
        type=int,
        help=f"KV tokens a row holds at the start; default: {CTX_LEN}, or what fits if less",
    )
    p.add_argument("--steps", type=int, default=100, help="timed steps a key")
    p.add_argument("--keys", help="time only these keys of the ladder")
    p.add_argument("--out", help="directory for the JSON, the PNG and the Chrome trace")
    p.add_argument("--bandwidth", type=float, help="device read bandwidth for the floor, TB/s")
    p.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prove every key before it is timed",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    with told_to_ranks():
        _settle(args)
    with Bar() as bar:
        engine = build(selection(args, verify=args.verify), bar)
        with Runtime(engine, engine.options.scheduling) as runtime:
            bar("replay", 0)
            bench = ReplayBench(runtime, args.ctx_len, args.steps, args.bandwidth)
            keys, skipped = _keys(engine.ladder, engine.config.max_seq_len, args.keys)
            times = []
            for key in keys:
                times.append(bench.time_key(key))
                bar("replay", len(keys), key)
            bar("inside a step", 0)
            largest = max((k for k in keys if k.tokens == k.rows), default=keys[-1])
            parts = bench.time_parts(largest)
            read = None if engine.launcher is None else read_bandwidth(engine.launcher)
            report = _report(engine, args, times, largest, parts) | {
                "floor_bytes_per_s": bench.bandwidth,
                "read_bytes_per_s": read,
                "skipped_keys": [str(key) for key in skipped],
            }
    _show(engine, times, largest, parts, args.ctx_len, skipped)
    if read is not None and bench.bandwidth is not None:
        console.print(
            f"memory     the floor is at {bench.bandwidth / 1e12:.2f} TB/s; a plain read reaches "
            f"{read / 1e12:.2f} TB/s on this GPU now"
        )
    try:
        if args.out:
            for path in write_files(Path(args.out), report, bench.trace):
                console.print(f"wrote      {path}")
    finally:
        if args.json:
            print_json(report)
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Refuse what cannot be timed, and settle the context; raises ValueError.

    Minutes before the load, the capture and the proof would be done.
    """
    if args.steps < 2:
        raise ValueError(f"--steps {args.steps}: expected at least 2, to time what lies between")
    if args.bandwidth is not None and args.bandwidth <= 0:
        raise ValueError(f"--bandwidth {args.bandwidth}: expected TB/s, more than 0")
    seq_len = longest(args)
    most = seq_len - WARM_UP - args.steps - 1
    if most < 1:
        raise ValueError(
            f"--steps {args.steps}: a row gets a token a step, and one of --max-seq-len {seq_len} "
            f"tokens has room for {seq_len - WARM_UP - 2} steps at most beside a token of context; "
            f"lower --steps{_or_longer(args, seq_len)}"
        )
    if args.ctx_len is None:
        args.ctx_len = max(1, min(CTX_LEN, most))
    if not 1 <= args.ctx_len <= most:
        raise ValueError(
            f"--ctx-len {args.ctx_len} with {args.steps} steps: expected 1 … {most} "
            f"(--max-seq-len {seq_len} less the steps); lower it{_or_longer(args, seq_len)}"
        )
    keys, _ = _keys(chosen_ladder(selection(args)), seq_len, args.keys)
    _check_pages(args, keys)
    if args.out:
        writable_folder("--out", Path(args.out))


def _or_longer(args: argparse.Namespace, seq_len: int) -> str:
    """The other remedy, where the model leaves one."""
    positions = model_positions(args)
    return "" if seq_len >= positions else f", or raise --max-seq-len (the model has {positions})"


def _check_pages(args: argparse.Namespace, keys: list[GraphKey]) -> None:
    """Raises ValueError if the rows of a key cannot have the pages that timing it takes."""
    if args.num_pages is None or not keys:
        return
    row = -(-(args.ctx_len + WARM_UP + args.steps) // args.page_size)
    need = max(
        row * k.rows if _chunk(k) == 1 else row * (k.rows - 1) + -(-_chunk(k) // args.page_size)
        for k in keys
    )
    if need > args.num_pages - 1:
        raise ValueError(
            f"--num-pages {args.num_pages}: timing these keys at --ctx-len {args.ctx_len} for "
            f"{args.steps} steps takes {need} pages of {args.page_size} tokens and the null page; "
            f"give --num-pages {need + 1}, fewer rows (--bs, --keys) or a smaller --ctx-len"
        )


def _chunk(key: GraphKey) -> int:
    """Tokens of the prompt that a mixed key is timed with."""
    return key.tokens - key.rows + 1


def _keys(
    ladder: Ladder, seq_len: int, chosen: str | None
) -> tuple[list[GraphKey], list[GraphKey]]:
    """The keys to time, and those of the ladder whose prompt no request may have."""
    if chosen is None:
        long = [k for k in ladder.keys if _chunk(k) > 1 and _chunk(k) >= seq_len]
        return [k for k in ladder.keys if k not in long], long
    keys = [GraphKey.parse(part) for part in chosen.split(",")]
    missing = [str(k) for k in keys if k not in ladder.keys]
    if missing:
        raise ValueError(
            f"--keys {','.join(missing)}: not in the ladder {ladder}; add them with --ladder, or "
            "name some of these"
        )
    for key in keys:
        if _chunk(key) > 1 and _chunk(key) >= seq_len:
            raise ValueError(
                f"--keys {key} takes a prompt chunk of {_chunk(key)} tokens and --max-seq-len is "
                f"{seq_len}; raise it, or name other --keys"
            )
    return keys, []


class ReplayBench:
    """Drives one runtime key by key.

    Attributes:
        trace: Chrome trace events of the last `time_parts`.
    """

    def __init__(
        self, runtime: Runtime, ctx_len: int, steps: int, bandwidth_tb: float | None
    ) -> None:
        self.runtime, self.ctx_len, self.steps = runtime, ctx_len, steps
        self.engine = runtime.engine
        self.bandwidth = (
            bandwidth_tb * 1e12 if bandwidth_tb else READ_BYTES_PER_S.get(self.engine.device_name)
        )
        self.trace: list[dict[str, Any]] = []
        self._rng = np.random.default_rng(0)
        self.engine.fill_kv(seed=0)

    def time_key(self, key: GraphKey) -> KeyTimes:
        """Time `steps` steps of `key` after a few untimed ones."""
        prompt = key.tokens - key.rows
        decoding = key.rows - 1 if prompt else key.rows
        self._occupy(decoding)
        run = self._mixed if prompt else self._decode
        with self.engine.graphs.timed(key) as launch_ns:
            begin, end, host = run(key, WARM_UP + self.steps)
        self._release()
        graph_launch, host_us = np.array(launch_ns) / 1e3, np.array(host) * 1e6
        step_us = np.diff(end)[WARM_UP - 1 :] / 1e3
        kv = decoding * (self.ctx_len + self.steps // 2)
        kv += (prompt + 1) * (prompt + 2) // 2 if prompt else 0
        floor = step_floor(
            self.engine.model_config, self.engine.config, rows=key.tokens, kv_tokens=kv
        )
        p50 = float(np.median(step_us))
        return KeyTimes(
            key=str(key),
            tokens=key.tokens,
            rows=key.rows,
            p50_us=p50,
            p99_us=float(np.percentile(step_us, 99)),
            span_us=float(np.median((end - begin)[WARM_UP:])) / 1e3,
            idle_us=float(np.median((begin[1:] - end[:-1])[WARM_UP - 1 :])) / 1e3,
            host_us=float(np.median(host_us[WARM_UP:])),
            graph_launch_us=float(np.median(graph_launch[WARM_UP:])),
            python_us=float(np.median((host_us - graph_launch)[WARM_UP:])),
            new_tokens_per_s=key.rows / p50 * 1e6,
            floor=floor,
            floor_us=floor.microseconds(self.bandwidth) if self.bandwidth else None,
            steps_us=step_us.round(1).tolist(),
        )

    def _occupy(self, rows: int) -> None:
        if rows:
            self.runtime.occupy(rows, self.ctx_len, WARM_UP + self.steps + 1)

    def _release(self) -> None:
        for row in range(self.engine.config.max_rows):
            self.runtime.cancel(row)
        self.runtime.step()  # carries the cancels to the device

    def _decode(self, key: GraphKey, steps: int) -> tuple[Any, Any, list[float]]:
        """Two steps ahead, as a serving loop would run."""
        begin: list[int] = []
        end: list[int] = []
        host: list[float] = []
        launched = [self._timed_launch(key), self._timed_launch(key)] if steps > 1 else []
        for i in range(steps):
            collect_s = self._timed_collect(begin, end)
            host.append(launched[i] + collect_s)
            if len(launched) < steps:
                launched.append(self._timed_launch(key))
        assert self.runtime.num_in_flight == 0
        return np.array(begin), np.array(end), host

    def _mixed(self, key: GraphKey, steps: int) -> tuple[Any, Any, list[float]]:
        """A fresh prompt of the key's size each step; it ends with its first token."""
        begin: list[int] = []
        end: list[int] = []
        host: list[float] = []
        vocab, size = self.engine.model_config.vocab_size, _chunk(key)
        for _ in range(steps):
            prompt = self._rng.integers(0, vocab, size)
            self.runtime.add(prompt, SamplingParams(max_tokens=1))
            launch_s = self._timed_launch(key)
            host.append(launch_s + self._timed_collect(begin, end))
        return np.array(begin), np.array(end), host

    def _timed_launch(self, key: GraphKey) -> float:
        start = time.perf_counter()
        self.runtime.launch()
        seconds = time.perf_counter() - start
        if self.runtime.last_key != key:
            raise RuntimeError(
                f"expected a step of key {key}, the driver took {self.runtime.last_key}"
            )
        return seconds

    def _timed_collect(self, begin: list[int], end: list[int]) -> float:
        self.runtime.wait()
        start = time.perf_counter()
        out = self.runtime.collect()
        seconds = time.perf_counter() - start
        if (out.tokens < 0).any():
            raise RuntimeError(
                f"step {out.step}: logits were not finite; the times would mean nothing"
            )
        entry = self.runtime.last_entry
        assert entry is not None
        begin.append(entry.begin_ns)
        end.append(entry.end_ns)
        return seconds

    def time_parts(self, key: GraphKey, repeats: int = 20) -> dict[str, float]:
        """Median microseconds of each part of a step, from stamps inside a graph of its own."""
        self._occupy(key.rows)
        samples = []
        with self.engine.graphs.stamped(key) as names:
            for _ in range(min(repeats, self.steps)):
                self.runtime.launch()
                self.runtime.collect()
                samples.append(self.engine.read_stamps(len(names)))
        self._release()
        stamps = np.array(samples)
        spans = np.median(np.diff(stamps, axis=1), axis=0) / 1e3
        first = stamps[-1]
        self.trace = [
            {
                "name": n,
                "ph": "X",
                "pid": 0,
                "tid": 0,
                "ts": (a - first[0]) / 1e3,
                "dur": (b - a) / 1e3,
            }
            for n, a, b in zip(names[1:], first[:-1].tolist(), first[1:].tolist(), strict=True)
        ]
        return dict(zip(names[1:], spans.tolist(), strict=True))


def _report(
    engine: Engine,
    args: argparse.Namespace,
    times: list[KeyTimes],
    largest: GraphKey,
    parts: dict[str, float],
) -> dict[str, Any]:
    return provenance(engine.device_name) | {
        "model": args.model,
        "overrides": args.override,
        "layers": engine.model_config.num_layers,
        "bs": args.bs,
        "ctx_len": args.ctx_len,
        "steps": args.steps,
        "attention": engine.config.attention,
        "times_mean_something": engine.selection.on_device,
        "marks": MARKS,
        "stages_s": engine.stages,
        "keys": [t.to_json() for t in times],
        "parts_key": str(largest),
        "parts_us": parts,
    }


def _show(
    engine: Engine,
    times: list[KeyTimes],
    largest: GraphKey,
    parts: dict[str, float],
    ctx_len: int,
    skipped: list[GraphKey],
) -> None:
    table = Table(title=f"replay, {engine.device_name}, context {ctx_len}")
    for name in (
        "key",
        "p50 ms",
        "p99 ms",
        "tok/s",
        "python us",
        "launch us",
        "idle us",
        "GB",
        "floor ms",
        "of floor",
    ):
        table.add_column(name, justify="right")
    for t in times:
        table.add_row(
            t.key,
            f"{t.p50_us / 1e3:.3f}",
            f"{t.p99_us / 1e3:.3f}",
            f"{t.new_tokens_per_s:,.0f}",
            f"{t.python_us:.1f}",
            f"{t.graph_launch_us:.1f}",
            f"{t.idle_us:.1f}",
            f"{t.floor.total / 1e9:.2f}",
            "-" if t.floor_us is None else f"{t.floor_us / 1e3:.3f}",
            "-" if t.fraction is None else f"{t.fraction:.0%}",
        )
    for key in skipped:
        table.add_row(str(key), "skipped", *["-"] * 8)
    ranks = engine.ranks
    of_whom = f"tok/s: of rank {ranks.rank} alone, of {ranks.world}; " if ranks.world > 1 else ""
    table.caption = (
        f"{of_whom}python us: launch() and collect() without CUDA's graph launch, mark "
        f"{MARKS['python_us']:.0f}; launch us: that call; idle us: between two steps, mark "
        f"{MARKS['idle_us']:.0f}"
    )
    console.print(table)
    if skipped:
        console.print(
            f"skipped    {', '.join(map(str, skipped))}: a prompt that fills the key is longer "
            f"than --max-seq-len {engine.config.max_seq_len} allows"
        )
    split = Table(title=f"inside one step of key {largest} (stamps add about a microsecond each)")
    for name in ("part", "count", "median us", "sum us", "share"):
        split.add_column(name, justify="left" if name == "part" else "right")
    whole = sum(parts.values())
    for part, spans in _grouped(engine, parts).items():
        split.add_row(
            part,
            str(len(spans)),
            f"{np.median(spans):.1f}",
            f"{sum(spans):.1f}",
            f"{sum(spans) / whole:.0%}" if math.isfinite(whole) and whole else "-",
        )
    console.print(split)
    if not engine.selection.on_device:
        console.print(TWIN_NOTE)


def _grouped(engine: Engine, parts: dict[str, float]) -> dict[str, list[float]]:
    """The parts of all layers together: attention, dense MLP, expert MLP."""
    groups: dict[str, list[float]] = {}
    for name, us in parts.items():
        label = name
        if name.startswith("layer "):
            _, layer, kind = name.split(" ", 2)
            moe = engine.model_config.is_moe(int(layer))
            label = "attention" if kind == "attention" else "experts" if moe else "dense mlp"
        groups.setdefault(label, []).append(us)
    return groups


if __name__ == "__main__":
    run(main)
