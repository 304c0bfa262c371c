"""Options that the commands share, and how they end: 0 done, 1 a check failed, 2 bad arguments.

What goes wrong is one line, `error: …`, with the error's own name where it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from barriers.deepep import DeepEpMissing, ParityError
from barriers.errors import RankError
from barriers.transport import NAMES as TRANSPORTS
from capture_cache.command import error_line, exit_code, written
from capture_cache.errors import (
    ArenaError,
    CaptureError,
    CompileError,
    CorruptBundle,
    CudaError,
    FingerprintMismatch,
    StoreError,
)
from graphs.keys import NotCaptured
from graphs.model_config import parse_overrides
from graphs.model_source import resolve_model
from runtime.config import (
    ATTENTION,
    DEVICES,
    HEADS,
    PDL,
    RuntimeConfig,
    told_to_ranks,
)
from runtime.driver import StepFailed
from runtime.pages import OutOfPages
from runtime.rank_command import command as command  # for those who take more from here

NAMED_FAILURES = (
    ArenaError,
    CaptureError,
    CompileError,
    CorruptBundle,
    CudaError,
    DeepEpMissing,
    FingerprintMismatch,
    NotCaptured,
    OutOfPages,
    ParityError,
    RankError,
    StepFailed,
    StoreError,
)
LINE_EVERY_S = 5.0  # of progress, where no terminal shows a bar
PIPE_WIDTH = 140  # columns of a table that no terminal limits
console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


class Once(argparse.Action):
    """Store a value; the same option under another spelling is an error, not a silent winner."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        seen = namespace.__dict__.setdefault("_seen", {})
        if seen.get(self.dest, option_string) != option_string:
            parser.error(
                f"{seen[self.dest]} and {option_string} are the same option; give one of them"
            )
        seen[self.dest] = option_string
        setattr(namespace, self.dest, values)


def add_selection(parser: argparse.ArgumentParser) -> None:
    """What is run: model, sizes, ladder, device, store."""
    parser.register("action", None, Once)
    add = parser.add_argument
    add("--model", "--model-path", "--ckpt", default="tiny", help="HF directory or preset name")
    add("--bs", "--max-batch-size", type=int, default=256, help="global decode batch")
    add(
        "--ladder",
        "--cuda-graph-bs",
        nargs="+",
        metavar="KEY",
        help="graph keys: ROWS or ROWS+PROMPT_TOKENS, as 1,2,4,8+64 or 1 2 4 8+64",
    )
    add(
        "--max-seq-len",
        "--max-model-len",
        "--context-length",
        type=int,
        help="prompt and output, tokens; default: 4096, or the model's positions if fewer",
    )
    add("--num-pages", type=int, help="KV pages of a rank")
    add("--page-size", type=int, default=64, help="tokens a page")
    add("--layers", type=int, help="run only the first so many layers")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of the model config")
    add("--device", choices=DEVICES, default="auto", help="auto takes the GPU where there is one")
    add("--store", help="directory of compiled kernels and manifests")
    add("--weights", help="packed weights (python -m runtime.pack); default: the store's, if any")
    add("--verify-weights", action="store_true", help="compare every sha256 of packed weights")
    add("--ep-size", type=int, help="ranks that share the experts; default: torchrun's")
    add("--transport", choices=TRANSPORTS, default="auto", help="how tokens reach other ranks")
    add("--attention", choices=ATTENTION, default="auto", help="kernel; auto takes the faster one")
    add(
        "--prefix-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep full KV pages for later prompts that begin alike",
    )
    add("--prefill-budget", type=int, metavar="TOKENS", help="prompt tokens a step at most")
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the shared expert beside the exchange; default: where there are both",
    )
    add("--head", choices=HEADS, default="whole", help="on every rank, or shared by vocabulary")
    add("--pdl", choices=PDL, default="auto", help="overlap of kernels (dependent launch)")
    add(
        "--kernels",
        default="auto",
        metavar="auto|tune|default|FILE",
        help="kernel of each operation: tune measures them and keeps the result in the store; auto "
        "takes what was kept there, and else the default; a file pins",
    )
    add(
        "--allow-inexact",
        action="store_true",
        help="let kernels in whose bits depend on the number of tokens",
    )
    add("--tune-seconds", type=float, default=120.0, help="of measuring at most (tune)")
    add("--deadline-ms", type=float, default=10_000.0, help="longest wait of a rank for another")
    add("--seed", type=int, default=0, help="of a preset's random weights")
    add("--json", action="store_true", help="print one JSON object as the last line")


