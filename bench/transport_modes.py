"""The transports that `bench.transport_microbench` times, each made ready on this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from barriers.allgather import AllGather
from barriers.deepep import DeepEpLowLatency, DeepEpNormal, check_sizes, load_buffer_class
from barriers.device_watch import DeviceWatch
from barriers.group import RankGroup
from barriers.rdep import Rdep, RdepTuning, load_rdep, peer_layout, peer_views
from barriers.rdep_ref import quantize_ref
from barriers.symmetric import CONTROL_BYTES
from barriers.symmetric_device import DeviceMemory
from barriers.transport import DEEPEP, BufferSpec, Received, Transport, TransportConfig, resolve
from bench.transport_cases import Tokens
from capture_cache.driver import Device, wait_stream
from kernels.triton.launch import JitLauncher

MODES = ("rdep", "nccl", "deepep", "deepep-normal")
LAST = ("deepep-normal",)  # what hangs there ends the context, with all that is in it
_WAIT_S = 20.0  # for the device, beyond every deadline


class SizesMissing(ValueError):
    """The mode does not serve these sizes or so many ranks."""


@dataclass
class Subject:
    """A transport under test.

    Attributes:
        finish: waits for the device, for a bounded time, and raises what went wrong there.
        close: gives everything back; never raises for a failed run.
        separable: dispatch and combine may be repeated each by itself.
        sum_alone: the part of `combine` that makes partial sums, if it can run alone.
        upstream: gets a layer's tokens and y; calls of a library alone, by part, without what the
            decode step needs around them.
        retune: puts the same transport there with another tuning.
    """

    transport: Transport
    finish: Callable[[], None]
    close: Callable[[], None]
    separable: bool = False
    sum_alone: Callable[[torch.Tensor, Received], None] | None = None
    upstream: Callable[[Tokens, torch.Tensor], dict[str, Calls]] | None = None
    retune: Callable[[RdepTuning], None] | None = None


@dataclass(frozen=True)
class Calls:
    """A run of one or more calls of the same kind, which leaves everything as it was."""

    run: Callable[[], object]
    count: int = 1


def make_subject(
    mode: str,
    config: TransportConfig,
    group: RankGroup,
    device: Device,
    *,
    deadline_ms: int,
    tunings: Sequence[RdepTuning] = (RdepTuning(),),
) -> Subject:
    """Make `mode` ready on this rank; all ranks call this together and meet afterwards.

    Args:
        deadline_ms: of rdep's waits.
        tunings: of rdep, ready to be chosen by `retune`; the first is in use.

    Raises:
        DeepEpMissing: the mode needs a package that is not here.
        SizesMissing: of this world or these tokens.
    """
    if mode in DEEPEP:
        try:
            resolve(mode, world=config.world, on_device=True)
            check_sizes(mode, config)
        except ValueError as e:
            raise SizesMissing(str(e)) from e
    if mode == "rdep":
        return _rdep(config, group, device, deadline_ms, tunings)
    if mode != "nccl":
        load_buffer_class()  # before a process group is made for nothing
    nccl = _nccl(group, device)
    launch = JitLauncher(device.num_sms(device.ordinal))
    if mode == "nccl":
        gathered = AllGather(config, _allocate(AllGather.buffers(config)), nccl, launch)
        return Subject(gathered, _finish, lambda: None, separable=True)
    group.barrier(f"starting {mode}")
    if mode == "deepep":
        buffers = _allocate(DeepEpLowLatency.buffers(config))
        fast = DeepEpLowLatency.open(config, buffers, nccl)
        return Subject(fast, _finish, fast.close, upstream=partial(low_latency_calls, fast))
    buffers = _allocate(DeepEpNormal.buffers(config))
    normal = DeepEpNormal.open(config, buffers, nccl, launch)
    return Subject(normal, _finish, normal.close, upstream=partial(normal_calls, normal))


def low_latency_calls(
    transport: DeepEpLowLatency, tokens: Tokens, y: torch.Tensor
) -> dict[str, Calls]:
    """The pair alone: upstream's two buffers alternate with every call, and in pairs each kind of
    call is followed by the one that clears what it left. The tensors made here must live as long as
    a graph with these calls does."""
    config, upstream = transport.config, transport.upstream
    topk, out = tokens.ids.long(), torch.empty_like(tokens.x)
    per_expert = y.view(config.local_experts, -1, config.hidden)
    capacity = per_expert.shape[1] // config.world

    def both() -> None:
        handle = upstream.low_latency_dispatch(
            tokens.x, topk, capacity, config.num_experts, use_fp8=config.fp8
        )[2]
        upstream.low_latency_combine(per_expert, topk, tokens.weights, handle, out=out)

    return {"both": Calls(both)}


def normal_calls(transport: DeepEpNormal, tokens: Tokens, y: torch.Tensor) -> dict[str, Calls]:
    """Tokens are quantised beforehand and partial sums are there: it does neither.

    No combine alone: it reads what its own dispatch left in a handle, so it is timed behind it.
    """
    topk = tokens.ids.long()
    x, scale = quantize_ref(tokens.x) if transport.config.fp8 else (tokens.x, None)
    partial_sums = torch.zeros_like(transport.partial)

    def dispatch() -> None:
        transport.send(x, scale, topk, tokens.weights)

    def both() -> None:
        dispatch()
        transport.collect(partial_sums, tokens.shared)

    return {"both": Calls(both), "dispatch": Calls(dispatch)}


def _rdep(
    config: TransportConfig,
    group: RankGroup,
    device: Device,
    deadline_ms: int,
    tunings: Sequence[RdepTuning],
) -> Subject:
    layout = peer_layout(config)
    with ExitStack() as opened:
        memory = DeviceMemory(group, device, layout.device_bytes)
        opened.callback(memory.close)
        watch = DeviceWatch(memory, deadline_ms=deadline_ms)
        opened.callback(watch.close)
        opened.callback(torch.cuda.synchronize)
        # All of them now: a rank that compiles later is late.
        kernels = {tuning: load_rdep(device, config, tuning) for tuning in tunings}
        on = torch.device("cuda", device.ordinal)
        views = peer_views(layout, memory.payload, on)
        # Signals that go nowhere: slots without a stride are all this rank's own scratch.
        nowhere = torch.zeros(CONTROL_BYTES, dtype=torch.uint8, device=on)

        def make(tuning: RdepTuning, base: int, stride: int) -> Rdep:
            return Rdep(config, views, kernels[tuning], base=base, stride=stride, tuning=tuning)

        def use(tuning: RdepTuning) -> None:
            subject.transport = make(tuning, memory.base, memory.stride)
            subject.sum_alone = make(tuning, nowhere.data_ptr(), 0).sum

        def finish() -> None:
            _finish()
            watch.check()

        first = make(tunings[0], memory.base, memory.stride)
        subject = Subject(first, finish, opened.pop_all().close, separable=True, retune=use)
        use(tunings[0])
    return subject


def _allocate(specs: Iterable[BufferSpec]) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
        for _, name, shape, dtype in specs
    }


def _nccl(group: RankGroup, device: Device) -> Any:
    """torch's process group over all ranks, made once."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl",
            rank=group.rank,
            world_size=group.world,
            # Alone there is no torchrun, hence no address to meet at.
            store=dist.HashStore() if group.world == 1 else None,  # type: ignore[attr-defined]
            device_id=torch.device("cuda", device.ordinal),
        )
    return dist.group.WORLD


def _finish() -> None:
    """Wait for this rank's device; its streams are ordered by events alone."""
    wait_stream(torch.cuda.current_stream().cuda_stream, _WAIT_S, "waiting for a benchmark")
