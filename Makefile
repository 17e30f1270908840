# make demo and make test need Python 3.11 or newer and make; all else they set up in .venv.
# Other names: make PYTHON=/path/to/python3, VENV=folder, JOBS=parallel test processes.

SHELL := /bin/sh
PYTHON ?=
VENV ?= .venv
VENV_NEWEST ?= .venv-newest
VENV_AOT ?= .venv-aot
VENV_GPU ?= .venv-gpu
VENV_PARITY ?= .venv-parity
JOBS ?= 2
PYTEST_ARGS ?=

RUN := $(VENV)/bin
TEST_ENV := JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}
PYTEST := -m pytest -q -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-newest test-slow aot aot-gpu parity lint format setup clean
.PHONY: setup-newest setup-aot setup-parity

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 22

demo: setup ## sample videos with dense and Monarch attention; writes out/demo/
	$(RUN)/vmonarch demo

test: setup ## lint, types, and the fast tests; runs them all before it fails
	@status=0; log=$$(mktemp); \
	$(RUN)/python scripts/typecheck.py >"$$log" 2>&1 & types=$$!; \
	trap 'kill $$types 2>/dev/null; rm -f "$$log"' EXIT INT TERM; \
	$(RUN)/ruff check || status=1; \
	$(RUN)/ruff format --check || status=1; \
	$(TEST_ENV) $(RUN)/python $(PYTEST) || status=1; \
	wait $$types || status=1; cat "$$log"; \
	test $$status = 0 || echo "make test: something above failed"; exit $$status

test-slow: setup ## the tests that `make test` leaves out
	$(TEST_ENV) $(RUN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow $(PYTEST_ARGS)

test-newest: ## the fast tests on the newest JAX and Python here; CASES=part: fewer cases of each
	@newest=$$(./scripts/find_python.sh newest 2>/dev/null) || { \
	    echo "test-newest: skipped, no Python 3.12 or newer here (JAX after 0.10 needs it)"; exit 0; }; \
	"$$newest" scripts/setup_env.py $(VENV_NEWEST) && \
	$(VENV_NEWEST)/bin/python -c "import jax, sys; print('JAX', jax.__version__, 'on Python', sys.version.split()[0])" && \
	$(TEST_ENV) $(VENV_NEWEST)/bin/python $(PYTEST)

# libtpu has an environment of its own: where it is installed, JAX looks for a TPU at every start.
aot: setup-aot ## the TPU kernels through the real TPU compiler, no TPU needed; AOT=part: one shape of each
	JAX_PLATFORMS=cpu AOT=$${AOT:-full} $(VENV_AOT)/bin/python -m pytest -q -n $(JOBS) tests/aot $(PYTEST_ARGS)

# CUDA has one too: it is large, and nobody needs it for the tests.
aot-gpu: ## the GPU routes through XLA and ptxas for an H100, no GPU needed
	@python="$(PYTHON)"; test -n "$$python" || python=$$(./scripts/find_python.sh oldest) || exit 1; \
	"$$python" scripts/setup_env.py "$(VENV_GPU)" dev,gpu
	JAX_PLATFORMS=cpu AOT_GPU=1 $(VENV_GPU)/bin/python -m pytest -q tests/aot_gpu $(PYTEST_ARGS)

# torch has an environment of its own: nobody who only runs models needs it.
parity: setup-parity ## the Wan port beside Diffusers and Transformers, on small random models
	$(TEST_ENV) $(VENV_PARITY)/bin/python -m pytest -q -n $(JOBS) tests/wan -k parity $(PYTEST_ARGS)

lint: setup ## ruff and pyright
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/python scripts/typecheck.py

format: setup ## let ruff mend what it can
	$(RUN)/ruff check --fix
	$(RUN)/ruff format

setup: ## the environment in .venv, made or renewed only where needed
	@python="$(PYTHON)"; test -n "$$python" || python=$$(./scripts/find_python.sh oldest) || exit 1; \
	"$$python" scripts/setup_env.py "$(VENV)"

setup-newest:
	@newest=$$(./scripts/find_python.sh newest) || exit 1; \
	"$$newest" scripts/setup_env.py "$(VENV_NEWEST)"

setup-aot:
	@python="$(PYTHON)"; test -n "$$python" || python=$$(./scripts/find_python.sh oldest) || exit 1; \
	"$$python" scripts/setup_env.py "$(VENV_AOT)" dev,aot

setup-parity:
	@python="$(PYTHON)"; test -n "$$python" || python=$$(./scripts/find_python.sh oldest) || exit 1; \
	"$$python" scripts/setup_env.py "$(VENV_PARITY)" dev,video,parity

clean: ## remove everything that was made here: environments, outputs, caches
	rm -rf .venv .venv.lock .venv-newest .venv-newest.lock .venv-aot .venv-aot.lock .venv-gpu .venv-gpu.lock .venv-parity .venv-parity.lock .types build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find vmonarch_jax pallas_kernels models tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
