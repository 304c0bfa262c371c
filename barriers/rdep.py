"""`rdep`: one copy of a token per *rank*, quantised while it is sent, and one partial sum back.

Three kernels a layer over peer memory (cuda/rdep.cu says how they follow each other and why two
signals protect everything): `send`; after the experts `sum`, which signals, and `pull`, which
waits. Every bit of a result depends on that token alone: not on the tuning, the key, or who else is
busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from barriers.device_code import compile_with, load_kernels
from barriers.transport import (
    BufferSpec,
    Received,
    Stateless,
    TransportConfig,
    check_combine,
    check_dispatch,
    wire_buffers,
    wire_views,
)
from barriers.watch import OPERATIONS
from capture_cache.driver import Device
from capture_cache.kernel import CompiledKernel
from capture_cache.launch import LoadedKernel
from capture_cache.layout import ArenaLayout, Entry, Section
from capture_cache.nvrtc import CudaModule
from capture_cache.store import Store

TAG = 1024  # what all signals of a grid add up to; kTag of cuda/barrier.cuh
_ACTS = {"bfloat16": 0, "float16": 1, "float32": 2}
_WORDS = 4  # int32: rank, silent rows, two block counters; `Words` of cuda/rdep.cu
_SEND_PARAMS = ("ptr", "i64", *("ptr",) * 10, "i32", "i32", "i32", "i32", "i32")
PARAMS: dict[str, tuple[str, ...]] = {
    "rdep_send": _SEND_PARAMS,
    "rdep_send_quantized": _SEND_PARAMS,
    "rdep_sum": ("ptr", "i64", "ptr", "ptr", "ptr", "ptr", "ptr", "ptr", "i32"),
    "rdep_pull": ("ptr", "i64", "ptr", "ptr", "ptr", "ptr", "ptr", "i32", "i32"),
}


@dataclass(frozen=True)
class RdepTuning:
    """How the kernels are cut. Changes no bit of a result, and ranks need not agree on it.

    Attributes:
        send_threads: of a block of `send`; each moves 16 bytes of a token (7168 e4m3: 448).
        sum_threads, sum_blocks: of `sum`, whose grid does not depend on the key.
        pull_threads: of a block of `pull`; each adds 16 bytes of the result (7168 bf16: 896).
        bulk_pull: pull through the bulk copy engine instead of by loads of each thread.
        share_blocks: up to this many blocks signal one by one, each as soon as it is done; in a
            larger grid the last block signals for all (0: always).
        pdl: launch with programmatic dependent launch.
        sum_pdl: `sum`, too; not where it is the first kernel after a join of two streams.
    """

    send_threads: int = 224
    sum_threads: int = 224
    sum_blocks: int = 264
    pull_threads: int = 224
    bulk_pull: bool = False
    share_blocks: int = 160
    pdl: bool = True
    sum_pdl: bool = True

    def __post_init__(self) -> None:
        for name in ("send_threads", "sum_threads", "pull_threads"):
            threads = getattr(self, name)
            if threads % 32 or not 32 <= threads <= 1024:
                raise ValueError(f"{name} must be a multiple of 32 up to 1024, got {threads}")
        if self.bulk_pull and self.pull_threads > 256:
            raise ValueError(
                "bulk_pull keeps a piece of each rank for every thread in 48 KiB of shared memory: "
                f"use at most 256 pull_threads, got {self.pull_threads}"
            )
        if self.sum_blocks < 1 or not 0 <= self.share_blocks <= TAG:
            raise ValueError(
                f"expected sum_blocks of at least 1 and share_blocks of 0 to {TAG}, got "
                f"{self.sum_blocks} and {self.share_blocks}"
            )

    def share(self, blocks: int) -> int:
        """What each block but the first adds to the signal; 0: the last block gives all of it."""
        return TAG // blocks if blocks <= self.share_blocks else 0


class Launchable(Protocol):
    """`capture_cache.launch.LoadedKernel`."""

    def launch(
        self, grid: tuple[int, ...], values: Sequence[int | float | bytes], stream: int
    ) -> None: ...


def compile_rdep(
    config: TransportConfig,
    arch: str,
    tuning: RdepTuning | None = None,
    *,
    store: Store | None = None,
) -> CudaModule:
    """Compile cuda/rdep.cu for these sizes; needs no GPU. The rank makes no difference.

    Raises as `capture_cache.nvrtc.compile_cuda`.
    """
    tuning = tuning or RdepTuning()
    defines = {
        "RDEP_WORLD": config.world,
        "RDEP_HIDDEN": config.hidden,
        "RDEP_TOP_K": config.top_k,
        "RDEP_LOCAL_EXPERTS": config.local_experts,
        "RDEP_CAPACITY": config.capacity,
        "RDEP_ACT": _ACTS[config.act_dtype],
        "RDEP_FP8": int(config.fp8),
        "RDEP_BULK": int(tuning.bulk_pull),
        "RDEP_SEND_THREADS": tuning.send_threads,
        "RDEP_SUM_THREADS": tuning.sum_threads,
        "RDEP_PULL_THREADS": tuning.pull_threads,
    }
    return compile_with("rdep.cu", arch, defines, store=store)


def load_rdep(
    device: Device,
    config: TransportConfig,
    tuning: RdepTuning | None = None,
    *,
    store: Store | None = None,
) -> dict[str, Launchable]:
    """Compile and load on `device`. All ranks do this before any of them launches."""
    tuning = tuning or RdepTuning()
    module = compile_rdep(config, device.arch, tuning, store=store)
    kernels: dict[str, Launchable] = {}
    for part in ("send", "sum", "pull"):
        kinds = {n: PARAMS[n] for n in module.kernels if n.startswith(f"rdep_{part}")}
        warps = asdict(tuning)[f"{part}_threads"] // 32
        pdl = tuning.pdl and (tuning.sum_pdl or part != "sum")
        kernels.update(load_kernels(device, module, kinds, num_warps=warps, pdl=pdl))
    return kernels


def peer_layout(config: TransportConfig, more: Iterable[BufferSpec] = ()) -> ArenaLayout:
    """Where the buffers lie in a payload that holds nothing but `more` behind them."""
    entries = [Entry(*spec) for spec in (*Rdep.buffers(config), *more)]
    return ArenaLayout.build(entries, [Section("peers")])


def peer_views(layout: ArenaLayout, payload: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The entries of `layout` as tensors at device address `payload`."""
    memory = torch.as_tensor(_DeviceBytes(payload, layout.device_bytes), device=device)
    views = {}
    for place in layout.places:
        part = memory.narrow(0, place.offset, place.nbytes)
        views[place.entry.name] = part.view(getattr(torch, place.entry.dtype)).view(
            place.entry.shape
        )
    return views


