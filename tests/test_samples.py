"""eval.py with several sampled answers to a problem: neither order nor kills change one; pass@k,
intervals and p-values against brute force. And tasks of two turns.
"""
import itertools
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import eval as E
from common import UserError
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from evaluation import intervals, report, turns
from evaluation.task import Score
from formats.answer_log import seed_of
from helpers import random_model, save_checkpoint, tiny_config
from judge import JudgeHead
from load import engine_rule
from test_eval import (  # noqa: F401 (fixtures)
    DEMO,
    answers,
    files,
    lines_of,
    made_up,
    no_picture,
    pair,
    short,
    write_answers,
)
from tokenizer import Tokenizer

PLOT = report.plot
SAMPLING = ["--temperature", "0.8", "--top_k", "40", "--top_p", "0.95", "--seed", "3",
            "--max_new_tokens", "12", "--limit", "1"]
RULES = "target,draft,standard,judge"


def run(pair, out, *flags):  # noqa: F811
    E.main([*pair.task, *pair.models, *SAMPLING, "--rules", RULES, "--device", "cpu", "--out",
            str(out), *flags])


@pytest.fixture(scope="module")
def whole(pair):  # noqa: F811
    """The directory of a run of three samples that nothing disturbed."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(report, "plot", lambda results, path: None)
        run(pair, pair.home / "sampled", "--samples", "3")
    return pair.home / "sampled"


# ---------------------------------------------------------------- answers

def test_each_answer_is_what_an_engine_with_its_seed_says(pair, whole):  # noqa: F811
    got, rules = answers(whole), RULES.split(",")
    ids = ["maths/0", "code/2", "facts/4"]
    order = [(a["id"], a["sample"], a["rule"]) for a in lines_of(whole)]
    assert order == list(itertools.product(ids, range(3), rules))
    tokenizer = Tokenizer.from_dir(pair.home / "target")
    target, draft = (checkpoint.load(pair.home / name, dtype=torch.float32)
                     for name in ("target", "draft"))
    head = JudgeHead.load(pair.home / "judge.safetensors", 64,
                          checkpoint.fingerprint(pair.home / "target"), "")
    examples = {e["id"]: e for e in E.TASKS["demo"]().load(pair.all)}
    drawn = dict(temperature=0.8, top_k=40, top_p=0.95)
    for rule, i, sample in (("target", ids[0], 2), ("draft", ids[1], 0), ("standard", ids[1], 1),
                            ("judge", ids[2], 2)):
        e = Engine({"target": target, "draft": draft}[rule], **drawn) if rule in report.PLAIN else (
            Engine(target, LlamaDrafter(draft), head, speculate_k=5, **engine_rule(rule, tokenizer),
                   **drawn))
        e.rng.manual_seed(seed_of(3, i, sample))
        a, r = got[rule, i, sample], generate(e, tokenizer.encode(examples[i]["prompt"]), 12,
                                              tokenizer.eos_ids)
        assert (a["tokens"], a["rounds"], a["sample"]) == (r.tokens, r.rounds, sample)
    assert len({(a["rule"], a["text"]) for a in got.values()}) == 36  # no two samples are alike
    settings = json.loads((whole / "settings.json").read_text())
    assert settings.items() >= {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 3,
                                "max_new_tokens": 12}.items()


def test_order_samples_and_kills_change_no_answer(pair, whole, tmp_path):  # noqa: F811
    """Cut in the middle, or made of a few samples and one row first: the same in the end."""
    want, data = answers(whole), (whole / "answers.jsonl").read_bytes()
    out = tmp_path / "grown"
    run(pair, out, "--samples", "2", "--rules", "judge")
    run(pair, out, "--samples", "3")
    assert answers(out) == want
    out = tmp_path / "cut"
    shutil.copytree(whole, out)
    (out / "answers.jsonl").write_bytes(data[:2 * len(data) // 3])
    run(pair, out, "--samples", "3")
    assert answers(out) == want and lines_of(out) != lines_of(whole)  # other seconds
    before = files(out)
    run(pair, out)  # fewer samples: nothing to make, and none is lost
    assert files(out) == before
    for flags, message in ((["--seed", "4"], "seed was 3, now 4"),
                           (["--temperature", "1"], "temperature was 0.8, now 1.0"),
                           (["--max_new_tokens", "24"], "max_new_tokens was 12, now 24")):
        with pytest.raises(UserError, match=message):
            run(pair, out, *flags)
    with pytest.raises(UserError, match="temperature was 0.8, now 0.0; top_k was 40, now None"):
        E.main([*pair.task, *pair.models, "--device", "cpu", "--out", str(out)])
    assert files(out) == before


def test_greedy_settings_and_answers_are_as_they_were(pair, tmp_path):  # noqa: F811
    flags = [*pair.task, *pair.models, "--rules", "target", "--limit", "1", "--device", "cpu",
             "--out", str(tmp_path)]
    E.main([*flags, "--seed", "7"])
    before = files(tmp_path)
    E.main(flags)  # greedy answers have no seed
    assert files(tmp_path) == before
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert not settings.keys() & {"temperature", "top_k", "top_p", "seed", "max_new_tokens"}
    assert all("sample" not in a and "turns" not in a for a in lines_of(tmp_path))


def test_rescore_takes_samples(pair, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setattr(E, "load_models", lambda *a, **k: pytest.fail("a model was loaded"))
    write_answers(out, [a | {"right": True, "how": "?"} for a in lines_of(whole)])
    E.main([*pair.task, "--out", str(out), "--rescore"])
    assert files(out) == files(whole)
    shown = capsys.readouterr().out
    for line in ("demo: target with draft, K = 5, temperature 0.8, top-k 40, top-p 0.95, seed 3, "
                 "samples of a problem: 3, at most 12 new tokens, float32, eager, cpu",
                 "pass@1", "pass@2", "sign-flip", "/9 |",
                 "Sampled: standard has the target's distribution, not its tokens"):
        assert line in shown, shown
    assert "pass@3" in shown and "pass@4" not in shown and "token for token" not in shown
    assert json.loads((out / "results.json").read_text())["standard_equals_target"] is None


@pytest.mark.long
def test_processes_make_the_same_samples(pair, tmp_path):  # noqa: F811
    for n in "12":
        run(pair, tmp_path / n, "--samples", "2", "--rules", "target,judge", "--processes", n)
    got = [answers(tmp_path / n, ("seconds", "right", "how")) for n in "12"]  # scored otherwise
    assert got[0] == got[1] and len(got[0]) == 12


# ---------------------------------------------------------------- statistics

def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
                want = sum(map(any, subsets)) / len(subsets)
                assert intervals.pass_at(k, right, n) == pytest.approx(want), (n, right, k)


def test_the_permutation_test_against_every_sign():
    rng = random.Random(0)
    for size, most in ((1, 3), (5, 4), (9, 3), (10, 1), (7, 8)):
        d = [rng.randint(-most, most) for _ in range(size)]
        sums = [sum(s * x for s, x in zip(signs, d))
                for signs in itertools.product((1, -1), repeat=size)]
        want = sum(abs(s) >= abs(sum(d)) for s in sums) / len(sums)
        assert intervals.sign_flip(d) == pytest.approx(want), d
    for won, lost in ((1, 5), (8, 2), (0, 0), (3, 3), (30, 11)):
        assert intervals.sign_flip([1] * won + [-1] * lost + [0, 0]) == pytest.approx(
            intervals.mcnemar(won, lost))


def test_the_interval_is_wilsons_for_one_sample_and_wider_for_alike_samples():
    for right, n in ((0, 7), (3, 7), (7, 7), (40, 41)):
        assert intervals.of_problems([1.0] * right + [0.0] * (n - right), n) == pytest.approx(
            intervals.wilson(right, n))
    # Copies of an answer tell nothing new; samples as different as draws are as good as problems.
    assert intervals.of_problems([1.0] * 3 + [0.0] * 4, 70) == pytest.approx(
        intervals.wilson(3, 7))
    assert intervals.of_problems([0.5] * 8, 16) == pytest.approx(intervals.wilson(8, 16))
    # By hand: shares 1, 1/2, 0, 0: p = 3/8, variance 11/64, so 4 (15/64) / (11/64) = 60/11 answers.
    assert intervals.of_problems([1, 0.5, 0, 0], 8) == pytest.approx(
        intervals.wilson(3 / 8 * 60 / 11, 60 / 11))


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Problems of their own difficulty, 8 samples each; without them it would hold far less often.
    """
    torch.manual_seed(0)
    chances = torch.distributions.Beta(0.6, 0.9).sample((1000, 60)).double()
    right, truth, n = torch.binomial(torch.full_like(chances, 8), chances), 0.4, 480
    bounds = [intervals.of_problems((row / 8).tolist(), n) for row in right]
    naive = [intervals.wilson(int(row.sum()), n) for row in right]
    cover = lambda found: sum(low <= truth <= high for low, high in found) / len(found)
    assert 0.93 < cover(bounds) < 0.97 and cover(naive) < 0.8


