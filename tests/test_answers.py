"""Answers as models write them: what is read, against what a person or the official check says."""
import json
import random
import re
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest

from evaluation import answers
from evaluation.answers import LETTERS, read_letter, read_number, read_program, reference
from evaluation.tasks import TASKS

SHARED = Path(__file__).parents[2] / "shared"
SLOW = 3.0  # seconds of CPU for an answer of 100,000 characters


def rows(name: str) -> list[dict]:
    path = SHARED / "cases" / name
    if not path.exists():
        pytest.skip("the cases are not here")
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- letters

TEXTS = ["red", "green", "blue", "mauve"]
# The letter that a person reads, "-" for none, and the answer, its line ends as a sign.
READ = r"""
B **Answer: B**
B **Answer: (B)**
A Answer: $\mathbf{A}$
A \boxed{\text{A}}
C $\boxed{\text{(C)}}$
A option A
A Option A.
A (A)
A A)
A $A$
A a
D d
B answer: b
C (c)
B b. 4
B B. 4
B B. \(6x^2 + 4x + 6\)
B ANSWER: B
D ANSWER IS D. A is incorrect.
C The answer is C because A is dark.
A I would pick A - a safe choice.
B I would pick B — a safe choice.
- A magnet attracts iron.
- The answer is a magnet
A The answer is A.
A the answer is a
A the answer is a.
A The answer is a because a mirror reflects
B not A but B
B The answer is not A but B.
B So the correct choice is (B) gravity
D Both A and B are plausible, so D
B The answer is "B".
B The answer is 'B'.
A The answer is “A”.
A The answer is *A*.
A The answer is __A__.
A Answer：Ａ
A 答案：【A】
B Answer - B
B Answer – B
B Answer:⏎⏎B
B ### Answer⏎⏎B
B <think>The answer is A.</think>The answer is B.
- <think>The answer is A.
B The answer is A. Wait</think>B
D Answer: It is not B, the answer is D
D Answer: rules out C, leaving D
D Answer: D, not B
C Answer: I think it is C
B The answer is B. Note that A is a common distractor.
D I considered (A), but it is incorrect. Final answer: D.
D The correct answer is d.
A Answer seems to be A.
- ANSWER: None of the above
- ANSWER: Don't know
B Answer (A, B, C, or D): B
- The answer is A or B.
C Option A is incorrect. Option C is correct.
C C is the correct answer.
B B is right because A is dark.
C C, since A is dark.
C Since A is dark and B is opaque, C.
C A is dark, so C.
D A is wrong. B is wrong. C is wrong. D.
B It's B.
A I choose A.
A I'd go with A
C The correct letter is C
D My answer: D
A Final Answer: The final answer is $\boxed{A}$. I hope it is correct.
B <answer>B</answer>
B {"answer": "B"}
A The answer is choice A.
B The answer is most likely B.
C The answer would be C
A The answer must be A
B The answer isn't A. It's B.
B The answer cannot be A, so it is B.
C A) The Moon reflects.⏎B) A mirror reflects.⏎C) A flame glows.⏎Answer: C
A A. Gravity
A A
B B⏎⏎Explanation: A ball falls.
B B⏎⏎A is wrong because it is dark.
D The answer is D: a window.
- The answer is E.
B Correct answer: **B) green**
C The best answer is option (C).
C Therefore, the answer is **C**
A Thus A.
B So B
A => A
C -> C
B Answer -> B
B Answer = B
B Ans: B
B Ans. B
D I believe the right choice would be D.
A The correct option is **A. red**
A The answer is red.
B The correct answer is the green.
B green
D Mauve.
- Oranges contain vitamin-C.
- It melts at 25 °C.
A The answer is A, a red one.
B Answer: B.⏎⏎Question: Which is bright?⏎A) x⏎Answer: C
B Choice B: because it is green
- It is a c.
A The answer: A red
A A, because it glows.
B B - because it glows.
C Statement C is true.
A A is the best choice.
A I think A is correct
A I would say A
D The wrong answers are A, B and C, so D.
B Answer choices: A) red B) green. The answer is B
C Not B. C.
A The answer is A, not B.
A "A"
A 'a'
A [A]
A {A}
A A.
A A:
A A ball is thrown. The answer is (a).
A The answer is (a) red
D correct choice: d
C Answer is: (C).
B The answer to this question is B
B The answer to the question is therefore option B, green.
D So, the final answer is: **D. mauve**
C The answer is indeed C
D A is false, D is true.
C Only C makes sense.
D Hence, option D.
D Hence D is the answer.
C The answer that fits is C
C **C**
C **C** - blue
B The answer lies in B
A Let's go with option a.
D I'll select d.
B I am choosing B
B Selected: B
B \(\boxed{B}\)
D $$\boxed{D}$$
B \textbf{B}
B The answer is $\text{B}$
C The answer is <b>C</b>
D The answer is **D** (a window)
- Answer: A/B
A Answer: a) red
A Answer: A) red
A Answer: red
A The correct answer is: A) red. B is wrong.
C Eliminating A and B, we get C.
C Eliminate A. Eliminate B. Eliminate D. C remains.
- The answer is not B.
A A looks right.
B I pick B.
B Between A and B, B is better.
B Answer:B
A answer:a
B The answer is：B
B The answer is: ⏎⏎(B)
A Answer:⏎A
B The correct answer is Option: B
C Correct: C
B B (green)
B B green
B Option B green
A A red
B B is correct, A is wrong.
B Yes, B.
B I'm not sure, but B.
B I don't know. B?
B The answer is B!
C The answer is C;
C Sure! The answer is C.
A The answer is therefore **(A)**.
B Letter: B
B The letter is B
B It has to be B
A My choice is A
A My final choice: A.
A The answer can only be A.
A The only answer is A
B This matches option B.
B This corresponds to option B.
C This corresponds to C.
A This describes A.
B which is B.
B which is option (b).
B The answer is B) green, because A) is red.
B A car moves. So B.
A a) red
A A: red
A It is A
A I am confident that the answer is a, red.
B The right one is b
A (A) red
A (A) red is the answer.
A Answer is A because a car moves.
A Answer A
B answer b
D answer (d)
B Answer B because
B Answer A is wrong. Answer B is right.
C The answer is C. A only reflects light.
C The answer is C: A is too dark.
C The answer is C = A plus light.
C The answer is C - A reflects light.
B The answer is B gravity. A ball falls down.
B The correct answer is B) evaporation. A) condensation is the opposite.
C The correct option is C - A reflects light.
C The correct answer is C. D lets light through.
C The best option is C. D transmits light.
C My choice is C. B: mirror.
C The solution is C. A: the Moon.
C Option C. A reflects.
C C is correct: A reflects.
B The answer is A. Actually, B.
C The answer is A. No, it's C.
C The answer is C. Actually, A only reflects.
D The answer is A. Wait, no, the answer is D.
B Answer: A⏎⏎Correction: B
B B<|im_end|>
B B<|eot_id|><|start_header_id|>user<|end_header_id|>Why not A?
B The answer is B.</s>
B b<|endoftext|>A
B B<｜end▁of▁sentence｜>
B B⏎<end_of_turn>⏎<start_of_turn>user⏎A
B <s>A</s> B
C The answer is C.⏎⏎Q: Which is bright?⏎A: The answer is A.
C C⏎**Question:** Which is bright?⏎Answer: A
C C⏎### Human: And which is bright?⏎### Assistant: A
C C⏎User: And which is bright?⏎Assistant: A
C Sure!⏎Question: Which is bright?⏎Answer: C
C C for sure.
C C it is.
B | B |
D D (all of the above)
B [ANSWER] B [/ANSWER]
B <final_answer>B</final_answer>
C A? No. B? No. C? Yes.
- Answer: A, B
- The answer is A, B.
B It's not A, B.
A 答案为A。
B 选B
C 正解はC"""
READ = [(line[0], line[2:].replace("⏎", "\n")) for line in READ.strip().splitlines()]


