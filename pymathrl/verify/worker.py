"""The process that decides what may take too long: python -m pymathrl.verify.worker, started by `VerifierPool`.

It imports SymPy once (seconds) and then forks a child per worker (milliseconds), so that a child that is killed costs
no start. Nothing here has seen CUDA or a second thread, and what is forked is safe to use.

Standard input is a Unix socket of whole messages. "fork" comes with a file descriptor, one end of a socket pair for the
new child; the answer is "started PID", or "failed WHY". "kill PID" ends that child, whatever it does. At the end of the
input, which is also the death of the process at the other end, every child is killed. A child reads requests and writes
verdicts, both JSON, one at a time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from dataclasses import asdict
from importlib import import_module

from pymathrl.verify.equality import decide
from pymathrl.verify.policy import Policy, Verdict

MEMORY_BYTES = 2 << 30  # address space of a child
GROWN_KIB = 512 << 10  # of which a child has had this much at a time, it is not used again
FILE_BYTES = 1 << 20  # of any file it writes: it has no reason to
MESSAGE_BYTES = 1 << 20  # more than the longest request
LOOK_EVERY_S = 5.0  # for the parent, whose end of the socket a fork of it may hold open
PR_SET_PDEATHSIG = 1


def main() -> int:
    parent = os.getppid()
    control = socket.socket(fileno=os.dup(0))
    # nothing that a library prints, or reads, meets the messages
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    import_module("sympy")
    decide("\\sin^2 x+\\cos^2 x", "\\sec^2 x-\\tan^2 x", symbolic=True)  # what it imports when it first needs it
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    gc.collect()
    gc.freeze()  # a collection in a child must not copy the pages of what was imported
    children: set[int] = set()
    control.send(b"ready")
    while os.getppid() == parent:
        if not select.select([control], [], [], LOOK_EVERY_S)[0]:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 1)
        if not message:
            break
        if message == b"fork":
            answer = _fork(control, descriptors[0], children)
        else:
            answer = b""
            _kill(int(message.removeprefix(b"kill ")), children)
        if answer:
            control.send(answer)
    for pid in list(children):
        _kill(pid, children)
    return 0


def _fork(control: socket.socket, descriptor: int, children: set[int]) -> bytes:
    server = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(descriptor)
        return f"failed {error}".encode()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            control.close()
            if os.getppid() == server:  # else it died before the line above
                _serve(socket.socket(fileno=descriptor))
        finally:
            os._exit(0)
    os.close(descriptor)
    children.add(pid)
    return f"started {pid}".encode()


def _kill(pid: int, children: set[int]) -> None:
    if pid in children:  # not waited for yet, so the number is still its own
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        children.remove(pid)


def _serve(requests: socket.socket) -> None:
    """Answers until the input ends, or until it has grown: what SymPy's caches hold is missing in the next answer."""
    seconds = int(sys.argv[1])
    while message := requests.recv(MESSAGE_BYTES):
        used = resource.getrusage(resource.RUSAGE_SELF)
        # where the process that should kill it is held up, the kernel does
        soft = int(used.ru_utime + used.ru_stime) + seconds + 1
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        gold, answer, cfg = json.loads(message)
        verdict = _decide(gold, answer, Policy(**cfg))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > GROWN_KIB
        if grown:  # what is sent from now on is refused at once and goes to another: the exit takes a while
            requests.shutdown(socket.SHUT_RD)
        requests.send(json.dumps(asdict(verdict)).encode())
        if grown:
            return


def _decide(gold: str, answer: str, cfg: Policy) -> Verdict:
    try:
        verdict = decide(gold, answer, cfg, symbolic=True)
    except MemoryError:
        return Verdict(False, "out of memory", "worker")
    except Exception as error:
        return Verdict(False, f"error: {type(error).__name__}", "error")
    return Verdict(False, "not decided", "error") if verdict is None else verdict


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    os._exit(main())  # without the seconds that taking SymPy apart would cost
