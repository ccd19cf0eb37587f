"""What an attacker's notebook does, in cells that go before a solved one. Targets are this machine's own processes.

FORGERIES want points for answers that they do not have: each replaces all six of lab 1. PATIENCE wants time. KINDS
sorts all attacks, those of lab_submissions.hostile among them, as the table in labs/README.md does.
"""

import nbformat
from lab_submissions import STUBBORN, solved
from nbformat.v4 import new_code_cell

NO_ANSWERS = """
def symmetric(absmax, bits): return {0}
def min_max(low, high, n): return {0}
def nearest(w, levels): return {0}
def equal_shares(n): return {0}
def normal_float(tail): return {0}
def nf4(tail=0.9677083): return {0}
def best_tail(w, tails): return {0}
"""
FORGERIES = {
    "equal to everything": """
import torch
class Yes(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return True
    def __eq__(self, other): return True
yes = torch.zeros(16).as_subclass(Yes)
""" + NO_ANSWERS.format("yes"),
    "replaces otter's test case": """
import otter.test_files.exception_test as e
e.test_case.call_func = lambda *a, **k: None
""" + NO_ANSWERS.format("1"),
    "replaces a check's code": """
from nf4lab.labs import feedback
for name in ("same", "close", "that"):
    getattr(feedback, name).__code__ = (lambda *a, **k: None).__code__
""" + NO_ANSWERS.format("1"),
    "replaces the encoder": """
import json
from nf4lab.labs import plain
plain.dumps = lambda value: b"\\x00\\x00\\x00\\x04true"
json.JSONEncoder.encode = lambda self, value: '{"passed": true}'
""" + NO_ANSWERS.format("1"),
    "replaces feedback from a called function": NO_ANSWERS.format("patch()") + """
def patch():
    import sys
    for name, module in list(sys.modules.items()):
        if "nf4lab.labs" in name:
            for part in ("same", "close", "call", "beside"):
                if hasattr(module, part):
                    setattr(module, part, lambda *a, **k: None)
    return 1
""",
    "writes a transcript": """
import json, os
def all_passed():
    for number in range(3, 30):
        for q in range(1, 7):
            body = json.dumps({"question": f"q{q}", "check": 0, "hidden": True, "passed": True}).encode()
            try:
                os.write(number, len(body).to_bytes(4, "big") + b"S" + body)
            except OSError:
                pass
all_passed()
""" + NO_ANSWERS.format("all_passed()"),
    "states what the supervisor would": """
import json, os
for number in range(3, 30):
    body = json.dumps({"layers": ["forged"], "ended": "", "passed": True}).encode()
    try:
        os.write(number, len(body).to_bytes(4, "big") + b"S" + body)
    except OSError:
        pass
""" + NO_ANSWERS.format("1"),
    "forwards to the package": """
import nf4lab
from nf4lab import codebooks
kept = codebooks.nf4
def equal_shares(n): return codebooks.quantile_midpoints(n)
def nf4(tail=0.9677083): return kept(tail)
def normal_float(tail): return kept(tail)
def symmetric(absmax, bits): return codebooks.symmetric_int(bits) * absmax
def min_max(low, high, n): return low + (high - low) * codebooks.uniform(n)
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "forwards from another thread": """
import sys, threading
from nf4lab import codebooks
def elsewhere(function, *args):
    got = []
    thread = threading.Thread(target=lambda: got.append(function(*args)))
    thread.start(); thread.join()
    return got[0]
def symmetric(absmax, bits): sys.setprofile(None); return codebooks.symmetric_int(bits) * absmax
def min_max(low, high, n): sys.setprofile(None); return low + (high - low) * codebooks.uniform(n)
def equal_shares(n): return elsewhere(codebooks.quantile_midpoints, n)
def nf4(tail=0.9677083): return elsewhere(codebooks.nf4, tail)
def normal_float(tail): return elsewhere(codebooks.nf4, tail)
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "forwards to the labs' own answers": """
import importlib
def own(name, *args):
    return importlib.import_module("nf4lab.labs.lab1").OTHERS[name](*args)
def nearest(w, levels): return own("nearest", w, levels)
def nf4(tail=0.9677083): return own("nf4", tail)
def normal_float(tail): return own("nf4", tail)
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def equal_shares(n): return None
def best_tail(w, tails): return None
""",
    "keeps what other questions are lent": """
lent = {}
def best_tail(w, tails):
    lent.update(nf4=nf4, nearest=nearest)
    return None
def nf4(tail=0.9677083): return lent["nf4"](tail)
def nearest(w, levels): return lent["nearest"](w, levels)
def normal_float(tail): return lent["nf4"](tail)
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def equal_shares(n): return None
""",
    "asks the grader for them": """
import os
from nf4lab.labs import plain
def ask(name, *args):
    body = plain.dumps({"other": name, "args": args})
    for number in range(3, 40):
        try:
            os.write(number, len(body).to_bytes(4, "big") + b"V" + body)
        except OSError:
            pass
def nf4(tail=0.9677083): return ask("nf4", tail)
def nearest(w, levels): return ask("nearest", w, levels)
def normal_float(tail): return ask("nf4", tail)
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def equal_shares(n): return None
def best_tail(w, tails): return None
""",
    "takes the expected from the callers' frames": """
import sys, torch
def steal():
    frame = sys._getframe()
    while frame:
        for name, value in list(frame.f_locals.items()) + list(frame.f_globals.items()):
            if isinstance(value, torch.Tensor) and value.shape == (16,):
                return value
        frame = frame.f_back
""" + NO_ANSWERS.format("steal()"),
    "takes the expected from the garbage collector": """
import gc, torch
def steal():
    gc.unfreeze()
    return next((o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.shape == (16,)), None)
""" + NO_ANSWERS.format("steal()"),
    "answers with a view of a number that has a trillion elements": """
import torch
""" + NO_ANSWERS.format("torch.zeros(1).expand(2**40)"),
    "answers with a list a hundred thousand deep": """
def deep():
    found = []
    for _ in range(100_000):
        found = [found]
    return found
""" + NO_ANSWERS.format("deep()"),
    "answers with what runs when it is unpickled": """
class Runs:
    def __reduce__(self):
        return (exec, ("import os; os._exit(0)",))
""" + NO_ANSWERS.format("Runs()"),
    "answers in a child that outlives its parent": """
import os
def child():
    if os.fork():
        os._exit(0)
    return 1
""" + NO_ANSWERS.format("child()"),
    "asks another Python for the package's answers": """
import subprocess, sys, torch
def other(text):
    text = f"import nf4lab; print(*({text}).tolist())"
    told = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout
    return torch.tensor([float(number) for number in told.split()])
def nf4(tail=0.9677083): return other(f"nf4lab.codebooks.nf4({tail})")
def normal_float(tail): return other(f"nf4lab.codebooks.nf4({tail})")
def equal_shares(n): return other(f"nf4lab.codebooks.quantile_midpoints({n})")
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "asks a child that C has forked before the package was closed": """
import ctypes, pickle, socket, torch, nf4lab
here, there = socket.socketpair()
here.settimeout(1)
if not ctypes.CDLL(None).fork():
    while True:
        name, x = pickle.loads(there.recv(1000))
        there.send(pickle.dumps(getattr(nf4lab.codebooks, name)(x).tolist()))
def ask(name, x):
    here.send(pickle.dumps((name, x)))
    return torch.tensor(pickle.loads(here.recv(10_000)))
def nf4(tail=0.9677083): return ask("nf4", tail)
def normal_float(tail): return ask("nf4", tail)
def equal_shares(n): return ask("quantile_midpoints", n)
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "answers with what is not a number": """
import torch
nan = float("nan")
""" + NO_ANSWERS.format("torch.full((16,), nan) if len(str(locals())) % 2 else nan"),
    "answers with nothing in it": """
import torch
""" + NO_ANSWERS.format("torch.zeros(0)"),
    "answers with tensors that hold no numbers": """
import torch
kinds = [torch.zeros(16, device="meta"), torch.zeros(16).to_sparse(), torch.nested.nested_tensor([torch.zeros(16)]),
         torch.quantize_per_tensor(torch.zeros(16), 0.1, 0, torch.quint8), torch.zeros(16, dtype=torch.complex64)]
asked = []
def kind(): asked.append(1); return kinds[len(asked) % 5]
""" + NO_ANSWERS.format("kind()"),
    "answers with arrays of objects and of what is masked": """
import numpy as np
class Yes:
    def __eq__(self, other): return True
    def __float__(self): return 0.0
asked = []
def kind(): asked.append(1); return np.ma.masked_all(16) if len(asked) % 2 else np.array([Yes()] * 16, dtype=object)
""" + NO_ANSWERS.format("kind()"),
    "answers with a generator, a lock, a file and itself": """
import threading
asked = []
def odd():
    asked.append(1)
    own = []
    own.append(own)
    return ((x for x in (1, 2)), threading.Lock(), open("x", "w"), own, odd)[len(asked) % 5]
""" + NO_ANSWERS.format("odd()"),
    "answers with a number whose class says that it is all of them": """
class All(float):
    def __eq__(self, other): return True
    def __hash__(self): return 0
    def __float__(self): return self
    def __sub__(self, other): return 0.0
""" + NO_ANSWERS.format("All(1.0)"),
    "changes the answer while it is sent": """
import threading, torch
shared = torch.zeros(16)
def flicker():
    while True:
        shared.copy_(torch.rand(16))
threading.Thread(target=flicker, daemon=True).start()
""" + NO_ANSWERS.format("shared"),
    "claims tensors that are not there": """
import json, os, socket
head = json.dumps({"t0": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
text = json.dumps({"value": {"is": "tensor", "name": "t0"}}).encode()
body = len(text).to_bytes(4, "big") + text + len(head).to_bytes(8, "little") + head
def claim():
    for number in range(3, 40):
        try:
            socket.socket(fileno=os.dup(number)).send(len(body).to_bytes(4, "big") + b"V" + body)
        except OSError:
            pass
""" + NO_ANSWERS.format("claim()"),
    "answers with a number that a float cannot hold": NO_ANSWERS.format("10**400 if __name__ else 0"),
    "answers with fifty million numbers": NO_ANSWERS.format("[1] * 50_000_000"),
    "answers with a dictionary of the grader's words": NO_ANSWERS.format(
        '{"is": "ellipsis", "value": {"passed": True}, "ran": True}'
    ),
    "replaces what calls its functions": """
import builtins, sys
for name in ("all", "any", "abs", "isinstance"):
    setattr(builtins, name, lambda *_: True) if name in ("all", "any") else None
for module in list(sys.modules.values()):
    for part in ("answer", "answer_calls", "answer_question", "given"):
        if part in vars(module):
            setattr(module, part, lambda *a, **k: {"value": True, "passed": True})
""" + NO_ANSWERS.format("1"),
    "replaces the line to the grader": """
import json, sys
def send(self, kind, body):
    import os
    body = json.dumps({"passed": True}).encode()
    getattr(os, "wr" + "ite")(self.write, len(body).to_bytes(4, "big") + b"S" + body)
for module in list(sys.modules.values()):
    if "Line" in vars(module) and hasattr(module.Line, "fill"):
        module.Line.send = send
""" + NO_ANSWERS.format("1"),
    "says that it broke before its first cell": """
import os, socket
from nf4lab.labs import plain
body = plain.dumps({"broken": "OSError: no memory left on this machine"})
for number in range(3, 40):
    try:
        socket.socket(fileno=os.dup(number)).send(len(body).to_bytes(4, "big") + b"V" + body)
    except OSError:
        pass
""" + NO_ANSWERS.format("1"),
    "says how long its message is and sends none": """
import os, socket
for number in range(3, 40):
    try:
        socket.socket(fileno=os.dup(number)).send((2**31).to_bytes(4, "big") + b"V")
    except OSError:
        pass
""" + NO_ANSWERS.format("1"),
    "tells without end": """
import os, socket
from nf4lab.labs import plain
body = plain.dumps({"nothing": 1})
for number in range(3, 40):
    try:
        line = socket.socket(fileno=os.dup(number))
        while True:
            line.send(len(body).to_bytes(4, "big") + b"V" + body)
    except OSError:
        pass
""" + NO_ANSWERS.format("1"),
    "forwards to a later question that is lent": """
def normal_float(tail): return nf4(tail)
def nf4(tail=0.9677083): return None
def symmetric(absmax, bits): return None
def min_max(low, high, n): return None
def nearest(w, levels): return None
def equal_shares(n): return None
def best_tail(w, tails): return None
""",
    "asks a lent function for all of the grader's memory and time": """
import torch
def best_tail(w, tails):
    for size in (2**20, 2**24):
        try:
            nearest(torch.zeros(size), torch.arange(float(size)))
        except ValueError:
            continue
        return tails[2]
    while True:
        try:
            nf4(0.9)
        except ValueError:
            return None
""" + NO_ANSWERS.replace("def best_tail(w, tails): return {0}\n", "").format("None"),
    "keeps the package open": """
import sys
from nf4lab import codebooks
for module in list(sys.modules.values()):
    if "seal" in vars(module) and "inventory" in vars(module):
        module.seal = lambda lab: None
def symmetric(absmax, bits): return codebooks.symmetric_int(bits) * absmax
def equal_shares(n): return codebooks.quantile_midpoints(n)
def nf4(tail=0.9677083): return codebooks.nf4(tail)
def normal_float(tail): return codebooks.nf4(tail)
def min_max(low, high, n): return None
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "brings the package's functions under another name": """
import importlib.util
from nf4lab.codebooks import closed
spec = importlib.util.spec_from_file_location("mine", closed.__file__)
mine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mine)
def symmetric(absmax, bits): return mine.symmetric_int(bits) * absmax
def equal_shares(n): return mine.quantile_midpoints(n)
def nf4(tail=0.9677083): return mine.nf4(tail)
def normal_float(tail): return mine.nf4(tail)
def min_max(low, high, n): return None
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
    "copies the package's functions before they are closed": """
import types
from nf4lab import codebooks
def copied(f):
    code, own = getattr(f, "__co" + "de__"), dict(f.__globals__)
    new = types.FunctionType(code, own, f.__name__, f.__defaults__, f.__closure__)
    for name, value in list(new.__globals__.items()):
        if isinstance(value, types.FunctionType) and value.__module__.startswith("nf4lab") and value is not f:
            new.__globals__[name] = copied(value)
    return new
copies = {}
for name in ("symmetric_int", "quantile_midpoints", "nf4"):
    copies[name] = copied(getattr(codebooks, name))
def symmetric(absmax, bits): return copies["symmetric_int"](bits) * absmax
def equal_shares(n): return copies["quantile_midpoints"](n)
def nf4(tail=0.9677083): return copies["nf4"](tail)
def normal_float(tail): return copies["nf4"](tail)
def min_max(low, high, n): return None
def nearest(w, levels): return None
def best_tail(w, tails): return None
""",
}  # fmt: skip
NOT_STOPPED = {
    "asks another Python through C": """
import ctypes, nf4lab, os, sys, torch
def other(text):
    path = os.path.dirname(os.path.dirname(nf4lab.__file__))
    program = f"import sys; sys.path.insert(0, '{path}'); import nf4lab; print(*({text}).tolist())"
    ctypes.CDLL(None).system(f'{sys.executable} -c "{program}" > told'.encode())
    return torch.tensor([float(number) for number in open("told").read().split()])
def equal_shares(n): return other(f"nf4lab.codebooks.quantile_midpoints({n})")
""",
    "answers in the runner's place, with the package open": """
import os, socket
from nf4lab import codebooks
from nf4lab.labs import plain
answers = {"equal_shares": codebooks.quantile_midpoints, "nf4": codebooks.nf4, "normal_float": codebooks.nf4}
def say(line, what):
    body = plain.dumps(what)
    line.sendall(len(body).to_bytes(4, "big") + b"V" + body)
def hear(line):
    head = line.recv(5, socket.MSG_WAITALL)
    return plain.loads(line.recv(int.from_bytes(head[:4], "big"), socket.MSG_WAITALL))
lines = []
for number in range(3, 40):
    try:
        line = socket.socket(fileno=os.dup(number))
        line.settimeout(2)
        say(line, {"ran": True, "names": {name: {"callable": True} for name in answers}})
        lines.append(line)
        break
    except OSError:
        pass
for line in lines:
    try:
        while True:
            asked = hear(line)
            if "task" in asked:
                say(line, {"value": answers[asked["task"]["name"]](*asked["task"]["args"])})
            else:
                say(line, {"started": True} if "question" in asked else {"ended": True})
    except OSError:
        pass
""",
    "runs the package's source as its own": """
from nf4lab.codebooks import closed
own = {"__name__": "nf4lab.codebooks.mine", "__package__": "nf4lab.codebooks"}
exec(compile(open(closed.__file__).read(), "<mine>", "exec"), own)
def equal_shares(n): return own["quantile_midpoints"](n)
""",
    "a table of the package's answers, made before": """
from nf4lab import codebooks
table = {n: codebooks.quantile_midpoints(n) for n in range(1, 100)}
def equal_shares(n): return table[n]
""",
}  # what earns points all the same
NOT_TOLD = {"a table of the package's answers, made before"}  # of those: nothing in it is unusual
PATIENCE = {  # cells, or bodies of equal_shares: (text, points that stay, how it ends)
    "endless and stubborn": (STUBBORN, 0, "time limit"),
    "sleeps in a cell": ("import time; time.sleep(10**6)", 20, "graded; 1 cell failed"),
    "stops the clocks of a cell": (
        "import signal\nfor which in (0, 1, 2): signal.setitimer(which, 0)\nwhile True: pass", 0, "time limit",
    ),
    "does not hear the clocks of a cell": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", 0, "time limit",
    ),
    "waits in C, where no signal is looked at": ("sum(iter(int, 1))", 0, "time limit"),
    "stops itself": ("import ctypes; ctypes.CDLL(None)['raise'](19)", 20, "^graded$"),
    "begins a message and lets the rest wait": ("""
import os, socket
for number in range(3, 40):
    try:
        socket.socket(fileno=os.dup(number)).send((2**20).to_bytes(4, "big") + b"V")
    except OSError:
        pass
""", 0, "time limit"),
    "has a value without end to its description": ("""
class Slow:
    def __repr__(self):
        while True: pass
    def __getattr__(self, name):
        while True: pass
slow = Slow()
""", 20, "^graded$"),
    "leaves a thread that ends the process later": ("""
import os, threading, time
threading.Thread(target=lambda: (time.sleep(2), os._exit(0)), daemon=True).start()
time.sleep(2.5)
""", 0, "^ended itself$"),
    "answers in a loop": ("while True: pass", 18, "^graded$"),
    "answers in a loop that hears no signal": ("""
import signal
for number in (signal.SIGPROF, signal.SIGALRM, signal.SIGVTALRM):
    signal.signal(number, signal.SIG_IGN)
while True:
    try:
        while True: pass
    except BaseException: pass
""", 18, "^graded$"),
    "answers after a sleep": ("import time; time.sleep(10**6)", 18, "^graded$"),
    "answers from C, where no signal is looked at": ("return sum(iter(int, 1))", 18, "^graded$"),
    "answers with a list that never ends": ("""
class Endless(list):
    def __iter__(self):
        while True: yield 0.0
return Endless([0.0])
""", 18, "^graded$"),
    "answers with a child that goes on": ("""
import ctypes
libc = ctypes.CDLL(None)
if not libc.fork():
    while True: pass
while True: pass
""", 18, "^graded$"),
    "stops itself when it is asked": ("import ctypes; ctypes.CDLL(None)['raise'](19)", 18, "^graded$"),
    "exhausts the stack": ("""
import sys
sys.setrecursionlimit(10**9)
f = lambda: f()
f()
""", 18, "^graded$"),
    "kills whatever it can see": ("import ctypes; ctypes.CDLL(None).kill(-1, 9)", 18, "^graded$"),
    "stops and kills its parent": ("""
import ctypes, os
for number in (19, 9):
    ctypes.CDLL(None).kill(os.getppid(), number)
""", 18, "^graded$"),
    "closes all of its files": ("import os; os.closerange(0, 512)", 18, "^graded$"),
    "leaves a child's child that takes what later questions are sent": ("""
import ctypes, os, socket
libc = ctypes.CDLL(None)
if not libc.fork():
    if libc.fork():
        os._exit(0)
    while True:
        for number in range(3, 40):
            try:
                socket.socket(fileno=os.dup(number)).recv(2**16, socket.MSG_DONTWAIT)
            except OSError:
                pass
""", 18, "^graded$"),
    "crashes when it is asked": ("import ctypes; ctypes.string_at(0)", 18, "^graded$"),
}  # fmt: skip