def letter(text, texts=TEXTS):
    index, how = read_letter(text, texts)
    assert (index is None) == (how == "no letter")
    return "-" if index is None else LETTERS[index]


def test_letters_are_read_as_a_person_reads_them():
    assert {text: letter(text) for _, text in READ} == {text: want for want, text in READ}


def test_letters_of_the_shared_cases():
    for row in rows("arc_answers.jsonl"):
        assert letter(row["completion"]) == row["letter"], row


def test_letters_beyond_the_choices_are_none():
    for n, text in (3, "The answer is D."), (4, "(E)"), (2, "c) blue"), (4, "The answer is e."):
        assert letter(text, TEXTS[:n]) == "-"
    assert letter("The answer is E.", [*TEXTS, "grey"]) == "E"
    assert letter("B. The answer is D.", TEXTS[:3]) == "B"


def test_a_choice_is_also_read_from_its_text_and_counted_apart():
    texts = ["a mirror", "the Moon", "A magnet", "gravity"]
    for text, want in (("The answer is gravity.", "D"), ("The answer is a mirror", "A"),
                       ("Answer: A magnet", "C"), ("moon", "B"), ("Answer: **The Moon**.", "B")):
        assert read_letter(text, texts) == (LETTERS.index(want), "choice text"), text
    for text in ("The answer is not gravity.", "gravity and the Moon", "The answer is magnetism"):
        assert letter(text, texts) == "-", text
    assert letter("The answer is A magnet", ["a magnet", "a magnet", "x"]) == "A"
    assert read_letter("Answer: B gravity", ["iron", "gravity"]) == (1, "named")


WORDS = r"""A B C D E a b c d e (A) (b) A) c) D. A, b. the answer is is: Answer: option choice so
    not because and or , . ; - wrong correct I would pick red green magnet A-frame **A** oxed{B}
    it it's than / : ? right best The_answer_is_C.""".split()


def relabelled(text, order):
    """The text with every letter that stands alone replaced: A by LETTERS[order[0]] and so on."""
    def other(m):
        new = LETTERS[order[LETTERS.index(m[0].upper())]]
        return new if m[0].isupper() else new.lower()
    return re.sub(r"(?<![A-Za-z0-9<])(?<!</)[A-Ea-e](?![A-Za-z0-9])", other, text)


def test_permuting_the_letters_changes_no_score():
    r, named = random.Random(18), 0
    for i in range(6000):
        n = r.choice((3, 4, 5))
        text = " ".join(r.choice([*WORDS, "\n"]) for _ in range(r.randint(1, 12)))
        text = READ[i][1] if i < len(READ) else text.replace("_", " ")
        order = r.sample(range(n), n)
        texts = ["red", "a green", "blue", "the magnet", "grey"][:n]
        moved = [texts[order.index(i)] for i in range(n)]
        index, how = read_letter(text, texts)
        named += index is not None
        assert read_letter(relabelled(text, [*order, *range(n, 5)]), moved) == (
            None if index is None else order[index], how), (text, order)
    assert 2000 < named < 5500


