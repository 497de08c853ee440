"""demo/open_prompts.py: a chat's opening, what is kept of the turns that a model writes, and no
word of a benchmark among them.
"""
import json
import shutil

import pytest

from demo import open_prompts as P
from drafters.answering import answer
from helpers import (
    ROOT,
    one_thread,  # noqa: F401
    random_model,
    run_command,
    save_checkpoint,
    tiny_config,
)
from tokenizer import Tokenizer

DEMO = ROOT / "checkpoints" / "demo" / "target"
CONFIG = tiny_config(vocab_size=1024, eos_token_id=2, bos_token_id=1)
TEMPLATE = "[BEGIN] {% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %} answer:"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A random target of the demo's tokenizer with a chat template."""
    home = tmp_path_factory.mktemp("prompts")
    save_checkpoint(home / "target", random_model(CONFIG), CONFIG)
    shutil.copy(DEMO / "tokenizer.model", home / "target")
    (home / "target" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return home


def write(monkeypatch, home, turns, tmp_path, *more):
    """The kept prompts of a model that writes these turns, (text, ended); and what it was given."""
    tokenizer, given = Tokenizer.from_dir(home / "target"), []
    coded = [tokenizer.encode(text, continuation=True) + [2] * ended for text, ended in turns]

    def written(target, prompts, room, eos_ids, temperature, seed):
        given.append((prompts, room, eos_ids, temperature, seed))
        return coded

    monkeypatch.setattr(P, "answer", written)
    run_command(monkeypatch, P, "--target", home / "target", "--out", tmp_path / "out", *more)
    lines = (tmp_path / "out").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines], given


def test_what_is_kept_and_what_is_counted(monkeypatch, home, tmp_path, capsys):
    (tmp_path / "apart.jsonl").write_text(
        '{"key": 1, "prompt": "One two, three four five SIX seven eight nine!"}\n'
        '{"question": "where is the town"}\n{"turns": ["a b c d e f g h", "later"]}\n')
    (tmp_path / "more.jsonl").write_text(
        '{"question": "first of more"}\n{"question": "where is the town?"}\n{"question": "third"}')
    turns = [("tell me of the one two three", True), ("Tell me  of the one two three", True),
             ("a turn that does not come to an", False), ("no", True),
             ("so two three four five six seven eight nine", True),
             ("so two three four five six seven eight, not nine", True),
             ("Where is the town", True), ("another that is kept", True)]
    kept, given = write(monkeypatch, home, turns, tmp_path, "--n", 3, "--temperature", 0.6,
                        "--apart", tmp_path / "apart.jsonl", "--also", tmp_path / "more.jsonl",
                        "--also_n", 2)
    assert kept == ["tell me of the one two three", "so two three four five six seven eight, not "
                    "nine", "another that is kept", "first of more"]
    said = capsys.readouterr().out
    for part in ("3 prompts and 1 of --also", "1 twice", "1 not ended", "1 too short",
                 "2 shared with --apart", "1 of --also"):
        assert part in said
    ((prompts, room, eos_ids, temperature, _),) = given
    want = Tokenizer.from_dir(home / "target").encode("[BEGIN] user:", bos=False)
    assert prompts == [prompts[0]] * P.TOGETHER and prompts[0][:len(want)] == want
    assert len(prompts[0]) <= len(want) + 1  # a tokenizer may put the blank there
    assert (room, eos_ids, temperature) == (P.LONGEST, [2], 0.6)


def test_groups_go_on_with_other_seeds_until_enough_are_kept(monkeypatch, home, tmp_path):
    calls = iter(range(100))
    words = "zero one two three four".split()
    tokenizer, seeds = Tokenizer.from_dir(home / "target"), []

    def written(target, prompts, room, eos_ids, temperature, seed):
        seeds.append(seed)
        text = f"the prompt of number {words[next(calls)]} in words"
        return [tokenizer.encode(text, continuation=True) + [2]] * 3

    monkeypatch.setattr(P, "answer", written)
    run_command(monkeypatch, P, "--target", home / "target", "--out", tmp_path / "out", "--n", 3)
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 3 and len(set(seeds)) == 3


def test_a_model_writes_them_itself(monkeypatch, home, tmp_path):
    """A random one: with most tokens as EOS its turns end soon. Twice one command: one file."""
    many = list(range(2, 900))
    monkeypatch.setattr(P, "SHORTEST", 1)
    monkeypatch.setattr(P, "answer", lambda target, prompts, room, eos_ids, *more: [
        [*a[:-1], 2] if a[-1] in many else a for a in answer(target, prompts, room, many, *more)])
    outs = []
    for name in "ab":
        run_command(monkeypatch, P, "--target", home / "target", "--n", 5, "--out", tmp_path / name)
        outs.append((tmp_path / name).read_text())
    assert outs[0] == outs[1] and len(set(outs[0].splitlines())) == 5


@pytest.mark.parametrize("more,message", [
    (("--n", 0), "--n is 0; it must be at least 1"),
    (("--temperature", 0), "--temperature is 0.0; it must be above 0"),
    (("--apart", "bad.jsonl"), "bad.jsonl, line 2: no prompt in it; a line has prompt, question, "),
    (("--also", "bad.jsonl"), "bad.jsonl, line 2: no prompt in it"),
    (("--also", "out"), "--out out is also"),
    (("--apart", "nowhere"), "cannot read nowhere"),
    (("--target", "plain"), "has no chat template"),
    (("--target", "target"), "beside"),  # a random model ends no turn
])
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, home, tmp_path, capsys, more,
                                                  message):
    monkeypatch.chdir(tmp_path)
    for name in ("target", "plain"):
        shutil.copytree(home / "target", tmp_path / name)
    (tmp_path / "plain" / "tokenizer_config.json").unlink()
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"instruction": "y"}\n')
    monkeypatch.setattr(P, "answer", lambda target, prompts, *more: [[5, 6, 7]] * len(prompts))
    with pytest.raises(SystemExit) as e:
        run_command(monkeypatch, P, "--target", "target", "--out", "out", *more)
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
