"""The named outcomes of this package; every message is expected, got, remedy."""

from __future__ import annotations


class LayoutError(ValueError):
    """The arena table that was asked for, or read back, makes no sense."""


class ArenaError(RuntimeError):
    """The arena cannot be had at the size or address asked for, or was used after close."""


class CudaError(RuntimeError):
    """A driver or NVRTC call failed.

    Attributes:
        name: the driver's own name, such as "CUDA_ERROR_OUT_OF_MEMORY".
        doing: what we were about to do.
    """

    def __init__(self, name: str, doing: str, remedy: str) -> None:
        super().__init__(f"{doing} failed with {name}; {remedy}")
        self.name = name
        self.doing = doing
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[CudaError], tuple[str, str, str]]:
        return type(self), (self.name, self.doing, self.remedy)


class StoreError(RuntimeError):
    """The store cannot be read or written: permissions, space, or an unsafe directory."""


class CorruptBundle(RuntimeError):
    """A stored entry is not what its own record says; it must be made again, never tried."""


class OtherVersion(CorruptBundle):
    """A sound entry that another version of this program wrote; what it means is not known here."""


class FingerprintMismatch(RuntimeError):
    """No stored bundle is valid here; the message compares the nearest one field by field."""


class CompileError(RuntimeError):
    """A kernel could not be compiled, or compiled to something that cannot be captured."""


class CaptureError(RuntimeError):
    """Something that capture forbids was attempted, such as compiling a kernel."""


class NotRestorable(RuntimeError):
    """A captured graph holds something that another process could not rebuild; it stays live."""
