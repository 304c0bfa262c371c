"""Whole runtimes on CPU ranks when one of them goes: named, closed, started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ep.runtime_faults import Supervisor


@pytest.mark.slow
def test_survivors_name_the_rank_and_the_same_ranks_start_again(tmp_path: Path) -> None:
    assert Supervisor(2, "cpu", str(tmp_path)).run(["kill", "stop", "reopen"]) == []
