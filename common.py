"""What every script stands on: user errors, JSON files, files that are whole or absent, and
safetensors files. Imports none of our other files.
"""
import argparse
import contextlib
import errno
import fnmatch
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows: what a killed run left stays there
    fcntl = None

GZIP = b"\x1f\x8b"  # how such a file begins
DEEPEST = 200  # levels of nested JSON: well below what Python's own stack allows anywhere
LONGEST = 1500  # characters of an error's line: it may repeat what a file or a flag holds


class UserError(Exception):
    """A user error; the message says how to fix it."""


class Parser(argparse.ArgumentParser):
    """argparse's, with errors in one line like all others, and values that can be used."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

    def parse_args(self, args=None, namespace=None):
        try:
            os.getcwd()
        except OSError:
            raise UserError("the current directory is not there any more; change to another"
                            ) from None
        args = super().parse_args(args, namespace)
        for flag, values in vars(args).items():
            for value in values if isinstance(values, list) else [values]:
                check_flag(f"--{flag}", value)
        return args


def check_flag(flag: str, value):
    """Refuse a number beyond 64 bits, text that is no UTF-8, and a path that can be no file's."""
    if isinstance(value, int):
        refuse((not -(1 << 63) <= value < 1 << 63, f"{flag} is {value}, which is too large"))
    if isinstance(value, (str, Path)):
        refuse((half_characters(str(value)), f"{flag} {value} is not UTF-8 text"))
    if isinstance(value, Path):
        try:
            refuse((half_characters(os.path.abspath(value)), f"{flag} {value}: the name of its "
                    "directory is not UTF-8 text; rename it"))
            os.stat(value)
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as e:  # links in a circle, a name too long
            raise UserError(f"{flag} {value}: {getattr(e, 'strerror', e)}") from None


def say(text: str):
    """Print to standard output, control characters escaped: a name may come from a file."""
    print("\n".join(map(visible, text.split("\n"))), flush=True)


def tell(text: str):
    """Print to standard error, control characters escaped."""
    print("\n".join(map(visible, text.split("\n"))), file=sys.stderr, flush=True)


def run(main, speak=None):
    """Call `main()`; a UserError is said in one line, exit code 2; Ctrl-C is exit code 130.

    So is what the system says of a file or of a full output. Where the reader of the output has
    gone (`| head`), the exit code is 141, as of other programs, in silence. For a command that runs
    no model; the others go through ranks.job.run, for torchrun's sake.
    """
    open_streams()
    interrupted = False

    def interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # A background shell has its children ignore SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        if by_torchrun() and not speak:
            refuse((os.environ["RANK"] == "0",
                    "this command runs no model; start it with python, not with torchrun"))
            sys.exit(2)
        main()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        if interrupted:  # torch's C++ sometimes turns a KeyboardInterrupt into another error
            sys.exit(130)
        error = failed_output() or error
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        line = f"error: {visible(user_error(error))}"
        with contextlib.suppress(OSError):
            (speak or tell)(line if len(line) < LONGEST else f"{line[:LONGEST]} ...")
        failed_output()
        sys.exit(2)


def by_torchrun() -> bool:
    """Whether torchrun started this process as one of several; raises UserError if only a part of
    what it sets is there.
    """
    said = {name: os.environ.get(name) for name in (
        "WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")}
    if said["WORLD_SIZE"] in (None, "1") and said["RANK"] in (None, "0"):
        return False
    bad = next((name for name, value in said.items()
                if not value or name != "MASTER_ADDR" and not value.isdecimal()), None)
    there = ", ".join(f"{name}={value}" for name, value in said.items() if value is not None)
    refuse((bad, f"the environment has {there}, and {bad} is not as torchrun sets it: start with "
            "torchrun, or unset them"))
    return True


