# Each target makes its own .venv where there is none, from Python 3.11 and pip alone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A process a core, each with whole test files, since what a file's tests share is made once.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all test-lowest check fuzz lock audit docs pictures bench results clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[nuclei,dev]"
	touch $@

demo: .venv/ready
	$(BIN)/histossl demo --out out/demo

test: .venv/ready
	$(BIN)/pytest -m "not slow" $(PARALLEL)

test-all: .venv/ready
	$(BIN)/pytest $(PARALLEL)

# The lowest versions that pyproject.toml allows, in an environment of their own.
.lowest/ready: pyproject.toml constraints.txt .ci/lowest.py
	$(PYTHON) -m venv .lowest
	.lowest/bin/python .ci/lowest.py > .lowest/constraints.txt
	.lowest/bin/pip install --quiet --disable-pip-version-check -c .lowest/constraints.txt -e ".[nuclei,dev]"
	touch $@

test-lowest: .lowest/ready
	.lowest/bin/pytest -m "not slow" $(PARALLEL)

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Ten minutes of changed files for every reader; Linux only.
fuzz: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	mkdir -p out/fuzz
	cd out/fuzz && ../../$(BIN)/python ../../.ci/fuzz.py 10

# The lock file, for every system and Python, without hashes since torch may be a wheel of your own: versions that it has stay, unless `make lock ARGS=--upgrade` is asked for.
LOCKED := nuclei onnx hub cluster fuzz dev docs
lock:
	$(PYTHON) -m venv .lock
	.lock/bin/pip install --quiet --disable-pip-version-check "uv>=0.9"
	.lock/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --no-annotate \
	    --custom-compile-command "make lock" $(addprefix --extra ,$(LOCKED)) $(ARGS) pyproject.toml -o constraints.txt

# out/sbom.json lists all that is in .venv, with licences and who needs what (CycloneDX). Then the known vulnerabilities
# of the locked versions: a version that could not be looked up fails, too.
audit: .venv/ready
	$(PYTHON) -m venv .audit
	.audit/bin/pip install --quiet --disable-pip-version-check "pip-audit>=2.7" "cyclonedx-bom>=7"
	mkdir -p out
	.audit/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible --output-file out/sbom.json
	.audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict

docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The screenshots of the pages, taken anew from the demonstration by the system's Chromium.
pictures: demo
	$(BIN)/python .ci/pictures.py out/demo

bench: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	for script in $(filter-out benchmarks/results% benchmarks/view_tiles.py benchmarks/nuclei_quality.py benchmarks/slide_ablation.py benchmarks/tile_encoders.py benchmarks/real_tiles.py benchmarks/real_cells.py benchmarks/painted_survival.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# Hours on two cores; an interrupted run goes on where it was. HISTOSSL_DATA names the folder of cohort/lymphoma.
results: .venv/ready
	$(BIN)/python benchmarks/results.py

clean:
	rm -rf .venv .lowest .lock .audit out
