"""The benchmarks: answers read as people write them, every example of the real files, and what is refused."""
import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest

from cli import UserError
from tasks import TASKS, number

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = {"gsm8k": ("gsm8k_test.jsonl", 1319), "humaneval": ("HumanEval.jsonl.gz", 164), "arc": ("ARC-Challenge-Test.jsonl", 1172)}
make = lambda name: TASKS[name](allow_code_execution=True)


@pytest.mark.parametrize("text, value", [("18", 18), ("1,234", 1234), ("$1,234.50", "1234.5"), ("-7", -7), ("18.00", 18), ("-$3", -3), (".5", "0.5"), ("x", None)])
def test_numbers(text, value):
    assert number(text) == (None if value is None else Decimal(value))


GSM = {"question": "q", "answer": "so\n#### 1,200", "id": "x"}


@pytest.mark.parametrize("text, right, how", [
    ("It is 1200.\n#### 1200", True, "marked"), ("#### 1,200", True, "marked"), ("#### $1200.00\nQuestion", True, "marked"), ("#### 120", False, "marked"),
    ("#### 1200 apples, not 5", True, "marked"), ("#### 7\n#### 1200", False, "marked"), ("The answer is 1,200.", True, "last number"),
    ("1200, no, 7", False, "last number"), ("3 * 400 = 1200", True, "last number"), ("####\nno idea", False, "no number"), ("", False, "no number"),
    ("#### -1200", False, "marked"), ("####1200", True, "marked"), ("He paid $1,200.", True, "last number"), ("between 3 and 1200.0", True, "last number"),
])
def test_gsm8k_answers(text, right, how):
    assert make("gsm8k").score(GSM, text) == (right, how)


ARC = {"id": "x", "question": {"stem": "s", "choices": [{"text": t, "label": n} for t, n in zip("wxyz", "1234")]}, "answerKey": "2"}  # right: B


@pytest.mark.parametrize("text, right, how", [
    ("The answer is B.", True, "named"), ("A ball falls. The answer is **B**.", True, "named"), ("Answer: (B)", True, "named"), ("answer is C, no: the answer is B", True, "named"),
    ("The answer is Copper.", False, "no letter"), ("B", True, "as a choice"), (" B) x", True, "as a choice"), ("(B)", True, "as a choice"), ("I choose (C).", False, "as a choice"),
    ("It must be B, I think", True, "a letter"), ("A cat has no letter", False, "no letter"), ("I'd say B's right", False, "no letter"), ("E", False, "no letter"),
])
def test_arc_answers(text, right, how):
    assert make("arc").score(ARC, text) == (right, how)


HUMAN = {"task_id": "t/0", "prompt": "import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    \"\"\"Half of x, rounded up.\"\"\"\n", "entry_point": "f",
         "test": "def check(candidate):\n    assert candidate(3) == 2\n    assert half(4) == 2\n"}
BODY = "    return math.ceil(half(x))\n"


@pytest.mark.parametrize("text, right", [
    (BODY, True), (BODY + "\nprint(f(3))", True), ("    return 1\n", False), ("    return (", False), ("", False),
    (f"```python\n{BODY}```", True),  # the body alone
    (f"Here:\n```python\ndef f(x):\n{BODY}```\nDone.", True),  # the whole, leaning on what the prompt defines
    (f"```py\nimport math\n\ndef f(x):\n    return math.ceil(x / 2)\n```\n```python\nassert f(3) == 2\n```", True),
    (f"```python\nf(1)\n```\n```python\ndef f(x):\n{BODY}", True),  # cut off before its end
])
def test_humaneval_answers(text, right):
    score = make("humaneval").score(HUMAN, text)
    assert score.right == right and score.how == ("passed" if right else "failed")


def test_humaneval_runs_nothing_unless_allowed():
    for act in (lambda t: t.load("any"), lambda t: t.score(HUMAN, BODY)):
        with pytest.raises(UserError, match="--allow_code_execution"):
            act(TASKS["humaneval"]())


def test_demo_domains_and_limit():
    task = make("demo")
    examples = task.load(ROOT / "checkpoints" / "demo" / "problems.jsonl", limit=2)
    assert [e["domain"] for e in examples] == ["maths"] * 2 + ["code"] * 2 + ["facts"] * 2 and len({e["id"] for e in examples}) == 6
    assert task.score(examples[0], f" x\n#### {examples[0]['answer']}\n") == (True, "exact") and not task.score(examples[0], "").right


@pytest.mark.parametrize("name", FILES)
def test_real_files(name):
    path, count = DATA / FILES[name][0], FILES[name][1]
    if not path.exists():
        pytest.skip("the benchmarks' files are not here")
    task = make(name)
    examples = task.load(path)
    assert len(examples) == count == len({e["id"] for e in examples}) and len(task.load(path, limit=3)) == 3
    for e in examples:
        base, chat = task.prompt(e), task.chat(e)
        assert base.strip() and chat.strip() and not any(s in base.rpartition("Question:")[2] for s in task.stop if name == "gsm8k")
        if name == "gsm8k":
            assert task.score(e, e["answer"]) == (True, "marked") and task.score(e, e["answer"].replace("####", "")) == (True, "last number")
        if name == "arc":
            right = "ABCDE"[[c["label"] for c in e["question"]["choices"]].index(e["answerKey"])]
            assert [task.score(e, f"So the answer is {x}.").right for x in "ABCDE"].count(True) == 1 and task.score(e, f"The answer is {right}.") == (True, "named")


@pytest.mark.parametrize("name, content, message", [
    ("gsm8k", "", "holds no examples"), ("gsm8k", "\n\n", "holds no examples"), ("gsm8k", '{"question": "q", "answer": "a"}\n{', r"line 2: not JSON"),
    ("gsm8k", "[1]", "line 1: not a JSON object"), ("gsm8k", '{"question": "q", "answer": "#### 1"}\n{"question": "q"}', "line 2: 'answer' is missing"),
    ("gsm8k", '{"question": "q", "answer": "one"}', "the answer of gsm8k/0 does not end in ####"),
    ("arc", '{"question": "q", "answer": "#### 1"}', "is a file of gsm8k, not of arc; give --task gsm8k"),
    ("arc", json.dumps(ARC | {"answerKey": "E"}), "its answerKey is none"), ("gsm8k", json.dumps(HUMAN), "is a file of humaneval"),
    ("humaneval", json.dumps(ARC), "is a file of arc"), ("demo", '{"task": "maths", "prompt": "p"}', "line 1: 'answer' is missing"),
])
def test_bad_files_are_one_line(tmp_path, name, content, message):
    (tmp_path / "f.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as e:
        make(name).load(tmp_path / "f.jsonl")
    assert "\n" not in str(e.value)


def test_broken_gzip_and_no_file(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(json.dumps(GSM).encode() * 9)[:-20])
    for path in (tmp_path / "f.gz", tmp_path / "none"):
        with pytest.raises(UserError, match=f"cannot read {path}"):
            make("gsm8k").load(path)
