"""formats/template.py: transformers' text for any template, and a line for whatever goes wrong."""
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import eval as eval_command
import generate
import train_judge
from formats import template
from formats.template import RENDERER, TemplateError, render
from helpers import ROOT, run_command

LOOP = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
TALK = [{"role": "user", "content": "the cät <b> \"x\" 日"},
        {"role": "assistant", "content": "ok", "tool_calls": [{"name": "f", "arguments": [1]}]}]


@pytest.mark.parametrize("text", [
    "{{ messages | tojson }} {{ messages[1].tool_calls | tojson(indent=2) }}",
    "{{ messages[1] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}",
    "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "a {% generation %}{{ messages[1].content }}{% endgeneration %} b",
    "{% generation %}{% set x = 3 %}{{ x }}{% endgeneration %}{{ x }}",
    "{{ tools is none }} {{ documents is none }} {{ unknown is defined }} {{ bos_token }}",
    "{% if tools %}t{% endif %}{% if documents is not none %}d{% endif %}",
    "{{ strftime_now('%Y') }}",
    "{%- set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}"
    "{% endfor %}\n  {{ ns.found }}\n",
    "  {% if true %}\n x\n  {% endif %}\ny {# note #}\n",
    "{{ messages[0]['content'].split('<')[-1].lstrip('b').strip() }}",
    "{{ messages[0].content | trim | upper | replace('X', 'y') }} {{ messages | length }}",
    "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say('a') }}{{ messages[::-1][0].role }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ 7 // 2 }}",
])
def test_renders_as_transformers_does(text):
    theirs, _ = render_jinja_template([TALK], chat_template=text, bos_token="<s>")
    ours = render(text, {"messages": TALK, "bos_token": "<s>", "tools": None, "documents": None,
                         "add_generation_prompt": False})
    assert ours == theirs[0]


@pytest.mark.parametrize("text,why", [
    ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
    ("a\n{% if %}", "line 2: Expected an expression"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError: .*'__class__'.*unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "SecurityError"),
    ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ messages[0].content + 1 }}", "TypeError: .*str"),
    ("{{ nothing.at_all }}", "UndefinedError: 'nothing' is undefined"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% include 'x' %}", "TypeError: no loader"),
    ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "it makes 99,980,001 characters"),
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
])
def test_what_goes_wrong_is_said(text, why):
    with pytest.raises(TemplateError, match=why):
        render(text, {"messages": TALK})
    assert render("{{ 1 + 1 }}", {}) == "2"  # the next conversation is served


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    start = time.perf_counter()
    with pytest.raises(TemplateError, match="takes more than 1 seconds"):
        render(LOOP, {})
    assert time.perf_counter() - start < 5
    assert render("{{ x }}", {"x": "next"}) == "next"


