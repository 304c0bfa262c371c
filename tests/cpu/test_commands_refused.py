"""What commands refuse: with what exit code, in what words, and before which work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import prefill, sampling_cost
from capture_cache.files import Files
from capture_cache.store import Store
from runtime import build, capture, generate, replay_bench, restore_bench
from runtime.bundle_names import GRAPHS
from tests.cpu.checkpoints import edit_config, read_tensors, write_tensors
from tests.cpu.terminal import ROOT, Terminal, small
from tests.cpu.twins import micro_checkpoint

Command = Callable[[list[str] | None], int]
REFUSED: dict[str, tuple[list[str], str]] = {
    "no rows": (["--bs", "0"], "bs must be at least 1, got 0"),
    "rows are no number": (["--bs", "many"], "invalid int value: 'many'"),
    "ladder too short": (["--bs", "4"], "the largest entry must be 4 (--bs divided by --ep-size)"),
    "ladder malformed": (["--ladder", "1,2x"], "ladder entry '2x' is neither ROWS nor"),
    "ladder empty": (["--ladder", ""], "the ladder is empty"),
    "too long": (["--max-seq-len", "4096"], "max_seq_len 4096 exceeds the model's 512 positions"),
    "page size": (["--page-size", "48"], "page_size must be a power of two"),
    "pages": (["--num-pages", "1"], "num_pages must be at least"),
    "no pages": (["--num-pages", "0"], "num_pages must be at least"),
    "layers": (["--layers", "3"], "layers: expected 1 … 2"),
    "no layers": (["--layers", "0"], "got 0; leave --layers out to run all"),
    "override": (["--override", "n_experts=4"], "n_experts"),
    "override form": (["--override", "n_group"], "n_group"),
    "device": (["--device", "tpu"], "invalid choice: 'tpu'"),
    "cuda": (["--device", "cuda"], "--device cuda: torch sees no CUDA device"),
    "flashinfer": (["--attention", "flashinfer"], "--attention flashinfer needs a CUDA device"),
    "hopper": (["--attention", "hopper"], "--attention hopper needs a CUDA device"),
    "ranks": (["--ep-size", "2"], "--ep-size 2"),
    "uneven ranks": (["--bs", "2", "--ep-size", "4"], "must divide by ep_size 4; use --bs 4"),
    "model": (["--model", "deepseek-v4"], "presets tiny, moonlight, deepseek-v3, kimi-k2"),
    "chip": (["--compile-only", "sm_80"], "--compile-only takes sm_90 (Hopper) or sm_100"),
    "jobs": (["--jobs", "2"], "--jobs goes with --compile-only"),
    "replays": (["--proof-replays", "0"], "replay"),
    "replays unproved": (["--no-verify", "--proof-replays", "9"], "--proof-replays"),
    "deadline": (["--deadline-ms", "0"], "deadline_s (--deadline-ms) must be more than 0, got 0"),
    "unknown": (["--max-batch", "4", "--frobnicate"], "--frobnicate"),
    "two spellings": (["--max-model-len", "48"], "--max-model-len"),
    "two models": (["--model-path", "tiny"], "--model"),
    "choices nowhere": (["--save-kernels", "/nowhere/kernels.json"], "/nowhere is no folder"),
    "choices in a folder": (["--save-kernels", "/tmp"], "--save-kernels /tmp cannot be written"),
    "no weights": (["--weights", "/nowhere"], "with weights.json in it, got nothing; python -m"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_end_with_2_and_the_reason(
    name: str, checkpoint: Path, terminal: Terminal
) -> None:
    more, reason = REFUSED[name]
    assert terminal.run(capture.main, *small(checkpoint, *more)) == 2
    assert reason in terminal.err
    assert terminal.err.count("\n") == 1, "refused only after work had begun"
    assert "Traceback" not in terminal.err


@pytest.mark.parametrize(
    ("files", "got"),
    [
        ((), "got a directory without it; python -m runtime.pack makes them"),
        (("config.json",), "got a checkpoint; give that as --model, or pack it"),
        (("x.safetensors",), "got a checkpoint; give that as --model, or pack it"),
    ],
)
def test_weights_that_are_no_packed_ones_are_told_what_they_are(
    files: tuple[str, ...], got: str, checkpoint: Path, tmp_path: Path, terminal: Terminal
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    folder.chmod(0o777)  # as /tmp; what is missing is said first
    for name in files:
        (folder / name).write_text("{}")
    assert terminal.run(capture.main, *small(checkpoint, "--weights", str(folder))) == 2
    assert got in terminal.error


@pytest.mark.parametrize("command", [capture, replay_bench], ids=lambda m: m.__name__)
def test_a_store_that_cannot_be_written_is_refused_before_the_work(
    command: Any, checkpoint: Path, tmp_path: Path, terminal: Terminal
) -> None:
    terminal.store = tmp_path / "file" / "store"
    (tmp_path / "file").write_text("in the way")
    more = ("--ctx-len", "20", "--steps", "2") if command is replay_bench else ()
    assert terminal.run(command.main, *small(checkpoint, *more)) == 1
    assert terminal.error.startswith("error: StoreError: ")
    assert "--store" in terminal.error
    assert "warm up" not in terminal.err


def test_a_capture_on_record_needs_no_store_that_can_be_written(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert terminal.run(capture.main, *small(checkpoint, "--no-verify")) == 0

    _make_read_only(monkeypatch)
    assert terminal.run(capture.main, *small(checkpoint, "--no-verify")) == 0
    argv = small(checkpoint, "--no-verify", "--num-pages", "9")  # another, and not on record
    assert terminal.run(capture.main, *argv, "--seed", "1", "--max-seq-len", "48") == 1
    assert "it is read-only: give another directory with --store" in terminal.error
    assert "warm up" not in terminal.err


def test_a_record_without_graphs_is_not_enough_for_a_capture_that_stores_some(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = small(checkpoint, "--no-verify")
    assert terminal.run(capture.main, *argv, "--no-bundle") == 0
    _make_read_only(monkeypatch)
    assert terminal.run(capture.main, *argv, "--no-bundle") == 0
    assert terminal.run(capture.main, *argv) == 1
    assert "it is read-only: give another directory with --store" in terminal.error
    assert "warm up" not in terminal.err


def test_other_kernels_than_those_on_record_are_refused_before_the_capture(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a capture takes is known once they are chosen, and not before."""
    argv = small(checkpoint, "--no-verify", "--no-bundle")
    assert terminal.run(capture.main, *argv) == 0
    monkeypatch.setattr(build, "_kernels_of", lambda _: ("another", "choice"))
    _make_read_only(monkeypatch)
    assert terminal.run(capture.main, *argv) == 1
    assert "it is read-only: give another directory with --store" in terminal.error
    assert "warm up" not in terminal.err


