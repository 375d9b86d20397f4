"""Workers that hang, die, eat memory or never start: the pool answers in time, in order, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import pymathrl.verify.pool as pool_module
from pymathrl.errors import UserError
from pymathrl.verify import Policy, Result, Verdict, VerifierPool, equal, verify

ROOT = Path(__file__).parents[2]
# A worker that does what the answer says. What it decides otherwise tells which process decided it.
WORKER = """
import os, signal, sys, time
from pymathrl.verify import worker
from pymathrl.verify.policy import Verdict

def decide(gold, answer, cfg=None, *, symbolic):
    if answer == "sleep":
        time.sleep(1000)
    elif answer == "spin":
        while True:
            pass
    elif answer == "power":
        9 ** 9 ** 9  # one operation in C that gives way to no signal handler
    elif answer == "die":
        os._exit(3)
    elif answer == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif answer == "memory":
        bytearray(3 << 30)
    elif answer == "grow":
        global kept
        kept = x = bytearray(600 << 20)  # as a cache does
        x[::4096] = x[::4096]
    elif answer == "raise":
        raise RecursionError
    elif answer == "print":
        print("x" * 100, flush=True)
        os.write(1, b"junk")
    elif answer == "slow":
        time.sleep(0.3)
    return Verdict(gold == answer, str(os.getpid()), "symbolic")

worker.decide, worker.import_module = decide, lambda name: None  # it needs no SymPy
os._exit(worker.main())
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """The name of a worker module that obeys the answers, in use by every pool of the test."""
    name = f"hostile_{os.getpid()}_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(pool_module, "COMMAND", [sys.executable, "-P", "-m", name])
    monkeypatch.setattr(pool_module, "decide", lambda gold, answer, cfg, symbolic: None)
    yield name
    assert gone(name), processes(name)


