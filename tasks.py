"""The benchmarks of eval.py, one small class each: how a problem is asked, where an answer ends,
and whether it is right.

A task has `load(path, limit)`, which gives examples (dicts, each with a unique "id" and a
"domain"), `prompt(example)` for base checkpoints (with worked examples of our own), `chat(example)`
for checkpoints with a chat template, and `score(example, completion)`, which says what the answer
was read from too, so that fallbacks can be counted apart. Files are those that the benchmarks'
authors publish, also gzipped. Answers are compared as texts and numbers; only HumanEval runs
anything, in sandbox.py.
"""
import gzip
import json
import re
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import NamedTuple

from cli import UserError
from demo.check import is_right
from sandbox import run_python


class Score(NamedTuple):
    right: bool
    how: str  # what the answer was read from, or how the check ended


def read_lines(path: Path) -> list[tuple[str, dict]]:
    """("file, line N", object) for each line of a JSON Lines file; raises UserError naming the
    line.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: "
                        f"{getattr(e, 'strerror', None) or 'it is not text, nor whole gzipped text'}") from None
    lines = []
    # not splitlines: a JSON string may hold other line ends
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append((f"{path}, line {i}", json.loads(line)))
            except ValueError:
                raise UserError(f"{path}, line {i}: not JSON") from None
            if not isinstance(lines[-1][1], dict):
                raise UserError(f"{path}, line {i}: not a JSON object")
    if not lines:
        raise UserError(f"{path} holds no examples")
    return lines


class Task:
    """What the benchmarks share. `fields`: (path of keys, type) that each line must have."""
    name, fields, stop, max_new_tokens = "", (), (), 512

    def __init__(self, allow_code_execution=False):
        pass

    def load(self, path, limit: int | None = None) -> list[dict]:
        """The examples, the first `limit` of them; raises UserError for a file that is not this
        benchmark's.
        """
        lines = read_lines(path)
        others = [task.name for task in TASKS.values() if task is not type(self)
                  and not missing(task, lines[0][1])]
        if missing(type(self), lines[0][1]) and others:
            raise UserError(f"{path} is a file of {others[0]}, not of {self.name}; give --task "
                            f"{others[0]} or another file")
        for where, line in lines:
            if what := missing(type(self), line):
                raise UserError(f"{where}: {what} is missing or not what {self.name} has there")
        examples = [line | {"id": self.id(i, line), "domain": self.domain(line)} for i,
                    (_, line) in enumerate(lines)]
        counts, kept = {}, []
        for e in examples:
            counts[e["domain"]] = counts.get(e["domain"], 0) + 1
            if limit is None or counts[e["domain"]] <= limit:
                kept.append(e)
        return kept

    def id(self, i: int, line: dict) -> str:
        return f"{self.name}/{i}"

    def domain(self, line: dict) -> str:
        return self.name


def missing(task, line: dict) -> str | None:
    """The first field of `task` that a line has not, in words, or None."""
    for path, kind in task.fields:
        value = line
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or value == "" or value == []:
            return repr(path)
    return None


# ---------------------------------------------------------------- GSM8K

NUMBER = r"-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\$?\.\d+"


def number(text: str) -> Decimal | None:
    """The value of a number in writing: signs of money and thousands are dropped, 18, 18.0 and $18
    are the same.
    """
    try:
        return Decimal(re.sub(r"[\s,$]", "", text))
    except InvalidOperation:
        return None


class Gsm8k(Task):
    """Grade-school maths (Cobbe et al., arXiv 2110.14168): right if the number after `#### ` is the
    reference's.
    """
    name, fields, stop = "gsm8k", (("question", str), ("answer", str)), ("\nQuestion:", "\n\n\n")
    EXAMPLES = (
        ("A baker fills 6 trays with 8 rolls each and sells 30 of the rolls before noon. How many "
         "rolls are left?",
         "6 trays of 8 rolls are 6 * 8 = 48 rolls.\nAfter selling 30 there are 48 - 30 = 18 "
         "left.\n#### 18"),
        ("Nina is 4 years older than her brother, who is half as old as their cousin. The cousin "
         "is 22. How old is Nina?",
         "The brother is 22 / 2 = 11 years old.\nNina is 11 + 4 = 15 years old.\n#### 15"),
        ("A bus ticket costs $3 and children pay half. What do 2 adults and 4 children pay "
         "together?",
         "The adults pay 2 * 3 = 6 dollars.\nA child pays 3 / 2 = 1.5 dollars, so the children "
         "pay 4 * 1.5 = 6 dollars.\nTogether that is 6 + 6 = 12 dollars.\n#### 12"),
        ("Paul reads 20 pages on Monday and on each of the next 3 days 5 pages more than the day "
         "before. How many pages does he read in the 4 days?",
         "On Tuesday he reads 20 + 5 = 25 pages, on Wednesday 25 + 5 = 30 and on Thursday 30 + 5 "
         "= 35.\nIn all he reads 20 + 25 + 30 + 35 = 110 pages.\n#### 110"),
    )

    def load(self, path, limit=None):
        examples = super().load(path, limit)
        for e in examples:
            if not re.search(rf"####\s*({NUMBER})", e["answer"]):
                raise UserError(f"{path}: the answer of {e['id']} does not end in #### and a "
                                "number")
        return examples

    def prompt(self, example) -> str:
        return "".join(f"Question: {q}\nAnswer: {a}\n\n" for q,
                       a in self.EXAMPLES) + f"Question: {example['question']}\nAnswer:"

    def chat(self, example) -> str:
        return f"{example['question']}\n\nSolve this step by step. End with a line of the form\n#### N\nwhere N is the answer as a number alone."

    def score(self, example, completion: str) -> Score:
        """The first number marked with ####, as in the official extraction; without one, the last
        number of all.
        """
        want = number(re.search(rf"####\s*({NUMBER})", example["answer"])[1])
        if marked := re.search(rf"####\s*({NUMBER})", completion):
            return Score(number(marked[1]) == want, "marked")
        found = re.findall(NUMBER, completion)
        return Score(bool(found) and number(found[-1]) == want, "last number" if found
                     else "no number")


# ---------------------------------------------------------------- HumanEval

class HumanEval(Task):
    """Python functions (Chen et al., arXiv 2107.03374): right if the file's own tests pass. pass@1,
    for decoding is greedy.
    """
    name, fields = "humaneval", (("task_id", str), ("prompt", str), ("entry_point", str),
                                 ("test", str))
    stop = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
    TIMEOUT = 10.0  # seconds

    def __init__(self, allow_code_execution=False):
        self.allowed = allow_code_execution

    def load(self, path, limit=None):
        if not self.allowed:
            raise UserError("humaneval runs what the models write: read what sandbox.py protects "
                            "from, then give --allow_code_execution")
        return super().load(path, limit)

    def id(self, i, line):
        return line["task_id"]

    def prompt(self, example) -> str:
        return example["prompt"]

    def chat(self, example) -> str:
        return f"Complete this Python function. Answer with the whole function, imports included, in one code block.\n\n```python\n{example['prompt'].strip()}\n```"

    def score(self, example, completion: str) -> Score:
        if not self.allowed:
            raise UserError("humaneval needs --allow_code_execution")
        outcome = run_python(self.program(example, completion), example["test"],
                             example["entry_point"], self.TIMEOUT, given=example["prompt"])
        return Score(outcome.status == "passed", outcome.status)

    def program(self, example, completion: str) -> str:
        """The code to run: a code block that defines the function as it is, after the prompt's
        imports; anything else continues the prompt.
        """
        blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", completion,
                            re.DOTALL | re.IGNORECASE)
        whole = next((b for b in [*blocks, completion]
                      if re.search(rf"^def {re.escape(example['entry_point'])}\b", b,
                                   re.MULTILINE)), None)
        if whole is not None:
            return re.split(rf"^def {re.escape(example['entry_point'])}\b", example["prompt"],
                            maxsplit=1, flags=re.MULTILINE)[0] + whole
        return example["prompt"] + (blocks[0] if blocks else completion)


# ---------------------------------------------------------------- ARC

class Arc(Task):
    """ARC-Challenge (Clark et al., arXiv 1803.05457): multiple choice.

    Some questions number their choices; they get letters here.
    """
    name, fields, stop, max_new_tokens = "arc", (("question.stem", str), ("question.choices", list),
                                                 ("answerKey", str)), ("\nQuestion:", "\n\n"), 384
    LETTERS = "ABCDE"
    EXAMPLES = (
        ("Which of these is a source of light?",
         ("the Moon", "a mirror", "a candle flame", "a window"), "A candle flame gives off its "
         "own light; the others only "
         "reflect it or let it through. The answer is C."),
        ("A ball is thrown straight up. What makes it come down again?",
         ("gravity", "friction", "magnetism", "sound"),
         "The Earth's gravity pulls the ball back. The answer is A."),
        ("Which change is reversible?", ("burning wood", "baking bread", "rusting iron",
                                         "melting ice"), "Melted ice can be frozen again; the "
         "others make new "
         "substances. The answer is D."),
    )

    def load(self, path, limit=None):
        examples = super().load(path, limit)
        for e in examples:
            labels = [c.get("label") for c in e["question"]["choices"] if isinstance(c, dict)
                      and isinstance(c.get("text"), str)]
            if not 2 <= len(labels) <= len(self.LETTERS) or e["answerKey"] not in labels:
                raise UserError(f"{path}: the choices of {e['id']} are not as ARC has them, or "
                                "its answerKey is none of their labels")
        return examples

    def id(self, i, line):
        return str(line.get("id", f"arc/{i}"))

    def ask(self, stem: str, texts) -> str:
        return f"{stem}\n" + "\n".join(f"{letter}) {text}" for letter,
                                       text in zip(self.LETTERS, texts))

    def asked(self, example) -> str:
        return self.ask(example["question"]["stem"],
                        [c["text"] for c in example["question"]["choices"]])

    def prompt(self, example) -> str:
        return "".join(f"Question: {self.ask(q, texts)}\nAnswer: {a}\n\n" for q, texts,
                       a in self.EXAMPLES) + f"Question: {self.asked(example)}\nAnswer:"

    def chat(self, example) -> str:
        return f"{self.asked(example)}\n\nExplain in a sentence or two, then end with a line of the form\nThe answer is X.\nwhere X is the letter."

    def score(self, example, completion: str) -> Score:
        """The letter that the answer names last; without the words, one that stands alone as a
        choice does, then the only one there is.
        """
        letters = self.LETTERS[:len(example["question"]["choices"])]
        want = letters[[c["label"] for c in example["question"]["choices"]].index(
            example["answerKey"])]
        for how, pattern in (("named",
                              rf"(?i:answer(?:\s+is)?|choice(?:\s+is)?)\s*:?\s*[\"'*({{]*([{letters}])(?![\w'])"),
                             ("as a choice",
                              rf"(?:^|\n)\s*[\"'*(]*([{letters}])(?:[).:*]|\s*$)|\(([{letters}])\)"),
                             # not A: it is a word
                             ("a letter", rf"(?<![\w'])([B-{letters[-1]}])(?![\w'])")):
            if found := re.findall(pattern, completion):
                last = found[-1] if isinstance(found[-1], str) else "".join(found[-1])
                return Score(last == want, how)
        return Score(False, "no letter")


# ---------------------------------------------------------------- the demo

class Demo(Task):
    """The demo's three tasks (demo/corpus.py), each a domain; checked exactly, code by the demo's
    own interpreter and never by Python.
    """
    name, fields, max_new_tokens = "demo", (("task", str), ("prompt", str),
                                            ("answer", (int, str, list))), 220

    def id(self, i, line):
        return f"{line['task']}/{i}"

    def domain(self, line):
        return line["task"]

    def prompt(self, example) -> str:
        return example["prompt"]

    def chat(self, example) -> str:
        return example["prompt"]

    def score(self, example, completion: str) -> Score:
        return Score(is_right(example["task"], example["prompt"], completion, example["answer"]),
                     "exact")


TASKS = {task.name: task for task in (Gsm8k, HumanEval, Arc, Demo)}
