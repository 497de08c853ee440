"""Runs model-written Python against trusted tests; how the program ends cannot fake a pass.

The code and the tests never share a process. A *candidate* process runs the code. A *tester*
process runs the tests and calls a stand-in for the code's function; calls.py carries the calls, and
only plain values come back. So an os._exit(0), a patched assert, an __eq__ that is always true, or
a `check` of the code's own cannot pass, nor can the code find the tests in its process, its files
or its arguments; a benchmark's own file, if it may read that, is another matter. The tests see what
the code returns or raises and what it does to its arguments, but not what it prints.

What holds where Linux gives namespaces (`Outcome.isolation` says which): no network; all files
read-only but a small empty directory; the home directory hidden; no other process visible; every
process ends with the run. Everywhere: no sockets but the Internet's, so none of this machine's Unix
sockets; limits on time, memory, processes, file size and output; and as root another user id, since
root has no limit on processes.

What is not hidden: outside the home directory the code reads every file that this user may read
(from root: every file that anyone may), and writes to the pipes and devices that it may write to.
Without namespaces it also has the network and all of the user's files, and what kills its watchers
may outlive the run.

What it is not: a boundary against an attacker who aims at the kernel or at its devices, and memory
is limited for each process, not for all together. Run strangers' models in a container or a virtual
machine. Linux only, on x86-64, 64-bit Arm or RISC-V.
"""
import contextlib
import ctypes
import errno
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import types
from typing import NamedTuple

if sys.platform == "linux":  # elsewhere this file can be imported, and refuses to run
    import resource

if __name__ == "__main__":  # started with -I, which keeps this directory off the path
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from calls import Peer
    sys.path.pop()

MEMORY, FILE_SIZE, DISK, OUTPUT = 2 << 30, 16 << 20, 64 << 20, 64 << 10  # bytes
PROCESSES, FILES = 32, 64
FIRST_UID = 2_000_000_000  # as root the code runs as this user plus a process id
PREFIX = "judge-sandbox-"  # of the directory's name, then the process id and mkdtemp's own letters
# Seconds beyond the timeout after which the whole sandbox is given up: a busy machine is slow to
# start it.
PATIENCE = 30
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_NODEV_NOSUID, MS_BIND_REC, MS_PRIVATE_REC, MNT_DETACH = 2 | 4, 4096 | 16384, (1 << 18) | 16384, 2
PR_SET_SECCOMP, IO_URING_SETUP, PIDFD_GETFD = 22, 425, 438
AF_INET, AF_INET6, SOCK_STREAM = 2, 10, 1
SOCKET_CALLS = {  # of a machine: what seccomp calls it, and the numbers of socket and socketpair
    "x86_64": (0xC000003E, 41, 53), "aarch64": (0xC00000B7, 198, 199),
    "riscv64": (0xC00000F3, 198, 199)}
STATUSES = "passed", "failed", "timed out"
NAMESPACES = "namespaces"
USE_NAMESPACES = True  # the tests of the limits alone turn it off
LIMITS = ("limits only: no namespaces here, so the network and this user's files are open to the "
          "code")


class Outcome(NamedTuple):
    status: str  # one of STATUSES
    output: str  # what the code and the tests printed, the first 64 KiB
    isolation: str