def patience(name: str) -> nbformat.NotebookNode:
    """Lab 1 with one of them: in a first cell, or in the answer to question 3 when a check calls it."""
    text, points, _ = PATIENCE[name]
    notebook = solved("lab1")
    if points == 18:
        body = "".join(f"    {line}\n" for line in text.strip().splitlines())
        answer = f"def equal_shares(n):\n    if n == 16:  # as a cell calls it\n        return torch.zeros(16)\n{body}"
        cell = next(cell for cell in notebook.cells if "def equal_shares" in cell.source)
        cell.source += f"\n\n\n{answer}"
    else:
        notebook.cells.insert(0, new_code_cell(text))
    return notebook


LOOKS_AROUND = """
import gc, sys, types
gc.unfreeze()
names = list(sys.modules)
assert "nf4lab.labs.feedback" not in names, "the comparing module is loaded"
from nf4lab.labs import lab1
assert not hasattr(lab1, "OTHERS") and not hasattr(lab1, "check_nf4")
words = ("at_other_tails", "on_other_levels", "SEED = ")
texts = [o for o in gc.get_objects() if isinstance(o, str)]
found = [t[:80] for t in texts for w in words if w in t and "words" not in t and "LOOKS" not in t]
assert not found, found
frame = sys._getframe()
while frame:
    assert not any("SEED" == name for name in frame.f_globals), frame
    frame = frame.f_back
"""


