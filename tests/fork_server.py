"""A process that has imported PyTorch and all commands, and forks for every run of one, so that a
run waits for no interpreter to start.

    python tests/fork_server.py FD

reads a job, a line of JSON, from the socket FD and answers with how it ended. `Server` is the other
side. A run has a session, a directory, standard files, an environment and limits of its own. It
ends as an interpreter does, but for the destructors of its modules. With "exec" the job becomes
that command line instead, in the same surroundings: a real process to compare with.
"""
import contextlib
import gc
import io
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("generate", "train_judge", "make_judge_data", "eval", "benchmark", "annotate",
            "convert_hf_checkpoint", "quantize", "train_eagle")
MEMORY = 6 << 30  # bytes of address space that a run may have
FILE = 300 << 20  # bytes of a file that it may write


class Server:
    """The process, as a function of jobs; one at a time."""

    def __init__(self):
        self.socket, theirs = socket.socketpair()
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env,
            stdin=subprocess.DEVNULL)
        theirs.close()
        self.lines = self.socket.makefile()

    def __call__(self, job: dict) -> dict:
        """{"code": exit code or -signal, "hang": bool, "seconds"}.

        A job has script, argv, cwd, env, limit (seconds), stdin, stdout, stderr (as `become` says),
        and may have "interrupt", a text of standard output after which it gets SIGINT.
        """
        self.socket.sendall(json.dumps(job).encode() + b"\n")
        return json.loads(self.lines.readline())

    def close(self):
        self.lines.close()
        self.socket.close()
        self.process.wait()


# ---------------------------------------------------------------- in the server

def serve(link: socket.socket) -> dict:
    """Fork for each job; returns the job in the child alone."""
    sys.path[0] = str(ROOT)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch
    torch.set_num_threads(1)
    for name in COMMANDS:
        __import__(name)
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # imports what takes PyTorch two seconds
    plt.plot([0, 1])
    plt.savefig(io.BytesIO())
    plt.close()
    gc.collect()
    gc.freeze()  # the children's collections leave these pages shared
    for line in link.makefile():
        job = json.loads(line)
        start, pid = time.monotonic(), os.fork()
        if not pid:
            link.close()
            return job
        hang = not ended(pid, job, start + job["limit"])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it started goes with it
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        answer = {"code": code, "hang": hang, "seconds": time.monotonic() - start}
        link.sendall(json.dumps(answer).encode() + b"\n")
    os._exit(0)


def ended(pid: int, job: dict, deadline: float) -> bool:
    """Whether the process ends before the deadline; sends the interrupt that it waits for."""
    fd, text = os.pidfd_open(pid), job.get("interrupt")
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            if poll.poll(1000 * left if not text else 30):
                return True
            if text and text in Path(job["stdout"]).read_text(errors="replace"):
                os.kill(pid, signal.SIGINT)
                text = None
        return False
    finally:
        os.close(fd)


# ---------------------------------------------------------------- in the child

def become(job: dict):
    """Take on the job's surroundings. stdin: a path or "closed"; stdout, stderr: a path, "closed"
    or "gone", a pipe that nobody reads. cwd: a directory; with "lost" it is removed.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for what, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE),
                        (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))
    os.chdir(job["cwd"])
    if job.get("lost"):
        os.mkdir("lost")
        os.chdir("lost")
        os.rmdir(Path(job["cwd"], "lost"))
    os.environ.clear()
    os.environ.update(job["env"])
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        to = job[name]
        if to == "closed":
            os.close(fd)
            continue
        if to == "gone":
            end, opened = os.pipe()
            os.close(end)
        else:
            opened = os.open(to, (os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fd else os.O_RDONLY)
        os.dup2(opened, fd)
        os.close(opened)


def stream(fd: int):
    """What the interpreter makes of a standard file when it starts."""
    try:
        os.fstat(fd)
    except OSError:
        return None
    raw = io.FileIO(fd, "r" if fd == 0 else "w", closefd=False)
    raw.name = ("<stdin>", "<stdout>", "<stderr>")[fd]
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    if os.environ.get("LC_ALL") == "C":
        errors = errors or "surrogateescape"
    buffer = (io.BufferedReader if fd == 0 else io.BufferedWriter)(raw)
    made = io.TextIOWrapper(
        buffer, encoding or "utf-8", "backslashreplace" if fd == 2 else errors or "strict",
        newline=None if fd == 0 else "\n", line_buffering=fd == 2)
    made.mode = "r" if fd == 0 else "w"
    return made


def play(job: dict):
    """Run the script as the interpreter would, and end with its exit code."""
    sys.stdin, sys.stdout, sys.stderr = streams = [stream(fd) for fd in range(3)]
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
    sys.argv, code = [job["script"], *job["argv"]], 1
    try:
        runpy.run_path(job["script"], run_name="__main__")
        code = 0
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            code = e.code or 0
        elif sys.stderr:
            print(e.code, file=sys.stderr)
    except BaseException:
        if sys.stderr:
            traceback.print_exc()
    import atexit
    threading._shutdown()
    atexit._run_exitfuncs()
    for out in (sys.stdout, sys.stderr):
        try:
            if out and not out.closed:
                out.flush()
        except Exception as e:
            code = 120
            if out is sys.stdout and sys.stderr:
                os.write(2, f"Exception ignored in: {out!r}\n{type(e).__name__}: {e}\n".encode())
    os._exit(code & 255)


if __name__ == "__main__":
    todo = serve(socket.socket(fileno=int(sys.argv[1])))
    become(todo)
    if "exec" in todo:
        os.execvpe(todo["exec"][0], [*todo["exec"], *todo["argv"]], os.environ)
    play(todo)
