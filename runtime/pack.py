"""`python -m runtime.pack`: convert a checkpoint once into weights that load at the bus's speed.

What is written is sharded per rank, laid out as the arena wants it, sealed and hashed. A runtime
finds it in the store by itself, or through `--weights DIR`; the directory can be given as `--model`
too, and then the checkpoint is needed no more.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from capture_cache.fingerprint import Fingerprint
from capture_cache.packed import is_packed
from capture_cache.store import Store
from capture_cache.tables import size
from graphs.aot import AotLauncher
from graphs.compile import KernelCompiler
from graphs.model_source import ModelSource
from runtime.cli import Lines, Once, command, console, print_json, run
from runtime.config import DEVICES, HEADS, RuntimeConfig
from runtime.model import model_of
from runtime.packing import Packing, make_packed
from runtime.weights import content_of, identity, store_folder


class ByteBar:
    """A progress bar of bytes on a terminal, lines elsewhere. One task per kind of work."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def __call__(self, kind: str, done: int, total: int) -> None:
        """`done` of `total` bytes of `kind` are finished."""
        self._lines.tell(kind, f"{size(done)} of {size(total)}")
        if kind not in self._tasks:
            self._tasks[kind] = self._progress.add_task(kind, total=total)
        self._progress.update(self._tasks[kind], completed=done)

    def __enter__(self) -> ByteBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def parser() -> argparse.ArgumentParser:
    p = command("runtime.pack", __doc__)
    p.register("action", None, Once)
    add = p.add_argument
    add("--model", "--model-path", "--ckpt", required=True, help="HF directory or preset name")
    add("--out", help="directory to make; default: in the store, where runtimes find it")
    add("--ep-size", type=int, default=1, help="ranks that will share the experts")
    add("--head", choices=HEADS, default="whole", help="as runtimes will have it, see --ep-size")
    add("--layers", type=int, help="pack only the first so many layers")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of the model config")
    add("--seed", type=int, default=0, help="of a preset's random weights")
    add("--device", choices=DEVICES, default="cpu", help="where weights are converted")
    add("--store", help="directory of compiled kernels and packed weights")
    add("--force", action="store_true", help="replace the packed weights in --out")
    add("--json", action="store_true", help="print one JSON object as the last line")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    options = RuntimeConfig(
        model=args.model,
        bs=max(1, args.ep_size),
        layers=args.layers,
        overrides=tuple(args.override),
        device=args.device,
        store=args.store,
        ep_size=args.ep_size,
        seed=args.seed,
        head=args.head,
    )
    if options.ranks.world > 1:
        raise ValueError("one process packs for all ranks: start without torchrun, with --ep-size")
    model, source = model_of(options)
    if source.path is not None and is_packed(source.path):
        raise ValueError(f"{source.path} is packed already; give the checkpoint it was made from")
    name = identity(model, source, ep_size=args.ep_size, seed=args.seed)
    out = Path(args.out) if args.out else _in_store(options.store_path, name, source)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # as for every command: small machines wait for each other
    begin = time.perf_counter()
    with ByteBar() as bar:
        done = make_packed(
            model,
            source,
            out,
            ep_size=args.ep_size,
            seed=args.seed,
            device=device,
            launch=_launcher(options) if device == "cuda" else None,
            force=args.force,
            in_store=not args.out,
            progress=bar,
        )
    report = _report(done, time.perf_counter() - begin)
    _show(report)
    if args.json:
        print_json(report)
    return 0


def _launcher(options: RuntimeConfig) -> AotLauncher:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    compiler = KernelCompiler(Store(options.store_path), f"sm_{properties.major}{properties.minor}")
    return AotLauncher(compiler, num_sms=properties.multi_processor_count)


def _in_store(store: Path, name: Fingerprint, source: ModelSource) -> Path:
    return store_folder(store, name, content_of(source))


def _report(done: Packing, seconds: float) -> dict[str, Any]:
    packed = done.packed
    return {
        "path": str(packed.path),
        "identity": packed.index.identity.digest,
        "made": done.made,
        "replaced": done.replaced,
        "origin": packed.index.origin,
        "content": packed.index.content,
        "ep_size": packed.index.ep_size,
        "tensors": len(packed.index.tensors),
        "bytes": packed.nbytes,
        "shards": {name: shard.nbytes for name, shard in packed.shards.items()},
        "seconds": seconds,
    }


def _show(report: dict[str, Any]) -> None:
    for name, nbytes in report["shards"].items():
        console.print(f"{size(nbytes):>10}  {name}")
    if report["replaced"]:
        console.print(f"replaced   {report['replaced']}", soft_wrap=True)
    what = "packed     "
    if not report["made"]:
        what = "there already, every sha256 compared, nothing written (--force packs again): "
    console.print(
        f"{what}{report['tensors']} tensors, {size(report['bytes'])} in {report['seconds']:.1f} s",
        soft_wrap=True,
    )
    console.print(f"weights    {report['path']}", soft_wrap=True)


if __name__ == "__main__":
    run(main)
