"""Ahead-of-time compilation: kernels to device code in the store, with or without a GPU.

A kernel is identified by its `KernelSpec` and by the toolchain; whatever made an entry, laptop or
GPU machine, the same key finds it. "Compiled nothing" is judged by our store alone.
"""

from __future__ import annotations

import concurrent.futures as futures
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture_cache.errors import CompileError, CorruptBundle
from capture_cache.kernel import CUBIN, RECORD, CompiledKernel
from capture_cache.store import Store
from graphs.cuda_compile import compile_cuda_kernel, cuda_toolchain
from graphs.triton_compile import compile_kernel, require_compilable, toolchain
from kernels.cuda.source import CudaKernel
from kernels.triton.launch import Arg, KernelSpec, kernel_spec, source_hash
from kernels.triton.overlap import OFF


class KernelCompiler:
    """Finds kernels in the store for one architecture, and compiles what is missing.

    Args:
        store: where device code is looked for and kept.
        arch: 90, 100 or "sm_90", "sm_100", …

    Attributes:
        loaded, compiled: kernels taken from the store, and compiled, by this object.
        replaced: messages about stored kernels that were damaged and compiled again.
    """

    def __init__(self, store: Store, arch: int | str) -> None:
        match = re.fullmatch(r"(?:sm_)?(\d{2,3})", str(arch))
        if match is None:
            raise ValueError(f"expected an architecture such as sm_90 or sm_100, got {arch!r}")
        self.store = store
        self.arch_number = int(match[1])
        self.arch = f"sm_{match[1]}"
        self._toolchain = toolchain(self.arch_number)
        self.loaded = 0
        self.compiled = 0
        self.replaced: list[str] = []

    def key(self, spec: KernelSpec) -> str:
        """The store's name of a kernel: specification, toolchain and architecture."""
        toolchain = cuda_toolchain() if spec.is_cuda else self._toolchain
        facts = json.dumps([RECORD, spec.digest, toolchain])
        return hashlib.sha256(facts.encode()).hexdigest()

    def find(self, spec: KernelSpec) -> CompiledKernel | None:
        """The stored kernel; None if there is none, or only a damaged one (a warning tells)."""
        try:
            entry = self.store.load_kernel(self.arch, self.key(spec))
            if entry is None:
                return None
            kernel = CompiledKernel.from_meta(entry.record, entry.files, entry.path)
        except CorruptBundle as e:
            self.replaced.append(str(e))
            warnings.warn(f"compiling {spec.name} again: {e}", RuntimeWarning, stacklevel=2)
            return None
        self.loaded += 1
        return kernel

    def compile(
        self, spec: KernelSpec, kernel: Any, constexprs: Mapping[str, Any]
    ) -> CompiledKernel:
        """The kernel from the store, or else compiled and stored.

        Args:
            spec: of the launch.
            kernel: the `@triton.jit` function, or the `CudaKernel`.
            constexprs: the real values (`spec` has them as text where they are no plain numbers).

        Raises:
            CompileError: it does not compile, or to something that cannot be captured.
            StoreError: the store cannot be read or written.
        """
        damaged = len(self.replaced)
        found = self.find(spec)
        if found is not None:
            return found
        if isinstance(kernel, CudaKernel):
            made = compile_cuda_kernel(spec, kernel, self.arch_number)
        else:
            made = compile_kernel(spec, kernel, constexprs, self.arch_number)
        entry = self.store.publish_kernel(
            self.arch,
            self.key(spec),
            made.meta(),
            {CUBIN: made.cubin},
            replace_existing=len(self.replaced) > damaged,
        )
        self.compiled += 1
        return CompiledKernel.from_meta(entry.record, entry.files, entry.path)


@dataclass(frozen=True)
class CompileRequest:
    """A kernel to compile, in words that another process understands."""

    spec: KernelSpec
    module: str
    function: str
    constexprs: tuple[tuple[str, Any], ...]

    def resolve(self) -> Any:
        """The kernel function itself.

        Raises:
            CompileError: the module has no such kernel, or another version of it.
        """
        kernel = getattr(importlib.import_module(self.module), self.function, None)
        require_compilable(kernel)
        found = source_hash(kernel)
        if found != self.spec.source_hash:
            raise CompileError(
                f"expected kernel {self.module}.{self.function} with source "
                f"{self.spec.source_hash[:12]}, got {found[:12]}; do not change it meanwhile, and "
                "define it at the top of a module that can be imported by name"
            )
        return kernel


@dataclass(frozen=True)
class Compiled:
    """One line of the report.

    Attributes:
        name, key: of the kernel function, and in the store.
        registers, local_bytes, spill_bytes: per thread.
        shared_bytes: dynamic, per block.
        seconds: it took to compile, or to load where `cached`.
    """

    name: str
    key: str
    arch: str
    num_warps: int
    registers: int
    local_bytes: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    cached: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RecordingLauncher:
    """Launches nothing and notes, once each, the kernels that would have run.

    Run the step on `meta` tensors with it to learn what has to be compiled.
    """

    def __init__(self, arch: str = "sm_90", num_sms: int = 132, pdl: int = OFF) -> None:
        self.arch, self.num_sms, self.pdl = arch, num_sms, pdl
        self._requests: dict[KernelSpec, CompileRequest] = {}

    @property
    def requests(self) -> list[CompileRequest]:
        """In order of first use."""
        return list(self._requests.values())

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Arg,
        num_warps: int = 4,
        num_stages: int = 3,
        pdl: bool = False,
        **constexprs: Any,
    ) -> None:
        require_compilable(kernel)
        spec = kernel_spec(
            kernel, args, constexprs, num_warps=num_warps, num_stages=num_stages, pdl=pdl
        )
        if spec not in self._requests:
            module, name = _whereabouts(kernel)
            self._requests[spec] = CompileRequest(spec, module, name, tuple(constexprs.items()))


