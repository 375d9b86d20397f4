"""The process behind `pymathrl.sandbox.Sandbox`: a server that forks one fenced process for every run.  It is run as a
script and needs the standard library only: pymathrl would bring torch, and every fork would pay for its pages.

    server      imports what models use (numpy, sympy), hides the file system, gives up root, waits for requests
      supervisor   one for each run: new namespaces, reads the output in bounded memory, kills at the deadline
        run           one for each run: closes its fds, limits itself, then executes the code; pid 1 of its namespace

With namespaces the run sees a read-only file system of the interpreter's own libraries, one small tmpfs, no /proc, no
network and no process but its own; when pid 1 dies, the kernel kills the rest.  Without them (weak mode) Landlock
fences the files and seccomp alone the rest.  In both modes a filter of system calls denies new processes (unless they
are asked for), programs, sockets, signals, mounts and what else has no place in a calculation.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import pathlib
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
import types
from typing import Any, NoReturn

NOBODY = 65534  # the ids root gives itself up for
INSIDE = 1000  # the ids a run sees in its own user namespace
SCRATCH = "/scratch"  # of a run with namespaces: a tmpfs of its own; not /tmp, where the packages may be installed
THREADS = 32  # of a run, beside its processes
REPORT = 3  # the descriptor a run writes its last traceback line to

# Denied system calls: name, number on x86_64, number on aarch64 (- where it does not exist).  Numbers from 424 on
# (io_uring, pidfd, clone3, the new mount calls, ..) answer ENOSYS as a whole, which C libraries know how to take.
DENIED = """
    socket 41 198, connect 42 203, bind 49 200, listen 50 201, sendto 44 206, ptrace 101 117, kcmp 312 272,
    process_vm_readv 310 270, process_vm_writev 311 271, kill 62 129, tkill 200 130, tgkill 234 131,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, execve 59 221, execveat 322 281, mount 165 40, umount2 166 39,
    pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, bpf 321 280, perf_event_open 298 241,
    add_key 248 217, request_key 249 218, keyctl 250 219, init_module 175 105, finit_module 313 273,
    delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225,
    acct 163 89, quotactl 179 60, syslog 103 116, sethostname 170 161, setdomainname 171 162, settimeofday 164 170,
    clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, iopl 172 -, ioperm 173 -, modify_ldt 154 -,
    personality 135 92, userfaultfd 323 282, name_to_handle_at 303 264, open_by_handle_at 304 265,
    fanotify_init 300 262, memfd_create 319 279, shmget 29 194, shmat 30 196, semget 64 190, msgget 68 186,
    mq_open 240 180, migrate_pages 256 238, move_pages 279 239, setpriority 141 140, sched_setparam 142 118,
    sched_setscheduler 144 119, sched_setaffinity 203 122, sched_setattr 314 274, ioprio_set 251 30, vhangup 153 58
"""
DENIED_FORK = "fork 57 -, vfork 58 -"
# Landlock does not see these, and a file of the user's own is within their reach; scratch is flat, so easy to remove.
DENIED_WEAK = """
    chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -,
    utimes 235 -, utimensat 280 88, futimesat 261 -, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
    removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, truncate 76 45, mkdir 83 -, mkdirat 258 34
"""
# Denied by one argument: name, numbers, index of the argument, values.  fcntl and ioctl can have the kernel signal any
# process of the user (F_SETOWN, F_SETSIG, F_SETOWN_EX; FIOSETOWN, SIOCSPGRP) or type on a terminal (TIOCSTI and
# TIOCLINUX); prctl could switch off the death of a run with its supervisor (PR_SET_PDEATHSIG) or allow core files.
DENIED_ARGUMENT = (
    ("fcntl 72 25", 1, (8, 10, 15)),
    ("ioctl 16 29", 1, (0x8901, 0x8902, 0x5412, 0x541C)),
    ("prctl 157 167", 0, (1, 4)),
)
PRLIMIT, CLONE = "prlimit64 302 261", "clone 56 220"
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Calls that the C library has no function for; from 424 on a call has one number on every machine.
NUMBERS = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}
CLONE_THREAD, CLONE_NEW_ANY = 0x10000, 0x7E020080
NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel refused a fence; the message names the call and its error."""


