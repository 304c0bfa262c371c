"""The store that makes a step visible to the host."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_release_sys(
    ptr,  # int64 scalar pointer, host or device
    value,
):
    # A plain store after a fence, not an atomic: PCIe need not offer atomics on host memory. Of one
    # thread, since every fence waits for the bus.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; "
        "@p st.release.sys.global.s64 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,l",
        [ptr, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
