# Everything sets itself up: `make demo` and `make test` need only Python >= 3.11 and make.
# VENV and STATE may point elsewhere, so that the checkout itself can be read-only.
VENV   ?= .venv
STATE  ?= .state
PYTHON ?= $(shell command -v python3.11 || command -v python3)

# For pytest and the tools, for example: make test PYTEST_ARGS="-m unit -x", make bench BENCH_ARGS="--only tiny,swap",
# make soak MINUTES=60 SOAK_ARGS="--seed 7", make fuzz MINUTES=10 FUZZ_ARGS="--replay .state/fuzz/failing.json"
PYTEST_ARGS ?=
BENCH_ARGS  ?=
SOAK_ARGS   ?=
FUZZ_ARGS   ?=
MINUTES     ?= 1
# Sizes of the long proofs: power cuts replayed, pulls killed; SUITE is a checkout of the TUF conformance suite.
STATES ?= 10000
KILLS  ?= 200
SUITE  ?=
# How many histories are simulated, deployments made, daemons killed or stopped; each target has its own default.
N    ?=
SEED ?=

BIN  := $(VENV)/bin
ENV  := STATE="$(STATE)" PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(abspath $(STATE))/pycache" \
        HYPOTHESIS_STORAGE_DIRECTORY="$(abspath $(STATE))/hypothesis" INFERD_WHEELS="$(abspath $(STATE))/wheels"
SRC  := agent handlers tools tests profiles

.PHONY: help demo test test-torch system run bench bench-pull soak fuzz powercuts kills histories deployments deployment-kills stops conformance lint format check clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.demo: pyproject.toml constraints.txt tools/bootstrap.sh
	@sh tools/bootstrap.sh "$(PYTHON)" "$(VENV)" demo
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt tools/bootstrap.sh
	@sh tools/bootstrap.sh "$(PYTHON)" "$(VENV)" dev
	@touch $@ $(VENV)/.demo

# First and by its exact version: a looser one lets pip choose a build with CUDA.
$(VENV)/.torch: $(VENV)/.dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch scikit-learn
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt tools/bootstrap.sh
	@sh tools/bootstrap.sh "$(PYTHON)" "$(VENV)" bench
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## The whole main job on real input, in under two minutes
	@$(ENV) $(BIN)/python -m tools.demo --state "$(STATE)/demo" --wheels "$(STATE)/wheels"

# All of them in two processes side by side, as there are two cores; what the second says follows at the end.
test: $(VENV)/.dev ## Every test; PYTEST_ARGS="-k …" for some
	@mkdir -p "$(STATE)"
ifeq ($(PYTEST_ARGS),)
	@$(ENV) $(BIN)/python -m pytest -o cache_dir="$(abspath $(STATE))/pytest-2" -q \
	  tests/unit tests/sim tests/system tests/integration/test_[p-z]*.py > "$(STATE)/test-2.log" 2>&1 & second=$$!; \
	$(ENV) $(BIN)/python -m pytest -o cache_dir="$(abspath $(STATE))/pytest" tests/integration/test_[a-o]*.py; first=$$?; \
	wait $$second; second=$$?; cat "$(STATE)/test-2.log"; exit $$(( first || second ))
else
	@$(ENV) $(BIN)/python -m pytest -o cache_dir="$(abspath $(STATE))/pytest" $(PYTEST_ARGS)
endif

test-torch: $(VENV)/.torch ## What needs torch: installs it (0.9 GB on a CPU index, several GB with CUDA on PyPI)
	@mkdir -p "$(STATE)"
	@$(ENV) $(BIN)/python -m pytest -o cache_dir="$(abspath $(STATE))/pytest" -m torch $(PYTEST_ARGS)

system: $(VENV)/.dev ## The units under a real systemd in a container (root, minutes)
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_SYSTEM=1 $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -rA tests/system

