"""The sandbox: hostile code neither passes, hangs the run nor harms it; honest code passes."""
import concurrent.futures
import contextlib
import gzip
import json
import os
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
from evaluation.sandbox import LIMITS, OUTPUT, run_python

ROOT = Path(__file__).parents[1]
HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"
TESTS = "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(5) == 6\n"
HONEST = "def f(x):\n    return x + 1\n"

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
        assert not list(Path(place).glob("sandbox-*"))


def run(program, timeout=10.0, tests=TESTS, **more):
    return run_python(textwrap.dedent(program), tests, "f", timeout, **more)


def test_honest_code_passes_and_wrong_code_fails():
    assert run(HONEST).status == "passed"
    assert run("def f(x):\n    return x + 2\n").status == "failed"
    assert run("def f(x):\n    return 3\n").status == "failed"  # only the first assert holds
    wrong = run("def f(x)\n    return x + 1\n")
    assert wrong.status == "failed" and "SyntaxError" in wrong.output
    assert run("def g(x):\n    return x + 1\n").status == "failed"
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
                w.write(pickle.dumps((True, P())))
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
            w.write(pickle.dumps((True, y)))
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
    assert run(program, timeout=0.5).status == "timed out"
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


def test_memory_is_limited():
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


def test_a_fork_bomb_is_bounded():
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


def test_a_daemon_does_not_outlive_the_run():
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


def test_files_are_limited_and_go_with_the_run():
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


def test_there_is_no_network(namespaces):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\n" + HONEST
        outcome = run(call)
        assert outcome.status == "failed"
        assert "unreachable" in outcome.output or "refused" in outcome.output
        exec(compile(call, "here", "exec"), {})  # the same code connects from outside


def test_no_privilege_is_left():
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
