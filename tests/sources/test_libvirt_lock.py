"""The lock of a domain: one run at a time, and no other user can block backups."""

import os

import pytest

from backup.errors import Locked
from backup.sources.libvirt_lock import only_run

UUID = "1c1c1c1c-0000-4000-8000-00000000000"


@pytest.fixture
def place(monkeypatch, tmp_path):
    """The folder of the locks of a user who is not root."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "pybackup-12345"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    return folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")
class TestOnlyRun:
    def test_a_domain_has_one_run_and_other_domains_go_on(self, place):
        with only_run(f"{UUID}1", "web1"):
            with pytest.raises(Locked, match="web1"), only_run(f"{UUID}1", "web1"):
                pass
            with only_run(f"{UUID}2", "web2"):
                pass
        with only_run(f"{UUID}1", "web1"):
            assert [path.name for path in place.iterdir() if path.name.endswith("1")] == [f"{UUID}1"]

    @pytest.mark.parametrize("mode", [0o700, 0o777])
    def test_a_folder_that_another_user_can_write_to_has_no_locks(self, place, mode):
        os.chown(place, 12346 if mode == 0o700 else 12345, -1)
        place.chmod(mode)
        with only_run(f"{UUID}1", "web1"), only_run(f"{UUID}1", "web1"):
            assert list(place.iterdir()) == []

    def test_a_link_in_the_place_of_the_folder_is_not_followed(self, place, tmp_path):
        target = tmp_path / "target"
        place.rename(target)
        place.symlink_to(target)
        with only_run(f"{UUID}1", "web1"):
            assert list(target.iterdir()) == []
