"""
What a running machine's block graph can hide.

Writers that no bitmap sees, disks that nobody named, images that have lost their names, encrypted disks, and drives
that copy what is read.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from lab import MIB, call_pybackup, make_image, run, write
from live import Disk, Machine, Nights, Result, blockdev, kinds, private_tmp, wait_until


@pytest.fixture
def machine(tmp_path: Path):
    with Machine.of(tmp_path, "a", "b") as found, private_tmp(found.place):
        found.start().write("a", 0, 200_000, 0x11)
        yield found


def ways(done: Result) -> list[bool]:
    """Was it a rescan, disk by disk?"""
    return [disk["rescan"] for disk in done.machine["disks"]]


# Writers that no bitmap sees


def test_a_disk_that_a_device_shares_with_other_machines_is_read_whole_and_warned_of_every_night(machine):
    machine.unplug("a")
    disk = machine.disks["a"]
    machine.monitor("blockdev-add", **blockdev(disk))
    machine.monitor("device_add", driver="scsi-hd", drive="a", id="dev-a", share_rw=True)
    nights = Nights.of(machine)
    first = nights.backup("full")
    assert (first.rc, "share-rw=on" in first.stderr) == (3, True), first
    for _ in range(2):
        machine.write("a", MIB, 1000, 0x22)
        done = nights.backup("incremental")
        assert (done.rc, ways(done)) == (3, [True, False]), done
        assert "dev-a shares it with other machines" in done.stderr
    assert machine.bitmaps("a") == {}
    nights.require_sound()


def test_a_second_node_over_the_same_file_makes_each_backup_a_rescan_with_a_warning(machine):
    nights = Nights.of(machine)
    nights.full()
    storage = {"driver": "file", "filename": str(machine.disks["a"].image), "locking": "off", "node-name": "again"}
    machine.monitor("blockdev-add", driver="raw", node_name="second", file=storage)
    machine.write("a", MIB, 1000, 0x23)
    done = nights.backup("incremental")
    assert (done.rc, ways(done)) == (3, [True, False]), done
    assert "'again' of the same QEMU has the same file open for writing" in done.stderr
    machine.monitor("blockdev-del", node_name="second")
    nights.require_fallback("without starting a bitmap", only=["a"])


def test_a_node_that_the_guest_has_left_is_warned_of_and_its_new_one_too(machine):
    nights = Nights.of(machine)
    nights.full()
    target = make_image(machine.folder / "new.tmp", 4 * MIB)
    machine.monitor("blockdev-add", driver="qcow2", node_name="new", file={"driver": "file", "filename": str(target)})
    machine.monitor("blockdev-mirror", job_id="j", device="a", target="new", sync="full")
    wait_until(lambda: any(job["status"] == "ready" for job in machine.monitor("query-jobs")), "the mirror")
    machine.monitor("job-complete", id="j")
    wait_until(lambda: not machine.monitor("query-jobs"), "the mirror's end")
    done = call_pybackup([*nights.arguments("incremental"), "--json"])
    assert done.rc == 3, done
    assert "no device of the machine uses node a" in done.stderr
    assert f"disk dev-a ({target}) of the running machine is in no point" in done.stderr
    assert "node b" not in done.stderr


def test_in_a_machine_without_devices_an_export_or_the_monitor_stands_in_for_the_guest(tmp_path):
    image = make_image(tmp_path / "x.qcow2", MIB)
    with Machine(tmp_path) as machine, private_tmp(machine.place):
        machine.start().disks["x"] = Disk("x", image, bytearray(MIB))
        machine.monitor("blockdev-add", **blockdev(machine.disks["x"]))
        nights = Nights.of(machine)
        nights.full()
        nights.require_incremental("--no-fallback")


# Disks that nobody named


def test_without_a_name_all_disks_are_backed_up_by_their_devices_ids_and_go_on_so(machine):
    machine.disks = {disk.device: disk for disk in machine.disks.values()}
    nights = Nights.of(machine)
    for wanted in ("full", "incremental"):
        done = nights.backup_of(wanted)
        assert (done.rc, done.stderr, kinds(done)) == (0, "", {wanted}), done
        assert [disk["name"] for disk in done.machine["disks"]] == ["dev-a", "dev-b"]
    rehearsed = call_pybackup([*nights.bare("incremental"), "--dry-run", "--json"])
    assert [disk["name"] for disk in rehearsed.machine["disks"]] == ["dev-a", "dev-b"], rehearsed
    audited = call_pybackup([*nights.bare("audit")])
    assert audited.rc == 0, audited
    nights.require_sound()


@pytest.mark.parametrize("text", ["b", "dev-b", "IMAGE"])
def test_an_excluded_disk_is_left_out_by_any_of_its_names(machine, text):
    nights = Nights.of(machine)
    name = str(machine.disks["b"].image) if text == "IMAGE" else text
    done = nights.backup_of("full", "--exclude", name)
    assert (done.rc, done.stderr) == (0, ""), done
    assert [disk["name"] for disk in done.machine["disks"]] == ["dev-a"]
    named = nights.backup_of("full", "--node", "a", "--exclude", name)
    assert (named.rc, named.stderr) == (0, ""), named


def test_a_disk_that_is_neither_named_nor_excluded_is_a_warning_of_backups_and_not_of_audits(machine):
    nights = Nights.of(machine)
    for wanted in ("full", "incremental", "rescan"):
        done = nights.backup_of(wanted, "--node", "a")
        assert done.rc == 3, done
        assert f"disk dev-b ({machine.disks['b'].image}) of the running machine is in no point" in done.stderr
    audited = call_pybackup(nights.bare("audit", "--node", "a"))
    assert audited.rc == 0, audited


def test_the_disks_of_a_configured_machine_are_named_or_excluded_or_a_warning(machine):
    nights = Nights.of(machine)
    config = machine.folder / "c.yaml"
    text = f"repository: {nights.repository}\nbitmap: b1\nmachines:\n  m:\n    qmp: {machine.qmp}\n"
    text += "    disks: {a: {node: dev-a}}\n"
    for more, code in (("", 3), ("    exclude: [gone, b]\n", 0), ("    exclude: dev-b\n", 0)):
        config.write_text(text + more)
        done = nights._noted(call_pybackup(["--config", config, "incremental", "--json"]))
        assert (done.rc, "is in no point" in done.stderr) == (code, code == 3), done
    nights.require_sound()


def test_an_excluded_disk_that_is_not_there_is_refused_on_the_command_line(machine):
    done = Nights.of(machine).backup_of("full", "--exclude", "typo")
    assert (done.rc, "'typo'" in done.stderr) == (13, True), done


def test_all_disks_need_a_machines_name(machine):
    done = call_pybackup(["full", "--qmp", machine.qmp, "--repo", machine.folder / "repo"])
    assert (done.rc, "--machine NAME" in done.stderr) == (2, True), done


def test_firmware_media_and_drives_without_a_medium_are_no_disks_of_the_machine(tmp_path):
    image = make_image(tmp_path / "x.qcow2", MIB)
    for name in ("vars.tmp", "cd.tmp"):
        make_image(tmp_path / name, 256 << 10, image_format="raw")
    with Machine(tmp_path, Disk("x", image, bytearray(MIB))) as machine, private_tmp(machine.place):
        machine.more = [
            *("-blockdev", f"driver=raw,node-name=pf1,file.driver=file,file.filename={tmp_path}/vars.tmp"),
            *("-blockdev", f"driver=file,node-name=pf0,filename={machine.place}/bios,read-only=on"),
            *("-machine", "pflash0=pf0,pflash1=pf1"),
            *("-blockdev", f"driver=raw,node-name=cd0,file.driver=file,file.filename={tmp_path}/cd.tmp,read-only=on"),
            *("-device", "scsi-cd,drive=cd0", "-device", "scsi-cd,id=empty", "-device", "isa-fdc", "-device", "floppy"),
        ]
        machine.start()
        nights = Nights.of(machine)
        done = nights.backup_of("full")
        assert (done.rc, done.stderr) == (0, ""), done
        assert [disk["name"] for disk in done.machine["disks"]] == ["dev-x"]
        named = nights.backup_of("full", "--node", "pf1", "--exclude", "x")
        assert [disk["name"] for disk in named.machine["disks"]] == ["pf1"], named


# Images that have lost their names


@pytest.mark.parametrize("way", ["removed", "replaced", "moved"])
def test_an_image_that_was_taken_from_under_the_machine_is_a_warning(machine, way):
    nights = Nights.of(machine)
    nights.full()
    image = machine.disks["a"].image
    copy = machine.folder / "copy.tmp"
    match way:
        case "removed":
            image.rename(copy)
        case "replaced":
            shutil.copy(image, copy)
            copy.rename(image)
        case "moved":
            image.rename(copy)
            shutil.copy(copy, image)
    machine.write("a", MIB, 1000, 0x24)
    done = nights.backup("incremental", "--scratch", machine.place)
    said = "removed" if way == "removed" else "replaced"
    assert (done.rc, kinds(done)) == (3, {"incremental"}), done
    assert f"the image {image} was {said} while QEMU has it open" in done.stderr
    assert done.stderr.count("while QEMU has it open") == 1
    nights.require_sound()


# Encrypted disks

SECRET = ("secret,id=s0,data=abc",)


def encrypted(tmp_path: Path, driver: str) -> tuple[Machine, Path]:
    """A machine with an encrypted disk `x`, and the disk's image."""
    image = tmp_path / "x.tmp"
    option = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10"
    if driver == "luks":
        option = "key-secret=s0,iter-time=10"
    run("qemu-img", "create", "-q", "-f", driver, "--object", *SECRET, "-o", option, image, "4M")
    machine = Machine(tmp_path)
    storage = f"file.driver=file,file.filename={image}"
    key = "key-secret=s0" if driver == "luks" else "encrypt.format=luks,encrypt.key-secret=s0"
    machine.more = ["-object", *SECRET, "-blockdev", f"{driver},node-name=x,{key},{storage}"]
    machine.more += ["-device", "scsi-hd,drive=x,id=dev-x"]
    return machine, image


