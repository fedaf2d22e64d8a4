# One task runner: `make help` lists what there is.
SHELL := bash
PYTHON ?= python3
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## List the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# Two environments: the generator wants protobuf 5, the typing plugin protobuf 6.
.venv-proto/ready:
	$(PYTHON) -m venv .venv-proto && $(PYTHON) -m venv .venv-proto/typing
	.venv-proto/bin/pip install -q 'grpcio-tools==1.71.2' 'protobuf>=5.29,<6' 'setuptools<81'
	.venv-proto/typing/bin/pip install -q 'mypy-protobuf==5.1.0' 'buf-bin>=1.75,<2' 'googleapis-common-protos>=1.70,<2'
	touch $@

# Go and its libraries from Debian's own packages, unpacked beside the others: nothing is installed into the system.
GO_PACKAGES := golang-go golang-1.19-go golang-1.19-src golang-google-grpc-dev golang-google-protobuf-dev \
  golang-google-genproto-dev golang-github-golang-protobuf-1-5-dev golang-golang-x-net-dev golang-golang-x-sys-dev \
  golang-golang-x-text-dev golang-golang-x-oauth2-dev protoc-gen-go protoc-gen-go-grpc
GO_MODULE := github.com/agl-grpc/agl-grpc/clients/go

.venv-go/ready:
	mkdir -p .venv-go/path/src/$(dir $(GO_MODULE))
	cd .venv-go && { apt-get download -q $(GO_PACKAGES) || { apt-get update -q && apt-get download -q $(GO_PACKAGES); }; }
	cd .venv-go && for package in *.deb; do dpkg-deb -x "$$package" .; done && rm -f ./*.deb
	ln -sfn "$$PWD/clients/go" .venv-go/path/src/$(GO_MODULE)
	printf '%s\n' '#!/bin/sh' "cd '$$PWD/.venv-go/path/src/$(GO_MODULE)'" \
	  "export GOROOT='$$PWD/.venv-go/usr/lib/go-1.19' GOPATH='$$PWD/.venv-go/path:$$PWD/.venv-go/usr/share/gocode'" \
	  'export GO111MODULE=off CGO_ENABLED=0' 'exec "$$GOROOT/bin/go" "$$@"' > .venv-go/go
	chmod +x .venv-go/go
	touch $@

.PHONY: go-tools
go-tools: .venv-go/ready ## Unpack Go and gRPC for it from Debian's packages into .venv-go

# The sandbox of graders that are commands.
.venv-sandbox/ready:
	mkdir -p .venv-sandbox
	cd .venv-sandbox && { apt-get download -q bubblewrap || { apt-get update -q && apt-get download -q bubblewrap; }; }
	cd .venv-sandbox && dpkg-deb -x bubblewrap_*.deb . && rm -f ./*.deb
	touch $@

# Trackers as they are: an environment that is made for this and kept.
.venv-trackers/ready:
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/pip install -q 'wandb>=0.19' 'mlflow-skinny>=2,<3' tensorboardX numpy orjson psutil
	touch $@

.PHONY: trackers
trackers: .venv-trackers/ready ## Metrics to Weights & Biases (offline) and MLflow (a folder), read back
	PYTHONPATH="$$PWD" .venv-trackers/bin/python tests/diagnosis/trackers.py

.PHONY: sandbox
sandbox: .venv-sandbox/ready ## Unpack bubblewrap from Debian's package into .venv-sandbox

# gRPC and protobuf for C++, likewise; g++, cmake, ninja and OpenSSL's headers are the system's. What is built with
# `.venv-cpp/with` finds them, and so does what it runs.
CPP_PACKAGES := libgrpc++-dev libgrpc++1.51 libgrpc-dev libgrpc29 libprotobuf-dev libprotobuf32 libprotobuf-lite32 \
  libprotoc32 libprotoc-dev protobuf-compiler protobuf-compiler-grpc libabsl-dev libabsl20220623 libc-ares-dev \
  libc-ares2 libre2-dev libre2-9

.venv-cpp/ready:
	@for tool in g++ cmake ninja; do command -v $$tool > /dev/null || { echo "$$tool is missing: install it (Debian: apt install g++ cmake ninja-build libssl-dev)"; exit 1; }; done
	mkdir -p .venv-cpp
	cd .venv-cpp && { apt-get download -q $(CPP_PACKAGES) || { apt-get update -q && apt-get download -q $(CPP_PACKAGES); }; }
	cd .venv-cpp && for package in *.deb; do dpkg-deb -x "$$package" .; done && rm -f ./*.deb
	printf '%s\n' '#!/bin/sh' "export LD_LIBRARY_PATH='$$(echo $$PWD/.venv-cpp/usr/lib/*-linux-gnu)'" 'export LIBRARY_PATH="$$LD_LIBRARY_PATH"' \
	  "export CMAKE_PREFIX_PATH='$$PWD/.venv-cpp/usr' CMAKE_GENERATOR=Ninja" 'exec "$$@"' > .venv-cpp/with
	chmod +x .venv-cpp/with
	touch $@

.PHONY: cpp-tools
cpp-tools: .venv-cpp/ready ## Unpack gRPC for C++ from Debian's packages into .venv-cpp

clients/typescript/node_modules/.package-lock.json: clients/typescript/package-lock.json
	cd clients/typescript && npm ci --ignore-scripts --no-audit --no-fund
	touch $@

.PHONY: proto
proto: .venv-proto/ready .venv-go/ready clients/typescript/node_modules/.package-lock.json ## Regenerate the stubs of each language and docs/contract.md
	.venv-proto/typing/bin/buf format -w proto
	.venv-proto/typing/bin/buf lint proto
	PATH="$$PWD/.venv-proto/typing/bin:$$PATH" .venv-proto/bin/python -m grpc_tools.protoc -Iproto \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. proto/agl_grpc/v1/*.proto
	.venv-proto/typing/bin/buf build proto -o - --as-file-descriptor-set | .venv-proto/bin/python docs/contract.py
	cd clients/go && PATH="$$PWD/../../.venv-go/usr/bin:$$PWD/../../.venv-proto/typing/bin:$$PATH" buf generate ../../proto
	cd clients/typescript && PATH="$$PWD/../../.venv-proto/typing/bin:$$PATH" \
	  GOOGLE_PROTOS=$$(echo "$$PWD"/../../.venv-proto/typing/lib/python3*/site-packages) npm run --silent generate

