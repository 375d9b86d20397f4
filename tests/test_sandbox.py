"""The sandbox: what a run prints, what it is refused, and that nothing is left of it.

Every case runs in both modes: with namespaces, skipped with the kernel's reason where it refuses them, and in the weak
mode (seccomp, Landlock, limits), which works for any user of a Linux kernel with seccomp."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymathrl.errors import UserError
from pymathrl.sandbox import Result, Sandbox, child, escape_tags

TIMEOUT_S = 4.0
WEAK = {"allow_weak": True, "use_namespaces": False}
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux")
pytestmark = LINUX


def make(mode: str, **options: object) -> Sandbox:
    try:
        return Sandbox(**({"timeout_s": TIMEOUT_S} | (WEAK if mode == "weak" else {}) | options))
    except UserError as error:
        if mode == "namespaces":
            pytest.skip(f"no namespaces here: {str(error).partition(';')[0]}")
        raise


@pytest.fixture(scope="module", params=["namespaces", "weak"])
def sandbox(request: pytest.FixtureRequest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYMATHRL_TEST_SECRET", "hunter2")
        with make(request.param, memory_mb=128) as box:  # a bomb that fills more needs its time on a busy machine
            yield box


@pytest.fixture
def mode(sandbox: Sandbox) -> str:
    return "weak" if sandbox.weaker else "namespaces"


def processes(box: Sandbox) -> list[int]:
    """The server of this sandbox and everything forked from it: the name of its folder is in their command lines."""
    folder, found = folder_of(box), []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and folder.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it ended meanwhile
    return found


def folder_of(box: Sandbox) -> str:
    return json.loads(box._server.process.args[-1])["folder"]


def server_fds(box: Sandbox) -> int:
    return len(os.listdir(f"/proc/{box._server.process.pid}/fd"))


def settles(condition, seconds: float = 10.0) -> bool:
    """A killed process takes a moment to leave /proc."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


# --- what a run prints ------------------------------------------------------------------------------------------------
PRINTS = [
    ("print(1)\n2 + 2", "1\n4\n"),
    ("x = 3", ""),
    ("x = 3\nx", "3\n"),
    ("'a'", "'a'\n"),
    ("None", ""),
    ("print('end')", "end\n"),  # the value None of a call is not shown
    ("for i in range(2):\n    print(i)", "0\n1\n"),  # an indented last line is not an expression statement of its own
    ("def f():\n    return 7\nf()  # a comment", "7\n"),
    ("(1,\n 2)", "(1, 2)\n"),
    ("# nothing", ""),
    ("def f(x: int): pass\nf.__annotations__", "{'x': <class 'int'>}\n"),
    ("", ""),
    ("if __name__ == '__main__':\n    print('main')", "main\n"),
    ("import sys\nprint('a')\nsys.exit()", "a\n"),
    ("import sys\nprint('a')\nsys.exit(0)", "a\n"),
    ("import os, sys\nprint('a')\nsys.stdout.flush()\nos._exit(0)", "a\n"),
    ("print('π ≤ 4, \\U0001f600')", "π ≤ 4, \U0001f600\n"),
    ("print('\\ud800')", "\\ud800\n"),  # a lone surrogate has no UTF-8
    ("import os\nos.write(1, b'\\xff\\xfe')", "\ufffd\ufffd2\n"),
    ("import sys\nprint('err', file=sys.stderr)", ""),
    ("import threading\nthreading.Thread(target=lambda: print('late')).start()", "late\n"),
    ("import numpy as np\nprint(np.arange(3).sum())", "3\n"),
    ("from sympy import symbols, integrate\nx = symbols('x')\nintegrate(x**2, x)", "x**3/3\n"),
    ("import dataclasses, pickle\n@dataclasses.dataclass\nclass P:\n    x: int\npickle.loads(pickle.dumps(P(1)))",
     "P(x=1)\n"),
    ("import zoneinfo, asyncio, csv\nasyncio.run(asyncio.sleep(0, 5))", "5\n"),  # modules that were not loaded before
    ("open('a', 'w').write('hi')\nopen('a').read()", "'hi'\n"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x')\nimport os\nos.path.exists('/dev/null')",
     "True\n"),
    ("import os, sys\nprint(sorted(os.environ), sys.argv, sys.stdin)", "[] [''] None\n"),
    ("import subprocess\ntry:\n    subprocess.run(['ls'])\nexcept OSError:\n    print('no')", "no\n"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "output"), PRINTS)