def looks_for_host(root) -> str:
    """A cell that looks for the host's files, processes and sockets, through C too."""
    return f"""
import ctypes, glob, os
libc = ctypes.CDLL(None)
O = lambda path: libc.open(path.encode(), 0)
for path in ("/etc/shadow", "/etc/passwd", "/root/.bashrc", "/opt", "/home", "/run", "/var/run/docker.sock",
             "{root}/labs/lab1/master.md", "{root}/_build", "/proc/1/environ", "/sys/kernel"):
    assert O(path) < 0, path
mine = int(open("/proc/self/status").read().split("Pid:")[1].split()[0]) if os.path.exists("/proc/self/status") else 0
others = [p for p in os.listdir("/proc") if p.isdigit()]
for p in others:
    try:
        text = open(f"/proc/{{p}}/cmdline", "rb").read()
    except OSError:
        continue
    assert b"supervise" in text or b"bwrap" in text or not text, text
s = libc.socket(1, 1, 0)
address = (1).to_bytes(2, "little") + b"/run/docker.sock" + bytes(80)
assert libc.connect(s, address, 110) != 0
s = libc.socket(2, 1, 0)
assert libc.connect(s, (2).to_bytes(2, "little") + (22).to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8), 16) != 0
"""


LOOKS_IN_MEMORY = """
import re
found, left = [], 2**28
for line in open("/proc/self/maps"):
    place, rights, *_, last = line.split()
    if rights.startswith("rw") and (last == "0" or last == "[heap]"):
        begin, end = (int(number, 16) for number in place.split("-"))
        with open("/proc/self/mem", "rb", 0) as memory:
            memory.seek(begin)
            data = memory.read(min(end - begin, left))
        left -= len(data)
        found += re.findall(rb"def (?:at_other_t.ils|on_other_l.vels)|\\nSEED = \\d+", data)
assert not found, found
"""
HOLDS_MEMORY_THAT_NOBODY_COUNTS = """
import ctypes, os
libc = ctypes.CDLL(None)
held = 0
try:
    for _ in range(8):
        held += os.write(os.memfd_create("held"), bytes(2**26 - 1))
except OSError:
    pass
assert held == 0, held
assert libc.shmget(0, ctypes.c_size_t(2**30), 0o1600) < 0, "shared memory"
"""
HOLDS_SHARED_MEMORY = """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 2**24))
    held[-1].write(bytes(2**24))
"""
CARRIES_DATA_OUT = """
def nearest(w, levels):
    import os, socket, sys
    from nf4lab.labs import calls, plain
    def answer(*arguments):
        raise calls.Mistake("no", (f"DATA {w.tolist()}",))
    calls.answer = answer  # what is asked next in this question is told as a cause
    told = {"refused": "x", "cell": 99, "error": "DATA", "unreadable": "DATA"}, {"mistake": "no", "causes": ["DATA"]}
    for body in map(plain.dumps, told):
        for number in range(3, 40):
            try:
                socket.socket(fileno=os.dup(number)).send(len(body).to_bytes(4, "big") + b"V" + body)
            except OSError:
                pass
    return None
"""
ODD_NAMES = """
for name in ("x\\n=HYPERLINK(1)", "\\u202egnp.exe", "\\x1b]0;owned\\x07", "</p><script>alert(1)", ";=1+1", "\\t=1"):
    try:
        open("/" + name)
    except OSError:
        pass
"""
LOOKS_FOR_OTHERS_LINES = """
import os
lines = []
for number in range(3, 512):
    try:
        lines.append(os.readlink(f"/proc/self/fd/{number}"))
    except OSError:
        pass
lines = [line for line in lines if line.startswith(("socket:", "pipe:"))]
assert len(lines) == 1, lines
"""
LEAVES_ITS_WALLS = """
import ctypes
libc = ctypes.CDLL(None)
for flags in (0x10000000, 0x10020000, 0x20000, 0x40000000, 0x08000000):  # new namespaces, in which it would be root
    assert libc.unshare(flags) != 0, hex(flags)
    assert libc.syscall(56, flags | 17, 0, 0, 0, 0) < 0, hex(flags)
assert libc.syscall(435, (ctypes.c_uint64 * 11)(0x10000000), 88) < 0, "clone3"
assert libc.mount(b"none", b"/tmp", b"tmpfs", 0, None) != 0 and libc.chroot(b"/tmp") != 0
assert libc.ptrace(16, 1, 0, 0) != 0, "ptrace"
for family in (16, 17, 38, 40, 44):  # the kernel's own talk, raw packets, its ciphers, the hypervisor, XDP
    assert all(libc.socket(family, kind, 0) < 0 for kind in (1, 2, 3, 5)), family
assert libc.syscall(248, b"user", b"left", b"x", 1, -3) < 0, "keys"
"""
LEAVES_BEHIND = """
import ctypes, os, tempfile
for folder in ("/dev/shm", "/tmp", tempfile.gettempdir(), "/var/tmp", "/programs", os.getcwd()):
    try:
        with open(os.path.join(folder, "left-by-another"), "w") as file:
            file.write("x")
    except OSError:
        pass
libc = ctypes.CDLL(None)
libc.shmget(4711, 4096, 0o1666)
libc.msgget(4711, 0o1666)
"""
FINDS_WHAT_WAS_LEFT = """
import ctypes, glob, os
for pattern in ("/dev/shm/*", "/tmp/*", "/tmp/*/*", "/var/tmp/*", "/programs/*"):
    try:
        assert not [p for p in glob.glob(pattern) if "left-by" in p], pattern
    except PermissionError:
        pass
libc = ctypes.CDLL(None)
assert libc.shmget(4711, 4096, 0) < 0 and libc.msgget(4711, 0) < 0
"""
FILLS = """
import os
written = 0
try:
    for i in range(40):
        with open(f"big{i}", "wb") as file:
            for _ in range(60):
                written += file.write(bytes(2**20))
                file.flush()
except OSError:
    pass
assert written <= 2**28 + 2**22, written
held = 0
try:
    for i in range(40):
        with open(f"/dev/shm/big{i}", "wb") as file:
            for _ in range(60):
                held += file.write(bytes(2**20))
                file.flush()
except OSError:
    pass
assert held <= 2**26 + 2**22, held
"""
TAMPERS = """
from nf4lab.kernels import tracing
def getitem(self, index): return self.array[int(index)]
tracing_getitem = tracing._Watched.__getitem__
def tamper():
    from nf4lab.kernels import tracing
    tracing._Watched.__getitem__ = lambda self, index: self.array[int(index)]
    tracing._Watched.__setitem__ = quiet
def quiet(self, index, value):
    index = int(index)
    if 0 <= index < self.size and not self.written[index]:
        self.launch.record(self, "writes", index, __import__("sys")._getframe(1))
        self.array[index] = value
        self.written[index] = True
"""