GENERATED := proto agl_grpc/v1 clients/go/v1 clients/typescript/src/gen docs/contract.md

.PHONY: check-proto
check-proto: proto ## Fail when the committed stubs differ from a fresh generation
	@test -z "$$(git status --porcelain -- $(GENERATED))" || { git status --short -- $(GENERATED); exit 1; }

# The contract never breaks: neither what the last release promised, nor main, nor the last tag, where this checkout has
# them. tests/contract/release/ is what a release leaves: its contract, and its Python client with its vectors.
RELEASE := tests/contract/release

.PHONY: check-breaking
check-breaking: .venv-proto/ready ## Fail when the contract breaks what it was
	.venv-proto/typing/bin/buf breaking --against $(RELEASE)/contract.binpb
	@for ref in $$(git describe --tags --abbrev=0 2> /dev/null) main origin/main; do \
	  git rev-parse -q --verify "$$ref^{commit}" > /dev/null || continue; \
	  git archive "$$ref" buf.yaml proto | .venv-proto/typing/bin/buf breaking --against '-#format=tar' || exit 1; \
	  echo "nothing breaks against $$ref"; \
	done

.PHONY: keep-release
keep-release: .venv-proto/ready ## Keep the contract and the Python client of REF=TAG, once it is released, for the checks to come
	@test -n "$(REF)" || { echo "name the release: make keep-release REF=v1.2.3"; exit 1; }
	git archive $(REF) buf.yaml proto | .venv-proto/typing/bin/buf build '-#format=tar' --exclude-source-info -o $(RELEASE)/contract.binpb
	git archive --format=zip -o $(RELEASE)/client.zip $(REF) agl_grpc/__init__.py agl_grpc/client agl_grpc/model agl_grpc/v1 \
	  tests/__init__.py tests/conformance/__init__.py tests/conformance/replay.py tests/vectors

# Debian's own protoc, unpacked beside the others: nothing is installed into the system.
.venv-proto/debian/ready: | .venv-proto/ready
	mkdir -p .venv-proto/debian
	cd .venv-proto/debian && { apt-get download -q protobuf-compiler libprotoc32 libprotobuf32 libprotobuf-dev \
	  || { apt-get update -q && apt-get download -q protobuf-compiler libprotoc32 libprotobuf32 libprotobuf-dev; }; }
	cd .venv-proto/debian && for package in *.deb; do dpkg-deb -x "$$package" .; done
	touch $@

