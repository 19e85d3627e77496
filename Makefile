# make demo       sets everything up in .venv, then compares SFT, DPO and TR-DPO on an embedded world
# make test       the tests              make test-long   those that take minutes
# make lab        JupyterLab             make clean       removes .venv and caches
# make notebooks  executes all notebooks at full scale and stores their outputs (10 minutes)
# make bench      speed and memory beside TRL's, on a machine that does nothing else (35 minutes)
# A second call installs nothing, unless pyproject.toml or constraints.txt changed.

PIP = .venv/bin/python -m pip --disable-pip-version-check
# One thread for each test process: the results do not depend on the machine, and processes do not compete.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest --durations=10 -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-long lab notebooks bench clean

demo: .venv/.ready
	.venv/bin/tralign demo

test: .venv/.ready-dev
	$(PYTEST)

test-long: .venv/.ready-dev
	$(PYTEST) -m long

lab: .venv/.ready-lab
	.venv/bin/jupyter lab notebooks

notebooks: .venv/.ready-dev
	.venv/bin/python notebooks/run_all.py

bench: .venv/.ready-dev
	.venv/bin/python -m benchmarks.against_trl

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@for python in python3.13 python3.12 python3.11 python3 python; do \
	    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || continue; \
	    if $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "making .venv with $$($$python --version)"; exec $$python -m venv --clear .venv; \
	    fi; \
	    lacking=$$python; \
	done; \
	if [ -n "$$lacking" ]; then \
	    echo "$$lacking lacks the venv module. On Debian and Ubuntu: apt-get install $$( \
	        [ "$$lacking" = python ] && echo python3 || echo $$lacking)-venv" >&2; \
	else \
	    echo "Python 3.11, 3.12 or 3.13 is needed, and none was found. On Debian and Ubuntu:" \
	        "apt-get install python3 python3-venv" >&2; \
	fi; exit 1

.venv/.ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing into .venv (a minute or more, the first time)"
	$(PIP) install --quiet -c constraints.txt -e '.[quant]'
	@touch $@

.venv/.ready-dev: .venv/.ready
	$(PIP) install --quiet -c constraints.txt -e '.[dev,quant,notebooks]'
	@touch $@

.venv/.ready-lab: .venv/.ready
	$(PIP) install --quiet -c constraints.txt -e '.[notebooks]'
	@touch $@
