"""Kernels chosen on the device: stored, shared by ladders, pinned, and right to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capture_cache.fingerprint import differing
from tests.gpu.conftest import Load
from tests.serving import make_requests, serve


def _tuned(load: Load, path: Path, **options: Any) -> Any:
    return load("fp8", **({"kernels": "tune", "store": str(path)} | options))


@pytest.fixture(scope="module")
def tuned_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuned")


def test_a_second_capture_takes_what_the_first_has_measured(load: Load, tuned_store: Path) -> None:
    with _tuned(load, tuned_store) as runtime:
        first = runtime.engine.choices
        assert first.origin == "measured"
        assert first.attention is not None
        picks = [p for site in first.sites.values() for p in site.tokens.values()]
        assert all(p.us is not None and p.us > 0 for p in picks)
        assert runtime.engine.ledger.choices == first.to_json()
    with _tuned(load, tuned_store) as runtime:
        second = runtime.engine.choices
        assert second.origin == "stored"
        assert (second.sites, second.attention) == (first.sites, first.attention)
        assert runtime.engine.launcher.num_compiled == 0


def test_attention_is_timed_with_what_a_step_has_after_it(load: Load, tuned_store: Path) -> None:
    from capture_cache.store import Store

    with _tuned(load, tuned_store) as runtime:
        attention = runtime.engine.choices.attention
    store = Store(tuned_store)
    records = [record for digest in store.records() if (record := store.load_record(digest))]
    (record,) = [record for record in records if "timed" in record]
    assert record["timed"] == ["attention", "W_UV"]
    assert record["choice"] == attention
    assert attention in record["us"]
    assert len(record["us"]) > 1
    for times in record["us"].values():
        assert len(times) == len(record["points"])
        assert all(us > 0 for us in times)


def test_auto_takes_what_was_kept_and_measures_nothing(load: Load, tuned_store: Path) -> None:
    with _tuned(load, tuned_store) as runtime:
        kept = runtime.engine.choices
    with _tuned(load, tuned_store, kernels="auto") as runtime:
        auto = runtime.engine.choices
        assert (auto.origin, auto.kernels) == ("stored", kept.kernels)
    with _tuned(load, tuned_store, kernels="auto", ladder="5,8,8+40") as runtime:
        other = runtime.engine.choices
        assert {n: s.bits for n, s in other.sites.items()} == {
            n: s.bits for n, s in kept.sites.items()
        }


def test_auto_takes_the_default_where_nothing_was_kept(load: Load, tmp_path: Path) -> None:
    with load("bf16", kernels="auto", store=str(tmp_path)) as runtime:
        assert runtime.engine.choices.kernels == (None, "default")


def test_another_ladder_gets_the_same_bits(load: Load, tuned_store: Path) -> None:
    requests = make_requests(np.random.default_rng(5), (30, 3, 70), 2000, (12,))
    bits = []
    for ladder in ("1,2,4,8,8+64", "3,8,8+32"):
        with _tuned(load, tuned_store, ladder=ladder, verify=True, proof_replays=3) as runtime:
            bits.append([answer.bits for answer in serve(runtime, requests)])
    assert bits[0] == bits[1]


def test_pins_capture_the_same_kernels(load: Load, tuned_store: Path, tmp_path: Path) -> None:
    with _tuned(load, tuned_store) as runtime:
        choices = runtime.engine.choices
        asked = runtime.engine.fingerprint()
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(choices.to_json()))
    with _tuned(load, tuned_store, kernels=str(path)) as runtime:
        assert runtime.engine.choices.digest == choices.digest
        assert differing(runtime.engine.fingerprint(), asked) == ["kernels"]
    record = choices.to_json()
    del record["sites"][next(iter(record["sites"]))]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="pins no kernel for"):
        _tuned(load, tuned_store, kernels=str(path))


def test_inexact_kernels_are_named(load: Load, tmp_path: Path) -> None:
    with load("bf16", kernels="tune", allow_inexact=True, store=str(tmp_path)) as runtime:
        choices = runtime.engine.choices
        inexact = [
            name
            for name, site in choices.sites.items()
            if any(p.kernel == "torch.mm" for p in site.tokens.values())
        ]
        assert choices.inexact == inexact
        assert runtime.engine.ledger.choices["inexact"] == inexact


def test_another_thread_may_launch(load: Load) -> None:
    """A thread without a context of its own launches as the first one does."""
    import threading

    found: list[Any] = []
    with load("bf16") as runtime:
        requests = make_requests(np.random.default_rng(1), (9,), 2000, (4,))
        want = [a.tokens for a in serve(runtime, requests)]

        def run() -> None:
            found.extend(a.tokens for a in serve(runtime, requests))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert found == want
