"""A CUDA C++ kernel of this folder as `kernels.triton.launch.Launcher` takes kernels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

DEFINED = "LOCKSTEP_"  # before the name of each constexpr


@dataclass(frozen=True)
class CudaKernel:
    """A `__global__` function, and how a block of it is launched.

    Run-time arguments are passed in order; a `TensorMap` becomes a `__grid_constant__` descriptor
    of 128 bytes, swizzled over a row of 128 bytes. Constexprs become macros, LOCKSTEP_NAME.

    Attributes:
        name: of the function.
        where: "module:attribute" that holds this object, for processes that compile.
        file: its source in this folder; the headers beside it may be included.
        params, constexprs: names.
        cluster: the constexpr that says how many blocks form a cluster; each launches as many as
            the grid says, times this.
        shared_bytes: dynamic, of a block; passed as LOCKSTEP_SHARED.
    """

    name: str
    where: str
    file: str
    params: tuple[str, ...]
    constexprs: tuple[str, ...]
    cluster: str
    shared_bytes: int

    @property
    def __name__(self) -> str:
        return self.name

    @property
    def arg_names(self) -> tuple[str, ...]:
        """Run-time parameters, then constexprs."""
        return self.params + self.constexprs

    def source(self) -> str:
        """The text of its file."""
        return (resources.files("kernels") / "cuda" / self.file).read_text()

    def source_hash(self) -> str:
        """sha256 of all that decides its code beside the launch: text, headers, shared memory."""
        headers = sorted(cuda_headers().items())
        facts = repr((self.source(), headers, self.cluster, self.shared_bytes))
        return hashlib.sha256(facts.encode()).hexdigest()


def cuda_headers() -> dict[str, str]:
    """Every header of this folder, by the name in an `#include`."""
    folder = resources.files("kernels") / "cuda"
    return {f.name: f.read_text() for f in folder.iterdir() if f.name.endswith(".cuh")}
