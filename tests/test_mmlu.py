"""MMLU's letters and files, MT-Bench's turns."""
import json
import re
import string
from pathlib import Path

import pytest

from common import UserError
from evaluation.tasks import TASKS

DATA = Path(__file__).parents[2] / "shared" / "data"
LETTER = {"question": "Which is a metal?", "answer": "B",
          "choices": ["a ball", "zinc", "the answer is C", "D"]}


def harness(text: str) -> bool:
    """What mmlu_generative says of an answer that should be B: see its filters."""
    line = text.split("\n", 1)[0].strip().lower()
    return "".join(c for c in line if c not in string.punctuation) == "b"


# (answer, right, how, what the harness says where it is another)
LETTERS = [
    (" B", True, "first letter"), ("B", True, "first letter"), (" B.", True, "first letter"),
    ("(B)", True, "first letter"), ("**B**", True, "first letter"), ("b", True, "first letter"),
    (" B\n\nQuestion: A", True, "first letter"), ("B)", True, "first letter"),
    ("[B]", True, "first letter"), ("\"B\".", True, "first letter"),
    (" B. zinc", True, "first letter", False), ("(B) zinc", True, "first letter", False),
    ("**B.** zinc", True, "first letter", False), ("B: zinc", True, "first letter", False),
    ("<think>A?</think>B", True, "first letter", False), ("\n\nB", True, "first letter", False),
    ("A", False, "first letter"), (" C.", False, "first letter"), ("d", False, "first letter"),
    ("A. B", False, "first letter"), ("A\nB", False, "first letter"),
    ("The answer is B.", True, "named", False), ("Answer: B", True, "named", False),
    ("The best answer is (B).", True, "named", False), ("The answer is C.", False, "named"),
    ("B is a metal", True, "a letter", False), ("zinc", True, "choice text", False),
    ("E", False, "no letter"), ("BC", False, "no letter"), ("", False, "no letter"),
    ("I do not know", False, "no letter"),
    ("A.D. 70 it was. The answer is B.", True, "named", False),
    ("A ball is no metal, so it is B.", True, "as a choice", False),
]


@pytest.mark.parametrize("answer", LETTERS, ids=lambda a: repr(a[0])[:30])
def test_mmlu_letters(answer):
    text, right, how, *other = answer
    score = TASKS["mmlu"]().score(LETTER, text)
    assert score == (right, how)
    assert harness(text) == (other[0] if other else right)


# ---------------------------------------------------------------- MMLU's files

GOOD = '"Is 1 < 2, or ""2"" ?",yes,no,"may\nbe",2,A\n'


@pytest.fixture
def data(tmp_path):
    for split, lines in (("dev", 5), ("test", 3)):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"formal_logic_{split}.csv").write_text(GOOD * lines)
    return tmp_path


def test_official_layout(data):
    task = TASKS["mmlu"]()
    examples = task.load(data)
    assert [e["id"] for e in examples] == [f"formal_logic/{i}" for i in range(3)]
    assert {e["domain"] for e in examples} == {"formal_logic"}
    question = 'Is 1 < 2, or "2" ?\nA. yes\nB. no\nC. may\nbe\nD. 2\nAnswer:'
    assert task.prompt(examples[0]) == (
        "The following are multiple choice questions (with answers) about formal logic.\n\n"
        + f"{question} A\n\n" * 5 + question)
    assert examples == task.load(data / "test" / "formal_logic_test.csv")
    before = task.fingerprint(data)
    for split in ("dev", "test"):
        path = data / split / f"formal_logic_{split}.csv"
        path.write_text(path.read_text() + GOOD)
        assert before != (before := task.fingerprint(data))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(task.load(data)) == 4 and task.load(data)[0]["question"] == 'Is 1 < 2, or "2" ?'


