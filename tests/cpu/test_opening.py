"""Opening the device: what is asked of the driver before anybody has opened it."""

from __future__ import annotations

import os

import pytest

from runtime.opening import CONNECTIONS, CONNECTIONS_VARIABLE, Opening, _is_initialised
from tests.cpu.fake_cuda import FakeCuda


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTIONS_VARIABLE, "0")  # so that it is put back, whatever a test leaves
    monkeypatch.delenv(CONNECTIONS_VARIABLE)


class Asked(FakeCuda):
    """Keeps what the environment said when the driver was initialised."""

    def cuInit(self, _: int) -> None:
        super().cuInit(_)
        self.asked = os.environ.get(CONNECTIONS_VARIABLE)


@pytest.mark.usefixtures("unset")
def test_who_opens_the_driver_first_asks_for_few_connections() -> None:
    gpu = Asked()
    opening = Opening(0, gpu)
    opening.wait_context()
    assert gpu.asked == opening.connections == str(CONNECTIONS)
    opening.close()


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTIONS_VARIABLE, "32")
    gpu = Asked()
    opening = Opening(0, gpu)
    opening.wait_context()
    assert gpu.asked == opening.connections == "32"
    opening.close()


@pytest.mark.usefixtures("unset")
def test_nothing_is_set_where_the_driver_is_open_already() -> None:
    gpu = FakeCuda()
    gpu.cuInit(0)
    opening = Opening(0, gpu)
    opening.wait_context()
    assert opening.connections is None
    assert CONNECTIONS_VARIABLE not in os.environ
    opening.close()


def test_a_driver_that_nobody_has_loaded_is_not_open() -> None:
    with open("/proc/self/maps") as maps:
        loaded = "libcuda.so" in maps.read()
    assert loaded or not _is_initialised(None)