def test_the_short_way_for_the_asked_form_reads_the_same(monkeypatch):
    r, texts, short = random.Random(1), [], 0
    for _ in range(1500):
        words = [r.choice([*WORDS, ".", "\n"]) for _ in range(r.randint(0, 8))]
        texts.append(" ".join([*words, r.choice((".", "\n", "")),
                               f"The answer is {r.choice('ABCDE')}{r.choice(('', '.', ' x'))}"]))
    first = [read_letter(t, TEXTS) for t in texts]
    short = sum(bool(answers.ASKED.search(t)) for t in texts)
    monkeypatch.setattr(answers, "ASKED", re.compile("(?!)"))
    assert short > 300 and [read_letter(t, TEXTS) for t in texts] == first


# ---------------------------------------------------------------- numbers

NUMBERS = [  # (what the reader shall find, in which texts)
    ("42", "#### 42", "####42", "#### $42", "#### \\$42", "#### **42**", "**#### 42**", "#### `42`",
     "####: 42", "#### = 42", "#### \\boxed{42}", "#### $\\boxed{42}$", "#### $42$", "#### (42)",
     "####\n42", "#### 42%", "#### 42.", "#### 42.00", "#### 042", "#### 42 43", "#### 42\n#### 43",
     "#### 42 apples in 7 days", "#### €42", "#### £ 42", "#### ４２", "＃＃＃＃ 42",
     "####\u200b 42", "####\u00a042\u00a0km", "#### The answer is 42", "#### N = 42",
     "#### Answer: 42",
     "#### The total is $42.", "#### The answer is 42\n\nQuestion: What is 3 + 4?",
     "#### Step one\nis easy\n#### 42", "The answer is 42.",
     "\\boxed{42} of the 50", "\\boxed{\\text{42}}", "$\\boxed{\\$42}$", "42",
     "x = 42, altogether.",
     "a range of 10-42", "a range of (10–42)", "50 = 92-42", "92 - 42", "so 42 km²", "42 m³", "$42",
     "The answer is 42.\n\nQuestion: What is 3 + 4?\nAnswer: 7",
     "<think>#### 41</think>#### 42", "41</think>42", "<thinking>41</thinking>42",
     "[THINK]41[/THINK]42", "42<|im_end|>\n<|im_start|>user\n3 + 4?", "#### 42</s>",
     "42\n\nQ: What is 3 + 4?\nA: 7", "So 42.\n\nHuman: 3 + 4?\n\nAssistant: 7",
     "42\n**Question 2:** 3 + 4?", "Sure!\nQuestion: 40 + 2?\nAnswer: 42",
     "The answer is 42.\n\nLet's check: 42 - 2 = 40. Correct.", "The answer is 42, not 41.",
     "The answer is: 42 clips in 2 months.", "Final Answer: **42**\n\nExplanation: 40 + 2.",
     "**Answer**: $42 a day for 7 days", "The answer is 42 (40 of them red).",
     "The answer is thus 42, since 84/2.", "The answer is 40 + 2 = 42. It took 1 step.",
     "<answer>42</answer> in 7 days", '{"answer": 42, "days": 7}',
     "The answer is 41. Wait, it is 42.", "The answer is 41.\n\nCorrection: 42",
     "The answer is 41.\nI forgot one, so there are 42.", "The answer is 41.\nThe answer is 42.",
     "Answer: 41 in May.\n41 + 1 = 42", "Answer: 41 in May. 41 + 1 = 42",
     "Answer: 2 times 21 is 42",
     "The answer is 40 plus 2, which is 42.", "The answer is 2 more than 40, 42",
     "The answer is 42 because 41 + 1 = 2 * 21", "The answer is 21, but twice that is 42.",
     "The answer is not 41 but 42.", "The answer is 40-42", "Answer: 41 or 42",
     "Answer: 41 in May.\n\nIn total, 42.", "#### 40 + 2 = 42", "#### 84/2 = $42 in 7 days",
     "#### 6 bags * $7 = $42", "#### 50-8=6*7=42", "#### <<6*7=42>>42", "\\boxed{6 \\times 7 = 42}",
     "\\boxed{40 + 2 = 42} of 50", "#### 42*2", "#### 42 - 3. So x = 5", "#### 42 (6 * 7 = 42)",
     "#### 1. Compute\n40 + 2\n\n#### 42", "#### 1) Eggs\n40\n#### 2) Money\n42",
     "#### 42. So it is.\n#### 5", "Rs.42", "It is 42 m^2.", "42 \\text{cm}^{2}"),
    ("-5", "#### -5", "#### −5", "#### –5", "#### - 5", "#### -$5", "#### $-5", "#### $-5$",
     "#### −$5.00", "The answer is −5.", "It is \u20115", "x=-5", "(-5)", "\\boxed{-5}",
     "fell to -5 °C"),
    ("1234", "#### 1,234", "#### 1 234", "#### 1\u2009234", "#### 1\u202f234 km",
     "It is 1\u00a0234.",
     "\\boxed{1{,}234}", "\\boxed{1\\,234}", "\\boxed{1,\\!234}", "$\\boxed{1~234}$",
     "\\(1{,}234\\)", "The answer is 1,\\!234.", "#### $1,234.00",
     "#### 1，234", "all 1,234 of them"),
    ("1234567", "#### 1,234,567", "#### 1 234 567", "#### 12,34,567", "1\u2009234\u2009567"),
    ("0.5", "#### .5", "#### 0.5", "#### 0.50 or so", "$.50"),
    (None, "", "####", "#### none", "Infinity", "<think>#### 42", "²", "one half", "<think>", "-"),
]


