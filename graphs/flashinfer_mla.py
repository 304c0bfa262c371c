"""Decode attention through flashinfer's FA3 MLA kernel, planned on the device and merged by us.

Used on Hopper where our own kernel (`graphs.hopper_mla`) does not take the model: it is about twice
as fast as our Triton kernel.
Only the kernel of flashinfer is used, not its planner: see `kernels.triton.mla_plan` for why.
"""

from __future__ import annotations

import importlib.util
import shutil
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from graphs.model_config import ModelConfig
from graphs.planned_mla import LATENT_DIM, ROPE_DIM, PlannedMla, no_hopper
from kernels.triton.launch import Launcher
from kernels.triton.mla_plan import PlanLayout

VERSION = "0.6.18.post1"  # the plan's layout and the kernel's arguments are private to it
NO_MASK = 0  # flashinfer's MaskMode: every token attends to all of its kv_len


class FlashinferMla(PlannedMla):
    """FA3 MLA for one model: `plan` once a step, `run` once a layer; both capture-safe.

    Args:
        num_heads: query heads.
        page_size: KV tokens of a page.
        softmax_scale: of the scores.
        cut: KV tokens of a split, a multiple of 64.
        library: shared object made by `build_library`; None takes the one in flashinfer's own cache
            or, failing that, compiles it there.
    Raises:
        ValueError: sizes that the kernel does not take.
    """

    def __init__(
        self,
        *,
        num_heads: int,
        page_size: int,
        softmax_scale: float,
        cut: int,
        library: Path | None = None,
    ) -> None:
        super().__init__(
            num_heads=num_heads, page_size=page_size, softmax_scale=softmax_scale, cut=cut
        )
        self._library = library

    @staticmethod
    def available(model: ModelConfig, library: Path | None = None) -> tuple[bool, str]:
        """Whether this process can run the kernel for this model, and the reason."""
        for reason in (FlashinferMla.unfit(model), no_hopper("FA3 MLA"), _no_library(library)):
            if reason:
                return False, reason
        return True, f"flashinfer {VERSION} FA3 MLA"

    def library(self) -> Path:
        """The shared object that the kernel is taken from."""
        return _library_path(self._library)

    def load(self) -> None:
        """Load the kernel now, compiling it where no library is found; `run` would do it otherwise.

        Raises:
            RuntimeError: flashinfer cannot compile it.
        """
        _ = self._module

    def attend(
        self,
        launch: Launcher,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        page_table: torch.Tensor,
        *,
        layout: PlanLayout,
        ws: torch.Tensor,
        part_o: torch.Tensor,
        part_lse: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """As `PlannedMla.attend`; nothing on `meta` tensors: it is no kernel of ours to list."""
        if q.device.type == "meta":
            return
        pages = kv_cache.view(-1, self.page_size, LATENT_DIM + ROPE_DIM)
        self._module.run(
            part_o,
            ws,
            # Both partial buffers lie where they like: the plan carries their distance.
            layout.plan_info(part_lse.data_ptr() - part_o.data_ptr()),
            q[..., :LATENT_DIM],
            q[..., LATENT_DIM:],
            pages[..., :LATENT_DIM],
            pages[..., LATENT_DIM:],
            page_table,
            out,
            None,  # no final lse
            NO_MASK,
            self.num_heads,
            self.page_size,
            self.softmax_scale,
            False,  # lse in base 2
            1.0,
            1.0,
            None,  # no FP8 scales
        )

    @cached_property
    def _module(self) -> Any:
        return _load(self._library)


def build_library(destination: Path) -> Path:
    """Compile the kernel for sm_90a with flashinfer and nvcc; needs no GPU.

    flashinfer must be told the target where there is no GPU (FLASHINFER_CUDA_ARCH_LIST=9.0a).

    Args:
        destination: directory; the file in it is named for version and kernel.
    Returns:
        The shared object, for `FlashinferMla(library=…)`. It needs CUDA 13's runtime library and
        `apache-tvm-ffi`, not flashinfer.
    """
    spec = _spec()
    if not spec.is_compiled:
        spec.build()
    destination.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(spec.get_library_path(), destination / library_name()))


def library_name() -> str:
    """File name of the built kernel."""
    return f"flashinfer-{VERSION}-mla-bf16-{LATENT_DIM}-{ROPE_DIM}-sm_90a.so"


def _load(library: Path | None) -> Any:
    path = _library_path(library)
    import tvm_ffi  # type: ignore[import-not-found,import-untyped]

    return tvm_ffi.load_module(str(path))


def _library_path(library: Path | None) -> Path:
    if library is not None:
        return library
    spec = _spec()
    # `build_and_load` would ask ninja whether a compiled kernel is fresh, and ninja would want
    # the sources where they were compiled. The cache's path holds version and chip already.
    if not spec.is_compiled:
        spec.build()
    return Path(spec.get_library_path())


def _spec() -> Any:
    from flashinfer.jit.attention.modules import gen_batch_mla_module

    bf16 = torch.bfloat16
    return gen_batch_mla_module(
        "fa3", bf16, bf16, bf16, torch.int32, LATENT_DIM, ROPE_DIM, use_profiler=False
    )


def _no_library(library: Path | None) -> str:
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed"
    if library is not None:
        return "" if library.is_file() else f"{library} does not exist"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    version = metadata.version("flashinfer-python")
    return "" if version == VERSION else f"flashinfer {VERSION} is needed, {version} is installed"
