# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard kernels/*.c kernels/*.h)

AARCH64 := build/aarch64

.PHONY: demo test test-slow test-aarch64 wheel-aarch64 clean

demo: $(VENV)/.demo
	$(BIN)/dualfocus ask examples/scene.png "$$(cat examples/scene.txt)" --show examples/scene.answer.png

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/pytest -m "not slow"

test-slow: $(VENV)/.test
	$(BIN)/pytest -m slow

# Needs aarch64-linux-gnu-gcc. Of Python's headers those of this machine do: with the limited API, what they say of
# sizes holds for 64-bit ARM as it does for x86-64.
wheel-aarch64: | $(BIN)/python
	rm -f dist/*-linux_aarch64.whl
	CC=aarch64-linux-gnu-gcc LDSHARED="aarch64-linux-gnu-gcc -shared" _PYTHON_HOST_PLATFORM=linux-aarch64 \
	    $(BIN)/pip wheel --quiet --no-deps $(PIP_FLAGS) --wheel-dir dist .

# The wheel on an emulated 64-bit ARM processor (qemu-user): the kernel's whole test, and the model's answers.
test-aarch64: $(VENV)/.test wheel-aarch64
	PYTHON=$(BIN)/python .ci/aarch64 $(AARCH64) dist/*-linux_aarch64.whl
	$(BIN)/pytest tests/test_aarch64.py

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
