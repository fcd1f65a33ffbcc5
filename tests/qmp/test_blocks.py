"""Which node of a running QEMU is a disk: by any of its names, below filters, above what it was once."""

import pytest

from backup.errors import SourceError
from backup.qmp.blocks import BlockGraph


def named(name, driver="qcow2", file=None, **image):
    return {
        "node-name": name,
        "ro": False,
        "drv": driver,
        "file": file or f"/images/{name}",
        "image": {"virtual-size": 1 << 20, "actual-size": 4096, **image},
    }


def device(node, *, qdev="", name="", status="ok", writes=True, shares=False):
    root = {"perm": ["write"] * writes, "shared-perm": ["write"] * shares}
    return {"device": name, "qdev": qdev, "io-status": status, "inserted": {"node-name": node}, "root": root}


def blocks(nodes, edges, devices=(), exported=()):
    """
    Edges are "parent child name", and " write" where the parent writes.

    A block backend stands above each device's node, as in QEMU's graph.
    """
    numbers = {node["node-name"]: number for number, node in enumerate(nodes)}
    graph_nodes = [{"id": number, "name": name, "type": "block-driver"} for name, number in numbers.items()]
    graph_edges = [
        {"parent": numbers[parent], "child": numbers[child], "name": kind, "perm": perm, "shared-perm": []}
        for parent, child, kind, *perm in (edge.split() for edge in edges)
    ]
    for number, found in enumerate(devices, len(nodes)):
        root = found.pop("root")
        graph_nodes.append({"id": number, "name": found["device"] or found["qdev"], "type": "block-backend"})
        child = numbers[found["inserted"]["node-name"]]
        graph_edges.append({"parent": number, "child": child, "name": "root", **root})
    return BlockGraph.of(
        nodes, devices, {"nodes": graph_nodes, "edges": graph_edges}, [{"node-name": node} for node in exported]
    )


def resolved(found, text):
    return found.resolve(text, lambda ours, qemus: ours == qemus).name


@pytest.fixture
def throttled():
    """A disk with a base, below a throttle filter, as a guest's virtio disk."""
    nodes = [
        named("throttle0", "throttle", "json:{}"),
        named("disk0", file="/images/top.qcow2"),
        named("file0", "file", "/images/top.qcow2"),
        named("base0", file="/images/base.qcow2"),
        named("file1", "file", "/images/base.qcow2"),
    ]
    edges = ["throttle0 disk0 file", "disk0 file0 file", "disk0 base0 backing", "base0 file1 file"]
    return blocks(nodes, edges, [device("throttle0", qdev="/machine/peripheral/vd0/virtio-backend")])


def test_a_relative_files_name_with_a_colon_is_no_protocols():
    nodes = [named("disk0", file="a:b.qcow2"), named("file0", "file", "a:b.qcow2"), named("nbd0", "nbd", "nbd:x")]
    found = blocks(nodes, ["disk0 file0 file"])
    assert (found.storage("disk0").file, found.nodes["nbd0"].file) == ("./a:b.qcow2", "nbd:x")


def test_a_drive_without_a_medium_is_said_to_be_empty():
    drives = [{"device": "", "qdev": "/machine/peripheral/cd0", "io-status": "ok", "tray_open": False}]
    found = BlockGraph.of([named("disk0")], drives, {"nodes": [], "edges": []})
    with pytest.raises(SourceError, match="'cd0' of the machine is empty"):
        resolved(found, "cd0")


@pytest.mark.parametrize(
    "text",
    ["disk0", "throttle0", "file0", "vd0", "/machine/peripheral/vd0/virtio-backend", "/images/top.qcow2", "base0"],
)
def test_a_disk_is_the_format_node_that_the_guest_writes_to_whatever_names_it(throttled, text):
    assert resolved(throttled, text) == "disk0"


def test_the_chain_goes_down_the_backing_files(throttled):
    assert [node.name for node in throttled.chain("disk0")] == ["disk0", "base0"]
    assert throttled.storage("disk0").name == "file0"


def test_after_a_snapshot_the_old_node_means_the_overlay_above_it():
    nodes = [named("snap1"), named("disk0")]
    found = blocks(nodes, ["snap1 disk0 backing"], [device("snap1", name="drive0")])
    assert resolved(found, "disk0") == "snap1"
    assert resolved(found, "drive0") == "snap1"