def test_numbers_are_read_as_a_person_reads_them():
    for want, *texts in NUMBERS:
        for text in texts:
            value, how = read_number(text)
            assert value == (want and Decimal(want)), (text, value)
            assert (value is None) == (how == "no number")


def test_a_number_says_what_it_was_read_from():
    for text, how in (("#### 1", "marked"), ("#### N = 1", "marked"), ("\\boxed{1} 2", "boxed"),
                      ("It is 1", "last number"),
                      ("The answer is 1. I am 2", "named"), ("one", "no number")):
        assert read_number(text)[1] == how


def test_numbers_of_the_shared_cases():
    task = TASKS["gsm8k"]()
    for row in rows("gsm8k_answers.jsonl"):
        score = task.score({"answer": f"so\n#### {row['reference']}"}, row["completion"])
        assert score.right == row["right"], row


def test_references_with_commas_signs_and_thin_spaces():
    for text, want in (("#### 1,450,000", 1450000), ("#### -3", -3), ("#### −3", -3),
                       ("#### 1\u2009234", 1234), ("no mark, 3", None)):
        assert reference(text) == want
    assert read_number("#### " + "9" * 10_000)[0] == Decimal("9" * 10_000)


# ---------------------------------------------------------------- programs

PROMPT = '''import math
from typing import List


def half(x):
    return x / 2


def add(x: int, y: int) -> int:
    """Add.
    >>> add(2, 3)
    5
    """
'''
TEST = """
def check(candidate):
    assert candidate(2, 3) == 5
    assert candidate(-1, 1) == 0
    assert half(4) == 2
"""
F = "def add(x: int, y: int) -> int:\n    return x + y\n"  # right
W = "def add(x, y):\n    return x - y\n"  # wrong
B = "    return x + y\n"  # the body
TAGS = ("", "python", "py", "Python", "PYTHON", "python3", "py3", 'python title="x.py"', "{python}",
        "{.python .numberLines}", "ipython", " python", "python ", "text", "code")


def py(code, tag="python", fence="```"):
    return f"{fence}{tag}\n{code}{fence}\n"


def indent(text, n=3):
    return "".join(" " * n + line for line in text.splitlines(keepends=True))


