"""JSON Lines as people's programs write them, and the log that a killed run resumes from."""
import errno
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from common import AnswerLog, UserError, json_lines, read_json, run, saved_settings


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        run(lambda: pytest.fail("it ran"))
    assert capsys.readouterr().err.count("start it with python, not with torchrun") == said


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
    monkeypatch.setattr("common.fcntl", None)  # Windows
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
