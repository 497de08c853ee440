"""eval.py and its reports: resuming after a kill anywhere, what is refused, statistics by hand,
replay against real rounds.
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import engine
import eval as E
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine, Settings, State, generate, unpack
from evaluation import intervals, report, saved
from evaluation.replay import read_texts, replay_rounds
from formats.answer_log import AnswerLog
from helpers import WRONG, random_model, run_command, save_checkpoint, tiny_config
from judge import RULES as TABLE
from judge import JudgeHead, Rule
from load import parse_rule
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "checkpoints" / "demo"
RULES = "target,draft,standard,kl:0.5,topk:2,judge"
PLOT = report.plot


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Flags of a task of six problems and of two tiny random models with a judge."""
    home = tmp_path_factory.mktemp("pair")
    lines = (DEMO / "problems.jsonl").read_text().splitlines(keepends=True)
    (home / "problems.jsonl").write_text("".join(lines[i] for i in (0, 1, 300, 301, 600, 601)))
    config = tiny_config(vocab_size=1024, max_position_embeddings=512)
    for name, noise in (("target", 0.0), ("draft", 0.03)):  # a draft that agrees now and then
        model = random_model(config, seed=1)
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        save_checkpoint(home / name, model, config)
        shutil.copy(DEMO / "target" / "tokenizer.model", home / name)
    torch.manual_seed(0)
    JudgeHead(torch.randn(1, 64) / 8, torch.zeros(1), 0.5,
              checkpoint.fingerprint(home / "target")).save(home / "judge.safetensors")
    models = ["--target", str(home / "target"), "--draft", str(home / "draft"), "--judge",
              str(home / "judge.safetensors"), "--speculate_k", "5"]
    return SimpleNamespace(home=home, models=models, all=home / "problems.jsonl",
                           task=["--task", "demo", "--data", str(home / "problems.jsonl")])


@pytest.fixture(scope="module", autouse=True)
def short():
    """Random models neither end by themselves nor are they ever right: another length and score."""
    task = E.TASKS["demo"]
    before = task.max_new_tokens, task.score
    task.max_new_tokens = 24
    task.score = lambda self, example, text: SimpleNamespace(
        right=text.count("e") % 2 == 0, how="exact" if "a" in text else "fallback")
    yield
    task.max_new_tokens, task.score = before