.PHONY: check-protoc
check-protoc: .venv-proto/debian/ready ## Compile the contract with Debian's protoc 3.21 (C++ and Java)
	@root=.venv-proto/debian/usr; out=$$(mktemp -d); \
	  export LD_LIBRARY_PATH=$$(echo $$root/lib/*-linux-gnu); \
	  $$root/bin/protoc --version && \
	  $$root/bin/protoc -Iproto -I$$root/include --cpp_out=$$out --java_out=$$out proto/agl_grpc/v1/*.proto && \
	  echo "compiled $$(ls proto/agl_grpc/v1/*.proto | wc -l) files"; status=$$?; rm -rf $$out; exit $$status

# The development environment: this package, editable, with what its tests and examples need.
.venv/dev-ready: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install -q --upgrade 'pip>=25.1'
	.venv/bin/pip install -q -e '.[train]' --group dev
	touch $@

.PHONY: lint
lint: .venv/dev-ready ## Format, lint and types
	.venv/bin/ruff format --check agl_grpc cli tests benchmarks examples docs/contract.py
	.venv/bin/ruff check agl_grpc cli tests benchmarks examples docs/contract.py
	.venv/bin/mypy

.PHONY: test-fast
test-fast: .venv/dev-ready .venv-proto/ready .venv-sandbox/ready ## The fast suite: no vLLM, no verl
	.venv/bin/python -m pytest -n 2 -m 'not e2e'

.PHONY: engines
engines: .venv/dev-ready ## Make the engine and learner environments
	.venv/bin/agl-grpc env create engine --path .venv-engine
	.venv/bin/agl-grpc env create learner --path .venv-learner

.PHONY: hybrid
hybrid: engines ## Make the environment in which verl starts vLLM itself, upon the engine's
	.venv/bin/agl-grpc env create hybrid --path .venv-hybrid --engine .venv-engine

# The released Agent Lightning, whose clients are tested and whose server is measured against ours. litellm is
# held at the version of its day: releases since have not all been sound.
.venv-agentlightning/ready:
	$(PYTHON) -m venv .venv-agentlightning
	.venv-agentlightning/bin/pip install -q --upgrade 'pip>=25.1'
	.venv-agentlightning/bin/pip install -q 'agentlightning==0.3.0' 'litellm[proxy]==1.80.10' \
	  'opentelemetry-sdk==1.39.1' 'opentelemetry-exporter-otlp==1.39.1' 'opentelemetry-instrumentation==0.60b1' 'setuptools<81'
	touch $@

tests/doors/node/node_modules/.package-lock.json: tests/doors/node/package.json
	cd tests/doors/node && npm install --no-audit --no-fund --no-package-lock --silent

.PHONY: peers
peers: .venv-agentlightning/ready tests/doors/node/node_modules/.package-lock.json ## Make what is tested against: Agent Lightning 0.3, OpenTelemetry for Node.js

# The agent frameworks of examples/frameworks. uv: their pins take pip minutes to bring together.
.venv-frameworks/ready: examples/frameworks/requirements.txt pyproject.toml
	test -x .venv-frameworks/bin/uv || { $(PYTHON) -m venv .venv-frameworks && .venv-frameworks/bin/pip install -q 'uv>=0.8,<1'; }
	.venv-frameworks/bin/uv pip install -q --python .venv-frameworks/bin/python -r examples/frameworks/requirements.txt -e .
	touch $@

examples/frameworks/node/node_modules/.package-lock.json: examples/frameworks/node/package-lock.json
	cd examples/frameworks/node && npm ci --ignore-scripts --no-audit --no-fund --silent
	touch $@

.PHONY: frameworks
frameworks: .venv-frameworks/ready examples/frameworks/node/node_modules/.package-lock.json ## Make the environment of the agent frameworks

# RUN=NAME, SEED=N, STEPS=N and ARGS=--resume change what is trained. The environments come first, once.
.PHONY: train
train: engines ## Train the calculator agent: real vLLM, real verl, a reward that rises
	.venv/bin/python -m examples.calculator.train $(if $(RUN),--run $(RUN)) $(if $(SEED),--seed $(SEED)) \
	  $(if $(STEPS),--steps $(STEPS)) $(ARGS)

# One after the other: those that install this package write into the same folder of its sources.
.PHONY: environments
environments: ## Make the environments of every end-to-end test
	$(MAKE) hybrid
	$(MAKE) peers frameworks

# Downloads, mostly: the environments come while the fast suite runs.
.PHONY: test
test: check-proto check-breaking check-protoc lint sandbox cpp-tools ## Everything: lint, the fast suite, real vLLM and real verl
	$(MAKE) --jobs=2 test-fast environments
	.venv/bin/python -m pytest -m 'e2e and not alone' -n 2 --dist loadfile --no-loadscope-reorder --durations 40
	.venv/bin/python -m pytest -m 'e2e and alone'

.PHONY: conformance
conformance: .venv/dev-ready .venv-go/ready .venv-cpp/ready ## Replay the shared vectors in every language; prints a matrix
	.venv/bin/python -m tests.conformance

.PHONY: bench
bench: .venv/dev-ready .venv-go/ready .venv-cpp/ready .venv-sandbox/ready clients/typescript/node_modules/.package-lock.json ## Measure, and write the figures to benchmarks/results/ (NAMES=... for some)
	.venv/bin/python -m benchmarks $(NAMES)

# COUNT=... for one NAME, SCALE=0.1 for a tenth of everything, SEED=N to repeat a run.
.PHONY: reliability
reliability: .venv/dev-ready ## Proofs under fire at scale; writes benchmarks/reliability/ (NAME=kills for one)
	.venv/bin/python -m tests.chaos $(or $(NAME),all) --write $(if $(COUNT),--count $(COUNT)) \
	  $(if $(SCALE),--scale $(SCALE)) $(if $(SEED),--seed $(SEED))
