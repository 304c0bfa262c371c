"""Ranks meet, compare configurations, share memory, and leave nothing behind."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from barriers.config import GroupConfig
from barriers.errors import RankError, RankMismatch, RanksMissing
from barriers.group import RankGroup
from barriers.packets import address_of
from barriers.spawn import run_ranks
from barriers.symmetric import HostMemory
from barriers.symmetric_device import PEERS_BASE, DeviceMemory
from barriers.watch import rank_of_slot, slot_of_rank
from capture_cache.restore_driver import Driver
from tests.cpu.fake_cuda import FakeCuda


def _in_threads(world: int, body: Any, timeout_s: float = 5.0) -> list[Any]:
    """Ranks as threads of this process: each `RankGroup` has sockets of its own."""
    name = secrets.token_hex(8)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = body(GroupConfig(rank, world, name, timeout_s))
        except Exception as e:
            results[rank] = e

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank did not come back"
    assert not _is_left(name)
    return results


def _is_left(name: str) -> bool:
    """Whether a socket still has a meeting point's name."""
    shown = "@" + address_of(name)[1:].decode()
    return shown in Path("/proc/net/unix").read_text().split()


# ------------------------------------------------------------------ configuration


def test_config_comes_from_torchruns_environment() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}
    config = GroupConfig.from_env(env)
    assert (config.rank, config.world) == (1, 4)
    assert config.name != GroupConfig.from_env({**env, "MASTER_PORT": "29501"}).name
    again = {**env, "TORCHELASTIC_RESTART_COUNT": "1"}
    assert config.name != GroupConfig.from_env(again).name


def test_no_environment_is_one_rank() -> None:
    assert GroupConfig.from_env({}).world == 1


def test_world_of_two_nodes_is_refused_with_both_sizes() -> None:
    env = {"RANK": "8", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "1"}
    with pytest.raises(RankMismatch, match="WORLD_SIZE 16 but LOCAL_WORLD_SIZE 8"):
        GroupConfig.from_env(env)


def test_half_an_environment_is_refused() -> None:
    with pytest.raises(ValueError, match="MASTER_PORT"):
        GroupConfig.from_env({"RANK": "0", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0), (0, 33)])
def test_rank_outside_its_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="ranks of one node"):
        GroupConfig(rank, world, "x")


# ------------------------------------------------------------------------ meeting


def test_every_rank_gets_every_value() -> None:
    def body(config: GroupConfig) -> list[int]:
        with RankGroup(config) as group:
            return [p.value for p in group.allgather("squares", config.rank**2)]

    assert _in_threads(4, body) == [[0, 1, 4, 9]] * 4


def test_one_rank_needs_nobody() -> None:
    with RankGroup(GroupConfig(0, 1, "alone")) as group:
        group.barrier("nothing")
        assert [p.value for p in group.allgather("me", 7)] == [7]


def test_files_arrive_with_the_right_rank() -> None:
    def body(config: GroupConfig) -> list[bytes]:
        with RankGroup(config) as group:
            ends = [os.pipe() for _ in range(config.rank)]  # rank r brings r files
            for _, write in ends:
                os.write(write, b"%d" % config.rank)
            parts = group.allgather("pipes", None, [read for read, _ in ends])
            counts = [len(p.fds) for p in parts]
            group.barrier("all have theirs")
            # Of each rank's files, receiver i reads the i-th, so that nobody reads another's byte.
            mine = [os.read(p.fds[config.rank], 8) for p in parts if config.rank < len(p.fds)]
            group.barrier("all have read")
            for fd in [*(f for end in ends for f in end), *(f for p in parts for f in p.fds)]:
                os.close(fd)
            assert counts == [0, 1, 2]
            return mine

    assert _in_threads(3, body) == [[b"1", b"2"], [b"2"], []]


