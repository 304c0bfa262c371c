"""DeepEP, the upstream package, as two more transports; they exist where it is installed.

Both go through its legacy `Buffer`. They bring their own device memory, allocate in every call and
hold host state, so a graph with them is captured live, in a pool of its own, and cannot be stored:
`rdep` is the transport that can. What upstream adds up, it adds in a fixed order (low-latency: the
K choices of a token at its source; normal: ranks in order), but where a received row lies varies
from run to run, so nothing here may add along rows.

A late rank is known by the steps that hosts have launched; upstream's waits cannot be called off.
Its kernels look at the awaited flag and their own clock alone, give up after 200e9 cycles (101 s at
1.98 GHz) and trap, which loses the context. The number is fixed when DeepEP is built:
`LEGACY_NUM_TIMEOUT_CYCLES` of csrc/kernels/legacy/compiled.cuh; in older versions that of
configs.cuh, a tenth of it with ENABLE_FAST_DEBUG. Its masks of ranks (`enable_shrink`) are read
before a wait and set after it, and leave the masked ranks' experts out of the sum without a word:
they are not used here.

A node without a network card needs NVSHMEM_REMOTE_TRANSPORT=none, NVSHMEM_IB_ENABLE_IBGDA=0 and an
upstream that neither sets the latter itself nor asserts on queue pairs (its commit 87d8305).

Source: deep_ep/buffer.py (legacy) of https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch

from barriers.transport import (
    BufferSpec,
    Received,
    Stateless,
    TransportConfig,
    check_combine,
    check_dispatch,
    deepep_capacity,
    quantize,
    received_shape,
    weighted_sum,
)
from kernels.triton.launch import Launcher

LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOP_K = 11
LOW_LATENCY_CAPACITY = 511  # upstream wants more than twice as many slots in a queue of 1024
_NVLINK_BYTES = 1 << 30  # of normal mode's buffer: enough for its largest recommended configuration
_HEAP_BYTES = 1 << 30  # that NVSHMEM and the communicator take beside what is asked of them
_REMEDY = (
    "build it from https://github.com/deepseek-ai/DeepEP against this torch, with NVSHMEM (on the "
    "Python index, deep-ep is another, incomplete upload and sgl-deep-ep a build for torch 2.13 up"
    "); or use --transport rdep, which needs neither"
)


AFTER_LATE = (
    "end this process (os._exit, SIGKILL), for DeepEP's kernels cannot be called off: closing it "
    "waits until they give up, 200e9 clock cycles (about 100 s) after they began, and finds the "
    "device's context lost; a DeepEP built with a smaller LEGACY_NUM_TIMEOUT_CYCLES gives up sooner"
)


class DeepEpMissing(RuntimeError):
    """The upstream package is not here, or something else has its name."""


class ParityError(RuntimeError):
    """Low-latency calls did not come in pairs; replays would read the other buffer's flags."""


class Upstream(Protocol):
    """What we call of `deep_ep.Buffer`; tests and listings put something else there."""

    def low_latency_dispatch(self, *args: Any, **options: Any) -> Any: ...

    def low_latency_combine(self, *args: Any, **options: Any) -> Any: ...

    def get_dispatch_layout(self, *args: Any, **options: Any) -> Any: ...

    def dispatch(self, *args: Any, **options: Any) -> Any: ...

    def combine(self, *args: Any, **options: Any) -> Any: ...

    def destroy(self) -> None: ...


def load_buffer_class() -> Any:
    """The legacy `Buffer`.

    Raises:
        DeepEpMissing: with how to get it.
    """
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as e:
        raise DeepEpMissing(f"expected the package deep_ep, got {e}; {_REMEDY}") from e
    buffer = getattr(module, "Buffer", None)
    wanted = ("low_latency_dispatch", "low_latency_combine", "get_dispatch_layout", "combine")
    missing = [name for name in wanted if not hasattr(buffer, name)]
    if missing:
        raise DeepEpMissing(
            f"expected deep_ep.Buffer with {', '.join(missing)}, got "
            f"{getattr(module, '__file__', module)} without; {_REMEDY}"
        )
    return buffer


