"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it.

A kernel that is launched so may begin while its predecessor still runs. The invariant that makes
it correct: **every CTA of every such kernel calls `await_inputs` before it touches memory that any
kernel of the step writes**, be it to read or to overwrite. Before that it may read only what no
step writes: weights, scales of weights, the rope table. `await_inputs` returns when the
predecessor has completed and its writes are visible; that one had waited for its own predecessor,
so all earlier kernels are complete, too, and a dependent may be let go as early as one likes.

Kernels that are launched in the ordinary way (other libraries', the transports') wait for the
completion of what comes before them, and what comes after them waits for theirs.

Three exceptions: the first programs of `grouped_down` wait for counters of `grouped_gate_up`, the
kernel right before, that say that their own input is whole. It lets them start only after it has
waited for its own inputs, `await_inputs_first`: so the counters' reset, and whatever came before,
are complete by then; its programs have all begun, so those that are waited for will end; and
`grouped_down` is complete only when every one of them has counted.

`await_inputs_with` loads words that only the beginning of a step writes, before it waits. In mode
LATE they are there: a kernel that streams weights lets its dependents start after it has waited for
its own inputs, so all that comes before it is complete when any later kernel starts; and each step
has such a kernel (the first layer's first product) between its beginning and those that load so.

And `hopper_mla` looks at its work list and at the page table before it waits, to ask L2 for the
first pages: a hint, within bounds whatever it reads, from which nothing is computed.

The mode is a constexpr of every kernel: OFF also serves the interpreter and chips before sm_90.
"""

from __future__ import annotations

from typing import Any, Protocol

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OFF, LATE, EARLY = 0, 1, 2
MODES = {"off": OFF, "late": LATE, "early": EARLY}

_LATE = tl.constexpr(LATE)
_EARLY = tl.constexpr(EARLY)


class Overlapping(Protocol):
    """What of a launcher decides the mode: `kernels.triton.launch.Launcher` has it."""

    pdl: int


def overlap(launch: Overlapping) -> dict[str, Any]:
    """The launch options of a kernel that calls `await_inputs`."""
    return {"PDL": launch.pdl, "pdl": launch.pdl != OFF}


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the previous ones; for kernels that are short."""
    if PDL != 0:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def await_inputs_with(at, mask, PDL: tl.constexpr):
    """As `await_inputs`; and the words at `at`, zero where masked, of which only a step's beginning
    is an author: in mode LATE they are on their way while the kernel waits.

    From L2, for what an SM has kept of them may be of an earlier step.
    """
    if PDL == _LATE:
        value = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
        await_inputs(PDL)
    else:
        await_inputs(PDL)
        value = tl.load(at, mask=mask, other=0)
    return value


@triton.jit
def await_inputs_streaming(PDL: tl.constexpr):
    """As `await_inputs`, for kernels that stream weights: those of the next kernel would compete.

    In mode LATE the next kernel is let go by `release_dependents`, once the stream is through.
    """
    release_first(PDL)
    if PDL != 0:
        gdc_wait()


@triton.jit
def await_inputs_first(PDL: tl.constexpr, EAGER: tl.constexpr):
    """As `await_inputs_streaming`, for kernels whose dependents may look at their counters.

    No dependent starts before the inputs are complete; `EAGER` lets them start then in mode LATE,
    too.
    """
    if PDL != 0:
        gdc_wait()
    if PDL != 0 and (EAGER or PDL == _EARLY):
        gdc_launch_dependents()


@triton.jit
def release_first(PDL: tl.constexpr):
    """What `await_inputs_streaming` does before it waits, for programs that wait otherwise."""
    if PDL == _EARLY:
        gdc_launch_dependents()


@triton.jit
def await_all():
    """Wait for the previous kernels, in a kernel that overlaps them."""
    gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """Let the next kernel start, if `await_inputs_streaming` did not; nothing is left to load."""
    if PDL == _LATE:
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    src,  # [rows, …] of 1, 2 or 4 bytes
    row,
    col,
    end_row,
    COLS: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a row, a power of two and at least 32 bytes
):
    """Ask L2 for src[row : row + ROWS, col : col + SPAN]; what lies outside the matrix is left out.

    Nothing waits for it. A request for each 32 bytes: bulk ones, of whole rows, are issued lane by
    lane, a warp's in about a microsecond.
    """
    SECTOR: tl.constexpr = 256 // src.dtype.element_ty.primitive_bitwidth
    r = tl.arange(0, ROWS)[:, None]
    c = col + tl.arange(0, SPAN // SECTOR)[None, :] * SECTOR
    wanted = ((r < end_row - row) & (c < COLS)).to(tl.int32)
    _ask(src + (tl.cast(row, tl.int64) + r) * PITCH + c, wanted)


@triton.jit
def _ask(at, wanted):
    """One asynchronous request each, where wanted."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, wanted],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