def test_different_configurations_are_refused_with_both_values() -> None:
    def body(config: GroupConfig) -> None:
        RankGroup(config, {"model": "tiny", "ladder": "1,2" if config.rank < 2 else "1,2,4"})

    for error in _in_threads(3, body):
        assert isinstance(error, RankMismatch)
        assert "ladder: rank 0 has 1,2, rank 2 has 1,2,4" in str(error)
        assert error.ranks == (2,)


def test_a_field_that_one_rank_lacks_is_a_difference() -> None:
    def body(config: GroupConfig) -> None:
        RankGroup(config, {} if config.rank else {"fingerprint": "abc"})

    for error in _in_threads(2, body):
        assert "fingerprint: rank 0 has abc, rank 1 has nothing" in str(error)


def test_different_worlds_are_refused_with_both_sizes() -> None:
    def body(config: GroupConfig) -> None:
        RankGroup(GroupConfig(config.rank, 2 + config.rank, config.name, 3.0))

    for error in _in_threads(2, body):
        assert isinstance(error, RankMismatch)
        assert "a world of 2, but rank 1 in a world of 3" in str(error)


def test_a_missing_rank_is_named_by_all() -> None:
    def body(config: GroupConfig) -> None:
        if config.rank != 2:
            RankGroup(config)

    results = _in_threads(4, body, timeout_s=0.6)
    for rank in (0, 1, 3):
        assert isinstance(results[rank], RanksMissing), results[rank]
        assert results[rank].ranks == (2,)
        assert "rank 2 is missing" in str(results[rank])


def test_missing_rank_0_is_named() -> None:
    began = time.monotonic()
    with pytest.raises(RanksMissing, match="rank 0 is missing"):
        RankGroup(GroupConfig(1, 2, secrets.token_hex(8), 0.3))
    assert time.monotonic() - began < 2


def test_a_rank_that_leaves_is_named_at_once() -> None:
    def body(config: GroupConfig) -> float:
        with RankGroup(config) as group:
            began = time.monotonic()
            if config.rank == 1:
                return 0.0
            with pytest.raises(RanksMissing, match="rank 1 left during work"):
                group.barrier("work")
            return time.monotonic() - began

    results = _in_threads(3, body, timeout_s=20)
    assert all(isinstance(seconds, float) and seconds < 5 for seconds in results), results


def test_ranks_at_different_meetings_are_told() -> None:
    def body(config: GroupConfig) -> None:
        with RankGroup(config) as group:
            group.barrier("weights" if config.rank else "warm-up")

    for error in _in_threads(2, body):
        assert isinstance(error, RankError)
        assert "rank 0 is at 'warm-up', rank 1 at 'weights'" in str(error)


def test_one_ranks_error_is_raised_on_all() -> None:
    def body(config: GroupConfig) -> None:
        with RankGroup(config) as group:
            group.agree("loading", "no space on GPU 1" if config.rank == 1 else None)

    for error in _in_threads(2, body):
        assert isinstance(error, RankError)
        assert "loading failed on rank 1: rank 1: no space on GPU 1" in str(error)


def test_a_stranger_does_not_end_the_run() -> None:
    def body(config: GroupConfig) -> str:
        if config.rank == 1:
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    stranger.connect(address_of(config.name))
                    stranger.send(b"hello?")
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
                finally:
                    stranger.close()
        with RankGroup(config):
            return "met"

    assert _in_threads(2, body) == ["met", "met"]


def test_a_name_in_use_is_reported() -> None:
    name = secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as holder:
        holder.bind(address_of(name))
        with pytest.raises(RankError, match="another run of this host uses the name"):
            RankGroup(GroupConfig(0, 2, name, 0.3))


def test_the_name_is_free_while_the_run_goes_on() -> None:
    name = secrets.token_hex(8)

    def body(config: GroupConfig) -> int:
        first = RankGroup(GroupConfig(config.rank, 2, name, 5.0))
        with RankGroup(GroupConfig(config.rank, 2, name, 5.0)) as second:
            second.barrier("second")
        first.barrier("first")
        first.close()
        return 1

    assert _in_threads(2, body) == [1, 1]


