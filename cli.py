"""What every script here shares at its edge: a user's error is one line and exit code 2, and a file
is whole or absent.
"""
import contextlib
import os
import shutil
import signal
import sys
from pathlib import Path


class UserError(Exception):
    """Something the user can mend; the message names the thing and the way out."""


def run(main):
    """Call `main()`; a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130.
    """
    interrupted = False

    def interrupt(*_):
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    # a background shell has its children ignore it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    try:
        main()
    except BaseException as e:
        # whatever came of it: torch's C++ sometimes makes another error of a KeyboardInterrupt
        if interrupted:
            sys.exit(130)
        if not isinstance(e, UserError):
            raise
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def check_writable(path):
    """Refuse an output path that cannot be written, before the work whose result belongs there."""
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: {path.parent} is not a directory; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission to write in {path.parent}; choose "
                        "another place")
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory; name a file, or remove it")


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` (a file or a directory to be made); rename it there on
    success, remove it on failure.
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
