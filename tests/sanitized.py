"""Every kernel of a step, run eagerly on tiny models over guarded tensors, for memory checkers.

    python -m tests.sanitized --compile --store DIR            needs no GPU; the others do it first
    python -m tests.sanitized --tool memcheck --store DIR      also racecheck, synccheck
    python -m tests.sanitized --tool fence --store DIR         needs no tool: unmapped addresses
    python -m tests.sanitized --memory own|end|start|host --store DIR     what these run

Each tensor has a block of its own (`tests.guarded`) and scratch is as large as the key wants, so an
access past any of them shows. States are those of the capture's proof: random lengths, scattered
pages, a prompt chunk, every wish of sampling. Prints one JSON line a model and key, and a summary
last; exits 0 if our kernels are clean, 1 if not, 2 if the tool is missing or refuses the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from barriers.device_watch import DeviceWatch
from barriers.rdep import Rdep, RdepTuning, compile_rdep, load_rdep
from barriers.symmetric import CONTROL_BYTES
from barriers.transport import Local, Transport, TransportConfig
from capture_cache.store import Store
from graphs.aot import AotLauncher
from graphs.branch import InLine
from graphs.buffers import transport_config, workspace_per_token
from graphs.calls import Call, RecordingOps
from graphs.candidates import PLANS, candidates
from graphs.capture import CudaBackend, GraphBackend, GraphSet, TwinBackend
from graphs.checkpoint import random_weights
from graphs.compile import KernelCompiler, compile_all
from graphs.devices import torch_dtype
from graphs.flashinfer_mla import FlashinferMla
from graphs.keys import GraphKey, Ladder
from graphs.ops import Ops
from graphs.prove import Prover
from graphs.rope import rope_table
from graphs.select import fits_workspace
from graphs.weights import add_part_views
from kernels.triton.launch import Launcher
from kernels.triton.overlap import MODES
from kernels.triton.settle import stamp
from runtime.assemble import exchange_launcher, list_kernels, make_step
from runtime.config import RuntimeConfig
from runtime.engine import reset_state
from runtime.selection import Selection, choose
from tests.guarded import Fenced, HostBlocks, Memory, OwnBlocks
from tests.planted import compile_planted, run_planted

ARCH = "sm_90"
RDEP_TUNING = RdepTuning(sum_pdl=False)  # a step with a side branch has it so
PLANTED = "planted"
SAY_EVERY_S = 5.0
SEED, STATES = 5, 2  # of synthetic states, a key
# Widths of the published models where kernels depend on them; two rows of KV splits; 8 rows.
V3_HEADS = (
    "kv_lora_rank=512", "qk_rope_head_dim=64", "qk_nope_head_dim=128", "v_head_dim=128",
    "num_attention_heads=16", "q_lora_rank=160",
)  # fmt: skip
ROWS, MAX_SEQ_LEN, NUM_PAGES = 8, 1152, 60


@dataclasses.dataclass(frozen=True)
class Config:
    """A tiny model, and the keys that it is run at ("rows" or "rows+prompt tokens")."""

    overrides: tuple[str, ...] = ()
    keys: tuple[str, ...] = ("1", "8", "5+40")
    transport: str = "local"
    attention: str = "triton"
    candidates: bool = False


# Experts meet one token, a few (one tile), and more than one tile of 64 ("2+300").
CONFIGS: dict[str, Config] = {
    "bf16": Config(keys=("1", "5+40")),
    "fp8": Config(("quantization=fp8",), keys=("1", "8", "2+300")),
    "v3_heads": Config((*V3_HEADS, "hidden_size=768", "quantization=fp8"), keys=("8", "5+40")),
    "rdep": Config(("quantization=fp8",), keys=("8", "5+40"), transport="rdep"),
    # So wide that products are cut into more than eight parts.
    "fp32": Config(("dtype=float32", "hidden_size=768"), keys=("5+40",)),
    "no_q_lora": Config(("q_lora_rank=null", "n_shared_experts=2"), keys=("5+40",)),
    "rdep_bf16": Config(keys=("3",), transport="rdep"),
    "bf16_plans": Config(keys=("5+40",), candidates=True),
    "fp8_plans": Config(("quantization=fp8",), keys=("2+300",), candidates=True),
    "hopper": Config(
        (*V3_HEADS[:4], "num_attention_heads=64", "q_lora_rank=160"),
        keys=("8", "5+40"),
        attention="hopper",
    ),
    # The last: a fault of flashinfer's own kernel would end the run.
    "flashinfer": Config(V3_HEADS, keys=("8", "5+40"), attention="flashinfer"),
}


class Watched:
    """A launcher that counts kernels, and knows which one ran last.

    Args:
        settle: called after each launch; waits for the device where a fault must have a name.
    """

    def __init__(self, inner: Launcher, settle: Callable[[], None]) -> None:
        self.arch, self.num_sms, self.pdl = inner.arch, inner.num_sms, inner.pdl
        self.launches: Counter[str] = Counter()
        self.last = ""
        self._inner, self._settle = inner, settle

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """As `Launcher`."""
        self.note(kernel.__name__)
        self._inner(kernel, grid, *args, **options)
        self._settle()

    def note(self, name: str) -> None:
        self.last = name
        self.launches[name] += 1

    def wrapped(self, name: str, kernel: Any) -> Any:
        """A loaded kernel of ours that is launched without a launcher."""

        def launch(*args: Any) -> None:
            self.note(name)
            kernel.launch(*args)
            self._settle()

        return SimpleNamespace(launch=launch)


def options_of(config: Config, store: Path, device: str) -> RuntimeConfig:
    return RuntimeConfig.of(
        model="tiny",
        layers=3,
        overrides=config.overrides,
        bs=ROWS,
        max_seq_len=MAX_SEQ_LEN,
        num_pages=NUM_PAGES,
        ladder=str(ROWS),
        transport=config.transport if device != "cpu" else "local",
        attention="auto",
        kernels="default",
        store=str(store),
        device="auto" if device == "meta" else device,
    )


def selections(config: Config, store: Path, device: str) -> list[tuple[GraphKey, Selection]]:
    """What is built for each key: buffers for that key alone."""
    listed = choose(options_of(config, store, device), compile_only=device == "meta")
    attention = config.attention if device != "cpu" else "triton"
    step = dataclasses.replace(listed.step, attention=attention)
    keys = [GraphKey.parse(text) for text in config.keys]
    return [(k, dataclasses.replace(listed, step=step, ladder=Ladder([k]))) for k in keys]


def requests_of(config: Config, store: Path, arch: str) -> list[Any]:
    """Kernels of all keys, candidates included."""
    found = {}
    for _, selection in selections(config, store, "meta"):
        kinds = [selection.step.attention]
        listed = list_kernels(selection, arch, kinds, every=config.candidates)
        found |= {request.spec: request for request in listed.requests}
    return list(found.values())


def compile_for(names: Iterable[str], store: Path, arch: str) -> dict[str, Any]:
    """Have every kernel in the store."""
    began = time.perf_counter()
    wanted = {r.spec: r for name in names for r in requests_of(CONFIGS[name], store, arch)}
    compiler = KernelCompiler(Store(store), arch)
    _say(f"compiling {len(wanted)} kernels, where the store has not got them; minutes at most")
    compile_all(list(wanted.values()), compiler, progress=_Counted(len(wanted)))
    compile_planted(arch, store)
    for name in names:
        if CONFIGS[name].transport == "rdep":
            for _, selection in selections(CONFIGS[name], store, "meta"):
                compile_rdep(exchange_config(selection), arch, RDEP_TUNING, store=Store(store))
    seconds = round(time.perf_counter() - began, 1)
    return {"kernels": len(wanted), "compiled": compiler.compiled, "seconds": seconds}


def exchange_config(selection: Selection) -> TransportConfig:
    return transport_config(selection.model, selection.step, selection.ladder.max_tokens)


class Running:
    """One model at one key after another, over guarded memory."""

    def __init__(self, memory: Callable[[], Memory], store: Path, device: str) -> None:
        self._memory, self._store, self.device = memory, Store(store), device
        self.launch: Watched | None = None
        self._backend: GraphBackend = TwinBackend()
        if device == "cuda":
            place = torch.device("cuda", torch.cuda.current_device())
            self._backend = CudaBackend(place)
            properties = torch.cuda.get_device_properties(place)
            arch = f"sm_{properties.major}{properties.minor}"
            inner = AotLauncher(
                KernelCompiler(self._store, arch),
                num_sms=properties.multi_processor_count,
                pdl=MODES["late"],
            )
            self.launch = Watched(inner, torch.cuda.synchronize)

    def plant(self, store: Path, *, before: bool) -> None:
        """Launch what every check must find."""
        assert self.launch is not None
        run_planted(self._memory(), self.launch.arch, store, self.launch.note, before=before)

    def run(self, config: Config, key: GraphKey, selection: Selection) -> dict[str, Any]:
        """Run the step once from a synthetic state; what was launched, and what was overwritten."""
        before = Counter(self.launch.launches) if self.launch else Counter()
        memory = self._memory()
        with self._backend.on_stream():
            views = self._views(selection, memory)
            self._fill(selection, views)
            transport, release = self._transport(selection, views, memory)
            ops = Ops(self.launch)
            if config.candidates and self.launch:
                ops = RecordingOps(ops, _every_candidate(ops, selection))
            step = make_step(selection, ops, views, transport, InLine())
            prover = Prover(GraphSet(step, selection.ladder, self._backend), replays=1, seed=SEED)
            for seed in range(SEED, SEED + STATES):
                state, _ = prover._eager(key, seed)
            if self.launch:
                stamp(self.launch, views["stamps"], 0)
            self._backend.synchronize()
        found = {"overwritten": memory.overwritten(), "live_rows": state.live_rows}
        release()
        memory.close()
        launched = (Counter(self.launch.launches) if self.launch else Counter()) - before
        return found | {"chunk": state.chunk_tokens, "launches": dict(sorted(launched.items()))}

    def _views(self, selection: Selection, memory: Memory) -> dict[str, torch.Tensor]:
        places = [place.entry for place in selection.layout.places]
        views = {e.name: memory.empty(e.name, e.shape, torch_dtype(e.dtype)) for e in places}
        add_part_views(views)
        return views

    def _fill(self, selection: Selection, views: dict[str, torch.Tensor]) -> None:
        views["rope_table"].copy_(rope_table(selection.model, selection.step.max_seq_len))
        random_weights(selection.model, views, seed=0, launch=self.launch)
        reset_state(views)

    def _transport(
        self, selection: Selection, views: dict[str, torch.Tensor], memory: Memory
    ) -> tuple[Transport, Callable[[], None]]:
        config = exchange_config(selection)
        if selection.step.transport == "local":
            launch = self.launch and exchange_launcher(selection, self.launch)
            return Local(config, launch), lambda: None
        return self._rdep(config, views, memory)

    def _rdep(
        self, config: Any, views: dict[str, torch.Tensor], memory: Memory
    ) -> tuple[Transport, Callable[[], None]]:
        """One rank that sends to itself; its peer memory is guarded tensors, too."""
        from capture_cache.driver import Device

        assert self.launch is not None
        device = Device(torch.cuda.current_device())
        control = memory.empty("control", (CONTROL_BYTES,), torch.uint8).zero_()
        torch.cuda.synchronize()
        group = SimpleNamespace(rank=0, world=1, describe=lambda _: "the only rank")
        peers: Any = SimpleNamespace(device=device, base=control.data_ptr(), group=group)
        watch = DeviceWatch(peers, step_address=views["step"].data_ptr())
        buffers = {
            name: memory.empty(name, shape, torch_dtype(dtype)).zero_()
            for _, name, shape, dtype in Rdep.buffers(config)
        }
        loaded = load_rdep(device, config, RDEP_TUNING, store=self._store)
        kernels = {name: self.launch.wrapped(name, kernel) for name, kernel in loaded.items()}
        base = control.data_ptr()
        transport = Rdep(config, buffers, kernels, base=base, stride=0, tuning=RDEP_TUNING)

        def release() -> None:
            watch.check()
            watch.close()

        return transport, release


def _every_candidate(ops: Ops, selection: Selection) -> Callable[[Call], None]:
    """Runs each operation once, and products with every plan that fits, the default last."""
    per_token = workspace_per_token(selection.model, selection.step)

    def hook(call: Call) -> None:
        for candidate in reversed(candidates(call)):
            ours = candidate.other is None
            if ours and (call.op not in PLANS or fits_workspace(candidate, call, per_token)):
                candidate.run(ops, call)

    return hook


def run_all(names: Sequence[str], running: Running, store: Path) -> bool:
    """Print a line for each model and key; whether nothing was overwritten."""
    clean = True
    for name in names:
        config = CONFIGS[name]
        for key, selection in selections(config, store, running.device):
            if selection.step.attention == "flashinfer":
                usable, reason = FlashinferMla.available(selection.model)
                if not usable:
                    _tell({"config": name, "key": str(key), "skipped": reason})
                    continue
            _say(f"running {name}, key {key}")
            began = time.perf_counter()
            found = running.run(config, key, selection)
            clean = clean and not found["overwritten"]
            seconds = round(time.perf_counter() - began, 2)
            _tell({"config": name, "key": str(key), "seconds": seconds} | found)
    return clean


def _say(text: str) -> None:
    """To people, on stderr: stdout is for programs."""
    print(text, file=sys.stderr, flush=True)


class _Counted:
    """Says every few seconds how many of `total` are done."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()

    def __call__(self, name: str) -> None:
        self._done += 1
        if time.monotonic() - self._said >= SAY_EVERY_S:
            self._said = time.monotonic()
            _say(f"{self._done}/{self._total} {name}")


