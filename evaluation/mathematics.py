"""MATH-500 and AIME 2024: problems whose answer a model works out and puts into a box."""
import functools
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from common import UserError, read_text, refuse
from evaluation.answers import answered, read_number
from evaluation.task import Score, Task

SHOTS = Path(__file__).with_name("minerva_shots.txt")
LIMIT = 20  # seconds for an answer: above math-verify's own 5 for each of its three steps
BOX = "Please reason step by step, and put your final answer within \\boxed{}."


class Math500(Task):
    """500 problems of MATH (Hendrycks et al., arXiv 2103.03874; the split of 2305.20050).

    Right if math-verify finds the answer equal to the solution's, as in the harness's minerva_math.
    Base prompts have Minerva's four examples (arXiv 2206.14858), chat prompts the request that
    DeepSeek-R1's and Qwen2.5-Math's authors recommend.
    """
    name, stop = "math500", ("Problem:",)
    fields = ("problem", str), ("solution", str), ("answer", str)
    max_new_tokens = 1024  # the harness has no limit of its own here

    def check(self):
        refuse((not find_spec("math_verify"), "math500 is graded by math-verify, which is missing; "
                "pip install -r requirements-eval.txt"))

    def prompt(self, example) -> str:
        return f"{read_text(SHOTS)}Problem:\n{example['problem']}\n\nSolution:"

    def chat(self, example) -> str:
        return f"{example['problem']}\n{BOX}"

    def score(self, example, completion: str) -> Score:
        return Score(*grade(example["solution"], answered(completion)))


def grade(solution: str, text: str) -> tuple[bool, str]:
    """(whether the text's answer equals the solution's, where it stood or how the check ended)."""
    process = grader()
    try:
        process.stdin.write(json.dumps([solution, text]) + "\n")
        process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = ""
    if not reply:
        grader.cache_clear()
        process.communicate()
        return False, "timed out" if process.returncode == 1 else "the grader failed"
    return tuple(json.loads(reply))


@functools.cache
def grader() -> subprocess.Popen:
    """math_grader.py, ready to read; it ends with its standard input, so with this process."""
    command = sys.executable, Path(__file__).with_name("math_grader.py"), str(LIMIT)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    if process.stdout.readline() != "ready\n":
        raise UserError("math-verify does not start; python -c 'import math_verify' shows why")
    return process


# ---------------------------------------------------------------- AIME

class Aime24(Task):
    """AIME 2024: 30 problems whose answers are integers from 0 to 999.

    Right if the integer in the last box, or without a box the one named as the answer or the last
    number, is the reference's: 070 and 70.0 are 70. The harness compares texts, after a
    normalization, and without a box wants the answer alone.
    """
    name, stop, max_new_tokens = "aime24", ("Question:",), 32768
    fields = ("problem", str), ("answer", (str, int))

    def problem(self, example):
        if not re.fullmatch(r"\d{1,3}", str(example["answer"])):
            return f"the answer of {example['id']} is not an integer from 0 to 999"

    def prompt(self, example) -> str:
        return f"Question: {example['problem'].removesuffix(BOX).rstrip()}\nAnswer:"

    def chat(self, example) -> str:
        return f"{example['problem'].removesuffix(BOX).rstrip()}\n{BOX}"

    def score(self, example, completion: str) -> Score:
        value, how = read_integer(completion)
        return Score(value is not None and value == int(example["answer"]), how)


# Without a comma, which between numbers below 1000 divides a list: 2, 3.
INTEGER = re.compile(r"(?:[^=]*=)*\+?(-?\d{1,10})(?:\.0*)?")
WORDS = re.compile(r"\\(?:text|mbox|mathrm)\s*\{[^{}]*[a-zA-Z][^{}]*\}")
DRESS = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf)\b|\\[!,;: ]|\^?\{?\\circ\}?|\\?\$|[\s{}]")


def read_integer(text: str) -> tuple[int | None, str]:
    """(value, what it was read from): the last box, else what read_number finds."""
    if (box := last_box(answered(text))) is not None:
        m = INTEGER.fullmatch(DRESS.sub("", WORDS.sub("", box)))
        return m and int(m[1]), "boxed"
    return read_number(text.replace("####", ""))  # which is a heading here


def last_box(text: str) -> str | None:
    """What the last \\boxed{...} that has an end holds; None without one."""
    found, opened = (-1, None), []  # (where it begins, its content); of each open brace: a box's?
    for m in re.finditer(r"\\boxed\s*\{|[{}]", text):
        if m[0] != "}":
            opened.append(m.end() if len(m[0]) > 1 else None)
        elif opened and (begin := opened.pop()) is not None:
            found = max(found, (begin, text[begin:m.start()]))
    return found[1]
