"""What the driver alone takes: a fresh process that opens a device and does nothing else.

The floor under every first step: no work on the device can begin sooner. `runtime.restore_bench`
starts one a rank, all at once, as it starts those that restore. Standard library only, and no
module of ours: what those take to import is ours.
"""

import time

MAIN_NS = time.time_ns()  # before anything is imported

import ctypes  # noqa: E402
import sys  # noqa: E402

_P, _I = ctypes.c_void_p, ctypes.c_int


def main(argv: list[str], lib: object = None) -> int:
    """Args: nanoseconds of the start, the GPU to open.

    `lib`: driver functions; by default those of the machine.
    """
    ends = [int(argv[0]), MAIN_NS]
    driver = ctypes.CDLL("libcuda.so.1") if lib is None else lib
    ends.append(time.time_ns())
    context = ctypes.c_uint64()
    for name, types, arguments in (
        ("cuInit", (ctypes.c_uint,), (0,)),
        ("cuDevicePrimaryCtxRetain", (_P, _I), (ctypes.addressof(context), int(argv[1]))),
    ):
        call = getattr(driver, name)
        call.argtypes = types
        if status := call(*arguments):
            print(f"{name} failed with CUDA error {status}", file=sys.stderr)
            return 1
        ends.append(time.time_ns())
    names = ("interpreter", "library", "cuInit", "context")
    spans = ", ".join(
        f'"{name}": {(b - a) / 1e6}' for name, a, b in zip(names, ends, ends[1:], strict=False)
    )
    print(f'RESULT {{"ready_ms": {(ends[-1] - ends[0]) / 1e6}, "spans_ms": {{{spans}}}}}')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