def check_sizes(name: str, config: TransportConfig) -> None:
    """Raises ValueError for sizes that upstream has no kernels for."""
    if config.act_dtype != "bfloat16":
        raise ValueError(f"{name} carries bfloat16, got {config.act_dtype}; use --transport rdep")
    if name == "deepep-normal":
        if config.fp8 and config.hidden % 128:
            raise ValueError(
                "deepep-normal carries e4m3 of a hidden that 128 divides, got hidden "
                f"{config.hidden}; use --transport rdep"
            )
        return
    if config.hidden not in LOW_LATENCY_HIDDEN or config.top_k > LOW_LATENCY_TOP_K:
        raise ValueError(
            f"deepep low-latency has kernels for hidden {LOW_LATENCY_HIDDEN} and top_k up to "
            f"{LOW_LATENCY_TOP_K}, got {config.hidden} and {config.top_k}; use --transport rdep"
        )
    if deepep_capacity(config) > LOW_LATENCY_CAPACITY:
        raise ValueError(
            f"deepep low-latency holds up to {LOW_LATENCY_CAPACITY} tokens a rank, got a largest "
            f"key of {config.capacity}; give a --ladder with smaller keys, such as "
            "1,8,32,32+64, or use --transport rdep"
        )


def outside_bytes(name: str, config: TransportConfig) -> int:
    """Device bytes that upstream takes beside the arena, from above."""
    if name == "deepep-normal":
        received = 3 * config.recv_rows * config.hidden * config.act_bytes
        return _NVLINK_BYTES + _HEAP_BYTES + received
    messages = config.num_experts * deepep_capacity(config)
    message = 2 * config.hidden + 4 * config.groups + 64
    # Two buffers, each to send from and to receive in; then a received copy in the graphs' pool.
    return _HEAP_BYTES + 6 * messages * message


