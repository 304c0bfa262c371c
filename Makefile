# make demo   capture the tiny preset and replay it (CPU twin where there is no GPU)
# make test   lint, types, tests; what CI runs
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PACKAGES := runtime graphs kernels barriers capture_cache bench
DEMO := --model tiny --bs 256 --max-seq-len 512 --store .venv/demo-store

.PHONY: demo test lint types unit clean

demo: $(READY)
	$(PY) -m runtime.capture $(DEMO)
	$(PY) -m runtime.replay_bench $(DEMO) --no-verify --ctx-len 64 --steps 4 --keys 1,8,64,256,64+64

test: lint types unit

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

unit: $(READY)
	$(PY) -m pytest tests/gpu
	$(PY) -m pytest tests/cpu

$(READY): requirements.txt setup.py
	@test -d $(VENV) || python3 -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]}: 3.11 or newer is needed")'
	@echo "installing into $(VENV): torch and what else is pinned, 2 to 3 GiB, some minutes without a word"
	test -d $(VENV) || python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . \
		|| $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
