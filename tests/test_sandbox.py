"""The sandbox: hostile code neither passes, hangs the run nor harms it; honest code passes."""
import concurrent.futures
import contextlib
import fcntl
import functools
import glob
import gzip
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from common import UserError
from evaluation import sandbox
from evaluation.sandbox import LIMITS, OUTPUT, PREFIX, run_python

PYTHON = sys.executable
ROOT = Path(__file__).parents[1]
HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
TESTS = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(5) == 6\n"
HONEST = "def f(x):\n    return x + 1\n"

# What a candidate process answers to its first call, by hand.
FORGED = """
    import os
    def f(x):
        os.write(61, {!r})
        os.read(60, 1 << 16)
        return 0"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")


@pytest.fixture(scope="module")
def namespaces():
    if run_python(HONEST, TESTS, "f").isolation == LIMITS:
        pytest.skip("no namespaces here")


def living():
    """(pid, name, parent) of every process of the machine."""
    for p in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, fields = p.read_text().partition("(")[2].rpartition(")")
            if fields.split()[0] not in "ZX":
                yield int(p.parent.name), name, int(fields.split()[1])


def names():
    return {name for _, name, _ in living()}


def descendants(root):
    processes, found = list(living()), {root}
    while more := {pid for pid, _, parent in processes if parent in found} - found:
        found |= more
    return found - {root}


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path_factory):
    """Whatever a test does, no process and no temporary directory of the sandbox is left."""
    tmp_path_factory.getbasetemp()  # pytest makes its own in the usual place first
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)  # as root the code runs as another user, who must get there
        monkeypatch.setattr(tempfile, "tempdir", place)
        before = descendants(os.getpid())
        yield
        assert descendants(os.getpid()) == before
        assert not list(Path(place).iterdir())


@pytest.fixture(params=["namespaces", "limits"])
def mode(request, monkeypatch):
    """Both ways in which the sandbox runs; where there are no namespaces the first is the second.
    """
    monkeypatch.setattr(sandbox, "USE_NAMESPACES", request.param == "namespaces")
    if request.param == "limits":
        monkeypatch.setattr(sys, "executable", readable_python())
    return request.param


@functools.cache
def readable_python():
    """A Python that other users can read, which root needs for the limits alone."""
    look = ("import os\nif os.getuid() == 0:\n    os.setuid(12345)\n"
            "os._exit(not os.access(os.__file__, os.R_OK))")
    for python in PYTHON, *glob.glob("/usr/bin/python3"):
        if subprocess.run([python, "-c", look]).returncode == 0:
            return python
    pytest.skip("no Python here that other users than root can read")


def run(program, timeout=10.0, tests=TESTS, **more):
    return run_python(textwrap.dedent(program), tests, "f", timeout, **more)


def test_honest_code_passes_and_wrong_code_fails(mode):
    assert run(HONEST).status == "passed"
    assert run("def f(x):\n    return x + 2\n").status == "failed"
    assert run("def f(x):\n    return 3\n").status == "failed"  # only the first assert holds
    wrong = run("def f(x)\n    return x + 1\n")
    assert wrong.status == "failed" and "SyntaxError" in wrong.output
    assert run("def g(x):\n    return x + 1\n").status == "failed"
    assert (run(HONEST).isolation == LIMITS) >= (mode == "limits")
    raised = run("def f(x):\n    raise KeyError('here')\n")
    assert raised.status == "failed" and "KeyError: 'here'" in raised.output


def test_a_broken_test_is_no_pass():
    assert run(HONEST, tests="def check(candidate):\n    raise ValueError\n").status == "failed"
    assert run(HONEST, tests="x = 1\n").status == "failed"


# Ways to pass without being right, against one harness or another: by the exit code, by what is
# printed, by what runs beside the asserts.
CHEATS = {
    "leaves at once": """
        import os
        os._exit(0)""",
    "leaves when called": """
        import os
        def f(x):
            os._exit(0)""",
    "sys.exit": """
        import sys
        sys.exit(0)""",
    "sys.exit when called": """
        import sys
        def f(x):
            sys.exit(0)""",
    "its own check": """
        def check(candidate):
            pass
        def f(x):
            return 0""",
    "equal to everything": """
        class Any:
            def __eq__(self, other):
                return True
        def f(x):
            return Any()""",
    "a number equal to everything": """
        class Any(int):
            def __eq__(self, other):
                return True
        def f(x):
            return Any(7)""",
    "builtins": """
        import builtins
        builtins.AssertionError = Exception
        builtins.exec = builtins.compile = lambda *a: None
        __builtins__ = {}
        def f(x):
            return 0""",
    "trace": """
        import sys
        sys.settrace(lambda *a: None)
        sys.excepthook = lambda *a: None
        def f(x):
            return 0""",
    "atexit": """
        import atexit, os
        atexit.register(os._exit, 0)
        def f(x):
            raise SystemExit""",
    "frames": """
        import sys
        def f(x):
            g = sys._getframe()
            while g:
                g.f_globals['passed'] = g.f_globals['check'] = lambda *a: True
                g = g.f_back
            return 0""",
    "reports for the tester": r"""
        import os
        for fd in range(64):
            try:
                os.write(fd, b'passed\npassed\n')
            except OSError:
                pass
        def f(x):
            return 0""",
    "prints the report": """
        print('passed')
        def f(x):
            print('passed')
            return 0""",
    "a pickle with a call": """
        import pickle
        class P:
            def __reduce__(self):
                import os
                return os._exit, (0,)
        def f(x):
            with open(61, 'wb', closefd=False) as w:
                w.write(pickle.dumps(('return', P(), {})))
            return P()""",
    "closes everything": """
        import os
        os.closerange(0, 4096)
        def f(x):
            return x + 1""",
    "kills its parent": """
        import os, signal
        os.kill(os.getppid(), 9)
        def f(x):
            return 0""",
    "reaches into the tester": """
        import os, signal
        def f(x):
            for pid in filter(str.isdigit, os.listdir('/proc')):
                if int(pid) != os.getpid():
                    for name in ('mem', 'fd/0', 'fd/4'):
                        try:
                            open(f'/proc/{pid}/{name}', 'r+b').write(b'passed')
                        except OSError:
                            pass
            return 0""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_does_not_pass(name):
    start = time.monotonic()
    assert run(CHEATS[name], timeout=5).status == "failed"
    assert time.monotonic() - start < 20  # the sandbox's start on a busy machine included


