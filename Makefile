# make demo    set everything up, then GRPO with real vLLM on this machine, to a visible gain in reward
# make test    the tests (make test-slow, make test-gpu for the others)
# make check   ruff and mypy
# make bench   the benchmarks; make bench-NAME for one of them
PYTHON ?= python3.11
VENV := .venv
KIND ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(KIND)

# Images for containers often set it, and then every process of a job compiles all of torch and vLLM anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow test-gpu check bench setup clean

demo: $(INSTALLED)
	$(BIN)/eagleray run configs/grpo/smollm2-lora-cpu.yaml output_dir=outputs/demo/$(shell date +%Y%m%d-%H%M%S)

setup: $(INSTALLED)

# torch first and with its dependencies, since its CPU and GPU builds need different ones; then every other package at
# its pinned version. Byte code is compiled at first use: compiling all of it takes longer than the download.
$(INSTALLED): requirements/$(KIND).txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile "$$(grep '^torch==' requirements/$(KIND).txt)"
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-compile --no-deps -r requirements/$(KIND).txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --no-build-isolation --editable .
	rm -f $(VENV)/.installed-*
	touch $@

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks all

bench-%: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks $*

clean:
	rm -rf $(VENV) build *.egg-info
