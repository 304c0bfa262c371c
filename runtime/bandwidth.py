"""What a plain read reaches on this GPU, now: beside it a floor means something on any machine.

Two machines with the same GPU may differ by a few per cent.
"""

from __future__ import annotations

import functools

import torch

from graphs.aot import AotLauncher
from graphs.timing import GraphTimer
from kernels.triton.stream import PER_SM, read_words

MOST_BYTES, FEWEST_BYTES = 1 << 31, 1 << 28  # many times the L2


def read_bandwidth(launcher: AotLauncher) -> float | None:
    """Bytes per second of a kernel that does nothing but read, in a graph; waits.

    Returns:
        None where not even FEWEST_BYTES of device memory are free.
    Raises:
        RuntimeError: the kernel has not read what is there.
    """
    free = torch.cuda.mem_get_info()[0] // 2
    if free < FEWEST_BYTES:
        return None
    size = min(MOST_BYTES, 1 << (free.bit_length() - 1))
    own = AotLauncher(launcher.compiler, num_sms=launcher.num_sms)  # the step's is frozen
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        words = torch.empty(size // 4, dtype=torch.int32, device="cuda").random_()
        sums = words.new_empty(launcher.num_sms * PER_SM)
        read = functools.partial(read_words, own, words, out=sums)
        time = GraphTimer(stream, target_us=5000.0)([read])
        if (int(sums.sum(dtype=torch.int64)) - int(words.sum(dtype=torch.int64))) % (1 << 32):
            raise RuntimeError("measuring the read bandwidth: the sums of what was read are wrong")
    return size / time.us * 1e6
