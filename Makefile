# Every target but help and clean sets up first what it needs (tools/setup); a second run does so in no time.

export PATH := $(PATH):/usr/sbin:/sbin# mke2fs and debugfs, which Debian hides from users
PYTHON_FILES := backup stubs tests $(wildcard bench) tools
CORES := $(shell nproc)
# The tests wait for other programs: on two cores, three at once took 12.4 minutes where two took 15.3.
TESTS_AT_ONCE := $(or $(JOBS),$(shell expr $(CORES) + 2))
GUESTS_AT_ONCE := $(or $(JOBS),$(CORES))

.PHONY: help setup demo test test-guest test-libvirt test-ceph check man bench clean

help:
	@echo "make setup   what the tests and the demo need: distribution packages (as root), .venv, pybackup in it"
	@echo "make demo    back up, damage and restore a real file system, with each command shown; under two minutes"
	@echo "make test    all tests; make test ARGS='-k restore' for some, JOBS=4 for more at once"
	@echo "make test-guest  back up a real guest: Linux, emulated, which goes on writing; and read files from points; some minutes"
	@echo "make test-libvirt  back up domains of a libvirtd of the tests' own; some minutes"
	@echo "make test-ceph  copy points to buckets of a Ceph of the tests' own; below two minutes"
	@echo "make check   format, lint, types, and the rules of the architecture, and what the documents cite"
	@echo "make man     write docs/pybackup.1 anew, after a change of --help or of docs/commands.md"
	@echo "make bench   measure speed and memory against nbdcopy and qemu-img"
	@echo "make clean   remove what make made"

setup:
	@tools/setup

demo: setup
	@.venv/bin/python tools/demo.py

test: setup
	.venv/bin/python -m pytest -n $(TESTS_AT_ONCE) $(ARGS)

test-guest:
	@tools/setup guest
	.venv/bin/python -m pytest -n $(GUESTS_AT_ONCE) --dist loadfile tests/real_guest $(ARGS)

test-libvirt:
	@tools/setup libvirt
	.venv/bin/python -m pytest -n $(GUESTS_AT_ONCE) --dist loadfile tests/libvirt_daemon $(ARGS)

test-ceph:
	@tools/setup ceph
	.venv/bin/python -m pytest -n $(GUESTS_AT_ONCE) --dist loadfile tests/real_ceph $(ARGS)

check: setup
	.venv/bin/ruff format --check $(PYTHON_FILES)
	.venv/bin/ruff check $(PYTHON_FILES)
	.venv/bin/mypy --strict backup tools
	.venv/bin/python -m pytest tests/test_architecture.py tests/test_docs.py

man: setup
	.venv/bin/python tools/manpage.py

bench: setup
	@.venv/bin/python -c 'import matplotlib' 2>/dev/null || .venv/bin/python -m pip install -qq --disable-pip-version-check --editable '.[bench]'
	.venv/bin/python bench/run.py $(ARGS)

clean:
	rm -rf .venv .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache pybackup.egg-info
	find backup stubs tests $(wildcard bench tools) -name __pycache__ -type d -prune -exec rm -rf {} +