def test_output_is_stdout_and_the_value_of_a_last_expression(sandbox: Sandbox, code: str, output: str) -> None:
    result = sandbox.run(code)
    assert (result.output, result.ok, result.reason) == (output, True, "")
    assert 0 <= result.seconds < TIMEOUT_S


ERRORS = [
    ("1 +", "SyntaxError: invalid syntax"),
    ("print(1)\nx", "NameError: name 'x' is not defined"),
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("input()", "RuntimeError: input(): lost sys.stdin"),
    ("import sys\nsys.exit(3)", "SystemExit: 3"),
    ("import sys\nsys.exit('bye')", "bye"),
    ("import os\nos._exit(7)", "SystemExit: 7"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("import ctypes\nctypes.string_at(0)", "Killed by SIGSEGV"),
    ("class E(Exception):\n    def __str__(self): 1 / 0\nraise E", "E: <exception str() failed>"),
    ("raise ValueError('\\ud800')", "ValueError: \\ud800"),
    ("raise ValueError('x' * 10**7)", "ValueError: " + "x" * 188 + "..." + "x" * 200),
    ("import os\nos.write(3, b'nonsense')\nos._exit(1)", "SystemExit: 1"),  # the descriptor of the report
]


@pytest.mark.parametrize(("code", "output"), ERRORS)
def test_an_error_gives_the_last_line_of_the_traceback(sandbox: Sandbox, code: str, output: str) -> None:
    result = sandbox.run(code)
    assert (result.output, result.ok, result.reason) == (output, False, "error")


@pytest.mark.parametrize("code", ["print(1)\0", "\0", "x = '\ud800'", "(" * 10**4, "-" * 10**5 + "1", "f(:\n" * 999])
def test_text_that_is_not_python_is_an_error_of_the_run(sandbox: Sandbox, code: str) -> None:
    result = sandbox.run(code)
    assert not result.ok and result.output and result.reason in ("error", "memory")


# --- what a run is refused --------------------------------------------------------------------------------------------
LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
RAISE = "\nif r == -1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))"
EPERM = r"PermissionError: \[Errno 1\] Operation not permitted"
CLOSED = r"(PermissionError: \[Errno 13\]|FileNotFoundError: \[Errno 2\]|OSError: \[Errno 30\] Read-only file system)"
HOSTILE = {
    "fork bomb": ("import os\nwhile True: os.fork()", EPERM),
    "fork by libc": (LIBC + "r = libc.fork()" + RAISE, EPERM),
    "daemon": ("import os\nif os.fork() == 0:\n    os.setsid()\n    os.fork()", EPERM),
    "thread bomb": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
                    "RuntimeError: can't start new thread|MemoryError"),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "memory in small pieces": ("x = ()\nwhile True: x = (x, bytes(300))", "MemoryError"),
    "memory at once": ("bytearray(10**12)", "MemoryError"),
    "memory of numpy": ("import numpy\nnumpy.ones(10**9)", ".*MemoryError"),
    "recursion": ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    "exec": ("import os\nos.execv('/bin/sh', ['sh'])", EPERM + "|" + CLOSED),
    "write outside": ("open('/outside', 'w')", CLOSED),
    "write into the packages": ("import sympy, os\nopen(os.path.dirname(sympy.__file__) + '/x.py', 'w')", CLOSED),
    "remove a package": ("import sympy, os\nos.unlink(sympy.__file__)", CLOSED),
    "change a package": ("import sympy, os\nos.chmod(sympy.__file__, 0)", CLOSED + "|" + EPERM),
    "move a package": ("import sympy, os\nos.rename(sympy.__file__, 'x')", CLOSED + r"|OSError: \[Errno 18\]"),
    "make a folder outside": ("import os\nos.mkdir('/var/tmp/outside')", CLOSED + "|" + EPERM),
    "symlink out": ("import os\nos.symlink('/etc', 'e')\nopen('e/outside', 'w')", CLOSED),
    "read by a symlink": ("import os\nos.symlink('/etc/passwd', 'p')\nopen('p').read()", CLOSED),
    "hard link out": ("import os\nos.link('/etc/passwd', 'p')", CLOSED + r"|OSError: \[Errno 18\]|" + EPERM),
    "big file": ("f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))", r"OSError: \[Errno (27|28)\]"),
    "environment of pid 1": ("open('/proc/1/environ').read()", CLOSED),
    "environment of its own": ("open('/proc/self/environ').read()", CLOSED),
    "environment of the parent": ("import os\nopen(f'/proc/{os.getppid()}/environ').read()", CLOSED),
    "memory of the parent": ("import os\nopen(f'/proc/{os.getppid()}/mem', 'r+b')", CLOSED),
    "kill the parent": ("import os\nos.kill(os.getppid(), 9)", EPERM),
    "kill everyone": ("import os\nos.kill(-1, 9)", EPERM),
    "kill the group": ("import os\nos.killpg(0, 9)", EPERM),
    "kill by libc": (LIBC + "r = libc.kill(-1, 9)" + RAISE, EPERM),
    "signal by pidfd": ("import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
                        r"OSError: \[Errno 38\]"),
    "signal by fcntl": ("import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())", EPERM),
    "limit the parent": ("import os, resource\nresource.prlimit(os.getppid() or 1, resource.RLIMIT_CPU, (0, 0))",
                         EPERM + "|" + CLOSED),
    "raise a limit": ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (-1, -1))", "ValueError: not allowed to raise"),
    "socket": ("import socket\nsocket.create_connection(('1.1.1.1', 80))", EPERM + "|socket.gaierror"),
    "unix socket": ("import socket\nsocket.socket(socket.AF_UNIX)", EPERM),
    "name server": ("import socket\nsocket.gethostbyname('example.org')", r"socket\.gaierror|" + EPERM),
    "ptrace": (LIBC + "r = libc.ptrace(16, os.getppid(), 0, 0)" + RAISE, EPERM),
    "mount": (LIBC + "r = libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)" + RAISE, EPERM),
    "umount": (LIBC + "r = libc.umount2(b'/tmp', 2)" + RAISE, EPERM),
    "become root": (LIBC + "libc.setuid(0)\nopen('/etc/outside', 'w')", CLOSED),
    "new user namespace": (LIBC + "r = libc.unshare(0x10000000)" + RAISE, EPERM),
    "new namespace by clone": (LIBC + "r = libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 0x10000011, "
                               "0, 0, 0, 0)" + RAISE, EPERM),
    "outlive the supervisor": (LIBC + "r = libc.prctl(1, 0, 0, 0, 0)" + RAISE, EPERM),
    "io_uring": (LIBC + "r = libc.syscall(425, 8, ctypes.create_string_buffer(120))" + RAISE, r"OSError: \[Errno 38\]"),
    "x32 call": (LIBC + "r = libc.syscall(0x40000000 + 41, 2, 1, 0)" + RAISE, r"OSError: \[Errno 38\]"),
    "memory file": ("import os\nos.memfd_create('x')", EPERM),
    "raw disk": ("import os\nos.mknod('d', 0o60600, os.makedev(8, 0))", EPERM),
    "closed report": ("import os\nos.close(1)\nos.close(2)\nos.close(3)\n1 / 0", "SystemExit: 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def canary():
    """A process of this user's that only a run could end, and a folder that only a run could change."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    assert process.poll() is None, "a run reached a process outside"
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused_ends_in_one_line(sandbox: Sandbox, canary: subprocess.Popen, name: str) -> None:
    code, line = HOSTILE[name]
    result = sandbox.run(code)
    assert not result.ok
    assert re.match(line, result.output), result
    assert result.reason == ("memory" if "MemoryError" in result.output else "error")
    assert canary.poll() is None
    assert not any(Path(p, "outside").exists() for p in ("/", "/etc", "/var/tmp"))
    assert sandbox.run("print(1)").output == "1\n"


def test_environment_and_descriptors_of_the_parent_are_out_of_reach(sandbox: Sandbox) -> None:
    """Not by os.environ, not in the C library, not among the open files (0, 1, 2 and the report; one of listing)."""
    code = (
        "import ctypes, os\nprint(dict(os.environ), ctypes.CDLL(None).getenv(b'PYMATHRL_TEST_SECRET'))\n"
        "for fd in range(64):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass"
    )
    assert sandbox.run(code).output == "{} 0\n0\n1\n2\n3\n"


def test_the_data_of_the_machine_is_out_of_reach(sandbox: Sandbox, tmp_path: Path) -> None:
    """A run cannot look up the answer key: neither files of the project nor of the user can be read or listed."""
    (tmp_path / "answers.jsonl").write_text("42")
    tmp_path.chmod(0o755)
    here = Path(__file__).resolve()
    for path in (tmp_path / "answers.jsonl", here, Path("/etc/passwd"), Path.home() / ".bashrc"):
        result = sandbox.run(f"open({str(path)!r}).read()")
        assert not result.ok and re.match(CLOSED, result.output), result
    assert not sandbox.run(f"import os\nos.listdir({str(here.parent)!r})").ok


def test_with_namespaces_a_run_sees_only_its_own_world(sandbox: Sandbox, mode: str) -> None:
    if mode == "weak":
        pytest.skip("the weak mode has no namespaces")
    code = "import os, socket\nprint(os.getpid(), os.getppid(), os.getuid(), os.getcwd(), os.listdir('.'))\n"
    code += "print(os.path.exists('/proc'), os.path.exists('/home'), sorted(os.listdir('/dev')))"
    assert sandbox.run(code).output == "1 0 1000 /scratch []\nFalse False ['null', 'urandom']\n"
    written = sandbox.run("open('f', 'w').write('x')\nimport os\nos.mkdir('d')\nsorted(os.listdir())")
    assert written.output == "['d', 'f']\n"
    # /tmp leads to the scratch folder, or is read-only where the packages lie below it; tempfile finds a place
    assert sandbox.run("import tempfile\ntempfile.TemporaryFile().write(b'x')").output == "1\n"
    assert "No space left" in sandbox.run("for i in range(99): open(str(i), 'wb').write(bytes(1 << 20))").output
    assert "No space left" in sandbox.run("for i in range(9999): open(str(i), 'w')").output


def test_root_is_given_up(sandbox: Sandbox, mode: str) -> None:
    """The kernel's own view: the ids of a running run from outside, and its capabilities."""
    pid_before = set(processes(sandbox))
    thread = threading.Thread(target=sandbox.run, args=("import time\ntime.sleep(1)",))
    thread.start()
    seen: dict[int, str] = {}

    def look() -> bool:
        for pid in set(processes(sandbox)) - pid_before:
            try:
                seen[pid] = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
        return sum("Seccomp:\t2" in text for text in seen.values()) >= 1

    assert settles(look)
    thread.join()
    status = dict(line.split(":\t", 1) for line in next(t for t in seen.values() if "Seccomp:\t2" in t).splitlines())
    assert all(int(status[name], 16) == 0 for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))
    assert status["NoNewPrivs"] == "1"
    if mode == "namespaces" or not any("root without" in line for line in sandbox.weaker):
        assert "0" not in status["Uid"].split()


# --- time, output, several at once ------------------------------------------------------------------------------------
HANGS = [
    "while True: pass",
    "import time\ntime.sleep(1000)",
    "while True: print('x' * 1000)",  # read on, in bounded memory
    "import os, time\nos.close(1)\nos.close(2)\nos.close(3)\ntime.sleep(1000)",  # end of file is not the end of a run
    "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()",
    "import signal, time\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\n"
    "while True: pass",
    "len(str(10 ** (10 ** 9)))",  # never returns to the interpreter
    "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
    "try:\n    while True: pass\nexcept BaseException:\n    while True: pass",
]


def test_hanging_runs_end_at_the_deadline_and_hold_nothing_up(sandbox: Sandbox) -> None:
    """Nine hanging runs and nine quick ones on eight workers: the quick ones are right, all are back in two rounds."""
    start = time.monotonic()
    results = sandbox.run_many([code for i, hang in enumerate(HANGS) for code in (f"print({i})", hang)])
    assert time.monotonic() - start < 2 * TIMEOUT_S + 20
    assert [r.output for r in results[::2]] == [f"{i}\n" for i in range(len(HANGS))]
    for result, code in zip(results[1::2], HANGS, strict=True):
        assert (result.output, result.ok, result.reason) == ("Timeout Error", False, "timeout"), code
        assert TIMEOUT_S <= result.seconds < TIMEOUT_S + 10
    assert settles(lambda: len(processes(sandbox)) == 1)


