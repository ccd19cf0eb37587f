# `make` prints what there is. PYTHON names the interpreter that makes the environment (3.11 or later).
PYTHON ?= python3
BIN := .venv/bin
NEEDS := a download of 0.9 GB, 3.1 GB of disk and some minutes
NEEDS_CUDA := pip's torch for Linux brings CUDA's libraries where no build for the CPU alone is at hand: then 3.3 GB, 6.4 GB of disk.
.DEFAULT_GOAL := help
.PHONY: help book pdf slides test lint notebooks labs grade students bench home clean

help: ## print this
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

book: $(BIN)/ready ## build the book; PAGES="04 11" runs no other pages
	@$(BIN)/python book/build.py $(PAGES)

pdf: $(BIN)/ready ## the built book as one PDF, for which it needs a Chromium
	$(BIN)/python book/make_pdf.py

slides: $(BIN)/ready ## slides for a course of four weeks, from the built book; with a Chromium, as PDF too
	$(BIN)/python book/make_slides.py

test: export OMP_NUM_THREADS := 1
test: book lint ## build the book, check style, run every test, a file at a time on each core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal tests/test_kernels_cuda.py

lint: $(BIN)/ready ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(BIN)/ready ## write the notebook beside each chapter
	$(BIN)/python book/make_notebooks.py

labs: $(BIN)/ready ## write each lab's notebook, checks and grader: make labs SEED=2027
	$(BIN)/python labs/make_labs.py $(if $(SEED),--seed $(SEED))

grade: $(BIN)/ready ## grade a folder of notebooks: make grade LAB=2 IN=folder OUT=grades.csv ARGS=--help
	$(BIN)/python labs/grade.py $(ARGS) $(LAB) $(IN) $(OUT)

students: $(BIN)/ready ## the students' repository: make students OUT=../course URL=https://github.com/you/course
	@test -n "$(OUT)" -a -n "$(URL)" || { echo "make students OUT=../course URL=https://github.com/you/course"; exit 2; }
	$(BIN)/python labs/make_course.py $(OUT) $(URL)

bench: $(BIN)/ready ## measure the kernels here: make bench NAME=my-cpu; writes benchmarks/results/
	$(BIN)/python benchmarks/cpu.py $(or $(NAME),$(shell uname -m))
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python benchmarks/gpu.py; else echo "no CUDA GPU here: benchmarks/gpu.py was not run"; fi

home: $(BIN)/ready ## give the project its address: make home URL=https://github.com/you/nf4lab
	@case "$(URL)" in https://*/*/*) ;; *) echo "make home URL=https://github.com/you/nf4lab"; exit 2;; esac
	sed -i.bak -E 's|^(  url: ).*|\1$(URL)|' _config.yml && rm _config.yml.bak
	$(BIN)/python book/make_notebooks.py
	$(BIN)/python labs/make_labs.py

clean: ## remove what was built, and the environment
	rm -rf _build .venv

$(BIN)/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nf4lab needs Python 3.11 or later; this is " + sys.version.split()[0])'
	@mkdir -p _build
	@echo "Installing into .venv: at first $(NEEDS). pip's own words go to _build/install.log."
	@test "$$(uname -s)" != Linux || echo "$(NEEDS_CUDA)"
	@$(PYTHON) -m venv .venv
	@for what in '-r requirements.txt' '--no-deps -e .'; do \
	  $(BIN)/pip install --disable-pip-version-check --progress-bar off $$what >> _build/install.log 2>&1 \
	    || { tail -n 20 _build/install.log; exit 1; }; done
	@touch $@
