"""The command line as scripts and cron know it: exit codes, JSON, what goes where, which configuration counts."""

import ast
import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from lab import (
    PYBACKUP,
    Night,
    bitmaps,
    call_pybackup,
    init,
    make_image,
    raw_copy,
    require_identical,
    run_pybackup,
    write,
)
from places import create_repository

import backup

DISK_FIELDS = ["name", "kind", "reason", "size", "dirty_bytes", "data_bytes", "zero_bytes", "stored_bytes", "seconds"]
DISK_FIELDS += ["rescan"]
BACKUP_FIELDS = ["machine", "point", "manifest", "warnings", "error", "disks", "copies"]


@pytest.fixture
def config(tmp_path):
    """Three machines; `b` has two disks."""
    for name in ("a", "b1", "b2", "c"):
        write(make_image(tmp_path / f"{name}.qcow2", "1M"), "write -P 1 0 100k")
    path = tmp_path / "c.yaml"
    path.write_text(
        "repository: repo\n"
        "bitmap: b1\n"
        "machines:\n"
        "  a: {disks: {vda: {image: a.qcow2}}}\n"
        "  b: {disks: {vda: {image: b1.qcow2}, vdb: {image: b2.qcow2}}}\n"
        "  c: {disks: {vda: {image: c.qcow2}}}\n"
    )
    return path


def machines(done):
    return {found["machine"]: found for found in done.document}


def test_a_backup_as_json_has_exactly_the_documented_fields(config, tmp_path):
    done = run_pybackup(["--config", config, "full", "b", "--json"])
    [found] = done.document
    assert list(found) == BACKUP_FIELDS
    assert [list(disk) for disk in found["disks"]] == [DISK_FIELDS] * 2
    assert (found["machine"], found["warnings"], found["error"]) == ("b", [], None)
    manifest = tmp_path / "repo" / "b" / f"{found['point']}.json"
    assert found["manifest"] == str(manifest)
    assert [disk["name"] for disk in found["disks"]] == ["vda", "vdb"]
    disk = found["disks"][0]
    assert (disk["kind"], disk["reason"], disk["size"], disk["dirty_bytes"]) == ("full", "asked for", 1 << 20, 1 << 20)
    assert disk["data_bytes"] + disk["zero_bytes"] == 1 << 20
    assert disk["stored_bytes"] == next(manifest.parent.glob("vda.*.qcow2")).stat().st_size
    assert done.stderr == ""


def test_without_names_all_machines_are_backed_up_also_after_one_failed(config, tmp_path):
    (tmp_path / "a.qcow2").unlink()
    done = call_pybackup(["--config", config, "full", "--json"])
    assert done.rc == 13
    found = machines(done)
    assert list(found) == ["a", "b", "c"]
    failed = found["a"]
    assert list(failed) == BACKUP_FIELDS
    assert (failed["point"], failed["manifest"], failed["disks"]) == (None, None, [])
    assert list(failed["error"]) == ["code", "message", "hint"]
    assert failed["error"]["code"] == 13
    assert all(found[name]["point"] and found[name]["error"] is None for name in "bc")
    assert len(done.stderr.splitlines()) == 2


