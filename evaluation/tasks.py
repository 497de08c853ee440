"""The benchmarks of eval.py: how a problem is asked, where an answer ends, whether it is right.

A task has `load(path, limit)`, which gives examples (dicts, each with a unique "id" and a
"domain"), `prompt(example)` for base checkpoints, `chat(example)` for checkpoints with a chat
template, and `score(example, completion)`, which also says what the answer was read from, so that
fallbacks can be counted apart. Prompts are lm-evaluation-harness's (its name in the class's
docstring) but for the few-shot examples of GSM8K and ARC, which are our own. Files are those that
the benchmarks' authors publish, also gzipped. Only HumanEval runs code, in sandbox.py.
"""
from common import UserError
from demo.check import is_right
from evaluation.answers import (
    LETTERS,
    head_of,
    read_letter,
    read_number,
    read_program,
    reference,
)
from evaluation.ifeval import IFEval
from evaluation.mathematics import Aime24, Math500
from evaluation.mmlu import Mmlu
from evaluation.mt_bench import MTBench
from evaluation.sandbox import run_python
from evaluation.task import TASKS, Score, Task, missing

__all__ = "TASKS", "Score", "Task", "missing"

# ---------------------------------------------------------------- GSM8K

class Gsm8k(Task):
    """Grade-school maths (Cobbe et al., arXiv 2110.14168).

    Prompts as the harness's gsm8k, for chat as its gsm8k_cot_llama without examples. Right if the
    number after `#### `, or else the one named as the answer, is the reference's.
    """
    name, fields, stop = "gsm8k", (("question", str), ("answer", str)), ("\nQuestion:", "\n\n\n")
    EXAMPLES = (
        ("A baker fills 6 trays with 8 rolls each and sells 30 of the rolls before noon. How many "
         "rolls are left?",
         "6 trays of 8 rolls are 6 * 8 = 48 rolls.\n"
         "After selling 30 there are 48 - 30 = 18 left.\n"
         "#### 18"),
        ("Nina is 4 years older than her brother, who is half as old as their cousin. The cousin "
         "is 22. How old is Nina?",
         "The brother is 22 / 2 = 11 years old.\n"
         "Nina is 11 + 4 = 15 years old.\n"
         "#### 15"),
        ("A bus ticket costs $3 and children pay half. What do 2 adults and 4 children pay "
         "together?",
         "The adults pay 2 * 3 = 6 dollars.\n"
         "A child pays 3 / 2 = 1.5 dollars, so the children pay 4 * 1.5 = 6 dollars.\n"
         "Together that is 6 + 6 = 12 dollars.\n"
         "#### 12"),
        ("Paul reads 20 pages on Monday and on each of the next 3 days 5 pages more than the day "
         "before. How many pages does he read in the 4 days?",
         "On Tuesday he reads 20 + 5 = 25 pages, on Wednesday 25 + 5 = 30 and on Thursday "
         "30 + 5 = 35.\n"
         "In all he reads 20 + 25 + 30 + 35 = 110 pages.\n"
         "#### 110"),
    )

    def problem(self, example):
        if reference(example["answer"]) is None:
            return f"the answer of {example['id']} does not end in #### and a number"

    def prompt(self, example) -> str:
        shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in self.EXAMPLES)
        return f"{shots}Question: {example['question']}\nAnswer:"

    def chat(self, example) -> str:
        return ("Given the following problem, reason and give a final answer to the problem.\n"
                f"Problem: {example['question']}\nYour response should end with \"The final answer "
                "is [answer]\" where [answer] is the response to the problem.\n")

    def score(self, example, completion: str) -> Score:
        value, how = read_number(completion)
        return Score(value is not None and value == reference(example["answer"]), how)


# ---------------------------------------------------------------- HumanEval

