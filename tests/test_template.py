"""formats/template.py: transformers' text for any template, and a line for whatever goes wrong."""
import json
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from formats import template
from formats.template import TemplateError, render

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
    ("{{ ('x' * 99999999) ~ ('y' * 99999999) * 99 }}",
     "needs more than 1024 MB|OverflowError|takes more than 10 seconds"),  # on a busy machine
    ("{% for i in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "it makes 99,980,001 characters"),
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError: Range too big"),
])
def test_what_goes_wrong_is_said(text, why):
    with pytest.raises(TemplateError, match=why):
        render(text, {"messages": TALK})
    assert render("{{ 1 + 1 }}", {}) == "2"  # the next conversation is served


def test_an_endless_loop_ends(monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    loop = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}"
    start = time.perf_counter()
    with pytest.raises(TemplateError, match="takes more than 1 seconds"):
        render(loop, {})
    assert time.perf_counter() - start < 5
    assert render("{{ x }}", {"x": "next"}) == "next"
    template.RENDERER.process.kill()  # whatever ended it
    with pytest.raises(TemplateError, match="its process ended with exit code -9"):
        render("x", {})
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
