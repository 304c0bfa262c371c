"""New weights into packed tensors that are in use: all checked first, then all written in place.

Addresses stay, so captured graphs stay valid. A checkpoint directory must be whole; named tensors
may be some of the model's. Invariant: `prepare_update` writes nothing, and what it has accepted
`WeightUpdate.apply` writes to the end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphs.checkpoint import Loader, first_local_expert, local_parts
from graphs.checkpoint_plan import plan_load
from graphs.hf_layout import Part
from graphs.model_config import ModelConfig
from graphs.safetensors_dir import CheckpointDir, CheckpointError, Stored, open_checkpoint
from graphs.weights import add_part_views, check_views, local_experts

_NAMED = Path("given to update_weights")  # stands where a directory's errors name the directory


class WeightUpdate:
    """A checked update.

    Attributes:
        num_tensors: parts that `apply` writes on this rank.
        shared_digest: of names, shapes, types and values of all parts but experts: what every rank
            must be given alike. Values count by the sum of their bits, whatever their order.
    """

    def __init__(
        self,
        loader: Loader,
        parts: list[tuple[Part, Stored]],
        resources: ExitStack,
        shared_digest: str,
    ) -> None:
        self._loader, self._parts, self._resources = loader, parts, resources
        self.shared_digest = shared_digest
        self.num_tensors = len(parts)

    def apply(self) -> None:
        """Write everything, in place, and let go of the source."""
        with self._resources:
            for part, stored in self._parts:
                self._loader.load(part, stored)

    def discard(self) -> None:
        """Write nothing, and let go of the source."""
        self._resources.close()


class _NamedLoader(Loader):
    """Reads tensors that are in memory."""

    _remedy = "look at what made it; nothing was changed"

    def __init__(self, tensors: Mapping[str, torch.Tensor], *args: Any) -> None:
        super().__init__(*args)
        self._tensors = tensors

    def _read(self, name: str, stored: Stored, at: Any) -> torch.Tensor:
        return self._tensors[name][at]


def prepare_update(
    source: str | Path | Iterable[tuple[str, Any]],
    cfg: ModelConfig,
    views: Mapping[str, torch.Tensor],
    *,
    ep_rank: int = 0,
    ep_size: int = 1,
) -> WeightUpdate:
    """Check new weights against the model: names, shapes, types, and every value to be finite.

    Args:
        source: a checkpoint directory, or (Hugging Face name, torch tensor or numpy array) pairs;
            an FP8 tensor comes with its `_scale_inv`.
        views: the packed tensors in use.
    Raises:
        CheckpointError: names each tensor that is wrong.
        ValueError: not pairs of that kind, or a name given twice.
    """
    first = first_local_expert(cfg, ep_rank, ep_size)
    views = dict(views)
    add_part_views(views)
    check_views(cfg, views, ep_size=ep_size)
    with ExitStack() as stack:
        if isinstance(source, str | Path):
            checkpoint = open_checkpoint(Path(source))
            plan = plan_load(checkpoint, cfg)
            loader = Loader(checkpoint, cfg, views, first, stack, ep_rank)
        else:
            tensors = _named_tensors(source)
            checkpoint = _as_checkpoint(tensors)
            plan = plan_load(checkpoint, cfg, whole=False)
            loader = _NamedLoader(tensors, checkpoint, cfg, views, first, stack, ep_rank)
        parts = local_parts(plan, first, local_experts(cfg, ep_size))
        digest = hashlib.sha256()
        for part, stored in parts:
            bits = loader.check(part, stored)
            if part.expert is None:
                digest.update(repr((part.source, stored.shape, stored.dtype, bits)).encode())
        loader.check_tied_head()
        return WeightUpdate(loader, parts, stack.pop_all(), digest.hexdigest())


def _named_tensors(source: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    wanted = "update_weights: expected (name, array) pairs, got"
    remedy = "pass state_dict.items() or a checkpoint directory"
    if not isinstance(source, Iterable) or isinstance(source, Mapping | bytes):
        raise ValueError(f"{wanted} {type(source).__name__}; {remedy}")
    for pair in source:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ValueError(f"{wanted} {type(pair).__name__}; {remedy}")
        name, value = pair
        if name in tensors:
            raise ValueError(f"update_weights: {name} is given twice")
        tensors[name] = _as_tensor(name, value)
    if not tensors:
        raise ValueError("update_weights: expected at least one tensor, got none")
    return tensors


def _as_tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.ndarray) and value.dtype in (np.float16, np.float32):
        return torch.from_numpy(np.require(value, requirements=["C", "W"]))
    got = f"numpy {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ValueError(
        f"update_weights: {name}: expected a torch tensor, or a numpy array of float16 or float32, "
        f"got {got}"
    )


def _as_checkpoint(tensors: Mapping[str, torch.Tensor]) -> CheckpointDir:
    stored = {
        name: Stored(
            "tensor",
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            math.prod(tensor.shape) * tensor.element_size(),
        )
        for name, tensor in tensors.items()
    }
    return CheckpointDir(_NAMED, "the pairs", stored, "")


__all__ = ["CheckpointError", "WeightUpdate", "prepare_update"]
