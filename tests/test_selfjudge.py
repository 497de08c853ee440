"""Labels by SelfJudge: swaps, scores and marks against one pass for every swapped text, branches of
a text against reading each alone, where labels begin, resuming, what is refused.
"""
import json
import random
import re

import pytest
import torch

import checkpoint
import make_judge_data as M
import train_judge
from common import UserError
from demo.corpus import problems, render
from demo.mined import at_bounds, mark_rows, swaps
from drafters.eagle import EagleDrafter
from engine import Engine, generate
from formats.answer_log import AnswerLog
from helpers import ROOT, random_model, tiny_config
from judge_data import branches, features
from judge_data.branches import Text
from judge_data.data import Encoded, encode, labelled, read_data
from judge_data.report import Judged, shaded
from judge_data.selfjudge import SelfJudge
from load import load_eagle
from tokenizer import Tokenizer

DEMO = ROOT / "checkpoints" / "demo"
ANSWERS = ROOT / "tests" / "written_before" / "make_judge_data" / "answers.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def mine(data, out, *more, draft=DEMO / "draft"):
    M.main(["mine", "--data", str(data), "--target", str(DEMO / "target"), "--draft", str(draft),
            "--method", "selfjudge", "--device", "cpu", "--out", str(out), *map(str, more)])
    return lines_of(out)


@pytest.fixture(scope="module")
def pair():
    """(tokenizer, target, draft) of the demo."""
    load = lambda name: checkpoint.load(DEMO / name, dtype=torch.float32)
    return Tokenizer.from_dir(DEMO / "target"), load("target"), load("draft")


@pytest.fixture(scope="module")
def open_answers(tmp_path_factory):
    """Two of the target's answers and one of the draft's, as to prompts of no task."""
    made = {(a["domain"], a["source_model"]): a for a in lines_of(ANSWERS)}
    kept = [made[key] for key in (("facts", "target"), ("code", "target"), ("facts", "draft"))]
    plain = ("prompt", "answer", "source_model", "domain", "chat", "ended", "max_new_tokens")
    return write(tmp_path_factory.mktemp("open") / "answers.jsonl",
                 [{key: a[key] for key in plain} for a in kept])


# ---------------------------------------------------------------- scores

@torch.inference_mode()
def log_probs(model, ids):
    """After each of the ids, by one pass from scratch, float64 [N, V]."""
    hidden = model.features(torch.tensor([ids]), torch.arange(len(ids)), model.new_cache(len(ids)))
    return model.output(hidden[0]).double().log_softmax(-1)


def brute_force(pair, line, window, bound, misfits):
    """The lines of an answer, each swapped text read on its own."""
    tokenizer, target, draft = pair
    prompt = tokenizer.encode(line["prompt"])
    own = tokenizer.encode(line["answer"], continuation=True)
    n, before = len(prompt), log_probs(target, prompt + own)
    drafted = log_probs(draft, prompt + own).argmax(-1).tolist()[n - 1:-1]
    if int(before[-1].argmax()) in tokenizer.eos_ids:
        own.append(int(before[-1].argmax()))
    found, swaps = [(line["answer"], None, None)], 0
    for at, d in enumerate(drafted):
        swapped = [*own[:at], d, *own[at + 1:]]
        if d == own[at] or d in tokenizer.eos_ids or at + 1 == len(own):
            continue
        swaps, after = swaps + 1, log_probs(target, prompt + swapped)
        fits = int(after[n + at].argmax()) == own[at + 1]
        if not fits and misfits == "skip":
            continue
        terms = [float(after[n + j - 1, swapped[j]] - before[n + j - 1, own[j]])
                 for j in range(at, min(at + window + 1, len(own)))]
        text, score = tokenizer.decode_new(prompt, swapped[:at + 1]), sum(terms) / len(terms)
        score = score if fits else None
        start = len(tokenizer.decode_new(prompt, own[:at]))
        if tokenizer.encode(text, continuation=True) == swapped[:at + 1]:
            good = fits and score > -bound
            found.append((text, None if good else [start, len(text)], score))
    return found, swaps


