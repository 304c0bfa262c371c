"""How tokens reach the experts of other ranks and how what the experts return comes back.

Wire layout, the same for every graph key: rank r sees `[src_rank, capacity]` rows, row (s, t) being
token t of rank s, and an id of -1 wherever a choice is not one of its own experts. So ranks may run
different keys in one step, an idle rank runs the smallest, and no host agrees on anything.

Invariants: once made, a transport allocates nothing and its host reads nothing; each call is the
same launches whatever the tokens are; a token's sum takes its experts' ranks in the order
0 ... world-1, whoever looks, so its bits depend on that token alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from kernels.triton import activation, expert_sum
from kernels.triton.launch import Launcher

MAX_WORLD = 8  # ranks of one node
MAX_TOP_K = 16
GROUP = activation.GROUP
NAMES = ("auto", "local", "allgather", "rdep", "deepep", "deepep-normal")
DEEPEP = ("deepep", "deepep-normal")  # the names that need the upstream package

BufferSpec = tuple[str, str, tuple[int, ...], str]  # (arena section, name, shape, dtype name)


@dataclass(frozen=True)
class TransportConfig:
    """Sizes that all ranks of a transport share, and this rank's place among them.

    Attributes:
        rank, world: this rank and how many there are, 1 to 8.
        capacity: tokens of the largest key of any rank ("T_cap").
        hidden: width of a token; between ranks a multiple of 16.
        num_experts: of all ranks; rank r owns ids [r*E/world, (r+1)*E/world).
        top_k: choices a token; between ranks 1 to 16.
        act_dtype: "bfloat16", "float16" or "float32".
        fp8: tokens travel as e4m3 with one scale for each 128 elements.
    """

    rank: int
    world: int
    capacity: int
    hidden: int
    num_experts: int
    top_k: int
    act_dtype: str = "bfloat16"
    fp8: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.world <= MAX_WORLD or not 0 <= self.rank < self.world:
            raise ValueError(
                f"expected 1 to {MAX_WORLD} ranks of one node and a rank below their number, got "
                f"rank {self.rank} of {self.world}; start one process a GPU of one node"
            )
        if self.num_experts % self.world or self.num_experts < self.world:
            raise ValueError(
                f"{self.num_experts} experts do not divide among {self.world} ranks; "
                "choose a number of ranks that divides them"
            )
        most = min(MAX_TOP_K, self.num_experts) if self.world > 1 else self.num_experts
        if not 1 <= self.top_k <= most:
            raise ValueError(f"top_k must be 1 to {most}, got {self.top_k}")
        # Between ranks a token travels in pieces of 16 bytes, whatever its type.
        if self.hidden < 1 or (self.world > 1 and self.hidden % 16):
            raise ValueError(f"hidden must be a positive multiple of 16, got {self.hidden}")
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1 token, got {self.capacity}")
        if self.act_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"act_dtype must be bfloat16, float16 or float32, got {self.act_dtype!r}"
            )

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.world

    @property
    def expert_start(self) -> int:
        """Id of this rank's expert 0."""
        return self.rank * self.local_experts

    @property
    def recv_rows(self) -> int:
        """Rows of the wire layout."""
        return self.world * self.capacity

    @property
    def groups(self) -> int:
        """FP8 scales a token."""
        return -(-self.hidden // GROUP)

    @property
    def act_bytes(self) -> int:
        return 4 if self.act_dtype == "float32" else 2

    @property
    def row_dtype(self) -> str:
        """Of a token on the wire."""
        return "float8_e4m3fn" if self.fp8 else self.act_dtype


@dataclass(frozen=True)
class Received:
    """What the experts of this rank read; R rows of up to C choices each.

    Attributes:
        x: e4m3 or act [R, H]; a row without an id >= 0 may hold anything.
        scale: fp32 [R, ceil(H/128)] of e4m3 rows, else None.
        ids: int32 [R, C]; index among this rank's experts (so a graph that uses them serves every
            rank), -1 for what is not its own.
        weights: fp32 [R, C]; undefined where the id is -1.
    """

    x: torch.Tensor
    scale: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor


class Transport(Protocol):
    """A step calls, per layer and in this order: `dispatch`, its experts, `combine`.

    Shapes: T tokens of this rank's key, T <= capacity; R received rows of up to C choices each, as
    `received_shape` says. C is K where a row is a token, 1 where it is a (token, choice).

    Attributes:
        live: why a graph with it serves only the process that captured it; "" if it can be stored.
        allocates: its calls take memory from torch, so a capture needs a pool of its own.
        takes_act: its `dispatch` quantises by itself and takes no e4m3 tokens.
    """

    name: str
    live: str
    allocates: bool
    takes_act: bool
    config: TransportConfig

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
        """Give every rank the tokens that need one of its experts.

        Args:
            x: act [T, H]; or e4m3 [T, H] with `scale`. act is quantised on the way if config.fp8.
            scale: fp32 [T, ceil(H/128)] or None.
            ids: int32 [T, K]; -1 is no expert, a token of only -1 is sent nowhere.
            weights: fp32 [T, K].
            layer: what a late rank's record names.
            opens_step: the first exchange of a step: ranks that are in different steps find out.
        Returns:
            The transport's own buffers, the same at every call with T tokens.
        Raises:
            ValueError: shapes or dtypes that do not fit.
        Capture-safe, as is `combine`; see each transport for exceptions.
        """

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
        """out[t] = sum of weight * y over token t's experts, + shared[t].

        A rank sums its own experts in k order in fp32 and rounds the partial sum to act; the source
        adds the partial sums in rank order in fp32, then shared, and rounds once more. (`local` has
        one rank, so its partial sum is not rounded.)

        Args:
            out: act [T, H].
            y: act [R*C, H]; row r*C + c is choice c of received row r; not read where the id is -1.
            received: what `dispatch` of this layer returned.
            ids: as dispatched.
            shared: act [T, H] or None.
            layer: as in `dispatch`.
        """

    def require_settled(self, doing: str) -> None:
        """Raises a named error if `doing` (a capture, a replay) must not begin or end here."""


class Stateless:
    """What transports have in common whose calls are launches and nothing else."""

    live = ""
    allocates = False
    takes_act = False

    def require_settled(self, doing: str) -> None:
        """Fine at any time: the host keeps nothing between calls."""


def resolve(name: str, *, world: int, on_device: bool) -> str:
    """The transport that `--transport name` means here.

    Raises:
        ValueError: no such transport, or one that this world or device cannot have.
    """
    if name not in NAMES:
        raise ValueError(f"--transport must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "auto":
        return "local" if world == 1 else "rdep" if on_device else "allgather"
    if name == "local" and world > 1:
        raise ValueError(
            f"--transport local serves one rank, got {world}; use auto, rdep or allgather"
        )
    if not on_device and name not in ("local", "allgather"):
        raise ValueError(
            f"--transport {name} needs GPUs with NVLink; on the CPU use auto or allgather"
        )
    if name in DEEPEP and world not in (2, 4, 8):
        raise ValueError(
            f"--transport {name} serves 2, 4 or 8 ranks of a node, got {world}; use auto or rdep"
        )
    return name


def received_shape(name: str, config: TransportConfig, tokens: int) -> tuple[int, int]:
    """(rows, choices a row) that `dispatch` of the transport `name` gives for a key of `tokens`."""
    if name == "local":
        return tokens, config.top_k
    if name == "deepep":
        return config.local_experts * config.world * deepep_capacity(config), 1
    return config.recv_rows, config.top_k


def deepep_capacity(config: TransportConfig) -> int:
    """Tokens a rank of DeepEP's low-latency buffers: a multiple of 4 over all ranks."""
    step = max(1, 4 // config.world)
    return -(-config.capacity // step) * step


def wire_buffers(config: TransportConfig, section: str) -> Iterator[BufferSpec]:
    """The wire layout, and the partial sums that answer it row by row."""
    rows, hidden = config.recv_rows, config.hidden
    yield section, "ep_recv_x", (rows, hidden), config.row_dtype
    if config.fp8:
        yield section, "ep_recv_scale", (rows, config.groups), "float32"
    yield section, "ep_recv_ids", (rows, config.top_k), "int32"
    yield section, "ep_recv_weights", (rows, config.top_k), "float32"
    yield section, "ep_partial", (rows, hidden), config.act_dtype


def wire_views(buffers: Mapping[str, torch.Tensor]) -> Received:
    """The received rows among bound `wire_buffers`."""
    return Received(
        buffers["ep_recv_x"],
        buffers.get("ep_recv_scale"),
        buffers["ep_recv_ids"],
        buffers["ep_recv_weights"],
    )


def check_dispatch(
    config: TransportConfig,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Raises ValueError where dispatch's inputs are not what the config says."""
    tokens = x.shape[0]
    act = getattr(torch, config.act_dtype)
    dtype = act if scale is None else torch.float8_e4m3fn
    want: list[tuple[str, torch.Tensor, tuple[int, ...], torch.dtype]] = [
        ("x", x, (tokens, config.hidden), dtype),
        ("ids", ids, (tokens, config.top_k), torch.int32),
        ("weights", weights, (tokens, config.top_k), torch.float32),
    ]
    if scale is not None:
        want.append(("scale", scale, (tokens, config.groups), torch.float32))
    for name, tensor, shape, expected in want:
        if tuple(tensor.shape) != shape or tensor.dtype != expected or not tensor.is_contiguous():
            raise ValueError(
                f"dispatch: {name} must be {expected} {shape}, contiguous, got {tensor.dtype} "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
    if tokens > config.capacity:
        raise ValueError(
            f"dispatch: {tokens} tokens do not fit the capacity {config.capacity}, which is the "
            "largest key of the ladder on every rank"
        )
    if scale is not None and not config.fp8:
        raise ValueError("dispatch: e4m3 tokens with scales need a transport made with fp8=True")


def check_combine(
    config: TransportConfig,
    out: torch.Tensor,
    y: torch.Tensor,
    received: Received,
    shared: torch.Tensor | None,
) -> None:
    """Raises ValueError where combine's arguments are not what the config says."""
    act = getattr(torch, config.act_dtype)
    want: list[tuple[str, torch.Tensor, tuple[int, ...]]] = [
        ("out", out, (out.shape[0], config.hidden)),
        ("y", y, (received.ids.numel(), config.hidden)),
    ]
    if shared is not None:
        want.append(("shared", shared, tuple(out.shape)))
    for name, tensor, shape in want:
        if tuple(tensor.shape) != shape or tensor.dtype != act or not tensor.is_contiguous():
            raise ValueError(
                f"combine: {name} must be {act} {shape}, contiguous, got {tensor.dtype} "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )


class Local(Stateless):
    """One rank: the experts read the tokens where they lie, and nothing is copied.

    Args:
        launch: None runs the kernels' oracles (the CPU twin).
    """

    name = "local"

    def __init__(self, config: TransportConfig, launch: Launcher | None) -> None:
        if config.world != 1:
            raise ValueError(f"local serves one rank, got {config.world}; use rdep or allgather")
        self.config = config
        self._launch = launch

    @staticmethod
    def buffers(config: TransportConfig) -> Iterator[BufferSpec]:
        """Nothing."""
        return iter(())

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
        if self.config.fp8 and scale is None:
            raise ValueError("local does not copy, so with fp8 it takes e4m3 tokens with scales")
        return Received(x, scale, ids, weights)

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
        weighted_sum(self._launch, y, received.ids, received.weights, shared, out)


def weighted_sum(
    launch: Launcher | None,
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    shared: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`kernels.triton.expert_sum.combine` or its oracle."""
    if launch is None:
        expert_sum.combine_ref(y, ids, weights, shared, out=out)
    else:
        expert_sum.combine(launch, y, ids, weights, shared, out=out)


def quantize(
    launch: Launcher | None, x: torch.Tensor, out_q: torch.Tensor, out_scale: torch.Tensor
) -> None:
    """`kernels.triton.activation.quantize` or its oracle; no tokens are fine."""
    if x.shape[0] == 0:
        return
    if launch is None:
        activation.quantize_ref(x, out_q=out_q, out_scale=out_scale)
    else:
        activation.quantize(launch, x, out_q=out_q, out_scale=out_scale)