PROGRAMS = [  # (case, the answer, whether the official check passes the code in it)
    *((f"tag {t}", f"Sure!\n\n{py(F, t)}\nDone.", 1) for t in TAGS),
    ("body", B, 1),
    ("fence", py(F), 1),
    ("tilde", py(F, "python", "~~~"), 1),
    ("tilde4", py(F, "", "~~~~"), 1),
    ("4 ticks", py(F, "python", "````"), 1),
    ("nested markdown", "````markdown\nHere:\n" + py(F) + "````\nDone.", 1),
    ("CRLF", f"Sure\n\n{py(F)}\nDone".replace("\n", "\r\n"), 1),
    ("CR", f"Sure\n\n{py(F)}\nDone".replace("\n", "\r"), 1),
    ("CRLF body", B.replace("\n", "\r\n"), 1),
    ("list item", "1. Do it:\n\n" + indent(py(F)) + "\n2. Done", 1),
    ("list item same line", "1. ```python\n" + indent(F) + "   ```\n2. Done", 1),
    ("bullet", "- Code:\n" + indent(py(F), 2) + "\n- Done", 1),
    ("indented 4", "Code:\n" + indent(py(F), 4) + "\nDone", 1),
    ("code indented in fence", py(indent(F, 4)), 1),
    ("unclosed", "Sure\n```python\n" + F, 1),
    ("unclosed prose", "Sure\n```python\n" + F + "\nThis adds.\n", 1),
    ("unclosed indented", "  ```python\n" + indent(F, 2), 1),
    ("bash before", "```bash\npip install numpy\n```\n\n" + py(F), 1),
    ("text before", "```\nadd(2, 3) -> 5\n```\n" + py(F), 1),
    ("output after", py(F) + "Output:\n```\n5\n```\n", 1),
    ("usage after", py(F) + "Usage:\n" + py("print(add(2, 3))\n"), 1),
    ("usage before", "Use it so:\n" + py("result = add(2, 3)\nprint(result)\n") + py(F), 1),
    ("tests after", py(F) + py("assert add(2, 3) == 5\n"), 1),
    ("wrong tests after", py(F) + py("assert add(2, 3) == 6\n"), 1),
    ("test def after", py(F) + py("def test_add():\n    assert add(2, 3) == 5\n"), 1),
    ("draft corrected", py(W) + "Wait\n" + py(F), 1),
    ("good then wrong", py(F) + "Better:\n" + py(W), 0),
    ("good then cut off", py(F) + "Or:\n```python\ndef add(x, y):\n    retur (", 1),
    ("good then stub", py(F) + "The head was\n" +
     py("def add(x: int, y: int) -> int:\n    \"\"\"Add.\"\"\"\n"), 1),
    ("restated then solved", py(PROMPT) + py(F), 1),
    ("restated with pass", py(F) + py("def add(x, y):\n    ...\n"), 1),
    ("helper same block", py("def plus(a, b):\n" "    return a + b\n" "\n" "def add(x, y):\n"
     "    return plus(x, y)\n"), 1),
    ("helper before", py("def plus(a, b):\n    return a + b\n") +
     py("def add(x, y):\n    return plus(x, y)\n"), 1),
    ("helper after", py("def add(x, y):\n    return plus(x, y)\n") + "with\n" +
     py("def plus(a, b):\n    return a + b\n"), 1),
    ("helper chain", py("from operator import add as plus\nZERO = 0\n") +
     py("def more(a, b):\n    return plus(a, b) + ZERO\n") +
     py("def add(x, y):\n    return more(x, y)\n"), 1),
    ("import block", py("import operator\n") +
     py("def add(x, y):\n    return operator.add(x, y)\n"), 1),
    ("import block alias", py("import operator as op, sys\n") +
     py("def add(x, y):\n    return op.add(x, y)\n"), 1),
    ("import star", py("from operator import *\n") + py("def add(x, y):\n    return sub(x, -y)\n"),
     1),
    ("import and body", py("import operator\n") + py("    return operator.add(x, y)\n"), 1),
    ("helper corrected", py("def plus(a, b):\n    return a - b\n") +
     py("def plus(a, b):\n    return a + b\n") + py("def add(x, y):\n    return plus(x, y)\n"), 1),
    ("helper with input", py("n = int(input())\nprint(n)\n") + py(F), 1),
    ("prompt's helper", py("def add(x, y):\n    return int(half(2 * x) + half(2 * y))\n"), 1),
    ("prompt's import", py("def add(x: int, y: int) -> List[int]:\n"
     "    return math.floor(x + y)\n"), 1),
    ("body fence", py(B), 1),
    ("body fence stripped", py("return x + y\n"), 1),
    ("body fence two lines", py("s = x + y\nreturn s\n"), 1),
    ("body fence first line", py("s = x + y\n    return s\n"), 1),
    ("body stripped", "return x + y", 1),
    ("body stripped 2", "s = x + y\n    return s", 1),
    ("body stripped 3", "s = x + y\nreturn s\n\nThis adds.", 1),
    ("body stripped if", "if x:\n        return x + y\n    return y", 1),
    ("body stripped if 2", "if x:\n    return x + y\nreturn y", 1),
    ("body prose", B + "\nThis adds both.\n", 1),
    ("prose body", "The body is:\n" + B, 1),
    ("body wrong indent", "  return x + y\n", 0),
    ("body fence prose", B + "```\nThis adds.", 1),
    ("body fence usage", B + "```\nUsage:\n" + py("print(add(1, 2))\n"), 1),
    ("whole then stray fence", F + "```\nThis adds.", 1),
    ("body bash", "```bash\npip\n```\n" + py(B), 1),
    ("body then print", py(B) + py("print(add(2, 3))\n"), 1),
    ("body prose indented 2", B + "\nThis adds.\nIt's easy (really):\n- x\n- y\n", 1),
    ("unfenced", F, 1),
    ("unfenced prose", "Here is the function:\n" + F, 1),
    ("unfenced prose 2", "Here is the function:\n\nimport operator\n\n" + F +
     "\nThis adds. It's simple.\n", 1),
    ("unfenced Done", F + "\nDone\n", 1),
    ("unfenced draft", W + "\nWait, that is wrong. Corrected:\n\n" + F, 1),
    ("unfenced helper", "Helper first:\n" "def plus(a, b):\n" "    return a + b\n" "\n" "and then\n"
     "\n" "def add(x, y):\n" "    return plus(x, y)\n" "\n" "Done.", 1),
    ("unfenced decorated", "So:\n@staticmethod\ndef plus(a, b):\n    return a + b\n\n" + F +
     "That's all.", 1),
    ("unfenced decorator that matters", "So\ndef twice(f):\n    return lambda x, y: 2 * f(x, y)\n\n"
     "@twice\ndef add(x, y):\n    return (x + y) / 2\n\nThat's all.", 1),
    ("unfenced note", "Note: simple\n" + F, 1),
    ("future", py("from __future__ import annotations\n" + F), 1),
    ("future doc", py('"""Doc."""\nfrom __future__ import annotations\nimport sys\n' + F), 1),
    ("future multi", py("from __future__ import (\n" "    annotations,\n" "    division,\n" ")\n"
     + F), 1),
    ("future unfenced", "from __future__ import annotations\n" + F, 1),
    ("future comment", py("# sol\nfrom __future__ import annotations, division\n" + F), 1),
    ("lambda", py("add = lambda x, y: x + y\n"), 1),
    ("alias", py("def plus(x, y):\n    return x + y\n\nadd = plus\n"), 1),
    ("annotated lambda", py("from typing import Callable\n" "add: Callable = lambda x, y: x + y\n"),
     1),
    ("decorated", py("import functools\n@functools.cache\n" + F), 1),
    ("class alike", py("class Solution:\n" "    def add(self, x, y):\n" "        return x - y\n") +
     py(F), 1),
    ("class after", py(F) + py("class Calc:\n    def add(self, x, y):\n        return x - y\n"), 1),
    ("class only", py("class Solution:\n" "    def add(self, x, y):\n" "        return x + y\n"),
     0),
    ("nested", py("def outer(x, y):\n" "    def add(x, y):\n" "        return x + y\n"
     "    return add(x, y)\n"), 0),
    ("nested in body", py("    def add(a, b):\n" "        return a + b\n" "    return add(x, y)\n"),
     1),
    ("nested in body unfenced", "    def add(a, b):\n        return a + b\n    return add(x, y)\n",
     1),
    ("main guard", py(F + "\n" "if __name__ == '__main__':\n" "    print(add(int(input()), 2))\n"),
     1),
    ("main guard unfenced", F + "\n" "if __name__ == '__main__':\n"
     "    print(add(int(input()), 2))\n" "\n" "Done!", 1),
    ("thinking", "<think>\nMaybe\n" + py(W) + "</think>\n\n" + py(F), 1),
    ("thinking body", "<think>hm</think>" + B, 1),
    ("thinking unclosed", "<think>\n" + py(F), 0),
    ("thinking no open", "Maybe\n" + py(W) + "</think>\n" + py(F), 1),
    ("thinking wrong answer", "<think>\n" + py(F) + "</think>\n" + py(W), 0),
    ("docstring fence", py("def add(x, y):\n" "    \"\"\"Add.\n" "\n" "    ```python\n"
     "    add(2, 3)\n" "    ```\n" "    \"\"\"\n" "    return x + y\n"), 1),
    ("docstring inline", py("def add(x, y):\n" "    \"\"\"Add as in ```x + y``` here.\"\"\"\n"
     "    return x + y\n"), 1),
    ("inline before", "Use ```x + y``` here.\n\n" + py(F), 1),
    ("inline before 2", "Call ``` add ``` or `add`:\n" + py(F), 1),
    ("mid-line fence", "Sure: ```python\n" + F + "```\nDone", 1),
    ("tabs", py("def add(x, y):\n\treturn x + y\n"), 1),
    ("tab body fence", py("\treturn x + y\n"), 0),
    ("console", py(">>> def add(x, y):\n" "...     return x + y\n" "...\n" ">>> add(2, 3)\n" "5\n",
     "pycon"), 1),
    ("async", py("async def add(x, y):\n    return x + y\n"), 0),
    ("other name", py("def plus(x, y):\n    return x + y\n"), 0),
    ("empty", "", 0),
    ("prose only", "I cannot do that.", 0),
    ("empty fence", "```python\n```", 0),
    ("wrong", py(W), 0),
    ("syntax", py("def add(x, y):\n    return x +\n"), 0),
    ("body syntax", "    return x +\n", 0),
    ("continuation with later def", B + "\n\ndef other():\n    return 1\n", 1),
    ("continuation later wrong add", B + "\n\n" + W, 0),
    ("continuation cut off", B + "\n\ndef other(x):\n    retur (", 1),
    ("body helper after", "    return plus(x, y)\n\n\ndef plus(a, b):\n    return a + b\n", 1),
    ("class body", "class add:\n    pass\n", 0),
    ("two langs", "```js\nfunction add(x, y) { return x + y }\n```\n" + py(F), 1),
    ("blocks in blockquote", "> quote\n\n" + py(F), 1),
    ("print in block", py(F + "\nprint(add(2, 3))\n"), 1),
    ("failing assert in block", py(F + "\nassert add(2, 3) == 6\n"), 0),
    ("type hints from typing missing", py("from typing import Optional\n") +
     py("def add(x: Optional[int], y) -> Optional[int]:\n" "    return x + y\n"), 1),
    ("two unclosed", "```python\n" + W + "```python\n" + F + "```\n", 1),
    ("stuck fence", "```python\ndef add(x, y): return x + y```", 1),
    ("heading", "# Solution\n\n## Code\n\n" + py(F) + "\n## Notes\n", 1),
    ("json wrapper no", "{\"code\": \"x\"}\n" + py(F), 1),
    ("prose with def", "We def add numbers.\n" + py(F), 1),
    ("zero fence text", "```\n" + F + "```", 1),
    ("unclosed after closed", "```text\nx\n```\n```python\n" + F, 1),
    ("redefine prompt", py(PROMPT + B), 1),
    ("prompt echo unfenced", PROMPT + B, 1),
    ("prompt echo prose", "Sure:\n\n" + PROMPT + B + "\nDone.", 1),
    ("form feed", py("def add(x, y):\n    return x + y\n\f\n"), 1),
    ("global const", py("K = 0\n") + py("def add(x, y):\n    return x + y + K\n"), 1),
    ("helper decorated",
     py("import functools\n\n@functools.cache\ndef plus(a, b):\n    return a + b\n") +
     py("def add(x, y):\n    plus.cache_clear()\n    return plus(x, y)\n"), 1),
    *((f"end {n} {end}", text + end, 1) for end in (
        "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
        "\n<end_of_turn>", "<｜end▁of▁sentence｜>",
        "<|im_end|>\n<|im_start|>user\nNow wrong\n<|im_start|>assistant\n" + py(W))
      for n, text in enumerate(s.rstrip() for s in (B, F, py(F), "```python\n" + F))),
    ("end in a string", py("END = '</s>'\n" + F), 1),
    ("thinking in a string", py("OPEN = '<think>'\n" + F), 1),
    *((f"next {n} {ask}", f"{text}\n\n{ask} Now wrong.\n\nAnswer:\n{py(W)}", 1)
      for ask in ("User:", "Human:", "Question:", "Q:", "**Question 2:**", "### Human:")
      for n, text in enumerate((B, F, py(F)))),
    ("next before", "Sure!\nQuestion: add two numbers.\n" + py(F), 1),
    ("prompt and body", py(PROMPT) + "Body:\n" + py(B), 1),
    ("prompt and body stripped", py(PROMPT) + "Body:\n" + py("return x + y\n"), 1),
    ("head and body", py("def add(x: int, y: int) -> int:\n") + "and\n" + py(B), 1),
    ("head, comment and body", py("def add(x, y):\n    # TODO\n") + "and\n" + py(B), 1),
    ("import, head and body", py("import operator\n") + py("def add(x, y):\n    ...\n")
     + py("    return operator.add(x, y)\n"), 1),
    ("head with an import and body",
     py("def add(x, y):\n    import math\n    'Add.'\n") + py(B), 1),
    ("next in a docstring", py('def add(x, y):\n    """Add.\nQuestion: how?\n    """\n' + B), 1),
    ("nested in body, other",
     "    def add(a, b):\n        return a - b\n    return add(x, -y)\n", 1),
    ("head alone", py("def add(x: int, y: int) -> int:\n"), 0),
    ("usage with the name", py(F) + py("add = add(1, 2)\n"), 1),
    ("mock after", py(F) + py("add = Mock()\nadd.return_value = 3\n"), 1),
    ("cached later", py("import functools\n") + py(W) + py(F + "\nadd = functools.cache(add)\n"),
     1),
    ("result after", py(F) + py("result = add(1, 2)\n"), 1),
    ("lambda after", py(W) + "Better:\n" + py("add = lambda x, y: x + y\n"), 1),
    ("class called", py("class Adder:\n    def __call__(self, x, y):\n        return x + y\n\n"
                        "add = Adder()\n"), 1),
    ("shown as wrong", py(F) + py("# Wrong version:\n" + W), 1),
    ("shown as wrong only", py("# wrong\n" + W), 0),
    ("imported", py("from operator import add\n"), 1),
    ("imported as", py("from operator import add as add\n"), 1),
    ("imported wrongly", py("from operator import sub as add\n"), 0),
    ("imported if there", py("try:\n    from operator import add\nexcept ImportError:\n"
                             "    def add(x, y):\n        return x + y\n"), 1),
    ("assigned with others", py("add, sub = (lambda x, y: x + y), None\n"), 1),
    ("import in a test after", py(B) + py("from solution import add\nprint(add(1, 2))\n"), 1),
    ("import in a test after 2", py(F) + py("from solution import add\nprint(add(1, 2))\n"), 1),
    ("Markdown's code", "Here:\n\n" + indent(PROMPT + B, 4) + "\nDone.", 1),
    ("Markdown's code alone", indent(F, 4), 1),
    ("Markdown's code in tabs", "Here:\n\n\tdef add(x, y):\n\t\treturn x + y\n\nDone.", 1),
    ("Markdown's code, nested", "Here:\n\ndef outer():\n" + indent(F, 4) + "\nDone.", 0),
    ("quoted", "> Here:\n> " + py(F).replace("\n", "\n> "), 1),
    ("quoted unfenced", "> " + F.replace("\n", "\n> "), 1),
    ("HTML", "<p>Here:</p>\n<pre><code class='python'>" + F + "</code></pre>\nDone.", 1),
    ("begin and done", "[BEGIN]\n" + F + "[DONE]\n", 1),
    ("calls itself", "    if y == 0:\n        return x\n    return add(x + (y > 0) - (y < 0),"
                     " y - (y > 0) + (y < 0))\n", 1),
    ("const recursion", py("K = add(1, 1)\n") + py(F), 1),
]