def run_python(program: str, tests: str, entry_point: str, timeout: float = 10.0,
               given: str = "") -> Outcome:
    """Run `program`, then `check(program's entry_point)` of the trusted `tests`.

    timeout: seconds for both. given: trusted code whose names the tests may use. Raises UserError
    where the sandbox itself cannot run.
    """
    from common import (  # here: `python -I` runs this file and finds none of ours
        UserError,
        locked_directory,
    )

    if sys.platform != "linux" or os.uname().machine not in SOCKET_CALLS:
        raise UserError("model-written code is run on Linux only, on x86-64, 64-bit Arm or RISC-V; "
                        "score these answers there, or in a container")
    with (locked_directory(tempfile.gettempdir(), PREFIX, _ours) as directory,
          tempfile.TemporaryFile() as request):
        head = json.dumps(dict(program=program, entry_point=entry_point, timeout=timeout,
                               directory=directory, namespaces=USE_NAMESPACES,
                               home=os.path.realpath(os.path.expanduser("~")))).encode()
        rest = json.dumps(dict(tests=tests, entry_point=entry_point, given=given)).encode()
        request.write(len(head).to_bytes(8, "little") + head + rest)
        request.seek(0)
        env = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": directory, "TMPDIR": directory,
               "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        if "LD_LIBRARY_PATH" in os.environ:  # some Pythons do not start without it
            env["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        verdict, w = os.pipe()
        process = None
        try:
            command = [sys.executable, "-I", "-u", os.path.abspath(__file__), str(w)]
            process = subprocess.Popen(command, stdin=request, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env=env, cwd=directory,
                                       pass_fds=[w], start_new_session=True)
            os.close(w)
            lines, output = _listen(verdict, process.stdout, time.monotonic() + timeout + PATIENCE)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # by itself it ends when all its processes have
        finally:
            if process:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
            os.close(verdict)
    if not lines or lines[0] in STATUSES:  # no word from the candidate before it ran any code
        why = (output.strip().splitlines() or ["it was killed"])[-1]
        raise UserError(f"the sandbox did not start: {why}")
    return Outcome(lines[1] if len(lines) > 1 else "failed", output, lines[0])


def _ours(uid) -> bool:
    """Whether a directory's owner is this user or one that the code ran as."""
    return uid == os.geteuid() or os.geteuid() == 0 and uid >= FIRST_UID


def _listen(verdict, stdout, deadline):
    """(the lines that the sandbox reports, the first OUTPUT bytes of the output)."""
    said, output, out = b"", b"", stdout.fileno()
    os.set_blocking(out, False)
    while said.count(b"\n") < 2 and (left := deadline - time.monotonic()) > 0:
        ready = select.select([verdict, out], [], [], left)[0]
        if out in ready:
            output += (data := os.read(out, 1 << 16))[:OUTPUT - len(output)]
            if not data:  # closed by every process: only the report can come now
                out = verdict
        if verdict in ready:
            if not (data := os.read(verdict, 4096)):
                break
            said += data
    with contextlib.suppress(BlockingIOError):  # what was printed before the report
        while len(output) < OUTPUT and (data := os.read(stdout.fileno(), OUTPUT - len(output))):
            output += data
    return said.decode().splitlines(), output.decode(errors="replace")


# ---------------------------------------------------------------- in the sandbox's own processes

libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name, *args):
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def _main():
    """Make the namespaces, then watch over the run, in this process or in a child."""
    verdict = int(sys.argv[1])
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")  # if memory runs out, this goes first
    size = int.from_bytes(os.read(0, 8), "little")
    head = b""
    # Not a byte more: the tests follow, and must not be in the candidate's memory.
    while len(head) < size:
        head += os.read(0, size - len(head))
    request, uid = json.loads(head), FIRST_UID + os.getpid()
    if not (request["namespaces"] and _isolate(uid)):
        _watch(request, verdict, uid, LIMITS)
    elif pid := os.fork():  # the child is the first process of its namespace: when it ends, all end
        os.close(verdict)
        os.waitpid(pid, 0)
    else:
        _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        mounted = _mount(request["directory"], request["home"])
        _watch(request, verdict, uid, ", ".join([NAMESPACES, *mounted]))
    os._exit(0)


def _isolate(uid) -> bool:
    """Leave the system's network and, for children, its processes and mounts.

    False where the system does not allow that.
    """
    flags, root = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC, os.getuid() == 0
    if root:
        with contextlib.suppress(OSError):
            _call("unshare", flags)
            return True
        os.setegid(uid)
        os.seteuid(uid)  # the limit on processes takes a user namespace of root's for root
    ids = os.geteuid(), os.getegid()
    try:
        _call("unshare", flags | CLONE_NEWUSER)
    except OSError:
        if root:
            os.seteuid(0)
            os.setegid(0)
        return False
    _call("prctl", PR_SET_DUMPABLE, 1)  # else the files below are root's
    for name, text in {"setgroups": "deny", "uid_map": f"{ids[0]} {ids[0]} 1",
                       "gid_map": f"{ids[1]} {ids[1]} 1"}.items():
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)
    os.setresgid(ids[1], ids[1], ids[1])
    os.setresuid(ids[0], ids[0], ids[0])
    return True


