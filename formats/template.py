"""Chat templates, rendered as transformers does, in a process of its own.

A template is code from a checkpoint's files: Jinja2 runs it in a sandbox, and a process that takes
too long or too much memory is ended, which no sandbox inside ours could do. The process is started
for the first conversation and serves them all; it reads and writes a line of JSON for each. It
imports none of our files and no torch, so it starts in a tenth of a second.
"""
import json
import subprocess
import sys
import threading

SECONDS = 10  # for one conversation; the longest published templates take milliseconds
BYTES = 1 << 30  # of address space, Python's own 0.1 GB included
LONGEST = 4_000_000  # characters of text that a template may add to the messages


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
            if self.process is None:
                self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            expired = threading.Event()
            timer = threading.Timer(SECONDS, lambda: (expired.set(), self.process.kill()))
            timer.start()
            try:
                self.process.stdin.write(line)
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = b""
            finally:
                timer.cancel()
            if not answer.endswith(b"\n"):
                self.process.kill()
                code, self.process = self.process.wait(), None
                raise TemplateError(f"it takes more than {SECONDS} seconds" if expired.is_set()
                                    else f"its process ended with exit code {code}")
        answer = json.loads(answer)
        if "error" in answer:
            raise TemplateError(answer["error"])
        return answer["text"]


RENDERER = Renderer()
render = RENDERER.render


# ---------------------------------------------------------------- in the process

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


def answer(env, template: str, values: dict) -> dict:
    """{"text"} or {"error"}; errors of every kind, MemoryError and RecursionError too."""
    from jinja2 import TemplateError, TemplateSyntaxError
    try:
        text = env.from_string(template).render(values)
        if len(text) > LONGEST + 4 * len(json.dumps(values)):
            return {"error": f"it makes {len(text):,} characters"}
        return {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {BYTES >> 20} MB"}
    except TemplateSyntaxError as e:
        return {"error": f"line {e.lineno}: {e.message}"}
    except Exception as e:
        name = "" if type(e) is TemplateError else f"{type(e).__name__}: "
        return {"error": (name + str(e))[:1000]}


def serve():
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, ValueError, OSError):  # not on this system: only the time is limited
        pass
    env = environment()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(env, **json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
