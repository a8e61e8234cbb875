# Everything a person does here. Each target makes what it needs; `make` alone lists them.
#
# Settings, all optional:  PYTHON=/path/to/python3.12   ARGS="--budget-ms 5"   UPGRADE=1 (lock only)
#                          SCENARIO=spike   HOST=http://127.0.0.1:8000   RECORD=run.npz (load only)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
LOCKER := uv==0.13.9
CPU_TORCH := https://download.pytorch.org/whl/cpu
say = @printf '%s\n' "==> $(1)"

.PHONY: help
help: ## list the targets
	@printf 'make TARGET [ARGS="..."], where TARGET is one of\n\n'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{printf "%-13s %s\n", $$1, $$2}'
	@printf '\nThe first call sets everything up in %s; only measured latencies are kept elsewhere, in your cache folder.\n' '$(VENV)'

# ---- set-up: one environment, grown as targets need it ----

# A name that is found may still not run (a pyenv shim for a version that is not active), so each candidate is tried.
$(VENV)/made:
	@python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; \
	    then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "$(if $(PYTHON),$(PYTHON) is not a working Python 3.11 to 3.13,No working Python 3.11 to 3.13 was found): \
	install one (https://www.python.org/downloads/) or name it, as in 'make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11'." >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	    echo "$$python cannot make virtual environments: install its venv module \
	(on Debian and Ubuntu: 'apt install python3-venv'), or name another Python with PYTHON=." >&2; \
	    exit 1; \
	fi; \
	echo "==> Making $(VENV) with $$("$$python" --version) ($$python)."; \
	rm -rf $(VENV) && "$$python" -m venv $(VENV) && touch $@

$(VENV)/serve: $(VENV)/made pyproject.toml constraints.txt
	$(call say,Installing what serving needs into $(VENV). The first time this downloads about 300 MB and takes a minute or two.)
	@$(PIP_INSTALL) -e '.[serve]'
	@touch $@

$(VENV)/all: $(VENV)/made pyproject.toml constraints.txt
	$(call say,Installing everything - serving$(,) tracing$(,) training$(,) load tests$(,) development - into $(VENV). The first time takes some minutes.)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	    echo "    No NVIDIA driver here: 'PIP_EXTRA_INDEX_URL=$(CPU_TORCH) make ...' saves about 3 GB of CUDA libraries."; \
	fi
	@$(PIP_INSTALL) -e '.[serve,tracing,train,load,dev]'
	@touch $@ $(VENV)/serve

# In an environment of its own, so that the one above stays small: 900 MB with the server.
$(VENV)/ray: $(VENV)/made pyproject.toml constraints.txt
	$(call say,Installing Ray beside the server into $(VENV). The first time this downloads about 400 MB.)
	@$(PIP_INSTALL) -e '.[serve,ray]' hypothesis pytest pytest-timeout
	@touch $@

$(VENV)/cuda: $(VENV)/all
	$(call say,Installing the CUDA and cuDNN libraries into $(VENV). The first time this downloads some gigabytes.)
	@$(PIP_INSTALL) -e '.[cuda]'
	@touch $@

# ---- use ----

.PHONY: serve train export evaluate reproduce ablate speed
serve: $(VENV)/serve ## start the server (needs no torch); ARGS go to python -m service serve
	$(call say,Starting the server: it loads the model$(,) measures this machine for a few seconds and says when it is ready. Ctrl-C stops it.)
	@exec $(PY) -m service serve $(ARGS)

train: $(VENV)/all ## train a network; ARGS go to python -m model.train
	$(call say,Training.)
	@exec $(PY) -m model.train $(ARGS)

export: $(VENV)/all ## turn a checkpoint into an artifact; ARGS go to python -m model.export
	$(call say,Exporting.)
	@exec $(PY) -m model.export $(ARGS)

evaluate: $(VENV)/all ## measure accuracy and cost of every rung; ARGS go to python -m model.evaluate
	$(call say,Evaluating.)
	@exec $(PY) -m model.evaluate $(ARGS)

reproduce: $(VENV)/all ## train the paper's networks and put their errors beside the paper's; ARGS go to python -m model.reproduce
	$(call say,Reproducing the paper. Ctrl-C stops it$(,) the same command goes on.)
	@exec $(PY) -m model.reproduce --page docs/results.md $(ARGS)

ablate: $(VENV)/all ## change one part of a recipe at a time and compare over seeds; ARGS go to python -m model.ablate
	$(call say,Comparing. Ctrl-C stops it$(,) the same command goes on.)
	@exec $(PY) -m model.ablate --page docs/ablation.md $(ARGS)

speed: $(VENV)/all ## measure how fast training is, beside a plain PyTorch loop; ARGS go to python -m model.speed
	$(call say,Measuring in turns. Nothing else should run on this machine.)
	@exec $(PY) -m model.speed $(ARGS)

.PHONY: load
SCENARIO := steady
HOST := http://127.0.0.1:8000
RECORD := runs/load/$(SCENARIO)-$(shell date +%Y%m%dT%H%M%S).npz
load: $(VENV)/all ## offer SCENARIO=steady (or ramp, burst-4, spike, …) to the server at HOST and report; ARGS go to locust
	$(call say,Offering loadtests/scenarios/$(SCENARIO).toml to $(HOST). Ctrl-C stops it.)
	@mkdir -p $(dir $(RECORD))
	@$(VENV)/bin/locust -f loadtests/locustfile.py --headless --only-summary --exit-code-on-error 0 \
	    --host $(HOST) --scenario $(SCENARIO) --record $(RECORD) $(ARGS)
	@$(PY) -m loadtests.report $(RECORD)

