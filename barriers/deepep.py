"""DeepEP, the upstream package, as two more transports; they exist where it is installed.

Both go through its legacy `Buffer`. They bring their own device memory, allocate in every call and
hold host state, so a graph with them is captured live, in a pool of its own, and cannot be stored:
`rdep` is the transport that can. What upstream adds up, it adds in a fixed order (low-latency: the
K choices of a token at its source; normal: ranks in order), but where a received row lies varies
from run to run, so nothing here may add along rows.

Source: deep_ep/buffer.py (legacy) of https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from barriers.transport import (
    BufferSpec,
    Received,
    TransportConfig,
    check_combine,
    check_dispatch,
    quantize,
    weighted_sum,
)
from kernels.triton.launch import Launcher

LOW_LATENCY_HIDDEN = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
LOW_LATENCY_TOP_K = 11
_NVLINK_BYTES = 1 << 30  # of normal mode's buffer: enough for its largest recommended configuration
_REMEDY = (
    "build it from https://github.com/deepseek-ai/DeepEP against this torch, with NVSHMEM (on the "
    "Python index, deep-ep is another, incomplete upload and sgl-deep-ep a build for torch 2.13 up"
    "); or use --transport rdep, which needs neither"
)


class DeepEpMissing(RuntimeError):
    """The upstream package is not here, or something else has its name."""


class ParityError(RuntimeError):
    """Low-latency calls did not come in pairs; replays would read the other buffer's flags."""


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


class DeepEpLowLatency:
    """DeepEP's low-latency mode: one copy of a token for each of its experts.

    Received rows are `[local expert, world * capacity]` with one choice each, so the experts' y has
    a row for each, and weights are applied by `combine` at the source. Its buffers alternate with
    every call, on the host: each dispatch must be followed by its combine, in graphs and outside.

    Args:
        buffers: tensors by the names of `DeepEpLowLatency.buffers`.
        group: a torch process group (NCCL) of config.world ranks, in rank order.

    Raises:
        DeepEpMissing: no upstream package.
        ValueError: sizes that upstream does not have kernels for.
    All ranks make theirs together; it is warm afterwards.
    """

    name = "deepep"

    def __init__(
        self, config: TransportConfig, buffers: Mapping[str, torch.Tensor], group: Any
    ) -> None:
        if config.hidden not in LOW_LATENCY_HIDDEN or config.top_k > LOW_LATENCY_TOP_K:
            raise ValueError(
                f"deepep low-latency has kernels for hidden {LOW_LATENCY_HIDDEN} and top_k up to "
                f"{LOW_LATENCY_TOP_K}, got {config.hidden} and {config.top_k}; use --transport rdep"
            )
        if config.act_dtype != "bfloat16":
            raise ValueError(f"deepep carries bfloat16, got {config.act_dtype}; use rdep")
        buffer_class = load_buffer_class()
        self.config, self._buffers = config, buffers
        sizes = (config.capacity, config.hidden, config.world, config.num_experts)
        self._deepep = buffer_class(
            group,
            0,
            buffer_class.get_low_latency_rdma_size_hint(*sizes),
            low_latency_mode=True,
            num_qps_per_rank=config.local_experts,
            explicitly_destroy=True,
        )
        self._pending: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        device = buffers["ep_ids64"].device
        self._slots = torch.arange(config.recv_rows, dtype=torch.int32, device=device)
        self._experts = torch.arange(config.local_experts, dtype=torch.int32, device=device)
        buffers["ep_ones"].fill_(1.0)
        self._warm_up()

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """Beside what upstream allocates."""
        rows = config.local_experts * config.recv_rows
        yield "scratch", "ep_ids64", (config.capacity, config.top_k), "int64"
        yield "scratch", "ep_ones", (rows, 1), "float32"

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
        self.require_even("dispatch")
        topk = self._buffers["ep_ids64"][: x.shape[0]].copy_(ids)
        got, counts, handle, _, _ = self._deepep.low_latency_dispatch(
            x, topk, self.config.capacity, self.config.num_experts, use_fp8=self.config.fp8
        )
        self._pending = (topk, weights, handle)
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
        if self._pending is None:
            raise ParityError("deepep: combine without a dispatch before it; call them in pairs")
        topk, weights, handle = self._pending
        self._pending = None
        per_expert = y.view(self.config.local_experts, self.config.recv_rows, self.config.hidden)
        self._deepep.low_latency_combine(per_expert, topk, weights, handle, out=out)
        if shared is not None:
            out.add_(shared)

    def require_even(self, doing: str) -> None:
        """Raises ParityError between a dispatch and its combine. Ask before and after a capture."""
        if self._pending is not None:
            raise ParityError(
                f"deepep: {doing} after a dispatch without its combine; upstream's two buffers "
                "alternate with every call, so calls must come in pairs"
            )

    def close(self) -> None:
        """Give upstream's memory back. All ranks do so together."""
        self._deepep.destroy()

    def _warm_up(self) -> None:
        """Both kernels once, on padding: lazy parts of upstream exist before any capture."""
        config, device = self.config, self._slots.device
        x = torch.zeros(1, config.hidden, dtype=torch.bfloat16, device=device)
        ids = torch.full((1, config.top_k), -1, dtype=torch.int32, device=device)
        received = self.dispatch(x, None, ids, torch.zeros(1, config.top_k, device=device))
        y = torch.zeros(received.ids.numel(), config.hidden, dtype=torch.bfloat16, device=device)
        self.combine(x, y, received, ids, None)
        torch.cuda.synchronize(device)


class DeepEpNormal:
    """DeepEP's normal mode within one node: one copy of a token a rank, as many rows as can come.

    Args:
        buffers: tensors by the names of `DeepEpNormal.buffers`.
        group: a torch process group (NCCL) of config.world ranks, in rank order.
        launch: of our kernels that quantise and sum.

    Raises:
        DeepEpMissing: no upstream package.
    """

    name = "deepep-normal"

    def __init__(
        self,
        config: TransportConfig,
        buffers: Mapping[str, torch.Tensor],
        group: Any,
        launch: Launcher | None,
    ) -> None:
        if config.act_dtype != "bfloat16" or (config.fp8 and config.hidden % 128):
            raise ValueError(
                "deepep-normal carries bfloat16, or e4m3 of a hidden that 128 divides, got "
                f"{config.act_dtype} and hidden {config.hidden}; use --transport rdep"
            )
        self.config, self._buffers, self._launch = config, buffers, launch
        self._deepep = load_buffer_class()(group, _NVLINK_BYTES, 0, explicitly_destroy=True)
        self._handle: Any = None

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
        per_rank, _, per_expert, in_rank, _ = self._deepep.get_dispatch_layout(
            topk, self.config.num_experts
        )
        got, got_ids, got_weights, _, self._handle, _ = self._deepep.dispatch(
            x if scale is None else (x, scale),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk,
            topk_weights=weights,
            num_worst_tokens=self.config.recv_rows,  # no read on the host
        )
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
        partial = self._buffers["ep_partial"]
        weighted_sum(self._launch, y, received.ids, received.weights, None, partial)
        total, _, _ = self._deepep.combine(partial, self._handle, bias=shared)
        out.copy_(total)

    def close(self) -> None:
        """Give upstream's memory back. All ranks do so together."""
        self._deepep.destroy()
