"""Grade one submission: run it shut in, ask it for values, and compare them here, where no student's code runs.

Nothing here knows of a folder or a table, so that it runs alike on this machine and on a cluster's.
"""

import contextlib
import json
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import sandbox
from inside.wire import KILL, STATE, TASK, VALUE, Line
from sandbox import STARTING, Limits

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 20 * 2**20  # of a notebook, without its outputs
MOST_NOTES = 1000  # that a submission's process may tell before the questions
MOST_ASKED_BACK = 100_000  # calls of other questions' functions in one question
MOST_ASKED_BYTES = 2**21  # of the arguments of such a call: over three times the largest matrix of a check


@dataclass(frozen=True)
class Job:
    """All that it takes to grade a lab anywhere: the programs and the checks, as text."""

    lab: str
    seed: int | None
    programs: dict[str, str]
    checks: dict[str, str]  # of each question
    points: dict[str, list[tuple[bool, float]]]  # of each check of each question: hidden or not, points
    limits: Limits
    container: str | None = None


def job_of(lab: str, limits: Limits, container: str | None = None, grader: Path | None = None) -> Job:
    """The job of grading a lab, read from what `make labs` made. Raises FileNotFoundError where that is missing."""
    grader = grader or ROOT / "_build" / "labs" / f"{lab}.zip"
    if not grader.exists():
        raise FileNotFoundError(f"there is no grader {grader}: run `make labs` first")
    with zipfile.ZipFile(grader) as archive:
        names = [name for name in archive.namelist() if name.startswith("tests/")]
        checks = {Path(name).stem: archive.read(name).decode() for name in names}
    checks = {question: checks[question] for question in sorted(checks, key=number)}
    found = {
        int(line.removeprefix("SEED = "))
        for text in checks.values()
        for line in text.splitlines()
        if line.startswith("SEED = ")
    }
    points = {question: [(case.hidden, case.points) for case in cases(text)] for question, text in checks.items()}
    return Job(lab, min(found, default=None), sandbox.programs(), checks, points, limits, container)


def number(question: str) -> int:
    """10 of q10: questions go in this order."""
    return int(question[1:])


def cases(source: str) -> list:
    """The checks in a test file of otter's."""
    from otter.test_files.exception_test import ExceptionTestFile

    return ExceptionTestFile.from_string(source).test_cases


def grade_one(name: str, notebook: bytes, job: Job) -> dict:
    """One submission's row and report. Never raises: what goes wrong is the outcome.

    Where it is the grader that failed, the row has no points, and `graded` is False.
    """
    start = time.monotonic()
    conversation = Conversation(job)
    try:
        conversation.run(notebook)
    except Failed as failed:
        conversation.failed = str(failed)
    except Exception as error:
        conversation.failed = f"{type(error).__name__}: {error}"
    return conversation.row() | {"student": name, "seconds": round(time.monotonic() - start, 1)}


def not_graded(name: str, job: Job, why: str) -> dict:
    """The row of a submission that the grader, for this reason, has not graded."""
    conversation = Conversation(job)
    conversation.failed = why
    return conversation.row() | {"student": name, "seconds": 0.0}


class Failed(Exception):
    """The grader, or this machine, has failed: that is no mark of the student's."""


class Gone(Exception):
    """The submission can't answer any more: the question's process has ended, was late, or all of it has."""


# what no answer makes of a check, so that it is no finding about one
GRADERS_OWN = (Failed, Gone, MemoryError, OSError, ImportError)


