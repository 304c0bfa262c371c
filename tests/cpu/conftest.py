"""CPU tests: Triton kernels run in its interpreter, torch on one thread."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's directory; tests may put a store into it."""
    from tests.cpu.twins import micro_checkpoint  # with transformers, which few tests need

    return micro_checkpoint(tmp_path_factory.mktemp("micro"))


@pytest.fixture
def terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Where commands are run, over a store of the test's own."""
    from tests.cpu.terminal import Terminal

    return Terminal(tmp_path / "store", capsys)


@pytest.fixture(autouse=True)
def _hardware_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round as the hardware does: the interpreter truncates bf16 and loses carries in e4m3."""
    from triton.runtime import interpreter

    exact = interpreter._convert_float

    def convert(data: Any, src: Any, dst: Any, mode: Any) -> Any:
        if str(src) != "fp32" or str(dst) not in ("bf16", "fp8e4nv"):
            return exact(data, src, dst, mode)
        value = torch.from_numpy(np.ascontiguousarray(data))
        if str(dst) == "bf16":
            return value.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return value.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