@pytest.mark.parametrize("rows, window, misfits", [(1024, 32, "skip"), (20, 5, "error")])
def test_labels_equal_one_pass_for_each_swap(pair, open_answers, tmp_path, monkeypatch, capsys,
                                             rows, window, misfits):
    """On prompts of no task; `rows`: of a pass over several swaps at once."""
    monkeypatch.setattr(branches, "ROWS", rows)
    more = [] if window == M.WINDOW else ["--window", window, "--misfits", misfits]
    lines = mine(open_answers, tmp_path / "m.jsonl", *more, "--bound", 0.3)
    want, swaps = [], 0
    for line in lines_of(open_answers)[:2]:
        found, count = brute_force(pair, line, window, 0.3, misfits)
        want, swaps = want + found, swaps + count
    assert [(e["answer"], e["error"]) for e in lines] == [w[:2] for w in want]
    for e, (*_, score) in zip(lines, want):
        assert e.get("score") == (score if score is None else pytest.approx(score, abs=2e-4))
        start, _ = e["error"] or (e.get("labelled_from"), None)
        assert start == e.get("labelled_from") and ("instead_of" in e) == ("score" in e)
    marks = [e["error"] is not None for e in lines if "score" in e]
    assert any(marks) and not all(marks) and swaps >= len(marks)
    said = capsys.readouterr().out
    fitting = sum(e.get("score") is not None for e in lines)
    assert f"{fitting} of {swaps} swaps fit" in said
    assert (fitting < len(marks)) == (misfits == "error")
    assert "left out: 1 not the target's own greedy answer" in said  # the draft's
    tokenizer = pair[0]
    for e, example in zip(encode(tokenizer, read_data(tmp_path / "m.jsonl"), 2048), lines):
        if "score" in example:  # train_judge.py learns this token and no other
            assert e.labels == [int(example["error"] is None)] and e.start == len(e.ids) - 1


def test_a_synonym_is_harmless_and_a_wrong_number_is_not(pair, tmp_path, monkeypatch):
    tokenizer, *_ = pair
    line = next(a for a in lines_of(ANSWERS) if a["domain"] == "maths" and a["right"])
    answer, drafted = line["answer"], tokenizer.encode(line["answer"], continuation=True)
    _, offsets = tokenizer.encode_with_offsets(answer, continuation=True)
    for before, text in ((" First Mira", " owns"), (" 72 + 14 = ", "9"), ("#### ", "9")):
        start = answer.index(before) + len(before)
        at = next(i for i, (a, _) in enumerate(offsets) if a == start)
        drafted[at] = tokenizer.encode(before + text, continuation=True)[-1]
    monkeypatch.setattr(SelfJudge, "drafted", lambda *args: torch.tensor(drafted))
    lines = mine(write(tmp_path / "a.jsonl", [line]), tmp_path / "m.jsonl")
    sum_, last = answer.index("= 86") + 2, answer.index("#### 86") + 5
    assert [(e["answer"], e["error"], e.get("instead_of")) for e in lines] == [
        (answer, None, None), (" First Mira owns", None, " has"),
        (answer[:sum_] + "9", [sum_, sum_ + 1], "8"), (answer[:last] + "9", [last, last + 1], "8")]