OFFICIAL = """
import json, sys
def passes(program, test, name):
    try:
        exec(compile(program + "\\n" + test + f"\\ncheck({name})\\n", "x", "exec"), {})
        return True
    except BaseException:
        return False
result = [passes(*case) for case in json.load(sys.stdin)]
sys.stdout = sys.__stdout__
print("\\n" + json.dumps(result))
"""


def official(cases) -> list[bool]:
    """What the official check says of (program, test, entry point), in a process of its own."""
    run = subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", OFFICIAL], text=True,
                         input=json.dumps(cases), capture_output=True, timeout=100)
    return json.loads(run.stdout.splitlines()[-1])


def test_programs_pass_as_the_official_check_has_it():
    got = official([(read_program(PROMPT, "add", text), TEST, "add") for _, text, _ in PROGRAMS])
    names = [name for name, *_ in PROGRAMS]
    assert dict(zip(names, got)) == {name: bool(right) for name, _, right in PROGRAMS}
    assert len(set(names)) == len(names) and 0.05 < got.count(False) / len(got) < 0.3


@pytest.mark.slow
def test_programs_pass_in_the_sandbox_too():
    task = TASKS["humaneval"](allow_code_execution=True)
    example = {"prompt": PROMPT, "entry_point": "add", "test": TEST}
    for name, text, right in PROGRAMS[::3]:
        assert task.score(example, text).right == right, name