@pytest.fixture(scope="module")
def whole(pair):
    """The directory of a run that nothing disturbed."""
    out = pair.home / "whole"
    E.main([*pair.task, *pair.models, "--rules", RULES, "--out", str(out), "--device", "cpu"])
    return out


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Only `whole` draws one: with a disk that must write, it takes the longest."""
    monkeypatch.setattr(report, "plot", lambda results, path: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)


def lines_of(out) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def answers(out, without=("seconds",)):
    """{(rule, id): answer without its time}, each line once; (rule, id, sample) of samples."""
    lines = lines_of(out)
    key = lambda a: (a["rule"], a["id"], *([a["sample"]] if "sample" in a else []))
    assert len({*map(key, lines)}) == len(lines)
    return {key(a): {k: v for k, v in a.items() if k not in without} for a in lines}


def write_answers(out, lines):
    (out / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in lines))


def files(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


# ---------------------------------------------------------------- runs

def test_a_run_answers_everything_and_reports_it(pair, whole):
    got, rules = answers(whole), RULES.split(",")
    assert len(got) == 6 * len(rules) and {rule for rule, _ in got} == set(rules)
    order = [(a["rule"], a["id"]) for a in lines_of(whole)]
    assert [rule for rule, _ in order] == rules * 6  # the rules take turns on each problem
    assert all(len({i for _, i in order[n:n + 6]}) == 1 for n in range(0, 36, 6))
    tokenizer = Tokenizer.from_dir(pair.home / "target")
    target, draft = (checkpoint.load(pair.home / name, dtype=torch.float32)
                     for name in ("target", "draft"))
    task = E.TASKS["demo"]()
    example = task.load(pair.all)[3]
    prompt = tokenizer.encode(task.prompt(example))
    for rule, e in (("target", Engine(target)), ("draft", Engine(draft)),
                    ("topk:2", Engine(target, LlamaDrafter(draft), None, "topk", 2, 5))):
        r, a = generate(e, prompt, 24, tokenizer.eos_ids), got[rule, example["id"]]
        assert a["tokens"] == r.tokens and a["rounds"] == r.rounds
        assert a["accepted"] == sum(i * c for i, c in enumerate(r.accept_counts))
        assert a["text"] == tokenizer.decode_new(prompt, r.tokens)
        assert a["domain"] == example["domain"]
    r = json.loads((whole / "results.json").read_text())
    assert list(r["rules"]) == rules and all(m["n"] == 6 for m in r["rules"].values())
    assert len(r["domains"]) == 3 and r["rules"]["target"]["speed_up"] == 1
    assert r["standard_equals_target"] == {"same": 6, "of": 6, "different": []}
    text = (whole / "results.md").read_text()
    assert "standard equals the target token for token on 6 of 6 problems (float32)" in text
    assert "| topk:2" in text
    assert (whole / "accuracy.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(pair.home) not in text + (whole / "settings.json").read_text()


def test_resumes_wherever_the_file_was_cut(pair, whole, tmp_path, monkeypatch):
    rules, made, append = ("target", "judge"), [], AnswerLog.append
    monkeypatch.setattr(AnswerLog, "append", lambda log, a: (made.append(a), append(log, a)))
    shutil.copytree(whole, tmp_path / "source")
    write_answers(tmp_path / "source", [a for a in lines_of(whole) if a["rule"] in rules])
    path = tmp_path / "source" / "answers.jsonl"
    want, data = answers(path.parent), path.read_bytes()
    ends = [line.end for line in AnswerLog(path).lines]
    for size in (0, 1, ends[8] - 1, ends[8], ends[8] + 40, ends[11] - 1, ends[11]):
        out = tmp_path / str(size)
        shutil.copytree(path.parent, out)
        (out / "answers.jsonl").write_bytes(data[:size])
        made.clear()
        E.main([*pair.task, *pair.models, "--rules", ",".join(rules), "--out", str(out),
                "--device", "cpu"])
        kept = [end for end in ends if end - 1 <= size]  # the last may lack its line end
        assert len(made) == 12 - len(kept) and answers(out) == want
        new = (out / "answers.jsonl").read_bytes()
        assert new.startswith(data[:kept[-1] - 1] if kept else b"")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--rules", "target,standard"], [
    "--rules", "standard", "--temperature", "0.8", "--samples", "2"]], ids=["greedy", "sampled"])
def test_survives_a_real_kill(pair, tmp_path, more):
    outs = [tmp_path / "killed", tmp_path / "whole"]
    flags = [*pair.task, *pair.models, *more, "--max_new_tokens", "60", "--device", "cpu"]
    script = ("import sys, torch; torch.set_num_threads(1); import eval; "
              f"eval.main({flags!r} + ['--out', sys.argv[1]])")
    process = subprocess.Popen([sys.executable, "-c", script, outs[0]], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = outs[0] / "answers.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = path.read_bytes()
    assert 2 <= kept.count(b"\n") < 12
    for out in outs:
        E.main([*flags, "--out", str(out)])
    # The other process scores as the task does.
    killed, whole = (answers(out, ("seconds", "right", "how")) for out in outs)
    assert killed == whole and path.read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])


@pytest.mark.slow
def test_processes_make_the_same_answers_and_pass_on_errors(pair, tmp_path):
    """At the task's own length, which the workers do not know otherwise."""
    flags = ["--limit", "1", "--device", "cpu", "--processes", "2", "--out"]
    E.main([*pair.task, *pair.models, "--rules", "standard,target", *flags, str(tmp_path / "two")])
    got = answers(tmp_path / "two")
    assert len(got) == 6 and len({len(a["tokens"]) for a in got.values()} - {24}) > 0
    r = json.loads((tmp_path / "two" / "results.json").read_text())
    assert r["standard_equals_target"]["same"] == 3 and list(r["rules"]) == ["standard", "target"]
    one = tmp_path / "one.jsonl"  # one problem, so one worker
    one.write_text(pair.all.read_text().splitlines()[0])
    with pytest.raises(UserError, match="judge .* is for a target of width"):
        E.main(["--task", "demo", "--data", str(one), *pair.models[:4], "--judge",
                str(DEMO / "judge.safetensors"), "--rules", "judge", *flags,
                str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_more_of_the_same_is_welcome_and_other_settings_are_not(pair, whole, tmp_path):
    out = tmp_path / "out"
    run = lambda *flags: E.main([*pair.task, *pair.models, "--device", "cpu", "--out", str(out),
                                 *flags])
    run("--rules", "target", "--limit", "1")
    assert len(answers(out)) == 3
    run("--rules", "topk:2.0", "--limit", "2")
    run("--rules", "target")
    assert answers(out) == {key: a for key, a in answers(whole).items()
                            if key[0] in ("target", "topk:2")}
    assert list(json.loads((out / "results.json").read_text())["rules"]) == ["target", "topk:2"]
    before = files(out)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(pair.all.read_text().splitlines(keepends=True)[:5]))
    for flags, message in ((["--speculate_k", "4"], "speculate_k was 5, now 4"),
                           (["--dtype", "bfloat16"], "dtype was float32, now bfloat16"),
                           (["--data", str(other)], "data was "),
                           (["--target", pair.models[3]], "target was "),
                           (["--judge", str(DEMO / "judge.safetensors")], "judge was "),
                           (["--processes", "2"], "processes was 1, now 2")):
        with pytest.raises(UserError, match=message):
            run("--rules", "target", *flags)
    assert before == files(out)
    with open(out / "answers.jsonl", "a") as f:
        f.write('{"rule": "target"}\n')
    with pytest.raises(UserError, match="answers.jsonl, line 13: 'id' is missing"):
        run("--rules", "target")
    (out / "settings.json").unlink()
    with pytest.raises(UserError, match="answers.jsonl is there without settings.json"):
        run("--rules", "target")


def test_resumes_what_was_written_before(tmp_path, monkeypatch, capsys):
    """written_before/eval holds a run of an earlier version (commit 3686f6e) on the demo's models.

    Its answers count as they stand, and a run without --draft and --judge may go on with them.
    """
    out = tmp_path / "eval"
    shutil.copytree(ROOT / "tests" / "written_before" / "eval", out)
    before = files(out)
    monkeypatch.setattr(E, "load_models", lambda *a, **k: pytest.fail("a model was loaded"))
    target = ["--target", str(DEMO / "target")]
    pair = [*target, "--draft", str(DEMO / "draft"), "--judge", str(DEMO / "judge.safetensors")]
    task = ["--task", "demo", "--data", str(DEMO / "problems.jsonl"), "--limit", "1"]
    rules = "target,standard,topk:3,judge"
    run = lambda *flags: E.main([*task, "--out", str(out), "--device", "cpu", "--speculate_k", "16",
                                 *flags])
    for models, wanted in ((pair, rules), (target, "target")):
        run(*models, "--rules", wanted)
        shown = capsys.readouterr()
        n = 3 * len(wanted.split(","))
        assert f"{n} of {n} answers are there already" in shown.err
        assert shown.out == (out / "results.md").read_text()
        assert "demo: target with draft, K = 16, greedy, float32, eager, cpu" in shown.out
        assert "standard equals the target token for token on 3 of 3 problems" in shown.out
        assert {name: data for name, data in files(out).items() if name in before} == before
    r = json.loads((out / "results.json").read_text())
    assert list(r["rules"]) == rules.split(",") and r["rules"]["judge"]["right"] == 3
    with pytest.raises(UserError, match="speculate_k was 16, now 8"):
        run(*pair, "--rules", rules, "--speculate_k", "8")
    with pytest.raises(UserError, match="max_new_tokens was 24, now 99; temperature was 0.0, now "
                       "0.7; top_p was None, now 0.9; seed was 0, now 3"):
        run(*pair, "--rules", rules, "--max_new_tokens", "99", "--temperature", "0.7", "--top_p",
            "0.9", "--seed", "3")
    run("--rescore")
    assert answers(out).keys() == {(a["rule"], a["id"]) for a in lines_of(out)}


def test_rescore_gives_the_same_without_a_model(pair, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setattr(E, "load_models", lambda *a, **k: pytest.fail("a model was loaded"))
    write_answers(out, [a | {"right": True, "how": "?"} for a in lines_of(whole)])
    for name in ("results.json", "results.md"):
        (out / name).unlink()
    E.main([*pair.task, "--out", str(out), "--rescore"])
    assert files(out) == files(whole)
    assert capsys.readouterr().out == (whole / "results.md").read_text()
    with pytest.raises(UserError, match="data was .*, now"):
        E.main([*pair.task[:3], str(DEMO / "problems.jsonl"), "--out", str(out), "--rescore"])


def test_rescore_says_what_the_run_said_of_what_it_left_out(pair, tmp_path, monkeypatch):
    task, out = E.TASKS["demo"], tmp_path / "out"
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] in ("maths/0", "facts/5"))
    monkeypatch.setattr(task, "note", lambda self: f"Without {self.left_out}.")
    monkeypatch.setattr(task, "needs", "a thing")
    flags = [*pair.task, "--out", str(out)]
    run = [*flags, *pair.models[:2], "--rules", "target", "--device", "cpu", "--limit"]
    told = lambda: json.loads((out / "results.json").read_text()).get("left_out")
    for limit, want in ("1", ["maths/0", "facts/5"]), ("2", ["maths/0", "facts/5"]):
        E.main([*run, limit])
        once, got = files(out), told()
        assert got == want
        E.main([*flags, "--rescore"])
        assert files(out) == once
    E.main([*run, "1"])  # the answers are still those of --limit 2
    assert files(out) == once
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] == "code/2")
    with pytest.raises(UserError, match="answers.jsonl has an answer to code/2, whose check needs "
                       "a thing"):
        E.main([*flags, "--rescore"])
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] in ("code/3", "maths/0"))
    write_answers(out, [a for a in lines_of(out) if a["id"] in ("code/2", "maths/1")])
    E.main([*flags, "--rescore"])
    assert told() == ["maths/0", "code/3"]
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] == "code/3")
    write_answers(out, [a for a in lines_of(out) if a["id"] == "maths/1"])
    E.main([*flags, "--rescore"])  # nothing of code was come by
    assert told() is None or told() == []