# ------------------------------------------------------------------------- memory


def test_slots_are_relative_to_the_rank() -> None:
    for world in (1, 2, 3, 8):
        for rank in range(world):
            assert slot_of_rank(rank, rank, world) == 0
            for slot in range(world):
                assert slot_of_rank(rank, rank_of_slot(rank, slot, world), world) == slot


def _write_and_read(config: GroupConfig) -> list[int]:
    """Each rank writes to every rank, and reads what was written to it."""
    with RankGroup(config) as group:
        memory = HostMemory(group, 8 * group.world)
        assert not any(memory.payload(r, np.int64).any() for r in range(group.world))
        group.barrier("all have looked")
        for peer in range(group.world):
            memory.payload(peer, np.int64)[group.rank] = 100 * group.rank + peer
        group.barrier("all have written")
        got = [int(v) for v in memory.payload(group.rank, np.int64)]
        memory.close()
        return got


def test_processes_share_memory() -> None:
    name, files = secrets.token_hex(8), set(os.listdir("/dev/shm"))
    outcomes = run_ranks(3, _write_and_read, timeout_s=20, name=name)
    assert [o.error for o in outcomes] == [None] * 3
    assert [o.value for o in outcomes] == [[r, 100 + r, 200 + r] for r in range(3)]
    assert not _is_left(name)
    assert not [f for f in set(os.listdir("/dev/shm")) - files if "lockstep" in f]


def test_different_sizes_are_refused_with_both() -> None:
    def body(config: GroupConfig) -> None:
        with RankGroup(config) as group:
            HostMemory(group, 4096 * (1 + group.rank))

    for error in _in_threads(2, body):
        assert isinstance(error, RankMismatch)
        assert "rank 0 has 8192 bytes, rank 1 has 12288" in str(error)


def test_an_array_outlives_its_memory() -> None:
    with RankGroup(GroupConfig(0, 1, "alone")) as group:
        memory = HostMemory(group, 64)
        kept = memory.payload(0)
        memory.close()
        kept[:] = 3  # still mapped
        assert int(kept.sum()) == 3 * 64
        with pytest.raises(ValueError, match="closed"):
            memory.payload(0)


# ------------------------------------------------------------------------ spawning


def _end_as_told(config: GroupConfig, how: str) -> int:
    group = RankGroup(config)
    if config.rank == 1:
        if how == "raise":
            raise RankMismatch("made to", (1,))
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
    group.close()
    return config.rank


def test_outcomes_tell_how_ranks_ended() -> None:
    good, bad = run_ranks(2, _end_as_told, "raise", timeout_s=20)
    assert (good.value, good.error, good.exit_code) == (0, None, 0)
    assert isinstance(bad.error, RankMismatch)
    assert bad.error.ranks == (1,)

    name = secrets.token_hex(8)
    _, killed = run_ranks(2, _end_as_told, "kill", timeout_s=20, name=name)
    assert not _is_left(name)
    assert (killed.value, killed.error, killed.exit_code) == (None, None, -signal.SIGKILL)


def test_a_stopped_rank_is_ended_with_the_call() -> None:
    _, stopped = run_ranks(2, _end_as_told, "stop", timeout_s=2.0)
    assert (stopped.value, stopped.error, stopped.exit_code) == (None, None, None)


def test_little_peer_memory_gets_the_address_that_a_stored_graph_needs() -> None:
    """The driver heeds an address only where much is reserved."""
    lib = FakeCuda()
    driver = Driver(lib)
    driver.init()
    driver.open(0)
    with RankGroup(GroupConfig(0, 1, "little")) as group:
        memory = DeviceMemory(group, driver, 4096, exact=True)
        assert memory.base == PEERS_BASE
        memory.close()
        lib.taken = True
        with pytest.raises(RankError, match="expected peer memory at 0x680000000000, got"):
            DeviceMemory(group, driver, 4096, exact=True)