class Conversation:
    """All that passes between the grader and one submission."""

    def __init__(self, job: Job):
        self.job, self.ended, self.layers, self.peak, self.cpu = job, "", [], 0, 0.0
        self.notes, self.errors, self.names, self.results = [], [], None, {}
        self.unreadable, self.line, self.finished = "", None, False
        self.failed, self.began, self.told = "", False, 0  # the grader itself; the submission's cells; their words
        self.over = False  # nothing is asked any more

    def run(self, notebook: bytes) -> None:
        """Have the notebook's cells run, then make each question's checks."""
        try:
            text = stripped(notebook)
        except ValueError as error:
            self.unreadable = str(error)
            return
        if len(text) > MOST_BYTES:
            self.unreadable = f"{len(text):,} characters without its outputs, more than a notebook may have"
            return
        limits = self.job.limits
        task = {
            "lab": self.job.lab, "memory_bytes": limits.memory_bytes, "seconds": limits.seconds,
            "cell_seconds": limits.cell_seconds, "processes": limits.processes,
        }  # fmt: skip
        if self.job.container:
            running = sandbox.start_in_container(self.job.container, task, limits, self.job.programs)
        else:
            server = sandbox.server(self.job.lab, self.job.programs)
            running, self.layers = server.start(task), list(server.layers)
        self.line, self.end = Line(running.read, running.write), time.monotonic() + STARTING
        try:
            self.talk(text)
        except Gone as gone:
            self.ended = self.ended or str(gone)
        finally:
            try:
                running.hang_up()
                self.hear_the_end()
            finally:
                running.end()
        if not (self.finished or self.unreadable):
            if not self.ended:
                raise Failed("what watches the submission ended without its last word")
            if not self.began:
                raise Failed(f"before the first cell: {self.ended}")

    def talk(self, text: str) -> None:
        """Cells first; then each question, in a process of its own inside."""
        self.send(text)
        while self.names is None and not self.unreadable:
            self.note(self.hear())
        if self.unreadable:
            return
        self.kill()  # what the cells have started: a fork of theirs still has the package's solutions
        for question, source in self.job.checks.items():
            with contextlib.suppress(Late):
                self.check(question, cases(source))
        self.finished = True

    def check(self, question: str, found: list) -> None:
        """All checks of a question, the visible ones first, within its budget of time."""
        from nf4lab.labs import feedback

        seconds = self.job.limits.question_seconds
        self.send({"question": question, "seconds": seconds})
        self.await_("started")
        asking = Asking(self, 4 * seconds + 10)
        env = {name: asking.remote(name, entry) for name, entry in self.names.items()}
        try:
            for position, case in sorted(enumerate(found), key=lambda item: item[1].hidden):
                result = {"name": case.body.test_func.__name__.replace("_", " ")}
                self.results[question, position] = result
                if asking.over:
                    result |= {"passed": False, "message": asking.over, "causes": ()}
                    continue
                try:
                    with feedback.forgiving() if case.hidden else contextlib.nullcontext():
                        case.body.call_func(env)
                    result |= {"passed": True, "message": "", "causes": ()}
                    if case.hidden:
                        self.try_canary(question, case, asking, env)
                except feedback.Mistake as mistake:
                    result |= {"passed": False, "message": str(mistake), "causes": mistake.causes}
                except GRADERS_OWN:
                    raise
                except Exception as error:  # whatever a strange answer makes of a check
                    if "can't allocate memory" in str(error):  # as torch says it
                        raise
                    text = str(error) if isinstance(error, Late) else f"{type(error).__name__}: {error}"
                    result |= {"passed": False, "message": text, "causes": ()}
        finally:
            if not self.ended:
                self.send({"end": True})
                self.await_("ended")

    def try_canary(self, question: str, case, asking: "Asking", env: dict) -> None:
        """Make a check that passed once more, with an answer that is known to be wrong: only a tampered one passes."""
        import importlib

        from nf4lab.labs import feedback

        canaries = getattr(importlib.import_module(f"nf4lab.labs.{self.job.lab}"), "CANARIES", {}).get(question)
        if not canaries:
            return
        wrong = {name: asking.remote(name, env[name]._entry, text) for name, text in canaries.items()}
        try:
            with feedback.at_once():
                case.body.call_func(env | wrong)
        except GRADERS_OWN:
            raise
        except Exception:
            return
        self.notes.append(
            f"FORGED? a check of {question} passes an answer that is known to be wrong: read the notebook"
        )

    def send(self, what) -> None:
        """Send plain data inside."""
        from nf4lab.labs import plain

        self._send(TASK, plain.dumps(what))

    def kill(self) -> None:
        """Have all that the submission's process has started ended: the question's process too."""
        self._send(KILL, b"")

    def _send(self, kind: bytes, body: bytes) -> None:
        try:
            self.line.send(kind, body)
        except OSError:
            raise Gone from None

    def hear(self, until: float | None = None) -> dict:
        """The next message of the submission. Raises Gone where there is none any more, Late after `until`."""
        from nf4lab.labs import plain

        while True:
            now = time.monotonic()
            end = min(self.end, until or self.end)
            try:
                message = self.line.receive(max(0.0, end - now))
            except TimeoutError:
                if end == self.end and not self.over:
                    raise Failed("the grader heard nothing any more") from None
                raise Late from None
            except ValueError:
                raise Gone("told the grader too much") from None
            if message is None:
                raise Gone
            if message[0] == STATE:
                self.state(json.loads(message[1]))
                if self.ended:
                    raise Gone(self.ended)
            elif message[0] == VALUE:
                try:
                    found = plain.loads(message[1])
                    if not isinstance(found, dict):
                        raise ValueError
                except ValueError:
                    raise Gone("told the grader what cannot be read") from None
                if "broken" in found:
                    if not self.began:
                        raise Failed(str(found["broken"])[:300])
                    self.notes.append(f"broke off: {str(found['broken'])[:300]}")
                    if self.over:
                        continue
                    raise Gone
                self.began = True
                if "refused" not in found:
                    return found
                self.note({"refused": found["refused"]})  # and no more, since it may have data by now

    def state(self, what: dict) -> None:
        """What the supervisor, which runs no student's code, has to say."""
        if "layers" in what:  # it has started: a container may take a minute until then
            self.layers += what["layers"]
            self.end = time.monotonic() + self.job.limits.seconds + 30
        self.peak, self.cpu = max(self.peak, what.get("peak", 0)), what.get("cpu", 0.0)
        if "ended" in what:
            self.ended = what["ended"] or ("" if self.finished or self.unreadable else "ended itself")
        if "broken" in what:
            raise Failed(what["broken"])

    def note(self, told: dict) -> None:
        """What the submission's process tells before the questions: its errors, what it tried."""
        self.told += 1
        if self.told > MOST_NOTES:
            raise Gone("told the grader too much")
        if "unreadable" in told:
            self.unreadable = str(told["unreadable"])[:200]
        if "cell" in told:
            self.errors.append(f"cell {told['cell']}: {told.get('error')}"[:2100])
        self.notes += [f"tried to {str(told['refused'])[:200]}"] if "refused" in told else []
        for key, words in (
            ("replaced", "replaced {}"), ("suspect", "uses {}: read the notebook"),
            ("twice", "defines {} twice: the last one counts"),
        ):  # fmt: skip
            values = told.get(key) or []
            if isinstance(values, list | tuple):
                self.notes += [words.format(str(value)[:100]) for value in values[:100]]
        if told.get("ran"):
            names = told.get("names")
            self.names = names if isinstance(names, dict) else {}

    def await_(self, what: str) -> None:
        """Wait for the runner's word. Raises Gone where anything else comes."""
        if what not in self.hear():
            raise Gone("told the grader what its own process does not")

    def hear_the_end(self) -> None:
        """Hear what it took, until the line ends."""
        self.over = True
        with contextlib.suppress(Gone, Late, OSError, ValueError):
            end = self.end = time.monotonic() + (10 if self.finished else 60)
            while not self.ended:
                self.hear(end)

    def row(self) -> dict:
        """Points by the grader's own list of checks; the outcome and notes in words."""
        scores, report = dict.fromkeys(self.job.points, 0.0), []
        for question, checks in self.job.points.items():
            for position, (hidden, points) in enumerate(checks):
                result = self.results.get((question, position), {})
                scores[question] += points * (result.get("passed") is True)
                report.append({"question": question, "hidden": hidden, "points": points, "passed": False, "name": "",
                               "message": "not run", "causes": ()} | result)  # fmt: skip
        total = sum(scores.values())
        if self.failed:
            scores, total = dict.fromkeys(scores), None  # no points, rather than 0
        return {
            "score": total, "possible": sum(p for checks in self.job.points.values() for _, p in checks),
            "graded": not self.failed, "questions": scores, "outcome": self.outcome(), "errors": self.errors,
            "notes": list(dict.fromkeys(self.notes)),
            "checks": report, "layers": self.layers, "peak_mb": round(self.peak / 2**20),
            "cpu_s": round(self.cpu, 2),
        }  # fmt: skip

    def outcome(self) -> str:
        """How grading ended, in a few words."""
        if self.failed:
            return f"not graded: {self.failed}"
        if self.unreadable:
            return f"unreadable: {self.unreadable}"
        if self.ended and not self.finished:
            return self.ended
        n = len(self.errors)
        return f"graded; {n} cell{'s' * (n > 1)} failed" if n else "graded"