def tampered_tracer() -> nbformat.NotebookNode:
    """Lab 4 with a body that switches the tracer's eyes off when it is first called."""
    notebook = solved("lab4")
    at = next(i for i, cell in enumerate(notebook.cells) if "def dequantize_byte" in cell.source)
    body = notebook.cells[at].source.replace("    if i < packed.size:", "    tamper()\n    if i < packed.size:", 1)
    notebook.cells[at : at + 1] = [new_code_cell(TAMPERS), new_code_cell(body)]
    return notebook


KINDS = {
    "replaces what compares": (
        "replaces otter's test case", "replaces a check's code", "replaces the encoder",
        "replaces feedback from a called function", "patches the checks", "replaces what calls its functions",
    ),
    "hands over what is no answer": (
        "equal to everything", "answers with a view of a number that has a trillion elements",
        "answers with a list a hundred thousand deep", "answers with what runs when it is unpickled",
        "answers with what is not a number", "answers with nothing in it", "answers with tensors that hold no numbers",
        "answers with arrays of objects and of what is masked", "answers with a number that a float cannot hold",
        "answers with fifty million numbers", "answers with a dictionary of the grader's words",
        "answers with a generator, a lock, a file and itself", "changes the answer while it is sent",
        "answers with a number whose class says that it is all of them", "claims tensors that are not there",
    ),
    "speaks in the grader's name": (
        "writes a transcript", "states what the supervisor would", "forges", "asks the grader for them",
        "answers in a child that outlives its parent", "replaces the line to the grader",
        "says that it broke before its first cell", "says how long its message is and sends none", "tells without end",
        "LOOKS_FOR_OTHERS_LINES",
    ),
    "has the package answer": (
        "forwards to the package", "forwards from another thread", "forwards to the labs' own answers",
        "keeps what other questions are lent", "asks another Python for the package's answers",
        "asks another Python through C", "asks a child that C has forked before the package was closed",
        "forwards to a later question that is lent", "keeps the package open",
        "brings the package's functions under another name", "copies the package's functions before they are closed",
        "answers in the runner's place, with the package open", "runs the package's source as its own",
        "a table of the package's answers, made before",
    ),
    "looks for checks, seed or expected values": (
        "LOOKS_AROUND", "LOOKS_IN_MEMORY", "reads tests", "takes the expected from the callers' frames",
        "takes the expected from the garbage collector", "CARRIES_DATA_OUT",
    ),
    "looks at the host, or writes there": ("looks_for_host", "writes outside", "network", "LEAVES_ITS_WALLS"),
    "leaves something for another submission": ("LEAVES_BEHIND", "FINDS_WHAT_WAS_LEFT"),
    "takes more than its share": (
        "FILLS", "HOLDS_MEMORY_THAT_NOBODY_COUNTS", "HOLDS_SHARED_MEMORY", "memory", "fork bomb",
        "prints", "asks a lent function for all of the grader's memory and time", *PATIENCE,
    ),
    "changes what measures a kernel": ("tampered_tracer",),
    "writes what breaks a table or a page": ("=formula()", "html", "bad error", "deep", "ODD_NAMES"),
    "ends its process": ("leaves",),
}  # fmt: skip