def test_programs_of_the_shared_cases():
    head, *cases = rows("humaneval_answers.jsonl")
    p = head["problem"]
    got = official([(read_program(p["prompt"], p["entry_point"], c["completion"]), p["test"],
                     p["entry_point"]) for c in cases])
    assert {c["case"]: g for c, g in zip(cases, got)} == {c["case"]: c["right"] for c in cases}


STYLES = {
    "body": lambda p, b: b, "fence": lambda p, b: f"Sure!\n\n{py(p + b)}\nDone.",
    "whole": lambda p, b: p + b, "prose": lambda p, b: f"Here it is:\n\n{p}{b}\nThat's all.",
    "body fence": lambda p, b: py(b), "stripped": lambda p, b: b.strip(),
    "list": lambda p, b: "1. Do:\n" + indent(py(p + b, "py", "~~~")),
    "CRLF": lambda p, b: py(p + b).replace("\n", "\r\n"),
    "draft": lambda p, b: py(p + "    return 1\n") + "No:\n" + py(p + b) + py("print(1)\n", "sh"),
    "unclosed": lambda p, b: f"<think>{py(p)}</think>\n```python\n{p}{b}\nThat's all.",
}


def humaneval():
    path = SHARED / "data" / "HumanEval.jsonl.gz"
    if not path.exists():
        pytest.skip("HumanEval is not here")
    return TASKS["humaneval"](allow_code_execution=True).load(path)