def test_an_eagle_head_drafts_what_it_drafts_in_the_engine(pair, tmp_path):
    """The first token of a round, after what the target wrote; and the labels of its swaps."""
    tokenizer, target, _ = pair
    line = lines_of(ANSWERS)[0]
    prompt, want = tokenizer.encode(line["prompt"]), {}
    tokens = tokenizer.encode(line["answer"], continuation=True)
    drafter = EagleDrafter(load_eagle(DEMO / "eagle", DEMO / "target"), target)
    propose = drafter.propose

    def keep(state, *args):
        drafted, logits = propose(state, *args)
        want[int(state.length) - len(prompt)] = int(drafted[0])
        return drafted, logits

    drafter.propose = keep
    assert generate(Engine(target, drafter, speculate_k=1), prompt, len(tokens)).tokens == tokens
    drafted = []
    with pytest.MonkeyPatch.context() as m:
        plain = SelfJudge.drafted
        m.setattr(SelfJudge, "drafted", lambda self, *args: drafted.append(plain(
            self, *args)) or drafted[-1])
        data = write(tmp_path / "a.jsonl", [line])
        lines = mine(data, tmp_path / "m.jsonl", draft=DEMO / "eagle")
    places = drafted[0][-len(tokens):].tolist()
    want = {at: token for at, token in want.items() if at < len(tokens)}
    assert len(want) > 10 and {at: places[at] for at in want} == want
    assert any(want[at] != tokens[at] for at in want) and all("score" in e for e in lines[1:])


# ---------------------------------------------------------------- branches

def alone(model, ids):
    return model.features(torch.tensor([ids]), torch.arange(len(ids)), model.new_cache(len(ids)))[0]


@pytest.mark.parametrize("rows", [7, 64, 1024])
def test_branches_equal_reading_each_alone(monkeypatch, rows):
    monkeypatch.setattr(branches, "ROWS", rows)
    model = random_model(tiny_config(), seed=3)
    generator = torch.Generator().manual_seed(0)
    some = lambda n: torch.randint(101, (n,), generator=generator).tolist()
    ids = some(30)
    text = Text(model, ids)
    for lengths in ([1, 9, 3, 1, 1, 30], [2] * 20, []):
        made = [(n, some(length)) for n, length in zip(range(1, 31), lengths)]
        for (n, tokens), states in zip(made, text.branches(made), strict=True):
            torch.testing.assert_close(states, alone(model, ids[:n] + tokens)[n:], atol=1e-5,
                                       rtol=1e-4)
    torch.testing.assert_close(text.hidden, alone(model, ids))


def test_an_answer_that_is_repeated_up_to_its_labels_is_read_once(monkeypatch):
    model = random_model(tiny_config(), seed=3)
    read, plain = [], model.features
    monkeypatch.setattr(model, "features", lambda ids, *a: read.append(ids.numel()) or plain(
        ids, *a))
    prompt, answer = [5, 6, 7], list(range(20, 40))
    whole = Encoded(prompt + answer, 3, [], [1] * 20, 3)
    swap = lambda at, token: Encoded(prompt + answer[:at] + [token], 3 + at, [], [1], 3)
    other = Encoded([9, *answer], 1, [], [1] * 20, 1)  # of another prompt
    stray = Encoded([*prompt, 90, 91, 92], 5, [], [1], 3)  # its prefix is no answer's
    encoded = [swap(4, 80), whole, stray, swap(0, 81), other, swap(19, 82)]
    got = features.hidden_states(model, encoded)
    assert sum(read) == 23 + 2 + 3 * 21  # the answer, what follows it twice, the others, padded
    want = torch.cat([alone(model, e.ids)[e.start:] for e in encoded])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- judge data

def test_labels_begin_where_a_line_says(tmp_path):
    offsets = [(0, 3), (3, 5), (5, 6), (5, 6), (6, 9)]
    for error, begin, want in ((None, None, (0, [1] * 5)), (None, 5, (2, [1, 1, 1])),
                               (None, 4, (1, [1] * 4)), ([5, 6], 5, (2, [0, 0])),
                               ([5, 6], 3, (1, [1, 0, 0])), ([6, 9], 6, (4, [0])),
                               (None, 8, (4, [1])), ([0, 2], 0, (0, [0]))):
        line = {"error": error} | ({} if begin is None else {"labelled_from": begin})
        assert labelled(offsets, line) == want
    good = {"prompt": "p", "answer": "abcdef", "error": None}
    path = tmp_path / "d.jsonl"
    for begin, error, last in ((6, None, 5), (-1, None, 5), (True, None, 5), ("1", None, 5),
                               (None, None, 5), (3, [2, 4], 2)):
        write(path, [good, good | {"error": error, "labelled_from": begin}])
        with pytest.raises(UserError, match=f"d.jsonl, line 2: 'labelled_from' is {begin}; it must "
                                            f"be from 0 to {last}"):
            read_data(path)
    write(path, [good | {"labelled_from": 5}, good | {"error": [2, 4], "labelled_from": 2}])
    assert [e["labelled_from"] for e in read_data(path)] == [5, 2]


