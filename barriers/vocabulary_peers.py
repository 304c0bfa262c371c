"""A cut head over peer memory: rows are pushed to every rank, logits are pulled from every rank.

Two kernels a step, before and after the product (cuda/head.cu says how they follow each other and
why two signals protect everything). The tag words may be those of `barriers.rdep.Rdep`: then both
launch on one stream, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from barriers.device_code import STATE_DEFINES, compile_with, load_kernels
from barriers.rdep import TAG, Launchable, PeerKernels
from barriers.transport import BufferSpec
from barriers.vocabulary import VocabularyConfig, check_gather, check_scatter, head_buffers
from barriers.watch import NO_LAYER, OPERATIONS
from capture_cache.driver import Device
from capture_cache.nvrtc import CudaModule
from capture_cache.store import Store

_WORDS = 4  # int32: rank, a block counter, two unused; `Words` of cuda/head.cu
_IN_FLIGHT = 4  # kInFlight of cuda/head.cu
PARAMS: dict[str, tuple[str, ...]] = {
    "head_send": ("ptr", "i64", "ptr", "ptr", "ptr", "i32", "i32", "i32", "i32", "i32"),
    "head_pull": ("ptr", "i64", "ptr", "ptr", "i64", "ptr", "i32", "i32", "i32"),
}


@dataclass(frozen=True)
class HeadTuning:
    """How the kernels are cut. Changes no bit of a result, and ranks need not agree on it.

    Attributes:
        send_threads: of a block of `send`; each moves 16 bytes of a row (7168 bf16: 896).
        pull_threads: of a block of `pull`; each moves 64 bytes of a slice's row at a time.
        pull_blocks: at most so many; all of them poll while they wait.
        share_blocks: up to this many blocks of `send` signal one by one, each as soon as it is
            done; in a larger grid the last block signals for all (0: always).
        pdl: launch with programmatic dependent launch.
    """

    send_threads: int = 224
    pull_threads: int = 256
    pull_blocks: int = 528
    share_blocks: int = 160
    pdl: bool = True

    def __post_init__(self) -> None:
        for name in ("send_threads", "pull_threads"):
            threads = getattr(self, name)
            if threads % 32 or not 32 <= threads <= 1024:
                raise ValueError(f"{name} must be a multiple of 32 up to 1024, got {threads}")
        if self.pull_blocks < 1 or not 0 <= self.share_blocks <= TAG:
            raise ValueError(
                f"expected pull_blocks of at least 1 and share_blocks of 0 to {TAG}, got "
                f"{self.pull_blocks} and {self.share_blocks}"
            )

    def share(self, blocks: int) -> int:
        """What each block but the first adds to the signal; 0: the last block gives all of it."""
        return TAG // blocks if blocks <= self.share_blocks else 0


def defines(config: VocabularyConfig, tuning: HeadTuning) -> dict[str, int]:
    """The constants that cuda/head.cu is compiled with."""
    return {
        **STATE_DEFINES,
        "HEAD_WORLD": config.world,
        "HEAD_CAPACITY": config.capacity,
        "HEAD_VOCAB": config.vocab,
        "HEAD_PER": config.per,
        "HEAD_ROW_BYTES": config.hidden * config.act_bytes,
        "HEAD_SEND_THREADS": tuning.send_threads,
        "HEAD_PULL_THREADS": tuning.pull_threads,
    }


def compile_head(
    config: VocabularyConfig,
    arch: str,
    tuning: HeadTuning | None = None,
    *,
    store: Store | None = None,
) -> CudaModule:
    """Compile cuda/head.cu for these sizes; needs no GPU. The rank makes no difference.

    Raises as `capture_cache.nvrtc.compile_cuda`.
    """
    constants = defines(config, tuning or HeadTuning())
    return compile_with("head.cu", arch, constants, store=store)


def load_head(
    device: Device,
    config: VocabularyConfig,
    tuning: HeadTuning | None = None,
    *,
    store: Store | None = None,
) -> dict[str, Launchable]:
    """Compile and load on `device`. All ranks do this before any of them launches."""
    tuning = tuning or HeadTuning()
    module = compile_head(config, device.arch, tuning, store=store)
    kernels: dict[str, Launchable] = {}
    for name, threads in (("head_send", tuning.send_threads), ("head_pull", tuning.pull_threads)):
        kinds = {name: PARAMS[name]}
        kernels |= load_kernels(device, module, kinds, num_warps=threads // 32, pdl=tuning.pdl)
    return kernels


class VocabularyPeers(PeerKernels):
    """The default exchange on GPUs of one node.

    Args:
        buffers: tensors by the names of `VocabularyPeers.buffers`, in the payload of peer memory.
        kernels: from `load_head`.
        base, stride: of the peer memory (`barriers.symmetric_device.DeviceMemory`); its control
            block's tag words are this exchange's alone, or used in the same order on one stream.
        tuning: as in `load_head`.
        stream: handle of the stream to launch on; by default torch's current one.

    All ranks make theirs before any of them gathers: meet after this.
    """

    name = "peers"
    live = ""

    def __init__(
        self,
        config: VocabularyConfig,
        buffers: Mapping[str, torch.Tensor],
        kernels: Mapping[str, Launchable],
        *,
        base: int,
        stride: int,
        tuning: HeadTuning | None = None,
        stream: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(kernels, base, stride, config.world, stream)
        self.config, self.tuning = config, tuning or HeadTuning()
        self.part = buffers["head_part"]
        self._rows, self._words = buffers["head_rows"], buffers["head_words"]
        self._words.copy_(torch.tensor([config.rank, 0, 0, 0], dtype=torch.int32))

    @staticmethod
    def buffers(config: VocabularyConfig) -> Iterator[BufferSpec]:
        """All of it symmetric: at one offset on every rank."""
        yield from head_buffers(config, "peers")
        yield "peers", "head_words", (_WORDS,), "int32"

    def gather(self, final: torch.Tensor, *, opens_step: bool = False) -> torch.Tensor:
        check_gather(self.config, final)
        if final.data_ptr() % 16:
            raise ValueError(
                f"gather: final must begin at a multiple of 16 bytes, got {final.data_ptr():#x}; "
                "give a buffer of its own, not a piece of another"
            )
        count = final.shape[0]
        pieces = self.config.hidden * self.config.act_bytes // 16
        blocks = min(count * -(-pieces // self.tuning.send_threads), TAG)
        values = (
            *self._peers,
            *(t.data_ptr() for t in (final, self._rows, self._words)),
            count,
            self.tuning.share(blocks),
            NO_LAYER,
            OPERATIONS.index("head"),
            int(opens_step),
        )
        self.kernels["head_send"].launch((blocks,), values, self._stream())
        return self._rows

    def scatter(self, part: torch.Tensor, out: torch.Tensor) -> None:
        config, count = self.config, out.shape[0]
        check_scatter(config, part, out, self.part)
        parts = -(-(config.per // 4) // (self.tuning.pull_threads * _IN_FLIGHT))
        blocks = min(count * parts * max(config.world - 1, 1), self.tuning.pull_blocks)
        values = (
            *self._peers,
            part.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            self._words.data_ptr(),
            count,
            NO_LAYER,
            OPERATIONS.index("sample"),
        )
        self.kernels["head_pull"].launch((blocks,), values, self._stream())
