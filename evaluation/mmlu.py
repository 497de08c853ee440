"""MMLU (Hendrycks et al., arXiv 2009.03300): 57 subjects, four choices, five examples of each.

The official files: test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, a line of each the question, its
four choices and the letter of the right one, without a header.
"""
import csv
import hashlib
import io
import re
from pathlib import Path

from common import Line, UserError, file_hash, read_text, refuse
from evaluation.answers import answered, read_letter
from evaluation.task import Score, Task

SHOTS = 5
# The letter alone, or with the choice's text behind it: "B", "(B)", "B. zinc"; no "A ball".
FIRST = re.compile(r"""[\s*_"'(\[]*([A-Da-d])(?:[\s*_"')\].:,;]*(?:\n|\Z)|[*_"'\]]*[).:](?!\w))""")


class Mmlu(Task):
    """Each subject a domain. Right if the letter behind "Answer:" is the right choice's.

    The prompts are those of the harness's mmlu_generative, for chat too. Many tables of base models
    take the likeliest of the four letters instead; here they write one.
    """
    name, stop, max_new_tokens = "mmlu", ("\n",), 256
    fields = ("question", str), ("choices", list), ("answer", str)

    def lines(self, path) -> list[Line]:
        """The examples of one test file, or of all in the directory that holds dev/ and test/."""
        lines = []
        for test in test_files(path):
            subject = subject_of(test)
            shots = [ask(e.value) + f" {e.value['answer']}\n\n" for e in examples(dev_file(test))]
            refuse((len(shots) < SHOTS, f"{dev_file(test)} has {len(shots)} examples; it must have "
                    f"{SHOTS}"))
            head = ("The following are multiple choice questions (with answers) about "
                    f"{subject.replace('_', ' ')}.\n\n{''.join(shots[:SHOTS])}")
            lines += [line._replace(value=line.value | {"id": f"{subject}/{i}", "subject": subject,
                                                        "head": head})
                      for i, line in enumerate(examples(test))]
        return lines

    def fingerprint(self, path) -> str:
        hashes = [file_hash(f) for test in test_files(path) for f in (test, dev_file(test))]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]

    def id(self, i, line):
        return line["id"]

    def domain(self, line):
        return line["subject"]

    def prompt(self, example) -> str:
        return example["head"] + ask(example)

    def chat(self, example) -> str:
        return self.prompt(example)

    def score(self, example, completion: str) -> Score:
        if m := FIRST.match(answered(completion)):
            return Score(m[1].upper() == example["answer"], "first letter")
        index, how = read_letter(completion, example["choices"])
        return Score(index == "ABCD".index(example["answer"]), how)


def ask(example: dict) -> str:
    """A question as all of MMLU's prompts put it, to be answered by a letter."""
    choices = "".join(map("{}. {}\n".format, "ABCD", example["choices"]))
    return f"{example['question'].strip()}\n{choices}Answer:"


def test_files(path) -> list[Path]:
    path = Path(path)
    files = sorted(path.glob("test/*_test.csv")) if path.is_dir() else [path]
    refuse((not files, f"{path} has no test/*_test.csv; give the directory that holds MMLU's dev/ "
            "and test/, or one file of test/"),
           *((not f.name.endswith("_test.csv"), f"{f} is not named SUBJECT_test.csv, as MMLU's "
              "files are: the name says the subject") for f in files))
    return files


def subject_of(test: Path) -> str:
    return test.name.removesuffix("_test.csv")


def dev_file(test: Path) -> Path:
    """Where a test file's few-shot examples are."""
    dev = test.absolute().parent.parent / "dev" / f"{subject_of(test)}_dev.csv"
    refuse((not dev.exists(), f"{test} needs its few-shot examples, and {dev} does not exist"))
    return dev


def examples(path: Path) -> list[Line]:
    """The lines of a file; raises UserError naming file and line where one is not MMLU's."""
    text = read_text(path).removeprefix("\ufeff")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    found, number = [], 1  # of the line on which an example begins
    try:
        for row in reader:
            where, number = f"{path}, line {number}", reader.line_num + 1
            if not row:
                continue
            refuse((len(row) != 6, f"{where}: it has {len(row)} columns; MMLU's files have 6: "
                    "question, four choices, answer"),
                   (row[-1] not in {*"ABCD"}, f"{where}: its answer is {row[-1][:40]!r}, not A, B, "
                    "C or D" + "; MMLU's files have no header" * (number == 2)))
            value = {"question": row[0], "choices": row[1:5], "answer": row[5]}
            found.append(Line(where, value, 0, 0))
    except csv.Error as e:
        raise UserError(f"{path}, line {number}: its quotes are not as in CSV ({e})") from None
    return found
