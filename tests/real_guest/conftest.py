"""What all tests with a real guest need."""

from __future__ import annotations

import pytest
from initrd import System, Unavailable, make_system


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    """The guest's kernel and initrd; without their packages such tests are skipped."""
    try:
        return make_system(tmp_path_factory.mktemp("system"))
    except Unavailable as missing:
        pytest.skip(str(missing))