def user_error(error: BaseException) -> str:
    """What to say of an error that is the user's; raises any other."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError):
        return "the memory does not suffice for this input"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
                                                      errno.EIO, errno.EBADF):
        return f"cannot write the output: {error.strerror}"
    raise error


def open_streams():
    """Have all three standard streams, and text that an output's encoding lacks escaped.

    A closed one becomes the null device: else the next file that is opened would take its number.
    """
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def failed_output() -> OSError | None:
    """Why standard output or error takes no more, if so; it is quiet from now on."""
    failed = None
    for stream in sys.stderr, sys.stdout:
        try:
            stream.flush()
        except OSError as e:
            failed, null = e, os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
    return failed


def visible(text: str) -> str:
    """The text with control characters and line ends escaped: it may come from a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def half_characters(text: str) -> bool:
    """Whether text holds lone surrogates: from bytes that are no UTF-8, or JSON such as "\\ud800".
    """
    return bool(re.search("[\ud800-\udfff]", text))


def refuse(*cases: tuple[object, str]):
    """Raise a UserError with the message of the first (condition, message) whose condition holds.
    """
    for bad, message in cases:
        if bad:
            raise UserError(message)


# ---------------------------------------------------------------- writing

CHECKPOINT_FILES = ("model*.safetensors*", "config.json", "generation_config.json", "tokenizer*",
                    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                    "original/tokenizer.model")


def belongs(path: Path, directory: Path) -> bool:
    """Whether a path is one of a checkpoint directory's files: by name, or its index's word."""
    inside, home = os.path.realpath(path), os.path.realpath(directory)
    name = os.path.relpath(inside, home)
    if name.startswith(".."):
        return False
    index = os.path.join(home, "model.safetensors.index.json")
    return any(fnmatch.fnmatch(name, pattern) for pattern in CHECKPOINT_FILES) or (
        os.path.isfile(index) and json.dumps(name) in Path(index).read_text(errors="replace"))


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
        (path.is_dir(), f"cannot write {path}: it is a directory; name a file, or remove it"),
        (path.exists() and not path.is_file(),
         f"cannot write {path}: it is not a plain file; name another"))


def check_apart(writes: dict[str, Path | None], reads: dict[str, Path | None]):
    """Refuse outputs that are one file with each other or with an input, {flag: path or None}.

    Of an input that is a checkpoint directory its own files count, there or not. Links are
    followed.
    """
    inputs = [(flag, path) for flag, path in reads.items() if path and not path.is_dir()]
    for flag, directory in reads.items():
        if directory and directory.is_dir():
            inputs += [(f"a file of {flag}", path) for path in writes.values()
                       if path and belongs(path, directory)]
            inputs += [(f"a file of {flag}", file) for name in CHECKPOINT_FILES
                       for file in directory.glob(name)]
    outputs = [(flag, path) for flag, path in writes.items() if path]
    for i, (flag, path) in enumerate(outputs):
        for other, file in outputs[:i] + inputs:
            refuse((os.path.realpath(path) == os.path.realpath(file)
                    or path.exists() and file.exists() and path.samefile(file),
                    f"{flag} {path} is also {other}; name another"))


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (a file or a directory to be made).

    It is renamed to `path` on success and removed on failure; what a killed run left there is
    removed first.
    """
    path = Path(path)
    check_writable(path)
    try:
        with locked_directory(path.parent, f".{path.name[:40]}.tmp-") as directory:
            tmp = Path(directory, path.name)
            yield tmp
            os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e


@contextlib.contextmanager
def locked_directory(place, prefix: str, ours=lambda uid: uid == os.geteuid()):
    """A new directory in `place`, locked by this process for as long as it lives, however it ends.

    Those of this prefix whose owner is `ours` and does not live any more are removed first.
    """
    left = re.compile(re.escape(prefix) + r"\d+-[a-z0-9_]{8}")
    with contextlib.suppress(PermissionError):  # one may write here and not read
        for name in os.listdir(place) if fcntl else ():
            if left.fullmatch(name):
                remove_unlocked(os.path.join(place, name), ours)
    with contextlib.ExitStack() as stack:
        directory = None
        while not (directory and os.path.exists(directory)):  # a run may remove it before the lock
            directory = tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place)
            with contextlib.suppress(OSError):  # a file system without locks
                if fcntl:
                    stack.callback(os.close, lock_of(directory, fcntl.LOCK_EX))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        yield directory


def remove_unlocked(directory, ours):
    """Remove the directory if it is ours and no living process holds its lock."""
    with contextlib.suppress(OSError):
        lock = lock_of(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if ours(os.fstat(lock).st_uid):
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def lock_of(directory, how) -> int:
    """A file descriptor that holds the lock. Raises OSError for what is no directory, or locked."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, how)
    except OSError:
        os.close(fd)
        raise
    return fd


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

