# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard kernels/*.c kernels/*.cu kernels/*.h)

.PHONY: demo test test-slow lint clean

demo: $(VENV)/.demo
	$(BIN)/dualfocus ask examples/scene.png "$$(cat examples/scene.txt)" --show examples/scene.answer.png

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[cpu]'
	touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[cpu,test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