def test_saved_files_with_any_other_value_are_refused_or_read(pair, whole, tmp_path, capsys):
    """Every value of a saved answer and of the settings, missing or of another type."""
    out, refused = tmp_path / "out", 0
    shutil.copytree(whole, out)
    lines, settings = lines_of(out), json.loads((out / "settings.json").read_text())
    for file, value, kinds in (("answers.jsonl", lines[0], saved.ANSWER),
                               ("settings.json", settings, saved.SETTINGS)):
        rest = "".join(json.dumps(a) + "\n" for a in lines[1:] if file == "answers.jsonl")
        for key in kinds:
            cases = [*(value | {key: x} for x in WRONG),
                     {k: v for k, v in value.items() if k != key}]
            for case in cases:
                (out / file).write_text(json.dumps(case) + "\n" + rest)
                try:
                    E.main([*pair.task, "--out", str(out), "--rescore"])
                    json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
                except UserError as e:
                    refused += 1
                    assert str(out) in str(e) and "\n" not in str(e), (key, case)
                except SystemExit as e:  # standard left the target's text
                    assert e.code == 1, (key, case)
        (out / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in lines))
    assert refused > 300
    capsys.readouterr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_standard_that_is_not_the_target_is_loud_in_float32(pair, whole, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = lines_of(out)
    changed = next(a for a in lines if a["rule"] == "standard")
    changed["tokens"][-1] += 1
    write_answers(out, lines)
    settings = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(settings | {"dtype": dtype}))
    line = (f"standard equals the target token for token on 5 of 6 problems ({dtype}); it differs "
            f"on {changed['id']}")
    command = [*pair.task, "--out", str(out), "--rescore"]
    if dtype == "float32":
        with pytest.raises(SystemExit) as e:
            E.main(command)
        assert e.value.code == 1
    else:
        E.main(command)
    shown = capsys.readouterr()
    assert line in shown.out and line in (out / "results.md").read_text()
    assert (f"error: {line}" in shown.err) == (dtype == "float32")


