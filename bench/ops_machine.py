"""A step to take operations from: a few real layers, rows of a given context, given routing.

The step runs eagerly, so every operation is met with the inputs that it has in service.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from barriers.transport import Local
from bench.ops_specs import Floors
from bench.routing import expert_ids
from capture_cache.store import Store
from graphs.buffers import kv_bytes_per_token, transport_config
from graphs.calls import Call, RecordingOps, RecordingTransport
from graphs.capture import CudaBackend
from graphs.compile import KernelCompiler, compile_all
from graphs.keys import GraphKey
from graphs.ops import Ops
from graphs.timing import GraphTimer, HostTimer, Timer
from kernels.triton.weight_tiles import extents
from runtime.assemble import list_kernels, make_step
from runtime.build import build
from runtime.config import RuntimeConfig
from runtime.driver import Runtime
from runtime.engine import Engine
from runtime.selection import choose

ROUTINGS = ("even", "skewed")
ROW_STATE = ("phase", "seq_len", "last_token", "limit", "step", "fault")
CPU_CACHE_BYTES = 1 << 20  # nothing is timed there


@dataclass(frozen=True)
class Setting:
    """What one engine is built for.

    Attributes:
        experts: of this rank; None for the model's own.
        rows: numbers of rows to measure, ascending.
    """

    model: str
    overrides: tuple[str, ...]
    experts: int | None
    ctx_len: int
    rows: tuple[int, ...]
    device: str
    store: str | None

    @property
    def options(self) -> RuntimeConfig:
        """A dense and two expert layers, for the last differs; as much KV as all rows need."""
        more: tuple[str, ...] = ("first_k_dense_replace=1",)
        if self.experts is not None:
            more = (*more, f"n_routed_experts={self.experts}")
        most, room = self.rows[-1], self.ctx_len + 1
        return RuntimeConfig(
            model=self.model,
            bs=most,
            ladder=",".join(str(r) for r in self.rows),
            max_seq_len=max(room, 65),
            num_pages=most * -(-room // 64) + 1,
            layers=3,
            overrides=(*self.overrides, *more),
            device=self.device,
            store=self.store,
            ep_size=1,
            attention="triton",
            kernels="default",
            verify=False,
        )


class Machine:
    """An engine whose step can be taken apart.

    Args:
        progress: as `runtime.build.build`.
    """

    def __init__(self, setting: Setting, progress: Callable[..., None]) -> None:
        self.setting, self.options = setting, setting.options
        self._compile(progress)
        self.engine: Engine = build(self.options, progress)
        self.on_device = self.engine.selection.on_device
        self.ops = Ops(self.engine.launcher)
        if self.engine.launcher is not None:
            self.engine.launcher.thaw()
        buffers = self.engine.graphs.step.buffers
        self._views = {name: buffers[name] for name in buffers.addresses()}
        step = self.engine.graphs.step
        self.weights = {t.data_ptr(): n for n, t in step.weights.items() if n != "rope_table"}
        per_token = kv_bytes_per_token(self.engine.model_config) // step.cfg.num_layers
        self.floors = Floors((step.weights[n] for n in self.weights.values()), per_token)
        self._place_rows()

    def _compile(self, progress: Callable[..., None]) -> None:
        """Every candidate's kernel, by several processes, before the first of them runs."""
        selection = choose(self.options)
        if not selection.on_device:
            return
        major, minor = torch.cuda.get_device_capability()
        arch = f"sm_{major}{minor}"
        requests = list_kernels(selection, arch, ["triton"], every=True).requests
        compile_all(
            requests,
            KernelCompiler(Store(self.options.store_path), arch),
            progress=lambda name: progress("compile", len(requests), name),
        )

    def _place_rows(self) -> None:
        """All rows hold `ctx_len` tokens, each in its own pages of random KV."""
        engine = self.engine
        engine.fill_kv(seed=0)
        # `walk` takes a token back: the new token's own KV is the last of ctx_len.
        runtime = Runtime(engine, engine.options.scheduling)
        runtime.occupy(engine.config.max_rows, self.setting.ctx_len, 1)

    def timer(self, replays: int) -> Timer:
        backend = self.engine.graphs.backend
        if isinstance(backend, CudaBackend):
            return GraphTimer(backend.stream, replays=replays)
        return HostTimer()

    @property
    def cache_bytes(self) -> int:
        """Of the last-level cache."""
        if not self.on_device:
            return CPU_CACHE_BYTES
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)

    def walk(self, rows: int, routing: str, visit: Callable[[Call], None]) -> None:
        """Run one step of `rows` rows; each operation is given to `visit`, then run.

        Args:
            routing: of `ROUTINGS`; replaces what the router chose.
        """

        def hook(call: Call) -> None:
            if call.op == "align":
                self._route(call, routing)
            visit(call)
            getattr(self.ops, call.op)(*call.args, **call.kwargs)

        engine = self.engine
        ops = RecordingOps(self.ops, hook)
        sizes = transport_config(engine.model_config, engine.config, engine.ladder.max_tokens)
        transport = RecordingTransport(Local(sizes, engine.launcher), hook)
        step = make_step(engine.selection, ops, self._views, transport)
        phase, length = self._views["phase"], self.setting.ctx_len - 1
        with engine.graphs.backend.on_stream():
            self._views["seq_len"].fill_(length)
            phase.zero_()
            phase[:rows] = 2
            step.run(GraphKey(rows, rows))
            engine.graphs.backend.synchronize()
        if int(self._views["fault"]):
            raise RuntimeError(f"a step of {rows} rows gave fault {int(self._views['fault'])}")

    @contextmanager
    def state_kept(self) -> Iterator[None]:
        """Whatever runs within it, rows are afterwards as they were."""
        held = {name: self._views[name].clone() for name in ROW_STATE}
        yield
        for name, was in held.items():
            self._views[name].copy_(was)

    def _route(self, call: Call, routing: str) -> None:
        cfg = self.engine.model_config
        ids = call.args[0][:, : cfg.experts_per_token]  # a shared expert behind them stays
        if routing == "even":
            flat = torch.arange(ids.numel()) % cfg.num_experts
            chosen = flat.view(ids.shape).to(torch.int32)
        else:
            chosen = expert_ids(
                "zipf",
                tokens=ids.shape[0],
                num_experts=cfg.num_experts,
                top_k=cfg.experts_per_token,
                seed=0,
            )
        ids.copy_(chosen)

    def label(self, call: Call) -> str:
        """The operation, and the weight that it is for."""
        names = [
            self.weights[t.data_ptr()] for _, t in call.tensors() if t.data_ptr() in self.weights
        ]
        leaves = [n.split(".", 2)[-1] for n in names if not n.endswith("_scale")]
        shapes = [extents(tuple(t.shape)) for _, t in self.floors.weights_of(call) if t.ndim > 1]
        largest = max(shapes, key=math.prod, default=None)
        size = "" if largest is None else " " + "x".join(str(e) for e in largest)
        return f"{call.op} {leaves[0]}{size}" if leaves and size else call.op

    def close(self) -> None:
        """Release the engine and what was rotated."""
        self.engine.close()
        if self.on_device:
            torch.cuda.empty_cache()
