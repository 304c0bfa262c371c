"""Barriers between GPU ranks as kernels on a stream."""

from __future__ import annotations

from barriers.device_code import BARRIER_PARAMS, compile_barriers, load_kernels
from barriers.symmetric_device import DeviceMemory
from barriers.watch import NO_LAYER, OPERATIONS
from capture_cache.nvrtc import CudaModule
from capture_cache.store import Store

KINDS = ("tag", "tag_relaxed", "epoch", "epoch_relaxed")
DEFAULT_KIND = "tag"


class DeviceBarrier:
    """One kind of barrier, ready to launch.

    Args:
        kind: one of `KINDS`.
        module: `compile_barriers("barriers.cu", …)` for this device, if the caller has it.
        store: of compiled code, if not.
        pdl: launch with programmatic dependent launch.

    All ranks make theirs before any of them launches: loading waits for the device.
    """

    def __init__(
        self,
        memory: DeviceMemory,
        kind: str = DEFAULT_KIND,
        *,
        module: CudaModule | None = None,
        store: Store | None = None,
        pdl: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"a barrier must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self._memory = kind, memory
        module = module or compile_barriers("barriers.cu", memory.device.arch, store=store)
        name = f"barrier_{kind}"
        self._kernel = load_kernels(memory.device, module, {name: BARRIER_PARAMS}, pdl=pdl)[name]

    def launch(
        self,
        stream: int,
        *,
        layer: int = NO_LAYER,
        operation: str = "barrier",
        opens_step: bool = False,
    ) -> None:
        """Launch one barrier; capture-safe.

        Args:
            stream: a CUstream handle.
            layer, operation: what the record will name.
            opens_step: the first barrier of a step: ranks compare their step numbers in it. There
                must be at least one more barrier in a step.
        """
        memory = self._memory
        values = (memory.base, memory.stride, memory.group.world, layer)
        where = (OPERATIONS.index(operation), int(opens_step))
        self._kernel.launch((1,), (*values, *where), stream)

    def close(self) -> None:
        """Unload the code; idempotent."""
        self._kernel.close()