# ---------------------------------------------------------------- rules

def test_a_new_rule_is_a_row_of_the_table(pair, tmp_path, monkeypatch, capsys):
    """Registered at run time: help, defaults, runs, replay and what it needs all follow the table.
    """
    scored = lambda v, bound: v.scores > bound
    monkeypatch.setitem(TABLE, "even", Rule(lambda v, _: v.drafted % 2 == 0))
    monkeypatch.setitem(TABLE, "score", Rule(scored, "S", valid=lambda s: True, needs_judge=True))
    monkeypatch.setitem(TABLE, "near", Rule(
        lambda v, d: (v.logits - v.draft_logits).abs().amax(-1) < d, "D", valid=lambda d: d > 0,
        needs_draft_logits=True))
    flags = [*pair.task, *pair.models, "--device", "cpu", "--limit", "1", "--out"]
    assert E.parse_args([*flags, str(tmp_path)]).rules == [
        "target", "draft", "standard", "topk:3", "judge", "score"]
    with pytest.raises(SystemExit):
        E.parse_args(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "judge[:T], even, score[:S], near:D" in shown and "judge and score with" in shown
    without = [*pair.task, *pair.models[:2], "--out", "z", "--replay", "f", "--rules"]
    for rule, message in (("score:1", "rule score:1 needs --judge"),
                          ("near:1", "rule near:1 needs --draft"), ("near", "'near' is not")):
        with pytest.raises(UserError, match=message):
            E.parse_args([*without, rule])
    rules = "standard,even,score,score:9,near:100"
    E.main([*flags, str(tmp_path / "out"), "--rules", rules])
    r = json.loads((tmp_path / "out" / "results.json").read_text())["rules"]
    accepted = {rule: m["mean_accepted"] for rule, m in r.items()}
    assert list(r) == rules.split(",") and accepted["score:9"] == accepted["standard"]
    assert accepted["standard"] < accepted["even"] < accepted["near:100"] == max(accepted.values())
    (tmp_path / "texts.jsonl").write_text(json.dumps({"prompt": "How many?", "text": "Two eggs."}))
    E.main(["--replay", str(tmp_path / "texts.jsonl"), *flags, str(tmp_path / "out"), "--rules",
            rules])
    r = json.loads((tmp_path / "out" / "replay.json").read_text())["rules"]
    assert r["near:100"]["rejected"] == 0 < r["even"]["rejected"] < r["standard"]["rejected"]


def test_a_judge_that_no_rule_needs_is_not_loaded(pair, tmp_path):
    other = ["--judge", str(DEMO / "judge.safetensors")]
    E.main([*pair.task, *pair.models, *other, "--rules", "standard", "--limit", "1", "--device",
            "cpu", "--out", str(tmp_path / "out")])
    assert len(answers(tmp_path / "out")) == 3


def test_a_stop_string_ends_every_rule_at_the_same_token(pair, whole, tmp_path, monkeypatch):
    free = answers(whole)
    (_, i), a = next((key, a) for key, a in free.items() if key[0] == "target")
    stop = a["text"][12:15]  # across tokens, and where it first occurs
    monkeypatch.setattr(E.TASKS["demo"], "stop", ("\x00never", stop))
    E.main([*pair.task, *pair.models, "--rules", "target,standard,judge", "--device", "cpu",
            "--limit", "1", "--out", str(tmp_path / "cut")])
    cut = answers(tmp_path / "cut")
    for rule in ("target", "standard"):
        b = cut[rule, i]
        assert b["text"] == a["text"][:a["text"].index(stop)] and stop not in b["text"]
        assert len(b["tokens"]) < 24 and b["tokens"] == a["tokens"][:len(b["tokens"])]
    assert cut["target", i]["tokens"] == cut["standard", i]["tokens"]
    b = cut["judge", i]
    assert b["rounds"] <= len(b["tokens"]) - 1 <= b["rounds"] + b["accepted"]
    tokenizer, tokens = Tokenizer.from_dir(pair.home / "target"), cut["target", i]["tokens"]
    assert stop in tokenizer.decode_new([5], tokens)
    assert stop not in tokenizer.decode_new([5], tokens[:-1])


# ---------------------------------------------------------------- statistics

def test_intervals_and_p_values_by_hand():
    # Wilson, z = 1.96: 8 of 10 -> (0.8 + 0.192 ± 1.96 sqrt(0.016 + 0.0096)) / 1.384
    assert intervals.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert intervals.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert intervals.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    # McNemar: 1 of 6 -> 2 (1 + 6) / 64; 2 of 10 -> 2 (1 + 10 + 45) / 1024
    assert intervals.mcnemar(1, 5) == intervals.mcnemar(5, 1) == pytest.approx(14 / 64)
    assert intervals.mcnemar(8, 2) == pytest.approx(112 / 1024)
    assert intervals.mcnemar(0, 5) == pytest.approx(1 / 16)
    assert intervals.mcnemar(0, 0) == 1 == intervals.mcnemar(3, 3)
    assert 0 < intervals.mcnemar(400, 600) < 1e-8


def made_up(rule, rows):
    """Answers from (id, domain, right, how, tokens, seconds, rounds, accepted)."""
    names = ("id", "domain", "right", "how", "tokens", "seconds", "rounds", "accepted")
    return {(rule, row[0]): dict(zip(names, row), rule=rule) for row in rows}


def test_the_numbers_of_a_table_by_hand():
    settings = dict(task="demo", rules=["target", "standard", "judge:0.5"], target_name="big",
                    draft_name="small", chat=False, compile=False, speculate_k=8,
                    dtype="float32", device="cpu", processes=1)
    saved = made_up("target", [("a", "x", True, "exact", [1] * 11, 1.0, 10, 0),
                               ("b", "y", False, "last number", [2] * 21, 2.0, 20, 0),
                               ("c", "y", True, "exact", [3] * 11, 1.0, 10, 0)])
    saved |= made_up("judge:0.5", [("a", "x", False, "last number", [1] * 13, 0.4, 2, 10),
                                   ("b", "y", True, "exact", [2] * 9, 0.1, 1, 7)])
    r = report.summarise(saved, settings)
    j = r["rules"]["judge:0.5"]
    assert list(r["rules"]) == ["target", "judge:0.5"] and list(r["domains"]) == ["x", "y"]
    assert r["standard_equals_target"] is None
    assert (j["n"], j["right"], j["accuracy"]) == (2, 1, 0.5)
    assert (j["mean_accepted"], j["tokens_per_round"]) == (17 / 3, 20 / 3)
    assert j["tokens_per_sec"] == pytest.approx(40) and j["speed_up"] == pytest.approx(40 / 10)
    assert j["against_target"] == {"n": 2, "won": 1, "lost": 1, "p": 1.0}
    y = r["domains"]["y"]["judge:0.5"]
    assert y["against_target"] == {"n": 1, "won": 1, "lost": 0, "p": 1.0}
    assert j["how"] == {"last number": {"n": 1, "right": 0}, "exact": {"n": 1, "right": 1}}
    t = r["rules"]["target"]
    assert t["mean_accepted"] is None and t["against_target"] is None
    text = report.markdown(r)
    for line in (
            "| target    |   2/3 |    66.7% | 20.8% to 93.9% |       10 |    1.00x |               "
            "   – |                – |",
            "Not every rule has answered every problem", "| judge:0.5 |   1 |    1 | 1 |",
            "| judge:0.5 | 1 (1) |       1 (0) |", "| target    | 2 (2) |       1 (0) |"):
        assert line in text


def test_pareto_front():
    points = [(1, 0.9), (2, 0.8), (1.5, 0.7), (3, 0.8), (0.5, 0.9), (4, 0.1)]
    assert report.front(points) == [(1, 0.9), (3, 0.8), (4, 0.1)]


def test_every_rule_has_a_colour_of_its_own():
    added = [f"rule{i}" for i in range(len(report.PALETTE))]
    known = [name for name in TABLE if name != "standard"]
    colors = report.colors([*known[:2], *added, *known[2:]])
    assert len(set(colors.values())) == len(known) + len(added)
    assert all(colors[name] == report.COLORS[name] for name in known)
    assert len(report.colors(map(str, range(99)))) == 99  # more than the palette has


def test_a_missing_matplotlib_is_a_note(pair, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "accuracy.png").unlink()
    monkeypatch.setattr(report, "plot", PLOT)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    E.main([*pair.task, "--out", str(tmp_path / "out"), "--rescore"])
    note = "no accuracy.png: it needs matplotlib; pip install matplotlib"
    assert note in capsys.readouterr().err
    assert not (tmp_path / "out" / "accuracy.png").exists()


# ---------------------------------------------------------------- replay

def test_replay_rounds_by_hand():
    rounds = lambda mask, k: replay_rounds(mask.__getitem__, len(mask), k)
    T, F = True, False
    assert rounds([T, T, F, T, T, T, T, F], 3) == [2, 3, 0]  # TT|F  TTT|T  |F
    assert rounds([F, F, F], 4) == [0, 0, 0]
    assert rounds([T] * 5, 16) == [5] and rounds([], 4) == []
    assert rounds([T] * 8, 3) == [3, 3] and rounds([T, F], 1) == [1]
    assert rounds([T, T, F, T], 1) == [1, 0, 1]


@torch.inference_mode()
def real_rounds(target, draft, head, prompt, text, k, s):
    """The rounds of engine.py's own verification and acceptance with the text for the draft."""
    rounds, ids, i = [], prompt + text, 0
    while i < len(text):
        drafted, cache, n = torch.tensor(text[i:i + k]), target.new_cache(len(ids)), len(prompt) + i
        target.features(torch.tensor([ids[:n - 1]]), torch.arange(n - 1), cache)
        known = torch.tensor([ids[:n + len(drafted) - 1]])
        draft_logits = draft(known, torch.arange(known.shape[1]),
                             draft.new_cache(known.shape[1]))[0][0, n - 1:]
        state = State(torch.tensor(ids[n - 2:n]), *torch.tensor([[n], [len(drafted)], [0]]))
        packed, *_ = engine.verify_and_accept(target, head, cache, s, state, drafted, draft_logits,
                                              None, None)
        rounds.append(int(unpack(packed, len(drafted)).accepted))
        i += rounds[-1] + 1
    return rounds


def test_replay_is_what_real_rounds_would_do(pair, tmp_path):
    tokenizer, k = Tokenizer.from_dir(pair.home / "target"), 5
    target, draft = (checkpoint.load(pair.home / name, dtype=torch.float32)
                     for name in ("target", "draft"))
    head = JudgeHead.load(pair.home / "judge.safetensors", 64,
                          checkpoint.fingerprint(pair.home / "target"), "")
    pairs = []  # the target's text with words of another in it
    for i, prompt in enumerate(("How many?", "Count the eggs of Mira.", "def f(x):")):
        tokens = generate(Engine(target), tokenizer.encode(prompt), 40).tokens
        text = tokenizer.decode_new([5], tokens)
        pairs.append((prompt, text[:50] + " eggs" * i + text[50:90]))
    with open(tmp_path / "texts.jsonl", "w") as f:
        for i, (prompt, text) in enumerate(pairs):
            f.write(json.dumps({"prompt": prompt, "reference" if i == 1 else "text": text}) + "\n")
    rules = ["standard", "topk:3", "typical", "typical:0.01", "kl:0.05", "kl:1", "judge",
             "judge:0.7", "judge:0", "judge:1", "relaxed:20,0.01", "margin:0.5", "fly:0,1",
             "fly:1,2"]
    assert {rule.partition(":")[0] for rule in rules} == {
        name for name, rule in TABLE.items() if not rule.needs_coin}
    E.main(["--replay", str(tmp_path / "texts.jsonl"), *pair.models, "--rules", ",".join(rules),
            "--out", str(tmp_path / "out"), "--device", "cpu"])
    r = json.loads((tmp_path / "out" / "replay.json").read_text())
    got = r["rules"]
    for rule in rules:
        name, value, _ = parse_rule(rule)
        parameter = TABLE[name].parameter_for(value, head)
        s = Settings(name, parameter, 0.0, None, None, 1024)
        want = [n for p, t in pairs for n in real_rounds(
            target, draft, head, tokenizer.encode(p), tokenizer.encode(t, continuation=True), k, s)]
        assert got[rule]["rounds"] == len(want), rule
        assert got[rule]["mean_accepted"] == pytest.approx(sum(want) / len(want)), rule
    assert got["judge:0"]["rejected"] == 0 and got["judge:1"] == got["standard"]
    # What fly says of a token depends on where the round ends: no share of all tokens.
    assert {rule for rule in rules if got[rule]["rejected"] is None} == {"fly:0,1", "fly:1,2"}
    shown = (tmp_path / "out" / "replay.md").read_text()
    assert re.search(r"\| fly:1,2 [^%]+ – \|$", shown, re.M)
    assert shown.count("%") == 1 + len(rules) - 2  # not fly's two, but the 95% of the head
    assert 0 < got["topk:3"]["rejected"] < got["standard"]["rejected"] < 1 and r["texts"] == 3
    low, high = got["topk:3"]["interval"]  # over three texts
    assert low < got["topk:3"]["mean_accepted"] < high


def test_replay_of_several_files_is_a_table_each(pair, tmp_path, capsys):
    line = {"prompt": "How many?", "text": "Two eggs and six more eggs.", "response": "No."}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    del line["text"]
    (tmp_path / "b.jsonl").write_text(2 * (json.dumps(line) + "\n"))
    flags = [*pair.models, "--rules", "standard,topk:9", "--device", "cpu", "--replay"]
    each = []
    for names in ("a",), ("b",), ("a", "b"):
        E.main([*flags, *(str(tmp_path / f"{name}.jsonl") for name in names), "--out",
                str(tmp_path / "out")])
        each.append(json.loads((tmp_path / "out" / "replay.json").read_text()))
    assert each[2] == each[:2] and [r["file"] for r in each[2]] == ["a.jsonl", "b.jsonl"]
    assert [r["texts"] for r in each[2]] == [1, 2] and each[0]["tokens"] > each[1]["tokens"] / 2
    assert each[0]["rules"]["standard"]["interval"] is None  # of one text
    rule = each[1]["rules"]["standard"]  # of two that are alike
    assert rule["interval"] == [rule["mean_accepted"]] * 2
    shown = capsys.readouterr().out
    assert shown.count("| standard ") == 4 and "b.jsonl: 2 texts" in shown
    assert (tmp_path / "out" / "replay.md").read_text() in shown


def test_replay_reads_gsm8k_and_limits_each_domain(tmp_path):
    path = tmp_path / "t.jsonl"
    lines = [{"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"},
             {"prompt": "p", "text": "t", "domain": "x"}, {"prompt": "q", "text": "u", "task": "x"},
             {"prompt": "r", "reference": "v", "answer": 3, "domain": "y"},
             {"prompt": "s", "response": "w", "domain": "ifeval"}]
    odd = json.dumps({"prompt": "\u2028", "text": "w", "domain": "z"}, ensure_ascii=False)
    path.write_text("\n".join(map(json.dumps, lines)) + f"\n\n{odd}\n")
    texts = read_texts(path, E.TASKS["gsm8k"](), chat=False, limit=1)
    assert [t[0] for t in texts] == [f"{path}, line {i}" for i in (1, 2, 4, 5, 7)]
    _, prompt, text = texts[0]
    assert "How many?" in prompt and text.strip() == "2+2 = 4\n#### 4"
    assert (prompt + text)[len(prompt.rstrip())].isspace()
    assert texts[2][1:] == ("r", "v") and texts[3][1:] == ("s", "w")


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    (["--rules", "target,topk"], "'topk' is not a rule; use topk:K, K: one"),
    (["--rules", "topk:0"], "'topk:0' is not a rule"),
    (["--rules", "topk:2.5"], "'topk:2.5' is not a rule"),
    (["--rules", "judge:"], "'judge:' is not a rule"),
    (["--rules", "judge:nan"], "'judge:nan' is not a rule"),
    (["--rules", "standard:1"], "'standard:1' is not a rule"),
    (["--rules", "target,,draft"], "'' is not a rule"),
    (["--rules", "eagle"], "'eagle' is not a rule; use target, draft, standard, topk:K"),
    (["--rules", "kl"], "'kl' is not a rule"),
    (["--rules", "typical:1"], "'typical:1' is not a rule"),
    (["--limit", "0"], "--limit is 0"),
    (["--processes", "0"], "--processes is 0"),
    (["--speculate_k", "0"], "--speculate_k is 0"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--data", os.devnull], "null"),
    (["--target", "nowhere"], "nowhere does not exist"),
    (["--judge", str(DEMO / "judge.safetensors")], "is for a target of width"),
    (["--draft", str(DEMO / "judge.safetensors")], "judge.safetensors is a file"),
    (["--rescore", "--replay", "x"], "exclude each other"),
    (["--rescore"], "holds no answers"),
    (["--replay", "missing", "--rules", "judge"], "cannot read missing: No such file"),
    (["--replay", str(DEMO / "judge.safetensors"), "--rules", "judge"],
     "judge.safetensors, line 1: not UTF-8 text"),
    (["--replay", str(ROOT / "README.md"), "--rules", "judge"], "line 1: not JSON"),
    (["--replay", str(DEMO / "problems.jsonl"), "--rules", "judge"],
     'problems.jsonl, line 1: no "prompt" and "text"'),
    (["--replay", os.devnull, "--rules", "standard"], "null: it is not a plain file"),
    (["--replay", "x", "--rules", "target,standard"], "rule target tests no drafts"),
    (["--out", str(ROOT / "README.md")], "README.md is a file"),
    (["--out", "/nowhere/x"], "/nowhere is not a directory"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(pair, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as e:
        E.main([*pair.task, *pair.models, "--rules", RULES, "--out", str(tmp_path / "out"),
                "--device", "cpu", *flags])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [
    (["--rules", "target,standard"], "rule standard needs --draft"),
    (["--rules", "draft"], "rule draft needs --draft"),
    (["--rules", "judge:0.3", "--draft", "d"], "rule judge:0.3 needs --judge"),
    (["--rules", "judge", "--replay", "f"], "rule judge needs --judge"),
    (["--rules", "standard,kl:0.5", "--replay", "f"], "rule kl:0.5 needs --draft"),
])
def test_what_a_rule_needs(flags, message):
    with pytest.raises(UserError, match=message):
        E.parse_args(["--task", "demo", "--data", "x", "--target", "y", "--out", "z", "--device",
                      "cpu", *flags])


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--compile on a CPU needs a C.. compiler"):
        E.parse_args(["--task", "demo", "--data", "x", "--target", "y", "--out", "z", "--device",
                      "cpu", "--rules", "target", "--compile"])


def test_exit_code_and_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_command(monkeypatch, E, "--rules", "x")
    shown = capsys.readouterr()
    assert e.value.code == 2 and not shown.out
    assert shown.err.startswith("error: 'x' is not a rule") and shown.err.count("\n") == 1


def test_answers_that_another_hand_changed_end_the_run(pair, whole, tmp_path, monkeypatch):
    """Neither written to, nor replaced by --rescore."""
    out, foreign = tmp_path / "out", '{"foreign": 1}\n'
    path, saved = out / "answers.jsonl", lines_of(whole)

    def made(args, examples, missing):
        yield from saved[:3]
        path.unlink()
        yield from saved[3:]

    monkeypatch.setattr(E, "make_answers", made)
    with pytest.raises(UserError, match="answers.jsonl was removed or renamed"):
        E.main([*pair.task, *pair.models, "--rules", RULES, "--out", str(out), "--device", "cpu"])
    assert not path.exists()
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    score = E.TASKS["demo"].score
    monkeypatch.setattr(E.TASKS["demo"], "score", lambda *args: (
        path.open("a").write(foreign), score(*args))[1])
    with pytest.raises(UserError, match="answers.jsonl was changed by another"):
        E.main([*pair.task, "--rescore", "--out", str(out)])
    assert path.read_text().startswith((whole / "answers.jsonl").read_text() + foreign)


def test_a_picture_takes_any_name(tmp_path, recwarn):
    rows = {"target": {"rule": "target", "drafter": None, "speed_up": 1.0, "accuracy": 0.5,
                       "interval": (0.4, 0.6)}}
    settings = {"task": "demo", "speculate_k": 5, "dtype": "float32", "device": "cpu",
                "target_name": "a\rb$\\x 🎉", "draft_name": "$^{"}
    assert PLOT({"rules": rows, "settings": settings}, tmp_path / "x.png") is None
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG" and not recwarn.list
