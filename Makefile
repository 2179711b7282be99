# `make help` lists the commands. Everything lives in .venv, made on first use; nothing is installed or
# built again before a file it depends on changes. `make gpu` alone uses what is there: GPU_PYTHON, with
# a torch that sees the GPU.

PYTHON ?= python3
TORCH ?= torch==2.13.0
GPU_PYTHON ?= python3

BIN := .venv/bin
CPP := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh')
BUILD := setup.py CMakeLists.txt pyproject.toml taskgroup/__init__.py $(shell find csrc -type f)
# The wanted torch is part of the name, so that another TORCH installs another one.
TORCH_STAMP := .venv/$(subst /,-,$(subst $(eval ) ,-,$(TORCH))).stamp
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo demo-qm9 test full lint format docs links examples bench dist check-dist aarch64 gpu clean
.DELETE_ON_ERROR:

help: ## list the commands
	@awk -F ' *:[^#]*## ' '/^[a-z0-9-]+:[^#]*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/report.stamp ## train on the photograph in three ways and compare them (5 minutes)
	$(BIN)/python examples/demo.py

demo-qm9: .venv/report.stamp .venv/qm9.stamp ## train on molecules in three ways and compare them (3 minutes)
	$(BIN)/python examples/qm9.py

test: .venv/dev.stamp ## run the tests (9 minutes on 2 cores); ARGS="-k affinity" runs some
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal $(ARGS)

# One of them reads the molecules of QM9, 100 MB that only this and demo-qm9 install.
full: .venv/dev.stamp .venv/qm9.stamp ## run the tests that `make test` leaves out because they are slow (4 minutes)
	$(BIN)/python -m pytest --numprocesses=auto --dist=worksteal -m full $(ARGS)

lint: .venv/dev.stamp ## run the linters and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: .venv/dev.stamp ## format the code and fix what the linters can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Warnings are errors. The pages load nothing from other hosts.
docs: .venv/dev.stamp ## build the documentation in build/docs (under a minute)
	$(BIN)/python -m sphinx -q -E -n -W --keep-going -d build/doctrees docs build/docs
	@! grep -rnE '<(script|link|img|iframe)[^>]* (src|href)="(https?:)?//' build/docs --include='*.html'

links: .venv/dev.stamp ## check the links to other sites in the documentation; needs network
	$(BIN)/python -m sphinx -q -E -b linkcheck -d build/doctrees docs build/links

# They write into runs/, and go on with what they find there.
examples: .venv/dev.stamp ## run the programs in examples/ (under a minute)
	$(BIN)/python examples/plain.py
	$(BIN)/python examples/with_lightning.py
	$(BIN)/accelerate launch --cpu --num_processes 1 examples/with_accelerate.py
	$(BIN)/python examples/with_trainer.py
	$(BIN)/torchrun --nproc-per-node 2 examples/ddp.py
	$(BIN)/python examples/several_data_sets.py
	$(BIN)/python examples/several_data_sets.py --turns
	$(BIN)/torchrun --nproc-per-node 2 examples/several_data_sets.py
	$(BIN)/python examples/tabular.py
	WANDB_SILENT=true $(BIN)/python examples/dense_wandb.py
	$(BIN)/python examples/text_mlflow.py
	$(BIN)/python examples/recommender.py

bench: .venv/dev.stamp ## run the benchmarks, which print ratios (11 minutes on 2 cores); ARGS="--save --full" keeps all sizes
	$(BIN)/python -m pytest benchmarks -s $(ARGS)

# The wheel is built from the source distribution, against the torch that is here. auditwheel gives
# it the tag of the systems it runs on; torch's libraries are torch's to bring.
dist: .venv/dev.stamp ## build the source distribution and the wheel in dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist/linux
	mv dist/linux/*.tar.gz dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --wheel-dir dist dist/linux/*.whl
	rm -r dist/linux

check-dist: .venv/dev.stamp ## check that the files in dist/ install and run (5 minutes)
	$(BIN)/python -m pytest tests/check_dist.py $(ARGS)

# The tests are C++ and need no torch of that processor; the tensor ops are compiled with the headers
# of the torch that is here.
aarch64: $(TORCH_STAMP) ## compile the native code for 64-bit ARM and run its tests in an emulator (2 minutes)
	@for tool in aarch64-linux-gnu-g++ qemu-aarch64; do command -v $$tool > /dev/null || { \
	  echo "make aarch64 needs $$tool: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }; done
	$(BIN)/cmake -S tests/csrc -B build/csrc-tests/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-cpu;cortex-a53;-L;/usr/aarch64-linux-gnu" \
	  "-DTORCH_INCLUDE_DIRS=$$($(BIN)/python -c 'from torch.utils.cpp_extension import include_paths; print(*include_paths(), sep=";")')"
	$(BIN)/cmake --build build/csrc-tests/aarch64
	$(BIN)/ctest --test-dir build/csrc-tests/aarch64 --output-on-failure --timeout 300

gpu: ## build, test and measure on a GPU (9 minutes); ARGS=--dry-run runs its steps on the CPU
	$(GPU_PYTHON) benchmarks/gpu.py $(ARGS)

clean: ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info taskgroup/*.so

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "taskgroup needs Python 3.10 or later, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	$(PYTHON) -m venv .venv

$(TORCH_STAMP): .venv/bin/python
	$(BIN)/pip install --quiet $(TORCH) numpy
	$(BIN)/pip install --quiet "setuptools>=77" "cmake>=3.22" ninja "pybind11>=2.13"
	@rm -f .venv/torch*.stamp
	@touch $@

.venv/%.stamp: $(TORCH_STAMP) $(BUILD)
	@$(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]" $(TORCH) || { \
	  echo "pip could not install taskgroup[$*], for the reason above; it needs a package index (PIP_INDEX_URL)."; exit 1; }
	@touch $@
