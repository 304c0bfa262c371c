"""A checkpoint as small as the step allows, and runtimes over it: for tests of the driver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kernels.triton.rows import RowState
from runtime import Runtime
from tests.cpu.checkpoints import random_model, save_model, small_config

VOCAB = 64
PAGE = 16  # the smallest that attention takes
ROWS = 6
MAX_SEQ_LEN = 96
LADDER = "1,2,4,6,6+10"


def micro_checkpoint(path: Path, *, seed: int = 1, **changes: Any) -> Path:
    """Two layers, one of them with experts; float32."""
    config = small_config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": None,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "eos_token_id": None,
        }
        | changes
    )
    model = random_model(config, seed=seed)
    model.generation_config.eos_token_id = config.eos_token_id
    return save_model(path, model)


def load_micro(path: Path, **options: Any) -> Runtime:
    """Six rows, keys with and without a prompt chunk; not proved, for other tests do that."""
    defaults: dict[str, Any] = {
        "bs": ROWS,
        "max_seq_len": MAX_SEQ_LEN,
        "page_size": PAGE,
        "ladder": LADDER,
        "store": str(path / "store"),
        "verify": False,
        "device": "cpu",
    }
    return Runtime.load(str(path), **(defaults | options))


def device_state(runtime: Runtime) -> dict[str, torch.Tensor]:
    """Copies of everything that a launch changes and a refusal must not."""
    b = runtime.engine.graphs.step.buffers
    names = (*RowState.names(), "step", "kv.0", "counts", "token_mask")
    return {name: b[name].clone() for name in names}