def _call(name: str, *args: int | bytes | None) -> int:
    """The system call `name`, integers as longs; Refused where it returns -1."""
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    which = [ctypes.c_long(NUMBERS[name])] if name in NUMBERS else []
    result = getattr(_libc, "syscall" if which else name)(*which, *values)
    if result == -1:
        raise Refused(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def number(entry: str) -> int | None:
    """The number of a table entry, 'name x86_64 aarch64', on this machine; None where it does not exist."""
    word = entry.split()[1 + list(AUDIT_ARCH).index(platform.machine())]
    return None if word == "-" else int(word)


# --- fences -----------------------------------------------------------------------------------------------------------
def seccomp_program(denied: str, forks: bool) -> bytes:
    """The BPF program of the filter: `denied` (a table as above) and DENIED_ARGUMENT fail with EPERM, and so do clone
    into a namespace, clone of a process unless `forks`, and prlimit64 of another process."""
    ld, jeq, jge, jset, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, eperm, enosys, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    program = [(ld, 0, 0, 4), (jeq, 1, 0, AUDIT_ARCH[platform.machine()]), (ret, 0, 0, kill), (ld, 0, 0, 0)]
    program += [(jge, 0, 1, 424), (ret, 0, 0, enosys)]  # x32 calls too: their numbers have bit 30
    for entry in denied.replace("\n", " ").split(","):
        if (nr := number(entry)) is not None:
            program += [(jeq, 0, 1, nr), (ret, 0, 0, eperm)]

    def on_argument(entry: str, index: int, body: list[tuple[int, int, int, int]]) -> None:
        """The body runs with the low word of the argument loaded, and every path of it returns."""
        nr = number(entry)
        assert nr is not None
        program.extend([(jeq, 0, 1 + len(body), nr), (ld, 0, 0, 16 + 8 * index), *body])

    for entry, index, values in DENIED_ARGUMENT:
        body = [step for value in values for step in ((jeq, 0, 1, value), (ret, 0, 0, eperm))]
        on_argument(entry, index, [*body, (ret, 0, 0, allow)])
    on_argument(PRLIMIT, 0, [(jeq, 1, 0, 0), (ret, 0, 0, eperm), (ret, 0, 0, allow)])
    other = allow if forks else eperm
    thread = [(jset, 0, 1, CLONE_THREAD), (ret, 0, 0, allow), (ret, 0, 0, other)]
    on_argument(CLONE, 0, [(jset, 0, 1, CLONE_NEW_ANY), (ret, 0, 0, eperm), *thread])
    program.append((ret, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *step) for step in program)


def restrict_syscalls(program: bytes) -> None:
    """Puts the filter on this thread and what it starts.  No privilege needed, and no way back."""
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", PR_SET_SECCOMP, 2, header, 0, 0)


def landlock_abi() -> int:
    """The version of Landlock in this kernel, 0 where there is none."""
    try:
        return _call("landlock_create_ruleset", None, 0, 1)
    except Refused:
        return 0


def restrict_files(readable: list[str], scratch: str) -> None:
    """Landlock: reads beneath `readable`, everything beneath `scratch`, nothing else."""
    read, every = 0b1100, (1 << (13, 14, 15, 15, 16)[min(landlock_abi(), 5) - 1]) - 1  # the bits each version knows
    ruleset = _call("landlock_create_ruleset", struct.pack("=Q", every), 8, 0)
    rules = [(p, read if os.path.isdir(p) else read & ~0b1000) for p in readable]
    for path, access in [*rules, ("/dev/null", 0b0110), ("/dev/urandom", 0b0100), (scratch, every)]:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        _call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", access, fd), 0)
        os.close(fd)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def new_user_namespace(proc: int, others: int) -> None:
    """unshare(user namespace | others), with our ids mapped to INSIDE.  proc: a descriptor of /proc, which may be out
    of sight by now.  Every run has a user namespace of its own, so RLIMIT_NPROC counts the tasks of this run alone."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", NEW_USER | others)
    lines = (("setgroups", "deny"), ("uid_map", f"{INSIDE} {uid} 1"), ("gid_map", f"{INSIDE} {gid} 1"))
    for name, line in lines:
        try:
            fd = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
            os.write(fd, line.encode())
            os.close(fd)
        except OSError as error:
            raise Refused(f"writing {name} of a user namespace: {error.strerror}") from error


def hide_files(readable: list[str], folder: str) -> None:
    """A new root, read-only, without setuid: `readable` and two devices.  It is put together on `folder`.  Mounts are
    made private first: without that root's bind mounts would appear on the whole machine."""
    _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID, b"size=1m,mode=755")
    done: list[str] = []
    for path in [*sorted(os.path.realpath(p) for p in readable), "/dev/null", "/dev/urandom"]:
        if any(path == p or path.startswith(p + "/") for p in done):
            continue
        done.append(path)
        if os.path.isdir(path):
            os.makedirs(folder + path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(folder + path), exist_ok=True)
            os.close(os.open(folder + path, os.O_CREAT, 0o644))
        _call("mount", path.encode(), (folder + path).encode(), None, MS_BIND | MS_REC, None)
    for path in readable:  # the loader asks for /lib64, which may be a link to usr/lib64
        if os.path.islink(path) and not os.path.lexists(folder + path):
            os.makedirs(os.path.dirname(folder + path), exist_ok=True)
            os.symlink(os.readlink(path), folder + path)
    os.mkdir(folder + SCRATCH)
    if not os.path.exists(folder + "/tmp"):
        os.symlink(SCRATCH, folder + "/tmp")
    os.chdir(folder)
    _call("pivot_root", b".", b".")
    _call("umount2", b".", 2)  # detached: the old root sat on top of the new one
    os.chdir("/")
    recursive, read_only_nosuid = 0x8000, struct.pack("=QQQQ", 0b11, 0, 0, 0)
    _call("mount_setattr", -100, b"/", recursive, read_only_nosuid, 32)


