"""
Sources: what a machine's disks can be read from, behind one interface.

    base         the interface: Source (one disk), Host (all disks of a machine), Moment (one instant of them)
    choose       from a specification of a machine's disks to its host and sources
    resting      disks that nobody writes to: an `image` that pybackup serves, or an export of an `nbd_server`
    running      the nodes of a running QEMU, through QMP
    on_or_off    a machine that runs on some nights and is off on others
"""
