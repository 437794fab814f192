# The five verbs of a contributor. CI runs the same.
.PHONY: install lint types test smoke check

install:  ## everything, in the current environment
	pip install -c constraints.txt -e ".[test]"

lint:  ## style, and imports that point one way only
	ruff check .
	ruff format --check .
	lint-imports

types:
	mypy

test:
	pytest -n auto --dist loadfile

smoke:  ## the built wheel, in an environment of its own without test dependencies
	bash .ci/smoke

check: lint types test
