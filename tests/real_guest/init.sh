#!/bin/busybox sh
# The guest: the first and only program of a virtual machine, started by the kernel (see initrd.py).
#
# mode=write (on the kernel's command line, which the kernel puts into our environment) works on two disks until the
# machine is ended; mode=check looks at what a restored disk holds, prints a verdict on the console and ends the machine.
#
#   /dev/vda  an ext4 with "ballast", which is never written, and generations of files; beyond its end, at $marker,
#             one number
#   /dev/vdb  a ring of blocks, each full of its number; the first round is there already (see guest.py)
#
# Each number n goes first to the marker, then into the ring.  So at any one instant the marker is the ring's newest
# number or one more, and the ring holds consecutive numbers.

BLOCK=65536 # bytes of a block of the ring
SLOTS=256   # blocks of the ring
KEPT=8      # generations of files

/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /mnt /run
for module in $(cat /modules/order); do
    insmod "/modules/$module.ko" || exit 1 # without its first program the kernel panics, and the machine ends
done
until [ -b /dev/vda ]; do :; done

end_machine() {
    sync
    poweroff -f
}

write_ring() {
    n=$SLOTS
    while n=$((n + 1)); do
        echo "$n" | dd of=/dev/vda bs=4096 seek=$((marker / 4096)) conv=sync,notrunc oflag=direct 2>/dev/null
        yes "$n" | dd of=/dev/vdb bs=$BLOCK count=1 seek=$((n % SLOTS)) iflag=fullblock oflag=direct \
            conv=notrunc,fsync 2>/dev/null
        echo "number $n"
    done
}

# A generation gets its name when all its files are on the disk, and loses it before the first of them goes: whenever
# the machine is cut off, each folder with such a name is whole.
write_files() {
    g=0
    while g=$((g + 1)); do
        mkdir new
        dd if=/dev/urandom of=new/created bs=4k count=50 2>/dev/null
        cp new/created new/rewritten
        dd if=/dev/urandom of=new/rewritten bs=4k seek=$((g % 40)) count=5 conv=notrunc 2>/dev/null
        echo "$g" >new/number
        (cd new && md5sum created rewritten number >SUMS)
        sync
        mv new "generation.$g"
        [ -d "generation.$((g - KEPT))" ] && mv "generation.$((g - KEPT))" old
        rm -rf old
        sync
        echo "generation $g"
    done
}

start_agent() {
    until port=$(ls /dev/vport*p* 2>/dev/null); do :; done
    qemu-ga -m virtio-serial -p "$port" -t /run &
}

work() {
    mount -t ext4 -o discard /dev/vda /mnt || exit 1
    cd /mnt || exit 1
    write_ring &
    start_agent
    echo READY
    write_files
}

# Prints "verdict good COUNT NEWEST" (of generations), or "verdict bad" and what is wrong.  The disk is used as its owner would: the
# journal is replayed, every file read, and something written.
check() {
    mount -t ext4 /dev/vda /mnt && cd /mnt || { echo "verdict bad: no file system"; return; }
    count=0
    newest=0
    for folder in ballast generation.*; do
        if ! said=$(cd "$folder" && md5sum -c SUMS 2>&1); then
            echo "verdict bad: $folder:" $said
            return
        fi
        [ $folder = ballast ] && continue
        count=$((count + 1))
        g=${folder#generation.}
        [ "$g" -gt "$newest" ] && newest=$g
    done
    echo "written after the restore" >after && cd / && umount /mnt || { echo "verdict bad: not writable"; return; }
    if dmesg | grep -E 'EXT4-fs (error|warning)|I/O error'; then
        echo "verdict bad: the kernel complained"
        return
    fi
    echo "verdict good $count $newest"
}

case $mode in
write) work ;;
check)
    check
    end_machine
    ;;
*) echo "verdict bad: mode=$mode" ;;
esac