def test_the_tests_are_not_where_the_code_can_look():
    look = textwrap.dedent("""
        import gc, glob, os, sys
        seen = [sys.argv, dict(os.environ), sys.stdin.read(), gc.get_objects()]
        paths = [*glob.glob("./**", recursive=True), *glob.glob("/proc/self/*")]
        for path in paths + glob.glob("/proc/self/fd/*"):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                seen.append(os.read(fd, 1 << 20))
            except OSError:
                pass
        frame = sys._getframe()
        while frame:
            seen += [frame.f_locals, frame.f_globals]
            frame = frame.f_back
        # Python does not join these two when it compiles this.
        print("".join(["candidate", "(5)"]) in repr(seen))
    """)
    assert run(look + HONEST).output == "False\n"
    planted = "planted = 'candidate' '(5)'\n"
    assert run(planted + look + HONEST).output == "True\n"  # the search finds what is there


def test_a_cheat_that_guesses_the_protocol_gains_only_what_its_answers_are_worth():
    """Answers may be written ahead of the questions: they are compared like any others."""
    ahead = """
        import pickle
        w = open(61, 'wb', closefd=False)
        for y in {}:
            w.write(pickle.dumps(('return', y, {{}})))
        w.flush()
        def f(x):
            return 0"""
    assert run(ahead.format("(3, 5)")).status == "failed"
    assert run(ahead.format("(3, 6)")).status == "passed"


@pytest.mark.parametrize("program", [
    "while True:\n    pass",
    "def f(x):\n    while True:\n        pass",
    "import time\ntime.sleep(1000)",
    """
        import signal
        for s in (1, 2, 14, 15, 24):
            signal.signal(s, signal.SIG_IGN)
        def f(x):
            while True:
                pass""",
    "def f(x):\n    return 10 ** 10 ** 9",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
])
def test_an_endless_program_is_stopped(program):
    start = time.monotonic()
    assert run(program, timeout=0.3).status == "timed out"
    assert time.monotonic() - start < 15


def test_a_parent_killed_from_below_does_not_end_the_run(namespaces):
    """The candidate's parent is the first process of its namespace: signals from inside do not
    reach it.
    """
    kill = textwrap.dedent("""
        import os
        try:
            os.kill({}, 9)
        except OSError:
            pass
    """) + HONEST
    assert run(kill.format("os.getppid()")).status == "passed"
    victim = subprocess.Popen(["sleep", "60"])
    try:
        # It may hit the tester, where that has the same user.
        assert run(kill.format("-1")).status in ("passed", "failed")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_memory_is_limited(mode):
    big = run("def f(x):\n    data = bytearray(10 << 30)\n    return x + 1")
    assert big.status == "failed" and "MemoryError" in big.output
    assert run("def f(x):\n    data = bytearray(100 << 20)\n    return x + 1").status == "passed"
    tester = run(HONEST, tests="def check(candidate):\n    data = bytearray(3 << 30)\n")
    assert tester.status == "failed" and "MemoryError" in tester.output


def test_output_is_kept_up_to_its_limit():
    loud = run("import sys\nprint('first')\nfor i in range(1000):\n"
               "    sys.stdout.write('x' * 1000 + '\\n')\n" + HONEST)
    assert loud.status == "passed" and loud.output.startswith("first\nxxx")
    assert OUTPUT // 2 < len(loud.output) <= OUTPUT
    endless = run("import os\nwhile True:\n    os.write(1, b'x' * 65536)", timeout=0.5)
    assert endless.status == "timed out" and len(endless.output) == OUTPUT
    assert run("import os\nos.write(2, b'\\xff\\xfe')\n" + HONEST).output == "\ufffd\ufffd"