def test_failures_of_one_code_give_that_code_and_of_several_give_1(config, tmp_path):
    (tmp_path / "a.qcow2").unlink()
    (tmp_path / "b2.qcow2").unlink()
    assert call_pybackup(["--config", config, "full"]).rc == 13
    with open(tmp_path / "repo" / "c" / "lock", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = call_pybackup(["--config", config, "full", "--json"])
        assert {found["error"]["code"] for found in done.document} == {13, 11}
        assert done.rc == 1
        assert call_pybackup(["--config", config, "full", "c"]).rc == 11


def test_a_warning_gives_3_and_a_failure_counts_before_it(config, tmp_path):
    assert call_pybackup(["--config", config, "full"]).rc == 0
    for name in bitmaps(tmp_path / "a.qcow2"):
        subprocess.run(["qemu-img", "bitmap", "--remove", tmp_path / "a.qcow2", name], check=True)
    done = call_pybackup(["--config", config, "incremental", "--dry-run", "--json"])
    assert (done.rc, len(machines(done)["a"]["warnings"])) == (3, 1)
    assert all(found["point"] is None and found["manifest"] is None for found in done.document)
    (tmp_path / "c.qcow2").unlink()
    done = call_pybackup(["--config", config, "incremental", "--json"])
    assert done.rc == 13
    assert [disk["rescan"] for disk in machines(done)["a"]["disks"]] == [True]
    assert [disk["kind"] for disk in machines(done)["b"]["disks"]] == ["incremental"] * 2
    assert "pybackup: warning: a: disk vda: rescan instead of incremental" in done.stderr


def test_a_bug_in_one_machines_backup_does_not_keep_the_others_from_theirs(config, monkeypatch):
    from backup.operations.backup import create as real

    def buggy(open_repository, request, progress):
        if request.machine == "a":
            raise ZeroDivisionError("division by zero")
        return real(open_repository, request, progress)

    monkeypatch.setattr("backup.night.night.create", buggy)
    for options in ([], ["--debug"]):
        done = call_pybackup(["--config", config, *options, "full", "--json"])
        assert done.rc == 1
        assert [bool(found["point"]) for found in done.document] == [False, True, True]
        assert ("Traceback" in done.stderr) == bool(options)
        assert "a bug in pybackup: ZeroDivisionError" in done.stderr


def test_named_machines_only_and_each_once(config):
    done = call_pybackup(["--config", config, "full", "c", "a", "c", "--json"])
    assert (done.rc, sorted(machines(done))) == (0, ["a", "c"])
    assert len(done.document) == 2
    unknown = call_pybackup(["--config", config, "full", "a", "nobody"])
    assert unknown.rc == 10


def test_a_dry_run_changes_nothing(tmp_path):
    night = Night.of(tmp_path)
    before = night.image.read_bytes()
    done = night.backup("full", "--bitmap", "b1", "--dry-run")
    assert (done.rc, done.machine["point"], done.disk["kind"]) == (0, None, "full")
    assert all(path.is_file() for path in night.repository.iterdir()), "no folder of a machine was made"
    assert night.image.read_bytes() == before


USAGE = [
    [],
    ["nonsense"],
    ["full"],
    ["full", "--nonsense"],
    ["full", "web1", "--image", "x.qcow2"],
    ["full", "--image", "x.qcow2", "--nbd", "nbd://localhost"],
    ["full", "--image", "x.qcow2"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--compression", "gzip"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--limit", "fast"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--limit", "1"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--machine", "../up"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--disk", "a/b"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--bitmap", "with.dot"],
    ["full", "--image", "x.qcow2", "--repo", "r", "--image-format", "vmdk"],
    ["full", "--machine", "m"],
    ["full", "--since", "x"],
    ["incremental", "--image", "x.qcow2", "--repo", "r"],
    ["incremental", "--image", "x.qcow2", "--repo", "r", "--bitmap", "b", "--since", "p"],
    ["map"],
    ["map", "--image", "x", "--nbd", "nbd://y"],
    ["list"],
    ["show"],
    ["restore", "web1/latest"],
    ["restore", "web1/latest", "t", "--format", "vdi", "--repo", "r"],
    ["--quiet", "--verbose", "list", "--repo", "r"],
    ["--config", "not-there.yaml", "list"],
]


@pytest.mark.parametrize("args", USAGE, ids=" ".join)
def test_wrong_usage_is_2_and_two_lines(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYBACKUP_CONFIG", raising=False)
    done = call_pybackup(args, made=False)
    assert done.rc == 2, done
    assert done.stdout == ""
    assert [line.split(" ")[1] for line in done.stderr.splitlines()] == ["error:", "hint:"]
    assert os.listdir(tmp_path) == []


def commands():
    """The commands by their names, as typer makes them."""
    import typer

    from backup.cli import app

    program = typer.main.get_command(app.app)
    return {name: program.get_command(None, name) for name in program.list_commands(None)}


def test_an_option_that_takes_one_value_and_is_given_twice_is_wrong_usage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried = set()
    for name, command in commands().items():
        for option in command.params:
            if option.param_type_name == "option" and not option.is_flag and not option.multiple:
                [spelled] = option.opts
                for args in ([name, spelled, "a", spelled, "b"], [name, f"{spelled}=a", "x", f"{spelled}=a"]):
                    done = call_pybackup(args, made=False)
                    assert (done.rc, done.stdout) == (2, ""), args
                    assert done.stderr.splitlines() == [
                        f"pybackup: error: {spelled} is given twice",
                        f"pybackup: hint: give it once; see: pybackup {name} --help",
                    ]
                    tried.add(spelled)
    assert {"--image", "--repo", "--bitmap", "--config", "--format", "--keep-daily", "--max-age"} <= tried
    assert os.listdir(tmp_path) == []


def test_the_configuration_before_and_after_the_command_is_given_twice(config):
    done = call_pybackup(["--config", config, "list", "--config", config])
    assert (done.rc, "--config is given twice" in done.stderr) == (2, True)


def test_flags_may_be_given_twice(config):
    assert (
        call_pybackup(["--quiet", "--config", config, "full", "--quiet", "--dry-run", "--dry-run", "--quiet"]).rc == 0
    )


def test_common_options_are_taken_before_and_after_every_command(config):
    assert call_pybackup(["--config", config, "full"]).rc == 0
    for given in ("--quiet", "--verbose", "--debug"):
        after, before = (
            call_pybackup(["verify", given, "--config", config]),
            call_pybackup([given, "verify", "--config", config]),
        )
        assert (after.rc, before.rc) == (0, 0)
        assert (after.stdout, after.stderr) == (before.stdout, before.stderr)
        assert (after.stdout == "") == (given == "--quiet")
    assert (
        call_pybackup(["--json", "list", "--config", config]).document
        == call_pybackup(["--config", config, "list", "--json"]).document
    )
    for args in (["--quiet", "list", "--verbose"], ["list", "--quiet", "--verbose"]):
        assert call_pybackup(args).rc == 2
    for name in commands():
        shown = call_pybackup([name, "--help"]).stdout
        for option in ("--config FILE", "--quiet", "--verbose", "--debug", "--json"):
            assert shown.count(f"\n  {option}  ") == 1, (name, option)


def test_every_parameter_says_in_sentences_what_it_does():
    for name, command in commands().items():
        assert command.help.rstrip().endswith("."), name
        for parameter in command.params:
            assert re.match(r"[A-Z/].*[.]$", parameter.help), (name, parameter.name, parameter.help)


def test_what_every_command_says_with_json_is_a_document(config):
    assert call_pybackup(["--config", config, "full"]).rc == 0
    for command in (["pin", "a/latest"], ["unpin", "a/latest"], ["check-config"]):
        done = call_pybackup([*command, "--config", config, "--json"])
        assert (done.rc, done.stderr, type(done.document)) == (0, "", dict), done


@pytest.mark.parametrize("args", [["show"], ["full", "--nonsense"], ["list", "--repo"]], ids=" ".join)
def test_a_usage_error_names_the_commands_own_help(args):
    done = call_pybackup(args)
    assert done.rc == 2
    assert done.stderr.splitlines()[1] == f"pybackup: hint: see: pybackup {args[0]} --help"
    assert call_pybackup(["nonsense"]).stderr.splitlines()[1] == "pybackup: hint: see: pybackup --help"
    hint = call_pybackup(["--repo", "r", "list"]).stderr.splitlines()[1]
    assert hint == "pybackup: hint: give the options of a command after its name; see: pybackup --help"


@pytest.mark.parametrize("args", [["--quiet", "--verbose", "list"], ["nonsense"], ["full", "--nonsense"]], ids=" ".join)
def test_what_fails_before_the_command_is_a_document_too(args):
    done = run_pybackup([*args, "--json"])
    assert (done.rc, done.document["error"]["code"]) == (2, 2), done


def test_wrong_usage_with_json_is_a_document_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args in (["list", "--json"], ["list", "--json", "--nonsense"], ["full", "--json", "--repo", "r"]):
        done = call_pybackup(args)
        assert (done.rc, list(done.document), done.document["error"]["code"]) == (2, ["error"], 2)


def test_nothing_there_is_10(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    for args in (
        ["list", "--repo", tmp_path / "none"],
        ["list", "nobody", "--repo", night.repository],
        ["show", "disk/20200101T000000Z-00000000", "--repo", night.repository],
        ["restore", "nobody/latest", tmp_path / "t", "--repo", night.repository],
        ["restore", tmp_path / "none.json", tmp_path / "t"],
        ["restore", "disk/latest", tmp_path / "t", "--disk", "vdz", "--repo", night.repository],
        ["verify", "--repo", tmp_path / "none"],
        ["--config", make_config(tmp_path), "check-config", "extra"],
    ):
        done = call_pybackup(args)
        assert done.rc == (2 if args[-1] == "extra" else 10), args
        assert len(done.stderr.splitlines()) == 2


def make_config(tmp_path):
    path = tmp_path / "made.yaml"
    path.write_text("bitmap: b1\n")
    return path


def test_list_as_json(tmp_path):
    night = Night.of(tmp_path)
    (tmp_path / "empty").mkdir()

    create_repository(tmp_path / "empty")
    done = run_pybackup(["list", "--json", "--repo", tmp_path / "empty"])
    assert (done.rc, done.stdout, done.stderr) == (0, "[]\n", "")
    taken = [night.full().machine, night.incremental().machine]
    done = call_pybackup(["list", "--json", "--repo", night.repository])
    assert [list(point)[:5] for point in done.document] == [["machine", "point", "sequence", "manifest", "created"]] * 2
    assert [(point["point"], point["manifest"], point["sequence"]) for point in done.document] == [
        (machine["point"], machine["manifest"], number) for number, machine in enumerate(taken, 1)
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", point["created"]) for point in done.document)
    assert [point["disks"][0]["kind"] for point in done.document] == ["full", "incremental"]


def test_map_as_json_covers_the_disk_without_gaps_and_merges_equals(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    write(night.image, "write -P 3 512k 128k", "write -z 64k 64k")
    name = night.own_bitmap
    done = run_pybackup(["map", "--image", night.image, "--bitmap", name, "--json"])
    extents = done.document
    assert (done.rc, done.stderr) == (0, "")
    assert all(list(extent) == ["start", "length", "dirty", "data", "zero", "hole"] for extent in extents)
    at = 0
    for extent in extents:
        assert extent["start"] == at
        at += extent["length"]
    assert at == 4 << 20
    flags = [[extent[key] for key in ("dirty", "data", "zero", "hole")] for extent in extents]
    assert all(one != other for one, other in pairwise(flags))
    dirty = {(extent["start"], extent["length"], extent["zero"]) for extent in extents if extent["dirty"]}
    assert dirty == {(64 << 10, 64 << 10, True), (512 << 10, 128 << 10, False)}


def test_json_is_all_there_is_on_standard_output(config, tmp_path):
    commands = [
        ["full", "--json"],
        ["incremental", "--json"],
        ["incremental", "--json", "--dry-run"],
        ["list", "--json"],
        ["show", "a/latest", "--json"],
        ["verify", "--json"],
        ["restore", "a/latest", str(tmp_path / "r.raw"), "--json"],
        ["restore", "a/latest", str(tmp_path / "r.raw"), "--json"],
        ["map", "--image", str(tmp_path / "a.qcow2"), "--json"],
        ["map", "--image", str(tmp_path / "a.qcow2"), "--json", "--totals"],
    ]
    codes = []
    for command in commands:
        done = call_pybackup(["--config", config, *command])
        codes.append(done.rc)
        json.loads(done.stdout)
    assert codes == [0, 0, 0, 0, 0, 0, 0, 2, 0, 0]


def test_cron_sees_one_line_per_disk_and_no_escape_codes(config):
    done = run_pybackup(["--config", config, "full"], env={"TERM": "xterm-256color", "FORCE_COLOR": "1"})
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["a/vda", "b/vda", "b/vdb", "c/vda"]
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == ""


def test_quiet_says_nothing_but_warnings_and_errors(config, tmp_path):
    done = call_pybackup(["--config", config, "--quiet", "full"])
    assert (done.rc, done.stdout, done.stderr) == (0, "", "")
    for name in bitmaps(tmp_path / "a.qcow2"):
        subprocess.run(["qemu-img", "bitmap", "--remove", tmp_path / "a.qcow2", name], check=True)
    (tmp_path / "c.qcow2").unlink()
    done = call_pybackup(["--config", config, "--quiet", "incremental"])
    assert (done.rc, done.stdout) == (13, "")
    kinds = [line.split(" ")[1] for line in done.stderr.splitlines()]
    assert kinds == ["warning:", "error:", "hint:"]
    for command in (["verify"], ["restore", "a/latest", tmp_path / "r.raw"], ["check-config"]):
        done = call_pybackup(["--config", config, "--quiet", *command])
        assert (done.rc, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind_on_standard_output(tmp_path):
    night = Night.of(tmp_path)
    ours, theirs = pty.openpty()
    command = [PYBACKUP, "full", "--image", night.image, "--repo", night.repository, "--bitmap", "b1"]
    init(command)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 4096):
            drawn += part
    except OSError:
        pass  # EIO: the other side is closed
    finally:
        os.close(ours)
    stdout, _ = process.communicate()
    assert process.returncode == 0
    assert b"\x1b" in drawn
    assert b"\x1b" not in stdout
    assert len(stdout.splitlines()) == 1


def test_full_without_a_bitmap_says_that_none_is_started(tmp_path):
    night = Night.of(tmp_path)
    done = call_pybackup(["full", "--image", night.image, "--repo", night.repository])
    assert done.rc == 0
    assert "pybackup: note: disk disk: no bitmap was named" in done.stdout
    assert bitmaps(night.image) == {}


def test_the_configuration_that_counts(config, tmp_path):
    """--config, else $PYBACKUP_CONFIG, else ./config.yaml."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("option", "variable", "here/config"):
        (tmp_path / f"{name}.yaml").write_text(
            f"machines: {{{name[:4].strip('/')}: {{disks: {{vda: {{image: x}}}}}}}}\n"
        )
    variable = {"PYBACKUP_CONFIG": str(tmp_path / "variable.yaml")}

    def counted(args, env):
        done = run_pybackup([*args, "full", "nobody", "--repo", "r"], env={"PYBACKUP_CONFIG": "", **env}, cwd=here)
        assert done.rc == 10, done
        return re.search(r"it has: (\w+)", done.stderr)[1]

    assert counted(["--config", str(tmp_path / "option.yaml")], variable) == "opti"
    assert counted([], variable) == "vari"
    assert counted([], {}) == "here"


def test_options_win_over_the_configuration(config, tmp_path):
    options = ["--repo", tmp_path / "other", "--bitmap", "b9", "--compression", "none"]
    assert call_pybackup(["--config", config, "full", "a", *options]).rc == 0
    assert not (tmp_path / "repo").exists()
    manifest = json.loads(next((tmp_path / "other" / "a").glob("*.json")).read_bytes())["disks"][0]
    assert manifest["data"]["compression"] == "none"
    assert manifest["bitmap"]["started"].startswith("b9.")


def test_forms_of_a_manifests_name(tmp_path, monkeypatch):
    night = Night.of(tmp_path)
    first, second = night.full().machine, None
    write(night.image, "write -P 77 0 64k")
    second = night.incremental().machine
    expected = raw_copy(night.image, tmp_path / "source.raw")
    config = tmp_path / "c.yaml"
    config.write_text("repository: repo\n")
    monkeypatch.chdir(tmp_path)
    for number, args in enumerate(
        [
            [second["manifest"]],
            [os.path.relpath(second["manifest"])],
            ["disk/latest", "--repo", night.repository],
            [f"disk/{second['point']}", "--repo", night.repository],
        ]
    ):
        assert call_pybackup(["restore", args[0], f"{number}.raw", *args[1:]]).rc == 0
        require_identical(expected, tmp_path / f"{number}.raw")
    assert call_pybackup(["--config", config, "show", "disk/latest", "--json"]).document["point"] == second["point"]
    # An existing path wins over MACHINE/POINT.
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "latest").write_text("{}")
    done = call_pybackup(["show", "disk/latest", "--repo", night.repository])
    assert (done.rc, "is neither a manifest" in done.stderr) == (2, True)
    assert first["point"] != second["point"]


def test_latest_is_refused_where_a_damaged_manifest_may_be_it(tmp_path):
    night = Night.of(tmp_path)
    first = night.full().machine
    second = night.incremental().machine
    with open(second["manifest"], "ab") as file:
        file.write(b"x")
    done = call_pybackup(["restore", "disk/latest", tmp_path / "r.raw", "--repo", night.repository])
    assert done.rc == 12
    assert second["point"] in done.stderr
    assert not (tmp_path / "r.raw").exists()
    assert call_pybackup(["restore", f"disk/{first['point']}", tmp_path / "r.raw", "--repo", night.repository]).rc == 0


def test_check_config(config, tmp_path):
    done = call_pybackup(["--config", config, "check-config"])
    assert (done.rc, done.stderr) == (0, "")
    assert "3 machines, 4 disks" in done.stdout
    config.write_text("repositroy: x\nmachines: {a: {disks: {vda: {imag: y}}}}\n")
    done = call_pybackup(["--config", config, "check-config"])
    assert done.rc == 2
    assert "line 1" in done.stderr
    assert "line 2" in done.stderr


def test_a_damaged_configuration_that_lies_about_does_not_keep_from_a_restore(tmp_path):
    night = Night.of(tmp_path)
    manifest = night.full().machine["manifest"]
    (tmp_path / "config.yaml").write_text("nonsense: [")
    done = run_pybackup(["restore", manifest, "r.raw"], cwd=tmp_path)
    assert done.rc == 0, done.stderr


def shell(command, cwd):
    """Redirections, closed descriptors and readers that leave are a shell's work."""
    return subprocess.run(
        ["bash", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "P": str(PYBACKUP)},
    )


def test_a_report_that_cannot_be_written_keeps_no_machine_from_its_backup(config, tmp_path):
    init(["--config", config, "full"])
    done = shell("$P --config c.yaml full > /dev/full", tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "No space left" in done.stderr
    assert "a bug" not in done.stderr
    assert len(list((tmp_path / "repo").glob("*/*.json"))) == 3
    done = shell("$P --config c.yaml full | true; exit ${PIPESTATUS[0]}", tmp_path)
    assert (done.returncode, done.stderr) in {(1, ""), (0, "")}
    assert len(list((tmp_path / "repo").glob("*/*.json"))) == 6


@pytest.mark.parametrize("command", ["--help", "--version", "list --help", "list --repo repo", "check-config"])
def test_a_full_standard_output_is_named_by_whatever_is_written_to_it(command, config, tmp_path):
    assert run_pybackup(["full", "a", "--config", config]).rc == 0
    done = shell(f"PYBACKUP_CONFIG=c.yaml $P {command} > /dev/full", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "pybackup: error: standard output cannot be written: No space left on device",
        "pybackup: hint: the command itself is done; only its output is lost",
    ]
    # A reader that has gone needs no message.
    done = shell(f"PYBACKUP_CONFIG=c.yaml $P {command} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) in {(0, ""), (1, "")}


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_standard_output(monkeypatch):
    """typer ends the program without a word where it meets EPIPE."""
    from backup.cli import find

    def broken(_repo):
        raise BrokenPipeError(32, "Broken pipe", "/run/agent.sock")

    monkeypatch.setattr(find, "repository", broken)
    done = call_pybackup(["list", "--repo", "r"])
    assert (done.rc, done.stderr.splitlines()[0]) == (1, "pybackup: error: /run/agent.sock: Broken pipe")


def test_a_chain_with_more_points_than_a_process_may_open_files(tmp_path):
    """The soft limit is raised to the hard one; beyond that, the error is two lines that name the limit."""
    night = Night.of(tmp_path)
    night.full()
    for _ in range(14):
        assert night.incremental().rc == 0
    expected = raw_copy(night.image, tmp_path / "expected.raw")
    command = "$P restore disk/latest r.raw --repo repo"
    done = shell(f"ulimit -n 20; {command}", tmp_path)
    assert done.returncode == 1, done
    error, hint = done.stderr.splitlines()
    assert error.startswith("pybackup: error: ")
    assert "Too many open files" in error
    assert hint.startswith("pybackup: hint: raise the limit of open files, which is 20 for pybackup (ulimit -n")
    assert {path.name for path in tmp_path.iterdir()} == {"disk.qcow2", "repo", "expected.raw"}
    assert shell(f"ulimit -Sn 20; {command}", tmp_path).returncode == 0
    require_identical(expected, tmp_path / "r.raw")


def test_closed_standard_streams_and_full_ones(tmp_path):
    night = Night.of(tmp_path)
    repo, image = night.repository, night.image
    init(["full", "--repo", repo])
    done = shell(f"exec <&- >&- 2>&-; $P full --image {image} --repo {repo} --bitmap b1", tmp_path)
    assert done.returncode == 0
    night.require_restored()
    assert shell(f"$P list --repo {repo} 2> /dev/full", tmp_path).returncode == 0
    assert shell(f"$P list nobody --repo {repo} 2> /dev/full", tmp_path).returncode == 10


def test_a_terminals_encoding_that_lacks_a_name(tmp_path):
    image = make_image(tmp_path / "größe.qcow2", "1M")
    options = ["full", "--image", image, "--machine", "m", "--disk", "d", "--repo", tmp_path / "repo"]
    assert call_pybackup(options).rc == 0
    for command in (["show", "m/latest"], ["list"]):
        done = run_pybackup([*command, "--repo", tmp_path / "repo"], env={"PYTHONIOENCODING": "ascii"})
        assert (done.rc, done.stderr) == (0, "")


def test_one_signal_ends_it_with_the_signals_code_and_two_lines(tmp_path):
    night = Night.of(tmp_path)
    night.full()
    for number, code in (("HUP", 129), ("INT", 130), ("TERM", 143)):
        script = (
            "import os, signal\nfrom backup.cli import app\nfrom backup.operations import backup\n"
            f"backup.create = lambda *_: os.kill(os.getpid(), signal.SIG{number})\napp.main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, "full", "--image", night.image, "--repo", night.repository, "--json"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        assert len(done.stderr.splitlines()) == 2
        assert json.loads(done.stdout)["error"]["code"] == code


def test_the_process_ends_without_being_taken_apart_and_all_it_said_is_written():
    script = "import atexit\nfrom backup.cli import app\natexit.register(print, 'taken apart')\napp.main()"
    done = subprocess.run([sys.executable, "-c", script, "--help"], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == call_pybackup(["--help"]).stdout


def test_help_and_version():
    done = call_pybackup(["--help"])
    assert done.rc == 0
    for command in ("full", "incremental", "map", "list", "show", "restore", "verify", "check-config"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)
        assert call_pybackup([command, "--help"]).rc == 0
    assert not re.search(r"\w\.\.\.$", done.stdout, re.MULTILINE), "a summary that does not fit into its line"
    assert "[[" not in call_pybackup(["verify", "--help"]).stdout
    assert re.fullmatch(r"pybackup \d+\.\d+\.\d+\S*\n", call_pybackup(["--version"]).stdout)


def test_what_the_system_refuses_is_no_bug(tmp_path):
    """In a folder that is gone; and where there may be no more memory for threads."""
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {PYBACKUP} show x.json"
    done = subprocess.run(["sh", "-c", script], check=False, capture_output=True, text=True)
    assert "a bug" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    from backup.cli.context import user_error

    assert "gives no more threads" in user_error(RuntimeError("can't start new thread")).message
    assert "systemd unit" in user_error(RuntimeError("can't start new thread")).hint
    assert user_error(PermissionError(13, "Permission denied", "/x/y")).message == "/x/y: Permission denied"
    assert "a bug" in user_error(RuntimeError("something else")).message


def test_hints_repeat_the_repository_and_the_configuration_that_were_named(config, tmp_path):
    assert call_pybackup(["--config", config, "full", "a"]).rc == 0
    repo = tmp_path / "repo"
    point = "a/20200101T000000Z-00000000"

    def hint(*args):
        return call_pybackup(args).stderr.splitlines()[-1].removeprefix("pybackup: hint: ")

    assert hint("show", point, "--repo", repo) == f"see: `pybackup list a --repo {repo}`"
    assert hint("show", point, "--config", config) == f"see: `pybackup list a --config {config}`"
    assert hint("--config", config, "show", point) == f"see: `pybackup list a --config {config}`"
    done = call_pybackup(["show", point, "--repo", repo, "--json"])
    assert done.document["error"]["hint"] == f"see: `pybackup list a --repo {repo}`"


def test_which_options_a_command_in_a_hint_gets():
    from backup.cli.hints import WITHOUT_REPO, complete

    assert complete("see: `pybackup list`", "/a b", "c.yaml") == "see: `pybackup list --repo '/a b' --config c.yaml`"
    assert complete("`pybackup check-config` checks again", "/r", None) == "`pybackup check-config` checks again"
    assert complete("`pybackup list --repo /s`", "/r", None) == "`pybackup list --repo /s`"
    assert complete("give --repo DIR to `qemu-img`", "/r", "c") == "give --repo DIR to `qemu-img`"
    for name, command in commands().items():
        takes = any("--repo" in parameter.opts for parameter in command.params)
        assert takes == (name not in WITHOUT_REPO), name


def test_every_command_in_a_hint_stands_in_backquotes():
    """So it gets the user's --repo (backup.cli.hints)."""
    names = "|".join(commands())
    package = Path(backup.__file__).parent
    seen = 0
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "hint":
                text = ast.unparse(node.value)
                assert not re.search(rf"(?<!`)pybackup ({names})\b", text), f"{path}: {text}"
                seen += "`pybackup " in text
    assert seen > 10


def test_a_configuration_that_others_may_write_is_used_with_one_warning(config, tmp_path):
    found = config.rename(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").chmod(0o600)
    assert call_pybackup(["init", tmp_path / "repo"]).rc == 0
    for mode, words in ((0o666, "may be written by every user"), (0o664, "may be written by its group"), (0o644, None)):
        found.chmod(mode)
        for args in (["check-config"], ["full", "a", "--json"], ["verify", "--config", "config.yaml"]):
            done = run_pybackup(args, cwd=tmp_path)
            assert done.rc == 0, done
            assert [words in line for line in done.stderr.splitlines()] == ([True] if words else []), done
            assert args[-1] != "--json" or done.machine["warnings"] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_configuration_of_another_user_is_used_with_a_warning(config, tmp_path):
    os.chown(config, 12345, 0)
    done = call_pybackup(["check-config", "--config", config])
    assert done.rc == 0
    assert "belongs to another user (uid 12345)" in done.stderr


def test_whose_configurations_are_trusted():
    from backup.cli.settings import distrust

    def file(owner, mode):
        return os.stat_result((mode, 0, 0, 1, owner, 7, 0, 0, 0, 0))

    assert distrust(file(0, 0o100644), 1000) is distrust(file(1000, 0o100600), 1000) is None
    assert "uid 1001" in distrust(file(1001, 0o100600), 1000)
    assert "uid 1000" in distrust(file(1000, 0o100600), 0)
    assert "gid 7" in distrust(file(0, 0o100620), 0)
    assert "every user" in distrust(file(0, 0o100602), 0)


def test_the_example_is_installed_with_the_package_and_printed(tmp_path, monkeypatch):
    root = Path(__file__).parents[2]
    done = run_pybackup(["check-config", "--example"], cwd=tmp_path)
    assert (done.rc, done.stdout) == (0, (root / "config.example.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("nonsense: [")
    as_json = call_pybackup(["check-config", "--example", "--json"])
    assert as_json.document == {"example": done.stdout}
    metadata = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert set(metadata["backup"]) >= {"config.example.yaml", "FORMAT.md"}
    assert all((root / "backup" / name).is_file() for name in metadata["backup"])


def test_neither_a_home_nor_a_terminal_nor_a_locale_is_needed(tmp_path):
    night = Night.of(tmp_path)
    assert call_pybackup(["init", night.repository]).rc == 0
    places = ["--repo", night.repository]
    for environment in (
        {},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "no-such", "COLUMNS": "1"},
    ):
        for args in (["full", "--image", night.image, *places], ["list", *places], ["list", "--help"]):
            done = subprocess.run([PYBACKUP, *args], env=environment, check=False, capture_output=True, text=True)
            assert (done.returncode, done.stderr) == (0, ""), done
        # A name that is not UTF-8 is an argument like any other.
        done = subprocess.run(
            [PYBACKUP, "full", "--image", b"n\xfcll.qcow2", *places], env=environment, check=False, capture_output=True
        )
        assert done.returncode == 2
        assert [line.split(b" ")[1] for line in done.stderr.splitlines()] == [b"error:", b"hint:"]