def test_a_judge_can_learn_from_swaps_only(tmp_path):
    """Whole answers are for neither part; a prompt without a swap counts for no split."""
    lines = [{"prompt": f"p{i % 4}", "answer": "a b", "error": None} for i in range(8)]
    for e in lines[4:]:
        e["labelled_from"] = 2
    flags = ["--target", str(DEMO / "target"), "--data", str(write(tmp_path / "d.jsonl", lines)),
             "--out", str(tmp_path / "j"), "--val_share", "0.25", "--device", "cpu"]
    both = [sum(t.tolist()) for t in train_judge.parts(lines, train_judge.parse_args(flags))]
    args = train_judge.parse_args([*flags, "--swaps_only"])
    train, val = (t.tolist() for t in train_judge.parts(lines, args))
    assert both == [6, 2] and (sum(train), sum(val)) == (3, 1)
    assert not any(train[:4]) and not any(val[:4])
    with pytest.raises(UserError, match="d.jsonl has no swapped tokens"):
        train_judge.parts(lines[:4], args)


def test_merge_keeps_and_counts_where_labels_begin(tmp_path, capsys):
    lines = [{"prompt": f"p{i}", "answer": "abcdef", "error": [4, 6], "labelled_from": 3}
             for i in range(4)]
    train, val = tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    M.main(["merge", str(write(tmp_path / "a.jsonl", lines)), "--train", str(train), "--val",
            str(val), "--val_share", "0.5"])
    assert sorted(lines_of(train) + lines_of(val), key=lambda e: e["prompt"]) == lines
    assert capsys.readouterr().out.count("6 characters       4 negative") == 2


def test_what_has_no_label_is_shaded_as_such():
    page = lambda example: shaded(Judged({"answer": "ab<cd"} | example, [(3, 5)], [0], [2.0]), 0.5)
    assert page({"labelled_from": 3}) == (
        '<span class="rest">ab&lt;</span><span class="y e" title="p = 0.881">cd</span>')
    assert page({}).count("<span") == 1  # a character that no token holds goes with the next


def test_marks_are_counted_against_the_exact_checker():
    problem = next(problems("maths", "judge"))
    right = render(problem.solution, random.Random(0), "target")
    swap = lambda text, marked: {"prompt": problem.prompt, "answer": text, "instead_of": "x",
                                 "error": [8, 9] if marked else None, "labelled_from": 8,
                                 "score": -0.6 if marked else -0.3}
    good, bad, worse = right[:9], right[:8] + "\u00a7", "\u00a7" + right[1:9]
    lines = [swap(good, False), swap(good, True), *[swap(bad, True)] * 3, swap(bad, False),
             swap(worse, True)]  # of the last, the text was wrong before the swap
    plain = {"prompt": problem.prompt, "answer": right, "error": None}
    found = list(swaps([*lines, plain, plain | {"unimportant": [[3, 9], [8, 9]]}]))
    assert len(found) == 9
    rows = mark_rows({"m": found} | at_bounds(found[:7]))
    assert rows[1] == ["m", "8", "4", "4", "75.0%", "75.0%"]
    assert rows[-1] == ["bound 2", "6", "4", "0", "–", "0.0%"]
    assert rows[-5] == ["bound 0.4", "6", "4", "4", "75.0%", "75.0%"]
    assert rows[-6] == ["bound 0.3", "6", "4", "6", "66.7%", "100.0%"]


