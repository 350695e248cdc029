# Every target makes the environment that it needs when it is missing or a dependency changed. `make help` lists them.

# The interpreter that makes .venv (3.10 or newer), and options for pytest or the server.
PYTHON ?= python3
ARGS ?=
# The release that `make bump` prepares.
VERSION ?=
# The runner of `make demo`, `make serve-demo` and `make onefile`: numpy, or onnx, which gets an environment of its own.
RUNNER ?= numpy

VENV := $(if $(filter onnx,$(RUNNER)),.venv-onnx,.venv)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
NANOVLLM := $(VENV)/bin/nanovllm

# What the demo needs, what serving it needs, and all.
LIGHT_PLUGINS := plugins/models plugins/runner_$(RUNNER) plugins/tokenizers
SERVER_PLUGINS := $(LIGHT_PLUGINS) plugins/runner_http plugins/server
PLUGINS := plugins/models plugins/runner_http plugins/runner_numpy plugins/runner_onnx plugins/runner_torch plugins/server plugins/tokenizers
PROJECTS := pyproject.toml $(PLUGINS:%=%/pyproject.toml) examples/runner_jax/pyproject.toml
# Three stamps in .venv: the packages with what they need to run, the server besides, and all with what tests and checks need.
LIGHT := $(VENV)/light.stamp
SERVER := $(VENV)/server.stamp
DEV := $(VENV)/dev.stamp

.PHONY: help all demo serve-demo simple-demo ask generic-runner test test-slow check lint vet fmt tidy browser bench \
	build onefile docs bump clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-22s %s\n", $$1, $$2 }'

all: check test  ## check and test

demo: $(LIGHT)  ## ask the embedded model for eight capitals, and two questions more; with RUNNER=onnx on ONNX Runtime
	@$(NANOVLLM) demo capitals --runner $(RUNNER)
	@echo
	@$(NANOVLLM) ask --runner $(RUNNER) "What is the capital of Portugal?" "Which country has Rome as its capital?"

serve-demo: $(SERVER)  ## serve the embedded model with OpenAI's API and a page, at http://127.0.0.1:8000; Ctrl-C ends it
	@$(NANOVLLM) serve --runner $(RUNNER) --set server.log_format=text $(ARGS)

simple-demo: $(LIGHT)  ## the engine without a model: the built-in mock runner and tokenizer
	@$(NANOVLLM) ask --runner mock --max-tokens 12 "hello world" "what can you do"

ask: $(LIGHT)  ## make ask Q="What is the capital of Peru?"
	@$(NANOVLLM) ask "$(or $(Q),What is the capital of Peru?)"

generic-runner: $(LIGHT)  ## what a model is and whether it runs here: make generic-runner MODEL=DIRECTORY
	@$(NANOVLLM) inspect $(or $(MODEL),demo)

test: $(DEV)  ## run the tests
	$(RUN) -m pytest $(ARGS)

test-slow: $(DEV)  ## every test, the slow ones too, with long Hypothesis searches; names what it skips
	$(RUN) -m pytest -m "" -rs --hypothesis-profile=long $(ARGS)

check: lint  ## lint, and the formatting
	$(RUN) -m ruff format --check .

lint: $(DEV)  ## ruff, and mypy --strict on the core (also: make vet)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

vet: lint

fmt: $(DEV)  ## format the code and mend what ruff can mend
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

tidy: $(DEV)  ## bring .venv up to date with every pyproject.toml, and check that its packages agree
	$(PIP) check

browser:  ## Debian's Chromium and its driver, without which the tests of the page are skipped
	@command -v chromium > /dev/null && command -v chromedriver > /dev/null \
		|| (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver)

bench: $(DEV)  ## run the benchmarks and print their ratios
	@for script in benchmarks/*.py; do echo "== $$script"; $(RUN) $$script || exit 1; done

build: $(DEV)  ## wheels and sdists of all distributions into dist/
	rm -rf dist
	@for project in . $(PLUGINS); do $(RUN) -m build --outdir dist $$project > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }; done
	$(RUN) scripts/check_dist.py dist

onefile: build  ## dist/nanovllm-RUNNER.pyz: all of nanovllm[RUNNER] in one file that a bare Python runs
	$(VENV)/bin/shiv --quiet --console-script nanovllm --output-file dist/nanovllm-$(RUNNER).pyz \
		--find-links dist 'nanovllm[$(RUNNER)]'

docs: $(DEV)  ## the documentation site, strictly, into site/
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

bump: $(LIGHT)  ## make bump VERSION=0.2.0: one version and one promise in all distributions, the day in the changelog
	$(RUN) scripts/bump.py $(VERSION)

clean:  ## remove the environments and everything that was built or cached
	rm -rf .venv .venv-onnx dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUN):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

# One pip command each: only so does an extra of the root resolve to a plugin's directory and not to the index.
$(LIGHT): $(PROJECTS) | $(RUN)
	$(PIP) install -e '.[$(RUNNER)]' $(LIGHT_PLUGINS:%=-e %)
	@touch $@

$(SERVER): $(PROJECTS) | $(RUN)
	$(PIP) install -e '.[$(RUNNER),server]' $(SERVER_PLUGINS:%=-e %)
	@touch $(LIGHT) $@

$(DEV): $(PROJECTS) requirements-dev.txt constraints.txt | $(RUN)
	$(PIP) install -r requirements-dev.txt
	@touch $(LIGHT) $(SERVER) $@