def test_a_template_sees_neither_our_files_nor_our_variables(monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    for text in ("{{ os }}", "{{ environ }}", "{{ open }}", "{{ self.__init__ }}", "{{ json }}"):
        try:
            assert "s3cret" not in (out := render(text, {})) and out == ""
        except TemplateError:
            pass


def test_text_of_any_kind_passes_unharmed():
    for text in ("a\u2028b\x85c\x00d\n\r\n", "👩‍👩‍👧", "\ufdd0x\ufdd1", "x" * 900_000):
        assert render("{{ messages[0].content }}", {"messages": [{"content": text}]}) == text
    assert json.loads(render("{{ x | tojson }}", {"x": {"é": [1, None, True]}})) == {
        "é": [1, None, True]}


# ---------------------------------------------------------------- the process

def next_is_served():
    return render("{{ x }}", {"x": "next"}) == "next"


def busy():
    """Wait until a template renders."""
    deadline = time.monotonic() + 30
    while not RENDERER.process or RENDERER.process.poll() is not None or not RENDERER.lock.locked():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_that_something_ends_is_replaced():
    def end():
        busy()
        time.sleep(0.3)
        RENDERER.process.send_signal(signal.SIGSEGV)

    threading.Thread(target=end).start()
    with pytest.raises(TemplateError, match="^its process ended with exit code -11$"):
        render(LOOP, {})
    assert next_is_served()
    RENDERER.process.kill()  # while it waits for a conversation
    os.waitid(os.P_PID, RENDERER.process.pid, os.WEXITED | os.WNOWAIT)
    assert next_is_served()


def test_ctrl_c_leaves_no_answer_for_the_next_conversation():
    """And does not reach the process itself, which would end between two turns of a chat."""
    def interrupt():
        busy()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    assert next_is_served()
    assert os.getpgid(RENDERER.process.pid) != os.getpgid(0)
    slow = LOOP.replace("99999", "9999") + "old"  # some seconds
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        render(slow, {})
    assert next_is_served()


def test_a_bound_that_is_over_as_the_answer_comes_does_not_end_the_next_conversation(monkeypatch):
    class Late(threading.Timer):
        def run(self):
            self.finished.wait()  # until it is cancelled, which comes a little too late
            time.sleep(0.2)
            self.function()

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Timer", Late)
        with pytest.raises(TemplateError, match="takes more than"):
            render("x", {})
    assert next_is_served()


@pytest.mark.parametrize("script,why", [
    ("exec sleep 60", "takes more than 1 seconds"),  # it never reads
    ("exit 3", "its process ended with exit code 3"),
    ("echo hello; exec {python} {file}", "its process prints b'hello"),
    ("printf '{{\"text\": \"half'", "its process ended with exit code 0"),
    ("exec {python} -S {file}", "ModuleNotFoundError: No module named 'jinja2'"),
    (None, "no process can be started for it: No such file or directory"),
])
def test_a_process_that_cannot_answer_is_an_error(script, why, tmp_path, monkeypatch):
    python = tmp_path / "python"
    if script:
        python.write_text("#!/bin/sh\n" + script.format(python=sys.executable,
                                                        file=template.__file__))
        python.chmod(0o755)
    RENDERER._end()
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(template, "SECONDS", 1 if script and "sleep" in script else 10)
    with pytest.raises(TemplateError, match=why):
        render("x", {"long": "x" * 1_000_000})  # more than a pipe holds
    monkeypatch.undo()
    assert next_is_served()


@pytest.mark.parametrize("what", ["waits", pytest.param("loops", marks=pytest.mark.slow)])
def test_the_process_of_a_killed_command_ends(what):
    """At once where it waits; else when its own bound is over, some seconds after ours."""
    code = (f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom formats.template import *\n"
            "render('x', {})\nprint(RENDERER.process.pid, flush=True)\n"
            + (f"render({LOOP!r}, {{}})" if what == "loops" else "import time\ntime.sleep(60)"))
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    watched = os.pidfd_open(int(command.stdout.readline()))
    time.sleep(0.5)  # the loop begins
    command.kill()
    command.wait()
    command.stdout.close()
    start = time.monotonic()
    assert select.select([watched], [], [], 30)[0]
    assert time.monotonic() - start < (template.SECONDS + 10 if what == "loops" else 5)
    os.close(watched)


# ---------------------------------------------------------------- whatever a template does

HOSTILE = {
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}": "RecursionError",
    "{{ " + "not " * 9999 + "1 }}": "RecursionError",
    "{{ 1" + "|string" * 9999 + " }}": "RecursionError",
    "{% if 1 %}" * 9999 + "{% endif %}" * 9999: "RecursionError",
    "{% for a in [1] %}" * 30 + "{% endfor %}" * 30: "SyntaxError: too many",
    "{% block a %}{{ self.a() }}{% endblock %}": "RecursionError",
    "{% set n = namespace(x='xx') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}":
        "needs more than 1024 MB|takes more than",
    "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x }}": "RecursionError",
    "{% set n = namespace(x=[]) %}{% for i in range(9999) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ raise_exception(n.x) }}": "^TemplateError$",  # its str() fails
    "{{ raise_exception('x' * 10**6) }}": "^x{1000}$",
    "{{ raise_exception() }}": "TypeError: .*missing",
    "{{ raise_exception(nothing) }}": "^TemplateError$",
    "{{ 1 | " + "x" * 10**5 + " }}": "^line 1: No filter named 'x{900}",
    "{{ 10 ** 5000 }}": "ValueError: Exceeds the limit",
    "{{ '%99999999999d' % 1 }}": "needs more than 1024 MB",
    "{{ strftime_now(5) }}": "TypeError",
    "{{ strftime_now('\ud800') }}": "UnicodeEncodeError",
    "{{ '%(a)s' % {} }}": "KeyError: 'a'",
    "{{ (10 ** 400) | float }}": "OverflowError",
    "{{ range | tojson }}": "TypeError: .*not JSON",
    "{{ [].pop() }}": "SecurityError",
    "{% break %}": "SyntaxError: 'break' outside loop",
    "x" * 1_100_000: "it makes 1,100,000 characters",
    "\ud800{{ '\0' }}{{ '\ud800' }}\0": None,  # these are text
    "{{ 9 ** 9 ** 9 }}{{ '9' * 5000 | int }}": None,
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:40].encode("unicode_escape").decode())
def test_a_hostile_template_is_text_or_a_line(text):
    start = time.monotonic()
    if why := HOSTILE[text]:
        with pytest.raises(TemplateError, match=why) as e:
            render(text, {"messages": TALK})
        assert len(str(e.value)) <= 1000
    else:
        render(text, {"messages": TALK})
    assert time.monotonic() - start < template.SECONDS + 5