run: $(VENV)/.demo ## The daemon in the foreground with the demo's store, until Ctrl-C
	@$(ENV) $(BIN)/python -m tools.demo run --state "$(STATE)/run" --wheels "$(STATE)/wheels"

bench: $(VENV)/.bench ## Every target figure beside in-process inference, in minutes; table, JSON and plot
	@$(ENV) $(BIN)/python -m tools.bench --state "$(STATE)/bench" $(BENCH_ARGS)

bench-pull: $(VENV)/.demo ## A large pull beside curl, sha256sum and sync, in minutes
	@mkdir -p "$(STATE)"
	@$(ENV) $(BIN)/python -m tools.bench_pull --state "$(STATE)/bench-pull" $(BENCH_ARGS)

soak: $(VENV)/.demo ## Swaps, kills, lies and crowds for MINUTES, and no answer lost
	@$(ENV) $(BIN)/python -m tools.soak --state "$(STATE)/soak" --minutes $(MINUTES) $(SOAK_ARGS)

fuzz: $(VENV)/.demo ## Damaged frames and regions against a real daemon for MINUTES
	@$(ENV) $(BIN)/python -m tools.fuzz --state "$(STATE)/fuzz" --minutes $(MINUTES) $(FUZZ_ARGS)

powercuts: $(VENV)/.dev ## Replay STATES power cuts of a pull and an activation (needs strace)
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_POWERCUTS=$(STATES) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s tests/sim/test_pull_powercuts.py $(PYTEST_ARGS)

kills: $(VENV)/.dev ## Kill a pull at KILLS random moments and resume it
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_KILLS=$(KILLS) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s tests/integration/test_pull_killed.py $(PYTEST_ARGS)

histories: $(VENV)/.dev ## Simulate N histories of a box under faults (20000); SEED=n repeats one
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_HISTORIES=$(or $(N),20000) INFERD_SEED=$(SEED) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s tests/sim/test_histories.py $(PYTEST_ARGS)

deployments: $(VENV)/.dev ## Deploy N real versions, good and bad, under load (100)
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_DEPLOYMENTS=$(or $(N),100) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s -k no_request tests/integration/test_deployments_real.py $(PYTEST_ARGS)

deployment-kills: $(VENV)/.dev ## Kill the daemon at N random moments of deployments (100); SEED=n repeats them
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_DEPLOYMENT_KILLS=$(or $(N),100) INFERD_SEED=$(SEED) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s -k killed tests/integration/test_deployments_real.py $(PYTEST_ARGS)

stops: $(VENV)/.dev ## SIGTERM to the daemon at N random moments (300); SEED=n repeats them
	@mkdir -p "$(STATE)"
	@$(ENV) INFERD_STOPS=$(or $(N),300) INFERD_SEED=$(SEED) $(BIN)/python -m pytest --timeout=0 -o cache_dir="$(abspath $(STATE))/pytest" -q -s tests/integration/test_stops.py $(PYTEST_ARGS)

conformance: $(VENV)/.dev ## The public TUF conformance suite, checked out in SUITE, against our client
	@test -x "$(SUITE)/env/bin/pytest" || { echo "SUITE=PATH: a checkout of the suite, see docs/conformance.md"; exit 2; }
	@cd "$(SUITE)" && PATH="$(abspath $(BIN)):$$PATH" env/bin/pytest -q tuf_conformance \
		--entrypoint "$(CURDIR)/tools/tuf-conformance-client" $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, mypy --strict, import contracts
	@$(BIN)/ruff check --no-cache $(SRC)
	@$(BIN)/ruff format --no-cache --check $(SRC)
	@$(BIN)/mypy --cache-dir "$(STATE)/mypy"
	@$(BIN)/lint-imports --no-cache

format: $(VENV)/.dev ## Format the sources in place
	@$(BIN)/ruff check --no-cache --fix $(SRC)
	@$(BIN)/ruff format --no-cache $(SRC)

check: lint test ## What must hold before a commit

clean: ## Remove the virtual environment and all state
	rm -rf "$(VENV)" "$(STATE)"