.PHONY: bench-quick
bench-quick: $(VENV)/all ## two minutes: ratios to plain FastAPI, bare ASGI and the runtime alone, added to the history
	$(call say,Measuring in turns. Nothing else should run on this machine.)
	@$(PY) -m loadtests.bench --out loadtests/results/bench.jsonl $(ARGS)

.PHONY: gpu
gpu: $(VENV)/cuda ## on a machine with an NVIDIA GPU: the tests that need it, then what it is worth; ARGS="--quick" or others go to python -m loadtests.gpu
	$(call say,Testing what can only be seen on a GPU$(,) and measuring in any case. Nothing else should run on this machine.)
	@trap 'exit 130' INT; \
	$(PY) -m pytest -m gpu; tested=$$?; \
	$(PY) -m loadtests.gpu --out loadtests/results/gpu $(ARGS); measured=$$?; \
	exit $$((tested ? tested : measured))

# ---- proof ----

.PHONY: test ray-test compose-test check faults chaos
test: $(VENV)/all ## run the tests; ARGS go to pytest
	$(call say,Running the tests.)
	@$(PY) -m pytest $(ARGS)

ray-test: ## run the tests on a Ray cluster of two nodes on this machine; ARGS go to pytest
	@$(MAKE) VENV=.venv-ray .venv-ray/ray
	$(call say,Testing on a Ray cluster. It takes a minute and two gigabytes of memory.)
	@.venv-ray/bin/python -m pytest tests/deploy/test_ray.py tests/deploy/test_ray_budgets.py $(ARGS)

compose-test: $(VENV)/all ## build the images and try docker-compose.yml with a real Docker engine: some five minutes
	$(call say,Building images$(,) then serving$(,) loading$(,) killing and stopping in containers.)
	@$(PY) -m tests.compose

check: $(VENV)/all ## check format, lint, types and the import rules
	$(call say,Checking the format.)
	@$(VENV)/bin/ruff format --check .
	$(call say,Linting.)
	@$(VENV)/bin/ruff check .
	$(call say,Checking types.)
	@$(VENV)/bin/mypy
	$(call say,Checking that imports point one way.)
	@$(VENV)/bin/lint-imports

faults: $(VENV)/all ## break the code on purpose, line by line of tests/faults.txt: the tests must notice
	$(call say,Breaking a copy of the code on purpose; every fault must make its tests fail.)
	@$(PY) tests/faults.py $(ARGS)

chaos: $(VENV)/all ## soak and chaos: 100,000 requests, good and hostile ones, and what they leave behind; ARGS go to python -m loadtests.chaos
	$(call say,Sending good and hostile requests to a server of its own$(,) which must be after as it was before. It takes some minutes.)
	@$(PY) -m loadtests.chaos --requests 100000 --out loadtests/results/chaos $(ARGS)

# ---- upkeep ----

.PHONY: format lock protos dashboards manifests clean
format: $(VENV)/all ## rewrite the source in the project's format
	@$(VENV)/bin/ruff check --fix --exit-zero --quiet .
	@$(VENV)/bin/ruff format .

dashboards: $(VENV)/made ## renew deploy/grafana/dashboards from deploy/grafana/generate.py
	@$(PY) -m deploy.grafana.generate

protos: $(VENV)/all ## renew service/oip_pb2.py from service/protos/open_inference.proto
	@$(PY) -m grpc_tools.protoc -I service/protos --python_out=$(VENV) --pyi_out=$(VENV) open_inference.proto
	@mv $(VENV)/open_inference_pb2.py service/oip_pb2.py
	@mv $(VENV)/open_inference_pb2.pyi service/oip_pb2.pyi

manifests: $(VENV)/all ## renew what deploy/k8s has of deploy/prometheus/rules
	@$(PY) deploy/k8s/prometheusrule.py

lock: $(VENV)/made ## renew constraints.txt from pyproject.toml; UPGRADE=1 takes the newest versions
	$(call say,Resolving the exact version of every dependency for every platform.)
	@$(PY) -m pip install --quiet --disable-pip-version-check $(LOCKER)
	@grep -v '^#' constraints.txt > $(VENV)/pins.txt
	@$(VENV)/bin/uv pip compile --quiet --no-config --default-index https://pypi.org/simple $(if $(UPGRADE),--upgrade) \
	    --universal --python-version 3.11 --all-extras --no-header --no-annotate -o $(VENV)/pins.txt pyproject.toml >/dev/null
	@grep '^#' constraints.txt > $(VENV)/lock.txt && cat $(VENV)/pins.txt >> $(VENV)/lock.txt
	@cp $(VENV)/lock.txt constraints.txt
	$(call say,Done. 'git diff constraints.txt' shows what changed.)

clean: ## remove the environment and every tool's cache; data sets, runs and artifacts stay
	rm -rf $(VENV) .venv-ray build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

, := ,
