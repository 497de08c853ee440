"""Chat templates, rendered as transformers does, in a process of its own.

A template is code from a checkpoint's files: Jinja2 runs it in a sandbox, and a process that takes
too long or too much memory is ended, which no sandbox inside ours could do. The process is started
for the first conversation and serves them all until one fails; it reads and writes a line of JSON
for each. It imports none of our files and no torch, so it starts in a tenth of a second.
"""
import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading

SECONDS = 10  # for one conversation; the longest published templates take milliseconds
BYTES = 1 << 30  # of address space, Python's own 0.1 GB included
LONGEST = 1_000_000  # characters of text that a template may add to the messages


class TemplateError(Exception):
    """What the template says, or what went wrong in it."""


class Renderer:
    """`render` as a function call; the process behind it is started when it is needed."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def render(self, template: str, values: dict) -> str:
        """The text that a Jinja2 template makes of JSON `values`; raises TemplateError."""
        line = json.dumps({"template": template, "values": values}).encode() + b"\n"
        with self.lock:
            answer = {}
            try:
                answer = self._ask(line)
            finally:
                if "text" not in answer:  # after Ctrl-C too: the next must not read this answer
                    self._end()
        if "text" not in answer:
            raise TemplateError(answer["error"])
        return answer["text"]

    def _ask(self, line: bytes) -> dict:
        """The process's answer, {"text"} or {"error"}; an error too if none comes in time."""
        if self.process and self.process.poll() is not None:  # another ended it while it waited
            self._end()
        try:  # in a session of its own, so that Ctrl-C in a chat does not end it
            process = self.process = self.process or subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True)
        except OSError as e:
            return {"error": f"no process can be started for it: {e.strerror}"}
        expired = threading.Event()
        timer = threading.Timer(SECONDS, lambda: (expired.set(), process.kill()))
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
            timer.join()  # from here on it kills nothing
        if expired.is_set():
            return {"error": f"it takes more than {SECONDS} seconds"}
        if not answer.endswith(b"\n"):
            process.kill()
            return {"error": f"its process ended with exit code {process.wait()}"}
        try:
            return json.loads(answer)
        except ValueError:  # what Python itself prints when it starts, if a user's file says so
            return {"error": f"its process prints {answer[:100]!r}"}

    def _end(self):
        process, self.process = self.process, None
        if process:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()


RENDERER = Renderer()
render = RENDERER.render


# ---------------------------------------------------------------- in the process

@functools.cache
def environment():
    """transformers' Jinja2 environment: its extensions, filters and globals, and no more."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the assistant's text for training; here it is plain text."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception,
                       strftime_now=lambda form: datetime.now().strftime(form))
    return env


def answer(template: str, values: dict) -> dict:
    """{"text"} or {"error"}; errors of every kind, MemoryError and RecursionError too."""
    try:
        text = environment().from_string(template).render(values)
        if len(text) > LONGEST + 4 * len(json.dumps(values)):
            return {"error": f"it makes {len(text):,} characters"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {BYTES >> 20} MB"}
    except Exception as e:
        return {"error": described(e)[:1000]}


def described(e: Exception) -> str:
    name = type(e).__name__
    try:
        if hasattr(e, "lineno") and name != "SyntaxError":  # Jinja2's: a line of the template
            return f"line {e.lineno}: {e.message}"
        text = str(e)
    except Exception:
        text = ""
    return text if text and name == "TemplateError" else f"{name}: {text}" if text else name


def serve():
    try:
        import resource
        with contextlib.suppress(ValueError, OSError):  # macOS: only the time is limited
            resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        bound = signal.alarm
    except (ImportError, AttributeError, ValueError, OSError):  # not on this system
        bound = lambda seconds: None
    for line in sys.stdin.buffer:
        bound(SECONDS + 5)  # ends this process where a killed parent cannot
        reply = answer(**json.loads(line))
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()
        bound(0)


if __name__ == "__main__":
    serve()
