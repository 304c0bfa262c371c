"""Programmatic dependent launch: a kernel's start overlaps the end of the one before it.

A kernel that is launched so may begin while its predecessor still runs. The invariant that makes
it correct: **every CTA of every such kernel calls `await_inputs` before it touches memory that any
kernel of the step writes**, be it to read or to overwrite. Before that it may read only what no
step writes: weights, scales of weights, the rope table. `await_inputs` returns when the
predecessor has completed and its writes are visible; that one had waited for its own predecessor,
so all earlier kernels are complete, too, and a dependent may be let go as early as one likes.

Kernels that are launched in the ordinary way (other libraries', the transports') wait for the
completion of what comes before them, and what comes after them waits for theirs.

The mode is a constexpr of every kernel: OFF also serves the interpreter and chips before sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

OFF, LATE, EARLY = 0, 1, 2
MODES = {"off": OFF, "late": LATE, "early": EARLY}

REQUESTS = 512  # of one program: at least one for each of its threads, or some would repeat
AHEAD_PROGRAMS = 128  # one SM alone could not ask fast enough

_LATE = tl.constexpr(LATE)
_EARLY = tl.constexpr(EARLY)
_REQUESTS = tl.constexpr(REQUESTS)


class Overlapping(Protocol):
    """What of a launcher decides the mode: `kernels.triton.launch.Launcher` has it."""

    pdl: int


def overlap(launch: Overlapping) -> dict[str, Any]:
    """The launch options of a kernel that calls `await_inputs`."""
    return {"PDL": launch.pdl, "pdl": launch.pdl != OFF}


@dataclass(frozen=True)
class Ahead:
    """Weights that a later kernel begins with, for a kernel that leaves the memory idle.

    Attributes:
        weight: [rows, cols], contiguous.
        span: elements to ask for: the first so many of the matrix, or with `bands` of each row and
            band.
        bands: 0, or equal ranges of columns, as K is split.
    """

    weight: torch.Tensor
    span: int
    bands: int = 0


def ahead_constexprs(ahead: Ahead | None, programs: int) -> dict[str, Any]:
    """What a kernel needs for `prefetch_share`, if `programs` programs are to share the work.

    Raises:
        ValueError: a span that is not in the matrix, or no whole 32 bytes.
    """
    if ahead is None:
        return dict.fromkeys(("AHEAD_ROWS", "AHEAD_COLS", "AHEAD_BANDS", "AHEAD_SHARE"), 1) | {
            "AHEAD_SPAN": 0
        }
    (rows, cols), size = ahead.weight.shape, ahead.weight.element_size()
    most = cols // ahead.bands if ahead.bands else rows * cols
    if ahead.span * size % 32 or not 0 < ahead.span <= most or not ahead.weight.is_contiguous():
        raise ValueError(
            f"expected whole 32 bytes within {most} elements of a contiguous matrix, got "
            f"{ahead.span} of {ahead.weight.dtype}"
        )
    share = triton.cdiv(rows, programs)
    if not ahead.bands:
        # One request a thread or a few, of whole 32 bytes.
        share = triton.cdiv(ahead.span, programs * REQUESTS * 32) * REQUESTS * 32
    return {
        "AHEAD_ROWS": rows,
        "AHEAD_COLS": cols,
        "AHEAD_BANDS": ahead.bands,
        "AHEAD_SPAN": ahead.span,
        "AHEAD_SHARE": share,
    }


@triton.jit
def await_inputs(PDL: tl.constexpr):
    """Let the next kernel start, and wait for the previous ones; for kernels that are short."""
    if PDL != 0:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def await_inputs_streaming(PDL: tl.constexpr):
    """As `await_inputs`, for kernels that stream weights: those of the next kernel would compete.

    In mode LATE the next kernel is let go by `release_dependents`, once the stream is through.
    """
    if PDL == _EARLY:
        gdc_launch_dependents()
    if PDL != 0:
        gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """Let the next kernel start, if `await_inputs_streaming` did not; nothing is left to load."""
    if PDL == _LATE:
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    src,  # [rows, …] of 1, 2 or 4 bytes, 16-byte aligned rows
    row,
    col,
    end_row,
    COLS: tl.constexpr,
    PITCH: tl.constexpr,
    ROWS: tl.constexpr,
    SPAN: tl.constexpr,  # elements of a row, a multiple of 32 bytes
):
    """Ask L2 for src[row : row + ROWS, col : col + SPAN]; what lies outside the matrix is left out.

    Nothing waits for it. Two requests a row, so that a thread issues one.
    """
    HALF: tl.constexpr = SPAN // 2
    i = tl.arange(0, 2 * ROWS)
    r = i // 2
    c = col + (i % 2) * HALF
    left = tl.minimum(COLS - c, HALF)
    wanted = (r < end_row - row) & (left > 0)
    num_bytes = tl.where(wanted, left * (src.dtype.element_ty.primitive_bitwidth // 8), 0)
    _ask(src + (tl.cast(row, tl.int64) + r) * PITCH + c, num_bytes)


@triton.jit
def prefetch_share(
    src,  # [ROWS, COLS], contiguous
    program,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BANDS: tl.constexpr,
    SPAN: tl.constexpr,
    SHARE: tl.constexpr,  # of a program: rows, or without bands elements
):
    """Ask L2 for this program's share of an `Ahead`."""
    if BANDS == 0:
        CHUNK: tl.constexpr = SHARE // _REQUESTS
        begin = program.to(tl.int64) * SHARE + tl.arange(0, _REQUESTS) * CHUNK
        left = tl.minimum(tl.maximum(SPAN - begin, 0), CHUNK).to(tl.int32)
        _ask(src + begin, left * (src.dtype.element_ty.primitive_bitwidth // 8))
    else:
        end = tl.minimum((program + 1) * SHARE, ROWS)
        POW2: tl.constexpr = triton.next_power_of_2(SHARE)
        for band in tl.static_range(BANDS):
            col = band * (COLS // BANDS)
            prefetch_rows(src, program * SHARE, col, end, COLS, COLS, POW2, SPAN)


@triton.jit
def _ask(at, num_bytes):
    """One asynchronous request each; those of 0 bytes are left out."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0;"
        " @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [at, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def touch(at):
    """Bring the line at a pointer close, without waiting for it; only what no step writes."""
    tl.inline_asm_elementwise(
        "ld.global.ca.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )
