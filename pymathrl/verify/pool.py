"""Verdicts from processes that can be killed: `VerifierPool`.

What is decided in bounded time is decided in the calling thread; what only SymPy can tell goes to a worker, which has
`deadline_s` for it and is killed when they are over. One thread of the pool starts the workers (see `worker`), hands
out the work, one item at a time each, and keeps the deadlines; there is no signal handler and no limit on the caller's
own thread. Nothing is started before the first item that needs it.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import IO, TypeVar

from pymathrl.errors import UserError
from pymathrl.verify.equality import decide
from pymathrl.verify.extract import extract
from pymathrl.verify.policy import Policy, Result, Verdict

COMMAND = [sys.executable, "-P", "-m", "pymathrl.verify.worker"]
START_S = 120.0  # for the import of SymPy: 1 s on an idle machine
FORK_S = 30.0
END_S = 10.0
LOOK_S = 3600.0  # the longest wait that is begun: the system refuses to wait for months
CACHED = 1 << 16  # verdicts that are remembered, of pairs of at most CACHED_CHARS characters
CACHED_CHARS = 1024
LATENCIES = 1 << 16  # that are kept until they are asked for
REPLY_BYTES = 1 << 16
REQUEST_BYTES = 1 << 17  # fits the buffer of a socket; no answer within the verifier's limits is longer
TRIES = 3  # of a pair whose worker was dead before it had read it
DEFAULT = Policy()
TIMEOUT = Verdict(False, "timeout", "worker")
DIED = Verdict(False, "worker died", "worker")

Item = tuple[str, str | Sequence[str], str]  # response, gold or golds, mode
_Key = tuple[str, str, Policy]
T = TypeVar("T")


class VerifierPool:
    """Grades answers; thread-safe. Close it, or use it as a context manager; it ends with the process at the latest.

    workers     processes that decide at the same time
    deadline_s  seconds for one pair; then its worker is killed and the answer is wrong: reason "timeout"
    max_tasks   pairs after which a worker makes room for a new one
    """

    def __init__(self, workers: int = 1, deadline_s: float = 2.0, max_tasks: int = 2000) -> None:
        for name, value in (("workers", workers), ("max_tasks", max_tasks)):
            if value < 1:
                raise ValueError(f"VerifierPool: {name} must be at least 1, got {value}")
        if not 0 < deadline_s < math.inf:
            raise ValueError(f"VerifierPool: deadline_s must be more than 0 and finite, got {deadline_s}")
        self.workers, self.deadline_s, self.max_tasks = workers, deadline_s, max_tasks
        self._known: OrderedDict[_Key, Verdict] = OrderedDict()
        self._seconds: deque[float] = deque(maxlen=LATENCIES)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._asked: dict[_Key, Future[Verdict]] = {}
        self._loop = _Loop(self.workers, self.deadline_s, self.max_tasks)
        self._finalizer = weakref.finalize(self, self._loop.close)

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers and the thread; what is not decided yet raises. The pool cannot be used afterwards."""
        self._finalizer()

    def map(self, items: Sequence[Item], cfg: Policy = DEFAULT) -> list[Result]:
        """The results of (response, gold or golds, mode), in their order."""
        return [future.result() for future in [self.submit(*item, cfg) for item in items]]

    def submit(
        self, response: str, gold: str | Sequence[str], mode: str = "boxed", cfg: Policy = DEFAULT
    ) -> Future[Result]:
        """The result of a response, to come. What takes no worker is done when this returns."""
        answer = extract(response, mode)
        if answer is None:
            return _done(Result(0.0, None, "no answer", "extract"))
        verdict = self.decide(gold, answer, cfg)
        if verdict.done() and verdict.exception() is None:
            return _done(result_of(answer, verdict.result()))
        out: Future[Result] = _pending()

        def finish(verdict: Future[Verdict]) -> None:
            error = verdict.exception()
            if error is not None:
                out.set_exception(error)
            else:
                out.set_result(result_of(answer, verdict.result()))

        verdict.add_done_callback(finish)
        return out

    def decide(self, gold: str | Sequence[str], answer: str, cfg: Policy = DEFAULT) -> Future[Verdict]:
        """Whether the answer equals the gold, or any of several golds, to come. Of several that it does not equal the
        verdict tells of a time-out, else of the first."""
        golds = (gold,) if isinstance(gold, str) else tuple(gold)
        if not golds:
            raise ValueError("VerifierPool: expected a gold answer or several, got none")
        if self._pid != os.getpid():  # after a fork: thread and workers are the other process's, and maybe the lock
            self._finalizer.detach()
            self._begin()
        verdicts = []
        for text in golds:  # the first that is equal decides, before a worker is asked about others
            verdicts.append(self._quick((text, answer, cfg)))
            if verdicts[-1]:
                return _done(verdicts[-1])
        keys = [(text, answer, cfg) for text in golds]
        left = [self._ask(key) for key, verdict in zip(keys, verdicts, strict=True) if verdict is None]
        if len(golds) == 1 and left:
            return left[0]
        return _any_of([v for v in verdicts if v is not None], left)

    def take_latencies(self) -> list[float]:
        """Seconds that each pair took, from the question to the verdict, of those decided since the last call."""
        with self._lock:
            seconds = list(self._seconds)
            self._seconds.clear()
        return seconds

    def _quick(self, key: _Key) -> Verdict | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
            if key in self._asked:
                return None
        begin = time.perf_counter()
        try:
            verdict = decide(*key, symbolic=False)
        except Exception as error:  # a defect of ours that some answer has found: it must not end a run of days
            verdict = Verdict(False, f"error: {type(error).__name__}", "error")
        if verdict is not None:
            self._remember(key, verdict, time.perf_counter() - begin)
        return verdict

    def _ask(self, key: _Key) -> Future[Verdict]:
        """The verdict of a worker; equal questions at the same time are one."""
        gold, answer, cfg = key
        with self._lock:
            if key in self._asked:
                return self._asked[key]
            future: Future[Verdict] = _pending()
            self._asked[key] = future
        begin = time.perf_counter()

        def answered(done: Future[Verdict]) -> None:
            if done.exception() is None:
                self._remember(key, done.result(), time.perf_counter() - begin)
            with self._lock:
                self._asked.pop(key, None)

        future.add_done_callback(answered)
        payload = json.dumps([gold, answer, asdict(cfg)]).encode()
        if len(payload) > REQUEST_BYTES:
            future.set_result(Verdict(False, "too long", "limits"))
        else:
            self._loop.put(_Task(payload, future))
        return future

    def _remember(self, key: _Key, verdict: Verdict, seconds: float) -> None:
        with self._lock:
            self._seconds.append(seconds)
            # a death may have been somebody else's doing; a time-out stays one, so that equal answers are graded alike
            if len(key[0]) + len(key[1]) <= CACHED_CHARS and verdict != DIED:
                self._known[key] = verdict
                if len(self._known) > CACHED:
                    self._known.popitem(last=False)


@lru_cache(maxsize=1)
def shared_pool() -> VerifierPool:
    """The pool of this process for all who have none of their own; it has half of the cores, at most 8."""
    return VerifierPool(workers=max(1, min(8, len(os.sched_getaffinity(0)) // 2)))


def result_of(answer: str, verdict: Verdict) -> Result:
    """The grade of a response that states `answer`."""
    return Result(float(verdict.equal), answer, verdict.reason, verdict.stage)


def _pending() -> Future[T]:
    """A future that cannot be cancelled: others may wait for the same verdict."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()
    return future


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _any_of(decided: Sequence[Verdict], left: Sequence[Future[Verdict]]) -> Future[Verdict]:
    """The first verdict that is equal, else a time-out, else the first; those in `decided` are not equal."""
    if not left:
        return _done(decided[0])
    out: Future[Verdict] = _pending()
    missing = len(left)
    lock = threading.Lock()

    def finish(_: Future[Verdict]) -> None:
        nonlocal missing
        with lock:
            missing -= 1
            if missing:
                return
        errors = [error for future in left if (error := future.exception()) is not None]
        if errors:
            out.set_exception(errors[0])
            return
        verdicts = [*decided, *(future.result() for future in left)]
        out.set_result(min(verdicts, key=lambda v: (not v.equal, v != TIMEOUT)))

    for future in left:
        future.add_done_callback(finish)
    return out


@dataclass
class _Task:
    payload: bytes
    future: Future[Verdict]
    tries: int = 0


@dataclass
class _Worker:
    """A child of the server: what it works on, until when, and how many tasks it has had."""

    pid: int
    link: socket.socket
    task: _Task | None = None
    due: float = 0.0
    tasks: int = 0


@dataclass
class _Server:
    """The process that forks the workers. due: when it must have answered; None: it owes nothing."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    errors: IO[bytes]
    due: float | None
    ready: bool = False
    forks: deque[socket.socket] = field(default_factory=deque)  # our ends, of children it has not started yet


class _Loop:
    """The thread that owns the processes of a pool. It begins with the first task, and anew with the next task after an
    error, which every task that waits then gets."""

    def __init__(self, workers: int, deadline_s: float, max_tasks: int) -> None:
        self.size, self.deadline_s, self.max_tasks = workers, deadline_s, max_tasks
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._queue: deque[_Task] = deque()
        self._thread: threading.Thread | None = None  # the last one: close waits for its end
        self._running = False
        self._bell: socket.socket | None = None
        self._closed = False

    def put(self, task: _Task) -> None:
        with self._lock:
            if not self._closed:
                try:
                    if not self._running:
                        self._start_thread()
                    self._queue.append(task)
                    self._ring()
                    return
                except (OSError, RuntimeError) as raised:  # no descriptor or thread is left: nobody would do the task
                    error: Exception = raised
            else:
                error = RuntimeError("VerifierPool: the pool is closed")
        task.future.set_exception(error)

    def _start_thread(self) -> None:
        self._server: _Server | None = None
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._bell, ear = socket.socketpair()
        self._bell.setblocking(False)
        # a daemon: the exit of the process does not wait for it but calls close, through the finalizer
        thread = threading.Thread(target=self._run, args=(ear,), name="verifier", daemon=True)
        thread.start()
        self._thread, self._running = thread, True

    def close(self) -> None:
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
            thread = self._thread
            self._ring()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _ring(self) -> None:
        if self._bell is not None:
            try:
                self._bell.send(b"!")
            except BlockingIOError:
                return  # it has not heard the last ones yet

    # --- in the thread -------------------------------------------------------------------------------------------

    def _run(self, ear: socket.socket) -> None:
        self._selector.register(ear, selectors.EVENT_READ, lambda: ear.recv(4096))
        error: BaseException = RuntimeError("VerifierPool: the pool is closed")
        try:
            while not self._closed:
                self._hand_out()
                for key, _ in self._selector.select(self._patience()):
                    key.data()
                self._expire()
        except BaseException as raised:
            error = raised
        finally:
            tasks = [w.task for w in self._workers if w.task is not None]
            try:
                self._end_server()
                self._selector.close()
            finally:
                with self._lock:  # only now may another thread begin: all that is here is its own
                    tasks += self._queue
                    self._queue.clear()
                    self._running = False
                    if self._bell is not None:
                        self._bell.close()
                    self._bell = None
                    ear.close()
                for task in tasks:
                    task.future.set_exception(error)

    def _hand_out(self) -> None:
        """Work for those who are idle, and workers for the work."""
        if self._queue and self._server is None:
            self._start_server()
        idle = [w for w in self._workers if w.task is None]
        while idle and self._queue:
            worker, task = idle.pop(), self._queue.popleft()
            task.tries += 1
            try:
                worker.link.send(task.payload)
            except OSError:  # it died while it had nothing to do, or has grown and takes no more
                if task.tries < TRIES:
                    self._queue.appendleft(task)
                else:
                    task.future.set_result(DIED)
                self._drop(worker)
                continue
            worker.task, worker.due = task, time.monotonic() + self.deadline_s
        server = self._server
        if server is not None and server.ready:
            wanted = min(len(self._queue), self.size - len(self._workers)) - len(server.forks)
            for _ in range(wanted):
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                server.forks.append(ours)
                server.due = time.monotonic() + FORK_S
                self._tell(server, b"fork", theirs)
                theirs.close()

    def _patience(self) -> float | None:
        """Seconds until something is due."""
        due = [w.due for w in self._workers if w.task is not None]
        if self._server is not None and self._server.due is not None:
            due.append(self._server.due)
        return min(max(0.0, min(due) - time.monotonic()), LOOK_S) if due else None

    def _expire(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if w.task is not None and w.due <= now]:
            self._finish(worker, TIMEOUT)
            self._drop(worker)
        server = self._server
        if server is not None and server.due is not None and server.due <= now:
            raise self._failure(server, "gave no sign of life in time")

    def _on_reply(self, worker: _Worker) -> None:
        if worker not in self._workers:  # it went with the server, whose end was seen in the same look
            return
        try:
            reply = worker.link.recv(REPLY_BYTES)
        except OSError:
            reply = b""
        if reply and worker.task is not None:
            self._finish(worker, Verdict(**json.loads(reply)))
        else:
            self._finish(worker, DIED)
        if not reply or worker.tasks >= self.max_tasks:
            self._drop(worker)

    def _finish(self, worker: _Worker, verdict: Verdict) -> None:
        task, worker.task = worker.task, None
        worker.tasks += 1
        if task is not None:
            task.future.set_result(verdict)

    def _drop(self, worker: _Worker) -> None:
        """Ends a worker, whatever it does."""
        self._workers.remove(worker)
        self._selector.unregister(worker.link)
        worker.link.close()
        if self._server is not None:
            self._tell(self._server, b"kill %d" % worker.pid)

    # --- the server ----------------------------------------------------------------------------------------------

    def _start_server(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server runs
        # the modules that this process sees, and one order of SymPy's sets in every run
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        command = [*COMMAND, str(int(self.deadline_s) + 1)]
        try:
            process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=errors,
                env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
                start_new_session=True,  # Ctrl-C in the terminal is for this process alone
            )  # fmt: skip
        except OSError as error:
            ours.close()
            errors.close()
            raise UserError(f"the verifier's worker process cannot be started: {command[0]!r}: {error}") from None
        finally:
            theirs.close()
        ours.setblocking(False)
        self._server = _Server(process, ours, errors, time.monotonic() + START_S)
        self._selector.register(ours, selectors.EVENT_READ, self._on_server)

    def _on_server(self) -> None:
        server = self._server
        assert server is not None, "its socket is registered as long as it is there"
        try:
            message = server.control.recv(4096)
        except OSError:
            message = b""
        word, _, rest = message.decode().partition(" ")
        if word == "ready":
            server.ready, server.due = True, None
        elif word == "started":
            link = server.forks.popleft()
            server.due = time.monotonic() + FORK_S if server.forks else None
            worker = _Worker(int(rest), link)
            self._workers.append(worker)
            self._selector.register(link, selectors.EVENT_READ, partial(self._on_reply, worker))
        elif word == "failed":
            raise self._failure(server, f"cannot fork ({rest})")
        elif not server.ready or server.forks:
            raise self._failure(server, "ended")
        else:  # killed from outside, and its children with it
            for worker in list(self._workers):
                self._finish(worker, DIED)
            self._end_server()

    def _tell(self, server: _Server, message: bytes, link: socket.socket | None = None) -> None:
        try:
            socket.send_fds(server.control, [message], [] if link is None else [link.fileno()])
        except BlockingIOError:
            raise self._failure(server, "does not read what it is told") from None
        except OSError:
            return  # it is dead: its socket says so at the next look

    def _failure(self, server: _Server, what: str) -> UserError:
        """The error of a server that is of no use, with the end of what it wrote."""
        server.process.kill()
        server.process.wait()
        server.errors.seek(0)
        last = server.errors.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
        return UserError(
            f"the verifier's worker process {what}{': ' + last if last else ''}; "
            f"see what `{' '.join(COMMAND)} 2 </dev/null` says"
        )

    def _end_server(self) -> None:
        """Ends server and workers and waits for it."""
        for worker in self._workers:
            self._selector.unregister(worker.link)
            worker.link.close()
        self._workers.clear()
        server, self._server = self._server, None
        if server is None:
            return
        self._selector.unregister(server.control)
        server.control.close()
        for link in server.forks:
            link.close()
        if not server.ready:
            server.process.kill()  # it has no children yet
        try:
            server.process.wait(END_S)  # it ends them, and itself
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
        server.errors.close()
