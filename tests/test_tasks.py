"""The benchmarks: answers read as people write them, every example of the real files, bad files."""
import gzip
import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from common import UserError
from evaluation.answers import number
from evaluation.tasks import TASKS

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = {"gsm8k": ("gsm8k_test.jsonl", 1319), "humaneval": ("HumanEval.jsonl.gz", 164),
         "arc": ("ARC-Challenge-Test.jsonl", 1172)}


def make(name):
    return TASKS[name](allow_code_execution=True)


@pytest.mark.parametrize("text, value", [
    ("18", 18), ("1,234", 1234), ("$1,234.50", "1234.5"), ("-7", -7), ("18.00", 18), ("-$3", -3),
    (".5", "0.5"), ("x", None)])
def test_numbers(text, value):
    assert number(text) == (None if value is None else Decimal(value))


GSM = {"question": "q", "answer": "so\n#### 1,200", "id": "x"}


@pytest.mark.parametrize("text, right, how", [
    ("It is 1200.\n#### 1200", True, "marked"), ("#### 1,200", True, "marked"),
    ("#### $1200.00\nQuestion", True, "marked"), ("#### 120", False, "marked"),
    ("#### 1200 apples, not 5", True, "marked"), ("#### 7\n#### 1200", False, "marked"),
    ("#### -1200", False, "marked"), ("####1200", True, "marked"),
    ("The answer is 1,200.", True, "named"), ("1200, no, 7", False, "last number"),
    ("3 * 400 = 1200", True, "last number"), ("He paid $1,200.", True, "last number"),
    ("between 3 and 1200.0", True, "last number"),
    ("####\nno idea", False, "no number"), ("", False, "no number"),
])
def test_gsm8k_answers(text, right, how):
    assert make("gsm8k").score(GSM, text) == (right, how)


CHOICES = [{"text": t, "label": n} for t, n in zip("wxyz", "1234")]
ARC = {"id": "x", "question": {"stem": "s", "choices": CHOICES}, "answerKey": "2"}  # right: B


@pytest.mark.parametrize("text, right, how", [
    ("The answer is B.", True, "named"), ("A ball falls. The answer is **B**.", True, "named"),
    ("Answer: (B)", True, "named"), ("answer is C, no: the answer is B", True, "named"),
    ("B", True, "as a choice"), (" B) x", True, "as a choice"), ("(B)", True, "as a choice"),
    ("I choose (C).", False, "as a choice"), ("It must be B, I think", True, "as a choice"),
    ("A cannot be it, B can be", True, "a letter"), ("x fits. x", False, "no letter"),
    ("The answer is Copper.", False, "no letter"), ("A cat has no letter", False, "no letter"),
    ("I'd say B's right", False, "no letter"), ("E", False, "no letter"),
])
def test_arc_answers(text, right, how):
    assert make("arc").score(ARC, text) == (right, how)


PROMPT = '''import math

def half(x):
    return x / 2

def f(x):
    """Half of x, rounded up."""
'''
HUMAN = {"task_id": "t/0", "prompt": PROMPT, "entry_point": "f",
         "test": "def check(candidate):\n    assert candidate(3) == 2\n    assert half(4) == 2\n"}
BODY = "    return math.ceil(half(x))\n"


@pytest.mark.parametrize("text, right", [
    (BODY, True), (BODY + "\nprint(f(3))", True), ("    return 1\n", False),
    ("    return (", False), ("", False),
    (f"```python\n{BODY}```", True),  # the body alone
    # the whole, leaning on what the prompt defines
    (f"Here:\n```python\ndef f(x):\n{BODY}```\nDone.", True),
    ("```py\nimport math\n\ndef f(x):\n    return math.ceil(x / 2)\n```\n"
     "```python\nassert f(3) == 2\n```", True),
    (f"```python\nf(1)\n```\n```python\ndef f(x):\n{BODY}", True),  # cut off before its end
])
def test_humaneval_answers(text, right):
    assert make("humaneval").score(HUMAN, text) == (right, "passed" if right else "failed")


def test_humaneval_runs_nothing_unless_allowed():
    for act in (lambda t: t.load("any"), lambda t: t.score(HUMAN, BODY)):
        with pytest.raises(UserError, match="--allow_code_execution"):
            act(TASKS["humaneval"]())


def test_demo_domains_and_limit():
    task = make("demo")
    examples = task.load(ROOT / "checkpoints" / "demo" / "problems.jsonl", limit=2)
    assert [e["domain"] for e in examples] == ["maths"] * 2 + ["code"] * 2 + ["facts"] * 2
    assert len({e["id"] for e in examples}) == 6
    assert task.score(examples[0], f" x\n#### {examples[0]['answer']}\n") == (True, "exact")
    assert not task.score(examples[0], "").right


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    path, count = DATA / FILES[name][0], FILES[name][1]
    if not path.exists():
        pytest.skip("the benchmarks' files are not here")
    task = make(name)
    examples = task.load(path)
    assert len(examples) == count == len({e["id"] for e in examples})
    assert task.load(path, limit=3) == examples[:3]
    for e in examples:
        base, chat = task.prompt(e), task.chat(e)
        assert base.strip() and chat.strip()
        if name == "gsm8k":
            assert not any(s in base.rpartition("Question:")[2] for s in task.stop)
            assert task.score(e, e["answer"]) == (True, "marked")
            assert task.score(e, e["answer"].replace("####", "")) == (True, "last number")
        if name == "arc":
            labels = [c["label"] for c in e["question"]["choices"]]
            right = "ABCDE"[labels.index(e["answerKey"])]
            assert task.score(e, f"The answer is {right}.") == (True, "named")
            assert sum(task.score(e, f"So the answer is {x}.").right for x in "ABCDE") == 1