@pytest.mark.parametrize("content, message", [
    ("q,a,b,c,A\n", "line 3: it has 5 columns; MMLU's files have 6"),
    ('"q\nr",a,b,c,A\n', "line 3: it has 5 columns"),  # it ends on line 4
    ("q,a,b,c,d,e,A\n", "line 3: it has 7 columns; MMLU's files have 6"),
    ("q,a,b,c,d,E\n", "line 3: its answer is 'E', not A, B, C or D$"),
    ("q,a,b,c,d,1\n", "line 3: its answer is '1', not A, B, C or D$"),
    ('"q,a,b,c,d,A\n', "line 3: its quotes are not as in CSV"),
    ('"q"x,a,b,c,d,A\n', "line 3: its quotes are not as in CSV"),
    (",a,b,c,d,A\n", "line 3: 'question' is missing"),
    ('{"question": "q"}\n', "line 3: it has 1 columns"),
    ("x" * 200_000 + ",a,b,c,d,A\n", "line 3: its quotes are not as in CSV .field larger"),
])
def test_other_layouts_are_named_by_line(data, content, message):
    """The first example has two lines."""
    path = data / "test" / "formal_logic_test.csv"
    path.write_text(GOOD + content)
    with pytest.raises(UserError, match=f"^{path}, {message}") as e:
        TASKS["mmlu"]().load(data)
    assert "\n" not in str(e.value)


def test_header_empty_and_missing_files(data):
    load, test = TASKS["mmlu"]().load, data / "test" / "formal_logic_test.csv"
    dev = data / "dev" / "formal_logic_dev.csv"

    def refused(path, message):
        with pytest.raises(UserError, match=message) as e:
            load(path)
        assert "\n" not in str(e.value)

    test.write_text("question,A,B,C,D,answer\n" + GOOD)
    refused(data, f"^{test}, line 1: its answer is 'answer', .*MMLU's files have no header")
    test.write_text("\n\n")
    refused(data, f"^{test}: it is empty; fetch it again")
    test.write_bytes(b"\xff\xfe")
    refused(data, f"^{test}: it is not UTF-8 text")
    test.write_text(GOOD)
    dev.write_text(GOOD * 4)
    refused(test, f"^{dev} has 4 examples; it must have 5")
    dev.write_text(GOOD * 4 + "q,a,b,c,d,x")
    refused(test, f"^{dev}, line 9: its answer is 'x'")
    dev.unlink()
    refused(test, f"^{test} needs its few-shot examples, and {dev} does not exist")
    refused(data / "test", "has no test/\\*_test.csv; give the directory that holds")
    refused(data / "none_test.csv", "needs its few-shot")
    refused(data / "none", "is not named SUBJECT_test.csv")


# ---------------------------------------------------------------- MT-Bench

def test_mt_bench_turns(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"question_id": 81, "category": "writing", "turns": ["a", "b"]}))
    task = TASKS["mt_bench"]()
    [e] = task.load(path)
    assert (e["id"], e["domain"]) == ("81", "writing") and not task.graded
    assert task.prompt(e) == task.chat(e) == "a"
    assert [task.follow_up(e, ["x"] * n) for n in (1, 2, 3)] == ["b", None, None]
    assert task.score(e, "x") == (None, "not graded")
    assert all(t.graded and t().follow_up(e, ["x"]) is None
               for t in TASKS.values() if t.name != "mt_bench")
    path.write_text(path.read_text().replace('"b"', "3"))
    with pytest.raises(UserError, match="line 1: the turns of question 81 are not all texts"):
        task.load(path)


def test_mt_bench_published():
    if not (path := DATA / "mt_bench_question.jsonl").exists():
        pytest.skip("the benchmarks' files are not here")
    task = TASKS["mt_bench"]()
    examples = task.load(path)
    lines = [json.loads(s) for s in path.open()]
    assert [task.prompt(e) for e in examples] == [x["turns"][0] for x in lines]
    assert [task.follow_up(e, [""]) for e in examples] == [x["turns"][1] for x in lines]
    assert len(examples) == 80 and len(task.load(path, limit=1)) == 8
    assert re.fullmatch(r"\d+", examples[0]["id"])
