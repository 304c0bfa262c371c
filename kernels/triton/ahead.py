"""Weights asked into L2 by kernels that leave HBM idle, ahead of the kernel that reads them.

Between two kernels that stream weights a step launches short ones, bound by latency, in which HBM
stands still. Such a kernel may be given tensors to ask for: programs past its own grid, or its own
ones before they wait, request the bytes and do not wait for them. Invariants: only what no step
writes is asked for; a request changes no bit; programs past the grid touch nothing else and end at
once, and the others wait as ever, so a kernel is still complete only after all before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import num_threads

from kernels.triton.launch import ALIGNMENT, Launcher
from kernels.triton.overlap import OFF

# Bytes of one request. The lanes of a warp issue theirs one after the other, about 30 ns each.
REQUEST = 8192
_REQUEST = tl.constexpr(REQUEST)
PROGRAMS = 64  # past a grid: half of the chip issues what HBM brings in several microseconds
MOST_TENSORS = 2


@triton.jit
def _requests(
    base,
    programs,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THREADS: tl.constexpr,
):
    """([THREADS] whether of the first tensor, offset in it, bytes) of one request a thread.

    They are every `programs`-th from `base` on, of all in order; past the last one, 0 bytes.
    """
    first_count: tl.constexpr = (FIRST + _REQUEST - 1) // _REQUEST
    count: tl.constexpr = first_count + (SECOND + _REQUEST - 1) // _REQUEST
    request = base + tl.arange(0, THREADS) * programs
    is_first = request < first_count
    at = tl.where(is_first, request, request - first_count) * _REQUEST
    size = tl.minimum(tl.where(is_first, FIRST, SECOND) - at, _REQUEST)
    return is_first, at, tl.where(request < count, size, 0)


@triton.jit
def ask_ahead(
    first,  # any [FIRST bytes], 16-byte aligned
    second,  # any [SECOND bytes], 16-byte aligned
    program,
    programs,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Ask for one program's share of two tensors, the first one's bytes before the second one's."""
    # One element a thread: of fewer, several threads would hold each, and repeat its request.
    threads: tl.constexpr = num_threads()
    count: tl.constexpr = (FIRST + _REQUEST - 1) // _REQUEST + (SECOND + _REQUEST - 1) // _REQUEST
    byte: tl.constexpr = tl.pointer_type(tl.uint8)
    for base in range(program, count, programs * threads):
        is_first, at, size = _requests(base, programs, FIRST, SECOND, threads)
        _ask_bulk(tl.where(is_first, first.to(byte) + at, second.to(byte) + at), size)


@triton.jit
def _ask_bulk(at, size):
    """One asynchronous request for each lane whose size is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def only_asks(
    first,  # as in `ask_ahead`
    second,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ASKING: tl.constexpr,
):
    """Whether this program lies in the last ASKING of axis 0; it has then asked for its share."""
    place = tl.program_id(0) - (tl.num_programs(0) - ASKING)
    if place >= 0:
        program = tl.program_id(1) * ASKING + place
        ask_ahead(first, second, program, ASKING * tl.num_programs(1), FIRST, SECOND)
    return place >= 0


@dataclass(frozen=True)
class Asking:
    """How a launch asks: `args` and `constexprs` for its kernel, and programs to add to its grid.

    Attributes:
        tensors: what is asked for, where there is less something valid.
        sizes: bytes of each.
        programs: to add to axis 0; 0 where nothing is asked for, or the kernel's own programs ask.
    """

    tensors: tuple[torch.Tensor, torch.Tensor]
    sizes: tuple[int, int]
    programs: int

    @classmethod
    def of(
        cls,
        launch: Launcher,
        ahead: Sequence[torch.Tensor],
        unused: torch.Tensor,
        *,
        lines: int = 1,
        own: bool = False,
    ) -> Asking:
        """What a launcher was given, or nothing where kernels do not overlap.

        Args:
            ahead: at most two contiguous tensors, 16-byte aligned; their last bytes are left out
                where they do not fill 16.
            unused: any tensor of the launch.
            lines: programs along axis 1.
            own: the kernel's own programs ask.
        Raises:
            ValueError: more tensors, or one that is strided or not aligned.
        """
        if len(ahead) > MOST_TENSORS:
            raise ValueError(f"a kernel asks for at most {MOST_TENSORS} tensors, got {len(ahead)}")
        given = [t for t in ahead if _bytes(t)]
        for tensor in given:
            _check(tensor)
        if launch.pdl == OFF:
            given = []
        filled = [*given, unused, unused]
        sizes = [*map(_bytes, given), 0, 0]
        return cls(
            (filled[0], filled[1]),
            (sizes[0], sizes[1]),
            triton.cdiv(PROGRAMS, lines) if given and not own else 0,
        )

    @property
    def constexprs(self) -> dict[str, Any]:
        return {"FIRST": self.sizes[0], "SECOND": self.sizes[1], "ASKING": self.programs}


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() // ALIGNMENT * ALIGNMENT


def _check(tensor: torch.Tensor) -> None:
    offset = tensor.storage_offset() * tensor.element_size()
    at = offset if tensor.device.type == "meta" else tensor.data_ptr()
    if not tensor.is_contiguous() or at % ALIGNMENT:
        raise ValueError(
            f"what is asked for ahead must be contiguous and {ALIGNMENT}-byte aligned, got strides "
            f"{tensor.stride()} at offset {offset}"
        )
