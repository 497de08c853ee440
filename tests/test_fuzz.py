"""Every command on malformed inputs: each run ends in time, by success or by one line that says
why, and leaves its inputs as they were and its outputs whole or absent.

    FUZZ_SEED=3 FUZZ_RUNS=500 pytest -n 0 tests/test_fuzz.py -m slow     # other runs, or more
    FUZZ_SEED=3 FUZZ_ONLY=417 pytest -n 0 tests/test_fuzz.py -m slow     # one of them again

FUZZ_REPORT=FILE gets all that is at fault, FUZZ_LIMIT is the seconds that a run may take.
What is done to the inputs is fuzz.py's; the processes are fork_server.py's.
"""
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from checkpoint import COPIED, slices
from drafters.eagle_head import is_eagle, plain_names, skeleton
from fork_server import ROOT, Server
from fuzz import BASES, Run, make_inputs
from load import read_vocabulary

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the fork server is Linux's")
SEED = int(os.environ.get("FUZZ_SEED", 0))
RUNS = int(os.environ.get("FUZZ_RUNS", 1200))
ONLY = os.environ.get("FUZZ_ONLY")
LIMIT = float(os.environ.get("FUZZ_LIMIT", 20))  # seconds; a run takes less than one
SERVERS = 2
REAL = 50  # every so many runs one is also a process of its own, whose ending must be the same
LONGEST = 2000  # characters of an error
ENV = {"PATH": os.environ["PATH"], "HOME": "/tmp", "OMP_NUM_THREADS": "1",
       "PYTHONIOENCODING": "utf-8:strict", "PYTHONHASHSEED": "0"}
NEVER = re.compile(r"Traceback \(most|Exception ignored|Fatal Python|panicked at|Segmentation|"
                   r"terminate called|core dumped|Exception in thread|Warning: |\bError: \[Errno")


# ---------------------------------------------------------------- what a run did

def tree(home: Path) -> dict[str, str]:
    """Every name under a directory, with a hash of what it is; links are not followed."""
    found = {}
    for path in home.rglob("*"):
        mode = path.lstat().st_mode
        what = os.readlink(path) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
        if stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(home))] = what
    return found