def test_a_fork_bomb_is_bounded(mode):
    """Counted from outside while it runs; a hard cap far above the limit ends the test's own
    sandbox if the limit fails.
    """
    name = f"bomb{os.getpid()}"
    bomb = f"""
        import ctypes, os
        ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)
        while True:
            try:
                os.fork()
            except OSError:
                pass"""
    most, over = 0, threading.Event()

    def count():
        nonlocal most
        while not over.wait(0.05):
            mine = descendants(os.getpid())
            most = max(most, len(mine))
            if len(mine) > 300:
                for pid in mine:
                    os.kill(pid, signal.SIGKILL)

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        outcome = run(bomb, timeout=1)
    finally:
        over.set()
        watcher.join()
    assert outcome.status == "timed out" and 10 < most < sandbox.PROCESSES + 10
    assert name not in names()
    assert run(HONEST).status == "passed"  # the machine forks again


def test_a_daemon_does_not_outlive_the_run(mode):
    """A child in a session of its own, whose parent has gone."""
    name = f"daemon{os.getpid()}"
    daemon = textwrap.dedent(f"""
        import ctypes, os, time
        if not os.fork():
            os.setsid()
            if os.fork():
                os._exit(0)
            ctypes.CDLL(None).prctl(15, b'{name}', 0, 0, 0)
            time.sleep(100)
        os.wait()
    """)
    for rest, seconds in (HONEST, 10), ("time.sleep(100)", 1), ("os._exit(0)", 1):
        assert (run(daemon + rest, timeout=seconds).status == "passed") == (rest == HONEST)
        assert name not in names()


def test_files_are_limited_and_go_with_the_run(mode):
    small = "open('a', 'w').write('x')\nassert open('a').read() == 'x'\n"
    assert run(small + HONEST).status == "passed"
    big = run("with open('big', 'wb') as f:\n    for i in range(100):\n"
              "        f.write(b'x' * (1 << 20))\n" + HONEST)
    assert big.status == "failed" and ("File too large" in big.output or big.output == "")


def test_many_files_are_limited(namespaces):
    many = run("for i in range(20):\n    open(str(i), 'wb').write(b'x' * (10 << 20))\n" + HONEST)
    assert many.status == "failed" and "No space left" in many.output


def test_nothing_outside_is_written(namespaces, tmp_path):
    tmp_path.chmod(0o777)
    for place in (tmp_path, Path.home(), ROOT):
        outcome = run(f"open({str(place / 'written')!r}, 'w')\n" + HONEST)
        assert outcome.status == "failed"
        assert any(e in outcome.output for e in ("Read-only", "Permission", "No such file"))
        assert not (place / "written").exists()


def test_the_home_directory_is_hidden(namespaces):
    with tempfile.NamedTemporaryFile("w", dir=Path.home(), prefix="secret-") as secret:
        secret.write("3 6")
        secret.flush()
        read = (f"a, b = map(int, open({secret.name!r}).read().split())\n"
                "def f(x):\n    return {2: a, 5: b}[x]")
        outcome = run(read)
        assert outcome.status == "failed" and "No such file" in outcome.output
        exec(compile(read, "here", "exec"), names := {})
        assert names["f"](5) == 6  # the same code passes where the file is seen