def processes(name):
    """Process ids whose command line holds `name`; one that has ended and is not waited for has none."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if name.encode() in command and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def reaches(name, count, seconds=10.0):
    """Whether there are `count` such processes after so long at most."""
    end = time.monotonic() + seconds
    while len(processes(name)) != count and time.monotonic() < end:
        time.sleep(0.02)
    return len(processes(name)) == count


def gone(name):
    return reaches(name, 0)


def children():
    """(pid, state) of the direct children of this process, zombies too."""
    out = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            out.append(pid)
    return out


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def ask(pool, *answers, gold="gold"):
    """The verdicts on each answer, asked all at once."""
    return [future.result() for future in [pool.decide(gold, answer) for answer in answers]]


def test_what_is_bounded_starts_no_process(monkeypatch):
    monkeypatch.setattr(pool_module, "COMMAND", ["/nowhere"])
    before = threading.active_count(), descriptors()
    with VerifierPool() as pool:
        results = pool.map(
            [("\\boxed{0.5}", "\\frac12", "boxed"), ("so 3", "3", "boxed"), ("#### 4", ["3", "4"], "gsm8k")]
        )
        assert (threading.active_count(), descriptors()) == before
    assert [(r.score, r.extracted) for r in results] == [(1.0, "0.5"), (0.0, None), (1.0, "4")]
    assert results[1] == Result(0.0, None, "no answer", "extract")


def test_only_a_proof_goes_to_a_worker_and_is_asked_for_once():
    with VerifierPool(workers=2, deadline_s=60) as pool:
        items = [("\\boxed{\\sin^2 x+\\cos^2 x}", "1", "boxed"), ("\\boxed{7}", "7", "boxed")] * 3
        results = pool.map(items)
        assert [r.score for r in results] == [1.0] * 6 and results[0].stage == "symbolic"
        first = pool.take_latencies()
        assert len(first) == 2 and min(first) > 0
        assert pool.map(items) == results and pool.take_latencies() == []
        # another policy is another question
        assert pool.map(items[1:2], Policy(abs_tol=0.5))[0].correct and len(pool.take_latencies()) == 1


def test_the_package_by_itself():
    assert equal("\\sin^2 x+\\cos^2 x", "1").stage == "symbolic"
    assert equal(["2", "1"], "1") and not equal("2", "1")
    assert verify("\\boxed{1}", ["2", "1"]).correct
    assert verify("<answer>1</answer>", "2", mode="tag").score == 0.0


def test_it_needs_no_torch():
    code = (
        "import sys, pymathrl.verify as v\n"
        "assert v.equal('\\\\frac12', '0.5') and v.equal('1', '\\\\sin^2 x+\\\\cos^2 x')\n"
        "assert not {'torch', 'numpy', 'sympy'} & set(sys.modules), 'too much is imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("answer", ["sleep", "spin", "power"])
def test_what_hangs_is_killed_at_the_deadline_and_others_are_decided(hostile, answer):
    with VerifierPool(deadline_s=0.5) as pool:
        assert ask(pool, "gold")[0].equal  # the start is over
        begin = time.monotonic()
        verdicts = ask(pool, answer, "gold2", answer + " ", gold="gold2")
        assert time.monotonic() - begin < 0.5 + 2  # the machine may be busy
        assert verdicts[0] == Verdict(False, "timeout", "worker") and verdicts[1].equal and not verdicts[2]
        pool.take_latencies()
        assert ask(pool, answer, gold="gold2") == verdicts[:1]  # remembered: equal answers are graded alike
        assert pool.take_latencies() == []


def test_one_hang_after_the_other_costs_the_deadline_each_and_no_start(hostile):
    with VerifierPool(deadline_s=0.3) as pool:
        worker = int(ask(pool, "gold")[0].reason)
        (server,) = set(processes(hostile)) - {worker}
        begin = time.monotonic()
        for number in range(5):
            assert ask(pool, "spin", gold=str(number))[0].reason == "timeout"
        assert time.monotonic() - begin < 5 * (0.3 + 1)
        assert server in processes(hostile)  # all have been forked by the one that was there


@pytest.mark.parametrize("answer", ["die", "crash"])
def test_a_worker_that_dies_is_replaced(hostile, answer):
    with VerifierPool(workers=2, deadline_s=60) as pool:
        verdicts = ask(pool, answer, "gold", answer, "other")
        assert verdicts[0] == verdicts[2] == Verdict(False, "worker died", "worker")
        assert verdicts[1].equal and verdicts[3].stage == "symbolic" and not verdicts[3]
        assert ask(pool, "next", gold="next")[0].equal


def test_memory_is_bounded_and_a_worker_that_has_grown_is_replaced(hostile):
    with VerifierPool(deadline_s=60) as pool:
        assert ask(pool, "memory") == [Verdict(False, "out of memory", "worker")]
        first, grown, after = (ask(pool, answer)[0].reason for answer in ("a", "grow", "b"))
        assert first == grown != after
        # what waits while it goes is no victim of it
        for number in range(3):
            grown, *others = ask(pool, "grow", "c", "d", gold=str(number))
            assert [v.stage for v in others] == ["symbolic"] * 2 and grown.reason not in {v.reason for v in others}


def test_no_exception_and_no_output_of_a_library_gets_through(hostile):
    with VerifierPool(deadline_s=60) as pool:
        assert ask(pool, "raise") == [Verdict(False, "error: RecursionError", "error")]
        assert ask(pool, "print", gold="print")[0].equal


def test_a_worker_makes_room_after_its_tasks(hostile):
    with VerifierPool(max_tasks=3, deadline_s=60) as pool:
        pids = [ask(pool, str(number))[0].reason for number in range(9)]
        assert [len(set(pids[i : i + 3])) for i in (0, 3, 6)] == [1, 1, 1] and len(set(pids)) == 3
        assert reaches(hostile, 1)  # the one that forks


def test_what_is_killed_from_outside_comes_back(hostile):
    with VerifierPool(deadline_s=60) as pool:
        worker = int(ask(pool, "a")[0].reason)
        os.kill(worker, signal.SIGKILL)
        assert reaches(hostile, 1)
        assert ask(pool, "b")[0].stage == "symbolic"
        (server,) = set(processes(hostile)) - {int(ask(pool, "c")[0].reason)}
        future = pool.decide("gold", "sleep")
        time.sleep(0.1)
        os.kill(server, signal.SIGKILL)
        assert future.result() == Verdict(False, "worker died", "worker")
        assert ask(pool, "gold")[0].equal


def test_any_gold_of_several(hostile):
    with VerifierPool(workers=2, deadline_s=60) as pool:
        assert pool.decide(["a", "b"], "b").result().equal
        assert not pool.decide(["a", "b"], "c").result()
        with pytest.raises(ValueError, match="got none"):
            pool.decide([], "c")
    with VerifierPool(deadline_s=0.5) as pool:
        assert pool.decide(["a", "b"], "sleep").result().reason == "timeout"


def test_order_and_threads(hostile):
    with VerifierPool(workers=2, deadline_s=60) as pool:
        out = {}

        def work(name):
            golds = [f"{name}-{i}" for i in range(20)]
            items = [(f"\\boxed{{{gold if i % 3 else 'no'}}}", gold, "boxed") for i, gold in enumerate(golds)]
            out[name] = [r.score for r in pool.map(items)]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert out == {n: [float(i % 3 > 0) for i in range(20)] for n in range(8)}
        assert len(processes(hostile)) == 3


def test_equal_questions_at_the_same_time_are_one(hostile):
    with VerifierPool(workers=2, deadline_s=60) as pool:
        verdicts = ask(pool, *["slow"] * 10)
        assert len(set(verdicts)) == 1 and len(pool.take_latencies()) == 1


def test_nothing_is_left_after_close(hostile):
    before = descriptors(), threading.active_count(), children()
    for _ in range(3):
        pool = VerifierPool(workers=2, deadline_s=0.2)
        ask(pool, "gold", "spin", "die", "a", "b")
        waiting = pool.decide("gold", "sleep")
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            waiting.result()
        with pytest.raises(RuntimeError, match="closed"):
            pool.decide("gold", "later").result()
        pool.close()
        assert (descriptors(), threading.active_count(), children()) == before
        assert not processes(hostile)


def test_a_pool_that_nobody_holds_ends_itself(hostile):
    before = descriptors(), threading.active_count()
    pool = VerifierPool()
    ask(pool, "gold")
    del pool
    assert gone(hostile) and (descriptors(), threading.active_count()) == before


@pytest.mark.parametrize(
    "command, words",
    [
        (["/nowhere/python"], "cannot be started: '/nowhere/python'"),
        ([sys.executable, "-c", "raise ImportError('no sympy here')"], "ended: ImportError: no sympy here"),
        ([sys.executable, "-c", "import time; time.sleep(1000)"], "gave no sign of life in time"),
    ],
)
def test_a_worker_that_does_not_start_is_an_error_and_no_hang(command, words, hostile, monkeypatch):
    monkeypatch.setattr(pool_module, "START_S", 0.5)
    before = descriptors(), threading.active_count(), children()
    with VerifierPool(deadline_s=60) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(pool_module, "COMMAND", command)
            for _ in range(2):
                begin = time.monotonic()
                futures = [pool.decide("gold", answer) for answer in ("a", "b")]
                for future in futures:
                    with pytest.raises(UserError, match="worker process") as error:
                        future.result(timeout=20)
                    assert words in str(error.value)
                if "sleep" in command[-1]:
                    assert time.monotonic() - begin < 5
        assert (descriptors(), threading.active_count(), children()) == before
        monkeypatch.setattr(pool_module, "START_S", 60)
        assert ask(pool, "gold")[0].equal  # the next one that starts is used


def test_what_is_asked_while_a_failure_is_cleared_away_is_answered(hostile, monkeypatch):
    clearing, real = threading.Event(), pool_module._Loop._end_server

    def slow(loop):
        clearing.set()
        time.sleep(0.3)
        real(loop)

    monkeypatch.setattr(pool_module, "COMMAND", ["/nowhere/python"])
    before = descriptors(), threading.active_count()
    with VerifierPool() as pool, monkeypatch.context() as patch:
        patch.setattr(pool_module._Loop, "_end_server", slow)
        futures = [pool.decide("gold", "a")]
        assert clearing.wait(10)
        futures.append(pool.decide("gold", "b"))
        assert threading.active_count() == before[1] + 1  # two would take each other's server
        for future in futures:
            with pytest.raises(UserError, match="cannot be started"):
                future.result(timeout=20)
    assert (descriptors(), threading.active_count()) == before


def test_a_text_too_long_for_a_worker_is_different(hostile):
    with VerifierPool(deadline_s=60) as pool:
        assert ask(pool, "x" * 200_000) == [Verdict(False, "too long", "limits")]
        assert ask(pool, "\ud800" + "é" * 4000, gold="\ud800" + "é" * 4000)[0].equal


@pytest.mark.parametrize("options", [{"workers": 0}, {"deadline_s": 0}, {"deadline_s": float("inf")}, {"max_tasks": 0}])
def test_bad_arguments(options):
    with pytest.raises(ValueError, match=f"VerifierPool: {next(iter(options))} must be"):
        VerifierPool(**options)


PARENT = """
import os, sys, time
import pymathrl.verify.pool as p
p.COMMAND = [sys.executable, "-P", "-m", {name!r}]
p.decide = lambda gold, answer, cfg, symbolic: None
pool = p.VerifierPool(workers=2, deadline_s={deadline})
assert pool.decide("gold", "gold").result().equal
print("ready", flush=True)
{rest}
"""


def parent(hostile, rest, deadline=100):
    """A process whose pool has a worker running; it goes on with the lines `rest`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(name=hostile, rest=rest, deadline=deadline)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


