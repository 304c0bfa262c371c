"""Benchmarks, one module each: `python -m bench.NAME`. Each checks first, then times."""