@pytest.mark.parametrize("driver", ["qcow2", "luks"])
def test_an_encrypted_disk_of_a_running_machine_is_refused_until_plaintext_is_allowed(tmp_path, driver):
    machine, image = encrypted(tmp_path, driver)
    with machine, private_tmp(machine.place):
        machine.start().disks["x"] = Disk("x", image, bytearray(4 * MIB), driver)
        machine.write("x", 0, 4 * MIB, 0x25)  # what was never written decrypts to anything
        nights = Nights.of(machine)
        for given in ([], ["--dry-run"]):
            refused = nights.backup("full", *given)
            assert (refused.rc, "plaintext" in refused.stderr, nights.points()) == (2, True, set()), refused
        done = nights.backup("full", "--allow-plaintext")
        assert done.rc == (3 if driver == "luks" else 0), done
        nights.options = ("--allow-plaintext",)
        nights.require_incremental("--no-fallback")
        nights.options = ()
        shown = call_pybackup(["show", "m/latest", "--repo", nights.repository, "--json"])
        assert shown.document["disks"][0]["source"]["plaintext"] is True
        audited = call_pybackup([*nights.bare("audit"), "--node", "x"])
        assert audited.rc == 0, audited


def test_a_chain_holds_either_the_container_or_the_plaintext(tmp_path):
    machine, image = encrypted(tmp_path, "luks")
    config = tmp_path / "c.yaml"
    with machine, private_tmp(machine.place):
        machine.start()
        config.write_text(
            f"repository: {tmp_path}/repo\nbitmap: b1\nmachines:\n  m:\n    qmp: {machine.qmp}\n"
            f"    disks: {{x: {{node: x, image: {image}, format: raw, allow_plaintext: true}}}}\n"
        )
        kinds_of = []
        for on in (True, False, False, True):
            if not on and machine.running:
                machine.quit()
            elif on and not machine.running:
                machine.start()
            done = call_pybackup(["--config", config, "incremental", "--json"])
            assert done.rc in (0, 3), done
            disk = done.machine["disks"][0]
            kinds_of.append((disk["kind"], "one chain holds only one" in disk["reason"], done.rc))
        assert kinds_of == [
            ("full", False, 3),
            ("full", True, 3),
            ("incremental", False, kinds_of[2][2]),
            ("full", True, 3),
        ]
        restored = tmp_path / "restored.tmp"
        points = sorted((tmp_path / "repo" / "m").glob("*.json"))
        assert len(points) == 4
        done = call_pybackup(["restore", points[1], restored])
        assert done.rc == 0, done