def strict(text: str):
    """A JSON value; raises ValueError for NaN, infinities and half characters too."""
    def refuse(word):
        raise ValueError(f"{word} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def check_file(path: Path):
    """Raise an exception if an output is not whole."""
    if path.name == "config.json" and is_eagle(path.parent):
        skeleton(path.parent, plain_names(path.parent, slices(path.parent)))
    elif path.name == "config.json":  # a model's; some of its files are the source's, as they are
        read_vocabulary(path.parent)
    elif path.name in COPIED or path.name.startswith("tokenizer"):
        pass
    elif path.suffix == ".json":
        strict(path.read_text("utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            for name in f.keys():
                f.get_tensor(name)
    elif path.suffix == ".png":
        assert path.read_bytes()[:4] == b"\x89PNG" and path.read_bytes()[-8:-4] == b"IEND"
    elif path.suffix in (".jsonl", ".skipped", ".part"):
        text = path.read_text("utf-8-sig")
        assert not text or text.endswith("\n"), "its last line has no end"
        for line in text.split("\n")[:-1]:
            strict(line)
    elif path.suffix in (".html", ".md"):
        path.read_text("utf-8")


def faults_of_files(run: Run, before: dict, after: dict):
    """What is wrong with the files that a run has left."""
    for name in sorted(before.keys() | after.keys()):
        top, path = name.split("/")[0], run.home / name
        ours = any(name == p or name.startswith(f"{p}/") for p in (*run.outputs, *run.base.logs))
        if top in run.inputs or f"./{top}" in run.inputs:
            ours = False
        if ".tmp-" in name:
            yield f"{name} was left behind"
        elif before.get(name) == after.get(name):
            continue
        elif not ours and name in before:
            yield f"{name}, which is no output, was {'changed' if name in after else 'removed'}"
        elif name in after and stat.S_ISREG(path.lstat().st_mode):
            try:
                check_file(path)
            except Exception as e:
                yield f"{name} is not whole: {type(e).__name__} {e}"[:300]


def faults_of_words(run: Run, code: int, out: str, err: str):
    """What is wrong with the exit code and with what was said."""
    gone = "gone" in run.closed.values()
    allowed = {0, 2} | ({-13, 141} if gone else set()) | ({130} if run.base.interrupt else set())
    if code not in allowed:
        yield f"exit code {code}"
    for text in (out, err):
        if found := NEVER.search(text):
            yield f"it says {found[0]!r}"
    lines = err.rstrip("\n").split("\n")
    errors = [line for line in lines if re.search(r"(^|\r)error: ", line)]
    if code == 2 and "stderr" not in run.closed:
        if len(errors) != 1 or errors[0] != lines[-1]:
            yield f"{len(errors)} errors in {len(lines)} lines, the last is {lines[-1][:200]!r}"
        elif len(errors[0]) > LONGEST:
            yield f"an error of {len(errors[0]):,} characters"
    # generate.py prints what a model writes; its own words are on stderr
    said = err if run.argv[0] == "generate.py" else out + err
    if found := re.search(r"[^\n\r\t -~\u00a0-\U0010ffff]|[\u202a-\u202e\u2028]", said):
        yield f"it prints the control character {found[0]!r}"


def job_of(run: Run, words: Path) -> dict:
    """The fork server's job; standard files are beside the run's directory."""
    (words / "in").write_bytes(run.stdin)
    env = {k: v for k, v in (ENV | {"TMPDIR": str(words)} | run.env).items() if v is not None}
    files = {"stdin": words / "in", "stdout": words / "out", "stderr": words / "err"} | run.closed
    for name in ("out", "err"):
        (words / name).write_bytes(b"")
    return {"script": str(ROOT / run.argv[0]), "argv": run.argv[1:], "cwd": str(run.home),
            "lost": run.lost, "env": env, "interrupt": run.base.interrupt,
            **{name: str(path) for name, path in files.items()}}


def play(server: Server, number: int, inputs: Path, place: Path, limit=LIMIT, start=(), base=None,
         judge=faults_of_words):
    """Make the run and play it: (run, exit code, stdout, stderr, faults).

    start: what to start as a process of its own, before the script's name.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    run = Run(SEED, number, inputs, place / "run", base)
    before, job = tree(run.home), job_of(run, place) | {"limit": limit}
    end = server(job | {"exec": [*start, job["script"]]} if start else job)
    if end["hang"]:
        return run, None, "", "", [f"it takes more than {limit:g} seconds"]
    out, err = ((place / n).read_text("utf-8", "backslashreplace") for n in ("out", "err"))
    faults = [*judge(run, end["code"], out, err), *faults_of_files(run, before, tree(run.home))]
    return run, end["code"], out, err, faults


# ---------------------------------------------------------------- tests

@pytest.fixture(scope="module")
def fuzzing(tmp_path_factory):
    """Servers, the valid inputs, and a place for runs."""
    home = tmp_path_factory.mktemp("fuzz")
    servers = [Server()]

    def make(argv):
        words = SimpleNamespace(argv=argv, base=SimpleNamespace(interrupt=None), env={}, stdin=b"",
                                home=home / "inputs", closed={}, lost=False)
        end = servers[0](job_of(words, home) | {"limit": 10 * LIMIT})
        assert end["code"] == 0 and not end["hang"], (argv, (home / "err").read_text())

    make_inputs(home / "inputs", make)
    yield servers, home
    for server in servers:
        server.close()
    for name in ("null", "zero", "full"):
        assert stat.S_ISCHR(os.stat(f"/dev/{name}").st_mode), f"a run has replaced /dev/{name}"


def tail(text: str, lines=12) -> str:
    return "\n".join(line[:300] for line in text.rstrip().splitlines()[-lines:])


def fuzz(fuzzing, numbers, real=REAL) -> list[str]:
    """Play runs; returns a report on each that is at fault."""
    servers, home = fuzzing
    reports, free, lock = {}, list(servers), threading.Lock()
    codes = {}

    def one(number):
        with lock:
            server = free.pop()
        place = home / f"run{number}"
        try:
            run, code, out, err, faults = play(server, number, home / "inputs", place)
            if code is None:  # or is the machine busy?
                run, code, out, err, faults = play(server, number, home / "inputs", place,
                                                   3 * LIMIT)
            codes[code] = codes.get(code, 0) + 1
            # Without a current directory torch itself cannot be imported.
            if number % real == real // 2 and not faults and not run.lost:
                _, again, _, other, more = play(server, number, home / "inputs", place, 3 * LIMIT,
                                                [sys.executable])
                faults += [f"as a process of its own: {fault}" for fault in more]
                if again != code or tail(err, 1) != tail(other, 1) and code == 2:
                    faults.append(f"as a process of its own: {again}, {tail(other, 3)}")
        finally:
            with lock:
                free.append(server)
        if faults:
            reports[number] = (f"FUZZ_SEED={SEED} FUZZ_ONLY={number} {run}\n  {'; '.join(faults)}\n"
                               + tail(err))
        else:
            shutil.rmtree(place, ignore_errors=True)

    with ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(one, numbers))
    print(f"seed {SEED}: {sum(codes.values())} runs, exit codes {codes}, {len(reports)} at fault")
    return [reports[n] for n in sorted(reports)]


def said(reports: list[str]) -> str:
    return f"{len(reports)} runs are at fault\n\n" + "\n\n".join(reports[:30])


@pytest.mark.slow
def test_the_command_lines_work_before_they_are_changed(fuzzing):
    servers, home = fuzzing
    for i, base in enumerate(BASES):
        run, code, _, err, faults = play(servers[0], i, home / "inputs", home / "whole", base=base)
        if "do not be root" in err:  # HumanEval's sandbox, where Python is in root's own home
            continue
        assert not faults and code == (130 if base.interrupt else 0), (str(run), faults, err)
        assert all((run.home / p).exists() for p in base.outputs if not p.endswith(
            (".part", ".part.settings.json", ".skipped", "accuracy.png"))), str(run)


def test_a_few_malformed_runs(fuzzing):
    reports = fuzz(fuzzing, range(40), real=10**9)
    assert not reports, said(reports)


RANKED = "generate.py", "train_judge.py", "make_judge_data.py", "eval.py"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LOG = re.compile(r"^[EW]\d{4} .*torch/distributed|^Traceback.*\n.*torch/distributed", re.MULTILINE)


def faults_of_ranks(run: Run, code: int, out: str, err: str):
    """As `faults_of_words`; torchrun adds its own log, and makes exit code 1 of any other."""
    return faults_of_words(run, 2 if code == 1 else code, out, LOG.split(err)[0])


@pytest.mark.slow
def test_two_ranks_on_malformed_inputs(fuzzing):
    servers, home = fuzzing
    reports, number, played = [], 0, 0
    while played < max(1, RUNS // 240):
        number -= 1
        run = Run(SEED, number, home / "inputs", home / "drawn")
        shutil.rmtree(home / "drawn")
        if run.argv[0] in RANKED and not (run.closed or run.env or run.lost or "merge" in run.argv):
            played += 1
            _, code, _, err, faults = play(servers[0], number, home / "inputs", home / "ranks",
                                           6 * LIMIT, LAUNCH, judge=faults_of_ranks)
            if faults:
                reports.append(f"FUZZ_SEED={SEED}, {number}: {run}\n  {'; '.join(faults)}\n"
                               + tail(LOG.split(err)[0]))
    assert not reports, said(reports)


@pytest.mark.slow
def test_malformed_runs(fuzzing):
    fuzzing[0].extend(Server() for _ in range(SERVERS - 1))
    reports = fuzz(fuzzing, [int(ONLY)] if ONLY else range(RUNS))
    if path := os.environ.get("FUZZ_REPORT"):
        Path(path).write_text("\n\n".join(reports))
    assert not reports, said(reports)