def _tell(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


def _memory(kind: str) -> Callable[[], Memory]:
    if kind == "host":
        return HostBlocks
    if kind == "own":
        return OwnBlocks
    from capture_cache.driver import Device

    device = Device(torch.cuda.current_device())
    return lambda: Fenced(at_end=kind == "end", device=device)


def _run(args: argparse.Namespace, names: list[str]) -> int:
    """What a checker watches: this process runs kernels."""
    running = Running(_memory(args.memory), args.store, "cpu" if args.memory == "host" else "cuda")
    began = time.perf_counter()
    try:
        if names == [PLANTED]:
            running.plant(args.store, before=args.memory == "start")
        clean = run_all([n for n in names if n != PLANTED], running, args.store)
    except Exception as error:
        last = running.launch.last if running.launch else ""
        _tell({"fault": f"{type(error).__name__}: {error}", "kernel": last})
        sys.stderr.flush()
        if args.memory != "host":
            os._exit(1)  # a lost context would fault again on the way out
        raise
    launched = dict(sorted(running.launch.launches.items())) if running.launch else {}
    seconds = round(time.perf_counter() - began, 1)
    _tell({"done": True, "clean": clean, "launches": launched, "seconds": seconds})
    return 0 if clean else 1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitized")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--configs", default=",".join(CONFIGS), help="of " + ", ".join(CONFIGS))
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds of each check")
    doing = parser.add_mutually_exclusive_group(required=True)
    doing.add_argument("--list", action="store_true", help="kernels of each model, run by nobody")
    doing.add_argument("--compile", action="store_true")
    doing.add_argument("--memory", choices=("own", "end", "start", "host"))
    doing.add_argument("--tool", choices=("memcheck", "racecheck", "synccheck", "fence"))
    args = parser.parse_args(argv)
    names = args.configs.split(",")
    unknown = sorted(set(names) - set(CONFIGS))
    if unknown and names != [PLANTED]:
        parser.error(f"--configs: expected some of {', '.join(CONFIGS)}, got {', '.join(unknown)}")
    if args.memory:
        return _run(args, names)
    if args.list:
        _say(f"listing kernels of {len(names)} models")
        requests = {name: requests_of(CONFIGS[name], args.store, ARCH) for name in names}
        _tell({name: sorted({r.function for r in found}) for name, found in requests.items()})
        return 0
    if args.compile:
        _tell(compile_for(names, args.store, ARCH))
        return 0
    from tests.sanitizer import check  # it starts this program again, under the tool

    compiled = compile_for(names, args.store, ARCH)
    _say(f"{args.tool} of {', '.join(names)}: at most {args.timeout:.0f} s each time it runs them")
    report = check(args.tool, names, args.store, timeout_s=args.timeout)
    _tell({"compile": compiled} | report)
    return int(report["exit"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