class _DeviceBytes:
    """Device memory as torch takes it from others; as bytes, for it knows neither bf16 nor fp8."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


class PeerKernels:
    """Kernels over peer memory, as a capture asks after them.

    Args:
        kernels: by name, loaded.
        base, stride: of the memory: rank + k's part is k strides behind this rank's.
        world: ranks.
        stream: handle of the stream to launch on; by default torch's current one.
    """

    def __init__(
        self,
        kernels: Mapping[str, Launchable],
        base: int,
        stride: int,
        world: int,
        stream: Callable[[], int] | None,
    ) -> None:
        self.kernels, self._world = kernels, world
        self._peers, self._stream = (base, stride), stream or current_stream

    @property
    def handles(self) -> dict[int, CompiledKernel]:
        """Its kernels, by the driver's handle (CUfunction)."""
        loaded = [k for k in self.kernels.values() if isinstance(k, LoadedKernel)]
        return {k.handle: k.kernel for k in loaded}

    @property
    def memory(self) -> tuple[int, int]:
        """(address, bytes) of all ranks' memory, this rank's first."""
        base, stride = self._peers
        return base, stride * self._world


class Rdep(PeerKernels, Stateless):
    """The default transport on GPUs of one node.

    Args:
        buffers: tensors by the names of `Rdep.buffers`, in the payload of peer memory.
        kernels: from `load_rdep`.
        base, stride: of the peer memory (`barriers.symmetric_device.DeviceMemory`); its control
            block's tag words are this transport's alone, or used in the same order on one stream.
        tuning: as in `load_rdep`.
        stream: handle of the stream to launch on; by default torch's current one.

    All ranks make theirs before any of them dispatches: meet after this.
    """

    name = "rdep"

    def __init__(
        self,
        config: TransportConfig,
        buffers: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Launchable],
        *,
        base: int,
        stride: int,
        tuning: RdepTuning | None = None,
        stream: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(kernels, base, stride, config.world, stream)
        self.config, self.tuning = config, tuning or RdepTuning()
        self._buffers = buffers
        self._out = wire_views(buffers)
        # Zero silent rows: the first `send` takes back every id that the memory may hold.
        buffers["ep_words"].copy_(torch.tensor([config.rank, 0, 0, 0], dtype=torch.int32))

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """All of it symmetric: at one offset on every rank."""
        yield from wire_buffers(config, "peers")
        yield "peers", "ep_recv_count", (config.world,), "int32"
        yield "peers", "ep_words", (_WORDS,), "int32"

    def dispatch(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        layer: int = 0,
        opens_step: bool = False,
    ) -> Received:
        check_dispatch(self.config, x, scale, ids, weights)
        _check_some(x)
        quantize, out = self.config.fp8 and scale is None, self._out
        blocks = min(x.shape[0] * self._parts("send"), TAG)
        values = (
            *self._peers,
            *(_address(t) for t in (x, scale, ids, weights)),
            *(_address(t) for t in (out.x, out.scale, out.ids, out.weights)),
            *(_address(self._buffers[n]) for n in ("ep_recv_count", "ep_words")),
            x.shape[0],
            self.tuning.share(blocks),
            layer,
            OPERATIONS.index("dispatch"),
            int(opens_step),
        )
        name = "rdep_send_quantized" if quantize else "rdep_send"
        self.kernels[name].launch((blocks,), values, self._stream())
        return out

    def combine(
        self,
        out: torch.Tensor,
        y: torch.Tensor,
        received: Received,
        ids: torch.Tensor,
        shared: torch.Tensor | None,
        *,
        layer: int = 0,
    ) -> None:
        check_combine(self.config, out, y, received, shared)
        _check_some(out)
        self.sum(y, received)
        self.pull(out, ids, shared, layer=layer)

    def sum(self, y: torch.Tensor, received: Received) -> None:
        """The first half of `combine`: partial sums into peer memory, and the signal."""
        blocks = self.tuning.sum_blocks
        values = (
            *self._peers,
            *(_address(t) for t in (y, received.ids, received.weights)),
            *(_address(self._buffers[n]) for n in ("ep_recv_count", "ep_partial", "ep_words")),
            self.tuning.share(blocks),
        )
        self.kernels["rdep_sum"].launch((blocks,), values, self._stream())

    def pull(
        self,
        out: torch.Tensor,
        ids: torch.Tensor,
        shared: torch.Tensor | None,
        *,
        layer: int = 0,
    ) -> None:
        """The second half of `combine`: wait for the signals, add the peers' partial sums."""
        values = (
            *self._peers,
            _address(self._buffers["ep_partial"]),
            *(_address(t) for t in (ids, shared, out)),
            _address(self._buffers["ep_words"]),
            layer,
            OPERATIONS.index("combine"),
        )
        grid = (out.shape[0] * self._parts("pull"),)
        self.kernels["rdep_pull"].launch(grid, values, self._stream())

    def _parts(self, kernel: str) -> int:
        """Blocks a token."""
        item = 1 if kernel == "send" and self.config.fp8 else self.config.act_bytes
        threads: int = getattr(self.tuning, f"{kernel}_threads")
        return -(-self.config.hidden * item // 16 // threads)


def _check_some(tokens: torch.Tensor) -> None:
    if tokens.shape[0] == 0:
        raise ValueError(
            "rdep: expected at least one token, got none; an idle rank runs its smallest key with "
            "padded tokens (ids -1), so that it signals like every other"
        )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def current_stream() -> int:
    """Handle of torch's current stream."""
    return int(torch.cuda.current_stream().cuda_stream)
