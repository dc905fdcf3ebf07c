# `make demo` runs the embedded default, `make test` passes the tests; both set up what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
GPU_PYTHON ?= python3
GPU_WHEELS := $(wildcard build/gpu-wheels/*.whl)
GPU_RUN = PYTHONPATH=$(CURDIR)/.types:$(CURDIR)/build/gpu-site $(GPU_PYTHON)
# The tests of one file stay together, since they share what is made for them; the longest begin first (tests/by_file.py,
# tests/conftest.py).
SIDE_BY_SIDE := --numprocesses auto --dist loadfile --no-loadscope-reorder
# pip compiles with one core. A few files of other packages are not meant to compile.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile
COMPILE := $(BIN)/python -m compileall -qq --workers 0 .venv/lib || true
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Empty: Python may write bytecode. Each step and many tests start a process.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow numeric gpu-wheels gpu-site gpu-check gpu-engine gpu-evidence lint compiled wheel images sbom clean

demo: .venv/installed
	$(BIN)/mixtune run

test: .venv/tests-installed
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

# Containers, the servers of k8s/, storms, compilers, measurements of memory, the whole demo.
test-slow: .venv/tests-installed
	$(BIN)/python -m pytest -m slow $(SIDE_BY_SIDE)

# As an older processor rounds: what torch and oneDNN compute without the newest instructions. The slow ones run once, above.
numeric: .venv/tests-installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -m "numeric and not slow" $(SIDE_BY_SIDE)

# What a machine with a GPU and without a network lacks: wheels for its Python, to be carried there with the repository.
gpu-wheels:
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--constraint requirements.txt --requirement tests/gpu/wheels.txt --dest build/gpu-wheels

# Unpacks them on that machine.
gpu-site: .types/mixtune
	rm -rf build/gpu-site
	$(if $(GPU_WHEELS),$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --target build/gpu-site $(GPU_WHEELS))

# There: everything in tests/gpu with the torch and transformers that it has. What was measured goes to build/gpu-check.json.
gpu-check: gpu-site
	mkdir -p build
	GPU_REPORT=build/gpu-check.json $(GPU_RUN) -m pytest -m gpu tests/gpu $(GPU_CHECK)

# There: the speed of a step, docs/gpu.md. Options go in GPU_ENGINE.
gpu-engine: gpu-site
	mkdir -p build
	$(GPU_RUN) -m tests.benchmarks.gpu_engine --json build/gpu-engine.json $(GPU_ENGINE)

# There: a whole comparison. GPU_EVIDENCE holds --text, --labelled and --task.
gpu-evidence: gpu-site
	$(GPU_RUN) -m tests.benchmarks.gpu_evidence --output build/gpu-evidence $(GPU_EVIDENCE)

lint: .venv/tests-installed .types/mixtune
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compiled: .venv/installed
	$(BIN)/python -m mixtune.pipelines.generate

# A wheel and a source distribution, in dist.
wheel: .venv/tests-installed
	$(BIN)/python -m build --no-isolation --outdir dist

# One image for each step, by plain `docker build`. Options go in IMAGES, such as IMAGES="--torch cuda"; --help lists them.
images: .venv/installed
	$(BIN)/python docker/build_images.py $(IMAGES)

# A software bill of materials for each image, in build/sbom.
sbom: .venv/installed
	$(BIN)/python docker/bill_of_materials.py build/sbom

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes with the rest; where a CPU wheel lies at hand, pip's own settings (PIP_FIND_LINKS) let it be found.
.venv/installed: .venv/bin/python pyproject.toml requirements.txt
	$(INSTALL) --requirement requirements.txt
	$(INSTALL) --no-deps --editable .
	$(COMPILE)
	touch $@

.venv/tests-installed: .venv/installed requirements-dev.txt
	$(INSTALL) --requirement requirements-dev.txt
	$(COMPILE)
	touch $@

# Lets mypy and editors follow imports from one of the two packages into the other.
.types/mixtune:
	mkdir -p .types/mixtune
	ln -sfn ../../components .types/mixtune/components
	ln -sfn ../../pipelines .types/mixtune/pipelines

clean:
	rm -rf .venv .types build dist *.egg-info