def test_huge_output_keeps_its_ends(sandbox: Sandbox) -> None:
    result = sandbox.run("print('a' * 300, end='')\nfor i in range(3000): print('-' * 9999)\nprint('z' * 299)")
    assert result.ok and result.output == "a" * 200 + "..." + "z" * 199 + "\n"
    assert sandbox.run("print('é' * 10**6)").output == "é" * 200 + "..." + "é" * 199 + "\n"
    assert sandbox.run("print('é' * 399)").output == "é" * 399 + "\n"


@given(st.lists(st.text(max_size=30), max_size=30), st.integers(2, 40))
def test_the_ends_of_a_stream_are_those_of_the_whole(chunks: list[str], chars: int) -> None:
    """Against the whole text, in pieces cut anywhere.  Hand case: 5 characters kept of 'abcdefg' are 'ab...efg'."""
    whole = "".join(chunks).encode(errors="replace")
    ends = child.Ends(chars)
    for i in range(0, len(whole), 7):
        ends.add(whole[i : i + 7])
    assert ends.text() == child.shorten(whole.decode(), chars)
    assert len(ends.head) <= 4 * chars and len(ends.tail) <= 4 * chars
    assert child.shorten("abcdefg", 5) == "ab...efg"


def test_runs_share_nothing(sandbox: Sandbox) -> None:
    assert sandbox.run("import math, sympy\nx = 1\nmath.pi = 3\nsympy.pi = 3\nopen('f', 'w').write('x')").ok
    code = "import math, os, sympy\nprint(math.pi > 3.1, sympy.pi, os.listdir('.'), 'x' in globals())"
    assert sandbox.run(code).output == "True pi [] False\n"


