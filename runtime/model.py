"""The model that options name, as this number of ranks runs it; without torch."""

from __future__ import annotations

import dataclasses

from graphs.model_config import ModelConfig, parse_overrides
from graphs.model_source import ModelSource, resolve_model
from runtime.config import RuntimeConfig


def model_of(options: RuntimeConfig) -> tuple[ModelConfig, ModelSource]:
    """Raises as `resolve_model`; and ValueError for a head that cannot be shared."""
    model, source = resolve_model(
        options.model, layers=options.layers, overrides=parse_overrides(options.overrides)
    )
    return with_head(model, options), source


def with_head(model: ModelConfig, options: RuntimeConfig) -> ModelConfig:
    """The model with its head as `options.head` has it: whole on every rank, or shared.

    Raises:
        ValueError: the head is the embedding, which every rank needs whole.
    """
    if options.head == "whole" or options.num_ranks == 1:
        return model
    if model.tie_word_embeddings:
        raise ValueError(
            f"--head sharded: the head of {options.model} is its embedding, which every rank needs "
            "whole; leave it at whole"
        )
    return dataclasses.replace(model, head_shards=options.num_ranks)