def test_a_capture_without_a_bundle_leaves_the_one_on_record(
    checkpoint: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = small(checkpoint, "--no-verify", "--no-bundle", "--json")
    assert terminal.run(capture.main, *argv) == 0
    store = Store(terminal.store)
    (found,) = store.entries()
    assert found.manifest is not None
    graphs = replace(found.manifest, restore={"kind": GRAPHS}, files={})
    store.publish(graphs.fingerprint, graphs, {}, replace_existing=True)
    monkeypatch.setattr(build, "_kernels_of", lambda _: ("another", "choice"))
    _make_read_only(monkeypatch)
    assert terminal.run(capture.main, *argv) == 0
    assert terminal.report["bundle"] == (
        "captured without a bundle, as asked; what is on record stays"
    )
    (kept,) = store.entries()
    assert kept.manifest is not None
    assert kept.manifest.restore == {"kind": GRAPHS}


def _make_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file system is: a mode would not keep the superuser out."""

    def refuse(self: Files, path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Files, "make_dir", refuse)


def test_an_error_with_a_name_of_ours_is_told_with_it(checkpoint: Path, terminal: Terminal) -> None:
    """In one form, whatever the exit code is: `error: NAME: message`."""
    assert terminal.run(capture.main, *small(checkpoint, "--layers", "0")) == 2
    assert terminal.error.startswith("error: UnsupportedModel: layers: ")
    assert terminal.run(capture.main, *small(checkpoint, "--bs", "0")) == 2
    assert terminal.error.startswith("error: bs must be at least 1")


@pytest.mark.parametrize(
    "module",
    [
        *("capture_cache", "bench.load_weights", "bench.rdep_barrier_ab"),
        *("bench.transport_microbench", "runtime.pack"),
    ],
)
def test_every_command_refuses_in_one_line(module: str) -> None:
    argv = [sys.executable, "-m", module, "--frobnicate"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith(f"; see python -m {module} --help\n")
    assert done.stderr.count("\n") == 1


# What a command refuses of its own options, beside the selection that all share.
OWN: list[tuple[Command, list[str], str]] = [
    (capture.main, ["--save-kernels", "/nowhere/k.json"], "/nowhere is no folder"),
    (replay_bench.main, ["--steps", "1"], "--steps 1: expected at least 2"),
    (replay_bench.main, ["--deadline-ms", "0"], "deadline_s (--deadline-ms) must be more than 0"),
    (replay_bench.main, ["--max-seq-len", "4096"], "exceeds the model's 512 positions"),
    (generate.main, ["--prompt", "x"], "tokenizer"),
    (restore_bench.main, ["--repeats", "0"], "--repeats 0: expected at least 1"),
    (prefill.main, ["--repeats", "0"], "--repeats of at least 1"),
    (sampling_cost.main, ["--rounds", "0"], "--rounds 0: expected at least 1"),
]


@pytest.mark.parametrize(("main", "argv", "reason"), OWN)
def test_a_commands_own_options_are_refused_to_the_other_ranks_too_and_once(
    main: Command,
    argv: list[str],
    reason: str,
    checkpoint: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr("runtime.config.tell_ranks", lambda why: told.append(why) or True)
    assert terminal.run(main, *small(checkpoint)[:-4], "--page-size", "16", *argv) == 2
    assert reason in terminal.error
    assert len(told) == 1
    assert told[0].startswith("ValueError: ")
    assert reason in told[0]


def break_architecture(path: Path) -> None:
    edit_config(path, lambda config: config.update(architectures=["LlamaForCausalLM"]))


def break_weights(path: Path) -> None:
    shard = path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def rename_a_tensor(path: Path) -> None:
    tensors = read_tensors(path)
    tensors["model.norm.wait"] = tensors.pop("model.norm.weight")
    write_tensors(path, tensors)


def remove_the_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (break_architecture, "LlamaForCausalLM"),
        (break_weights, "model.safetensors"),
        (rename_a_tensor, "model.norm.weight"),
        (remove_the_config, "config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_checkpoint_ends_with_2_and_names_what_is_wrong(
    break_it: Callable[[Path], None], reason: str, tmp_path: Path, terminal: Terminal
) -> None:
    path = micro_checkpoint(tmp_path / "model")
    break_it(path)
    assert terminal.run(capture.main, *small(path)) == 2
    assert reason in terminal.err


def test_a_failed_proof_ends_with_1(tmp_path: Path, terminal: Terminal) -> None:
    path = micro_checkpoint(tmp_path / "model")
    tensors = read_tensors(path)
    tensors["model.norm.weight"].fill_(3e38)
    write_tensors(path, tensors)
    assert terminal.run(capture.main, *small(path)) == 1
    assert terminal.error.startswith("error: ProofFailed: key ")
    assert "Traceback" not in terminal.err