def test_other_processes_and_the_environment_are_not_seen(namespaces, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    look = ("import os\nfound = [p for p in os.listdir('/proc') if p.isdigit()]\n"
            "print(len(found), 'SECRET_TOKEN' in os.environ)\n")
    # The first process, this one and perhaps the tester.
    assert run(look + HONEST).output.split() in (["2", "False"], ["3", "False"])


def test_no_unix_socket_of_this_machine_is_reached(mode):
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as stream, \
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        os.chmod(place, 0o777)
        for name, server in ("stream", stream), ("datagram", datagram):
            server.bind(f"{place}/{name}")
            os.chmod(f"{place}/{name}", 0o777)
        stream.listen()
        datagram.setblocking(False)
        attempts = {
            "socket": "socket.socket(socket.AF_UNIX).connect(stream)",
            "datagrams": "socket.socket(1, socket.SOCK_DGRAM).sendto(b'x', datagram)",
            "a pair": "socket.socketpair(1, socket.SOCK_DGRAM)[0].sendto(b'x', datagram)",
            "flags": "socket.socket(1, socket.SOCK_DGRAM | 1 << 19).sendto(b'x', datagram)",
            "any child": "subprocess.run([sys.executable, '-c', 'import socket\\n'"
                         "'socket.socket(1).connect(' + repr(stream) + ')'], check=True)"}
        for name, attempt in attempts.items():
            code = (f"import socket, subprocess, sys\nstream = {place + '/stream'!r}\n"
                    f"datagram = {place + '/datagram'!r}\n{attempt}\n" + HONEST)
            outcome = run(code)
            assert outcome.status == "failed" and "Permission denied" in outcome.output, name
            with pytest.raises(BlockingIOError):
                datagram.recv(1)
            exec(compile(code, "here", "exec"), {})  # the same code connects from outside
            with contextlib.suppress(BlockingIOError):
                datagram.recv(1)


def test_ways_around_the_refusal_of_sockets_are_refused():
    """Other families of sockets, io_uring, another process's files, x32's system calls."""
    call = textwrap.dedent("""
        import ctypes, errno, socket
        def call(*args):
            return ctypes.get_errno() if ctypes.CDLL(None, use_errno=True).syscall(*args) < 0 else 0
        assert call(425, 8, bytes(200)) == call(438, 0, 0, 0) == errno.EACCES
        for family in (1, 16, 17, 38, 40, (1 << 32) + 1):
            assert call({}, ctypes.c_ulong(family), 1, 0) == errno.EACCES, family
        if {} == 41:
            assert call(0x40000000 + 41, 1, 1, 0) == errno.EACCES
        socket.socket(socket.AF_INET).close(), socket.socket(socket.AF_INET6).close()
        a, b = socket.socketpair()
        a.send(b"x")
        assert b.recv(1) == b"x"
    """)
    number = sandbox.SOCKET_CALLS[os.uname().machine][1]
    assert run(call.format(number, number) + HONEST).status == "passed"


def test_there_is_no_network(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n" + HONEST
        outcome = run(call)
        assert outcome.status == "failed"
        assert "unreachable" in outcome.output or "refused" in outcome.output
        exec(compile(call, "here", "exec"), {})  # the same code connects from outside


def test_no_privilege_is_left(mode):
    look = textwrap.dedent("""
        import os
        lines = open("/proc/self/status").read().splitlines()
        status = dict(line.split(":\\t", 1) for line in lines)
        caps = (int(status[name], 16) for name in ("CapEff", "CapPrm"))
        print(os.getuid(), *caps, status["NoNewPrivs"])
    """)
    uid, *rest = run(look + HONEST).output.split()
    assert uid != "0" and rest == ["0", "0", "1"]


@pytest.mark.parametrize("value, want, status", [
    ("collections.Counter('aab')", "{'a': 2, 'b': 1}", "passed"),
    ("collections.defaultdict(list, {1: [2]})", "{1: [2]}", "passed"),
    ("N(1, [2])", "(1, [2])", "passed"), ("E.two", "2", "passed"),
    ("{1.5, None, True}", "{1.5, None, True}", "passed"), ("1j", "1j", "passed"),
    ("range(3)", "range(3)", "passed"), ("float('inf')", "float('inf')", "passed"),
    ("2 ** 5000", "2 ** 5000", "passed"), (r"b'\0'", r"b'\0'", "passed"),
    (r"[(), {}, 'é\ud800']", r"[(), {}, 'é\ud800']", "passed"),
    ("collections.deque([1]).copy().popleft()", "1", "passed"),
    ("range(3)", "[0, 1, 2]", "failed"), ("(1,)", "[1]", "failed"), ("iter([1])", "[1]", "failed"),
    ("f", "0", "failed"), ("None", "0", "failed")])
def test_values_of_other_types_compare_as_they_would_in_one_process(value, want, status):
    program = f"""
        import collections, enum
        N = collections.namedtuple('N', 'a b')
        E = enum.IntEnum('E', 'one two')
        def f(x):
            return {value}"""
    tests = f"def check(c):\n    assert c(0) == {want}\n"
    assert run(program, tests=tests).status == status


def official(program, tests):
    """How HumanEval's own check ends: program and tests share one process."""
    try:
        exec(f"{program}\n{tests}\ncheck(f)", {})
        return "passed"
    except BaseException:
        return "failed"


def cases(text):
    """{name: (program, tests)} of "# name", a program, "---" and the body of check(c), ..."""
    parts = [part.split("\n", 1) for part in textwrap.dedent(text).split("\n# ")[1:]]
    halves = {name: half.split("\n---\n") for name, half in parts}
    return {name: (program, f"def check(c):\n{textwrap.indent(body, '    ')}")
            for name, (program, body) in halves.items()}


ONE_PROCESS = cases("""
    # fractions
    from fractions import Fraction
    class Mine(Fraction):
        pass
    f = lambda x: Mine(x, 6)
    ---
    from fractions import Fraction
    assert c(2) == Fraction(1, 3) == c(2) and isinstance(c(1), Fraction) and c(12) == 2
    # decimals
    from decimal import Decimal
    f = lambda x: (Decimal(x), [Decimal("NaN")])
    ---
    assert str(c("1.10")[0]) == "1.10" and c("2")[0] == 2 and c("1")[1][0].is_nan()
    # a deque
    from collections import deque
    f = lambda x: deque(x, maxlen=3)
    ---
    from collections import deque
    assert c([0, 1, 2, 3]) == deque([1, 2, 3]) and c([]).maxlen == 3 and c([1]) != [1]
    # dicts of other kinds
    from collections import Counter, OrderedDict, defaultdict
    class Mine(OrderedDict):
        pass
    def f(x):
        mine = Mine(b=1, a=2)
        mine.more = 3
        return Counter(x), mine, defaultdict(lambda: [7], {1: 2})
    ---
    from collections import OrderedDict
    counter, ordered, default = c("aab")
    assert counter == {"a": 2, "b": 1} and counter["z"] == 0 and counter.most_common(1)[0][0] == "a"
    assert list(ordered) == ["b", "a"] and ordered != OrderedDict(a=2, b=1)
    assert default == {1: 2} and default[5] == [7]
    # a namedtuple
    from typing import NamedTuple
    class P(NamedTuple):
        x: int
        y: list
    f = lambda x: P(x, [P(1, [])])
    ---
    assert c(3).x == 3 and c(3).y[0]._asdict() == {"x": 1, "y": []} and c(3) == (3, [(1, [])])
    # dates
    import datetime as d
    f = lambda x: (d.datetime(2020, 1, x, tzinfo=d.timezone.utc), d.date(2020, 1, x),
                   d.timedelta(x), d.time(x))
    ---
    import datetime as d
    assert c(2) == (d.datetime(2020, 1, 2, tzinfo=d.timezone.utc), d.date(2020, 1, 2),
                    d.timedelta(2), d.time(2))
    # NumPy
    import numpy as np
    f = lambda x: (np.float32(x), np.arange(6).reshape(2, 3), np.bool_(True), np.array(["a", "é"]))
    ---
    single, array, true, text = c(0.1)
    assert single == 0.1 and array.tolist() == [[0, 1, 2], [3, 4, 5]] and text[1] == "é"
    assert true and true is not True
    array[0, 0] = 9
    # types are kept
    f = lambda x: x
    ---
    for v in (True, 1, 1.0, (1, [2]), [(1,)], {1}, frozenset({2}), {"a": None}, "x", b"x", 3j,
              bytearray(b"x"), range(3), ..., NotImplemented, 2 ** 9999):
        assert c(v) == v and type(c(v)) is type(v), v
    assert c(int) is int and c(bool) is bool and c(None) is None
    # NaN
    f = lambda x: x
    ---
    nan = float("nan")
    assert c(nan) != c(nan) and c([nan]) != [nan] or c([nan])[0] is nan
    # an object inside itself
    from collections import deque
    def f(x):
        x = [deque(), {}]
        x.append(x)
        x[0].append(x[0])
        x[1][0] = x
        return x
    ---
    x = c(0)
    assert x[2] is x and x[0][0] is x[0] and x[1][0] is x
    # a deep one
    def f(x):
        return [f(x - 1)] if x else []
    ---
    assert c(200) == c(200) != c(199)
    # a generator
    def f(x):
        yield from range(x)
    ---
    import types
    one = c(3)
    assert isinstance(one, types.GeneratorType) and c(3) != [0, 1, 2]
    assert list(one) == [0, 1, 2] and list(one) == [] and sum(c(100)) == 4950
    # endless iterators
    import itertools
    f = lambda x: (itertools.count(x), map(str, itertools.count(x)))
    ---
    numbers, texts = c(3)
    assert [next(numbers), next(texts), next(numbers), next(texts)] == [3, "3", 4, "4"]
    # a generator that raises
    def f(x):
        yield 1
        raise ValueError("no")
    ---
    one = c(0)
    assert next(one) == 1
    try:
        next(one)
    except ValueError as e:
        assert e.args == ("no",)
    else:
        assert False
    # iterators and views
    f = lambda d: (zip(d, d), reversed([*d]), enumerate(d), d.keys(), d.values(), d.items())
    ---
    z, r, e, keys, values, items = c({1: [2], 3: [4]})
    assert (list(z), list(r), dict(e)) == ([(1, 1), (3, 3)], [3, 1], {0: 1, 1: 3})
    assert keys == {1, 3} and list(values) == [[2], [4]] and (1, [2]) in items
    assert keys != [1, 3] and values != [[2], [4]]
    # an argument is changed
    def f(x, *, more):
        x.sort()
        x[0].append(5)
        more["set"].add(3)
        more["bytes"][0] = 65
        more["deque"].appendleft(0)
        more["new"] = x
    ---
    from collections import deque
    inner, other = [1], [0]
    x, more = [inner, other], {"set": {1}, "bytes": bytearray(b"xy"), "deque": deque([1])}
    assert c(x, more=more) is None and x[0] is other and x == [[0, 5], [1]] and inner == [1]
    assert more.pop("new") is x
    assert more == {"set": {1, 3}, "bytes": b"Ay", "deque": deque([0, 1])}
    # an argument is returned
    f = lambda x: x
    ---
    one = [[1], {}]
    assert c(one) is one and c((one, one))[1] is one and c(one[0]) is not one
    # an argument is changed before an exception
    def f(x):
        x.clear()
        raise KeyError(3)
    ---
    x = [1]
    try:
        c(x)
    except KeyError as e:
        assert e.args == (3,) and x == []
    else:
        assert False
    # an expected exception
    def f(x):
        if x < 0:
            raise ValueError("negative")
        return x
    ---
    try:
        c(-1)
    except ValueError as e:
        assert str(e) == "negative"
    else:
        assert False
    assert c(1) == 1
    # none where one is expected
    f = lambda x: x
    ---
    try:
        c(-1)
    except ValueError:
        pass
    else:
        assert False
    # another than the expected
    def f(x):
        raise TypeError
    ---
    try:
        c(-1)
    except ValueError:
        pass
    # an assertion of the code's own
    def f(x):
        assert x > 0, "positive"
    ---
    try:
        c(-1)
    except AssertionError as e:
        assert str(e) == "positive"
    c(-2)
    # exceptions of its own
    class Bad(KeyError):
        pass
    def f(x):
        raise Bad("here", x, f)
    ---
    try:
        c(-1)
    except LookupError as e:
        assert isinstance(e, KeyError) and "here" in str(e)
    else:
        assert False
    # exceptions with arguments of their own
    import decimal, os
    def f(x):
        [lambda: b"\\xff".decode(), lambda: os.stat("/nothing"), lambda: decimal.Decimal("x"),
         lambda: f(0.5)][x]()
    ---
    import decimal
    for i, kind in enumerate((UnicodeDecodeError, FileNotFoundError, decimal.InvalidOperation,
                              TypeError)):
        try:
            c(i)
        except kind as e:
            assert i or (e.start, e.object) == (0, b"\\xff")
        else:
            assert False
    # a group of exceptions
    def f(x):
        raise ExceptionGroup("several", [ValueError(1), KeyError(x)])
    ---
    try:
        c(2)
    except ExceptionGroup as e:
        assert e.message == "several" and [x.args for x in e.exceptions] == [(1,), (2,)]
    # recursion without end
    f = lambda x: f(x)
    ---
    try:
        c(0)
    except RecursionError:
        pass
    # it exits
    import sys
    def f(x):
        sys.exit(x)
    ---
    try:
        c(3)
    except SystemExit as e:
        assert e.code == 3
    c(0)
    # functions as arguments
    f = lambda g, *x: [g(y) for y in x]
    ---
    seen = []
    assert c(lambda y: seen.append(y) or y * 2, 1, 2) == [2, 4] and seen == [1, 2]
    assert c(abs, -1) == [1] and c(int, "3") == [3] and c(c, abs) == [[]]
    # a function that raises or changes its argument
    def f(g, x):
        try:
            g(x)
        except KeyError as e:
            return e.args, x
    ---
    def g(x):
        x.append(2)
        raise KeyError("k")
    assert c(g, [1]) == (("k",), [1, 2])
    # a function is returned
    f = lambda g, h: lambda x: g(h(x))
    ---
    assert c(str, abs)(-3) == "3" and c(c(abs, abs), len)("aa") == 2
    # iterators as arguments
    f = lambda items: (2 * x for x in items)
    ---
    assert list(c(x for x in [1, 2])) == [2, 4] and list(c(iter("ab"))) == ["aa", "bb"]
    # arguments of other types
    f = lambda path, pattern: pattern.sub("x", path.name)
    ---
    import pathlib, re
    assert c(pathlib.Path("a/b"), re.compile("b")) == "x"
    # input
    f = lambda x: input()
    ---
    try:
        c(1)
    except EOFError:
        pass
""")


@pytest.fixture(scope="module")
def verdicts():
    """{name: "passed" or "failed"} and what was printed: all cases in one run, each by itself."""
    program = f"""
PROGRAMS, spaces = {({name: program for name, (program, _) in ONE_PROCESS.items()})!r}, {{}}
def f(name, *args, **kwargs):
    if name not in spaces:
        spaces[name] = {{"__name__": __name__}}
        exec(PROGRAMS[name], spaces[name])
    return spaces[name]["f"](*args, **kwargs)"""
    tests = f"""
import functools
TESTS = {({name: tests for name, (_, tests) in ONE_PROCESS.items()})!r}
def check(c):
    for name, tests in TESTS.items():
        try:
            exec(tests, space := {{}})
            space["check"](functools.partial(c, name))
            print("passed", name)
        except BaseException as e:
            print("failed", name)"""
    outcome = run_python(program, tests, "f", 60.0)
    assert outcome.status == "passed", outcome.output
    lines = [line.partition(" ") for line in outcome.output.splitlines()]
    return {name: verdict for verdict, _, name in lines if name in ONE_PROCESS}, outcome.output


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_the_tests_see_what_they_would_see_in_one_process(name, verdicts, monkeypatch):
    got, output = verdicts
    if name == "NumPy" and "No module named 'numpy'" in output:
        pytest.skip("as root the code runs as another user, who cannot read this NumPy")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert got[name] == official(*ONE_PROCESS[name]), output
    assert got[name] == ("failed" if name in (
        "none where one is expected", "another than the expected", "it exits",
        "an assertion of the code's own") else "passed"), output


def test_one_of_these_by_itself():
    program, tests = ONE_PROCESS["an argument is changed"]
    assert run(program, tests=tests).status == "passed"
    assert run("def f(x, more):\n    pass", tests=tests).status == "failed"
    assert run("f = lambda x: x\nif __name__ == '__main__':\n    input()", tests="def check(c):\n"
               "    assert c(1) == 1").status == "passed"


THREE = ("from fractions import Fraction\nfrom decimal import Decimal\ndef check(c):\n"
         "    got = c(1)\n    assert got == Fraction(3) or got == Decimal(3)\n")
IN_A_LIST = "def check(c):\n    x = c(2)\n    assert x == 3 or x in ([3], (3,))\n"
ANY_ERROR = "def check(c):\n    try:\n        c(1)\n    except BaseException:\n        pass\n"


@pytest.mark.parametrize("answer", [
    "os._exit(0)", "object()", "P()", "E.A", "sys.modules", "deep",
    "os.kill(os.getpid(), 9)", "os.close(61)", "os.write(61, b'.')", "os.write(61, b'nonsense')",
    "['x' * (1 << 28)] * 2 + [bytes(1 << 30)]", "Loud()", "(_ for _ in ()).gi_frame"])
def test_what_cannot_cross_fails_even_a_test_that_catches_everything(answer):
    program = f"""
        import enum, os, sys
        class E(enum.Enum):
            A = 1
        class P:
            pass
        class Loud:
            def __reduce_ex__(self, protocol):
                raise ValueError
        deep = []
        for _ in range(100_000):
            deep = [deep]
        def f(x):
            return {answer}"""
    assert run(program, tests=ANY_ERROR).status == "failed"


FRACTION, LIST, MADE = b"cfractions\nFraction\n", b"cbuiltins\nlist\n", b"ccalls\nmade\n"


@pytest.mark.parametrize("forged", [
    # Fraction.__eq__ = list: then any list equals a Fraction
    FRACTION + b"N}X\6\0\0\0__eq__" + LIST + b"s\x86b0",
    b"cdecimal\nDecimal\nN}X\6\0\0\0__eq__" + LIST + b"s\x86b0",
    LIST + b"N}X\6\0\0\0__eq__" + LIST + b"s\x86b0",
    b"ccalls\nPeer\nN}X\4\0\0\0call" + LIST + b"s\x86b0",
    MADE + b"N}X\4\0\0\0call" + LIST + b"s\x86b0", b"cos\n_exit\nK\0\x85R0",
    b"cbuiltins\neval\nX\2\0\0\0()\x85R0", b"cbuiltins\ntype\nX\1\0\0\0a)}\x87R0",
    b"cbuiltins\ngetattr\n0", b"ccalls\ngive_up\n0", b"c__main__\nos\n0",
    MADE + b"(X\7\0\0\0give_up0tR0", MADE + b"(X\10\0\0\0__init__tR0"])
def test_a_forged_answer_changes_nothing_in_the_tester(forged):
    answer = b"\x80\4" + forged + b"(X\6\0\0\0return]K\1a}t."
    assert run(FORGED.format(answer), tests=THREE).status == "failed"


def test_the_checks_above_pass_what_is_right():
    assert run("def f(x):\n    raise ValueError", tests=ANY_ERROR).status == "passed"
    assert run("f = lambda x: [x + 1]", tests=IN_A_LIST).status == "passed"
    for answer, status in (b"K\3", "passed"), (b"K\4", "failed"):
        forged = b"\x80\4(X\6\0\0\0return" + answer + b"}t."  # the way of forging is right
        assert run(FORGED.format(forged), tests=THREE).status == status


@pytest.mark.parametrize("changes", [{0: 5}, {0: [[]]}, {9: []}, {"x": []}, [1], None])
def test_forged_changes_of_arguments_end_the_run(changes):
    answer = pickle.dumps(("return", 0, changes), 4)
    tests = "def check(c):\n    try:\n        c({1})\n    except Exception:\n        pass\n"
    assert run(FORGED.format(answer), tests=tests).status == "failed"


@pytest.mark.parametrize("program", [
    """
    from fractions import Fraction
    class Lie(Fraction):
        __eq__ = lambda *_: True
    f = lambda x: Lie(7)""",
    """
    from decimal import Decimal
    import copyreg, os
    copyreg.pickle(Decimal, lambda _: (os._exit, (0,)))
    f = lambda x: Decimal(7)""",
    """
    from decimal import Decimal
    import copyreg
    copyreg.pickle(Decimal, lambda _: (eval, ("type('A', (), dict(__eq__=lambda *_: True))()",)))
    f = lambda x: Decimal(7)""",
    """
    from collections import deque
    class Lie(deque):
        __eq__ = lambda *_: True
        __iter__ = lambda _: iter([Lie()])
    f = lambda x: Lie(maxlen=1)""",
    """
    import enum
    class Lie(enum.IntEnum):
        A = 7
        __eq__ = lambda *_: True
    f = lambda x: Lie.A""",
    """
    from typing import NamedTuple
    class Lie(NamedTuple):
        x: int
        __eq__ = lambda *_: True
    Lie._fields = "x", "y); import os; os._exit(0)  # "
    f = lambda x: Lie(7)""",
    """
    class Lie:
        __eq__ = __call__ = lambda *_: True
        __iter__ = __next__ = lambda _: Lie()
    f = lambda x: Lie()""",
    """
    import numpy as np
    class Lie(np.ndarray):
        __eq__ = lambda *_: True
    f = lambda x: np.zeros(1).view(Lie)""",
    """
    class Lie(Exception):
        __str__ = __repr__ = __reduce__ = __reduce_ex__ = lambda *_: __import__("os")._exit(0)
        __eq__ = lambda *_: True
    f = lambda x: Lie(Lie())""",
    """
    class Lie(Exception):
        __str__ = lambda _: "x" * 10**6
        args = property(lambda self: 1 / 0)
    def f(x):
        raise Lie from Lie()""",
    """
    class Lie(SystemExit):
        code = 0
    def f(x):
        raise Lie(0)""",
    """
    def f(x):
        def forever():
            yield from forever()
        return forever()""",
    """
    import builtins, sys
    sys.stderr = sys.stdout = None
    builtins.isinstance = lambda *_: True
    f = lambda x: [7]"""])
def test_a_lying_value_does_not_pass(program):
    assert run(program, tests=IN_A_LIST).status == "failed"


def test_endless_values_are_stopped():
    endless = "import itertools\nf = lambda x: itertools.count()\n"
    tests = "def check(c):\n    for _ in c(1):\n        pass\n"
    assert run(endless, tests=tests, timeout=0.5).status == "timed out"
    assert run("f = lambda x: ''.join(iter(str, 0))", timeout=0.5).status in ("timed out", "failed")
    back = ANY_ERROR.replace("1", "lambda: check(c)")
    assert run("f = lambda g: g()", tests=back).status == "failed"


def test_a_killed_runs_directory_is_removed_by_the_next_and_a_living_ones_kept(mode):
    """Two runs in processes of their own, the first of which is killed; look-alikes stay."""
    place = Path(tempfile.gettempdir())
    start = (f"import sys, tempfile\nsys.path.insert(0, {str(ROOT)!r})\n"
             "from evaluation import sandbox\n"
             f"tempfile.tempdir, sandbox.USE_NAMESPACES = {str(place)!r}, {mode == 'namespaces'}\n"
             f"sys.executable = {sys.executable!r}\n"
             "sandbox.run_python('open(\"left\", \"w\").write(\"x\")\\nimport time\\n"
             f"time.sleep(100)\\n', {TESTS!r}, 'f', 60.0)\n")
    killed, living = (subprocess.Popen([PYTHON, "-c", start]) for _ in range(2))
    alike = [place / name for name in ("sandbox-abcdefgh", f"{PREFIX}notes", f"{PREFIX}1-notes.txt",
                                       f"{PREFIX}1-abcdefgh", f"{PREFIX}2-abcdefgh")]
    try:
        deadline = time.monotonic() + 60
        while min(len(descendants(p.pid)) for p in (killed, living)) < 2:  # so both hold a lock
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for path in alike[:3]:
            path.mkdir()
        alike[3].symlink_to(alike[0])
        alike[4].write_text("a file")
        directories = {p: next(place.glob(f"{PREFIX}{p.pid}-*")) for p in (killed, living)}
        while not (mode == "namespaces" or (directories[killed] / "left").exists()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        killed.kill()
        killed.wait()
        assert directories[killed].exists()
        assert run(HONEST).status == "passed"
        assert set(place.iterdir()) == {directories[living], *alike}
        if os.geteuid() == 0:  # another user's
            directories[killed].mkdir()
            os.chown(directories[killed], 12345, 12345)
            run(HONEST)
            directories[killed].rmdir()
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
        for path in alike:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        with contextlib.suppress(OSError):
            while descendants(os.getpid()) or living.poll() is None:
                time.sleep(0.02)
    assert run(HONEST).status == "passed"  # and removes the other


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked"])
def test_a_directory_that_another_run_removed_is_made_anew(when, monkeypatch):
    make, lock, removed = tempfile.mkdtemp, fcntl.flock, []

    def remove(directory):
        if not removed:
            removed.append(directory)
            os.rmdir(directory)

    def mkdtemp(**how):
        directory = make(**how)
        if when == "before it is opened":
            remove(directory)
        return directory

    def flock(fd, how):
        remove(os.readlink(f"/proc/self/fd/{fd}"))
        lock(fd, how)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    if when == "before it is locked":
        monkeypatch.setattr(fcntl, "flock", flock)
    assert run("open('a', 'w').close()\n" + HONEST).status == "passed" and removed


def test_given_names_are_there_for_the_tests_and_not_the_codes_own():
    tests = "def check(candidate):\n    assert candidate(helper(1)) == 3\n"
    given = "def helper(x):\n    return x + 1\n"
    mine = "def helper(x):\n    return None\n" + HONEST
    assert run(mine, tests=tests, given=given).status == "passed"
    assert run("def helper(x):\n    return 2\n" + HONEST, tests=tests).status == "failed"


def test_a_sandbox_that_cannot_start_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "__file__", "/nonexistent/sandbox.py")
    with pytest.raises(UserError, match="did not start"):
        run(HONEST)


@pytest.mark.slow
def test_humaneval_solutions_pass():
    if not HUMANEVAL.exists():
        pytest.skip("no HumanEval here")
    with gzip.open(HUMANEVAL, "rt") as f:
        problems = [json.loads(line) for line in f]

    def solve(p):
        return run_python(p["prompt"] + p["canonical_solution"], p["test"], p["entry_point"], 20.0,
                          given=p["prompt"])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(solve, problems))
    assert len(problems) == 164
    assert [p["task_id"] for p, o in zip(problems, outcomes) if o.status != "passed"] == []