def test_equal_code_gives_equal_output(sandbox: Sandbox) -> None:
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), {'a', 'b', 'c', 'd', 'e'})"
    assert len({r.output for r in sandbox.run_many([code] * 4)}) == 1
    with make("weak" if sandbox.weaker else "namespaces") as other:
        assert other.run(code).output == sandbox.run(code).output


def test_forks_are_counted_and_die_with_their_run() -> None:
    """Where processes are allowed, the namespaces alone hold them: a bomb meets its limit, a daemon ends with pid 1."""
    with make("namespaces", max_processes=8, preload=(), timeout_s=2.0) as box:
        bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
        daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
        daemon += "    os._exit(0)\nprint('gone')"
        results = box.run_many([bomb, daemon, daemon, bomb])
        assert [r.output for r in results] == ["Timeout Error", "gone\n", "gone\n", "Timeout Error"]
        assert settles(lambda: len(processes(box)) == 1)
        count = "import os, time\nn = 0\ntry:\n    while True:\n        if os.fork() == 0: time.sleep(9); os._exit(0)\n"
        count += "        n += 1\nexcept BlockingIOError:\n    print(n, flush=True)\n    os._exit(0)"
        assert {r.output for r in box.run_many([count] * 3)} == {f"{8 + child.THREADS - 1}\n"}
    with pytest.raises(UserError, match="max_processes above 1 needs namespaces, got 2"):
        make("weak", max_processes=2)


# --- each fence by itself ---------------------------------------------------------------------------------------------
MUTANTS = {  # a fence taken out of child.py: (mode, its line, what stands there instead, code, what it prints now)
    "no memory limit": ("weak", "        resource.RLIMIT_AS:", "        resource.RLIMIT_CORE:",
                        "import mmap\nlen(mmap.mmap(-1, 1 << 30))", "1073741824\n"),
    "no file size": ("weak", 'cfg["scratch_mb"] * mib', "1 << 40", "len(bytes(1 << 25)) == open('b', 'wb').write("
                     "bytes(1 << 25))", "True\n"),
    "no filter": ("weak", "    restrict_syscalls(seccomp_program(", "    (seccomp_program(",
                  "import socket\nbool(socket.socket())", "True\n"),
    "no Landlock": ("weak", 'if not cfg["namespaces"] and landlock_abi()', "if False",
                    "len(open('/proc/self/cmdline').read()) > 0", "True\n"),
    "/proc left in sight": ("namespaces", 'hide_files(cfg["readable"], ', 'hide_files([*cfg["readable"], "/proc"], ',
                           "import os\nos.path.exists('/proc/self')", "True\n"),
    "no process namespace": ("namespaces", "NEW_NS | NEW_PID | NEW_IPC)", "NEW_NS | NEW_IPC)",
                             "import os\nos.getppid() > 1", "True\n"),
    "descriptors left open": ("weak", "os.closerange(REPORT + 1, ", "max(0, ",
                              "import os\nos.fstat(16) is not None", "True\n"),
    "environment kept": ("weak", "os.environ.clear()", "pass", "import os\nlen(os.environ) > 0", "True\n"),
    "capabilities kept": ("namespaces", '_call("capset"', '(lambda *_: 0)("capset"',
                          LIBC + "b = ctypes.create_string_buffer(24)\n"
                          "libc.capget(b'\\x22\\x05\\x08\\x20' + bytes(4), b)\nany(b.raw)", "True\n"),
}  # fmt: skip