class DeepEpLowLatency:
    """DeepEP's low-latency mode: one copy of a token for each of its experts.

    Received rows are `[local expert, world * capacity]` with one choice each, so the experts' y has
    a row for each, and weights are applied by `combine` at the source. Its two buffers alternate
    with every call, on the host: a graph is right only in front of the buffer it was captured with.
    A dispatch and its combine are two calls, so pairs leave the next buffer the same, however many
    layers there are; a call without its other half is refused, before a capture and a replay too.

    Args:
        buffers: tensors by the names of `DeepEpLowLatency.buffers`.
        upstream: a low-latency `Buffer` of config.world ranks; `open` makes one.

    Raises:
        ValueError: sizes that upstream does not have kernels for.
    """

    name = "deepep"
    live = "deepep allocates in every call and keeps on the host which of its buffers is next"
    allocates = True
    takes_act = True

    def __init__(
        self, config: TransportConfig, buffers: Mapping[str, torch.Tensor], upstream: Upstream
    ) -> None:
        check_sizes(self.name, config)
        self.config, self._buffers, self.upstream = config, buffers, upstream
        self._capacity = deepep_capacity(config)
        self._pending: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        self._open = ""  # what has left the two buffers out of step, for messages
        device = buffers["ep_ids64"].device
        slots = config.world * self._capacity
        self._slots = torch.arange(slots, dtype=torch.int32, device=device)
        self._experts = torch.arange(config.local_experts, dtype=torch.int32, device=device)
        buffers["ep_ones"].fill_(1.0)

    @classmethod
    def open(
        cls, config: TransportConfig, buffers: Mapping[str, torch.Tensor], group: Any
    ) -> DeepEpLowLatency:
        """Make upstream's buffer and warm both kernels; all ranks call this together.

        Args:
            group: a torch process group (NCCL) of config.world ranks, in rank order.
        Raises:
            DeepEpMissing: no upstream package.
        """
        check_sizes(cls.name, config)
        buffer_class = load_buffer_class()
        sizes = (deepep_capacity(config), config.hidden, config.world, config.num_experts)
        upstream = buffer_class(
            group,
            0,
            buffer_class.get_low_latency_rdma_size_hint(*sizes),
            low_latency_mode=True,
            num_qps_per_rank=config.local_experts,
            explicitly_destroy=True,
        )
        transport = cls(config, buffers, upstream)
        _warm_up(transport, buffers["ep_ids64"].device)
        return transport

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """Beside what upstream allocates."""
        yield "scratch", "ep_ids64", (config.capacity, config.top_k), "int64"
        yield "scratch", "ep_ones", received_shape("deepep", config, config.capacity), "float32"

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
        """x must be bf16: upstream quantises by itself (q = x * (448 / amax), not our division)."""
        check_dispatch(self.config, x, scale, ids, weights)
        if scale is not None:
            raise ValueError(
                "deepep low-latency quantises by itself; give it bf16 tokens, no scale"
            )
        topk = self._buffers["ep_ids64"][: x.shape[0]].copy_(ids)
        got, counts = self.send(x, topk, weights)
        rows, scales = got if self.config.fp8 else (got, None)
        listed = torch.where(self._slots < counts[:, None], self._experts[:, None], -1)
        return Received(
            rows.view(-1, self.config.hidden),
            None
            if scales is None
            else scales.reshape(-1, self.config.groups),  # copies: transposed
            listed.view(-1, 1),
            self._buffers["ep_ones"],
        )

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
        """As the protocol says, but for one rounding: upstream rounds before shared is added."""
        check_combine(self.config, out, y, received, shared)
        self.collect(out, y)
        if shared is not None:
            out.add_(shared)

    def send(self, x: torch.Tensor, topk: torch.Tensor, weights: torch.Tensor) -> tuple[Any, Any]:
        """Upstream's dispatch alone: (rows, or rows and scales, as it lays them out; counts)."""
        self.require_settled("dispatch")
        self._open = "a dispatch that failed"
        got, counts, handle, _, _ = self.upstream.low_latency_dispatch(
            x, topk, self._capacity, self.config.num_experts, use_fp8=self.config.fp8
        )
        self._pending = (topk, weights, handle)
        self._open = "a dispatch without its combine"
        return got, counts

    def collect(self, out: torch.Tensor, y: torch.Tensor) -> None:
        """Upstream's combine alone."""
        if self._pending is None:
            raise ParityError("deepep: combine without a dispatch before it; call them in pairs")
        (topk, weights, handle), self._pending = self._pending, None
        self._open = "a combine that failed"
        per_expert = y.view(self.config.local_experts, -1, self.config.hidden)
        self.upstream.low_latency_combine(per_expert, topk, weights, handle, out=out)
        self._open = ""

    def require_settled(self, doing: str) -> None:
        """Raises ParityError between a dispatch and its combine, and after a call that failed."""
        if self._open:
            raise ParityError(
                f"deepep: {doing} after {self._open}; upstream's two buffers alternate with every "
                "call, so calls must come in pairs: close this runtime and start all ranks again"
            )

    def close(self) -> None:
        """Give upstream's memory back. All ranks do so together."""
        self.upstream.destroy()


