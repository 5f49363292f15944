# `make demo` and `make test` need a Python 3.11 or newer with pip, and nothing else.
PYTHON ?= python3
ENV := py="$$($(PYTHON) scripts/python_for_fp8moe.py)" && "$$py"
PYTEST := $(ENV) -m pytest $$("$$py" -m tests.workers)

.PHONY: demo test test-gpu test-gpu-kernels test-gpu-ops test-multi-gpu test-triton-3.6 test-frameworks lint docs bench tune doctor clean

demo:  ## train a small MoE language model in FP8 and in BF16, and compare the losses
	@$(ENV) -m fp8moe train

test:  ## all tests that this machine can run
	@$(PYTEST)

test-frameworks:  ## the integrations, with the frameworks that they are for
	@py="$$($(PYTHON) scripts/python_for_fp8moe.py --frameworks)" && \
	"$$py" -m pytest $$("$$py" -m tests.workers) tests/integrations tests/test_examples.py tests/bench/test_model.py

test-gpu: test-gpu-kernels test-gpu-ops  ## the tests that need a GPU, alone

test-gpu-kernels:  ## those of the kernels
	@$(PYTEST) -m gpu tests/kernels

test-gpu-ops:  ## those of everything else
	@$(PYTEST) -m gpu --ignore=tests/kernels

test-multi-gpu:  ## the tests that need two GPUs of one host
	@$(ENV) -m pytest -m multi_gpu tests/gpu

test-triton-3.6: TRITON := build/triton-3.6.0
test-triton-3.6:  ## the kernels under the oldest supported Triton: bit-exactness and compilation for sm_90
	@test -d $(TRITON) || $(PYTHON) -m pip install --quiet --no-deps --target $(TRITON) triton==3.6.0
	@export PYTHONPATH=$(TRITON) && $(PYTEST) tests/kernels

lint:  ## style and types
	@py="$$($(PYTHON) scripts/python_for_fp8moe.py --own-environment)" && \
	"$$py" -m ruff check && "$$py" -m ruff format --check && "$$py" -m mypy

docs: build/mkdocs/made  ## the site, in build/site: fails if a link leads nowhere
	@PYTHONPATH=build/mkdocs $(PYTHON) -m mkdocs build --strict

# Nothing of it needs torch: docstrings are read, not imported.
build/mkdocs/made: constraints.txt
	@rm -rf $(@D)
	@$(PYTHON) -m pip install --quiet --target $(@D) -c constraints.txt mkdocs 'mkdocstrings[python]' ruff
	@touch $@

bench:  ## measure against BF16 on this machine
	@$(ENV) -m fp8moe bench

tune:  ## measure when FP8 pays on this GPU, for AUTO to choose by
	@$(ENV) -m fp8moe tune

doctor:  ## what will run here, and why
	@$(ENV) -m fp8moe doctor

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
