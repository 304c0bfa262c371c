"""The benchmark of prompts and cached prefixes, on the twin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import prefill


def test_chunks_are_timed_and_a_repeated_prompt_comes_from_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--model tiny --layers 1 --bs 2 --device cpu --max-seq-len 256 --ladder 1,2,2+16"
    words += " --ctx-len 32 --prompt-len 150 --repeats 1 --json --store"
    assert prefill.main([*words.split(), str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert {"chunks", "whole prompts"} <= {line[11:] for line in captured.err.splitlines()}
    report = json.loads(captured.out.splitlines()[-1])
    (chunk,) = report["chunks"]
    assert chunk["chunk_tokens"] == 17
    assert chunk["step_us"] > 0
    (case,) = report["prefix"]
    assert case["new"]["token"] == case["again"]["token"]
    assert (case["new"]["pages_found"], case["again"]["pages_found"]) == (0, 2)
    assert case["again"]["steps"] < case["new"]["steps"]


def test_nothing_to_time_is_refused() -> None:
    with pytest.raises(ValueError, match="--prompt-len of at least 2, got 3 and 1"):
        prefill.main(["--model", "tiny", "--prompt-len", "1"])


def test_lengths_beyond_the_longest_row_are_refused_by_the_options_that_gave_them() -> None:
    with pytest.raises(ValueError, match=r"--ctx-len 2000, --prompt-len 9: expected 1 … 254 and"):
        prefill.main(["--model", "tiny", "--max-seq-len", "256", "--prompt-len", "9"])
