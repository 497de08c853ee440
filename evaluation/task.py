"""What the benchmarks of eval.py share: how their files are read, and what each must say."""
from collections import Counter
from typing import NamedTuple

from common import Line, UserError, file_hash, json_lines

TASKS: dict[str, type["Task"]] = {}  # by name; evaluation/tasks.py fills it


class Score(NamedTuple):
    right: bool | None  # None: not graded here
    how: str  # what the answer was read from, or how the check ended


class Task:
    """What the benchmarks share. `fields`: (path of keys, type) that each line must have."""
    name, fields, stop, max_new_tokens = "", (), (), 512
    graded = True  # False: answers are written for another program to grade

    def __init__(self, allow_code_execution=False):
        self.left_out: list[str] = []  # ids of examples that cannot be graded here, after load

    def check(self):
        """Raise UserError where a package that the grading needs is missing."""

    def load(self, path, limit: int | None = None) -> list[dict]:
        """The examples, the first `limit` of each domain.

        Raises UserError for a file that is not this benchmark's.
        """
        counts, kept, seen, self.left_out = Counter(), [], {}, []
        for i, line in enumerate(self.lines(path)):
            if field := missing(type(self), line.value):
                raise UserError(f"{line.where}: {field} is missing or not what {self.name} has "
                                "there")
            e = line.value | {"id": self.id(i, line.value), "domain": self.domain(line.value)}
            if not isinstance(e["id"], str):
                raise UserError(f"{line.where}: its id is not a string")
            if self.ungradable(e):
                self.left_out.append(e["id"])
                continue
            counts[e["domain"]] += 1
            if limit is None or counts[e["domain"]] <= limit:
                if problem := self.problem(e):
                    raise UserError(f"{line.where}: {problem}")
                if (first := seen.setdefault(e["id"], line.number)) != line.number:
                    raise UserError(f"{line.where}: its id {e['id']!r} is also that of line "
                                    f"{first}; each must be another")
                kept.append(e)
        return kept

    def lines(self, path) -> list[Line]:
        """The file's examples; refuses a file whose first line is another benchmark's."""
        lines = json_lines(path, holding="examples")
        others = [name for name, task in TASKS.items() if not missing(task, lines[0].value)]
        if missing(type(self), lines[0].value) and others:
            raise UserError(f"{path} is a file of {others[0]}, not of {self.name}; give --task "
                            f"{others[0]} or another file")
        return lines

    def fingerprint(self, path) -> str:
        """16 hex digits of all that `load` reads: other files, other digits."""
        return file_hash(path)

    def problem(self, example: dict) -> str | None:
        """Why an example that has all `fields` cannot be used, or None."""
        return None

    def ungradable(self, example: dict) -> bool:
        """Whether this installation cannot grade the example, so that `load` leaves it out."""
        return False

    def note(self) -> str | None:
        """What a reader of the results must know of the examples or their grading; after load."""
        return None

    def id(self, i: int, line: dict) -> str:
        return f"{self.name}/{i}"

    def domain(self, line: dict) -> str:
        return self.name

    def follow_up(self, example: dict, answers: list[str]) -> str | None:
        """The user's next turn after these answers to the turns before it, or None at the end."""
        return None


def missing(task, line: dict) -> str | None:
    """The first field of `task` that a line lacks, in quotes, or None."""
    for path, kind in task.fields:
        value = line
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or value == "" or value == []:
            return repr(path)
    return None