class HumanEval(Task):
    """Python functions (Chen et al., arXiv 2107.03374).

    Prompts as the harness's humaneval, for chat as its humaneval_instruct without the beginning of
    the answer. Right if the file's own tests pass.
    """
    name = "humaneval"
    fields = ("task_id", str), ("prompt", str), ("entry_point", str), ("test", str)
    stop, max_new_tokens = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\n```"), 1024
    TIMEOUT = 10.0  # seconds

    def __init__(self, allow_code_execution=False):
        super().__init__()
        self.allowed = allow_code_execution

    def load(self, path, limit=None):
        if not self.allowed:
            raise UserError("humaneval runs what the models write: read what evaluation/sandbox.py "
                            "protects from, then give --allow_code_execution")
        return super().load(path, limit)

    def id(self, i, line):
        return line["task_id"]

    def problem(self, example):
        if head_of(example["prompt"], example["entry_point"]) == example["prompt"]:
            return f"the prompt of {example['id']} does not define its entry_point"
        if "def check(" not in example["test"]:
            return f"the test of {example['id']} does not define check"

    def prompt(self, example) -> str:
        return example["prompt"]

    def chat(self, example) -> str:
        return ("Write a solution to the following problem and make sure that it passes the "
                f"tests:\n```python\n{example['prompt']}\n```\n")

    def score(self, example, completion: str) -> Score:
        if not self.allowed:
            raise UserError("humaneval needs --allow_code_execution")
        outcome = run_python(self.program(example, completion), example["test"],
                             example["entry_point"], self.TIMEOUT, given=example["prompt"])
        return Score(outcome.status == "passed", outcome.status)

    def program(self, example, completion: str) -> str:
        """The code to run."""
        return read_program(example["prompt"], example["entry_point"], completion)


# ---------------------------------------------------------------- ARC

class Arc(Task):
    """ARC-Challenge (Clark et al., arXiv 1803.05457): multiple choice.

    Choices get letters here; some questions number theirs. Chat prompts as the harness's
    arc_challenge_llama, without the beginning of the answer; it takes questions of four choices.
    """
    name, stop, max_new_tokens = "arc", ("\nQuestion:", "\n\n"), 384
    fields = ("question.stem", str), ("question.choices", list), ("answerKey", str)
    EXAMPLES = (
        ("Which of these is a source of light?",
         ("the Moon", "a mirror", "a candle flame", "a window"),
         "A candle flame gives off its own light; the others only reflect it or let it through. "
         "The answer is C."),
        ("A ball is thrown straight up. What makes it come down again?",
         ("gravity", "friction", "magnetism", "sound"),
         "The Earth's gravity pulls the ball back. The answer is A."),
        ("Which change is reversible?",
         ("burning wood", "baking bread", "rusting iron", "melting ice"),
         "Melted ice can be frozen again; the others make new substances. The answer is D."),
    )

    def problem(self, example):
        choices = example["question"]["choices"]
        labels = [c["label"] for c in choices if isinstance(c, dict)
                  and isinstance(c.get("label"), str) and isinstance(c.get("text"), str)]
        if (not 2 <= len(set(labels)) == len(choices) <= len(LETTERS)
                or example["answerKey"] not in labels):
            return (f"the choices of {example['id']} are not as ARC has them, or its answerKey is "
                    "none of their labels")

    def id(self, i, line):
        value = line.get("id", f"arc/{i}")
        return str(value) if type(value) is int else value

    def ask(self, stem: str, texts) -> str:
        return f"{stem}\n" + "\n".join(map("{}) {}".format, LETTERS, texts))

    def asked(self, example) -> str:
        question = example["question"]
        return self.ask(question["stem"], [c["text"] for c in question["choices"]])

    def prompt(self, example) -> str:
        shots = "".join(f"Question: {self.ask(q, texts)}\nAnswer: {a}\n\n"
                        for q, texts, a in self.EXAMPLES)
        return f"{shots}Question: {self.asked(example)}\nAnswer:"

    def chat(self, example) -> str:
        question = example["question"]
        texts = [c["text"] for c in question["choices"]]
        count = ("two", "three", "four", "five")[len(texts) - 2]
        first, last = ", ".join(LETTERS[:len(texts) - 1]), LETTERS[len(texts) - 1]
        choices = "".join(map("{}. {}\n".format, LETTERS, texts))
        return (f"Given the following question and {count} candidate answers ({first} and {last}), "
                f"choose the best answer.\nQuestion: {question['stem']}\n{choices}"
                "Your response should end with \"The best answer is [the_answer_letter]\" where "
                f"the [the_answer_letter] is one of {first} or {last}.")

    def score(self, example, completion: str) -> Score:
        choices = example["question"]["choices"]
        index, how = read_letter(completion, [c["text"] for c in choices])
        want = [c["label"] for c in choices].index(example["answerKey"])
        return Score(index == want, how)


# ---------------------------------------------------------------- the demo

class Demo(Task):
    """The demo's three tasks (demo/corpus.py), each a domain.

    Checked exactly; code by the demo's own interpreter, never by Python.
    """
    name, max_new_tokens = "demo", 220
    fields = ("task", str), ("prompt", str), ("answer", (int, str, list))

    def problem(self, example):
        answer, code = example["answer"], example["task"] == "code"
        if code != isinstance(answer, list) or code and not all(
                isinstance(pair, list) and len(pair) == 2 for pair in answer):
            return f"the answer of {example['id']} is not one that its task has"

    def id(self, i, line):
        return f"{line['task']}/{i}"

    def domain(self, line):
        return line["task"]

    def prompt(self, example) -> str:
        return example["prompt"]

    def chat(self, example) -> str:
        return example["prompt"]

    def score(self, example, completion: str) -> Score:
        right = is_right(example["task"], example["prompt"], completion, example["answer"])
        return Score(right, "exact")


TASKS.update((task.name, task) for task in (
    Gsm8k, HumanEval, Arc, Math500, Aime24, Mmlu, IFEval, MTBench, Demo))
