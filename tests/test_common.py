"""JSON Lines as people's programs write them, and the log that a killed run resumes from."""
import errno
import gzip
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import common
from common import (
    UserError,
    json_lines,
    open_weights,
    read_json,
    run,
)
from formats.answer_log import AnswerLog, saved_settings

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("data", [
    b'{"a": 1}\n\n{"a": "\xe2\x80\xa8x"}\n',  # U+2028 inside a string ends no line
    b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xe2\x80\xa8x"}\r\n',
    b'{"a": 1}\n \n{"a": "\\u2028x"}',  # no line end behind the last
    gzip.compress(b'{"a": 1}\n\n{"a": "\xe2\x80\xa8x"}\n'),
], ids=["plain", "BOM and CRLF", "no last line end", "gzip"])
def test_the_one_reader(tmp_path, data):
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    lines = json_lines(path, "examples")
    assert [line.value for line in lines] == [{"a": 1}, {"a": "\u2028x"}]
    assert [line.where for line in lines] == [f"{path}, line 1", f"{path}, line 3"]


@pytest.mark.parametrize("data, message", [
    (b'{"a": 1}\n{', "x.jsonl, line 2: not JSON"), (b'{"a": 1}\n\xff\n', "line 2: not UTF-8 text"),
    (b"[1]\n", "line 1: not a JSON object"), (b"\n\n", "x.jsonl holds no examples"),
    (b"\x1f\x8bnonsense", "cannot read .*x.jsonl: it is not whole gzipped text"),
])
def test_a_bad_line_is_named(tmp_path, data, message):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=message):
        json_lines(tmp_path / "x.jsonl", "examples")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing: No such file"):
        json_lines(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing does not exist"):
        read_json(tmp_path / "nothing")


def test_a_log_resumes_from_wherever_it_was_cut(tmp_path):
    path, about = tmp_path / "log.jsonl", tmp_path / "settings.json"
    log = AnswerLog(path, {"k": 1}, about)
    assert not path.exists() and not about.exists()  # nothing is left behind by a refused run
    values = [{"i": i, "text": "\u2028é"} for i in range(3)]
    for value in values:
        log.append(value)
    log.close()
    whole = path.read_bytes()
    assert whole.isascii() and read_json(about) == {"k": 1}
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = AnswerLog(path, {"k": 1}, about)
        there = len(log.values)
        assert log.values == values[:there] and there >= whole[:cut].count(b"\n")
        for value in values[there:]:
            log.append(value)
        log.close()
        assert path.read_bytes() in (whole, whole[:-1]), cut  # the last "\n" comes with a next line


def test_a_log_can_take_back_its_last_line_and_is_locked(tmp_path):
    log = AnswerLog(tmp_path / "log.jsonl")
    log.append({"i": 1})
    log.append({"i": 2})
    log.pop()
    assert [line.value for line in json_lines(log.path)] == log.values == [{"i": 1}]
    other = AnswerLog(log.path, {"k": 2}, tmp_path / "settings.json")
    with pytest.raises(UserError, match="in use by another run"):
        other.append({"i": 3})
    assert not (tmp_path / "settings.json").exists()  # one that is refused writes nothing
    log.remove()
    assert not log.path.exists()


def test_a_tail_that_is_not_ours_is_not_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"i": 1}\n{"j"')
    with pytest.raises(UserError, match="line 2: not JSON"):
        AnswerLog(path, torn=lambda tail: tail.startswith(b'{"i'))
    assert len(AnswerLog(path, torn=lambda tail: tail.startswith(b'{"j')).lines) == 1


def test_other_settings_are_refused(tmp_path):
    about, answers = tmp_path / "settings.json", tmp_path / "answers.jsonl"
    assert saved_settings(about, answers, {"k": 1}) == {}
    answers.write_text("{}\n")
    with pytest.raises(UserError, match="without settings.json"):
        saved_settings(about, answers, {"k": 1})
    about.write_text(json.dumps({"k": 1, "draft": None, "rules": ["a"]}))
    same = {"k": 1, "draft": "x", "rules": ["b"]}
    assert saved_settings(about, answers, same, ("rules",), ("draft",))["rules"] == ["a"]
    with pytest.raises(UserError, match="draft was None, now x; rules was"):
        saved_settings(about, answers, same)
    with pytest.raises(UserError, match="other settings: k was 1, now 2. Take another --out"):
        saved_settings(about, answers, same | {"k": 2}, ("rules",), ("draft",))


def test_control_characters_of_an_error_are_shown_escaped(capsys):
    def main():
        raise UserError("it says \x1b[31mred\nand \u202eturned, é日")
    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert capsys.readouterr().err == "error: it says \\x1b[31mred\\nand \\u202eturned, é日\n"


@pytest.mark.parametrize("rank, said", [("0", 1), ("1", 0)])
def test_a_command_without_a_model_is_no_command_for_torchrun(rank, said, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
                        "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1234",
                        "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: pytest.fail("it ran"))
    assert capsys.readouterr().err.count("start it with python, not with torchrun") == said


# ---------------------------------------------------------------- input of every kind

DEEP = b'{"a": ' + b"[" * 200_000
BAD_JSON = {
    "too deep": (DEEP + b"]" * 200_000 + b"}", "nested too deep"), "cut deep": (DEEP, "too deep"),
    "201 deep": (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deep"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"), "inf": (b'{"a": -Infinity}', "no JSON number"),
    "1e999": (b'{"a": [1e999]}', "1e999 is no JSON number"), "long": (b'{"a": %s}' % (b"1" * 9999),
                                                                     ""),
    "half": (b'{"a": "\\ud83d"}', "half a character"), "key": (b'{"\\uDC00": 1}', "half a char"),
    "bytes": (b'{"a": "\xed\xa0\x80"}', "not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "UTF-8"),
    "text": (b'"a"', "not a JSON object"), "null": (b"null", "not a JSON object"),
}


@pytest.mark.parametrize("data, message", BAD_JSON.values(), ids=BAD_JSON)
def test_json_that_others_do_not_take_is_named(tmp_path, data, message):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    for read in read_json, json_lines:
        with pytest.raises(UserError, match=f"x.json.*{message}") as e:
            read(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_json_that_is_right_is_read_whatever_it_holds(tmp_path):
    value = {"a": "\U0001f389 \\ud83d", "n": 1e300, "deep": json.loads("[" * 199 + "]" * 199),
             "wide": [[] for _ in range(1000)]}
    for data in json.dumps(value).encode(), b"\xef\xbb\xbf" + json.dumps(value).encode():
        (tmp_path / "x.json").write_bytes(data)
        assert read_json(tmp_path / "x.json") == json_lines(tmp_path / "x.json")[0].value == value


def test_gzip_that_is_broken_anywhere_is_named(tmp_path):
    whole = gzip.compress(b'{"a": "%s"}\n' % random.Random(0).randbytes(400).hex().encode())
    path = tmp_path / "x.jsonl.gz"
    for i in range(2, len(whole), 7):
        for data in whole[:i], whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:]:
            path.write_bytes(data)
            try:
                json_lines(path)  # some bytes of its header mean nothing
            except UserError as e:
                assert str(path) in str(e)


def special_files(directory):
    """{name: path} of what is not a plain file."""
    os.mkfifo(directory / "fifo")
    (directory / "loop").symlink_to("loop")
    (directory / "dangling").symlink_to("nowhere")
    (directory / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(directory / "socket"))
    (directory / "directory").mkdir()
    names = "fifo", "loop", "dangling", "zero", "socket", "directory", "n" * 255, "n" * 256
    return {name[:9]: directory / name for name in names}


@pytest.mark.parametrize("read", [read_json, json_lines, open_weights, common.file_hash])
def test_what_is_not_a_plain_file_is_refused_at_once(tmp_path, read):
    for name, path in special_files(tmp_path).items():
        with pytest.raises(UserError, match=re.escape(str(path))) as e:
            read(path)
        assert "\n" not in str(e.value) and "None" not in str(e.value), (name, e.value)


def test_outputs_replace_plain_files_only(tmp_path):
    for name, path in special_files(tmp_path).items():
        if name in ("fifo", "zero", "socket", "directory"):
            with pytest.raises(UserError, match="cannot write"):
                common.write_text(path, "x")
            assert not path.is_file()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


WRITING = """
import pathlib, sys, time, common
with common.replacing(sys.argv[1]) as tmp:
    if sys.argv[2] == "file":
        tmp.write_text("half")
    else:
        tmp.mkdir()
        (tmp / "model.safetensors").write_text("half")
    print(tmp, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_a_killed_run_left_is_cleared_by_the_next_and_no_more(tmp_path, kind):
    out = tmp_path / "out"
    killed, living = (subprocess.Popen([sys.executable, "-c", WRITING, out, kind], cwd=ROOT,
                                       stdout=subprocess.PIPE, text=True) for _ in range(2))
    left, held = (Path(p.stdout.readline().strip()).parent for p in (killed, living))
    killed.kill()
    killed.wait()
    try:
        assert left.exists() and left.parent == held.parent == tmp_path
        others = [tmp_path / left.name.replace("out", "other"), tmp_path / f"{left.name}x"]
        for path in others:
            path.mkdir()
        link = tmp_path / ".out.tmp-1-abcdefgh"
        link.symlink_to(others[0])
        common.write_text(out, "x")
        assert sorted(tmp_path.iterdir()) == sorted([out, held, link, *others])
    finally:
        for p in killed, living:
            p.kill()
            p.wait()
            p.stdout.close()


def test_a_failure_leaves_what_was_there(tmp_path):
    (tmp_path / "out").write_text("before")
    for error in ValueError, OSError(28, "No space left on device"), KeyboardInterrupt:
        with pytest.raises((ValueError, UserError, KeyboardInterrupt)):
            with common.replacing(tmp_path / "out") as tmp:
                tmp.write_text("half")
                raise error
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert (tmp_path / "out").read_text() == "before"


def test_an_output_may_have_the_longest_name_and_gets_the_usual_mode(tmp_path):
    common.write_text(tmp_path / ("é" * 127), "x")
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / ("é" * 127)).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_an_output_is_no_input_and_no_other_output(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in "config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "judge.txt":
        (checkpoint / name).write_text(name)
    index = {"weight_map": {"x": "odd/weights.bin"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    data = tmp_path / "data.jsonl"
    data.write_text("x")
    (tmp_path / "link").symlink_to(data)
    os.link(data, tmp_path / "hard")
    (tmp_path / "shard").symlink_to(checkpoint / "model-00001-of-00002.safetensors")
    reads = {"--target": checkpoint, "--data": data, "--draft": None}
    for out in (data, tmp_path / "link", tmp_path / "hard", tmp_path / "checkpoint/../data.jsonl",
                checkpoint / "config.json", tmp_path / "shard", checkpoint / "tokenizer.json",
                checkpoint / "generation_config.json", checkpoint / "original/tokenizer.model",
                checkpoint / "odd" / "weights.bin", checkpoint / "model.safetensors"):
        with pytest.raises(UserError, match=f"--out {out} is also (--data|a file of --target);"):
            common.check_apart({"--out": out}, reads)
    for out in tmp_path / "new", checkpoint / "judge.txt", checkpoint / "results.json":
        common.check_apart({"--out": out, "--json": None}, reads)
        with pytest.raises(UserError, match="--json .* is also --out;"):
            common.check_apart({"--out": out, "--json": out.parent / "x" / ".." / out.name}, reads)


def command(code, **more):
    return subprocess.Popen([sys.executable, "-c", f"import common, sys\n{code}"], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.parametrize("code, status, out, err", [
    ("fail(common.UserError('a\\x1b[31m\\nb\\ud800'))", 2, "", r"error: a\x1b[31m\nb\ud800"),
    ("fail(common.UserError('a' * 10_000))", 2, "", f"error: {'a' * (common.LONGEST - 7)} ..."),
    ("open('/nowhere/x')", 2, "", "error: /nowhere/x: No such file or directory"),
    ("common.tell('\\x1b[2J \\x9b \\u202e\\nline 2')", 0, "", "\\x1b[2J \\x9b \\u202e\nline 2"),
    ("common.say('\\x1b[2J \\x9b \\u202e\\nline 2')", 0, "\\x1b[2J \\x9b \\u202e\nline 2", ""),
    ("print('\\ud800é')", 0, r"\ud800\xe9", ""),
])
def test_what_is_said_is_printable_in_any_encoding(code, status, out, err):
    p = command(f"def fail(e):\n raise e\ncommon.run(lambda: {code})",
                env=os.environ | {"PYTHONIOENCODING": "ascii"})
    said = [x.decode().removesuffix("\n") for x in p.communicate()]
    assert (p.returncode, *said) == (status, out, err)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("how, status, said", [
    (">&-", 0, ""), ("2>&-", 0, None), ("<&-", 0, ""), (">&- 2>&- <&-", 0, None),
    (">/dev/full", 2, "error: cannot write the output: No space left on device\n"),
])
def test_a_closed_or_full_output_is_no_traceback(tmp_path, how, status, said, unbuffered):
    code = ("def main():\n open('f', 'w').close(); print('x' * 100); sys.stdin.read()\n"
            " common.tell('') if 0 else None\ncommon.run(main)")
    p = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {how}', sys.executable,
                        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common\n{code}"],
                       cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                       env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert (p.returncode, p.stderr) == (status, said or ""), p
    assert (tmp_path / "f").stat().st_size == 0  # what was printed went into no file


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_has_gone_ends_the_run_in_silence(lines, unbuffered):
    p = command(f"import time; time.sleep(0.3)\n"
                f"common.run(lambda: [print('x') for _ in range({lines})])",
                env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    p.stdout.close()
    assert (p.wait(60), p.stderr.read()) == (141, b"")
    p.stderr.close()


@pytest.mark.parametrize("flags, message", [
    (["--n", "9" * 30], "--n is 9+, which is too large"), (["--n", "x"], "invalid int value: 'x'"),
    (["--path", "loop"], "--path loop: Too many levels"), (["--path", "n" * 256], "too long"),
    (["--path", os.fsdecode(b"\xff")], "--path .* is not UTF-8"),
    (["--text", os.fsdecode(b"a\xff")], "--text .* is not UTF-8"),
    (["--list", "1", "9" * 20], "--list is 9+, which is too large"),
])
def test_values_that_no_command_can_use_are_refused(tmp_path, monkeypatch, flags, message):
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    p = common.Parser()
    for name, kind in ("--n", int), ("--path", Path), ("--text", str):
        p.add_argument(name, type=kind)
    p.add_argument("--list", type=int, nargs="+")
    assert p.parse_args(["--n", "-5", "--path", "new", "--text", "é"]).n == -5
    with pytest.raises(UserError, match=message):
        p.parse_args(flags)


def test_a_value_of_another_kind_is_named_with_what_it_must_be():
    kinds = {"n": common.whole(1, 10), "x": common.number(0, above=True), "t": common.TEXT,
             "i": common.whole(0) | common.list_of(common.whole(0), "ids"), "f": common.FLAG}
    common.check_kinds({"n": 10, "x": 0.5, "t": None, "i": [0, 1], "other": []}, kinds, "f.json")
    for key, values in {"n": [0, 11, 1.0, True, "1", [], {}], "x": [0, -1, True, "1", 1e999],
                        "t": [1, [], {}, False], "i": [-1, [1.5], "1", {}], "f": [0, "true"]
                        }.items():
        for value in values:
            with pytest.raises(UserError, match=f"f.json: {key} is .*; it must be "):
                common.check_kinds({key: value}, kinds, "f.json")
OTHER_HANDS = {
    "removed": (lambda p: p.unlink(), "was removed or renamed"),
    "replaced by the same text": (lambda p: (p.rename(f"{p}.old"),
                                             p.write_bytes(Path(f"{p}.old").read_bytes())),
                                  "was replaced"),
    "replaced by a rename": (lambda p: (Path(f"{p}.new").write_bytes(p.read_bytes()),
                                        os.replace(f"{p}.new", p)), "was replaced"),
    "grown": (lambda p: p.open("a").write("{}\n"), "was changed by another run or program"),
    "shrunk": (lambda p: os.truncate(p, p.stat().st_size - 1), "was changed by another"),
    "its directory removed": (lambda p: shutil.rmtree(p.parent), "was removed or renamed"),
    "its directory renamed": (lambda p: p.parent.rename(f"{p.parent}.old"), "was removed"),
    "its directory a file": (lambda p: (shutil.rmtree(p.parent), p.parent.write_text("")),
                             "Not a directory"),
}


@pytest.mark.parametrize("moment", ["open", "only read"])
@pytest.mark.parametrize("how", OTHER_HANDS)
def test_a_log_that_another_hand_changed_is_left_alone(tmp_path, how, moment):
    home = tmp_path / "home"
    home.mkdir()
    path, (change, what) = home / "log.jsonl", OTHER_HANDS[how]
    log = AnswerLog(path)
    for i in range(2):
        log.append({"i": i})
    if moment == "only read":
        log.close()
        log = AnswerLog(path)
    change(path)
    there = lambda: {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    before = there()
    for act in (lambda: log.append({"i": 2}), log.pop, log.check):
        if act != log.pop or moment == "open":
            with pytest.raises(UserError, match=f"{path}.*{what}"):
                act()
        assert log.values == [{"i": 0}, {"i": 1}] and there() == before
    log.close()


def test_a_file_that_appeared_meanwhile_is_not_appended_to(tmp_path):
    log = AnswerLog(tmp_path / "log.jsonl")
    log.path.write_text("{}\n")
    with pytest.raises(UserError, match="changed by another"):
        log.append({"i": 1})
    assert log.path.read_text() == "{}\n"


def test_blank_lines_do_not_shift_what_is_taken_back(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"i": 0}\n\n\n{"i": 1}\n\n')
    log = AnswerLog(path)
    log.open()
    for before in (b'{"i": 0}\n\n\n', b""):
        log.pop()
        log.append({"i": 7})
        assert path.read_bytes() == before + b'{"i": 7}\n'
        log.pop()
        assert path.read_bytes() == before and len(log.lines) == bool(before)


@pytest.mark.parametrize("last", [b'{"i": 0}\n', b'{"i": 0}'], ids=["whole", "no line end"])
def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch, last):
    path = tmp_path / "log.jsonl"
    path.write_bytes(last)
    write, sync = os.write, os.fsync

    def half(fd, data):
        write(fd, data[:len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(fd):
        if os.fstat(fd).st_size > len(last):
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(fd)

    for name, broken in (("write", half), ("fsync", full)):  # a quota is told by fsync
        log = AnswerLog(path)
        for _ in range(2):
            with monkeypatch.context() as m, pytest.raises((OSError, UserError), match="No space"):
                m.setattr(os, name, broken)
                log.append({"i": 1})
            assert path.read_bytes() == last
        log.close()
    log = AnswerLog(path)
    log.append({"i": 1})
    log.close()
    assert path.read_bytes() == b'{"i": 0}\n{"i": 1}\n'


def test_settings_that_vanish_are_written_again(tmp_path):
    log = AnswerLog(tmp_path / "log.jsonl", {"k": 1}, tmp_path / "settings.json")
    log.append({"i": 0})
    log.about.unlink()
    log.append({"i": 1})
    assert read_json(log.about) == {"k": 1}


def test_a_log_works_where_files_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.answer_log.fcntl", None)  # Windows
    log = AnswerLog(tmp_path / "log.jsonl")
    log.append({"i": 0})
    log.append({"i": 1})
    log.pop()
    assert log.path.read_text() == '{"i": 0}\n'
    log.path.unlink()
    with pytest.raises(UserError, match="was removed"):
        log.append({"i": 1})


def test_a_path_that_no_file_can_have_is_named(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("")
    for path, why in ((loop, "symbolic links"), (tmp_path / ("x" * 300), "too long"),
                      (tmp_path / "file" / "x", "Not a directory")):
        with pytest.raises(UserError, match=f"cannot write {path}: .*{why}"):
            AnswerLog(path)
        assert saved_settings(path, path, {}) == {}


@pytest.mark.parametrize("module, environment, bad", [
    ("common", {"WORLD_SIZE": "x"}, "WORLD_SIZE=x"), ("common", {"WORLD_SIZE": ""}, "WORLD_SIZE="),
    ("common", {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
                "MASTER_PORT": "1"}, "MASTER_ADDR is not"),
    ("common", {"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is not"),
    ("ranks.job", {"WORLD_SIZE": "2"}, "RANK is not"),
    ("ranks.job", {"RANK": "3"}, "WORLD_SIZE is not"),
])
def test_half_of_torchruns_environment_is_refused(module, environment, bad):
    p = command(f"from {module} import run\nrun(lambda: print('ran'))",
                env=os.environ | environment)
    out, err = p.communicate()
    assert p.returncode == 2 and not out and err.decode().count("\n") == 1, err
    assert err.decode().startswith("error: ") and bad in err.decode()


def test_a_current_directory_that_has_gone_is_said(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="the current directory is not there any more"):
        common.Parser().parse_args([])


def test_a_gzipped_log_is_neither_added_to_nor_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(data := gzip.compress(b'{"a": 1}\n{"a'))
    with pytest.raises(UserError, match="log.jsonl: it is gzipped"):
        AnswerLog(path)
    assert path.read_bytes() == data


def test_a_link_that_leads_nowhere_is_no_missing_file(tmp_path):
    for target in "nowhere", "link":
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(UserError, match="link is a link to a file that is not there"):
            common.present(tmp_path / "link")
    assert not common.present(tmp_path / "other") and common.present(tmp_path)


def test_a_file_larger_than_the_memory_is_named(tmp_path):
    with open(tmp_path / "x.jsonl", "wb") as f:
        os.truncate(f.fileno(), 1 << 40)
    with pytest.raises(UserError, match="cannot read .*x.jsonl: the memory does not suffice"):
        json_lines(tmp_path / "x.jsonl")
