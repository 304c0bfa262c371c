"""Packets between ranks over a Unix socket: one JSON object each, and open files beside it."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from barriers.errors import RankError, RanksMissing

_PACKET_BYTES = 192 << 10


def open_socket() -> socket.socket:
    # Sequenced packets: one message is one packet, and files stay with their message.
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def address_of(name: str) -> bytes:
    """Abstract (leading zero byte), per user, and short whatever the name."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:24]
    return b"\0lockstep-" + f"{os.getuid()}-{digest}".encode()


def check_user(link: socket.socket) -> None:
    """Raises RankError: the other end belongs to another user, who could take the name first."""
    packed = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", packed)
    if user not in (os.getuid(), 0):
        raise RankError(
            f"expected a rank of user {os.getuid()}, got process {pid} of user {user}; "
            "set another MASTER_PORT"
        )


def tell(
    link: socket.socket,
    message: Mapping[str, Any],
    fds: Sequence[int] = (),
    lost: str | None = None,
    wait_s: float = 1.0,
) -> None:
    """Send one packet, waiting `wait_s` for room at most.

    Raises:
        RanksMissing: the other end is gone, if `lost` says how to put that; otherwise it is left to
            the next receive.
    """
    try:
        link.settimeout(wait_s)
        socket.send_fds(link, [json.dumps(message).encode()], list(fds))
    except OSError as e:
        if lost is not None:
            raise RanksMissing(f"{lost}; see its own output, then start all ranks again") from e


def receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One packet and its files.

    Raises:
        TimeoutError: nothing came.
        RanksMissing: the other end is gone.
        RankError: not one of our packets.
    """
    flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
    try:
        data, fds, got, _ = socket.recv_fds(link, _PACKET_BYTES, 253, flags)
    except ConnectionResetError:
        # Reported first if the other end closed without reading all; what it sent is still there.
        data, fds, got, _ = socket.recv_fds(link, _PACKET_BYTES, 253, flags)
    if not data:
        raise RanksMissing("the other end is gone")
    try:
        message = json.loads(data)
    except ValueError:
        message = None
    if not isinstance(message, dict) or got & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        close_all(fds)
        raise RankError(
            f"expected a packet of a rank, got {data[:80]!r}; check for a foreign process"
        )
    return message, list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