def test_an_encrypted_qcow2_of_a_machine_that_is_off_says_what_to_do(tmp_path):
    _, image = encrypted(tmp_path, "qcow2")
    given = ["--image", image, "--repo", tmp_path / "repo", "--machine", "m", "--disk", "x"]
    done = call_pybackup(["full", *given])
    assert (done.rc, "is encrypted" in done.stderr, "--allow-plaintext" in done.stderr) == (13, True, True), done
    stored = call_pybackup(["full", *given, "--image-format", "raw"])
    assert stored.rc == 0, stored


# Drives that copy what is read


@pytest.mark.parametrize("named", ["drive", "dev-x"])
def test_a_drive_that_copies_what_is_read_into_its_image_is_refused(tmp_path, named):
    base, image = make_image(tmp_path / "base.tmp", 4 * MIB), tmp_path / "x.tmp"
    write(base, "write -P 1 0 3M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    with Machine(tmp_path) as machine, private_tmp(machine.place):
        machine.more = ["-drive", f"if=none,id=drive,file={image},format=qcow2,copy-on-read=on"]
        machine.more += ["-device", "scsi-hd,drive=drive,id=dev-x"]
        machine.start()
        before = image.stat().st_size
        nights = Nights.of(machine)
        for command in (nights.bare("full"), ["map", "--qmp", machine.qmp]):
            done = call_pybackup([*command, "--node", named])
            assert (done.rc, "copy-on-read=on" in done.stderr) == (13, True), done
        assert image.stat().st_size == before


def test_below_a_copy_on_read_filter_nothing_is_written_to_the_image(tmp_path):
    base, image = make_image(tmp_path / "base.tmp", 4 * MIB), tmp_path / "x.tmp"
    write(base, "write -P 1 0 3M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)
    disk = Disk("x", image, bytearray(b"\1" * 3 * MIB + bytes(MIB)))
    with Machine(tmp_path) as machine, private_tmp(machine.place):
        storage = f"file.driver=qcow2,file.node-name=x,file.file.driver=file,file.file.filename={image}"
        machine.more = ["-blockdev", f"driver=copy-on-read,node-name=cor,{storage}"]
        machine.more += ["-device", "scsi-hd,drive=cor,id=dev-x"]
        machine.start().disks["x"] = disk
        before = image.stat().st_size
        nights = Nights.of(machine)
        for wanted in ("full", "incremental", "rescan"):
            done = nights.backup_of(wanted, "--node", "dev-x", "--disk", "x")
            assert done.rc == 0, done
            assert image.stat().st_size < before + MIB
        nights.require_sound()
