"""New weights into a restored run: torch converts them, and is imported only when they come.

A graph that was restored reads weights at the addresses that it was captured with, as a captured
one does, and knows nothing of their values; so does a key that is built later. The golden step of
a load was compared before any of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capture_cache.arena import DeviceArena
from graphs.model_config import ModelConfig
from graphs.step_config import StepConfig

if TYPE_CHECKING:
    import torch

    from graphs.weight_update import WeightUpdate

_NEEDS = "update_weights() in a restored run converts tensors with torch and safetensors"
_REMEDY = (
    "install a CUDA build of torch, or pack the new weights elsewhere with python -m runtime.pack "
    "and load again"
)


class PlayerUpdate:
    """Checked weights over a device arena.

    Args:
        ordinal: of the arena's device, whose primary context is current.
    Raises:
        ValueError: not this model's tensors, or not finite; or torch is not installed.
    """

    def __init__(
        self,
        source: str | Path | Iterable[tuple[str, Any]],
        arena: DeviceArena,
        model: ModelConfig,
        step: StepConfig,
        ordinal: int,
    ) -> None:
        try:
            from graphs.weight_update import prepare_update
        except ModuleNotFoundError as error:
            raise ValueError(f"{_NEEDS}, and {error.name} is not installed; {_REMEDY}") from error
        self._ordinal = ordinal
        try:
            views = weight_views(arena, ordinal)
            self._update: WeightUpdate = prepare_update(
                source, model, views, ep_rank=step.ep_rank, ep_size=step.ep_size
            )
        except BaseException:
            self._let_go()
            raise
        self.shared_digest = self._update.shared_digest

    def apply(self) -> None:
        """Write all of it where the old weights are; waits."""
        self._update.apply()
        self._let_go()

    def discard(self) -> None:
        """Write nothing, and let go of the source."""
        self._update.discard()
        self._let_go()

    def _let_go(self) -> None:
        """Wait, and give back what torch has taken for itself beside the arena."""
        import torch

        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._ordinal)
            torch.cuda.empty_cache()


def weight_views(arena: DeviceArena, ordinal: int) -> dict[str, torch.Tensor]:
    """The arena's weights as tensors on their device. Raises ValueError: torch cannot reach it."""
    import torch

    from graphs.devices import bind_views

    if not torch.cuda.is_available():
        raise ValueError(f"{_NEEDS}, and torch {torch.__version__} sees no GPU here; {_REMEDY}")
    views = bind_views(arena, arena.layout, f"cuda:{ordinal}")
    places = arena.layout.places
    return {p.entry.name: views[p.entry.name] for p in places if p.entry.section == "weights"}
