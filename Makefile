# Two targets do everything on a machine with python3 (3.11 or newer) and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-compiled fuzz bench bench-replay lint lock clean

.venv/.installed: requirements-dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"burstgate needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]} (set PYTHON=...)")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: .venv/.installed
	@$(BIN)/burstgate demo

# Everything but what takes minutes or a real vLLM, two at a time; what needs the machine for itself comes last.
ALONE := tests/e2e/test_load.py tests/replay/test_runner.py
test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not vllm" $(ALONE:%=--ignore=%)
	$(BIN)/python -m pytest -m "not slow and not vllm" $(ALONE)

# The rest: the long crash and outage rounds, then what counts milliseconds for a minute, and the suites against a real
# vLLM where one can be had.
PACED := tests/proxy/test_shaper.py
test-slow: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not vllm" $(PACED:%=--ignore=%)
	$(BIN)/python -m pytest -n 2 -m "slow and not vllm" $(PACED)
	$(BIN)/python -m pytest -m vllm

# The data plane's tests against a data plane that is compiled, as it is for a release; needs a C compiler.
test-compiled: .venv/.installed
	rm -rf .compiled
	HATCH_BUILD_HOOKS_ENABLE=1 $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --target .compiled .
	cp -r tests pyproject.toml .compiled
	cd .compiled && PYTHONPATH=$(CURDIR)/.compiled $(CURDIR)/$(BIN)/python -m pytest -n 2 --dist worksteal tests/wire tests/proxy tests/storage/test_journal.py tests/e2e/conformance tests/e2e/test_crash.py -m "not slow and not vllm and not postgres"

# The wire's parsers against bytes of all kinds, FUZZ_S seconds each; needs atheris, and says how to get it.
FUZZ_S ?= 600
fuzz: .venv/.installed
	for target in response events account; do $(BIN)/python -m tests.fuzz.fuzz_wire $$target -max_total_time=$(FUZZ_S) || exit 1; done

# burstgate against its rivals, which it installs into .bench; under 15 minutes. ARGS='--only unary,stream' for a part.
bench: .venv/.installed
	$(BIN)/python -m benchmarks.gateway --out benchmarks/results $(ARGS)

# The same for replay, against other load generators; under 20 minutes. ARGS=--quick for burstgate alone, in 2.
bench-replay: .venv/.installed
	$(BIN)/python -m benchmarks.replay --out benchmarks/results $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# `make lock LOCK_BEFORE=2026-11-14T00:00:00Z`: releases younger than a week are left out.
# Exact versions with hashes for every supported Python, and no address in them. Needs uv, which only maintainers need.
lock:
	uv pip compile -q --exclude-newer "$(LOCK_BEFORE)" --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements.lock pyproject.toml
	uv pip compile -q --exclude-newer "$(LOCK_BEFORE)" --universal --generate-hashes --no-emit-index-url --no-emit-find-links --no-header -o requirements-dev.lock -c requirements.lock pyproject.toml --group dev

clean:
	rm -rf .venv .compiled demo-out burstgate-data .pytest_cache .mypy_cache .ruff_cache .hypothesis
