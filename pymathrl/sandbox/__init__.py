"""Execution of the code that a model writes: a process of its own for every run, fenced in and killed at a deadline.

    with Sandbox(timeout_s=5.0) as sandbox:
        sandbox.run("import sympy\\nsympy.factorint(2**32 + 1)")   # .output '{641: 1, 6700417: 1}\\n', .ok True
        sandbox.run("input()")                                     # .output 'RuntimeError: input(): lost sys.stdin'

A run sees: the standard library, the installed packages, an empty folder of its own, nothing of this process and no
state of an earlier run.  numpy and sympy are loaded already (a run is a fork), `random` and `numpy.random` start from
seed 0 and sets iterate alike, so equal code gives equal output as long as it asks neither the clock nor the system's
entropy.  What a run cannot do, and by which fence, is told in `child.py`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import weakref
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymathrl.errors import UserError

PRELOAD = ("math", "cmath", "itertools", "fractions", "decimal", "statistics", "heapq", "bisect", "datetime", "numpy",
           "numpy.random", "sympy")  # fmt: skip
TAGS = ("interpreter", "code", "answer", "think", "tool_call", "tool_response")
_CHILD = Path(__file__).with_name("child.py")
_GRACE_S = 30.0  # beyond timeout_s, for a machine that is very busy, before the server counts as lost
_HOW = (
    "; a full sandbox needs Linux 5.12 and user namespaces (sysctl user.max_user_namespaces > 0, on Debian and Ubuntu "
    "also kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0; a container needs "
    "CAP_SYS_ADMIN, and seccomp and AppArmor profiles that let unshare and mount pass), or pass allow_weak=True for "
    "the fences that are left (seccomp, Landlock, resource limits)"
)


@dataclass(frozen=True)
class Result:
    """What one run gave.  output: text, at most output_chars and '...'; what it printed if `ok`, the last line of its
    traceback, 'Timeout Error' or 'Killed by <signal>' if not.  reason: '' if ok, else 'error', 'memory', 'timeout' or
    'sandbox' (the run did not start: not a fault of the code).  seconds: wall time of the run."""

    output: str
    ok: bool
    reason: str
    seconds: float


def escape_tags(text: str, tags: Iterable[str] = TAGS) -> str:
    """The text with the '<' of an opening or closing tag of `tags`, and of special tokens such as <|im_end|>, written
    as '&lt;': what code prints cannot close the interpreter block or open one that is executed."""
    names = "|".join(map(re.escape, tags))
    return re.sub(rf"<(?=\||\s*/?\s*(?:{names})\s*>)", "&lt;", text, flags=re.IGNORECASE)


class _Refused(Exception):
    """The kernel or the interpreter does not allow this mode; the message says which call."""


class _Server:
    """The process of child.py and the socket to it.  It ends with this object, or with this process."""

    def __init__(self, config: dict[str, Any]) -> None:
        folder = tempfile.mkdtemp(prefix="pymathrl-sandbox-")
        self.lock = threading.Lock()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # OpenBLAS would start a thread for each core, and no thread survives a fork.
        environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONSAFEPATH": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", str(_CHILD),
                 json.dumps(config | {"folder": folder})],
                stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        self.close = weakref.finalize(self, _stop, self.process, self.socket, folder)
        hello = self.socket.recv(1 << 16)
        assert self.process.stderr is not None
        said = b"" if hello else self.process.stderr.read(1 << 16)
        self.process.stderr.close()
        answer = json.loads(hello) if hello else {"refused": "the server died: " + said.decode(errors="replace")}
        if answer["refused"]:
            self.close()
            raise _Refused(answer["refused"])
        if config["namespaces"]:
            os.rmdir(folder)  # the server has made a root of its own on it, and left it
        self.weaker = tuple(answer["weaker"])

    def ask(self, code: str, patience_s: float) -> Result | None:
        """One run; None if there is no answer.  A server that does not answer in patience_s is killed."""
        ours, theirs = socket.socketpair()
        try:
            with ours, theirs:
                ours.settimeout(patience_s)
                with self.lock:
                    socket.send_fds(self.socket, [b"r"], [theirs.fileno()])
                theirs.close()
                ours.sendall(code.encode(errors="surrogatepass"))
                ours.shutdown(socket.SHUT_WR)
                answer = b"".join(iter(lambda: ours.recv(1 << 16), b""))
        except TimeoutError:
            self.process.kill()
            self.process.wait()
            return None
        except OSError:
            return None
        return Result(**json.loads(answer)) if answer else None


def _stop(process: subprocess.Popen[bytes], control: socket.socket, folder: str) -> None:
    """Kills the server; the supervisors die with it and the runs with those (PR_SET_PDEATHSIG)."""
    control.close()
    process.kill()
    process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _places() -> tuple[list[str], list[str]]:
    """(sys.path of a run, what else it may read): the standard library and site-packages of this interpreter, and the
    shared libraries of the system."""
    stdlib = os.path.realpath(sysconfig.get_path("stdlib"))
    found = [os.path.realpath(p) for p in sys.path if p and os.path.isdir(p)]
    path = [p for p in found if p == stdlib or p.startswith(stdlib + "/") or Path(p).name.endswith("-packages")]
    libraries = [f"{p}/{lib}" for p in (sys.base_prefix, "", "/usr") for lib in ("lib", "lib64")]
    extra = [*libraries, "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    return list(dict.fromkeys(path)), [p for p in dict.fromkeys([*path, *extra]) if os.path.exists(p)]


class Sandbox:
    """Runs code, any number of times, from any thread.

    timeout_s      wall time of a run, s; at the end every process of it is killed
    memory_mb      MiB that one process may add to what numpy and sympy take
    output_chars   characters of output kept: the first half and the last half
    max_processes  1: a run cannot start a process (the sound choice, as memory_mb holds for each); more need namespaces
    scratch_mb     MiB of the run's own folder, the only place where it can write
    workers        runs that run_many has under way at once
    preload        modules loaded once for all runs, if installed
    allow_weak     where the kernel refuses namespaces, go on with the fences that are left; `weaker` lists what is lost
    use_namespaces False: take the weak mode even where namespaces work (needs allow_weak)
    UserError: an argument out of range, or a kernel without namespaces while allow_weak is False."""

    def __init__(
        self,
        timeout_s: float = 5.0,
        memory_mb: int = 512,
        output_chars: int = 400,
        max_processes: int = 1,
        scratch_mb: int = 16,
        workers: int = 8,
        preload: Iterable[str] = PRELOAD,
        allow_weak: bool = False,
        use_namespaces: bool = True,
    ) -> None:
        sizes = {"memory_mb": memory_mb, "max_processes": max_processes, "scratch_mb": scratch_mb, "workers": workers}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"sandbox: {name} must be at least 1, got {value}")
        if not 0 < timeout_s < 1e6:
            raise UserError(f"sandbox: timeout_s must be above 0 s and below 1e6 s, got {timeout_s}")
        if not 2 <= output_chars <= 1 << 20:
            raise UserError(f"sandbox: output_chars must be from 2 to {1 << 20}, got {output_chars}")
        if not sys.platform.startswith("linux"):
            raise UserError(f"sandbox: Linux is needed (namespaces, seccomp), got {sys.platform}; use a container")
        path, readable = _places()
        self.timeout_s = timeout_s
        self._config = {"timeout_s": timeout_s, "memory_mb": memory_mb, "output_chars": output_chars,
                        "max_processes": max_processes, "scratch_mb": scratch_mb, "preload": list(preload),
                        "path": path, "readable": readable, "namespaces": use_namespaces}  # fmt: skip
        self._lock, self._closed = threading.Lock(), False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        refused = "use_namespaces is False"
        if use_namespaces:
            try:
                self._server = self._start()
                return
            except _Refused as error:
                refused = f"the kernel refuses namespaces ({error})"
        if not allow_weak:
            raise UserError(f"sandbox: {refused}{_HOW}")
        if max_processes > 1:
            raise UserError(f"sandbox: max_processes above 1 needs namespaces, got {max_processes}, and {refused}")
        self._config["namespaces"] = False
        try:
            self._server = self._start()
        except _Refused as error:
            raise UserError(f"sandbox: the weak mode does not work here either ({error}); use a container") from error

    def _start(self) -> _Server:
        """A server that has executed one line: some kernels refuse a fence only when it is used."""
        server = _Server(self._config)
        first = server.ask("print(6 * 7)", self.timeout_s + _GRACE_S)
        if first is None or (first.reason == "sandbox"):
            server.close()
            raise _Refused(first.output if first else "the first run gave no answer")
        return server

    @property
    def weaker(self) -> tuple[str, ...]:
        """What the weak mode lacks, a sentence each; empty with namespaces."""
        return self._server.weaker

    def run(self, code: str) -> Result:
        """The code in a fresh process.  Whatever it does ends in a Result; nothing is raised."""
        for _ in range(2):
            server = self._server
            result = server.ask(code, self.timeout_s + _GRACE_S)
            if result is not None:
                return result
            with self._lock:  # killed from outside, for want of memory perhaps: once more with a new one
                if self._closed:
                    return Result("Execution Error: the sandbox is closed", False, "sandbox", 0.0)
                if self._server is server and server.process.poll() is not None:
                    server.close()
                    try:
                        self._server = self._start()
                    except _Refused as error:
                        return Result(f"Execution Error: {error}", False, "sandbox", 0.0)
        return Result("Execution Error", False, "sandbox", 0.0)

    def run_many(self, codes: Iterable[str]) -> list[Result]:
        """Each code in a fresh process, `workers` at once; the results in the order of the codes."""
        return list(self._pool.map(self.run, codes))

    def close(self) -> None:
        """Kills what still runs and removes every trace.  Closing twice is fine."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
