# Everything that a contributor or CI runs. `make` alone lists the targets.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
ARGS    ?=

FRAMEWORKS   ?= .venv-integrations
LLAMAFACTORY ?= .venv-llamafactory

BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist worksteal
FOLDERS := lightning_adam_mini tasks cli configs
TYPES   := build/types
# What breaks most easily and costs users most: several processes, checkpoints, resumed runs, measurements. CI runs the
# slow tests of these files too.
IN_CI   := $(addprefix tests/parity/test_,fused.py qkv_forward.py sharded_formats.py sharded_state.py sharding.py \
	triton.py) \
	$(addprefix tests/integration/test_,advise_command.py bench.py checkpoints.py convert.py ddp.py diffusion.py \
	divergence.py explain.py export_predict.py fit.py graph.py hessian_command.py hessian_sharded.py layouts.py \
	nodes.py recipes.py resume.py run_meaning.py sharded_checkpoints.py sharded_fit.py vision.py) \
	$(addprefix tests/unit/,cli hessian measure/test_activations.py tasks/test_llm_data_stdlib.py \
	tasks/test_parallel_sharding.py) tests/unit/partition/test_wrapped_models.py tests/guards/test_wheel.py \
	tests/unit/optim/test_triton_aot.py::test_no_kernel_spills_registers tests/property/test_partition_properties.py \
	tests/integrations

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install fit test test-ci test-all test-integrations lint format wheel clean

help: ## List the targets
	@echo 'usage: make TARGET [ARGS="..."] [PYTHON=python3] [WORKERS=2]'
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

install: $(STAMP) ## Create .venv with every domain and the development tools

$(STAMP): pyproject.toml setup.py $(wildcard tasks/*/requirements.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[domains,dev]'
	touch $@

fit: install ## Train the small GPT-2 recipe; ARGS="--trainer.max_steps 100" adds options
	$(BIN)/adam-mini fit --config llm/gpt2_tiny.yaml $(ARGS)

test: install ## Run the fast tests, about six minutes on two cores; ARGS="-k blocks" selects
	$(PYTEST) -m 'not slow and not gpu' $(ARGS)

test-ci: install ## Run the slow tests that CI runs too: several processes, checkpoints, resuming, measurements
	$(PYTEST) -m 'slow and not gpu' $(IN_CI) $(ARGS)

test-all: install ## Run every test, the slow ones too, and on a GPU where there is one
	$(PYTEST) $(ARGS)

test-integrations: ## Run the tests of other frameworks, in two environments of their own
	test -x $(FRAMEWORKS)/bin/python || $(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$(FRAMEWORKS)/bin/python -m pip install --editable '.[domains,dev]'
	@# DeepSpeed's build imports torch, and its kernels are not needed here.
	DS_BUILD_OPS=0 $(FRAMEWORKS)/bin/python -m pip install --no-build-isolation --editable '.[integrations]'
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/pytest -m 'not gpu' tests/integrations $(ARGS)
	@# Its versions of transformers and trl are older.
	test -x $(LLAMAFACTORY)/bin/python || $(PYTHON) -m venv $(LLAMAFACTORY)
	$(LLAMAFACTORY)/bin/python -m pip install --quiet --upgrade pip
	$(LLAMAFACTORY)/bin/python -m pip install adam-mini hypothesis llamafactory==0.9.5 'pytest>=9' --editable .
	OMP_NUM_THREADS=1 $(LLAMAFACTORY)/bin/python -m pytest -k llamafactory \
		tests/integrations/test_llamafactory.py tests/integrations/test_pages.py $(ARGS)

lint: install ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy finds packages by folder, so it reads a copy laid out as in the wheel; sed names the files of the checkout.
	rm -rf $(TYPES)
	$(BIN)/python setup.py --quiet build_py --build-lib $(TYPES)
	$(BIN)/mypy | sed -E 's#^$(TYPES)/lightning_adam_mini/(tasks|cli|configs)/#\1/#; s#^$(TYPES)/##'

format: install ## Fix style and format with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: install ## Build the source archive and the wheel into dist/
	rm -rf build dist
	$(BIN)/python -m build

clean: ## Remove builds and caches; .venv stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