def _mount(directory, home):
    """Hide the home directory and other processes; make all but `directory` read-only.

    Returns what of that worked, in words.
    """
    done = []

    def mount(source, target, kind, flags, data=None):
        _call("mount", source.encode(), target.encode(), kind, flags, data)

    with contextlib.suppress(OSError):
        mount("none", "/", None, MS_PRIVATE_REC)
        if home != "/" and os.path.isdir(home):
            pythons = [p for p in {sys.prefix, sys.base_prefix} if p.startswith(home + "/")]
            opened = [os.open(p, os.O_PATH) for p in pythons]
            mount("tmpfs", home, b"tmpfs", MS_NODEV_NOSUID, b"size=64k,mode=755")
            try:
                for path, fd in zip(pythons, opened):
                    os.makedirs(path, exist_ok=True)
                    mount(f"/proc/self/fd/{fd}", path, None, MS_BIND_REC)
            except OSError:
                _call("umount2", home.encode(), MNT_DETACH)
                raise
            done.append("home hidden")
    with contextlib.suppress(OSError):
        mount("proc", "/proc", b"proc", MS_NODEV_NOSUID)
    with contextlib.suppress(OSError):
        os.makedirs(directory, exist_ok=True)
        read_only = (ctypes.c_uint64 * 4)(1)
        # mount_setattr(AT_FDCWD, "/", AT_RECURSIVE, ...)
        _call("syscall", 442, -100, b"/", 0x8000, read_only, 32)
        mount("tmpfs", directory, b"tmpfs", MS_NODEV_NOSUID,
              f"size={DISK},nr_inodes=1000,mode=777".encode())
        done.append("files read-only")
    return done


def _watch(request, verdict, uid, isolation):
    """Start candidate and tester, wait for the tester, report, and leave no process behind."""
    # The candidate, where it has the same user id, must not reach into this or the tester.
    _call("prctl", PR_SET_DUMPABLE, 0)
    _call("prctl", PR_SET_CHILD_SUBREAPER, 1)
    (calls, w), (r, results) = os.pipe(), os.pipe()
    if not os.fork():
        _run_apart(_candidate, request, uid, isolation, verdict, calls, results)
    os.close(calls), os.close(results)
    if not (tester := os.fork()):
        os.close(verdict)
        _run_apart(_tester, w, r)
    os.close(w), os.close(r)
    over = select.select([os.pidfd_open(tester)], [], [], request["timeout"])[0]
    passed = over and os.waitpid(tester, 0)[1] == 0
    if isolation == LIMITS:
        _kill_children()
    os.write(verdict, b"passed\n" if passed else b"failed\n" if over else b"timed out\n")


def _kill_children(seconds=5):
    """Kill children until none lives; those of a dead child become ours: we are the subreaper.

    The dead are reaped last: until then they count against the limit on processes, so a fork bomb
    cannot replace them.
    """
    deadline, before, alive = time.monotonic() + seconds, None, True
    while time.monotonic() < deadline:
        with open(f"/proc/self/task/{os.getpid()}/children") as f:
            children = f.read().split()
        # Twice the same dead: one that died since the list was read may have left us new ones.
        if not alive and children == before:
            break
        before, alive = children, False
        for pid in children:
            with open(f"/proc/{pid}/stat") as f:
                if f.read().rpartition(")")[2].split()[0] not in "ZX":
                    os.kill(int(pid), signal.SIGKILL)
                    alive = True
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _run_apart(main, *args):
    """What a forked process does: never return into its parent's code."""
    code = 1
    try:
        main(*args)
        code = 0
    except BaseException:
        traceback.print_exc(limit=-3)
    finally:
        os._exit(code)


