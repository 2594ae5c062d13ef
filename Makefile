# Short names for the everyday commands; `make build` first, in a virtual environment.
CPP = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build test lint format bench gpu clean

build:  ## install in place with every tool; run again after a change in csrc
	pip install -e '.[test,dev]'

test:
	pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CPP)

format:
	ruff check --fix-only .
	ruff format .
	clang-format -i $(CPP)

bench:
	resnet-fused bench

gpu:  ## on a machine with a GPU: build, test, compute-sanitizer, benchmarks; under 9 minutes
	benchmarks/gpu_run.sh

clean:
	rm -rf build dist *.egg-info resnet_fused/_C.abi3.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