class DeepEpNormal(Stateless):
    """DeepEP's normal mode within one node: one copy of a token a rank, as many rows as can come.

    Args:
        buffers: tensors by the names of `DeepEpNormal.buffers`.
        upstream: a `Buffer` of config.world ranks with NVLink memory; `open` makes one.
        launch: of our kernels that quantise and sum.

    Raises:
        ValueError: sizes that upstream does not have kernels for.
    """

    name = "deepep-normal"
    live = "deepep-normal allocates in every call and exchanges through memory of its own"
    allocates = True

    def __init__(
        self,
        config: TransportConfig,
        buffers: Mapping[str, torch.Tensor],
        upstream: Upstream,
        launch: Launcher | None,
    ) -> None:
        check_sizes(self.name, config)
        self.config, self._buffers, self._launch = config, buffers, launch
        self.upstream = upstream
        self.partial = buffers["ep_partial"]  # act [R, H]: what `combine` sends back
        self._handle: Any = None

    @classmethod
    def open(
        cls,
        config: TransportConfig,
        buffers: Mapping[str, torch.Tensor],
        group: Any,
        launch: Launcher | None,
    ) -> DeepEpNormal:
        """Make upstream's buffer and warm its kernels; all ranks call this together.

        Args:
            group: a torch process group (NCCL) of config.world ranks, in rank order.
        Raises:
            DeepEpMissing: no upstream package.
        """
        check_sizes(cls.name, config)
        upstream = load_buffer_class()(group, _NVLINK_BYTES, 0, explicitly_destroy=True)
        transport = cls(config, buffers, upstream, launch)
        _warm_up(transport, buffers["ep_ids64"].device)
        return transport

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """Beside what upstream allocates."""
        yield "scratch", "ep_ids64", (config.capacity, config.top_k), "int64"
        if config.fp8:
            yield "scratch", "ep_send_x", (config.capacity, config.hidden), "float8_e4m3fn"
            yield "scratch", "ep_send_scale", (config.capacity, config.groups), "float32"
        yield "scratch", "ep_partial", (config.recv_rows, config.hidden), config.act_dtype

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
        b, tokens = self._buffers, x.shape[0]
        if self.config.fp8 and scale is None:
            sent, scale = b["ep_send_x"][:tokens], b["ep_send_scale"][:tokens]
            quantize(self._launch, x, sent, scale)
            x = sent
        topk = b["ep_ids64"][:tokens].copy_(ids)
        got, got_ids, got_weights = self.send(x, scale, topk, weights)
        rows, scales = got if isinstance(got, tuple) else (got, None)
        # Upstream numbers a rank's own experts from 0 and fills with -1, as we do.
        return Received(rows, scales, got_ids.to(torch.int32), got_weights)

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
        weighted_sum(self._launch, y, received.ids, received.weights, None, self.partial)
        out.copy_(self.collect(self.partial, shared))

    def send(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        topk: torch.Tensor,
        weights: torch.Tensor,
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Upstream's layout and dispatch alone: (rows, or rows and scales; ids; weights)."""
        per_rank, _, per_expert, in_rank, _ = self.upstream.get_dispatch_layout(
            topk, self.config.num_experts
        )
        got, got_ids, got_weights, _, self._handle, _ = self.upstream.dispatch(
            x if scale is None else (x, scale),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk,
            topk_weights=weights,
            num_worst_tokens=self.config.recv_rows,  # no read on the host
        )
        return got, got_ids, got_weights

    def collect(self, partial: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """Upstream's combine alone; act [T, H]."""
        total: torch.Tensor
        total, _, _ = self.upstream.combine(partial, self._handle, bias=shared)
        return total

    def close(self) -> None:
        """Give upstream's memory back. All ranks do so together."""
        self.upstream.destroy()


def _warm_up(transport: DeepEpLowLatency | DeepEpNormal, device: torch.device) -> None:
    """Every kernel once, on padding: the lazy parts of upstream exist before any capture."""
    config = transport.config
    x = torch.zeros(1, config.hidden, dtype=torch.bfloat16, device=device)
    ids = torch.full((1, config.top_k), -1, dtype=torch.int32, device=device)
    weights = torch.zeros(1, config.top_k, device=device)
    received = transport.dispatch(x, None, ids, weights)
    y = torch.zeros(received.ids.numel(), config.hidden, dtype=torch.bfloat16, device=device)
    transport.combine(x, y, received, ids, None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
