"""Tasks of several turns: the chat so far, and the answers as FastChat reads them, so that any of
its judge models can grade them.
"""
import hashlib
import json
import re
import time
from itertools import zip_longest
from pathlib import Path

from common import make_directory, write_text
from evaluation.task import Task


def questions(task: Task, first: str, example: dict) -> list[str]:
    """The user's turns of an example, as they are after empty answers; one for most tasks."""
    asked = [first]
    while (more := task.follow_up(example, [""] * len(asked))) is not None:
        asked.append(more)
    return asked


def messages(asked: list[str], answers: list[str]) -> list[dict]:
    """The chat so far, for a chat template: asked, answered, asked, ..."""
    said = [{"role": role, "content": text} for pair in zip_longest(asked, answers)
            for role, text in zip(("user", "assistant"), pair)]
    return [m for m in said if m["content"] is not None]


def write_fastchat(directory: Path, answers: dict, examples: dict, target: str):
    """Write DIRECTORY/ROW.jsonl for each row of answers {(rule, id, sample): answer}: a line for
    each problem, a choice for each sample. FastChat takes the file's name for the model's.
    """
    rows: dict[str, dict[str, list]] = {}
    for (row, name, _), answer in sorted(answers.items(), key=lambda a: a[0][2]):
        rows.setdefault(row, {}).setdefault(name, []).append(
            answer.get("turns") or [answer["text"]])
    make_directory(directory)
    for row, problems in rows.items():
        model = re.sub("[^A-Za-z0-9.-]", "_", row)
        lines = [{
            "question_id": examples[name]["question_id"],
            "answer_id": hashlib.sha256(f"{target} {row} {name}".encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": i, "turns": turns} for i, turns in enumerate(samples)],
            "tstamp": time.time()} for name, samples in problems.items()]
        lines.sort(key=lambda line: line["question_id"])
        write_text(directory / f"{model}.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
