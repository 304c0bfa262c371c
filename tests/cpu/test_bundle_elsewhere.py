"""A bundle outlives what made it: another directory, another tree, no torch, other hands."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from capture_cache.bundle import PROGRAM_FILE
from capture_cache.manifest import FileRecord, seal, unseal
from capture_cache.store import Store
from runtime.config import RuntimeConfig
from runtime.opening import NotRestored
from runtime.restore import restore
from tests.cpu.played import OPTIONS, Gpu, publish_bundle
from tests.cpu.test_robustness import DAMAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("barriers", "capture_cache", "graphs", "kernels", "runtime", "tests")
PROGRAM = """
import json, sys
from runtime import Runtime, SamplingParams
from runtime.config import RuntimeConfig
from runtime.restore import restore
from tests.cpu.played import Gpu
assert runtime_file(__import__("runtime")), "another tree was imported"
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is here: this shows nothing")
with Runtime(restore(RuntimeConfig.of(**json.loads(sys.argv[1])), lib=Gpu())) as runtime:
    runtime.add([1], SamplingParams(max_tokens=2))
    runtime.step()
    print("played", runtime.loaded_from)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    publish_bundle(root)
    return root


@pytest.fixture
def path(published: Path, tmp_path: Path) -> Path:
    """A bundle in a store of this test's own, `tmp_path`."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    return next(p for p in tmp_path.iterdir() if len(p.name) == 64)


def options(root: Path, **changes: object) -> RuntimeConfig:
    return RuntimeConfig.of(**(OPTIONS | {"store": str(root)} | changes))


def test_a_store_that_was_moved_is_played(tmp_path: Path) -> None:
    publish_bundle(tmp_path / "first")
    (tmp_path / "deeper").mkdir()
    moved = (tmp_path / "first").rename(tmp_path / "deeper" / "second")
    restore(options(moved), lib=Gpu()).close()


def test_a_copied_tree_without_torch_plays_a_copied_bundle(tmp_path: Path) -> None:
    """Neither the tree that captured nor its virtual environment is there any more."""
    publish_bundle(tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    shutil.rmtree(tmp_path / "store")
    tree, site = tmp_path / "tree", tmp_path / "site"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    site.mkdir()
    found = importlib.metadata.distribution("numpy")
    for part in {Path(str(f)).parts[0] for f in found.files or () if ".." not in str(f)}:
        (site / part).symlink_to(Path(str(found.locate_file(part))))
    check = f"runtime_file = lambda m: m.__file__.startswith({str(tree)!r})\n"
    chosen = json.dumps(OPTIONS | {"store": str(tmp_path / "copy")})
    done = subprocess.run(
        # The interpreter below the virtual environment, and nobody's packages but numpy.
        [os.path.realpath(sys.executable), "-S", "-c", check + PROGRAM, chosen],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tree}:{site}", "HOME": str(tmp_path), "PATH": os.defpath},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "played bundle" in done.stdout


class OtherChip(Gpu):
    """The same machine with another GPU in it."""

    def cuDeviceGetAttribute(self, out: int, which: int, ordinal: int) -> None:
        super().cuDeviceGetAttribute(out, which, ordinal)
        if which == 75:
            ctypes.c_int.from_address(out).value = 10


class OtherDriver(Gpu):
    """The same machine after an update."""

    def cuDriverGetVersion(self, out: int) -> None:
        super().cuDriverGetVersion(out)
        ctypes.c_int.from_address(out).value = 13010


@pytest.mark.parametrize(
    ("gpu", "message"),
    [(OtherChip, "compute capability 9.0 → 10.0"), (OtherDriver, r"driver .*13\.0\) → .*13\.1\)")],
)
def test_a_bundle_of_another_chip_or_driver_is_told(
    path: Path, tmp_path: Path, gpu: type[Gpu], message: str
) -> None:
    made = gpu()
    with pytest.raises(NotRestored, match=message):
        restore(options(tmp_path), lib=made)
    assert "cuGraphInstantiateWithFlags" not in made.calls


FILES = ("program", "cubin", "graph/t1r1", "graph/t8r2", "golden/t1r1", "manifest.json")


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "older"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_bundle_is_never_played(
    path: Path, tmp_path: Path, name: str, how: str
) -> None:
    if how == "another's" and os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    file = next((path / "cubin").iterdir()) if name == "cubin" else path / name
    DAMAGES[how](file)
    gpu = Gpu()
    with pytest.raises(NotRestored) as refusal:
        restore(options(tmp_path), lib=gpu)
    assert refusal.value.replace
    assert len(str(refusal.value)) > 20
    assert not gpu.launched, "a kernel ran"
    assert not gpu.mapped


def resealed(path: Path, change: Callable[[Path], object]) -> None:
    """Change a bundle and give it the right sizes and hashes again, as an attacker would."""
    change(path)
    record = unseal((path / "manifest.json").read_bytes(), path)
    for name in record["files"]:
        made = FileRecord.of((path / name).read_bytes())
        record["files"][name] = {"bytes": made.nbytes, "sha256": made.sha256}
    record.pop("schema", None)
    (path / "manifest.json").write_bytes(seal(record))


def swap(one: str, other: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        a, b = (path / one).read_bytes(), (path / other).read_bytes()
        (path / one).write_bytes(b)
        (path / other).write_bytes(a)

    return change


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("graph/t1r1", "graph/t2r2", r"expected \(tokens, rows\) \(1, 1\), got \(2, 2\)"),
        ("golden/t1r1", "golden/t2r2", r"expected \(tokens, rows\) \(1, 1\), got \(2, 2\)"),
        ("graph/t1r1", "golden/t1r1", "expected it to begin with"),
        ("graph/t1r1", "graph/weights0", "did not finish"),  # a graph, and no step
        ("program", "data/rope_table", "expected it to begin with"),
    ],
)
def test_files_that_changed_places_are_refused_behind_right_hashes(
    path: Path, tmp_path: Path, one: str, other: str, message: str
) -> None:
    resealed(path, swap(one, other))
    assert Store(tmp_path).entries()[0].problem is None
    with pytest.raises(NotRestored, match=message) as refusal:
        restore(options(tmp_path, deadline_s=0.2), lib=Gpu())
    assert refusal.value.replace


def test_swapped_later_keys_are_refused_by_the_step_that_wants_them(
    path: Path, tmp_path: Path
) -> None:
    resealed(path, swap("graph/t2r2", "graph/t8r2"))
    player = restore(options(tmp_path), lib=Gpu())
    with pytest.raises(Exception, match=r"expected \(tokens, rows\) \(2, 2\), got \(8, 2\)"):
        player.keys.wait()
    player.close()
    with pytest.raises(NotRestored, match=r"expected \(tokens, rows\) \(2, 2\), got \(8, 2\)"):
        restore(options(tmp_path, check_keys="all"), lib=Gpu())


def test_every_byte_of_every_struct_counts(path: Path, tmp_path: Path) -> None:
    """A flipped byte of the program, of a graph or of a golden step never reaches the driver."""
    names = [PROGRAM_FILE, "graph/t1r1", "graph/t2r2", "golden/t1r1", "graph/weights0"]
    facts = Store(tmp_path).entries()[0].manifest
    assert facts is not None
    checked = 0
    for name in names:
        good = (path / name).read_bytes()
        for at in range(len(good)):
            bad = bytearray(good)
            bad[at] ^= 1 << (at % 8)
            (path / name).write_bytes(bad)
            with pytest.raises(Exception, match="expected sha256"):
                Store(tmp_path).load(facts.fingerprint)
            checked += 1
        (path / name).write_bytes(good)
    assert checked > 1000
    assert Store(tmp_path).load(facts.fingerprint) is not None