def _candidate(request, uid, isolation, verdict, calls, results):
    """Give up every privilege, report the isolation, run the code, answer the tester's calls."""
    os.setsid()
    devnull = os.open(os.devnull, os.O_RDONLY)
    for old, new in (devnull, 0), (verdict, 62), (calls, 60), (results, 61):  # 0 had the tests
        os.dup2(old, new)
    os.closerange(3, 60), os.closerange(63, 1 << 16)
    cpu = math.ceil(request["timeout"]) + 1
    os.chdir(request["directory"])
    if os.getuid() == 0:
        os.chown(".", uid, uid)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    _call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _refuse_sockets()
    _call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    for limit, value in ((resource.RLIMIT_CPU, cpu), (resource.RLIMIT_AS, MEMORY),
                         (resource.RLIMIT_FSIZE, FILE_SIZE), (resource.RLIMIT_NPROC, PROCESSES),
                         (resource.RLIMIT_NOFILE, FILES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    if not os.access(os.__file__, os.R_OK):
        message = (f"as root the code runs as another user, who cannot read {os.__file__}; install "
                   "Python where others can, or do not be root\n")
        os.write(2, message.encode())
        os._exit(1)
    os.write(62, isolation.encode() + b"\n")
    os.close(62)
    os.write(61, b"1")
    module = sys.modules["candidate"] = types.ModuleType("candidate")
    exec(compile(request["program"], "<candidate>", "exec"), module.__dict__)
    function = getattr(module, request["entry_point"])
    tester = Peer(open(60, "rb"), open(61, "wb"), trusting=True)
    tester.number(function, function)
    with contextlib.suppress(EOFError):  # the tester has finished
        while True:
            tester.serve(*tester.receive()[1:])


def _refuse_sockets():
    """Leave only Internet sockets and connected pairs of streams, here and in all children.

    A Unix socket, or io_uring's way around this, would reach the machine's services whatever the
    namespace of the network; a pair of datagram sockets can be pointed at any other.
    """
    arch, socket, socketpair = SOCKET_CALLS[os.uname().machine]
    load, equal, at_least, mask, end = 0x20, 0x15, 0x35, 0x54, 0x06
    program = [  # as seccomp(2) reads it: operation, lines to skip if true, if false, operand
        (load, 0, 0, 4), (equal, 0, 12, arch),
        (load, 0, 0, 0), (at_least, 10, 0, 0x40000000),  # x32's numbers
        (equal, 9, 0, IO_URING_SETUP), (equal, 8, 0, PIDFD_GETFD),
        (equal, 4, 0, socketpair), (equal, 0, 7, socket),
        (load, 0, 0, 16), (equal, 5, 0, AF_INET), (equal, 4, 3, AF_INET6),  # socket(this, ...)
        (load, 0, 0, 24), (mask, 0, 0, 15), (equal, 1, 0, SOCK_STREAM),  # socketpair(_, this, _)
        (end, 0, 0, 0x50000 | errno.EACCES), (end, 0, 0, 0x7FFF0000)]  # the error; go on
    code = ctypes.create_string_buffer(b"".join(
        struct.pack("=HBBI", op, *skip, value) for op, *skip, value in program))
    _call("prctl", PR_SET_SECCOMP, 2, struct.pack("HP", len(program), ctypes.addressof(code)), 0, 0)


def _tester(calls, results):
    """Run the trusted tests on a stand-in for the candidate's function; returning is the pass."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(0, "rb") as f:
        request = json.load(f)
    calls, results = open(calls, "wb"), open(results, "rb")
    # Wait until the candidate stands: a test that fails at once must not end the run before that.
    if not results.read(1):
        os._exit(1)

    candidate = Peer(results, calls, trusting=False).function(0)
    namespace = {"__name__": "tests"}
    exec(compile(request["given"], "<given>", "exec"), namespace)
    namespace[request["entry_point"]] = candidate
    exec(compile(request["tests"], "<tests>", "exec"), namespace)
    namespace["check"](candidate)


if __name__ == "__main__":
    _main()