def read_json(path, kinds=()) -> dict:
    """The object in a JSON file, its values of their `kinds` {key: Kind}.

    Raises UserError naming the file.
    """
    refuse((not present(path), f"{path} does not exist"))
    data = read_bytes(path)
    try:
        value = parse_json(data)
    except ValueError as e:
        raise UserError(f"{path} cannot be read as JSON: {not_the_file(data) or e}") from None
    check_kinds(value, kinds, path)
    return value


def parse_json(data: bytes, halves=False) -> dict:
    """The object in JSON text, UTF-8 with or without a BOM; raises ValueError saying what is wrong.

    Refuses what Python takes and others do not: NaN, infinities and, without `halves`, half
    characters.
    """
    def constant(name):
        raise OverflowError(f"{name} is no JSON number")

    def number(text):
        return x if math.isfinite(x := float(text)) else constant(text)

    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=constant, parse_float=number)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if data.count(b"[") + data.count(b"{") > DEEPEST and depth(value) > DEEPEST:
            raise RecursionError
        if not halves and re.search(rb"\\u[dD][89a-fA-F]", data):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate); write the whole character"
                         ) from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except OverflowError as e:
        raise ValueError(str(e)) from None
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e})") from None


def depth(value) -> int:
    """How deep a JSON value is nested."""
    level, deep = [value], 0
    while level:
        inside = (x.values() if isinstance(x, dict) else x for x in level)
        level, deep = [y for x in inside for y in x if isinstance(y, (dict, list))], deep + 1
    return deep


def present(path) -> bool:
    """Whether a file is there; a link that leads nowhere is refused, for it was meant to be."""
    refuse((os.path.islink(path) and not os.path.exists(path),
            f"{path} is a link to a file that is not there; fetch it again"))
    return os.path.exists(path)


def check_file(path):
    """Refuse a path of which reading may never end: a pipe, a device, a socket."""
    mode = Path(path).stat().st_mode
    refuse((not stat.S_ISREG(mode) and not stat.S_ISDIR(mode),
            f"cannot read {path}: it is not a plain file; write its content to one"))


def read_bytes(path) -> bytes:
    try:
        check_file(path)
        return Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except MemoryError:
        raise UserError(f"cannot read {path}: the memory does not suffice") from None


def not_the_file(data: bytes) -> str | None:
    """What stands where a file's content should be, if it is one of the usual things."""
    if not data.strip():
        return "it is empty"
    if data.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file; git lfs pull brings that"
    if data.lstrip()[:9].lower() in (b"<!doctype", b"<html>"):
        return "it is a web page, not the file"
    return None


def json_values(metadata: dict[str, str] | None, kinds: dict[str, "Kind"], where) -> dict:
    """The values of their `kinds` that a safetensors file's metadata holds as JSON."""
    values = {}
    for key in kinds.keys() & (metadata or {}).keys():
        try:
            value = parse_json(f'{{"value": {metadata[key]}}}'.encode())
            if len(value) > 1:
                raise ValueError("it is more than one value")
            values[key] = value["value"]
        except ValueError as e:
            raise UserError(f"{where}: its {key} cannot be read: {e}") from None
    check_kinds(values, kinds, where)
    return values