def test_a_filter_of_a_mirror_is_passed_and_its_target_is_another_disk():
    nodes = [named("top", "mirror_top"), named("disk0"), named("copy0")]
    found = blocks(nodes, ["top disk0 backing", "top copy0 target"], [device("top", qdev="/machine/peripheral/vd0")])
    assert resolved(found, "vd0") == "disk0"
    assert resolved(found, "copy0") == "copy0"


def test_an_overlay_of_ours_is_no_disk_of_the_guest():
    nodes = [
        named("pybackup-1-2-c0", "copy-before-write"),
        named("pybackup-1-2-f0"),
        named("disk0"),
    ]
    edges = ["pybackup-1-2-c0 disk0 file", "pybackup-1-2-c0 pybackup-1-2-f0 target", "pybackup-1-2-f0 disk0 backing"]
    assert resolved(blocks(nodes, edges), "disk0") == "disk0"  # also with no device: an export alone
    found = blocks(nodes, edges, [device("pybackup-1-2-c0", qdev="/machine/peripheral/vd0", status="nospace")])
    assert resolved(found, "vd0") == "disk0"
    assert [above.io_status for above in found.devices_above("pybackup-1-2-c0")] == ["nospace"]


def test_another_programs_overlay_on_a_guests_disk_does_not_hide_the_disk():
    nodes = [named("libvirt-backup"), named("disk0")]
    found = blocks(nodes, ["libvirt-backup disk0 backing"], [device("disk0", qdev="/machine/peripheral/vd0")])
    assert resolved(found, "disk0") == "disk0"


def test_a_base_of_two_disks_is_refused_with_both_names():
    nodes = [named("a"), named("b"), named("base")]
    devices = [device("a", qdev="/machine/peripheral/x"), device("b", qdev="/machine/peripheral/y")]
    found = blocks(nodes, ["a base backing", "b base backing"], devices)
    with pytest.raises(SourceError, match="several disks: a, b"):
        resolved(found, "base")


def test_what_is_not_there_is_refused_with_what_is(throttled):
    with pytest.raises(SourceError, match="no node, device or image 'vd1'") as caught:
        resolved(throttled, "vd1")
    assert "vd0" in caught.value.hint
    assert "disk0" in caught.value.hint


def test_a_raw_file_without_a_format_node_is_a_disk_too():
    found = blocks([named("raw0", "file", "/images/x.raw")], [], [device("raw0", name="drive0")])
    assert resolved(found, "/images/x.raw") == "raw0"


def test_bitmaps_without_a_name_are_qemus_own():
    bitmap = {"granularity": 65536, "count": 0, "recording": True, "persistent": True, "busy": False}
    nodes = [named("disk0") | {"dirty-bitmaps": [bitmap, bitmap | {"name": "b1", "inconsistent": True}]}]
    [found] = blocks(nodes, []).nodes["disk0"].bitmaps
    assert (found.name, found.inconsistent) == ("b1", True)


# What a backup of a whole machine holds


def test_a_machines_disks_are_its_writable_devices_without_firmware_media_and_drives_of_no_device():
    nodes = [named(name) for name in ("sda", "cd", "vars", "sdb", "loose")] + [named("slow", "throttle")]
    devices = [
        device("sda", qdev="sda0"),
        device("cd", qdev="/machine/peripheral/cd0", writes=False),
        device("vars", qdev="/machine/system.flash1"),
        device("slow", qdev="/machine/peripheral/sdb0/virtio-backend"),
        device("loose", name="drive9"),
    ]
    found = blocks(nodes, ["slow sdb file"], devices)
    assert [(disk.names[0], node.name) for disk, node in found.disks()] == [("sda0", "sda"), ("sdb0", "sdb")]


def test_a_node_that_neither_a_device_nor_an_export_uses_is_abandoned_in_a_machine_with_devices():
    nodes = [named("old"), named("new"), named("served"), named("base")]
    devices = [device("new", qdev="/machine/peripheral/x")]
    found = blocks(nodes, ["new base backing"], devices, ["served"])
    assert [name for name in found.nodes if found.is_abandoned(name)] == ["old"]
    without_devices = blocks(nodes, ["new base backing"])
    assert not any(without_devices.is_abandoned(name) for name in nodes[0] if name in without_devices.nodes)
    assert not without_devices.is_abandoned("old")


