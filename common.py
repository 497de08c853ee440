"""What every script stands on: user errors, JSON files, files that are whole or absent, the answer
log, and safetensors files. Imports none of our other files.
"""
import argparse
import contextlib
import gzip
import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows: an answer log is not locked there
    fcntl = None


class UserError(Exception):
    """A user error; the message says how to fix it."""


class Parser(argparse.ArgumentParser):
    """argparse's, with errors in one line like all others."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def say_on_stderr(text: str):
    print(text, file=sys.stderr)


def run(main, say=say_on_stderr):
    """Call `main()`; a UserError is said in one line, exit code 2; Ctrl-C is exit code 130.

    For a command that runs no model; the others go through ranks.job.run, for torchrun's sake.
    """
    if say is say_on_stderr and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if os.environ.get("RANK", "0") == "0":
            say("error: this command runs no model; start it with python, not with torchrun")
        sys.exit(2)
    interrupted = False

    def interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # A background shell has its children ignore SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as e:
        if interrupted:  # torch's C++ sometimes turns a KeyboardInterrupt into another error
            sys.exit(130)
        if not isinstance(e, UserError):
            raise
        say(f"error: {visible(str(e))}")
        sys.exit(2)


def visible(text: str) -> str:
    """The text with control characters and line ends escaped: it may come from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(*cases: tuple[object, str]):
    """Raise a UserError with the message of the first (condition, message) whose condition holds.
    """
    for bad, message in cases:
        if bad:
            raise UserError(message)


# ---------------------------------------------------------------- writing