@pytest.mark.parametrize("name, content, message", [
    ("gsm8k", "", "holds no examples"), ("gsm8k", "\n\n", "holds no examples"),
    ("gsm8k", '{"question": "q", "answer": "a"}\n{', "line 2: not JSON"),
    ("gsm8k", "[1]", "line 1: not a JSON object"),
    ("gsm8k", '{"question": "q", "answer": "#### 1"}\n{"question": "q"}',
     "line 2: 'answer' is missing"),
    ("gsm8k", '{"question": "q", "answer": "one"}',
     "line 1: the answer of gsm8k/0 does not end in ####"),
    ("arc", '{"question": "q", "answer": "#### 1"}',
     "is a file of gsm8k, not of arc; give --task gsm8k"),
    ("arc", json.dumps(ARC) + "\n" + json.dumps(ARC | {"answerKey": "E"}),
     "line 2: the choices of x are not as ARC has them, or its answerKey is none"),
    ("gsm8k", json.dumps(HUMAN), "is a file of humaneval"),
    ("humaneval", json.dumps(HUMAN) + "\n\n" + json.dumps(HUMAN),
     "line 3: its id 't/0' is also that of line 1"),
    ("humaneval", json.dumps(HUMAN | {"entry_point": "g"}),
     "line 1: the prompt of t/0 does not define its entry_point"),
    ("humaneval", json.dumps(HUMAN | {"test": "pass"}), "the test of t/0 does not define check"),
    ("arc", "\n".join([json.dumps(ARC)] * 2), "line 2: its id 'x' is also that of line 1"),
    ("arc", json.dumps(ARC | {"id": [1]}), "line 1: its id is not a string"),
    ("arc", json.dumps(ARC | {"answerKey": ["2"]}), "line 1: 'answerKey' is missing or not"),
    ("arc", json.dumps(ARC | {"question": {"stem": "s", "choices": CHOICES[:3] + CHOICES[:1]}}),
     "line 1: the choices of x are not as ARC has them"),
    ("arc", json.dumps(ARC | {"question": {"stem": "s", "choices": [*CHOICES, "z"]}}),
     "line 1: the choices of x are not as ARC has them"),
    ("demo", '{"task": "code", "prompt": "p", "answer": [1]}', "line 1: the answer of code/0"),
    ("demo", '{"task": "maths", "prompt": "p", "answer": []}', "line 1: 'answer' is missing"),
    ("humaneval", json.dumps(ARC), "is a file of arc"),
    ("demo", '{"task": "maths", "prompt": "p"}', "line 1: 'answer' is missing"),
])
def test_bad_files_are_one_line(tmp_path, name, content, message):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as e:
        make(name).load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


VALUES = (None, True, 0, -1, 5, 1e9, "", "x", "#### 3", "\u2028", "\x1b[2J\n", [], ["x"], [[]], {},
          {"label": "2"}, {"choices": CHOICES}, CHOICES,
          [{"label": [], "text": "t"}, {"label": "2", "text": 2}])


@pytest.mark.parametrize("name, good", [
    ("gsm8k", GSM), ("arc", ARC), ("humaneval", HUMAN),
    ("math500", {"problem": "p", "solution": "\\boxed{3}", "answer": "3"}),
    ("aime24", {"problem": "p", "answer": "3"}),
    ("mt_bench", {"question_id": 81, "category": "c", "turns": ["a", "b"]}),
    ("demo", {"task": "code", "prompt": "def f(x):", "answer": [[1, 2]]})])
def test_a_mistyped_line_is_named_or_can_be_scored(tmp_path, name, good):
    """Every field, and every pair of two, with values of every kind; ids repeat and collide."""
    r, path, task, refused = random.Random(name), tmp_path / "f.jsonl", make(name), 0
    for i in range(150):
        lines = [good | {k: r.choice(VALUES) for k in r.sample([*good, "id"], r.randint(0, 2))}
                 for _ in range(2)]
        if i % 3 == 0 and name == "arc":
            lines[0] = good | {"question": good["question"] | {
                r.choice(("stem", "choices")): r.choice(VALUES)}}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        try:
            examples = task.load(path)
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and ("line" in str(e) or "is a file of" in str(e))
            continue
        assert len({e["id"] for e in examples}) == 2
        for e in examples:
            assert isinstance(task.prompt(e), str) and isinstance(task.chat(e), str)
            if name not in ("humaneval", "math500"):
                right = task.score(e, "x\n#### 3").right
                assert isinstance(right, bool) if task.graded else right is None
    assert 0 < refused < 150


def test_gzip_whole_broken_and_no_file(tmp_path):
    data = gzip.compress((json.dumps(GSM) + "\n").encode() * 9)
    (tmp_path / "whole.gz").write_bytes(data)
    assert len(make("gsm8k").load(tmp_path / "whole.gz")) == 9
    (tmp_path / "f.gz").write_bytes(data[:-20])
    for path in (tmp_path / "f.gz", tmp_path / "none"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            make("gsm8k").load(path)