def closed_folder(paths: list[str]) -> str:
    """The first folder on the way to `paths` that a stranger cannot enter and read, '' if there is none."""
    folders = [folder for path in paths for folder in (path, *map(str, pathlib.Path(path).parents))]
    return next((folder for folder in folders if os.stat(folder).st_mode & 0o005 != 0o005), "")


def drop_root() -> None:
    """Root becomes nobody, and keeps its own /proc files, which it needs to name its ids in a user namespace."""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise Refused(f"giving up root for uid {NOBODY}: {error.strerror}") from error
    _call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


# --- one run ----------------------------------------------------------------------------------------------------------
def shorten(text: str, chars: int) -> str:
    """The text, or its first and last chars/2 characters with '...' between."""
    half = chars // 2
    return text if len(text) <= chars else text[:half] + "..." + text[len(text) - (chars - half) :]


class Ends:
    """The two ends of a stream of bytes, in memory that does not depend on its length."""

    def __init__(self, chars: int) -> None:
        self.chars, self.keep = chars, 4 * chars  # bytes that hold `chars` characters of UTF-8, whichever they are
        self.head, self.tail, self.total = b"", b"", 0

    def add(self, data: bytes) -> None:
        self.head += data[: self.keep - len(self.head)]
        self.tail = (self.tail + data)[-self.keep :]
        self.total += len(data)

    def text(self) -> str:
        head, tail = (end.decode(errors="replace") for end in (self.head, self.tail))
        return shorten(head if self.total <= self.keep else head + tail, self.chars)


def say(reason: str, text: str, chars: int) -> None:
    os.write(REPORT, f"{reason}\n{shorten(text, chars)}".encode(errors="backslashreplace"))


def interpret(code: str) -> None:
    """Executes the code as a module __main__ of its own; a last line that is an expression is printed, as in a
    notebook, unless it is None.  Nothing else is touched and nothing inherited, this file's `annotations` neither."""
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    tree = ast.parse(code, "<code>")
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<code>", "exec", dont_inherit=True), module.__dict__)
    if isinstance(last, ast.Expr):
        line = compile(ast.Expression(last.value), "<code>", "eval", dont_inherit=True)
        if (value := eval(line, module.__dict__)) is not None:
            print(repr(value))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


