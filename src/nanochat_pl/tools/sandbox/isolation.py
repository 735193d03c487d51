"""Isolation of a process of this machine: namespaces, mounts, capabilities, limits, a filter of system calls.

Everything here changes the calling process for good, so it is called in processes that were started for it. Numbers
are those of the kernel's headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import resource

LINUX = sys.platform == "linux"
INSIDE = 1000  # the first id inside of the user namespace
FIRST_ID = 0x4000_0000  # ids from here on belong to nobody, as far as is known

# Namespaces: name of the layer → flag of clone(2).
NAMESPACES = {
    "user isolation": 0x1000_0000,
    "file isolation": 0x0002_0000,
    "process isolation": 0x2000_0000,
    "network isolation": 0x4000_0000,
    "IPC isolation": 0x0800_0000 | 0x0400_0000,  # and the host's name
}
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 32, 4096, 16384, 1 << 18
_MS_RDONLY, _MNT_DETACH = 1, 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_READ_ONLY = 0x1 | 0x2 | 0x4  # MOUNT_ATTR_RDONLY, NOSUID, NODEV
_PR_DEATH_SIGNAL, _PR_DUMPABLE, _PR_SECCOMP, _PR_DROP_BOUND, _PR_SUBREAPER, _PR_NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38

_libc: Any = ctypes.CDLL(None, use_errno=True) if sys.platform != "win32" else None


class LayerMissing(Exception):
    """An isolation layer that this system does not give. ``str`` says which, and what the system said."""


@contextlib.contextmanager
def building(layer: str) -> Iterator[None]:
    """Errors of the system become a missing layer of this name."""
    try:
        yield
    except OSError as error:
        raise LayerMissing(f"{layer}: {error.strerror or error}") from error


def _call(function: str, *arguments: object) -> None:
    if getattr(_libc, function)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _prctl(option: int, *arguments: int) -> None:
    _call("prctl", option, *(ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]))


def end_with_parent() -> None:
    """Kill this process when its parent ends."""
    if LINUX:
        _prctl(_PR_DEATH_SIGNAL, 9)


def keep_orphans() -> None:
    """Become the parent of descendants whose own parents end."""
    if LINUX:
        _prctl(_PR_SUBREAPER, 1)


# Namespaces and mounts


def try_namespace(name: str) -> None:
    """Enter one of NAMESPACES, in a user namespace. Raises LayerMissing."""
    with building(name):
        if not LINUX:
            raise OSError(_ENOSYS, "there is none on this system")
        _call("unshare", NAMESPACES["user isolation"] | NAMESPACES[name])


def first_free_id() -> int | None:
    """The first of three user ids that nobody uses, for a privileged process; None where it has to keep its own."""
    if not LINUX or os.geteuid() != 0:
        return None
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text("utf-8").splitlines()]
    start, _, count = max(ranges, key=lambda entry: entry[2])
    if count > FIRST_ID * 3:
        return FIRST_ID + 4 * os.getpid()
    return start + 20_000 + 4 * (os.getpid() % 8000) if count > 60_000 else None


def enter_namespaces(first: int | None) -> None:
    """Leave the system's namespaces. Children of this process are in a process namespace of their own.

    Args:
        first: three ids from here on become INSIDE … INSIDE + 2; None: the process's own id becomes INSIDE.
    """
    uid, gid, count = (os.geteuid(), os.getegid(), 1) if first is None else (first, first, 3)
    with building("user isolation"):
        if first is not None:
            os.setgroups([])
        wait_for, tell = os.pipe()
        mapper = os.fork()
        if mapper == 0:  # only a process of the namespace around it may map several ids
            os.close(tell)
            if os.read(wait_for, 1):
                _write_maps(os.getppid(), uid, gid, count)
            os._exit(0)
        try:
            _call("unshare", NAMESPACES["user isolation"])
            os.write(tell, b".")
        finally:
            os.close(tell)
            os.close(wait_for)
            status = os.waitpid(mapper, 0)[1]
        if status != 0:
            raise OSError(1, "the ids could not be mapped")
        os.setresgid(INSIDE, INSIDE, INSIDE)
        os.setresuid(INSIDE, INSIDE, INSIDE)
    for name, flag in NAMESPACES.items():
        if name != "user isolation":
            with building(name):
                _call("unshare", flag)
    _call("sethostname", b"sandbox", 7)


def _write_maps(pid: int, uid: int, gid: int, count: int) -> None:
    folder = Path("/proc") / str(pid)
    if count == 1:
        (folder / "setgroups").write_text("deny", "utf-8")
    (folder / "uid_map").write_text(f"{INSIDE} {uid} {count}", "utf-8")
    (folder / "gid_map").write_text(f"{INSIDE} {gid} {count}", "utf-8")


def enter_process_namespace() -> None:
    """Children of this process are in a process namespace inside of its own."""
    _call("unshare", NAMESPACES["process isolation"])


def build_root(base: str, prefix: str, libraries: Sequence[str], folder_bytes: int) -> None:
    """A file system of its own: libraries to be read, two devices, an empty /tmp of bounded size, /proc.

    Args:
        base: any folder; what is on it is covered.
        prefix: Python's own folder, which is also the working directory: it may lie below one, such as root's home,
            that may not be entered any more.
        libraries: paths to be read; those that start with ``prefix`` are found from the working directory.
    """
    with building("file isolation"):
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        _mount("root", base, "tmpfs", _MS_NOSUID, "mode=755,size=1m,nr_inodes=4k")
        for path in libraries:
            below = path.startswith(prefix + "/")
            _show(os.path.relpath(path, prefix) if below else path, base + path)
        for name in ("null", "urandom"):
            _show(f"/dev/{name}", f"{base}/dev/{name}", device=True)
        for name, kind, options in (
            ("tmp", "tmpfs", f"mode=777,size={folder_bytes},nr_inodes=4k"),
            ("proc", "proc", None),
        ):
            Path(base, name).mkdir(exist_ok=True)
            _mount(name, f"{base}/{name}", kind, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, options)
        os.chdir(base)
        _call("syscall", ctypes.c_long(_SYSTEM_CALLS["pivot_root"]), b".", b".")
        _call("umount2", b".", _MNT_DETACH)
        os.chdir("/")
        _mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    _call("mount", words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])


def _show(source: str, target: str, device: bool = False) -> None:
    """Make a file or a folder of the system appear, to be read; a link appears as the link that it is."""
    there, here = Path(source), Path(target)
    here.parent.mkdir(parents=True, exist_ok=True)
    if there.is_symlink():
        here.symlink_to(there.readlink())
        return
    if not there.exists() or here.exists():
        return
    here.touch() if device else here.mkdir()
    _mount(source, target, None, _MS_BIND | _MS_REC)
    if not device:
        attributes = struct.pack("QQQQ", _READ_ONLY, 0, 0, 0)
        number = ctypes.c_long(_SYSTEM_CALLS["mount_setattr"])
        _call(
            "syscall", number, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
        )


def hide_processes() -> None:
    """Take /proc away from this process and its children."""
    _call("unshare", NAMESPACES["file isolation"])
    _call("umount2", b"/proc", _MNT_DETACH)


# Privileges


def become(uid: int | None) -> None:
    """Another user (None: the same), for good: no capabilities, no new ones, not to be looked into, no dumps."""
    if uid is not None:
        if os.geteuid() == 0:
            os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if not LINUX:
        return
    for capability in range(64):
        with contextlib.suppress(OSError):  # there are fewer, or this process never had any
            _prctl(_PR_DROP_BOUND, capability)
    header, nothing = struct.pack("Ii", 0x2008_0522, 0), bytes(24)
    _call("capset", header, nothing)
    _prctl(_PR_NO_NEW_PRIVS, 1)
    close_to_others()


def close_to_others() -> None:
    """No process of the same user may look into this one or its children, and they leave no dumps."""
    if LINUX:
        _prctl(_PR_DUMPABLE, 0)


def restrict_files(read: Sequence[int], write: Sequence[int]) -> None:
    """Where there is no file system of its own: what this process and its children may open (Landlock).

    They cannot look into processes outside either, nor from Linux 6.12 on send these signals.

    Args:
        read, write: descriptors of folders.
    """
    with building("file isolation"):
        version = _landlock(444, None, ctypes.c_size_t(0), 1)
        rights = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
        handled = struct.pack("QQQ", rights, 3 * (version >= 4), 3 * (version >= 6))
        rules = _landlock(444, handled, ctypes.c_size_t(len(handled)), 0)
        reading, writing = 1 << 2 | 1 << 3, rights & ~(1 << 0 | 1 << 6 | 1 << 11)  # neither programs nor devices
        for fds, allowed in ((read, reading), (write, writing)):
            for fd in fds:
                _landlock(445, rules, 1, struct.pack("=Qi", allowed, fd), 0)
        null = os.open("/dev/null", os.O_RDWR)
        _landlock(445, rules, 1, struct.pack("=Qi", 1 << 1 | 1 << 2, null), 0)
        _prctl(_PR_NO_NEW_PRIVS, 1)
        _landlock(446, rules, 0)
        os.close(rules)
        os.close(null)


def _landlock(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(ctypes.c_long(number), *arguments)) if LINUX else -1
    if result < 0:
        code = ctypes.get_errno() or _ENOSYS
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result


def limit(seconds: float, memory: int, file: int, processes: int) -> None:
    """Limits of each process: CPU seconds, bytes of address space and of a file; processes and threads of its user."""
    most = {
        "RLIMIT_CPU": int(seconds) + 2,
        "RLIMIT_AS": memory,
        "RLIMIT_FSIZE": file,
        "RLIMIT_NPROC": processes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_STACK": 8 << 20,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_SIGPENDING": 256,
        "RLIMIT_NICE": 0,
        "RLIMIT_RTPRIO": 0,
    }
    for name, value in most.items():
        kind = getattr(resource, name, {"RLIMIT_SIGPENDING": 11}.get(name) if LINUX else None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            with contextlib.suppress(*(() if LINUX else (ValueError, OSError))):  # macOS refuses some of them
                resource.setrlimit(kind, (value, value))


# The filter of system calls

# Machine → its number in the kernel's audit, and the numbers of the system calls that are named below.
_MACHINES = {"x86_64": (0xC000_003E, 0), "aarch64": (0xC000_00B7, 1)}
# Name → numbers on x86_64 and aarch64. Nothing that computes needs one of these: the program is ended.
_DEADLY = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116),
    "fanotify_init": (300, 262), "open_by_handle_at": (304, 265), "personality": (135, 92),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "fspick": (433, 433), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "mount_setattr": (442, 442),
}  # fmt: skip
# These fail with EPERM: libraries may try them and go on.
_REFUSED = {
    "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "io_setup": (206, 0), "inotify_init": (253, 26), "inotify_init1": (294, 26),  # charged to the host's user
}  # fmt: skip
# In weak mode also these: with them, processes and files of the same user can be named, which Landlock leaves open.
_REFUSED_WEAK = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "truncate": (76, 45), "chmod": (90, 53), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, 54), "fchown": (93, 55), "lchown": (94, 54), "fchownat": (260, 54), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "setxattrat": (463, 463), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
    "setsid": (112, 157), "setpgid": (109, 154),  # so that one signal to the group ends all
    "utime": (132, 88), "utimes": (235, 88), "futimesat": (261, 88), "utimensat": (280, 88),
}  # fmt: skip
# These are refused, killed or allowed by what they are asked: see _filter_program.
_CLONE, _CLONE3, _PRLIMIT, _MMAP, _SOCKETPAIR = (56, 220), (435, 435), (302, 261), (9, 222), (53, 199)
_PRCTL, _FCNTL, _IOCTL = (157, 167), (72, 25), (16, 29)
# Memory that no process need hold: of no file and shared; in huge pages.
_SHARED_ANONYMOUS, _HUGE = 0x21, 0x4_0000
_NEW_NAMESPACE = 0x7E02_0000
_KILL, _ERRNO, _ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_EPERM, _ENOSYS = 1, 38
_LOAD, _JUMP_EQUAL, _JUMP_ABOVE, _JUMP_SET, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, (16, 24, 32, 40)  # offsets in seccomp_data; of arguments the low halves

_AUDIT, _COLUMN = _MACHINES.get(platform.machine() if LINUX else "", (0, -1))
_SYSTEM_CALLS = {name: numbers[_COLUMN] for name, numbers in _DEADLY.items()} if _AUDIT else {}


def filter_system_calls(strict: bool) -> None:
    """Let this process and its children make none of the system calls above."""
    with building("system call filter"):
        if not _AUDIT:
            raise OSError(_ENOSYS, f"its numbers are not known for {sys.platform} on {platform.machine()}")
        program = _filter_program(strict)
        lines = ctypes.create_string_buffer(program)
        whole = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
        _prctl(_PR_NO_NEW_PRIVS, 1)
        _call("prctl", _PR_SECCOMP, ctypes.c_ulong(2), whole)


def _filter_program(strict: bool) -> bytes:
    """The filter in the kernel's packet-filter language: eight bytes a line."""
    lines = [
        (_LOAD, 0, 0, _ARCHITECTURE), (_JUMP_EQUAL, 1, 0, _AUDIT), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_JUMP_ABOVE, 0, 1, 0x4000_0000), (_RETURN, 0, 0, _KILL),
    ]  # fmt: skip
    refused: Mapping[str, tuple[int, int]] = _REFUSED if strict else {**_REFUSED, **_REFUSED_WEAK}
    answers = [(numbers, _KILL) for numbers in _DEADLY.values()]
    answers += [(numbers, _ERRNO | _EPERM) for numbers in refused.values()]
    answers += [(_CLONE3, _ERRNO | _ENOSYS)]  # its flags cannot be read; the C library then takes clone
    for numbers, answer in answers:
        lines += [(_JUMP_EQUAL, 0, 1, numbers[_COLUMN]), (_RETURN, 0, 0, answer)]
    refuse, allow = (_RETURN, 0, 0, _ERRNO | _EPERM), (_RETURN, 0, 0, _ALLOW)
    for numbers, argument, *test in (
        (_CLONE, 0, (_JUMP_SET, 0, 1, _NEW_NAMESPACE), (_RETURN, 0, 0, _KILL)),
        (_PRLIMIT, 0, (_JUMP_EQUAL, 1, 0, 0), refuse),  # of itself alone
        # Streams and packets within this machine alone (AF_UNIX): by other kinds, anybody can be sent a message.
        (
            _SOCKETPAIR,
            0,
            (_JUMP_EQUAL, 0, 4, 1),
            (_LOAD, 0, 0, _ARGUMENTS[1]),
            (_AND, 0, 0, 0xF),
            (_JUMP_EQUAL, 2, 0, 1),
            (_JUMP_EQUAL, 1, 0, 5),
            refuse,
        ),
        (_PRCTL, 0, (_JUMP_EQUAL, 0, 1, _PR_DUMPABLE), refuse),  # who is dumpable can be looked into, and leaves dumps
        # Whom the kernel signals when a file can be read, and how: it may be anybody of the same user.
        (_FCNTL, 1, (_JUMP_EQUAL, 2, 0, 8), (_JUMP_EQUAL, 1, 0, 10), (_JUMP_EQUAL, 0, 1, 15), refuse),
        (_IOCTL, 1, (_JUMP_EQUAL, 1, 0, 0x8901), (_JUMP_EQUAL, 0, 1, 0x8902), refuse),
        (_MMAP, 3, (_JUMP_SET, 2, 0, _HUGE), (_AND, 0, 0, _SHARED_ANONYMOUS), (_JUMP_EQUAL, 0, 1, 0x21), refuse),
    ):
        lines += [(_JUMP_EQUAL, 0, len(test) + 2, numbers[_COLUMN]), (_LOAD, 0, 0, _ARGUMENTS[argument]), *test, allow]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
