# make demo    set up, then prune a small real model with text that it wrote itself
# make test    set up, then run the tests
# make check   the same, after ruff and pyright
# make test-gpu    on a machine with an NVIDIA GPU: set up, then run what only a GPU can show
# `make PYTHON=python3.12 ...` chooses the interpreter that .venv is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/demo-model
CUDA := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TORCH_CPU := torch==2.13.0

.PHONY: demo test test-slow test-gpu check constraints setup clean

demo: setup $(MODEL)/model.safetensors
	$(BIN)/calibprune run configs/demo.yaml

test: setup
	$(BIN)/pytest -m "not slow"

test-slow: setup
	$(BIN)/pytest -m slow

# Everything that only a GPU can show, and one layer of LLaMA-3-70B's shapes beside its floor.
test-gpu: setup
	$(BIN)/pytest -n 0 tests/gpu --device cuda
	$(BIN)/python benchmarks/gpu_layer.py --repeats 3
	$(BIN)/python benchmarks/gpu_layer.py --repeats 3 --method wanda
	$(BIN)/python benchmarks/gpu_layer.py --repeats 3 --pattern 2:4 --batch-sequences 2

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest -m "not slow"

# The versions that every node of a cluster has, for the Python of the image. Versions in the file are kept where
# possible; without the file the newest are taken. By itself, uv would take a cuda-python of another CUDA than torch's.
constraints: setup
	printf '%s\n' "vllm[runai]" "cuda-python>=13" | $(BIN)/uv pip compile pyproject.toml - --quiet \
	  --extra cuda --python-platform x86_64-manylinux_2_28 --python-version 3.12 --no-annotate \
	  --custom-compile-command "make constraints" --output-file cluster/deploy/constraints.txt

setup: $(VENV)/.ready

# With an NVIDIA GPU: the CUDA builds. Without: first torch's CPU build, from pip's own sources or else from PyTorch's,
# then the rest. torchvision and the like come with it as CUDA builds that cannot be imported and would break
# transformers, so they are removed. Compiles on all cores, which pip does not, except for what nothing imports.
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip uv
ifneq ($(CUDA),)
	$(BIN)/pip install --quiet --no-compile --editable ".[cuda,dev]"
else
	$(BIN)/pip install --quiet --no-compile "$(TORCH_CPU)+cpu" \
	  || $(BIN)/uv pip install --quiet --python $(BIN)/python --torch-backend cpu "$(TORCH_CPU)"
	$(BIN)/pip install --quiet --no-compile --editable ".[cpu,dev]"
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	$(BIN)/python -m compileall -q -j 0 -x '/(tests?|anthropic|cfnlint)/' $(VENV)/lib > /dev/null 2>&1 || true
	touch $@

$(MODEL)/model.safetensors: | setup
	$(BIN)/calibprune demo-model $(MODEL)

clean:
	rm -rf $(VENV) .cache runs