BUSY = "pool.map([(f'\\\\boxed{{spin}}', str(n), 'boxed') for n in range(2)])"


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGINT, -2), (signal.SIGTERM, -15)])
def test_no_worker_outlives_its_process(hostile, number, code):
    process = parent(hostile, BUSY)
    assert reaches(hostile, 4)  # itself, the one that forks, two workers
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == code
    assert gone(hostile)


def test_an_exit_without_close_is_clean(hostile):
    process = parent(hostile, "pool.decide('gold', 'spin')")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, "", "")
    assert gone(hostile)


def test_the_kernel_ends_a_worker_whose_process_stands_still(hostile):
    process = parent(hostile, BUSY, deadline=1.9)
    try:
        assert reaches(hostile, 4)  # itself, the one that forks, two workers
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGSTOP)  # nobody keeps the deadlines now
        assert reaches(hostile, 2, seconds=30)
    finally:
        process.kill()
        process.communicate()
    assert gone(hostile)


def test_a_fork_has_a_pool_of_its_own(hostile):
    process = parent(
        hostile,
        "pid = os.fork()\n"
        "assert pool.decide('a', 'a').result().equal\n"
        "print(os.waitpid(pid, 0)[1] if pid else 'child', flush=True)",
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, sorted(out.split()), err) == (0, ["0", "child"], "")
