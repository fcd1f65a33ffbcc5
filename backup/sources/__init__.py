"""
Sources: what a machine's disks can be read from, behind one interface.

    source    one disk: what it shows, and its bitmaps
    host      what all disks of a machine are on, and how one instant of them comes to be read

    at_rest   images that no machine has open, served by a qemu-nbd of our own; exports of someone's NBD server
    running   the nodes of a running QEMU, through QMP
"""
