"""The house rules on imports: only the arrows of the picture, and no CUDA before it is asked for.

The picture is in DESIGN.md; an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("runtime", "graphs", "barriers", "kernels", "capture_cache", "bench")
# package → our packages that it may import, beside itself
ARROWS = {
    "bench": {"runtime", "graphs", "barriers", "kernels", "capture_cache"},
    "runtime": {"graphs", "barriers", "kernels", "capture_cache"},
    "graphs": {"barriers", "kernels", "capture_cache"},
    "barriers": {"kernels", "capture_cache"},
    "kernels": set[str](),
    "capture_cache": set[str](),
}
# package → the only libraries that it may import, beside the standard one
LIBRARIES = {"kernels": {"torch", "triton"}, "capture_cache": {"numpy", "cuda"}}


def imported(source: str, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in `source`, lazy and by name included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level]
            yield node.lineno, ".".join([*base, node.module or ""]).strip(".")
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def violations(package: str, source: str, module: str) -> list[str]:
    """The imports of one file that are not in the picture."""
    found = []
    for line, name in imported(source, module):
        top = name.split(".")[0]
        if top == package or top in sys.stdlib_module_names:
            continue
        ours = top in (*PACKAGES, "tests")
        allowed = top in ARROWS[package] if ours else top in LIBRARIES.get(package, {top})
        if not allowed:
            found.append(f"{module}:{line} imports {name}: {package} may not import {top}")
    return found


def modules(package: str) -> list[tuple[str, Path]]:
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in paths]
    return list(zip(names, paths, strict=True))


def _existing(package: str) -> list[tuple[str, Path]]:
    found = modules(package)
    if not found:
        pytest.skip(f"package {package} does not exist yet")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_picture(package: str) -> None:
    found = [
        v for name, path in _existing(package) for v in violations(package, path.read_text(), name)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("kernels", "import capture_cache.store"),
        ("kernels", "def f():\n    from graphs import step"),
        ("kernels", "import numpy"),
        ("capture_cache", "def f():\n    import torch.cuda"),
        ("capture_cache", "import importlib\nimportlib.import_module('triton.language')"),
        ("capture_cache", "__import__('kernels.triton')"),
        ("graphs", "from runtime.config import RuntimeConfig"),
        ("barriers", "from graphs import step"),
        ("runtime", "import bench"),
        ("bench", "from tests.cpu import conftest"),
    ],
)
def test_the_walk_finds_forbidden_arrows(package: str, source: str) -> None:
    assert violations(package, source, f"{package}.module")


def test_the_walk_resolves_relative_imports() -> None:
    source = "from ..triton import launch\nfrom . import norm"
    names = [name for _, name in imported(source, "kernels.triton.linear")]
    assert names == ["kernels.triton", "kernels.triton"]
    assert not violations("kernels", source, "kernels.triton.linear")


def _import_in_fresh_process(packages: tuple[str, ...], then: str) -> None:
    found = [name for package in packages for name, _ in modules(package)]
    names = [n.removesuffix(".__init__") for n in found if not n.endswith("__main__")]
    program = f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
    done = subprocess.run(
        [sys.executable, "-c", program + then],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_everything_initialises_no_cuda() -> None:
    then = "import torch\nassert not torch.cuda.is_initialized()"
    _import_in_fresh_process(PACKAGES, then)


def test_the_ranks_of_a_restored_run_load_no_compiler() -> None:
    code = "import sys, runtime.restore, runtime.player_ranks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "barriers.device_watch" in loaded, done.stderr
    assert not loaded & {"torch", "triton", "capture_cache.nvrtc", "importlib.resources"}


def test_the_players_package_loads_neither_torch_nor_the_driver() -> None:
    then = """
assert not {"torch", "triton"} & set(sys.modules), "torch or triton was imported"
assert "libcuda.so" not in open("/proc/self/maps").read(), "the CUDA driver was loaded"
"""
    _import_in_fresh_process(("capture_cache",), then)


FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def unsafe(source: str, module: str) -> list[str]:
    """What could run code out of a file: readers of objects, evaluated text, `torch.load`."""
    found = [
        f"{module}:{line} imports {name}"
        for line, name in imported(source, module)
        if name.split(".")[0] in FORBIDDEN_MODULES
    ]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{module}:{node.lineno} calls {node.func.id}")
        loads = isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "loads")
        plain = any(
            k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords
        )
        if loads and not plain and ast.unparse(node.func).split(".")[0] in ("torch", "np", "numpy"):
            found.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
    return found


def test_nothing_that_is_read_from_disk_can_run_code() -> None:
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            found += unsafe(path.read_text(), str(path.relative_to(ROOT)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    ["import pickle", "eval(x)", "torch.load(p)", "np.load(p)", "from marshal import loads"],
)
def test_code_out_of_a_file_is_noticed(source: str) -> None:
    assert unsafe(source, "m")