def check_writable(path):
    """Refuse an output path that cannot be written, before the work whose result belongs there.

    Under torchrun rank 0 alone writes: other machines need not have the place.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    path = Path(path)
    refuse(
        (not path.parent.is_dir(),
         f"cannot write {path}: {path.parent} is not a directory; make it first"),
        (not os.access(path.parent, os.W_OK),
         f"cannot write {path}: no permission to write in {path.parent}; choose another place"),
        (path.is_dir(), f"cannot write {path}: it is a directory; name a file, or remove it"))


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (a file or a directory to be made).

    It is renamed to `path` on success and removed on failure.
    """
    path = Path(path)
    check_writable(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield tmp
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    finally:
        if tmp.is_dir():
            shutil.rmtree(tmp)
        else:
            tmp.unlink(missing_ok=True)


def make_directory(path):
    """Make the directory of an --out, if it is not there; raises UserError if that fails."""
    try:
        Path(path).mkdir(exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def write_text(path, text: str):
    """Replace a file by UTF-8 text, whole or not at all."""
    with replacing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------- reading

def read_json(path) -> dict:
    """The object in a JSON file; raises UserError naming the file."""
    refuse((not Path(path).exists(), f"{path} does not exist"))
    data = read_bytes(path)
    try:
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
        return value
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read as JSON: {not_the_file(data) or e}") from None


def read_bytes(path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def not_the_file(data: bytes) -> str | None:
    """What stands where a file's content should be, if it is one of the usual things."""
    if not data.strip():
        return "it is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; git lfs pull brings that"
    if data.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "it is a web page, not the file"
    return None


def file_hash(path) -> str:
    """16 hex digits of a file's SHA-256."""
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16]


class Line(NamedTuple):
    """One line of a JSON Lines file."""
    where: str  # "FILE, line N", for messages
    value: dict
    start: int  # bytes [start, end) in the file, its line end included
    end: int

    @property
    def number(self) -> int:
        return int(self.where.rsplit(" ", 1)[1])


def json_lines(path, holding: str | None = None, torn=lambda tail: False) -> list[Line]:
    """The objects of a JSON Lines file, blank lines left out.

    Takes UTF-8 with or without a BOM, LF or CRLF, gzip, and U+2028 inside strings. Raises UserError
    naming file and line; with `holding` ("examples") also for a file that holds none. An unfinished
    last line is left out where `torn(bytes)` says that a killed run can have left it.
    """
    data = read_bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError):
            raise UserError(f"cannot read {path}: it is not whole gzipped text") from None
    lines, end = [], 0
    for number, raw in enumerate(data.split(b"\n"), 1):  # not splitlines, which cuts at U+2028 too
        start, end = end, end + len(raw) + 1
        where = f"{path}, line {number}"
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not text.strip():
            continue
        try:
            value = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text") from None
        except ValueError:
            if end > len(data) and torn(raw):
                break
            raise UserError(f"{where}: not JSON") from None
        if not isinstance(value, dict):
            raise UserError(f"{where}: not a JSON object")
        lines.append(Line(where, value, start, end))
    if holding and not lines:
        raise UserError(f"{path} holds no {holding}")
    return lines


def open_weights(path, device="cpu"):
    """safe_open, memory-mapped, tensors made on `device`; a damaged file is named in a UserError.
    """
    try:
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        with contextlib.suppress(OSError), open(path, "rb") as f:
            e = not_the_file(f.read(1000)) or e
        raise UserError(f"{path} is damaged or truncated ({e}); fetch it again") from None


def write_tensors(path, tensors: dict, metadata: dict[str, str]):
    """A small safetensors file, whole or absent; the same tensors and metadata, the same bytes."""
    from safetensors.torch import save  # and with it PyTorch, for which not every command waits
    data = save({k: t.contiguous() for k, t in tensors.items()}, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes its header in random order
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    with replacing(path) as tmp:
        tmp.write_bytes(data[:8] + header.encode().ljust(end - 8) + data[end:])


# ---------------------------------------------------------------- the answer log

class AnswerLog:
    """A JSON Lines file to which a run appends; the same command resumes from it after any kill.

    `append` and `pop` return when the change is on disk. The file, and `settings` at `about`, are
    made with the first line, so a run that is refused before leaves nothing behind. An unfinished
    last line is cut off where `torn(bytes)` says that it is ours. A file that is not as this run
    read or left it belongs to another hand by then: it is neither written to nor cut.
    """

    def __init__(self, path: Path, settings: dict | None = None, about: Path | None = None,
                 torn=lambda tail: True):
        self.path, self.settings, self.about, self.fd = path, settings, about, None
        self.stat = self.status()  # which file it is
        if self.stat and not S_ISREG(self.stat.st_mode):
            raise UserError(f"cannot write {path}: it is not a plain file; name another --out")
        self.size = self.stat.st_size if self.stat else 0  # as this run read or left it
        self.lines = json_lines(path, torn=torn) if self.stat else []

    @property
    def values(self) -> list[dict]:
        return [line.value for line in self.lines]

    def status(self) -> os.stat_result | None:
        """Of what stands at the path now, None if nothing does."""
        try:
            return os.stat(self.path)
        except FileNotFoundError:
            return None
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None

    def check(self):
        """Refuse a file that was removed, replaced or changed since this run read or wrote it."""
        now, what = self.status(), None
        if self.stat and not now:
            what = "was removed or renamed"
        elif self.stat and not os.path.samestat(now, self.stat):
            what = "was replaced"
        elif self.size != (now.st_size if now else 0):
            what = "was changed by another run or program"
        if what:
            raise UserError(f"{self.path} {what} while this run used it, so it is left as it is; "
                            "look at what is there, then start again")

    def open(self):
        """Lock the file and cut off an unfinished last line."""
        flags = os.O_RDWR | os.O_APPEND | getattr(os, "O_BINARY", 0)  # Windows would write \r\n
        try:
            self.fd = os.open(self.path, flags | (0 if self.stat else os.O_CREAT), 0o666)
            if fcntl:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                directory = os.open(self.path.parent, os.O_RDONLY)
                os.fsync(directory)  # the name of a new file is on disk too
                os.close(directory)
            self.stat = self.stat or os.fstat(self.fd)
            self.check()
            if self.end() <= self.size:
                self.cut(self.end())
            else:
                self.write(b"\n")
        except BaseException as e:
            self.close()
            if isinstance(e, FileNotFoundError):
                self.check()
            if isinstance(e, BlockingIOError):
                raise UserError(f"{self.path} is in use by another run; stop that one, or name "
                                "another --out") from None
            if isinstance(e, OSError):
                raise UserError(f"cannot write {self.path}: {e.strerror}") from None
            raise

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def end(self) -> int:
        return self.lines[-1].end if self.lines else 0

    def cut(self, size: int):
        os.ftruncate(self.fd, size)
        os.fsync(self.fd)
        self.size = size

    def write(self, data: bytes):
        """Append the data whole or, if the disk is full, not at all."""
        try:
            if os.write(self.fd, data) != len(data):
                raise OSError(None, "no room for the whole line")
            os.fsync(self.fd)
        except OSError:
            self.cut(self.size)
            raise
        self.size += len(data)

    def append(self, value: dict):
        first = self.fd is None
        if first:
            self.open()
        self.check()
        if self.about and (first or not os.path.exists(self.about)):  # or removed meanwhile
            write_json(self.about, self.settings)
        # ASCII: a raw U+2028 would end the line for many readers.
        start, data = self.size, json.dumps(value).encode() + b"\n"
        self.write(data)
        where = f"{self.path}, line {len(self.lines) + 1}"
        self.lines.append(Line(where, value, start, self.size))

    def pop(self):
        self.check()
        self.cut(self.lines[-1].start)
        self.lines.pop()

    def remove(self):
        self.close()
        for path in filter(None, (self.path, self.about)):
            path.unlink(missing_ok=True)


def saved_settings(about: Path, answers: Path, now: dict, ignored=(), optional=()) -> dict:
    """The settings that the log `answers` was made with, or {} if there is none yet.

    Raises UserError naming each that is another in `now`; keys in `ignored` are not compared, those
    in `optional` only where both sides have a value.
    """
    if not os.path.exists(about):
        if os.path.exists(answers) and os.path.getsize(answers):
            raise UserError(f"{answers} is there without {about.name}, so how it was made is "
                            "unknown; take another --out")
        return {}
    saved = read_json(about)
    unknown = {k for k in optional if None in (saved.get(k), now.get(k))}
    changed = [f"{key} was {saved.get(key)}, now {value}" for key, value in now.items()
               if key not in ignored and key not in unknown and saved.get(key) != value]
    if changed:
        raise UserError(f"{answers} was made with other settings: {'; '.join(changed)}. Take "
                        "another --out, or remove this one")
    return saved