def fence(cfg: dict[str, Any], scratch: str) -> None:
    """Every limit that the process of a run puts on itself; the filter of system calls comes last."""
    mib = 1 << 20
    limits = {
        resource.RLIMIT_CPU: int(cfg["timeout_s"]) + 2,  # a second fence: the supervisor's clock is the first
        resource.RLIMIT_AS: cfg["base_bytes"] + cfg["memory_mb"] * mib,  # beside the modules loaded before the fork
        resource.RLIMIT_FSIZE: cfg["scratch_mb"] * mib,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if cfg["namespaces"]:  # elsewhere this limit counts every process of the user, and would stop at once
        limits[resource.RLIMIT_NPROC] = cfg["max_processes"] + THREADS + 1  # the supervisor counts too
    os.chdir(scratch)
    if not cfg["namespaces"] and landlock_abi():
        restrict_files(cfg["readable"], scratch)
    for which, value in limits.items():
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))
    _call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))  # no capability, not even in the own namespace
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # no core file, whatever the machine does with them
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the ids: changing those clears it
    forks = cfg["max_processes"] > 1
    weak = "" if cfg["namespaces"] else "," + DENIED_WEAK
    restrict_syscalls(seccomp_program(DENIED + weak + ("" if forks else "," + DENIED_FORK), forks))


def run(code: str, scratch: str, out: int, err: int, cfg: dict[str, Any]) -> NoReturn:
    """The process of a run.  Exit status 0: the code ended well; otherwise the report says why it did not."""
    status, chars, spare = 1, cfg["output_chars"], bytearray(4 << 20)
    try:
        os.setsid()  # kill(0, ..) reaches the process group across pid namespaces, so ours must be our own
        null = os.open("/dev/null", os.O_RDWR)
        out, err, null = (fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (out, err, null))
        for fd, target in ((null, 0), (out, 1), (null, 2), (err, REPORT)):
            os.dup2(fd, target)
        os.closerange(REPORT + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        os.environ.clear()
        sys.argv, sys.stdin, sys.__stdin__ = [""], None, None  # type: ignore[misc]
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        fence(cfg, scratch)
        random.seed(0)  # equal code, equal output
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(0)
    except BaseException as error:
        say("sandbox", str(error) if isinstance(error, Refused) else repr(error), chars)
        os._exit(status)
    try:
        interpret(code)
        status = 0
    except SystemExit as end:
        status = 0 if end.code in (None, 0) else 1
        if status:
            say("error", end.code if isinstance(end.code, str) else f"SystemExit: {end.code}", chars)
    except BaseException as error:
        del spare  # so that there is memory to say that there is none
        reason = "memory" if isinstance(error, MemoryError) else "error"
        say(reason, traceback.format_exception_only(error)[-1].strip(), chars)
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(status)


def watch(pid: int, out: int, err: int, cfg: dict[str, Any]) -> dict[str, Any]:
    """Reads what the run writes until it ends or its time is over, then leaves no process of it."""
    start, ends = time.monotonic(), {out: Ends(cfg["output_chars"]), err: Ends(cfg["output_chars"] + 16)}
    pidfd, poll, alive, late = os.pidfd_open(pid), select.poll(), True, False
    for fd in (out, err):
        os.set_blocking(fd, False)
    for fd in (out, err, pidfd):
        poll.register(fd, select.POLLIN)
    while alive and not late:
        left = start + cfg["timeout_s"] - time.monotonic()
        late = left <= 0
        for fd, _ in poll.poll(max(0.0, left * 1000)):
            if fd == pidfd:
                alive = False
            elif data := os.read(fd, 1 << 16):
                ends[fd].add(data)
            else:
                poll.unregister(fd)  # closed by the code, which may well go on
    if late:
        os.kill(pid, signal.SIGKILL)  # our child, not yet waited for: the number is its own
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for fd, end in ends.items():  # what was in the pipes when it ended; its writers are gone, so this stops
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 1 << 16):
                end.add(data)
    seconds = time.monotonic() - start
    if late or status == -signal.SIGXCPU:
        return {"output": "Timeout Error", "ok": False, "reason": "timeout", "seconds": seconds}
    if status == 0:
        return {"output": ends[out].text(), "ok": True, "reason": "", "seconds": seconds}
    reason, _, text = ends[err].text().partition("\n")
    if reason not in ("error", "memory", "sandbox"):  # it ended without a report, or wrote there itself
        names = {s.value: s.name for s in signal.Signals}  # not all: real-time signals have numbers only
        killed = f"Killed by {names.get(-status, f'signal {-status}')}"
        reason, text = "error", killed if status < 0 else f"SystemExit: {status}"
    return {"output": text, "ok": False, "reason": reason, "seconds": seconds}