def selection(args: argparse.Namespace, **more: Any) -> RuntimeConfig:
    """The configuration those options name.

    Raises:
        ValueError: contradictory options.
    """
    with told_to_ranks():
        options = RuntimeConfig(
            model=args.model,
            bs=args.bs,
            ladder=None if args.ladder is None else ",".join(args.ladder),
            max_seq_len=args.max_seq_len,
            num_pages=args.num_pages,
            page_size=args.page_size,
            layers=args.layers,
            overrides=tuple(args.override),
            device=args.device,
            store=args.store,
            weights=args.weights,
            verify_weights=args.verify_weights,
            ep_size=args.ep_size,
            transport=args.transport,
            attention=args.attention,
            pdl=args.pdl,
            kernels=args.kernels,
            allow_inexact=args.allow_inexact,
            tune_s=args.tune_seconds,
            deadline_s=args.deadline_ms / 1e3,
            overlap=args.overlap,
            head=args.head,
            seed=args.seed,
            prefix_cache=args.prefix_cache,
            prefill_budget=args.prefill_budget,
            **more,
        )
    console.quiet = options.ranks.rank > 0  # rank 0 speaks for all
    if options.device == "cpu" or not torch.cuda.is_available():
        # The twin's operations are small: on a busy machine threads mostly wait for each other.
        torch.set_num_threads(1)
    return options


def longest(args: argparse.Namespace) -> int:
    """`--max-seq-len` as the model settles it; reads no more than the model's config.

    Raises:
        ValueError: it exceeds the model's positions, or there is no such model.
    """
    return selection(args).seq_len(model_positions(args))


def model_positions(args: argparse.Namespace) -> int:
    """Positions that the model has; reads no more than its config."""
    overrides = parse_overrides(args.override)
    model, _ = resolve_model(args.model, layers=args.layers, overrides=overrides)
    return model.max_position


def writable_folder(option: str, path: Path) -> None:
    """Make the directory that `option` names; raises ValueError if nothing could be put there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be a folder: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: make it writable, or give another")


def writable_file(option: str, path: Path) -> None:
    """Raises ValueError if the file that `option` names could not be written; leaves no trace."""
    problem = ""
    if path.is_dir():
        problem = "it is a folder"
    elif not path.parent.is_dir():
        problem = f"{path.parent} is no folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "no permission"
    if problem:
        raise ValueError(f"{option} {path} cannot be written: {problem}; give another file")


class Lines:
    """Progress as lines of stderr, for who reads no terminal: stages, and long ones in between."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._last = (0.0, "")  # when, and of which kind

    def tell(self, kind: str, text: str = "") -> None:
        """A kind of work, once as it begins and then every `LINE_EVERY_S` at most."""
        now = time.monotonic()
        when, last = self._last
        if console.is_terminal or console.quiet or (kind == last and now - when < LINE_EVERY_S):
            return
        self._last = (now, kind)
        print(f"{now - self._begin:7.1f} s  {kind} {text}".rstrip(), file=sys.stderr, flush=True)


class Bar:
    """A progress bar on a terminal, lines elsewhere. One task per kind of work."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._done: Counter[str] = Counter()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __call__(self, kind: str, total: int, item: object = "") -> None:
        """One more of `total` pieces of `kind` is done; `item` says which.

        With a `total` of 0 the kind of work begins: what may take long without any piece is told.
        """
        if not total:
            self._lines.tell(kind)
            return
        self._done[kind] += 1
        self._lines.tell(kind, f"{self._done[kind]}/{total} {item}")
        if kind not in self._tasks:
            self._tasks[kind] = self._progress.add_task(kind, total=total)
        self._progress.update(self._tasks[kind], advance=1, description=f"{kind} {item}".strip())

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def print_json(report: dict[str, Any]) -> None:
    """One line, from rank 0."""
    if not console.quiet:
        write_out(json.dumps(report, allow_nan=False) + "\n")


def write_out(text: str) -> None:
    """To stdout, at once.

    Raises:
        SystemExit: nobody reads it any more (`… | head`), which ends a command without a word, with
            the code of those that SIGPIPE ends.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail once more where Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def run(main: Callable[[list[str] | None], int], argv: list[str] | None = None) -> None:
    """Run a command's `main` and exit with its code; named errors become one line, not a trace."""
    try:
        code = written(lambda: main(argv))
    except KeyboardInterrupt:
        print("interrupted; nothing half-made was stored", file=sys.stderr)
        code = 130
    except (ValueError, *NAMED_FAILURES) as error:
        print(error_line(error), file=sys.stderr)
        code = exit_code(error)
    sys.exit(code)
