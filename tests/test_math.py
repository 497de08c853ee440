"""MATH-500 and AIME: verdicts that math-verify and the harness give, and graders that end."""
import json
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from common import UserError
from evaluation import mathematics
from evaluation.tasks import TASKS

CASES = [json.loads(s) for s in Path(__file__).with_name("math_cases.jsonl").open()]
verifies = pytest.mark.skipif(not find_spec("math_verify"), reason="math-verify is not installed")


def solution(answer: str) -> dict:
    return {"solution": f"So $x$ is \\boxed{{{answer}}}."}


@verifies
def test_math500_verdicts_are_the_committed_ones():
    task = TASKS["math500"]()
    found = [task.score(solution(c["answer"]), c["text"]).right for c in CASES]
    assert [c for c, right in zip(CASES, found) if right != c["right"]] == []
    assert len(CASES) > 60 < sum(found) < len(CASES)


@verifies
def test_math500_says_where_the_answer_stood():
    task = TASKS["math500"]()
    for text, want in (("\\boxed{24}", (True, "boxed")), ("It is $24$.", (True, "not boxed")),
                       ("no idea", (False, "no answer")), ("\\boxed{25}", (False, "boxed")),
                       ("<think>\\boxed{24}</think> $25$", (False, "not boxed")),
                       ("half a character \ud800 \\boxed{24}", (True, "boxed"))):
        assert task.score(solution("24"), text) == want
    with ThreadPoolExecutor(1) as pool:  # math-verify itself refuses to run in a thread
        assert pool.submit(task.score, solution("24"), "\\boxed{24}").result().right


@verifies
@pytest.mark.slow
def test_an_answer_that_takes_too_long_is_given_up(monkeypatch):
    monkeypatch.setattr(mathematics, "LIMIT", 1)
    mathematics.grader.cache_clear()
    three = lambda text: mathematics.grade("\\boxed{3}", text)
    try:
        begin = time.monotonic()
        assert three("\\boxed{9^{9^{9^9}}}") == (False, "timed out")
        assert time.monotonic() - begin < 60
        monkeypatch.undo()
        assert three("\\boxed{3}") == (True, "boxed")
        mathematics.grader().kill()  # as when the memory runs out
        assert three("\\boxed{3}") == (False, "the grader failed")
        assert three("\\boxed{3}") == (True, "boxed")
    finally:
        mathematics.grader.cache_clear()


def test_missing_math_verify_is_one_line(monkeypatch):
    monkeypatch.setattr(mathematics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="math-verify, which is missing; pip install -r"):
        TASKS["math500"]().check()
    TASKS["aime24"]().check()  # needs nothing


# ---------------------------------------------------------------- AIME

# (answer, right, what the harness says where it is another, how)
AIME = [
    ("\\boxed{70}", True, "boxed"), ("So \\boxed{070}", True, "boxed", False),
    ("\\boxed{71}", False, "boxed"), ("\\boxed{\\boxed{70}}", True, "boxed"),
    ("\\boxed{3}, no: \\boxed{70}", True, "boxed"), ("\\boxed{70}, no: \\boxed{3}", False, "boxed"),
    ("\\boxed{ 70 }", True, "boxed"), ("\\boxed {70}", True, "boxed", False),
    ("\\boxed{70.0}", True, "boxed", False), ("\\boxed{70.5}", False, "boxed"),
    ("\\boxed{x = 70}", True, "boxed"), ("\\boxed{m+n=70}", True, "boxed", False),
    ("\\boxed{70^\\circ}", True, "boxed"), ("\\boxed{70^{\\circ}}", True, "boxed"),
    ("\\boxed{\\text{70}}", True, "boxed", False), ("\\boxed{\\mathbf{70}}", True, "boxed", False),
    ("\\boxed{70\\text{ minutes}}", True, "boxed"), ("\\boxed{\\$70}", True, "boxed"),
    ("\\boxed{$70$}", True, "boxed", False), ("\\boxed{-70}", False, "boxed"),
    ("\\boxed{70\\pi}", False, "boxed"), ("\\boxed{\\frac{140}{2}}", False, "boxed"),
    ("\\boxed{7 0}", True, "boxed"), ("\\boxed{70, 71}", False, "boxed"),
    ("\\boxed{7, 0}", False, "boxed"), ("\\boxed{7,0}", False, "boxed"),
    ("\\boxed{7,\\ 0}", False, "boxed"), ("\\boxed{7{,}0}", False, "boxed"),
    ("\\boxed{}", False, "boxed"),
    ("\\boxed{70} is the answer, of 12 cases 5", True, "boxed"),
    ("The answer is 70.", True, "named", False), ("**Answer: 70**", True, "named", False),
    ("70", True, "last number"), ("070", True, "last number", False),
    ("so $n = 70$", True, "last number"), ("$x$ gives $70$", True, "last number", False),
    ("#### 1. Angles\nThus 70", True, "last number", False),
    ("#### 70", True, "last number", False),
    ("70 of 71", False, "last number"), ("no idea", False, "no number"), ("", False, "no number"),
    ("\\boxed{70", True, "boxed", False), ("\\boxed{700}", False, "boxed"),
    ("<think>\\boxed{70}</think> \\boxed{71}", False, "boxed"),
    ("<think>perhaps \\boxed{70}", False, "no number", True),
]


@pytest.mark.parametrize("answer", AIME, ids=lambda a: a[0][:30])
def test_aime_verdicts(answer):
    text, right, how = answer[:3]
    assert TASKS["aime24"]().score({"answer": "70"}, text) == (right, how)


def test_aime_where_the_harness_differs():
    """It compares texts: a committed column for where that is stricter (and once, not)."""
    if not find_spec("lm_eval"):
        pytest.skip("lm_eval is not installed")
    file = Path(find_spec("lm_eval").origin).with_name("tasks") / "aime/utils.py"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an escape in its source
        exec(file.read_text(), scope := {})
    for text, right, _, *other in AIME:
        says = scope["process_results"]({"Answer": 70}, [text])["exact_match"]
        assert bool(says) == (other[0] if other else right), text


def test_boxes_of_any_length_and_nesting_are_read_in_a_moment():
    for text in ("\\boxed{" * 30_000, "\\boxed{" * 9_000 + "70" + "}" * 9_000, "{" * 100_000,
                 "\\boxed{" + "=" * 100_000 + "}", "\\boxed{" + "9" * 100_000 + "}"):
        begin = time.monotonic()
        value, how = mathematics.read_integer(text)
        assert value in (None, 70) and time.monotonic() - begin < 5


@pytest.mark.parametrize("name, line, message", [
    ("math500", {"problem": "p", "answer": "3"}, "is a file of aime24, not of math500"),
    ("aime24", {"problem": "p", "answer": "x"}, "line 1: the answer of aime24/0 is not an integer"),
    ("aime24", {"problem": "p", "answer": 1000}, "line 1: the answer of aime24/0 is not an integ"),
    ("aime24", {"problem": "p", "answer": -1}, "line 1: the answer of aime24/0 is not an integer"),
    ("aime24", {"problem": "p"}, "line 1: 'answer' is missing"),
    ("math500", {"turns": ["a"], "question_id": 1, "category": "c"}, "is a file of mt_bench"),
    ("math500", {"problem": "p", "solution": [], "answer": "3"}, "is a file of aime24"),
])
def test_other_files_are_one_line(tmp_path, name, line, message):
    (path := tmp_path / "f.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message) as e:
        TASKS[name]().load(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