def test_our_own_overlay_and_its_export_are_no_users_of_a_disk():
    nodes = [named("old"), named("new"), named("pybackup-1-2-f0")]
    devices = [device("new", qdev="/machine/peripheral/x")]
    found = blocks(nodes, ["pybackup-1-2-f0 old backing"], devices, ["pybackup-1-2-f0"])
    assert found.is_abandoned("old")


def same(one, other):
    return one == other


def writers(nodes, edges, **more):
    return blocks(nodes, edges, **more).unseen_writer("disk0", same)


DISK = [named("disk0", file="/i.raw"), named("file0", "file", "/i.raw")]


def test_what_writes_below_a_disks_node_is_seen():
    assert writers(DISK, ["disk0 file0 file write"]) is None
    nodes = [*DISK, named("part1", "raw", "/i.raw")]
    assert "'part1'" in writers(nodes, ["disk0 file0 file write", "part1 file0 file write"])
    assert writers(nodes, ["disk0 file0 file write", "part1 file0 file"]) is None
    below = blocks(DISK, ["disk0 file0 file write"], [device("file0", qdev="/machine/peripheral/x")])
    assert "/machine/peripheral/x" in below.unseen_writer("disk0", same)


def test_a_writer_of_an_external_data_file_is_seen():
    nodes = [*DISK, named("data0", "file", "/d.raw")]
    edges = ["disk0 file0 file write", "disk0 data0 data-file write"]
    assert blocks(nodes, edges).data_file("disk0") == "/d.raw"
    assert blocks(DISK, edges[:1]).data_file("disk0") is None
    assert writers(nodes, edges) is None
    assert "'other'" in writers([*nodes, named("other", "file", "/d.raw")], edges)


def test_the_same_file_open_for_writing_under_another_node_is_seen():
    other = named("file1", "file", "/i.raw")
    assert "'file1'" in writers([*DISK, other], ["disk0 file0 file write"])
    assert writers([*DISK, other | {"ro": True}], ["disk0 file0 file write"]) is None
    assert writers([*DISK, named("file1", "file", "/j.raw")], ["disk0 file0 file write"]) is None
    assert writers([*DISK, other | {"node-name": "pybackup-1-2-s0"}], ["disk0 file0 file write"]) is None


def test_a_backing_file_that_is_written_is_no_writer_to_the_disk():
    """The stat of a backing file shows writes; a commit job's are wanted."""
    nodes = [*DISK, named("base0"), named("file1", "file", "/base"), named("job", "commit_top")]
    edges = ["disk0 file0 file write", "disk0 base0 backing", "base0 file1 file write", "job base0 backing write"]
    assert writers(nodes, edges) is None


@pytest.mark.parametrize(
    ("nodes", "encrypted"),
    [
        ([named("disk0"), named("file0", "file")], False),
        ([named("disk0", **{"format-specific": {"data": {"encrypt": {"format": "luks"}}}}), named("file0")], True),
        ([named("disk0", "raw"), named("file0", "luks")], True),
    ],
)
def test_an_encrypted_disk_is_known_by_its_own_node_or_by_one_that_its_bytes_come_through(nodes, encrypted):
    assert blocks(nodes, ["disk0 file0 file"]).is_encrypted("disk0") == encrypted
    above = [named("top"), *nodes]
    assert blocks(above, ["top disk0 backing", "disk0 file0 file"]).is_encrypted("top") == encrypted


def test_a_graph_with_a_cycle_is_refused():
    with pytest.raises(SourceError, match="below itself"):
        blocks([named("a"), named("b")], ["a b file", "b a backing"])


def test_what_only_one_of_the_answers_knows_is_left_out():
    graph = {
        "nodes": [{"id": 1, "type": "block-driver", "name": "gone"}, {"id": 2, "type": "block-driver", "name": "a"}],
        "edges": [{"parent": 2, "child": 1, "name": "file", "perm": [], "shared-perm": []}],
    }
    devices = [{"device": "d", "inserted": {"node-name": "gone"}}]
    found = BlockGraph.of([named("a")], devices, graph, [{"node-name": "gone"}])
    assert (found.edges, found.devices, found.exported) == ((), (), ())
    assert found.storage("a").name == "a"
