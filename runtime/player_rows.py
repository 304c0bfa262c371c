"""Rows put into the decode phase by the host, as `kernels.triton.intake_rows` does on the device.

For benchmarks: a restored runtime has no torch to write row state with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.triton.state import (
    ADMIT_BIASES,
    ADMIT_HEADER,
    ADMIT_LIMIT,
    ADMIT_SEED,
    ADMIT_SEQUENCES,
    ADMIT_STOPS,
    DECODE,
    MAX_STOP_LENGTH,
    PARAMS,
)
from runtime.row_params import Admission

Edit = Callable[[str], AbstractContextManager[NDArray[Any]]]


def adopt_rows(edit: Edit, length: int, rows: Mapping[int, tuple[Admission, list[int]]]) -> None:
    """Admit rows without a deadline, `length` tokens in their pages.

    Args:
        edit: by name of a buffer, a host copy of it that is written back at the end.
        rows: what each was admitted with, and its pages.
    """
    index = list(rows)
    for name, value in (("phase", DECODE), ("seq_len", length), ("last_token", 0)):
        with edit(name) as data:
            data[index] = value
    with edit("deadline_ns") as data:
        data[index] = 0
    records = {row: _split(admitted.record) for row, (admitted, _) in rows.items()}
    with edit("limit") as data:
        for row, (admitted, _) in rows.items():
            data[row] = admitted.record[ADMIT_LIMIT]
    with edit("row_params") as data:
        for row, lists in records.items():
            data[:, row] = lists["row_params"]
    with edit("seed") as data:
        for row, (admitted, _) in rows.items():
            data[row] = admitted.record[ADMIT_SEED : ADMIT_SEED + 2]
    for name, rest in (("stop_ids", -1), ("bias_ids", -1), ("bias_values", 0)):
        _fill(edit, name, {row: lists[name] for row, lists in records.items()}, rest)
    _fill(edit, "stop_sequences", {r: lists["stop_sequences"] for r, lists in records.items()}, -1)
    with edit("tail") as data:
        data[index] = -1
    with edit("page_table") as data:
        for row, (_, held) in rows.items():
            data[row, : len(held)] = held


def _split(record: NDArray[np.int32]) -> dict[str, NDArray[Any]]:
    """The lists of an admit record, by the buffer that they go to."""
    biases, sequences = int(record[ADMIT_BIASES]), int(record[ADMIT_SEQUENCES])
    sizes = {
        "row_params": PARAMS,
        "stop_ids": int(record[ADMIT_STOPS]),
        "bias_ids": biases,
        "bias_values": biases,
        "stop_sequences": sequences * MAX_STOP_LENGTH,
    }
    at, lists = ADMIT_HEADER, dict[str, NDArray[Any]]()
    for name, size in sizes.items():
        lists[name] = record[at : at + size]
        at += size
    lists["bias_values"] = lists["bias_values"].view(np.float32)
    return lists


def _fill(edit: Edit, name: str, values: Mapping[int, NDArray[Any]], rest: int) -> None:
    with edit(name) as data:
        for row, line in values.items():
            data[row] = rest
            data[row, : len(line)] = line
