# On a fresh machine: `make demo` and `make test`. Both create .venv and install what they need into it. They install again
# only when pyproject.toml has changed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Each test runs on one thread; pytest runs one process for each core, and one that is idle takes tests from the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The oldest Python and torch that pyproject.toml promises, other releases between, and the newest. Each needs a few GB.
ELSEWHERE ?= python3.10=torch==2.4.0 python3.11=torch python3.12=torch==2.6.0 python3.13=torch

.PHONY: demo test slow all nightly ci docs lint dist package elsewhere clean

demo: $(VENV)/cli.installed
	$(BIN)/narrower prune

test: lint
	$(PYTEST)

# The tests that the default run leaves out.
slow: $(VENV)/dev.installed
	$(PYTEST) -m slow

# All tests, in one run.
all: $(VENV)/dev.installed
	$(PYTEST) -m ""

# Two at a time: mypy runs on one core only, and the documentation takes seconds. What fails lets the others end.
ci: $(VENV)/dev.installed
	$(MAKE) --jobs=2 --keep-going docs lint all

# All tests, with two thousand random networks and damaged files for each property, others each time.
nightly: $(VENV)/dev.installed
	NARROWER_EXAMPLES=2000 $(PYTEST) -m ""

# The documentation, in site/. A link that leads nowhere is an error.
docs: $(VENV)/dev.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# The wheel and the source distribution, in dist/.
dist: $(VENV)/dev.installed
	rm -rf build dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist

# Both, installed in fresh environments with nothing but their metadata, and tried there; the wheel with the command line too.
package: dist
	.ci/elsewhere dist/*.whl $(PYTHON)
	EXTRA=cli .ci/elsewhere dist/*.whl $(PYTHON)
	.ci/elsewhere dist/*.tar.gz $(PYTHON)

# The wheel with other Pythons and releases of torch. One that this machine lacks is an error, after all others.
elsewhere: dist
	@missing=; for pair in $(ELSEWHERE); do echo "== $$pair"; \
	  .ci/elsewhere dist/*.whl $${pair%%=*} $${pair#*=} || missing="$$missing $$pair"; \
	done; [ -z "$$missing" ] || { echo "not well:$$missing" >&2; exit 1; }

# The extra that is installed is the name of the stamp file: .venv/cli.installed, .venv/dev.installed (which has all of cli).
$(VENV)/%.installed: pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "narrower needs Python 3.10 or later; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }; \
	  echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@ $(if $(filter dev,$*),$(VENV)/cli.installed)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