def piece(r, depth=0):
    """A random expression or statement of a template, with everything that ever hurt."""
    if depth > 3 or r.random() < 0.3:
        return r.choice(["1", "'x' * 10**6", "messages", "nothing", "none", "[]", "{}", "10**5000",
                         "range(99999)", "'\ud800'", "'\\0'", "1e999", "self", "loop", "caller",
                         "raise_exception", "namespace()", "cycler(1)", "joiner()", "lipsum"])
    a, b = piece(r, depth + 1), piece(r, depth + 1)
    name = r.choice(["string", "int", "float", "list", "tojson", "length", "join", "sum", "sort",
                     "pprint", "upper", "title", "urlize", "wordwrap(1)", "indent(10**6)", "first",
                     "center(10**6)", "batch(2)", "map('upper')", "random", "unknown", "striptags",
                     "dictsort", "groupby('role')", "attr('__class__')", "replace('x', 'xx')"])
    return r.choice(["({a} + {b})", "({a} ~ {b})", "({a} * {b})", "({a} ** 9)", "{a} / {b}",
                     "{a}[{b}]", "{a}.__class__", "{a}({b})", "[{a}, {b}] | {name}", "{a} | {name}",
                     "{{{a}: {b}}}", "{a} if {b}", "not {a}", "({a} % {b})", "{a}.format({b})",
                     "strftime_now({a})", "raise_exception({a})", "{a} in {b}", "{a} == {b}",
                     "{a}.items()", "{a}[::{b}]", "({a}", "{a} ' {b}"]
                    ).format(a=a, b=b, name=name)


def statement(r, depth=0):
    body = "".join(statement(r, depth + 1) for _ in range(r.randrange(3))) if depth < 4 else "x"
    return r.choice([
        "{{{{ {e} }}}}", "{{% for a in {e} %}}{b}{{% endfor %}}", "{{% if {e} %}}{b}{{% endif %}}",
        "{{% set x = {e} %}}", "{{% set x %}}{b}{{% endset %}}", "{{% include {e} %}}",
        "{{% macro m(a={e}) %}}{b}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}", "{{% break %}}",
        "{{% for a in range(9999) %}}{b}{{% endfor %}}", "{{% filter upper %}}{b}{{% endfilter %}}",
        "{{% block b %}}{b}{{{{ self.b() }}}}{{% endblock %}}", "{{% extends {e} %}}",
        "{{% set n = namespace(y={e}) %}}{{% for a in range(99) %}}{{% set n.y = n.y + n.y %}}"
        "{{% endfor %}}", "{{% generation %}}{b}{{% endgeneration %}}", "{b}", "{{# {e}",
        "{{% call(a) m({e}) %}}{b}{{% endcall %}}", "{{% for a in {e} recursive %}}"
        "{{{{ loop({e}) }}}}{{% endfor %}}"]).format(e=piece(r), b=body)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_templates_end_in_text_or_a_line(seed, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 2)
    r, ended = random.Random(seed), {"text": 0, "error": 0}
    for i in range(80):
        text = "".join(statement(r) for _ in range(r.randrange(1, 4)))
        start = time.monotonic()
        try:
            assert type(render(text, {"messages": TALK})) is str
            ended["text"] += 1
        except TemplateError as e:
            assert 0 < len(str(e)) <= 1000, (seed, i, text)
            ended["error"] += 1
        assert time.monotonic() - start < 10, (seed, i, text)
    assert min(ended.values()) > 1 and next_is_served()


@pytest.mark.parametrize("command", [generate, eval_command, train_judge],
                         ids=lambda c: c.__name__)
@pytest.mark.parametrize("text,why", [
    ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    ("{{ raise_exception('a\nb\x1b[2J') }}", "a\\nb\\x1b[2J"),
    (LOOP, "it takes more than 1 seconds")], ids=["error", "control characters", "loop"])
def test_a_command_says_one_line(command, text, why, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(template, "SECONDS", 1 if text == LOOP else 10)
    demo = ROOT / "checkpoints" / "demo"
    target = shutil.copytree(demo / "target", tmp_path / "target")
    (target / "chat_template.jinja").write_text(text)
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "a", "answer": "b", "error": null}\n{"prompt": "c", "answer": "b", '
        '"error": [0, 1]}\n')
    flags = {generate: ("--prompt", "x"), eval_command: (
        "--task", "demo", "--data", demo / "problems.jsonl", "--rules", "target", "--out",
        tmp_path / "out"), train_judge: ("--data", tmp_path / "data.jsonl", "--out",
                                         tmp_path / "judge.safetensors")}
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, command, "--target", target, "--chat", *flags[command])
    said = capsys.readouterr().err
    assert end.value.code == 2 and why in said and said.startswith("error: the chat template of ")
    assert said.count("\n") == 1
