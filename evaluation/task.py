"""What the benchmarks of eval.py share: how their files are read, and what each must say."""
from collections import Counter
from typing import NamedTuple

from common import Line, UserError, file_hash, json_lines

TASKS: dict[str, type["Task"]] = {}  # by name; evaluation/tasks.py fills it


class Score(NamedTuple):
    right: bool | None  # None: not graded here
    how: str  # what the answer was read from, or how the check ended


class Place(NamedTuple):
    """Where an example stands in its file."""
    where: str  # "FILE, line N"
    domain: str
    before: int  # examples of its domain before it that can be graded


class Task:
    """What the benchmarks share. `fields`: (path of keys, type) that each line must have."""
    name, fields, stop, max_new_tokens = "", (), (), 512
    graded = True  # False: answers are written for another program to grade
    needs = ""  # what an example that is `ungradable` here is graded by

    def __init__(self, allow_code_execution=False):
        self.places: dict[str, Place] = {}  # of all gradable examples, by id; after load
        self.unplaced: dict[str, Place] = {}  # ... and of those that cannot be graded here
        self.left_out: list[str] = []  # ids of the latter that would have been loaded

    def check(self):
        """Raise UserError where a package that the grading needs is missing."""

    def load(self, path, limit: int | None = None) -> list[dict]:
        """The examples, the first `limit` of each domain that can be graded here.

        Raises UserError for a file that is not this benchmark's.
        """
        counts, kept, seen, self.places, self.unplaced = Counter(), [], {}, {}, {}
        for i, line in enumerate(self.lines(path)):
            if field := missing(type(self), line.value):
                raise UserError(f"{line.where}: {field} is missing or not what {self.name} has "
                                "there")
            e = line.value | {"id": self.id(i, line.value), "domain": self.domain(line.value)}
            if not isinstance(e["id"], str):
                raise UserError(f"{line.where}: its id is not a string")
            place = Place(line.where, e["domain"], counts[e["domain"]])
            if self.ungradable(e):
                self.unplaced[e["id"]] = place
                continue
            self.places.setdefault(e["id"], place)
            counts[e["domain"]] += 1
            if limit is None or counts[e["domain"]] <= limit:
                if problem := self.problem(e):
                    raise UserError(f"{line.where}: {problem}")
                if (first := seen.setdefault(e["id"], line.number)) != line.number:
                    raise UserError(f"{line.where}: its id {e['id']!r} is also that of line "
                                    f"{first}; each must be another")
                kept.append(e)
        self.left_out = [i for i, p in self.unplaced.items() if limit is None or p.before < limit]
        return kept

    def narrow(self, ids: set[str]):
        """Let `left_out` and `note` be of what a run over the problems `ids` came by: up to the
        last of them in each domain, or all if there is none after it.
        """
        total = Counter(p.domain for p in self.places.values())
        last = Counter()
        for p in (self.places[i] for i in ids if i in self.places):
            last[p.domain] = max(last[p.domain], p.before + 1)
        self.left_out = [i for i, p in self.unplaced.items() if i not in ids and (
            p.before < last[p.domain] or last[p.domain] == total[p.domain])]

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
