"""Run submissions, shut in, and stand between them and the grader: not to be called by hand.

    python -B supervise.py alone TASK    one submission, with the grader at standard input and output
    python -B supervise.py serve TASK    many, each in a fork of this process, which has everything loaded

For each submission there are two processes. The supervisor (this file) never runs its code: it starts the runner
(runner.py) confined (confine.py), passes messages between it and the grader, watches its memory and processes, and
ends it. What the runner says is passed on as a value (wire.VALUE), what the supervisor itself finds as wire.STATE.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

import psutil
import runner
from confine import confine, die_with_parent, namespaces_work
from wire import KILL, STATE, VALUE, Line


class Supervisor:
    """What stands between the grader and one runner."""

    def __init__(self, grader: Line, runner: Line, task: dict):
        self.grader, self.runner, self.task = grader, runner, task
        self.peak, self.ended, self.looked, self.measured = 0, "", 0.0, time.monotonic()

    def watch(self, child: int) -> None:
        """Pass messages on until the runner ends or has to be ended, then say how it was."""
        end = time.monotonic() + self.task["seconds"]
        try:
            while not self.ended:
                if time.monotonic() > end:
                    self.ended = f"time limit ({self.task['seconds']} s)"
                self.look(child)
                ready = select.select([self.grader.read, self.runner.read], [], [], 0.1)[0]
                if self.grader.read in ready and not self.from_grader(child):
                    break
                if self.runner.read in ready and not self.from_runner():
                    break
        finally:
            self.stop(child)
        taken = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        with contextlib.suppress(OSError):
            self.tell(ended=self.ended, peak=self.peak, cpu=sum(one.ru_utime + one.ru_stime for one in taken))

    def tell(self, **state) -> None:
        """Tell the grader what the runner has no say in."""
        self.grader.send(STATE, json.dumps(state).encode())

    def from_grader(self, child: int) -> bool:
        """Pass on what the grader says; False where it has gone."""
        if not self.grader.fill():
            return False
        while message := self.grader.waiting():
            if message[0] == KILL:
                self.end_question(child)
            else:
                with contextlib.suppress(OSError):
                    self.runner.send(*message)
        return True

    def from_runner(self) -> bool:
        """Pass on what the runner says; False where it has ended."""
        if not self.runner.fill():
            return False
        try:
            while message := self.runner.waiting():
                self.grader.send(VALUE, message[1])
        except ValueError:
            self.ended = "told the grader too much"
        return True

    def look(self, child: int) -> None:
        """Measure the processes at most four times a second, and decide whether they take too much."""
        now = time.monotonic()
        if now - self.looked < 0.25:
            return
        most, memory = self.task["processes"], self.task["memory_bytes"]
        processes, self.looked = family(child), now
        if len(processes) > most + 2:  # to read what very many hold takes a while
            self.ended = f"more than {most} processes"
        elif (resident(processes) > 1.25 * memory or now - self.measured > 2) and self.measure(
            processes
        ) > 1.25 * memory:
            self.ended = f"memory limit ({memory / 2**30:g} GB)"

    def measure(self, processes: list[psutil.Process]) -> int:
        """Bytes that the processes hold; the most of them is told. It takes a hundred times as long as `resident`."""
        used, self.measured = held(processes), time.monotonic()
        self.peak = max(self.peak, used)
        return used

    def end_question(self, child: int) -> None:
        """End whatever the runner has started; the runner itself goes on with the next question."""
        for process in family(child)[1:]:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def stop(self, child: int) -> None:
        """End the runner and all that came from it."""
        processes = family(child)
        self.measure(processes)
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def family(pid: int) -> list[psutil.Process]:
    """The process and all that came from it."""
    try:
        return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return []


def resident(processes: list[psutil.Process]) -> int:
    """Bytes that they have in memory, what they share counted for each: never less than `held`, and soon read."""
    used = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            used += process.memory_info().rss
    return used


def held(processes: list[psutil.Process]) -> int:
    """Bytes that they hold; what a fork shares with others counts in shares, where the system can tell (Linux)."""
    used = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                used += process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):
                used += process.memory_info().rss
    return used


def run(task: dict, grader: Line, spaces: bool) -> None:
    """One submission from beginning to end; returns in no process. spaces: whether it gets namespaces of its own."""
    mine, its = socket.socketpair()
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 20, 0))  # a runner that does not listen
    line = Line(its.fileno(), its.fileno())

    def waits(child: int) -> None:
        its.close()
        Supervisor(grader, Line(mine.fileno(), mine.fileno()), task).watch(child)

    try:
        os.environ.clear()
        os.environ.update(task["environment"])
        folder = Path(task["folder"])
        layers = confine(folder, task["readable"], task["memory_bytes"], task["seconds"], spaces, waits)
        mine.close()
        grader.send(STATE, json.dumps({"layers": layers}).encode())
        grader.close()
        runner.run_or_tell(task, line)
    except BaseException as error:
        with contextlib.suppress(OSError):
            grader.send(STATE, json.dumps({"broken": f"{type(error).__name__}: {error}"[:500]}).encode())
    finally:
        os._exit(0)


def own_line() -> Line:
    """The line at standard input and output, and nothing there from now on."""
    line, nowhere = Line(os.dup(0), os.dup(1)), os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    return line


def serve(task: dict) -> None:
    """Load everything once, then run each submission that the grader sends in a fork of this process.

    A message is a task and the two ends of its line; the answer is one byte.
    """
    grader = socket.socket(fileno=os.dup(0))
    own_line().close()  # a second way to the grader would be open in every fork: one could take another's task from it
    spaces = namespaces_work()
    runner.load(task["lab"], task["readable"])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    grader.send(b"ready")
    while True:
        message, ends, *_ = socket.recv_fds(grader, 2**16, 2)
        if not message:
            return
        if not os.fork():
            grader.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            die_with_parent()
            run(json.loads(message), Line(*ends), spaces)
        for end in ends:
            os.close(end)


def alone(task: dict) -> None:
    """Run one submission, with the grader at standard input and output."""
    line, spaces = own_line(), namespaces_work()
    runner.load(task["lab"], task["readable"])
    run(task, line, spaces)


if __name__ == "__main__":
    {"alone": alone, "serve": serve}[sys.argv[1]](json.loads(sys.argv[2]))