def test_all_solutions_of_humaneval_are_found_in_every_style():
    for e in humaneval():
        for name, style in STYLES.items():
            program = read_program(e["prompt"], e["entry_point"],
                                   style(e["prompt"], e["canonical_solution"]))
            last = [f for f in answers.tree(program).body if isinstance(f, answers.FUNCTION)
                    and f.name == e["entry_point"]][-1]
            want = answers.tree(e["prompt"] + e["canonical_solution"]).body[-1]
            assert answers.ast.dump(last) == answers.ast.dump(want), (e["id"], name)


def test_all_solutions_of_humaneval_pass_in_every_style():
    examples, names = humaneval(), list(STYLES)
    cases = [(read_program(e["prompt"], e["entry_point"], STYLES[names[i % len(names)]](
        e["prompt"], e["canonical_solution"])), e["test"], e["entry_point"])
        for i, e in enumerate(examples)]
    assert all(official(cases))


# ---------------------------------------------------------------- any text

PIECES = ("#### ", "1", "-", "−", ",", ".", "$", " ", "\n", "\r", "```", "~~~", "```python\n",
"def ",
          "add", "(", "):", "return x", "    ", "\t", "@", "answer", " is ", "A", "b", "(C)", "or",
          "\\boxed{", "}", "\\", "<think>", "</think>", "\x00", "\ud800", "\u2028", "٣", "²", "Ａ",
          "ﷺ",
          "\"", "'", "\"\"\"", "from __future__ import annotations", ">>> ", "lambda", "=", "e",
          "😀")


def test_any_text_is_scored():
    r = random.Random(7)
    tasks = {name: TASKS[name](allow_code_execution=True) for name in ("gsm8k", "arc")}
    arc = {"question": {"choices": [{"label": n, "text": t} for n, t in zip("1234", TEXTS)]},
           "answerKey": "2"}
    for i in range(3000):
        text = "".join(chr(r.randrange(0x110000)) if i % 3 == 0 else r.choice(PIECES)
                       for _ in range(r.randint(0, 40)))
        assert type(tasks["gsm8k"].score({"answer": "#### 42"}, text).right) is bool
        assert type(tasks["arc"].score(arc, text).right) is bool
        assert isinstance(read_program(PROMPT, "add", text), str)


@pytest.mark.parametrize("deep", [
    lambda n: "1" + "+1" * n, lambda n: "-" * n + "1", lambda n: "a" + ".b" * n,
    lambda n: "f" + "()" * n, lambda n: "1 if 0 else " * n + "1", lambda n: "(" * n + ")" * n])
def test_code_nested_deep_is_read_or_left(deep):
    for n in 100, 500, 2900, 50_000:
        for text in (py(f"q = {deep(n)}\n") + py("def add(x, y):\n    return q\n"),
                     f"q = {deep(n)}\n{F}",
                     B + f"\n\nq = {deep(n)}\n", py("return " + deep(n) + "\n")):
            assert "add" in read_program(PROMPT, "add", text)


@pytest.mark.slow
def test_long_texts_take_no_longer_than_they_should():
    units = ("#### ", "#", "1,", "1,11,", "1 111 ", "$", "\\boxed{", "\\text{", "A ", "A, ",
    "A or B ",
             "answer ", "answer is ", "is the ", "A not ", "(A) ", "so A ", "A\n", " ", "\n", "`",
             "` x", "```\n", "```python\n", "````\n```\n", "def add(x):\n    return x\n",
             "Prose.\n",
             "@x\n", "(", "-", "lambda:", "x if y else ", "return x\n", "if x:\n", "\"\"\"",
             "\ufdfa",
             "<think>", "```\nz = q\n```\n", "\nQuestion:")
    for unit in units:
        for before in ("", "    return 1\n",
        "```\na = b\n```\n```python\ndef add(): return z\n```\n"):
            text = before + unit * (100_000 // len(unit))
            for read in (read_number, lambda t: read_letter(t, TEXTS),
                         lambda t: read_program(PROMPT, "add", t)):
                start = time.process_time()
                read(text)
                assert time.process_time() - start < SLOW, (unit, before)


def test_the_short_way_for_a_marked_number_reads_the_same():
    r, short = random.Random(5), 0
    parts = ["#### 18", "####-1,234", "#### 5.", "18", "\n", " ", "Q: what?\n", "\nQ: 2+2?\n",
             "<<9*2=18>>", "<think>", "</think>", "[THINK]", "[/THINK]", "</s>", "<|im_end|>",
             "a:", "#### 1. Then\n", "answer", "−", "#### 9*2 = 18", "\nUser:"]
    for _ in range(20_000):
        text = "".join(r.choices(parts, k=r.randrange(1, 7)))
        found = answers.read_number(text)
        assert found == answers.any_number(text), text
        short += answers.FINAL.search(text) is not None
    assert short > 1000
