"""What a step launches, kernel by kernel: in which part, for which weight, over which bytes.

The step is run with operations that launch nothing and note names, so the list needs no device. A
profile is then read against it. Kernels of other libraries are not in the list: what a profile has
between two known kernels belongs to the part of the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from barriers.transport import Local, Transport
from bench.ops_specs import Floors
from graphs.buffers import kv_bytes_per_token, transport_config
from graphs.calls import Call, NoLauncher, RecordingBranches, RecordingTransport
from graphs.choices import ChosenOps
from graphs.keys import GraphKey
from graphs.ops import Ops
from kernels.triton.launch import Arg
from runtime.assemble import exchange_launcher, listed_transport, listed_vocabulary, make_step
from runtime.engine import Engine

LOOK_AHEAD = 12  # launches that a profile may lack: those of an attention that is not used
FOREIGN = ""
OWN_ATTENTION = ("_mla_decode", "_merge")


@dataclass(frozen=True)
class Launch:
    """One kernel of a step.

    Attributes:
        kernel: the function's name.
        part: as `DecodeStep.part_names`.
        label: the weight that it is for; empty where there is none.
        floor_bytes: that its operation must read; 0 for all but the first kernel of an operation.
    """

    kernel: str
    part: str
    label: str
    floor_bytes: int


@dataclass(frozen=True)
class Event:
    """One kernel as it was seen. Microseconds on one clock."""

    name: str
    begin: float
    end: float

    @property
    def us(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Placed:
    """An event and where in the step it stands.

    Attributes:
        gap: idle time before it; 0 where it overlaps the kernel before it.
    """

    event: Event
    part: str
    label: str
    floor_bytes: int
    gap: float


class StepMap:
    """Launches of one key's step, and the bytes that each part must read.

    Args:
        by_operation: list operations by name, as the CPU twin runs them, instead of kernels.
    """

    def __init__(self, engine: Engine, key: GraphKey, *, by_operation: bool = False) -> None:
        self._engine, self._key = engine, key
        self.launches: list[Launch] = []
        self.part_bytes: dict[str, int] = {}
        buffers = engine.graphs.step.buffers
        views = {name: buffers[name] for name in buffers.addresses()}
        weights = engine.graphs.step.weights
        self._names = {t.data_ptr(): n for n, t in weights.items() if n != "rope_table"}
        model = engine.model_config
        per_token = kv_bytes_per_token(model) // model.num_layers
        self._floors = Floors((weights[n] for n in self._names.values()), per_token)
        self._pending: list[Launch] = []
        names = _Names(engine.launcher)
        ops = ChosenOps(Ops(names), engine.choices)

        def hook(call: Call) -> None:
            names.seen.clear()
            if call.op == "mla_decode" and engine.config.attention != "triton":
                names.seen += OWN_ATTENTION  # the partial results are laid out for the other kernel
            elif not by_operation:
                getattr(ops, call.op)(*call.args, **call.kwargs)
            self._add(call, names.seen or [call.op])

        # FA3 would be called, not listed; its place is taken by our own kernel's.
        plain = dataclasses.replace(
            engine.selection, step=dataclasses.replace(engine.config, attention="triton")
        )
        step = make_step(
            *(plain, RecordingBranches(ops, hook), views, self._transport(names, hook, views)),
            vocabulary=listed_vocabulary(plain, views),
        )
        step.run(key, self._close_part)

    def _transport(
        self, names: _Names, hook: Any, views: Mapping[str, torch.Tensor]
    ) -> Transport | None:
        engine = self._engine
        if engine.config.ep_size > 1:
            return listed_transport(
                engine.selection, exchange_launcher(engine.selection, names), views
            )
        sizes = transport_config(engine.model_config, engine.config, engine.ladder.max_tokens)
        if not engine.model_config.num_experts:
            return None
        return RecordingTransport(Local(sizes, names), hook)

    def _add(self, call: Call, kernels: Sequence[str]) -> None:
        found = [self._names.get(t.data_ptr(), "") for _, t in call.tensors()]
        leaves = [n.split(".", 2)[-1] for n in found if n and not n.endswith(("_scale", "_norm"))]
        label = leaves[0] if leaves else ""
        nbytes = self._floors.bytes(call)
        for i, kernel in enumerate(kernels):
            self._pending.append(Launch(kernel, "", label, 0 if i else nbytes))

    def _close_part(self, name: str) -> None:
        self.part_bytes[name] = sum(launch.floor_bytes for launch in self._pending)
        self.launches += [dataclasses.replace(launch, part=name) for launch in self._pending]
        self._pending.clear()


class _Names(NoLauncher):
    """Notes the names of kernels."""

    def __init__(self, like: Any) -> None:
        self.seen: list[str] = []
        if like is not None:
            self.arch, self.num_sms, self.pdl = like.arch, like.num_sms, like.pdl

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: Arg, **options: Any) -> None:
        self.seen.append(kernel.__name__)


def place(events: Sequence[Event], launches: Sequence[Launch]) -> list[Placed]:
    """Read one step's events against its launches; both in order.

    An event that is none of the next launches is another library's. It takes over the bytes of the
    launches that are missing in its place: FA3 attention those of our own.
    """
    placed: list[Placed] = []
    strangers: list[int] = []
    at, part, last_end = 0, launches[0].part if launches else "", None
    for event in sorted(events, key=lambda e: e.begin):
        gap = 0.0 if last_end is None else max(0.0, event.begin - last_end)
        last_end = event.end if last_end is None else max(last_end, event.end)
        window = range(at, min(at + LOOK_AHEAD, len(launches)))
        found = next((i for i in window if launches[i].kernel == event.name), None)
        if found is None:
            strangers.append(len(placed))
            placed.append(Placed(event, part, FOREIGN, 0, gap))
            continue
        missing = sum(launch.floor_bytes for launch in launches[at:found])
        if strangers and missing:
            longest = max(strangers, key=lambda i: placed[i].event.us)
            placed[longest] = dataclasses.replace(placed[longest], floor_bytes=missing)
        strangers.clear()
        launch, at = launches[found], found + 1
        part = launch.part
        placed.append(Placed(event, part, launch.label, launch.floor_bytes, gap))
    return placed
