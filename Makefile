# Two commands do everything on a fresh machine: `make demo` and `make test`; `make test-all` adds what takes long.
# While you work: `make check`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs

.PHONY: install demo pictures check lint types quick test test-all examples wheel-test fuzz weights held-out accuracy \
	bench bench-pipeline sanitize triton gpu

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-data.txt pyproject.toml setup.py $(wildcard kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The real T1 average as an individual subject with synthetic lesions, segmented, and compared with the truth.
demo: install
	$(BIN)/grcsf-fast synthesize -o demo --seed 3000008 --contrast template --skull no
	$(BIN)/grcsf-fast predict -i demo/images/synthetic_3000008.nii.gz -o demo/predictions
	$(BIN)/grcsf-fast evaluate -p demo/predictions/synthetic_3000008.nii.gz -t demo/masks/synthetic_3000008.nii.gz
	@echo "look at demo/predictions/synthetic_3000008_overlay.png"

# Those of the README: the demo's, and times of a result file of `make bench`, of which RUN= names another.
RUN ?= benchmarks/results/amd-epyc-2-cores-2026-11-29.json
pictures: demo
	$(BIN)/python -m benchmarks.pictures --overlay demo/predictions/synthetic_3000008_overlay.png --run $(RUN)

# The inner loop, under 90 s on 2 cores.
check: lint types quick

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/basedpyright --level error

# A test file of each room that is done within seconds.
QUICK_TESTS := $(addprefix tests/,ops/test_functional.py networks/test_networks.py pretrained/test_bundle.py data/test_masks.py \
	data/test_geometry.py data/test_intensities.py data/test_volumes.py inference/test_overlay.py \
	evaluation/test_evaluate.py training/test_sampling.py runtime)

quick: install
	$(PYTEST) -q -m "not slow" $(QUICK_TESTS)

# A process per core, at most four, each with one thread; the tests of a file share what they prepare.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: install
	$(PYTEST) -m "not slow"

# What `make test` runs, then the rest: kills by the dozen, a minute of damaged files, the whole matrix of the Triton
# kernels in the interpreter, every instruction set, every Triton kernel compiled.
test-all: test
	$(PYTEST) --dist worksteal -m slow

# The examples with nnU-Net too, in an environment of its own: nnU-Net wants another PyTorch.
examples: .venv-examples/.installed
	.venv-examples/bin/python -m pytest tests/package/test_examples.py

.venv-examples/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv-examples
	.venv-examples/bin/python -m pip install --quiet nnunetv2==2.8.1 pytest pytest-benchmark --editable ".[app]"
	touch $@

# Trains on from the packaged weights, on synthetic subjects; the last line stores what comes of it in their place, where
# the card is to follow.
weights: install
	$(BIN)/python -m benchmarks.weights -o $(RUNS)/network
	$(BIN)/python -m benchmarks.ship $(RUNS)/network/bundle

# Figures on 24 held-out synthetic subjects of the frozen, the present and the validation's generator.
held-out: install
	$(BIN)/python -m benchmarks.held_out --subjects old -o benchmarks/results/held_out.json
	$(BIN)/python -m benchmarks.held_out --subjects new -o benchmarks/results/held_out_new.json
	$(BIN)/python -m benchmarks.held_out --subjects validation -o benchmarks/results/held_out_validation.json
	$(BIN)/python -m benchmarks.ship --card

# What the units add, and the networks people use beside ours; hours, and what is stopped goes on. QUICK=1 for a look.
JOBS ?= 2
accuracy: install
	$(BIN)/python -m benchmarks.accuracy --jobs $(JOBS) $(if $(QUICK),--quick,--report benchmarks/results/accuracy.md)

# Everything measured, peers beside ours, into one file of results and a page with pictures; QUICK=1 for a look.
# Run nothing beside it.
bench: install
	$(BIN)/python -m benchmarks.run $(if $(QUICK),--quick -o $(RUNS)/bench-quick.json) --report

# Whole runs over folders of volumes, against the plain path; their memory; what a busy core costs them.
bench-pipeline: install
	$(BIN)/python -m benchmarks.pipeline --only speed -o benchmarks/results/pipeline.md
	$(BIN)/python -m benchmarks.pipeline --only floor -o benchmarks/results/pipeline_floor.md
	$(BIN)/python -m benchmarks.pipeline --only flat large -o benchmarks/results/pipeline_memory.md
	$(BIN)/python -m benchmarks.pipeline --only neighbour -n 4 -o benchmarks/results/pipeline_neighbour.md

# The op tests on kernels built with the address and undefined-behaviour sanitizers; those of threads on the threads that the
# kernels have without OpenMP, with the thread sanitizer.
sanitize: install
	GRCSF_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer" \
		$(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=tests/helpers $(BIN)/python -m pytest -p sanitized \
		tests/ops/test_global_compensation.py tests/ops/test_patch_cross_attention.py tests/ops/test_every_op.py \
		tests/ops/test_cpp.py tests/ops/test_stage_ops.py tests/networks/test_fast_layers.py \
		tests/networks/test_fast_training.py tests/networks/test_joined.py \
		-k "(cpp or stage_ops or fast_layers or fast_training or joined) and not compiles and not exported"
	GRCSF_CXXFLAGS="-O1 -g -fno-openmp -pthread -fsanitize=thread" \
		$(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize-threads --build-temp build/sanitize-threads-objects
	LD_PRELOAD="$$(g++ -print-file-name=libtsan.so)" SANITIZED=build/sanitize-threads \
		TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" PYTHONPATH=tests/helpers \
		$(BIN)/python -m pytest -p sanitized -k "threads or joined" \
		tests/ops/test_cpp.py tests/ops/test_stage_ops.py tests/networks/test_fast_layers.py \
		tests/networks/test_fast_training.py tests/networks/test_joined.py

# Damaged NIfTI files against the reader for ten minutes; `make test-all` has one of them.
fuzz: install
	$(BIN)/python tests/data/fuzz_volumes.py --seconds 600 --seed $$(date +%s)

# The package as others get it: sdist, wheel from it, installed into an empty environment, a forward and a prediction.
wheel-test: install
	rm -rf dist build/wheel-test
	$(BIN)/python -m build --no-isolation --outdir dist
	$(PYTHON) -m venv build/wheel-test
	build/wheel-test/bin/python -m pip install --quiet --constraint requirements.txt "$$(ls dist/*.whl)[app]"
	cd build/wheel-test && PATH="$$PWD/bin:$$PATH" bin/python ../../tests/package/installed.py

# The Triton kernels without a GPU: compiled for seven, their traffic counted, whole networks predicted; then what needs one.
triton: install
	$(BIN)/python -m benchmarks.triton_compile -o benchmarks/results/triton_compile.md
	$(BIN)/python -m benchmarks.triton_traffic -o benchmarks/results/triton_traffic.md
	$(BIN)/python -m benchmarks.roofline -o benchmarks/results/roofline.md

gpu: install
	$(BIN)/python -m benchmarks.gpu
