"""Expert choices to benchmark with: uniform, skewed, or recorded from a real model.

No generator repeats an expert within a token: a router never does, and a repeat would make
rank-deduplicated transports look better than they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

KINDS = ("random", "zipf", "file")
ZIPF_EXPONENT = 1.0


def expert_ids(
    kind: str,
    *,
    tokens: int,
    num_experts: int,
    top_k: int,
    seed: int,
    path: Path | None = None,
) -> torch.Tensor:
    """int32 [tokens, top_k], no repeats within a row.

    Args:
        kind: "random" (uniform), "zipf" (popularity 1/rank, the same popular experts for every
            seed) or "file".
        seed: of this call; a file is read from row seed * tokens on, in a circle.
        path: of the "file": a .npy of integers [N, top_k].
    Raises:
        ValueError: unknown kind, or a file that does not fit.
    """
    if top_k > num_experts:
        raise ValueError(f"{top_k} choices without repeats need as many experts, got {num_experts}")
    if kind == "file":
        recorded = read_recording(path, num_experts=num_experts, top_k=top_k)
        rows = (torch.arange(tokens) + seed * tokens) % recorded.shape[0]
        return recorded[rows]
    if kind not in KINDS:
        raise ValueError(f"--routing must be one of {', '.join(KINDS)}, got {kind!r}")
    generator = torch.Generator().manual_seed(seed)
    # The k largest of log-popularity + Gumbel noise are a draw without replacement.
    noise = torch.rand(tokens, num_experts, generator=generator).clamp_min_(1e-20)
    score = -torch.log(-torch.log(noise))
    if kind == "zipf":
        score += zipf_popularity(num_experts).log()
    return score.topk(top_k, dim=1).indices.to(torch.int32)


def expert_weights(tokens: int, top_k: int, *, seed: int) -> torch.Tensor:
    """fp32 [tokens, top_k]: positive, each row summing to 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return weights / weights.sum(1, keepdim=True)


def zipf_popularity(num_experts: int) -> torch.Tensor:
    """float32 [num_experts], summing to 1; which experts are popular is a fixed shuffle.

    Unshuffled, all popular experts would be one rank's.
    """
    order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(0))
    popularity = torch.empty(num_experts)
    popularity[order] = 1.0 / torch.arange(1, num_experts + 1).float() ** ZIPF_EXPONENT
    return popularity / popularity.sum()


def read_recording(path: Path | None, *, num_experts: int, top_k: int) -> torch.Tensor:
    """int32 [N, top_k] of a .npy file.

    Raises:
        ValueError: no file, another shape or type, ids out of range or repeated in a row.
    """
    if path is None:
        raise ValueError("--routing file needs --routing-file PATH.npy, integers [N, top_k]")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: expected a .npy of integers [N, {top_k}], got {e}") from e
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expected integers [N, {top_k}], got {getattr(array, 'dtype', type(array))} "
            f"{getattr(array, 'shape', '')}"
        )
    if array.shape[1] != top_k or array.shape[0] == 0:
        raise ValueError(f"{path}: expected [N, {top_k}], got {list(array.shape)}; set --topk")
    if array.min() < 0 or array.max() >= num_experts:
        raise ValueError(
            f"{path}: ids must lie in 0..{num_experts - 1}, got {array.min()}..{array.max()}; "
            "set --num-experts"
        )
    ordered = np.sort(array, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if repeated.any():
        row = int(repeated.argmax())
        raise ValueError(f"{path}: row {row} names an expert twice: {array[row].tolist()}")
    return torch.from_numpy(array.astype(np.int32))