def mutant(monkeypatch: pytest.MonkeyPatch, folder: Path, line: str, instead: str) -> None:
    source = Path(child.__file__).read_text()
    assert source.count(line) == 1
    (folder / "child.py").write_text(source.replace(line, instead))
    monkeypatch.setattr("pymathrl.sandbox._CHILD", folder / "child.py")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_missing_fence_would_be_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of a case prints something else in the sandbox as it is, or is refused, and passes without the fence."""
    mode_, line, instead, code, output = MUTANTS[name]
    if name == "no Landlock" and not child.landlock_abi():
        pytest.skip("this kernel has no Landlock")
    with make(mode_, preload=()) as box:
        assert box.run(code).output != output
    mutant(monkeypatch, tmp_path, line, instead)
    with make(mode_, preload=()) as box:
        assert box.run(code).output == output


def test_without_the_filter_namespaces_still_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary: subprocess.Popen
) -> None:
    """The second fence: every system call allowed, and still nothing outside is reached."""
    mutant(monkeypatch, tmp_path, "    restrict_syscalls(seccomp_program(", "    (seccomp_program(")
    with make("namespaces", preload=(), timeout_s=1.0) as box:
        server = box._server.process
        box.run("import os\nos.kill(os.getppid(), 9)")  # 0: the process group, which is the run's own
        box.run("import os\nos.kill(-1, 9)")
        assert "Network is unreachable" in box.run("import socket\nsocket.create_connection(('1.1.1.1', 80))").output
        assert box.run("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass").reason == "timeout"
        assert not box.run(LIBC + "r = libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)" + RAISE).ok
        assert not box.run(LIBC + "r = libc.umount2(b'/tmp', 2)" + RAISE).ok
        assert "Read-only" in box.run("import os\nos.mkdir('/outside')").output
        assert box.run("import os\nos.chmod('/usr', 0)").output.startswith(("OSError: [Errno 30]", "PermissionError"))
        assert canary.poll() is None and server.poll() is None
        assert settles(lambda: len(processes(box)) == 1)


# --- what is left -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode_", ["namespaces", "weak"])
def test_nothing_is_left_after_fifty_runs_and_a_close(mode_: str) -> None:
    codes = ["print(1)", "open('f', 'w').write('x')", "1 / 0", "import os\nos._exit(3)", "while True: pass"] * 10
    own = len(os.listdir("/proc/self/fd"))
    with make(mode_, preload=(), timeout_s=0.5, workers=4) as box:
        box.run("1")
        before, folder = server_fds(box), folder_of(box)
        process = box._server.process
        assert [r.ok for r in box.run_many(codes)] == [True, True, False, False, False] * 10
        assert settles(lambda: len(processes(box)) == 1)
        assert server_fds(box) == before
        assert (os.listdir(folder) if mode_ == "weak" else Path(folder).exists()) in ([], False)
        assert len(os.listdir("/proc/self/fd")) == own + 1
    box.close()
    assert process.poll() is not None and not Path(folder).exists()
    assert len(os.listdir("/proc/self/fd")) == own
    assert box.run("1") == Result("Execution Error: the sandbox is closed", False, "sandbox", 0.0)


@pytest.mark.parametrize("mode_", ["namespaces", "weak"])
def test_a_killed_server_is_replaced(mode_: str) -> None:
    """By one run after the kill, and by all that were under way at that moment."""
    with make(mode_, preload=()) as box:
        first = box._server.process
        first.kill()
        first.wait()
        assert box.run("1").output == "1\n"
        second = box._server.process
        assert second.pid != first.pid
        threading.Timer(0.3, second.kill).start()
        assert [r.output for r in box.run_many(["import time\ntime.sleep(1)\n'slept'"] * 4)] == ["'slept'\n"] * 4
        assert box._server.process.pid != second.pid


def test_a_strict_umask_does_not_close_the_packages() -> None:
    """The server makes the folders of the new root: with the caller's mask 077, nobody could not enter them."""
    before = os.umask(0o077)
    try:
        with make("namespaces", preload=()) as box:
            assert box.run("import importlib.util as u, statistics\nbool(u.find_spec('sympy'))").output == "True\n"
    finally:
        os.umask(before)


