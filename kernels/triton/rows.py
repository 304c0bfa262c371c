"""The row state on the device as one argument of the kernels that keep it.

Layouts and constants: `kernels.triton.state`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True)
class RowState:
    """Tensors of all rows; R is `max_rows`.

    Attributes:
        phase, seq_len, last_token, limit: int32 [R]; free/prefill/decode, tokens in the KV cache,
            the token to feed next, total tokens at which the row ends.
        page_table: int32 [R, max_pages]; 0 is the null page.
        stop_ids: int32 [R, stops], -1 where unused.
        row_params: int32 [PARAMS, param_pitch(R)], line `P_*`; reals as their bits.
        seed: int32 [R, 2], low and high word.
        deadline_ns: int64 [R], device time; 0 is none.
        bias_ids, bias_values: int32 and fp32 [R, MAX_BIASES], id -1 where unused; not read unless
            the row has a P_BIAS_COUNT.
        stop_sequences: int32 [R, MAX_STOP_SEQUENCES * MAX_STOP_LENGTH], right-aligned behind -1;
            the first P_SEQUENCES count.
        tail: int32 [R, MAX_STOP_LENGTH], the last output tokens at position % MAX_STOP_LENGTH, -1
            before there were any; kept for rows with stop sequences.
        mask_step: int32 [R], the step whose mailbox brought the row a token mask.
    """

    phase: torch.Tensor
    seq_len: torch.Tensor
    last_token: torch.Tensor
    limit: torch.Tensor
    page_table: torch.Tensor
    stop_ids: torch.Tensor
    row_params: torch.Tensor
    seed: torch.Tensor
    deadline_ns: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_sequences: torch.Tensor
    tail: torch.Tensor
    mask_step: torch.Tensor

    @classmethod
    def of(cls, buffers: Mapping[str, torch.Tensor]) -> RowState:
        """Of buffers that bear these names."""
        return cls(**{name: buffers[name] for name in cls.names()})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls))

    def param(self, line: int) -> torch.Tensor:
        """One parameter of all rows: int32 [R], a view."""
        return self.row_params[line, : self.phase.shape[0]]

    def real(self, line: int) -> torch.Tensor:
        """One real parameter of all rows: fp32 [R], a view."""
        return self.param(line).view(torch.float32)
