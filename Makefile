# make demo: a tiny model learns to call python, from scratch, on a CPU.   make test: all tests.
# Both make .venv and install what they need first; only python 3.11 or newer and make have to be there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN = .venv/bin/python

.PHONY: demo test clean

demo: .venv/installed
	$(RUN) demo.py $$(test ! -e out/calc || echo --out_dir=out/demo-$$(date +%Y%m%d-%H%M%S))

test: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	$(RUN) -m pytest -q

.venv/installed: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/installed-test: pyproject.toml .venv/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

clean:
	rm -rf .venv