def supervise(conn: socket.socket, proc: int, cfg: dict[str, Any], server: int) -> None:
    """One request: the code until end of file in, one JSON object out."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    made = ""
    try:
        code = b"".join(iter(lambda: conn.recv(1 << 16), b"")).decode(errors="surrogatepass")
        if cfg["namespaces"]:
            scratch = SCRATCH
            new_user_namespace(proc, NEW_NS | NEW_PID | NEW_IPC)
            data = f"size={cfg['scratch_mb']}m,nr_inodes=1024,mode=700".encode()
            _call("mount", b"tmpfs", SCRATCH.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, data)
        else:
            made = scratch = tempfile.mkdtemp(dir=cfg["folder"])
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            return
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            run(code, scratch, out_end, err_end, cfg)
        os.close(out_end)
        os.close(err_end)
        result = watch(pid, out, err, cfg)
    except (Refused, OSError) as error:
        result = {"output": f"setting up a run: {error}", "ok": False, "reason": "sandbox", "seconds": 0.0}
    if made:
        with contextlib.suppress(OSError):  # gone already, without Landlock: the folder of all runs goes at the end
            for entry in os.scandir(made):
                os.unlink(entry.path)
            os.rmdir(made)
    conn.sendall(json.dumps(result).encode())


# --- server -----------------------------------------------------------------------------------------------------------
def main(argument: str) -> None:
    """Says on descriptor 0 what it could do, then serves the connections that it is sent there, until end of file."""
    control, cfg = socket.socket(fileno=0), json.loads(argument)
    sys.path[:] = cfg["path"]
    os.umask(0o022)  # the folders of the new root are for nobody too, whatever the caller's mask
    for name in cfg["preload"]:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    cfg["base_bytes"] = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    proc, weaker = os.open("/proc", os.O_PATH | os.O_DIRECTORY), []
    try:
        if platform.machine() not in AUDIT_ARCH:
            raise Refused(f"no table of system calls for {platform.machine()} (there is one for {list(AUDIT_ARCH)})")
        if cfg["namespaces"]:
            others = NEW_NS | NEW_NET | NEW_UTS | NEW_IPC
            if os.geteuid() == 0:
                _call("unshare", others)
            else:
                new_user_namespace(proc, others)
            hide_files(cfg["readable"], cfg["folder"])
            drop_root()
        else:
            weaker.append("no namespaces: seccomp alone keeps other processes, the network and mounts out of reach")
            weaker.append("no quota: a run can fill the disk of the temporary folder; it can make files, not folders")
            if not landlock_abi():
                weaker.append("no Landlock: files are as open to a run as to its user id")
            closed = closed_folder(cfg["path"]) if os.geteuid() == 0 else ""
            if closed:
                user = "root without capabilities runs the code" if landlock_abi() else "only preloaded modules work"
                weaker.append(f"{user}: uid {NOBODY} cannot import from {closed}")
            if os.geteuid() == 0 and not (closed and landlock_abi()):
                os.chown(cfg["folder"], NOBODY, NOBODY)
                drop_root()
    except Refused as error:
        control.send(json.dumps({"refused": str(error)}).encode())
        return
    control.send(json.dumps({"refused": "", "weaker": weaker}).encode())
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors leave no zombies
    gc.collect()
    gc.freeze()  # a collection in a fork then leaves the shared pages alone
    server = os.getpid()
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not request:
            return
        with socket.socket(fileno=fds[0]) as conn:
            try:
                pid = os.fork()
            except OSError:
                continue  # no answer: the other side sees the end of the file
            if pid == 0:
                try:
                    control.close()
                    supervise(conn, proc, cfg, server)
                finally:
                    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
