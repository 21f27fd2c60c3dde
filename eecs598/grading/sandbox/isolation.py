"""Restrict a process: files, network, other processes, memory and user.

This works on plain Linux, without privileges and without further packages: resource limits,
Landlock for files, a seccomp filter for system calls. A process restricts itself before it runs any
code of a submission, and can't lift the restrictions again. Layers that a machine lacks are left
out and reported; on other systems than Linux that is nearly all of them.

Sources: landlock(7), seccomp(2), prctl(2), capabilities(7), getrlimit(2) of the Linux manual.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "LAYERS",
    "Limits",
    "adopt_orphans",
    "children",
    "confine",
    "kill_orphans",
    "limit_cpu",
]

# The layers of protection, and what a submission can do on a machine that lacks one.
LAYERS = {
    "files": "read and write whatever this user may",
    "network": "use the network",
    "processes": "start processes and signal those of this user",
    "memory": "use all memory",
    "user": "act as root within the other limits",
}


@dataclass(frozen=True)
class Limits:
    """Resources that one process may use.

    Attributes:
        memory_mb: address space beyond what is mapped at the start, in MiB.
        file_mb: size of a single file, in MiB.
        cpu_seconds: processor time of the whole process.
        threads: beyond those that the user runs already.
        open_files: file descriptors.
    """

    memory_mb: int = 2048
    file_mb: int = 64
    cpu_seconds: int = 600
    threads: int = 128
    open_files: int = 128


def confine(work: str, readable: Sequence[str], limits: Limits) -> list[str]:
    """Restrict this process permanently.

    Args:
        work: the only folder that it may write to.
        readable: files and folders that it may read in addition to the system's libraries.
        limits: resources that it may use.

    Returns:
        The active ones of ``LAYERS``.
    """
    active = set()
    if sys.platform != "win32":
        active |= _limit_resources(limits)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        active |= _drop_privileges(libc, work, readable)
        readable = [*readable, *_system_paths()]
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            active |= _restrict_files(libc, work, readable)
            active |= _filter_system_calls(libc)
    return [layer for layer in LAYERS if layer in active]


_CAP_DAC_READ_SEARCH = 2
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 36, 37
_PR_SET_NO_NEW_PRIVS = 38


def _system_paths() -> list[str]:
    """Return what Python and its libraries read; none of these holds files of users."""
    paths = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share", "/usr/local/lib"]
    paths += ["/usr/local/cuda", "/sys/devices/system", "/proc/cpuinfo", "/proc/meminfo"]
    paths += [f"/etc/{name}" for name in ("ld.so.cache", "localtime", "nsswitch.conf", "fonts")]
    paths += [f"/dev/{name}" for name in ("zero", "random", "urandom")]
    for prefix in {sys.prefix, sys.base_prefix, sys.exec_prefix}:
        paths += [f"{prefix}/{name}" for name in ("lib", "lib64", "share")]
    paths += [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    return [path for path in paths if os.path.exists(path)]


# --------------------------------------------------------------------------------------------
# Resources and user
# --------------------------------------------------------------------------------------------


def _limit_resources(limits: Limits) -> set[str]:
    import resource

    active: set[str] = set()

    def limit(kind: int, amount: int) -> bool:
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            amount = min(amount, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (amount, amount))
            return True
        return False

    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, limits.file_mb * 2**20)
    limit(resource.RLIMIT_NOFILE, limits.open_files)
    limit(resource.RLIMIT_CPU, limits.cpu_seconds)
    if sys.platform == "linux":  # elsewhere, the address space can't be limited
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        mapped = pages * resource.getpagesize()
        if limit(resource.RLIMIT_AS, mapped + limits.memory_mb * 2**20):
            active.add("memory")
        # Threads count as processes, and those of all programs of the user count together.
        limit(resource.RLIMIT_NPROC, _threads_of(os.getuid()) + limits.threads)
        with contextlib.suppress(OSError):  # if memory is exhausted, end this process first
            Path("/proc/self/oom_score_adj").write_text("1000")
    return active


def limit_cpu(seconds: float) -> None:
    """Limit the processor time of this process from now on, within the limit of ``confine``."""
    if sys.platform == "win32":
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _threads_of(user: int) -> int:
    """Return the number of threads in all processes of a user."""
    number = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # the process has ended
            fields = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            if int(fields["Uid"].split()[0]) == user:
                number += int(fields["Threads"])
    return number


def _drop_privileges(libc: ctypes.CDLL, work: str, readable: Iterable[str]) -> set[str]:
    """Change from root to a user without files.

    If that user could not read what is needed, stay root with the one capability to read files.
    """
    if os.geteuid() != 0:
        return {"user"}
    needed: list[str | os.PathLike] = [*_system_paths(), Path(work).parent]
    for path in readable:
        needed += [path, *_folders_and_sources(path)]
    if all(_is_open_to_all(path) for path in needed):
        # One user per process, so that they can't disturb each other.
        user = 60000 + os.getpid() % 5000
        with contextlib.suppress(OSError):
            os.chown(work, user, user)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            return {"user"}
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    # Submissions may belong to any user. Landlock limits what else can be read.
    reads = 1 << _CAP_DAC_READ_SEARCH
    libc.capset(header, (ctypes.c_uint32 * 6)(reads, reads))
    return set()


def _is_open_to_all(path: str | os.PathLike) -> bool:
    """Whether any user may read a file, or list a folder and enter it."""
    path = Path(path).resolve()
    try:
        return bool(path.stat().st_mode & 0o004) and all(
            folder.stat().st_mode & 0o001 for folder in (path, *path.parents) if folder.is_dir()
        )
    except OSError:
        return False


def _folders_and_sources(path: str | os.PathLike) -> Iterator[Path]:
    return (inside for inside in Path(path).rglob("*") if inside.suffix == ".py" or inside.is_dir())


# --------------------------------------------------------------------------------------------
# Files: Landlock
# --------------------------------------------------------------------------------------------

_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446

# Rights of landlock(7) by bit, and how many of them each version of it knows.
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_MAKE_DEVICES = 1 << 6 | 1 << 9 | 1 << 11
_TRUNCATE = 1 << 14
_FILE_RIGHTS = _WRITE_FILE | _READ_FILE | _TRUNCATE
_NUM_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_ALL_NETWORK = 0b11  # bind and connect of TCP, from version 4
_ALL_SCOPES = 0b11  # abstract sockets and signals, from version 6


def _restrict_files(libc: ctypes.CDLL, work: str, readable: Iterable[str]) -> set[str]:
    version = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return set()
    handled = (1 << _NUM_RIGHTS.get(version, 16)) - 1
    attributes = struct.pack("=Q", handled)
    if version >= 4:
        attributes += struct.pack("=Q", _ALL_NETWORK)
    if version >= 6:
        attributes += struct.pack("=Q", _ALL_SCOPES)
    ruleset = libc.syscall(
        _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0
    )
    if ruleset < 0:
        return set()
    try:
        for path in readable:
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR)
        _allow(libc, ruleset, os.devnull, handled & _FILE_RIGHTS)
        # All rights but those to make devices and, in bit 0, to run programs.
        _allow(libc, ruleset, work, handled & ~_MAKE_DEVICES & ~1)
        done = libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)
    if not done:
        return set()
    return {"files"}


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # it does not exist
    try:
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = struct.pack("=Qi", rights, file)
        if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, 1, rule, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(file)


# --------------------------------------------------------------------------------------------
# System calls: seccomp
# --------------------------------------------------------------------------------------------

# Name and number on x86-64 and on arm64, 0 where there is no such call.
_REFUSED = """
    socket 41 198               connect 42 203              bind 49 200
    fork 57 0                   vfork 58 0                  execve 59 221
    execveat 322 281            ptrace 101 117              process_vm_readv 310 270
    process_vm_writev 311 271   pidfd_open 434 434          pidfd_getfd 438 438
    pidfd_send_signal 424 424   tkill 200 130               rt_sigqueueinfo 129 138
    open_by_handle_at 304 265   name_to_handle_at 303 264
    rt_tgsigqueueinfo 297 240   unshare 272 97              setns 308 268
    bpf 321 280                 perf_event_open 298 241     userfaultfd 323 282
    add_key 248 217             keyctl 250 219              io_uring_setup 425 425
    memfd_create 319 279        memfd_secret 447 447        shmget 29 194
    msgget 68 186               semget 64 190               mq_open 240 180
    sched_setaffinity 203 122   sched_setparam 142 118      sched_setscheduler 144 119
    sched_setattr 314 274       setpriority 141 140         ioprio_set 251 30
    truncate 76 45
