# One task runner: `make help` lists what there is.
SHELL := bash
PYTHON ?= python3
.DEFAULT_GOAL := help

.PHONY: help
help: ## List the tasks
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# Two environments: the generator wants protobuf 5, the typing plugin protobuf 6.
.venv-proto/ready:
	$(PYTHON) -m venv .venv-proto && $(PYTHON) -m venv .venv-proto/typing
	.venv-proto/bin/pip install -q 'grpcio-tools==1.71.2' 'protobuf>=5.29,<6' 'setuptools<81'
	.venv-proto/typing/bin/pip install -q 'mypy-protobuf==5.1.0' 'buf-bin>=1.75,<2'
	touch $@

.PHONY: proto
proto: .venv-proto/ready ## Regenerate the stubs in agl_grpc/v1 from proto/
	.venv-proto/typing/bin/buf format -w proto
	.venv-proto/typing/bin/buf lint proto
	PATH="$$PWD/.venv-proto/typing/bin:$$PATH" .venv-proto/bin/python -m grpc_tools.protoc -Iproto \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. proto/agl_grpc/v1/*.proto

.PHONY: check-proto
check-proto: proto ## Fail when the committed stubs differ from a fresh generation
	@test -z "$$(git status --porcelain -- proto agl_grpc/v1)" || { git status --short -- proto agl_grpc/v1; exit 1; }

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
