# Two commands: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard kernels/*.c kernels/*.cu kernels/*.h)

AARCH64 := build/aarch64
CUDA := build/cuda
PILLOW := build/pillow

.PHONY: demo test test-slow fuzz test-pillow test-aarch64 wheel-aarch64 test-cuda jetson clean

demo: $(VENV)/.demo
	$(BIN)/dualfocus ask examples/scene.png "$$(cat examples/scene.txt)" --show examples/scene.answer.png

test: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/pytest -n auto -m "not slow"

# Tests of damaged files have processes of their own.
test-slow: $(VENV)/.test
	$(BIN)/pytest -n auto -m slow --ignore-glob='tests/test_fuzz_*'
	$(BIN)/pytest -m slow tests/test_fuzz_*.py

# Ten times the damaged files that the slow tests try; more with `make fuzz FUZZ=100`.
fuzz: export FUZZ ?= 10
fuzz: $(VENV)/.test
	$(BIN)/pytest -m slow tests/test_fuzz_*.py

# Pictures and the kernel with the oldest Pillow that is allowed; `make test` has the newest.
test-pillow: $(VENV)/.test $(PILLOW)/.made
	PYTHONPATH=$(CURDIR)/$(PILLOW) $(BIN)/python -c 'import PIL; print("Pillow", PIL.__version__, "from", PIL.__file__)'
	PYTHONPATH=$(CURDIR)/$(PILLOW) $(BIN)/pytest -m "not slow" tests/test_image.py tests/test_pictures.py tests/test_kernels.py

$(PILLOW)/.made: pyproject.toml | $(BIN)/python
	rm -rf $(PILLOW)
	sed --quiet 's/.*"pillow>=\([0-9.]*\)".*/pillow==\1/p' pyproject.toml | \
	    xargs $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(PILLOW)
	touch $@

# Elsewhere than on 64-bit ARM it is cross-compiled. Of Python's headers those of this machine do: with the limited
# API, what they say of sizes holds for 64-bit ARM as it does for x86-64.
ifneq ($(shell uname -m),aarch64)
wheel-aarch64: export CC := aarch64-linux-gnu-gcc
wheel-aarch64: export LDSHARED := aarch64-linux-gnu-gcc -shared
wheel-aarch64: export _PYTHON_HOST_PLATFORM := linux-aarch64
endif
wheel-aarch64: | $(BIN)/python
	rm -f dist/*-linux_aarch64.whl
	$(BIN)/pip wheel --quiet --no-deps $(PIP_FLAGS) --wheel-dir dist .

# The wheel on an emulated 64-bit ARM processor (qemu-user): the kernel's whole test, and the model's answers.
test-aarch64: $(VENV)/.test wheel-aarch64
	PYTHON=$(BIN)/python .ci/aarch64 $(AARCH64) dist/*-linux_aarch64.whl
	$(BIN)/pytest tests/test_aarch64.py

# ONNX Runtime's CUDA provider, over a CUDA that computes nothing: no GPU is needed. Its wheel and the CPU's share a
# folder, so that it has an environment of its own.
test-cuda: $(VENV)/.test $(CUDA)/.made
	$(BIN)/pytest tests/test_cuda_provider.py

$(CUDA)/.made: pyproject.toml | $(BIN)/python
	$(BIN)/python -m venv --clear $(CUDA)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])' | \
	    xargs $(CUDA)/bin/pip install --quiet --disable-pip-version-check 'onnxruntime-gpu==1.31.*'
	touch $@

# The documentation as a site, build/site, with the notebook executed. A warning is an error.
DOCS := build/docs
.PHONY: docs
docs: $(DOCS)/.made
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

$(DOCS)/.made: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m venv --clear $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check --editable '.[cpu,docs]'
	touch $@

# On a Jetson: deploy/jetson/README.md.
jetson: wheel-aarch64
	docker build $(if $(BASE),--build-arg BASE=$(BASE)) --file deploy/jetson/Dockerfile --tag dualfocus-jetson .
	mkdir -p build/jetson
	docker run --rm --runtime nvidia --user "$$(id -u):$$(id -g)" --group-add video \
	    --volume /etc/nv_tegra_release:/etc/nv_tegra_release:ro --volume "$(abspath $(MODEL)):/model" --volume "$(CURDIR)/build/jetson:/work" \
	    dualfocus-jetson /model /work $(PRECISION)

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
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info
