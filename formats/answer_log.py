"""The answers of a run that any kill may end: a JSON Lines file of our own, and the settings it was
made with beside it.
"""
import hashlib
import json
import os
import stat
from pathlib import Path

from common import GZIP, Line, UserError, json_lines, read_json, write_json

try:
    import fcntl
except ImportError:  # Windows: the file is not locked there
    fcntl = None


class AnswerLog:
    """A JSON Lines file to which a run appends; the same command resumes from it after any kill.

    `append` and `pop` return when the change is on disk. The file, and `settings` at `about`, are
    made with the first line, so a run that is refused before leaves nothing behind. An unfinished
    last line is cut off where `torn(bytes)` says that it is ours. A file that is not as this run
    read or left it belongs to another hand by then: it is neither written to nor cut.
    """

    def __init__(self, path: Path, settings: dict | None = None, about: Path | None = None,
                 torn=lambda tail: True, kinds=()):
        self.path, self.settings, self.about, self.fd = path, settings, about, None
        self.stat = self.status()  # which file it is
        if self.stat and not stat.S_ISREG(self.stat.st_mode):
            raise UserError(f"cannot write {path}: it is not a plain file; name another --out")
        if self.stat and open(path, "rb").read(2) == GZIP:
            raise UserError(f"cannot add to {path}: it is gzipped; unpack it, or name another")
        self.size = self.stat.st_size if self.stat else 0  # as this run read or left it
        self.lines = json_lines(path, None, torn, kinds, halves=True) if self.stat else []

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


def seed_of(*parts) -> int:
    """A seed from what names an answer, so that the order in which answers are made, and a kill
    between them, changes none.
    """
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:7], "big")


def saved_settings(about: Path, answers: Path, now: dict, ignored=(), optional=(),
                   kinds=(), defaults=None) -> dict:
    """The settings that the log `answers` was made with, or {} if there is none yet.

    Raises UserError naming each that is another in `now`; keys in `ignored` are not compared, those
    in `optional` only where both sides have a value. A file without a key of `defaults` means that.
    """
    if not os.path.exists(about):
        if os.path.exists(answers) and os.path.getsize(answers):
            raise UserError(f"{answers} is there without {about.name}, so how it was made is "
                            "unknown; take another --out")
        return {}
    saved = read_json(about, kinds)
    was = (defaults or {}) | saved
    unknown = {k for k in optional if None in (was.get(k), now.get(k))}
    changed = [f"{key} was {was.get(key)}, now {value}" for key, value in now.items()
               if key not in ignored and key not in unknown and was.get(key) != value]
    if changed:
        raise UserError(f"{answers} was made with other settings: {'; '.join(changed)}. Take "
                        "another --out, or remove this one")
    return saved