# ---------------------------------------------------------------- the command

def test_resumes_wherever_it_was_cut(open_answers, tmp_path, monkeypatch):
    out, kept, made = tmp_path / "m.jsonl", {}, []
    remove, plain = AnswerLog.remove, SelfJudge.selfjudge

    def keep(self):
        kept.update({path: path.read_bytes() for path in (self.path, self.about)})
        remove(self)

    monkeypatch.setattr(SelfJudge, "selfjudge", lambda self, line: made.append(line) or plain(
        self, line))
    with monkeypatch.context() as m:
        m.setattr(AnswerLog, "remove", keep)
        want = mine(open_answers, out, "--window", 3)
    part = out.with_name("m.jsonl.part")
    first, second, _ = kept[part].splitlines(True)
    for cut, left in ((first[:20], 3), (first, 2), (first + second[:-1], 1), (kept[part], 0)):
        for path, data in (kept | {part: cut}).items():
            path.write_bytes(data)
        for more, message in ((("--window", 4), "window was 3, now 4"),
                              (("--window", 3, "--bound", 1), "bound was 0.4, now 1.0")):
            with pytest.raises(UserError, match=message):
                mine(open_answers, out, *more)
        made.clear()
        out.unlink()
        assert mine(open_answers, out, "--window", 3) == want and len(made) == left
        assert not list(tmp_path.glob("*.part*"))


def test_refusals(open_answers, tmp_path):
    out = tmp_path / "m.jsonl"
    base = ["mine", "--data", str(open_answers), "--target", str(DEMO / "target"), "--out",
            str(out), "--device", "cpu", "--method"]
    draft = ["--draft", str(DEMO / "draft")]
    for command, message in (
            (["selfjudge"], "--method selfjudge needs --draft DIR"),
            (["selfjudge", *draft, "--bound", "0"], "--bound is 0.0; it must be a number above 0"),
            (["selfjudge", *draft, "--bound", "nan"], "--bound is nan"),
            (["selfjudge", *draft, "--bound", "inf"], "--bound is inf"),
            (["selfjudge", *draft, "--window", "0"], "--window is 0; it must be at least 1"),
            (["selfjudge", *draft, "--search", "scan"], "--search is for --method first_error"),
            (["selfjudge", *draft, "--speculate_k", "4"], "--speculate_k is of the target's cont"),
            (["autojudge", *draft, "--bound", "1"], "--bound is for --method selfjudge"),
            (["first_error", "--window", "9"], "--window is for --method selfjudge"),
            (["first_error", "--misfits", "skip"], "--misfits is for --method selfjudge"),
            (["autojudge", *draft], "no answers of a task with a checker .* --method selfjudge")):
        with pytest.raises(UserError, match=message) as e:
            M.main([*base, *command])
        assert "\n" not in str(e.value) and not list(tmp_path.glob("m.jsonl*")), message
    lines = lines_of(open_answers)
    long = write(tmp_path / "long.jsonl", [lines[0], lines[1] | {"answer": "no " * 3000}])
    with pytest.raises(UserError, match="long.jsonl, line 2: prompt and answer have"):
        mine(long, out)


def test_answers_that_cannot_be_used_are_counted(open_answers, tmp_path, capsys):
    line = lines_of(open_answers)[0]
    changed = line["answer"].replace(" So ", " Thus ")
    assert changed != line["answer"]
    data = write(tmp_path / "a.jsonl", [line | {"answer": changed}, line | {"answer": ""},
                                        line | {"answer": line["answer"][:40], "ended": False}])
    lines = mine(data, tmp_path / "m.jsonl")
    said = re.search("left out: (.*)", capsys.readouterr().out)[1]
    assert said == "1 empty; 1 not the target's own greedy answer"
    assert lines[0]["answer"] == line["answer"][:40]  # cut off, as far as it goes
