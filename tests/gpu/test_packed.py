"""Packed weights on the device: the bytes of the checkpoint, damage found where it lies, speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gpu.conftest import Load
from tests.gpu.models import options_of
from tests.serving import make_requests, serve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed weights of a bf16 and an FP8 model."""
    from graphs.model_config import parse_overrides
    from graphs.model_source import resolve_model
    from runtime.packing import pack

    found = {}
    for name in ("bf16", "fp8"):
        chosen = options_of(name)
        overrides = parse_overrides(chosen["overrides"])
        model, source = resolve_model("tiny", layers=chosen["layers"], overrides=overrides)
        found[name] = tmp_path_factory.mktemp("packed") / name
        pack(model, source, found[name])
    return found


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_packed_weights_give_the_same_bits(name: str, load: Load, packed: dict[str, Path]) -> None:
    requests = make_requests(np.random.default_rng(3), (5, 70, 3, 130, 1, 40), 256, (12, 7))
    answers, weights = [], []
    for given in (None, str(packed[name])):
        with load(name, weights=given) as runtime:
            note = runtime.engine.weights_note
            assert ("packed" in note) == (given is not None), note
            answers.append(serve(runtime, requests))
            step = runtime.engine.graphs.step
            weights.append({n: v.cpu().view(torch.uint8) for n, v in step.weights.items()})
    assert answers[0] == answers[1]
    assert weights[0].keys() == weights[1].keys()
    for tensor, data in weights[0].items():
        assert data.equal(weights[1][tensor]), tensor


def test_packing_on_the_device_gives_the_same_files(
    tmp_path: Path, packed: dict[str, Path], launcher: Any
) -> None:
    from graphs.model_config import parse_overrides
    from graphs.model_source import resolve_model
    from runtime.packing import pack

    for name, path in packed.items():
        chosen = options_of(name)
        overrides = parse_overrides(chosen["overrides"])
        model, source = resolve_model("tiny", layers=chosen["layers"], overrides=overrides)
        out = tmp_path / name
        pack(model, source, out, device="cuda", launch=launcher)
        for file in sorted(path.iterdir()):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_devices_sum_is_the_hosts() -> None:
    from capture_cache.checksum import device_sums, sum64, sum64_code
    from capture_cache.restore_driver import Driver

    driver = Driver()
    driver.init()
    driver.open(0)
    major, minor = driver.compute_capability(0)
    stream = driver.create_stream()
    try:
        generator = torch.Generator().manual_seed(5)
        sizes = (8, 16, 24, 256, 4096 + 16, (4 << 20) + 256, (9 << 20) - 16)
        host = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
        device = [x.cuda() for x in host]
        torch.cuda.synchronize()
        places = [(x.data_ptr(), x.numel()) for x in device]
        code = sum64_code(f"sm_{major}{minor}", None)
        assert device_sums(driver, code, places, stream) == [sum64(x.numpy()) for x in host]
        # Scales of small experts begin on any word.
        (got,) = device_sums(driver, code, [(device[3].data_ptr() + 8, 240)], stream)
        assert got == sum64(host[3].numpy()[8:248])
        for x in device:  # any single bit
            at = x.numel() // 3
            x[at] ^= 0x40
            torch.cuda.synchronize()
            (got,) = device_sums(driver, code, [(x.data_ptr(), x.numel())], stream)
            x[at] ^= 0x40
            assert got != sum64(x.cpu().numpy())
    finally:
        driver.destroy_stream(stream)
        driver.close()


def test_a_flipped_bit_is_found_on_the_device(
    tmp_path: Path, load: Load, packed: dict[str, Path]
) -> None:
    import shutil

    from capture_cache.errors import CorruptBundle
    from capture_cache.packed_index import SHARED

    bad = Path(shutil.copytree(packed["bf16"], tmp_path / "bad"))
    data = bytearray((bad / SHARED).read_bytes())
    data[-5000] ^= 1
    (bad / SHARED).write_bytes(data)
    with pytest.raises(CorruptBundle, match="expected the sum"):
        load("bf16", weights=str(bad))


def _checkpoint(path: Path) -> Path:
    """A Hugging Face directory with the structure of the `tiny` preset, two layers."""
    from safetensors.torch import save_file

    from graphs.hf_layout import checkpoint_parts
    from graphs.model_config import ModelConfig
    from graphs.presets import PRESETS

    hf = dict(PRESETS["tiny"]) | {"num_hidden_layers": 2}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for part in checkpoint_parts(ModelConfig.from_hf(hf)):
        x = torch.randn(part.shape, generator=generator)
        scaled = 1 + 0.1 * x if x.dim() == 1 else x * part.shape[-1] ** -0.5
        tensors[part.source] = scaled.to(torch.bfloat16)
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf))
    save_file(tensors, path / "model.safetensors")
    return path


_CHILD = """
import json, sys
from runtime import Runtime, SamplingParams
rt = Runtime.load(**json.loads(sys.argv[1]))
rt.add([1, 2, 3], SamplingParams(max_tokens=8, ignore_eos=True))
tokens = []
while rt.num_running:
    out = rt.step()
    tokens += [[int(t), float(p).hex()] for t, p in zip(out.tokens, out.logprobs)]
print(json.dumps({
    "tokens": tokens,
    "from": rt.loaded_from,
    "torch": "torch" in sys.modules or "triton" in sys.modules,
    "why": rt.engine.load_reason,
}))
rt.close()
"""


def test_a_checkpoint_is_played_from_packed_weights_without_torch(
    tmp_path: Path, store: Path
) -> None:
    """The bundle is captured from the checkpoint, and played from packed weights alone."""
    from graphs.model_source import resolve_model
    from runtime.packing import pack

    path, out = _checkpoint(tmp_path / "hf"), tmp_path / "packed"
    pack(*resolve_model(str(path)), out)
    options = {"bs": 4, "max_seq_len": 256, "ladder": "1,4,4+64", "store": str(store)}

    def child(model: Path) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(options | {"model": str(model)})],
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    captured = child(path)
    assert captured["from"] == "capture", captured["why"]
    played = child(out)
    assert (played["from"], played["torch"]) == ("bundle", False), played["why"]
    assert played["tokens"] == captured["tokens"]
