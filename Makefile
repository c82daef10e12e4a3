# Each target is one command on a fresh machine: it makes .venv and installs from the lock if needed.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# What is installed is what these files say; the stamp is written last, so a broken install is done again.
LOCKS := requirements/cpu.lock requirements/no-deps.lock
STAMP := $(VENV)/.installed
# What is ours to check: a file of your own beside it is yours.
SOURCES := benchmarks deploy evaluator proto study teacher_server tests trainer

.DEFAULT_GOAL := help
.PHONY: help install demo study test test-long test-cluster check format bench stubs lock clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## the virtual environment, from the lock

$(STAMP): $(LOCKS) pyproject.toml
	@echo "Installing $$(cat $(LOCKS) | grep -c ==) packages into $(VENV); the first time takes two to six minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/cpu.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/no-deps.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

demo: $(STAMP) ## one teacher, two students, one evaluation, one report (TEACHER= and STUDENT= take names)
	@$(BIN)/python deploy/demo.py $(if $(TEACHER),--teacher '$(TEACHER)') $(if $(STUDENT),--student '$(STUDENT)') $(DEMO_FLAGS)

study: $(STAMP) ## the micro study: a teacher trained here, four sizes of students, a report
	@$(BIN)/python deploy/studies/micro_inputs.py build/micro
	@$(BIN)/tutelage study run deploy/studies/micro.yaml
	@$(BIN)/tutelage study report deploy/studies/micro.yaml

test: $(STAMP) check ## style, types, boundaries, and the whole test suite
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

test-long: $(STAMP) ## the long forms of the tests
	@$(BIN)/python -m pytest -m "long and not cluster" --timeout 3600 $(PYTEST_FLAGS)

test-cluster: $(STAMP) ## five hosts in network namespaces, cut off and lost while students train (root; under 15 minutes)
	@$(BIN)/python -m pytest -m cluster -s tests/cluster $(PYTEST_FLAGS)

check: $(STAMP) ## ruff, mypy, import-linter, buf, stubs up to date
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --quiet --check $(SOURCES)
	@$(BIN)/mypy --no-error-summary
	@PATH="$(BIN):$$PATH" $(BIN)/lint-imports --no-cache > build-lint-imports.log 2>&1 || { cat build-lint-imports.log; rm -f build-lint-imports.log; exit 1; }
	@rm -f build-lint-imports.log
	@cd proto/schema && $(BIN)/buf lint
	@$(BIN)/python deploy/make_stubs.py --check

format: $(STAMP) ## ruff's formatter and its safe fixes
	@$(BIN)/ruff check --fix $(SOURCES) ; $(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## what we measure (benchmarks/README.md)
	@for file in $(filter-out benchmarks/harness_% benchmarks/trl_% benchmarks/environments.py benchmarks/packaged_models.py benchmarks/slow_teacher.py benchmarks/dashboard_% benchmarks/demo_start.py,$(wildcard benchmarks/*.py)); do $(BIN)/python $$file || exit 1; done

stubs: $(STAMP) ## the Python stubs of proto/
	@$(BIN)/python deploy/make_stubs.py

lock: ## resolve requirements/cpu.in anew into requirements/cpu.lock
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip install -qq -r requirements/cpu.in
	@build/lock/bin/python -m pip freeze --all --exclude-editable | grep -vE '^pip==' | sed 's/+cpu$$//' > requirements/cpu.lock
	@rm -rf build/lock

clean: ## what the targets made, the environment included
	rm -rf $(VENV) build runs
