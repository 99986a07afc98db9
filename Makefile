# Every target works from a fresh clone: the environment is made when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv check format test test-slow test-nightly notebooks docs

venv: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/.docs: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[docs]'
	touch $@

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict
	$(BIN)/pytest

format: venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: venv
	$(BIN)/pytest

test-slow: venv
	$(BIN)/pytest -m slow

test-nightly: venv
	$(BIN)/pytest -m nightly

# Builds the site and serves it at http://127.0.0.1:8000; a page that is saved is built anew.
docs: .venv/.docs
	$(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

# Runs every notebook in full, on the real data, and saves its output in place.
notebooks: venv
	for notebook in notebooks/*.ipynb; do \
		echo "$$notebook"; \
		$(BIN)/jupyter execute --inplace --timeout=1800 "$$notebook" || exit 1; \
	done
