# `make` needs only python3 (3.11 or newer) with venv and pip; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

RESULTS := benchmarks/results
# torch's threads spin while they wait, and would take the cores that the loader's threads need.
BENCH := CUDA_VISIBLE_DEVICES= $(BIN)/python benchmarks

.PHONY: demo demo-shapes demo-inpaint demo-preserve test lint format bench bench-gpu

demo: $(STAMP)
	$(BIN)/kcache demo

demo-shapes: $(STAMP)
	$(BIN)/kcache demo --shapes --output demo-shapes-out

demo-inpaint: $(STAMP)
	$(BIN)/kcache demo --inpaint --output demo-inpaint-out

demo-preserve: $(STAMP)
	$(BIN)/kcache demo --preserve --output demo-preserve-out

# Three processes, as many a test waits for a disk, a server or a cluster: each file runs whole in one, in alphabetical
# order. The many processes that tests start find kcache compiled, wherever Python is told to keep no bytecode.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Benchmarks on the CPU with scale models, some twenty minutes on two idle cores. Left out, as they take long or write
# much: demo_seeds, endings, estimate, growth of ten million rows, integrity, kills, packing and scale;
# docs/how-we-measure.md has their commands.
bench: $(STAMP)
	$(BENCH)/train_step.py --stage prior --batch-size 16 --output $(RESULTS)
	$(BENCH)/train_step.py --stage prior --batch-size 16 --lora-rank 16 --output $(RESULTS)
	$(BENCH)/train_step.py --stage decoder --batch-size 4 --images 64 --output $(RESULTS)
	$(BENCH)/train_step.py --stage decoder --batch-size 4 --images 64 --lora-rank 16 --output $(RESULTS)
	$(BENCH)/train_step.py --stage prior --images 64 --image-side 64 --batch-size 32 --steps 5 --rounds 3 --levers \
		--output $(RESULTS)
	$(BENCH)/inpaint.py --output $(RESULTS)
	$(BENCH)/build.py --images 256 --output $(RESULTS)
	$(BENCH)/end_to_end.py --stage prior --images 128 --output $(RESULTS)
	$(BENCH)/end_to_end.py --stage decoder --images 32 --batch-size 4 --output $(RESULTS)
	$(BENCH)/growth.py --output $(RESULTS)
	$(BENCH)/loader.py --output $(RESULTS)/loader-cpu.json
	$(BENCH)/shapes.py --output $(RESULTS)
	$(BENCH)/parity.py --output $(RESULTS)/parity-cpu.json
	$(BENCH)/read_checks.py --rounds 21 --output $(RESULTS)/read_checks-cpu.json
	$(BENCH)/startup.py --rounds 2 --output $(RESULTS)/startup-cpu.json
	$(BENCH)/report.py $(RESULTS)

# Every benchmark that needs a GPU, with networks of the published size and random weights, ten minutes at most.
bench-gpu: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/gpu.sh full $(RESULTS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