@pytest.mark.parametrize("options", [{}, WEAK])
def test_runs_do_not_outlive_a_parent_that_is_killed(options: dict, tmp_path: Path) -> None:
    """SIGKILL to the owner while a run sleeps: server, supervisor and run go too."""
    make("weak" if options else "namespaces", preload=()).close()  # skips where this mode is refused
    program = f"""
import json, threading, time
from pymathrl.sandbox import Sandbox
box = Sandbox(timeout_s=600, preload=(), **{options!r})
threading.Thread(target=box.run, args=("import time; time.sleep(600)",), daemon=True).start()
time.sleep(0.5)
print(json.loads(box._server.process.args[-1])['folder'], flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    folder = owner.stdout.readline().strip()
    lines = lambda: [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert sum(folder.encode() in line for line in lines()) == 3
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert settles(lambda: not any(folder.encode() in line for line in lines()))
    assert Path(folder).exists() == bool(options)  # the one thing left, in weak mode
    shutil.rmtree(folder, ignore_errors=True)


# --- the choice of a mode, arguments, tags ----------------------------------------------------------------------------
def test_a_kernel_that_refuses_namespaces_is_told_apart() -> None:
    """As in a container whose profile denies unshare: a refusal that names the call, or the weak mode with its list."""
    program = """
import json, struct
from pymathrl.sandbox import Sandbox, child
steps = (0x20, 0, 0, 0), (0x15, 0, 1, child.number("unshare 272 97")), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)
child.restrict_syscalls(b"".join(struct.pack("=HBBI", *step) for step in steps))
try:
    Sandbox(preload=())
except Exception as error:
    said = f"{type(error).__name__}: {error}"
with Sandbox(preload=(), allow_weak=True) as box:
    print(json.dumps([said, box.weaker, box.run("6 * 7").output]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said, weaker, output = json.loads(done.stdout)
    assert said.startswith("UserError: sandbox: the kernel refuses namespaces (unshare: Operation not permitted)")
    assert "allow_weak=True" in said and "max_user_namespaces" in said
    assert weaker[0].startswith("no namespaces") and output == "42\n"


def test_weak_is_not_taken_unasked() -> None:
    with pytest.raises(UserError, match=r"use_namespaces is False.*allow_weak=True"):
        Sandbox(use_namespaces=False)


@pytest.mark.parametrize("option", ["timeout_s", "memory_mb", "output_chars", "workers", "max_processes", "scratch_mb"])
@pytest.mark.parametrize("value", [0, -1])
def test_arguments_out_of_range_are_named(option: str, value: int) -> None:
    with pytest.raises(UserError, match=f"sandbox: {option} must be .*, got {value}"):
        Sandbox(**{option: value})


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("</interpreter>", "&lt;/interpreter>"),
        ("a <code>\nb</code>", "a &lt;code>\nb&lt;/code>"),
        ("< / CODE >", "&lt; / CODE >"),
        ("<|im_end|>", "&lt;|im_end|>"),
        ("<answer>1</answer>", "&lt;answer>1&lt;/answer>"),
        ("1 < 2, <b>, <codes>, a<code", "1 < 2, <b>, <codes>, a<code"),
    ],
)
def test_tags_in_outputs_are_escaped(text: str, escaped: str) -> None:
    assert escape_tags(text) == escaped
    assert escape_tags(escaped) == escaped


def test_signals_of_this_process_are_untouched(sandbox: Sandbox) -> None:
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    alarm = "import signal\ndef late(*_): raise TimeoutError('too long')\nsignal.signal(signal.SIGALRM, late)\n"
    assert sandbox.run(alarm + "signal.alarm(1)\nwhile True: pass").output == "TimeoutError: too long"
