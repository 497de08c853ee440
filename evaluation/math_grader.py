"""The process in which math-verify compares answers; evaluation/mathematics.py starts it.

math-verify limits its time by signals, which work in a main thread only and never inside one call
of C, as where sympy works out a power tower. A process can be ended from outside: the watchdog
here does it, whether or not the parent still lives.
"""
import faulthandler
import json
import logging
import os
import signal
import sys

MEMORY = 4 << 30  # bytes of address space, where the system can limit that


def serve(limit: float):
    """Answer each [solution, text] on standard input by [right, how], a line of JSON each.

    The process ends where an answer takes longer than `limit` seconds.
    """
    from math_verify import parse, verify
    if sys.platform == "linux":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    replies, sys.stdout = sys.stdout, open(os.devnull, "w")  # for whatever else prints
    verify(parse("$1$"), parse("$1$"))  # what it sets up once is not the first answer's time
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.stdout)
        solution, text = json.loads(line)
        try:
            found = parse(text)
            reply = verify(gold=parse(solution), target=found), place(text, found)
        except Exception:
            reply = False, "the grader failed"
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(reply), file=replies, flush=True)


def place(text: str, found: list) -> str:
    """Where math-verify found an answer."""
    return "no answer" if not found else "boxed" if "\\boxed" in text else "not boxed"


if __name__ == "__main__":
    del sys.path[0]  # this folder: its names are not for math-verify to import
    serve(float(sys.argv[1]))
