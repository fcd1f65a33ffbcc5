"""Settings for all tests."""

from __future__ import annotations

import os

from hypothesis import settings

collect_ignore = ["guest"]  # `make test-guest` names it: an emulated machine takes a minute, and packages of 28 MB

# Two cores shared with QEMU's programs: a slow example is no fault.  In CI the examples are the same in each run.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