class Late(Exception):
    """A question's time is over."""


class Asking:
    """The calls of one question."""

    def __init__(self, conversation: Conversation, patience: float):
        self.conversation, self.patience, self.over, self.asked_back = conversation, patience, "", 0
        self.lent = 0.0  # seconds that such calls have taken here

    def remote(self, name: str, entry: dict, source: str | None = None):
        """A student's function, as checks see it, or what a variable is; with a source, that in its place."""
        from nf4lab.labs.calls import Remote
        from nf4lab.labs.plain import Described

        if not isinstance(entry, dict) or not entry.get("callable"):
            return Described("", str(entry.get("text") if isinstance(entry, dict) else entry)[:100])
        has = entry.get("has") or ()
        key = name if source is None else f"{name} "  # no notebook has a variable of that name
        found = Remote(key, lambda task, others: self.ask(task, others, {key: source} if source else {}), tuple(has))
        found._entry = entry
        return found

    def ask(self, task: dict, others: dict, extra: dict[str, str]):
        """What a call gives: the value, or a Mistake. Meanwhile the functions of other questions are called back."""
        from nf4lab.labs.calls import Mistake

        if self.over:
            raise Late(self.over)
        names = {name: _n_arguments(other) for name, other in others.items() if name != task.get("name")}
        self.conversation.send({"task": task, "others": names, "extra": extra})
        while True:
            start = time.monotonic()
            try:
                told = self.conversation.hear(start + self.patience)
                self.patience -= time.monotonic() - start  # only waiting counts, not what the check itself computes
            except Late:
                self.conversation.kill()
                told = self.conversation.hear()
                told = {"late": f"no answer within {self.conversation.job.limits.question_seconds} s"}
            if "value" in told:
                return told["value"]
            if "mistake" in told:
                raise Mistake(str(told["mistake"])[:2000])  # without causes: a page tells those, and may hold no data
            if told.get("other") in names:
                self.conversation.send(self.called_back(others[told["other"]], told.get("args")))
                continue
            if "late" in told or "gone" in told:
                self.over = f"the question {told.get('late') or 'ended its process, and gets no more answers'}"
                raise Late(self.over)
            raise Gone("told the grader what its own process does not")

    def called_back(self, other, args) -> dict:
        """What another question's function gives, or the error that its arguments end in."""
        self.asked_back += 1
        if self.asked_back > MOST_ASKED_BACK or self.lent > self.conversation.job.limits.question_seconds:
            return {"error": "called too often, or for too long"}
        start = time.monotonic()
        try:
            if _n_bytes(args) > MOST_ASKED_BYTES:
                return {"error": f"called with more than {MOST_ASKED_BYTES:,} bytes"}
            return {"value": other(*args)}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300]}
        finally:
            self.lent += time.monotonic() - start


def _n_bytes(args: list | tuple) -> int:
    """What the arguments of a call hold, and what they ask for: beside a tensor, a whole number is a size."""
    if all(isinstance(value, bool | int | float | str) for value in args):
        return 8 * len(args)
    return sum(
        _n_bytes(value) if isinstance(value, list | tuple)
        else 4 * abs(value) if isinstance(value, int)
        else getattr(value, "nbytes", 8)
        for value in args
    )  # fmt: skip


def _n_arguments(function) -> int:
    import inspect

    return len(inspect.signature(function).parameters)


def stripped(notebook: bytes) -> str:
    """The notebook's text without its outputs, which no check looks at. Raises ValueError where it is none."""
    try:
        found = json.loads(notebook.decode("utf-8-sig"))
        cells = found.get("cells") if isinstance(found, dict) else None
        for cell in cells if isinstance(cells, list) else ():
            if isinstance(cell, dict):
                cell.pop("outputs", None)
                cell.pop("attachments", None)
        return json.dumps(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a notebook: {type(error).__name__}") from None
