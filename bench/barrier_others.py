"""The barriers of others, timed in graphs of torch's own, in the same run as ours."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from datetime import timedelta
from typing import Any

REPEATS = 15
NCCL, TORCH = "NCCL all-reduce of 16 bytes", "torch symmetric memory"


def time_others(device: int) -> dict[str, dict[str, Any]]:
    """torch's symmetric-memory barrier and NCCL's smallest all-reduce; all ranks call this.

    Raises:
        ImportError: torch is not installed.
        RuntimeError: NCCL cannot start.
    """
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(device)
    place = torch.device("cuda", device)
    dist.init_process_group("nccl", device_id=place, timeout=timedelta(seconds=20))
    small = torch.zeros(4, device=place)
    dist.all_reduce(small)  # makes the communicator
    torch.cuda.synchronize()
    results = {NCCL: _guarded(lambda: _time(lambda: dist.all_reduce(small), 50))}

    def torchs_barrier() -> dict[str, Any]:
        import torch.distributed._symmetric_memory as symmetric

        ranks: Any = dist.group.WORLD
        buffer = symmetric.empty(1024, dtype=torch.float32, device=place)
        handle = symmetric.rendezvous(buffer, ranks)
        return _time(lambda: handle.barrier(channel=0), 200)

    results[TORCH] = _guarded(torchs_barrier)
    return results


def _guarded(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return body()
    except Exception as e:  # one library's absence is a line in the table, not the end
        return {"error": f"{type(e).__name__}: {e}"[:300]}


def _time(call: Callable[[], Any], length: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        call()
    cuda.synchronize()
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        for _ in range(length):
            call()
    graph.replay()
    cuda.synchronize()
    dist.barrier()
    took = []
    for _ in range(REPEATS):
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1e3 / length)
    worst = torch.tensor([statistics.median(took)], device="cuda")
    total = worst.clone()
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(total)
    return {
        "one_us": round(float(total) / dist.get_world_size(), 3),
        "one_us_max": round(float(worst), 3),
    }