def _whereabouts(kernel: Any) -> tuple[str, str]:
    """Module and attribute that hold a kernel."""
    if isinstance(kernel, CudaKernel):
        module, _, name = kernel.where.partition(":")
        return module, name
    return kernel.fn.__module__, kernel.fn.__name__


def compile_all(
    requests: Sequence[CompileRequest],
    compiler: KernelCompiler,
    *,
    jobs: int | None = None,
    progress: Callable[[str], None] | None = None,
    timeout_s: float = 1800.0,
) -> list[Compiled]:
    """Have every kernel in the store; what is missing is compiled by several processes.

    Args:
        jobs: processes; by default one per usable core, none where a few kernels are missing.
        progress: called with its name after each kernel.
        timeout_s: longest time without any kernel finishing.

    Returns one row per request, in order.

    Raises:
        CompileError: some do not compile (all are named), a process died, or nothing finished.
        StoreError: the store cannot be read or written.
    """
    rows: dict[int, Compiled] = {}
    failures: list[str] = []

    def done(index: int, outcome: Compiled | str) -> None:
        if isinstance(outcome, str):
            failures.append(outcome)
            return
        rows[index] = outcome
        if progress is not None:
            progress(outcome.name)

    missing = []
    for index, request in enumerate(requests):
        start = time.perf_counter()
        found = compiler.find(request.spec)
        if found is None:
            missing.append(index)
        else:
            key = compiler.key(request.spec)
            done(index, _row(found, request, key, time.perf_counter() - start, cached=True))
    wanted = len(os.sched_getaffinity(0)) if jobs is None else jobs
    # A process takes seconds to start, so each should have several kernels to compile.
    workers = min(wanted, -(-len(missing) // (4 if jobs is None else 1)))
    tasks = {i: (requests[i], str(compiler.store.root), compiler.arch) for i in missing}
    if workers <= 1:
        for index, task in tasks.items():
            done(index, _compile_task(*task))
    else:
        for index, outcome in _in_processes(tasks, workers, timeout_s):
            done(index, outcome)
    compiler.compiled += len(missing) - len(failures)
    if failures:
        raise CompileError(
            f"{len(failures)} of {len(requests)} kernels do not compile for {compiler.arch}:\n"
            + "\n".join(failures)
        )
    return [rows[i] for i in range(len(requests))]


def _compile_task(request: CompileRequest, root: str, arch: str) -> Compiled | str:
    """One kernel, in whatever process; the message of a CompileError instead of raising it."""
    compiler = KernelCompiler(Store(Path(root)), arch)
    start = time.perf_counter()
    try:
        kernel = compiler.compile(request.spec, request.resolve(), dict(request.constexprs))
    except CompileError as e:
        return str(e)
    seconds = time.perf_counter() - start
    cached = compiler.compiled == 0
    return _row(kernel, request, compiler.key(request.spec), seconds, cached=cached)


def _in_processes(
    tasks: Mapping[int, tuple[CompileRequest, str, str]], workers: int, timeout_s: float
) -> Iterator[tuple[int, Compiled | str]]:
    # A fresh interpreter each: forking after torch has started its threads is not safe.
    others = multiprocessing.active_children()
    pool = futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    pending = {pool.submit(_compile_task, *task): index for index, task in tasks.items()}
    finished = False
    try:
        while pending:
            ready, _ = futures.wait(pending, timeout_s, futures.FIRST_COMPLETED)
            if not ready:
                names = sorted({tasks[i][0].function for i in pending.values()})
                raise CompileError(
                    f"no kernel finished within {timeout_s} s, of {', '.join(names)}; "
                    "compile with fewer --jobs, or look for a stuck ptxas"
                )
            for future in ready:
                yield pending.pop(future), future.result()
        finished = True
    except futures.process.BrokenProcessPool as e:
        raise CompileError(
            "a compiling process died, most likely for lack of memory; lower --jobs"
        ) from e
    finally:
        pool.shutdown(wait=finished, cancel_futures=True)
        if not finished:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()


def _row(
    kernel: CompiledKernel, request: CompileRequest, key: str, seconds: float, *, cached: bool
) -> Compiled:
    return Compiled(
        name=request.function,
        key=key,
        arch=kernel.arch,
        num_warps=kernel.num_warps,
        registers=kernel.registers,
        local_bytes=kernel.local_bytes,
        spill_bytes=kernel.spill_bytes,
        shared_bytes=kernel.shared_bytes,
        seconds=seconds,
        cached=cached,
    )