def test_the_bootstrap_of_a_ratio_is_as_wide_as_its_standard_error():
    assert intervals.of_ratio([(3, 2)]) is None
    assert intervals.of_ratio([(3, 2)] * 5) == (1.5, 1.5)
    rng = random.Random(1)
    parts = [(rng.randint(0, n) * n, n) for n in (rng.randint(1, 40) for _ in range(300))]
    a, b = map(sum, zip(*parts))
    r = a / b
    error = math.sqrt(sum((x - r * y) ** 2 for x, y in parts)) / b  # the delta method's
    low, high = intervals.of_ratio(parts)
    assert (low, high) == pytest.approx((r - 1.96 * error, r + 1.96 * error), rel=0.02)
    assert intervals.of_ratio(parts) == (low, high)


def test_the_numbers_of_samples_by_hand():
    settings = dict(task="demo", rules=["target", "judge@think"], target_name="big",
                    draft_name="small", chat=True, compile=False, speculate_k=8, dtype="float32",
                    device="cpu", processes=1, temperature=0.7)
    right = {"target": {"a": "1100", "b": "0000", "c": "1000"},
             "judge@think": {"a": "1111", "b": "0001", "c": "0000", "d": "1010"}}
    saved = {}
    for rule, problems in right.items():
        for i, marks in problems.items():
            for sample, mark in enumerate(marks):
                row = made_up(rule, [(i, "x", mark == "1", "exact", [1] * 11, 1.0, 5, 10)])
                saved[rule, i, sample] = row[rule, i] | {"sample": sample}
    r = report.summarise(saved, settings)
    t, j = r["rules"].values()
    assert (t["right"], t["n"], t["accuracy"], t["samples"]) == (3, 12, 0.25, [4, 4])
    assert (j["right"], j["n"], j["problems"]) == (7, 16, 4) and j["accuracy"] == 7 / 16
    assert j["pass_at"] == pytest.approx({  # of a, b, c, d: 1 - C(4 - c, k) / C(4, k)
        1: 7 / 16, 2: (1 + 1 / 2 + 0 + 5 / 6) / 4, 4: 3 / 4})
    # Differences of a, b, c: 2, 1, -1 with sum 2; of the 8 sums of signs 6 are as far from 0 as 2.
    assert j["against_target"] == {"n": 3, "won": 2, "lost": 1, "p": 0.75}
    assert j["speed_up"] == 1 and j["mean_accepted"] == 2 and r["standard_equals_target"] is None
    del saved["judge@think", "d", 3]
    j = report.summarise(saved, settings)["rules"]["judge@think"]
    assert j["accuracy"] == (1 + 1 / 4 + 0 + 2 / 3) / 4 and j["samples"] == [3, 4]
    assert list(j["pass_at"]) == [1, 2, 3]
    assert j["pass_at"][3] == pytest.approx((1 + 3 / 4 + 0 + 1) / 4)
    for n in (1, 2, 5, 8, 10):
        row = made_up("judge", [(str(i), "x", True, "exact", [1], 1.0, 1, 1) for i in range(2)])
        rows = [a | {"sample": s} for a in row.values() for s in range(n)]
        want = {1: None, 2: [1, 2], 5: [1, 2, 4, 5], 8: [1, 2, 4, 8], 10: [1, 2, 4, 8, 10]}[n]
        assert (list(report.accuracy(rows)["pass_at"]) if n > 1 else None) == want
    passes = {"a": {"pass_at": {1: 0.1, 2: 0.2, 3: 0.3}}, "b": {"pass_at": {1: 0.1, 2: 0.2, 4: 1}}}
    assert "| a    |  10.0% |  20.0% |  30.0% |      – |" in report.pass_table(passes)
    text = report.markdown(r)
    for line in ("temperature 0.7, seed 0, samples of a problem: 4, float32, eager, chat template",
                 "| target      |  25.0% |  44.4% |  66.7% |",
                 "| judge@think |   2 |    1 | 0.75 |", "|  7/16 |    43.8% |"):
        assert line in text, text


