"""Benchmarks, one module each: `python -m bench.NAME`. Each checks first, then times."""

import runtime  # noqa: F401 - Ctrl-C during the imports of a command is a line there, and so here
