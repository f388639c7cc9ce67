# make demo   a certificate from a test CA, in throwaway network namespaces, under visitors
# make test   everything that CI runs
# Both as root: they install what they need (Debian packages; Python packages in .venv).

PYTHON ?= python3
VENV := .venv

.PHONY: demo test clean

demo: $(VENV)/demo
	$(VENV)/bin/python -m tests.integration.demo

test: $(VENV)/tox
	$(VENV)/bin/tox run

$(VENV)/packages: tests/install-debian-packages
	sh tests/install-debian-packages
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo: $(VENV)/packages pyproject.toml
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/tox: $(VENV)/packages
	$(VENV)/bin/pip install --quiet --disable-pip-version-check 'tox>=4'
	touch $@

clean:
	rm -rf $(VENV) .tox .cache .coverage* build dist