# ---------------------------------------------------------------- rows of any spelling

def test_rows_are_cut_before_their_drafter():
    for rule in ("standard", "judge:0.9", "relaxed:10,0.6@think", "fly:0.3,6", "judge@think"):
        for drafter in ("llama", "eagle", "eagle-tree", "ngram"):
            assert report.row_parts(report.row_name(rule, drafter)) == (rule, drafter)
    assert report.row_parts("margin:0.9@a/b/eagle") == ("margin:0.9@a/b", "eagle")
    assert report.row_parts("target") == ("target", None)
    assert report.rule_parts("relaxed:10,0.6@think") == ("relaxed", "10,0.6@think")
    assert report.rule_parts("judge@think") == ("judge", "@think")
    assert report.rule_parts("standard") == ("standard", "")


def test_the_picture_names_parameters_and_spans(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    seen = []
    monkeypatch.setattr(plt.Axes, "annotate", lambda self, text, *a, **k: seen.append(text))
    rows = {row: {"rule": report.row_parts(row)[0], "drafter": report.row_parts(row)[1],
                  "speed_up": 1.0 + i, "accuracy": 0.5, "interval": (0.4, 0.6)}
            for i, row in enumerate(("relaxed:10,0.6@think/eagle", "judge@think", "judge"))}
    settings = {"task": "demo", "speculate_k": 5, "dtype": "float32", "device": "cpu",
                "target_name": "big"}
    assert PLOT({"rules": rows, "settings": settings}, tmp_path / "x.png") is None
    assert sorted(seen) == ["10,0.6@think", "@think", "default"]


# ---------------------------------------------------------------- two turns

class Talk(E.TASKS["demo"]):
    """A task of two turns, which nobody grades here."""
    name, graded, max_new_tokens = "talk", False, 10
    fields = ("question_id", int), ("turns", list)
    domain = lambda self, line: "talk"
    id = lambda self, i, line: f"talk/{line['question_id']}"
    problem = lambda self, example: None
    prompt = chat = lambda self, example: example["turns"][0]
    score = lambda self, example, text: Score(None, "not graded")
    note = lambda self: "Grade them with FastChat."

    def follow_up(self, example, said):
        return example["turns"][len(said)] if len(said) < len(example["turns"]) else None


TEMPLATE = ("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}")


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Flags of a task of two questions, each with a second one, and a model that chats."""
    monkeypatch.setitem(E.TASKS, "talk", Talk)
    data, target = tmp_path / "talk.jsonl", tmp_path / "target"
    data.write_text("".join(json.dumps({"question_id": n, "turns": [f"Count {n} eggs.", "Again!"]})
                            + "\n" for n in (81, 7)))
    config = tiny_config(vocab_size=1024, max_position_embeddings=256)
    # Of small weights, so that it repeats itself.
    save_checkpoint(target, random_model(config, seed=1, scale=0.05), config)
    shutil.copy(DEMO / "target" / "tokenizer.model", target)
    (target / "chat_template.jinja").write_text(TEMPLATE)
    return SimpleNamespace(data=data, target=target, out=tmp_path / "out", flags=[
        "--task", "talk", "--data", str(data), "--target", str(target), "--drafters", "ngram",
        "--rules", "target,topk:3", "--chat", "--device", "cpu", "--speculate_k", "4"])


def test_the_second_turn_follows_the_first_answer(talk, capsys):
    E.main([*talk.flags, "--out", str(talk.out)])
    got, tokenizer = answers(talk.out), Tokenizer.from_dir(talk.target)
    e = Engine(checkpoint.load(talk.target, dtype=torch.float32))
    say = lambda *said: tokenizer.chat([{"role": role, "content": text} for role, text in said])
    first, a = ("user", "Count 7 eggs."), got["target", "talk/7"]
    one = generate(e, say(first), 10, tokenizer.eos_ids)
    text = tokenizer.decode_new(say(first), one.tokens)
    prompt = say(first, ("assistant", text), ("user", "Again!"))
    two = generate(e, prompt, 10, tokenizer.eos_ids)
    assert a["turns"] == [text, tokenizer.decode_new(prompt, two.tokens)] and text
    assert a["tokens"] == one.tokens + two.tokens and a["rounds"] == one.rounds + two.rounds
    assert a["right"] is None and a["text"] == a["turns"][1]
    assert len(got) == 4 and got["topk:3/ngram", "talk/7"]["accepted"] > 0

    r = json.loads((talk.out / "results.json").read_text())
    m = r["rules"]["topk:3/ngram"]
    assert m["accuracy"] is m["right"] is m["interval"] is m["against_target"] is None
    lines = [a for (row, _), a in got.items() if row == "topk:3/ngram"]
    made = sum(len(a["tokens"]) - 2 for a in lines)  # the first of each turn is the prefill's
    assert m["tokens_per_round"] == made / sum(a["rounds"] for a in lines)
    progress = E.Progress(["topk:3/ngram"], 4, graded=False)
    for a in (a for a in lines_of(talk.out) if a["rule"] == "topk:3/ngram"):
        progress.add(a, show=False)
    assert progress.sums["topk:3/ngram"][2] == made
    shown = capsys.readouterr()
    assert "Grade them with FastChat." in shown.out and r["note"] == "Grade them with FastChat."
    assert re.search(r"\| target \| +– \| +– \| +– \| +– \| +\d+ \|", shown.out), shown.out
    names = {p.name: p for p in (talk.out / "model_answer").iterdir()}
    assert names.keys() == {"target.jsonl", "topk_3_ngram.jsonl"}
    by_id = [json.loads(line) for line in names["target.jsonl"].read_text().splitlines()]
    assert [x["question_id"] for x in by_id] == [7, 81]
    assert by_id[0]["choices"] == [{"index": 0, "turns": a["turns"]}]
    assert by_id[0]["model_id"] == "target" and {*by_id[0]} == {
        "question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert len({x["answer_id"] for p in names.values() for x in map(json.loads, p.open())}) == 4

    before = files_but_time(talk.out)
    E.main([*talk.flags[:4], "--out", str(talk.out), "--rescore"])
    assert files_but_time(talk.out) == before


def test_no_file_for_fastchat_is_written_over_an_input(talk):
    made = talk.out / "model_answer" / "target.jsonl"
    made.parent.mkdir(parents=True)
    shutil.copy(talk.data, made)
    flags = [made if f == str(talk.data) else f for f in talk.flags]
    with pytest.raises(UserError, match="model_answer/target.jsonl: .* is also --data"):
        E.main([*map(str, flags), "--out", str(talk.out)])
    assert made.read_bytes() == talk.data.read_bytes()


def files_but_time(out):
    return {str(p): re.sub('"tstamp": [0-9.]+', "", p.read_text()) for p in out.rglob("*")
            if p.is_file()}


def test_turns_are_sampled_and_each_sample_is_a_choice(talk, capsys):
    E.main([*talk.flags, "--out", str(talk.out), "--temperature", "1", "--samples", "2"])
    got = answers(talk.out)
    lines = [*map(json.loads, (talk.out / "model_answer/topk_3_ngram.jsonl").open())]
    assert [[c["turns"] for c in x["choices"]] for x in lines] == [
        [got["topk:3/ngram", f"talk/{n}", s]["turns"] for s in (0, 1)] for n in (7, 81)]
    assert lines[0]["choices"][0]["turns"] != lines[0]["choices"][1]["turns"]
    assert [c["index"] for c in lines[0]["choices"]] == [0, 1]
    shown = capsys.readouterr()
    assert "samples of a problem: 2" in shown.out and "pass@" not in shown.out
    assert "%" not in shown.err and "8/8  target " in shown.err


@pytest.mark.long
def test_processes_make_the_same_turns(talk, tmp_path):
    talk.data.write_text("".join(json.dumps({
        "question_id": n, "category": "c", "turns": [f"Count {n} eggs.", "Again!"]}) + "\n"
        for n in (81, 7)))
    got = []
    for n in "12":
        E.main(["--task", "mt_bench", *talk.flags[2:], "--max_new_tokens", "10", "--out",
                str(tmp_path / n), "--processes", n])
        got.append(answers(tmp_path / n))
    assert got[0] == got[1] and all(len(a["turns"]) == 2 for a in got[0].values())
    assert len({a["turns"][1] for a in got[0].values()}) > 1


@pytest.mark.parametrize("more, message", [
    ([], "talk/81 asks again after the first answer, .*; give --chat"),
    (["--chat", "--max_new_tokens", "240"], "the last prompt of talk/81 may have 2.. tokens with "
     "the answers before it, the context 256; lower --max_new_tokens")])
def test_turns_that_do_not_fit(talk, more, message):
    flags = [f for f in talk.flags if f != "--chat"]
    with pytest.raises(UserError, match=message):
        E.main([*flags, "--out", str(talk.out), *more])
    assert not talk.out.exists()


def test_one_answer_to_a_single_question_has_no_turns():
    task = E.TASKS["demo"]()
    assert turns.questions(task, "q", {}) == ["q"]
    assert turns.messages(["q", "r"], ["a"]) == [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "r"}]


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("flags, message", [
    (["--samples", "0"], "--samples is 0; it must be at least 1"),
    (["--samples", "4"], "--samples 4 needs --temperature above 0"),
    (["--samples", "4", "--temperature", "1e-40"], "--samples 4 needs --temperature above 0"),
    (["--temperature", "-1"], "--temperature is -1.0; it must be 0"),
    (["--temperature", "nan"], "--temperature is nan; it must be 0"),
    (["--temperature", "inf"], "--temperature is inf; it must be 0"),
    (["--temperature", "1", "--top_p", "0"], "--top_p is 0.0; it must be above 0"),
    (["--temperature", "1", "--top_p", "1.5"], "--top_p is 1.5; it must be above 0"),
    (["--temperature", "1", "--top_p", "nan"], "--top_p is nan; it must be above 0"),
    (["--temperature", "1", "--top_k", "0"], "--top_k is 0; it must be at least 1"),
    (["--top_p", "0.9"], "--top_p 0.9 needs --temperature above 0"),
    (["--top_k", "3"], "--top_k 3 needs --temperature above 0"),
    (["--seed", "-1"], "--seed is -1; it must be 0 or above"),
    (["--seed", str(1 << 63)], "--seed is 9223372036854775808, which is too large"),
    (["--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
    (["--replay", "x", "--rules", "standard", "--temperature", "1"], "--replay is greedy"),
])
def test_bad_input_is_one_clear_line(pair, tmp_path, flags, message):  # noqa: F811
    with pytest.raises(UserError, match=message) as e:
        E.main([*pair.task, *pair.models, "--rules", "target", "--out", str(tmp_path / "out"),
                "--device", "cpu", *flags])
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())
