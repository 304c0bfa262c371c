"""What tests of checkpoints share: one made by transformers, loaded or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphs.checkpoint import CheckpointError, LoadReport, load_checkpoint, resolve_model
from graphs.model_config import ModelConfig
from tests.cpu.checkpoints import (
    Tensors,
    empty_views,
    random_model,
    read_tensors,
    save_model,
    small_config,
    write_tensors,
)

GATE = "model.layers.2.mlp.experts.5.gate_proj.weight"
O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def make(path: Path, *, max_shard_size: str = "5GB", **changes: Any) -> Path:
    return save_model(path, random_model(small_config(**changes)), max_shard_size=max_shard_size)


def load(
    path: Path, *, ep_rank: int = 0, ep_size: int = 1, **options: Any
) -> tuple[ModelConfig, Tensors, LoadReport]:
    cfg, source = resolve_model(str(path), **options)
    assert source.path is not None
    views = empty_views(cfg, ep_size=ep_size)
    report = load_checkpoint(source.path, cfg, views, ep_rank=ep_rank, ep_size=ep_size)
    for name, view in views.items():
        assert view.float().isfinite().all(), f"{name} was not filled"
    return cfg, views, report


def assert_same(state: Tensors, expected: Tensors) -> None:
    for name, value in state.items():
        assert torch.equal(value.float(), expected[name].float()), name


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> None:
    """Rewrite the directory as one file after `change`."""
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)


def refused(path: Path, **options: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as info:
        load(path, **options)
    return info.value
