# make demo   a certificate from a test CA, in throwaway network namespaces, under visitors
# make test   everything that CI runs
# make test-trixie   the same on Debian 13, in a root directory made by debootstrap
# make docs   the documents as HTML, build/docs/index.html
# make pyz    the program as one file, dist/acme-alpn-proxy.pyz: download once, chmod +x
# make deb    the Debian package, below dist/; make wheel is there, too
# make changelog   the news of a release, once its version is set: see docs/releasing.md
# make bench  side by side with HAProxy, nginx and sslh; BENCH=--quick for a first look
# make attacks   how long visitors wait beside each attack
# All as root: they install what they need (Debian packages; Python packages in .venv).

PYTHON ?= python3
VENV := .venv
DIST := dist
PROGRAM := .cache/program

.PHONY: demo test test-trixie docs wheel pyz deb changelog bench attacks clean

demo: $(VENV)/demo
	$(VENV)/bin/python -m tests.integration.demo

test: $(VENV)/tox
	$(VENV)/bin/tox run

test-trixie:
	sh tests/debian-root trixie

docs: $(VENV)/tox
	$(VENV)/bin/tox run -e docs

bench: $(VENV)/bench
	$(PROGRAM)/bin/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .
	$(VENV)/bin/python -m bench $(BENCH)

attacks: $(VENV)/bench
	$(VENV)/bin/python -m bench.attacks $(BENCH)

wheel: $(VENV)/build
	rm -f $(DIST)/*.whl $(DIST)/*.tar.gz
	$(VENV)/bin/hatchling build --target sdist --target wheel --directory $(DIST)

pyz: wheel
	PYTHON=$(VENV)/bin/python sh packaging/build-pyz $(DIST)/*.whl $(DIST)/acme-alpn-proxy.pyz

deb:
	rm -f $(DIST)/*.deb
	sh packaging/build-deb $(DIST)

changelog: $(VENV)/changelog
	$(VENV)/bin/towncrier build --yes
	dch --maintmaint --force-distribution --distribution unstable \
	    --newversion "$$($(VENV)/bin/hatchling version)" 'New release: see CHANGELOG.md.'

$(VENV)/venv:
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || sh -euc '. tests/debian-packages.sh; install_packages python3-venv'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/packages: $(VENV)/venv tests/install-debian-packages tests/debian-packages.sh
	sh tests/install-debian-packages
	touch $@

$(VENV)/demo: $(VENV)/packages pyproject.toml
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

$(VENV)/build: $(VENV)/venv pyproject.toml
	$(VENV)/bin/pip install --quiet --disable-pip-version-check hatchling shiv
	touch $@

$(VENV)/changelog: $(VENV)/venv
	sh -euc '. tests/debian-packages.sh; install_packages devscripts'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check hatchling 'towncrier>=24'
	touch $@

$(VENV)/bench: $(VENV)/packages pyproject.toml bench/install-debian-packages
	sh bench/install-debian-packages
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	/usr/bin/python3 -m venv $(PROGRAM)  # Debian's Python, as the others are Debian's packages
	$(PROGRAM)/bin/pip install --quiet --disable-pip-version-check .
	touch $@

$(VENV)/tox: $(VENV)/packages
	$(VENV)/bin/pip install --quiet --disable-pip-version-check 'tox>=4'
	touch $@

clean:
	rm -rf $(VENV) .tox .cache .coverage* build dist
