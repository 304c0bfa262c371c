"""One fresh process of `runtime.restore_bench`: load, one step, what each stage took.

Started with the wall clock of its own start, so that the interpreter and the imports count.
"""

import os
import sys
import time

MAIN_NS = time.time_ns()  # before anything is imported


def _has_bytecode(package: str) -> bool:
    """Whether a package's modules are compiled: where they are not, every process compiles them."""
    spec = sys.modules[package].__spec__
    return spec is not None and spec.cached is not None and os.path.exists(spec.cached)


def main(argv: list[str], lib: object = None) -> int:
    """Args: options as JSON, nanoseconds of the start, the GPU to open at once or "none".

    `lib`: driver functions; by default those of the machine.
    """
    from runtime.opening import Opening

    # The driver comes up while the rest is imported. A capture opens the device through torch.
    opening = None if argv[2] == "none" else Opening(int(argv[2]), lib)
    import json

    options, start_ns = json.loads(argv[0]), int(argv[1])
    from runtime import Runtime, SamplingParams

    imported_ns = time.time_ns()
    runtime = Runtime.load(**options, opening=opening)
    loaded_ns = time.time_ns()
    runtime.add([1], SamplingParams(max_tokens=2, ignore_eos=True))
    runtime.step()
    stepped_ns = time.time_ns()
    engine = runtime.engine
    keys, parts, ahead = {}, {}, {}
    if runtime.loaded_from == "bundle":
        engine.keys.wait()
        keys = {str(key): 1e3 * seconds for key, seconds in engine.keys.seconds.items()}
        parts = {name: 1e3 * seconds for name, seconds in engine.keys.parts.seconds.items()}
        ahead = {name: 1e3 * seconds for name, seconds in engine.keys.ahead.seconds.items()}
    all_ns = time.time_ns()
    spans = {
        "interpreter": MAIN_NS - start_ns,
        "imports": imported_ns - MAIN_NS,
        "load": loaded_ns - imported_ns,
        "first step": stepped_ns - loaded_ns,
    }
    report = {
        "from": runtime.loaded_from,
        "reason": runtime.load_reason,
        "spans_ms": {name: ns / 1e6 for name, ns in spans.items()},
        "stages_ms": {name: 1e3 * s for name, s in engine.stages.items()},
        "first_step_ms": (stepped_ns - start_ns) / 1e6,
        "all_keys_ms": (all_ns - start_ns) / 1e6,
        "key_ms": keys,
        "key_parts_ms": parts,
        "ahead_ms": ahead,
        "bytecode": {package: _has_bytecode(package) for package in ("runtime", "numpy")},
        "torch": "torch" in sys.modules or "triton" in sys.modules,
        "connections": None if opening is None else opening.connections,
        "cuda_python": "cuda.bindings.driver" in sys.modules,
    }
    runtime.close()
    print("RESULT " + json.dumps(report), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