"""
# They change files by name and Landlock does not cover them, but programs expect them to work: they
# do nothing and report success.
_IGNORED = """
    chmod 90 0                  fchmod 91 52                fchmodat 268 53
    fchmodat2 452 452           chown 92 0                  fchown 93 55
    lchown 94 0                 fchownat 260 54             setxattr 188 5
    lsetxattr 189 6             fsetxattr 190 7             setxattrat 463 463
    removexattr 197 14          lremovexattr 198 15         fremovexattr 199 16
    removexattrat 466 466       file_setattr 469 469        utime 132 0
    utimes 235 0                futimesat 261 0             utimensat 280 88
"""
# Allowed for this process only: their first argument is its id (for prlimit64, also 0).
_KILL, _TGKILL, _PRLIMIT = (62, 129), (234, 131), (302, 261)
_CLONE, _CLONE3, _FCNTL = (56, 220), (435, 435), (72, 25)
_CLONE_THREAD = 0x10000
_F_SETOWN, _F_SETOWN_EX = 8, 15

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _FAIL, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16


def _filter_system_calls(libc: ctypes.CDLL) -> set[str]:
    if platform.machine() not in _ARCHITECTURES or sys.maxsize < 2**32:
        return set()
    instructions = _filter(platform.machine(), os.getpid())
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *i) for i in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(code))
    if libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0) != 0:
        return set()
    return {"network", "processes"}


def _filter(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """Return the filter program: code, jump if true, jump if false, constant per instruction."""
    column, architecture = _ARCHITECTURES[machine]
    refuse = (_RETURN, 0, 0, _FAIL | errno.EPERM)
    allow = (_RETURN, 0, 0, _ALLOW)

    def argument(n: int) -> tuple[int, int, int, int]:
        return (_LOAD, 0, 0, _ARGUMENTS_AT + 8 * n)  # its lower 32 bits

    def on(number: int, *block: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [(_EQUAL, 0, len(block), number), *block]

    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":  # the same calls by other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), refuse]
    for table, error in ((_REFUSED, errno.EPERM), (_IGNORED, 0)):
        words = table.split()
        for number in map(int, words[1 + column :: 3]):
            if number:
                program += on(number, (_RETURN, 0, 0, _FAIL | error))
    for numbers in (_KILL, _TGKILL):
        program += on(numbers[column], argument(0), (_EQUAL, 0, 1, pid), allow, refuse)
    program += on(
        _PRLIMIT[column], argument(0), (_EQUAL, 1, 0, 0), (_EQUAL, 0, 1, pid), allow, refuse
    )
    program += on(_CLONE[column], argument(0), (_HAS_BITS, 0, 1, _CLONE_THREAD), allow, refuse)
    # Its flags are in memory, which a filter can't read; without it, libraries call clone.
    program += on(_CLONE3[column], (_RETURN, 0, 0, _FAIL | errno.ENOSYS))
    program += on(
        _FCNTL[column],
        argument(1),
        (_EQUAL, 1, 0, _F_SETOWN),
        (_EQUAL, 0, 1, _F_SETOWN_EX),
        refuse,
        allow,
    )
    return [*program, allow]


# --------------------------------------------------------------------------------------------
# Processes that outlive their parent
# --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def adopt_orphans() -> Iterator[None]:
    """Make processes that lose their parent children of this process, within the block."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    libc.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def kill_orphans(known: set[int]) -> None:
    """End all children of this process except the known ones, and the orphans they leave."""
    while unknown := children() - known:
        for pid in unknown:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in unknown:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def children() -> set[int]:
    """Return the ids of this process's children; empty if the system does not list them."""
    found = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found |= {int(pid) for pid in file.read_text().split()}
    return found
