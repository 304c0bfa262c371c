"""What `--model` names: a Hugging Face directory or a preset."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capture_cache.dataclass import dataclass
from graphs.hf_config import check_architecture, token_ids
from graphs.model_config import ModelConfig
from graphs.presets import PRESETS
from graphs.safetensors_dir import (
    CONFIG_FILE,
    CheckpointError,
    checkpoint_digest,
    config_digest,
    has_weights,
    open_checkpoint,
    read_config,
    read_json,
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights come from.

    Attributes:
        name: as the user gave it.
        path: the checkpoint directory; None for a preset, whose weights are random.
    """

    name: str
    path: Path | None

    @property
    def is_preset(self) -> bool:
        return self.path is None


def resolve_model(
    model: str | Path,
    *,
    layers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ModelConfig, ModelSource]:
    """Find a model and read its config; reads no weights.

    The stop ids of a directory are those of its `generation_config.json` where it has one, as
    transformers' `generate` takes them, else those of `config.json`.

    Args:
        model: a directory, or a name of `PRESETS`. `./tiny` is a directory, always.
        layers: run only the first so many layers.
        overrides: HF config keys that replace the model's own; see `parse_overrides`.
    Raises:
        ValueError: neither a directory nor a preset, or both, or packed weights of a preset.
        CheckpointError: a directory without a readable config.
        UnsupportedModel: a model that the step does not compute, or a wrong override.
    """
    name, path = str(model), Path(model)
    is_dir = path.exists()
    if name in PRESETS and isinstance(model, str):
        if (path / CONFIG_FILE).exists():
            raise ValueError(f"model {name!r} is a preset and a directory; write ./{name} for that")
        cfg = ModelConfig.from_hf(PRESETS[name], layers=layers, overrides=overrides)
        return cfg, ModelSource(name, None)
    if not is_dir:
        problem = (
            f"model: expected a directory or one of the presets {', '.join(PRESETS)}, got {name!r}"
        )
        if _HUB_ID.fullmatch(name):
            problem += (
                f"; if that is a Hugging Face id, `hf download {name}` first and give the "
                "directory that it prints"
            )
        raise ValueError(problem)
    if not (path / CONFIG_FILE).exists():
        _refuse_packed_preset(path)
    hf = read_config(path)
    # Before the weights are looked at: what they lack says less than that this is another model.
    check_architecture(hf | dict(overrides or {}))
    if not hf.get("dtype") and not hf.get("torch_dtype"):
        hf["dtype"] = _stored_dtype(path)
    if (path / GENERATION_FILE).exists():
        generation = read_json(path, GENERATION_FILE, "download it again, or remove it")
        if token_ids(generation, "eos_token_id"):
            hf["eos_token_id"] = generation["eos_token_id"]
    return ModelConfig.from_hf(hf, layers=layers, overrides=overrides), ModelSource(name, path)


def _refuse_packed_preset(path: Path) -> None:
    """Raises ValueError with the options that a preset's packed weights go with."""
    from capture_cache.packed import PackedWeights, is_packed

    if not is_packed(path):
        return
    facts = dict(PackedWeights(path).index.identity.fields)
    raise ValueError(
        f"model: {path} holds packed weights of the preset {facts.get('source')!r}, which has no "
        f"{CONFIG_FILE}; give --model {facts.get('source')} --seed {facts.get('seed')} --weights "
        f"{path}, with the --layers ({facts.get('layers')}) and --override it was packed with"
    )


def model_digest(path: str | Path, *, weights_elsewhere: bool = False) -> str:
    """A cheap identity of a checkpoint: sha256 of its config, index, shard names, sizes, headers.

    It changes with every re-layout of the weights, but not with the bytes of a tensor alone: those
    are `graphs.checkpoint_content`.

    Packed weights have the digest of the checkpoint that they were made from.

    Args:
        weights_elsewhere: where the directory has none, its config alone counts.

    Raises:
        CheckpointError: the directory is not a whole checkpoint.
        CorruptBundle: it holds packed weights, and they are damaged.
    """
    from capture_cache.packed import PackedWeights, is_packed  # a preset needs neither

    if not is_packed(Path(path)):
        if weights_elsewhere and not has_weights(Path(path)):
            return config_digest(Path(path))
        return checkpoint_digest(Path(path))
    packed = PackedWeights(path)
    packed.check_small()
    return str(dict(packed.index.identity.fields)["source"])


def _stored_dtype(path: Path) -> str:
    """The embedding's type: what a config that names none was saved in."""
    from capture_cache.packed import PackedWeights, is_packed

    if is_packed(path):
        stored = PackedWeights(path).index.stored_dtype
        if stored is not None:
            return stored
        problem = f"{CONFIG_FILE}: expected dtype or torch_dtype, got neither"
        raise CheckpointError(path, [problem], "pack the checkpoint again")
    embed = open_checkpoint(path).tensors.get("model.embed_tokens.weight")
    if embed is None:
        problem = f"{CONFIG_FILE}: expected dtype or torch_dtype, got neither"
        raise CheckpointError(path, [problem], "run with --override dtype=bfloat16")
    return embed.dtype