def read_text(path) -> str:
    """A file of UTF-8 text; raises UserError for another."""
    data = read_bytes(path)
    refuse((why := not_the_file(data), f"{path}: {why}; fetch it again"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: it is not UTF-8 text") from None


def file_hash(path) -> str:
    """16 hex digits of a file's SHA-256."""
    return hashlib.sha256(read_bytes(path)).hexdigest()[:16]


LARGEST = sys.float_info.max


class Kind(NamedTuple):
    """What a JSON value must be, in words and as a test. One not `needed` may be missing or null.
    """
    says: str
    holds: Callable[[object], bool]
    needed: bool = False

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.says} or {other.says}", lambda v: self.holds(v) or other.holds(v))


def whole(low: int, high: int = 1 << 53) -> Kind:
    """A whole number from low to high."""
    return Kind(f"a whole number from {low:,}" + (f" to {high:,}" if high < 1 << 53 else ""),
                lambda v: type(v) is int and low <= v <= high)


def number(low: float = -LARGEST, high: float = LARGEST, above=False) -> Kind:
    """A number from low (or `above` it) to high."""
    says = "a number" + (f" {'above' if above else 'from'} {low:g}" if low > -LARGEST else "")
    return Kind(says + (f" up to {high:g}" if high < LARGEST else ""),
                lambda v: type(v) in (int, float) and low <= v <= high and not (above and v == low))


def list_of(kind: Kind, name: str) -> Kind:
    return Kind(f"a list of {name}", lambda v: isinstance(v, list) and all(map(kind.holds, v)))


TEXT = Kind("a text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))


def needed(kinds: dict[str, Kind]) -> dict[str, Kind]:
    return {key: kind._replace(needed=True) for key, kind in kinds.items()}


def check_kinds(value: dict, kinds, where):
    """Refuse an object in which a value is not of its kind, {key: Kind}; it may have other keys."""
    for key, kind in dict(kinds).items():
        found = value.get(key)
        refuse((found is None and kind.needed, f"{where}: {key!r} is missing; it must be "
                f"{kind.says}"),
               (found is not None and not kind.holds(found),
                f"{where}: {key} is {shown(found)}; it must be {kind.says}"))


def shown(value, length=60) -> str:
    """A JSON value for a message, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= length else f"{text[:length]}..."


class Line(NamedTuple):
    """One line of a JSON Lines file."""
    where: str  # "FILE, line N", for messages
    value: dict
    start: int  # bytes [start, end) in the file, its line end included
    end: int

    @property
    def number(self) -> int:
        return int(self.where.rsplit(" ", 1)[1])


def json_lines(path, holding: str | None = None, torn=lambda tail: False,
               kinds=(), halves=False) -> list[Line]:
    """The objects of a JSON Lines file, their values of their `kinds`; blank lines are left out.

    Takes UTF-8 with or without a BOM, LF or CRLF, gzip, and U+2028 inside strings. Raises UserError
    naming file and line; with `holding` ("examples") also for a file that holds none. An unfinished
    last line is left out where `torn(bytes)` says that a killed run can have left it.
    """
    data = read_bytes(path)
    if data[:2] == GZIP:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise UserError(f"cannot read {path}: it is not whole gzipped text") from None
        except MemoryError:
            raise UserError(f"cannot read {path}: the memory does not suffice") from None
    lines, end = [], 0
    for number, raw in enumerate(data.split(b"\n"), 1):  # not splitlines, which cuts at U+2028 too
        start, end = end, end + len(raw) + 1
        where = f"{path}, line {number}"
        if not (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).strip():
            continue
        try:
            value = parse_json(raw, halves)
        except ValueError as e:
            if end > len(data) and torn(raw):
                break
            raise UserError(f"{where}: {e}") from None
        check_kinds(value, kinds, where)
        lines.append(Line(where, value, start, end))
    if holding and not lines:
        raise UserError(f"{path} holds no {holding}")
    return lines


def open_weights(path, device="cpu"):
    """safe_open, memory-mapped, tensors made on `device`; a damaged file is named in a UserError.
    """
    try:
        check_file(path)
        refuse((Path(path).is_dir(), f"cannot read {path}: it is a directory"))
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as e:
        with contextlib.suppress(OSError), open(path, "rb") as f:
            e = not_the_file(f.read(1000)) or e
        raise UserError(f"{path} is damaged or truncated ({e}); fetch it again") from None


def is_finite(tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.itemsize == 1:  # float8_e4m3fn: only NaN is not finite
        from torch import uint8  # as in write_tensors
        return bool((tensor.view(uint8) & 127).amax() < 127)
    low, high = tensor.aminmax()  # NaN if any is
    return bool(low > -math.inf and high < math.inf)


def write_tensors(path, tensors: dict, metadata: dict[str, str]):
    """A small safetensors file, whole or absent; the same tensors and metadata, the same bytes."""
    from safetensors.torch import save  # and with it PyTorch, for which not every command waits
    data = save({k: t.contiguous() for k, t in tensors.items()}, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    # safetensors writes its header in random order
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"))
    with replacing(path) as tmp:
        tmp.write_bytes(data[:8] + header.encode().ljust(end - 8) + data[end:])
