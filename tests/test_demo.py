"""The demo's corpus, its exact checker, its interpreter, and the shipped pair."""
import json
import os
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from common import UserError
from demo import mined
from demo.check import is_right, passes
from demo.corpus import (
    LETTERS,
    TASKS,
    TOWNS,
    WORLD,
    Pick,
    Problem,
    Ref,
    first_error,
    problems,
    render,
)
from demo.mined import exactly
from helpers import run_command

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("task", TASKS)
def test_every_rendering_is_right_and_the_checker_knows_it(task):
    for i, p in enumerate(islice(problems(task, "eval"), 60)):
        for habit in ("target", "draft"):
            text = render(p.solution, random.Random(i), habit)
            assert first_error(p, text) is None and is_right(task, p.prompt, text, p.answer)


@pytest.mark.parametrize("task", TASKS)
def test_a_changed_digit_or_word_is_found_where_it_is(task):
    found = 0
    for i, p in enumerate(islice(problems(task, "eval"), 60)):
        text = render(p.solution, random.Random(i), "draft")
        at = random.Random(i).randrange(len(text))
        broken = text[:at] + "\u00a7" + text[at + 1:]
        assert first_error(p, broken)[0] == at
        slip = render(p.solution, random.Random(i), "draft", mistakes=0.2)
        if " -- no," in slip:
            error = first_error(p, slip)
            found += error is not None and error[0] <= slip.index(" -- no,")
            assert error is not None
    assert found > 10


def test_checker_by_hand():
    p = Problem("maths", "", (Pick("so", "then"), " ", Pick("a", "b", name="v"), " = 54 ", Ref("v"),
                              "."), 54)
    assert first_error(p, "then b = 54 b.") is None and first_error(p, "so a") is None
    assert first_error(p, "so b = 52 b.") == [8, 9] and first_error(p, "so b = 54 a.") == [
        10, 11] and first_error(p, "hence a") == [0, 5]


def test_facts_answer_with_the_letter_of_what_the_world_says():
    for i, p in enumerate(islice(problems("facts", "eval"), 40)):
        question, *choices = p.prompt.split("\n")[:5]
        town = next(t for t in TOWNS if t in question)
        right = [letter for letter, value in (c.split(") ") for c in choices)
                 if value in WORLD[town].values()]
        text = render(p.solution, random.Random(i), "draft")
        assert p.answer in right and all(value in text for value in WORLD[town].values())
        other = next(x for x in LETTERS if x != p.answer)
        at = text.index(f" {p.answer}.") + 1
        assert first_error(p, text[:at] + other + text[at + 1:]) == [at, at + 1]


def test_a_habit_does_not_depend_on_the_run():
    order = ("from demo.corpus import Pick; "
             "print(Pick((Pick('a', 'b'), 'x'), ('b', 'x'), 'c', 'd').order('draft')[0])")
    runs = {subprocess.run([sys.executable, "-c", order], capture_output=True, text=True,
                           cwd=ROOT).stdout for _ in range(6)}
    assert len(runs) == 1 and "object at" not in runs.pop()


def test_splits_are_disjoint_and_habits_differ():
    for task in TASKS:
        splits = [{p.prompt for p in islice(problems(task, s), 400)}
                  for s in ("train", "judge", "eval")]
        assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]
    pick = Pick("a", "b", "c", "d", "e")
    assert pick.order("target")[0] == "a" != pick.order("draft")[0] and set(
        pick.order("draft")) == set("abcde")
    drawn = [render(pick, random.Random(i), "target") for i in range(400)]
    assert drawn.count("a") > drawn.count("b") > drawn.count("d") > 0


def test_problems_of_a_split_are_written_and_their_answers_relabelled(tmp_path, monkeypatch):
    """make_problems.py gives distinct prompts of the split that was asked for; mined.exactly labels
    answers to them as the checker does.
    """
    files = {split: tmp_path / f"{split}.jsonl" for split in ("eval", "judge")}
    for split, path in files.items():
        habit = ["--habit", "draft"] if split == "judge" else []
        subprocess.run([sys.executable, ROOT / "demo" / "make_problems.py", "--split", split,
                        "--per_task", "5", "--skip", "2", "--out", path, *habit], check=True)
    written = {split: [json.loads(line) for line in path.read_text().splitlines()] for split,
               path in files.items()}
    prompts = {split: {line["prompt"] for line in lines} for split, lines in written.items()}
    assert len(prompts["eval"]) == len(prompts["judge"]) == 15 and not prompts["eval"] & prompts[
        "judge"]

    # the prompts are among the first; more take a minute
    monkeypatch.setattr("demo.mined.SEARCHED", 200)
    answers, want = [], []
    for task in TASKS:
        known = {p.prompt: p for p in islice(problems(task, "judge"), 200)}
        assert [line["prompt"] for line in written["judge"] if line["task"]
                == task] == list(known)[2:7]
        for line in written["judge"]:
            if line["task"] == task:
                right = line["text"]
                wrong = right[:8] + "\u00a7" + right[9:]
                base = {"prompt": line["prompt"], "domain": task, "ended": True}
                answers += [base | {"answer": right}, base | {"answer": wrong},
                            base | {"answer": right, "ended": False}, base | {"answer": ""}]
                want += [(right, None), (wrong, first_error(known[line["prompt"]], wrong))]
    got = exactly(answers)
    assert [(line["answer"], line["error"])
            for line in got] == want and all(error is None or error[0] == 8 for _, error in want)
    with pytest.raises(UserError, match="not of the judge split"):
        exactly([{"prompt": written["eval"][0]["prompt"], "domain": "maths", "answer": "x",
                  "ended": True}])


@pytest.mark.parametrize("flags, why", [
    (["--limit", "20"], "give --answers, --exact and --out"),
    (["--answers", "a", "--out", "o"], "give --answers, --exact and --out"),
    (["--bounds", "b", "--out", "o"], "or --bounds alone"),
    (["--bounds", "b", "--mined", "m"], "or --bounds alone"),
    (["--bounds", "{plain}"], "holds no swap"), (["--bounds", "{auto}"], "swaps without a score"),
    (["--answers", "{plain}", "--exact", "e", "--out", "{new}"], "'source_model' is missing"),
    (["--answers", "a", "--exact", "e", "--out", "o", "--processes", "0"], "--processes is 0")])
def test_mined_refuses_in_a_line(tmp_path, monkeypatch, capsys, flags, why):
    paths = {name: tmp_path / name for name in ("plain", "auto", "new")}
    line = {"prompt": "p", "answer": "a b", "error": [2, 3]}
    paths["plain"].write_text(json.dumps(line))
    paths["auto"].write_text(json.dumps(line | {"instead_of": "c"}))
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, mined, *(f.format(**paths) for f in flags))
    err = capsys.readouterr().err
    assert end.value.code == 2 and why in err and err.count("\n") == 1


def test_swaps_of_wrong_texts_count_for_nothing(monkeypatch):
    p = next(iter(problems("facts", "judge")))
    monkeypatch.setattr(mined, "known_problems", lambda lines: {p.prompt: p})
    rows = mined.mark_rows({"m": [(p.prompt, "\u00a7 wrong from its start on", 9, True, None)]})
    assert rows[1] == ["m", "0", "0", "0", "–", "–"]


def test_interpreter():
    f = ("def f(xs):\n    total = 0\n    for x in xs:\n        if x > 2 and not x % 2:\n"
         "            total += x * 3\n    return total\n")
    assert passes(f, [([1, 2, 4, 6], 30), ([], 0)]) and not passes(f, [([4], 13)])
    assert passes("def f(xs):\n    out = list()\n    for v in xs:\n        if 1 <= v < 4:\n       "
                  "     out.append(pow(v, 2))\n    return out + [0]\n", [([0, 1, 3, 4], [1, 9, 0])])


@pytest.mark.parametrize("body", [
    "    while True:\n        pass", "    import os\n    return 1", "    return "
    "__import__('os').system('true')", "    return open('x')",
    "    for a in xs:\n        for b in xs:\n            for c in xs:\n                xs += "
    "[1]\n    return 1", "    x = 9\n    for i in xs:\n        x = x * x\n    return x",
    "    for i in xs:\n        xs = xs + xs\n    return 1", "    return xs.__class__",
    "    return (lambda: 1)()", "    return xs[", "    return missing", "    pass",
    "    return xs * xs", "    return 1 % 0", "    return f(xs)", "    return [1 for x in xs]",
])
def test_interpreter_refuses_the_rest(body):
    assert not passes(f"def f(xs):\n{body}\n", [([1, 2, 3] * 30, 1)])


@pytest.mark.slow
def test_demo_without_arguments():
    """The shipped pair: the table comes, the judge accepts more than the standard rule and nothing
    needs a network.
    """
    done = subprocess.run([sys.executable, ROOT / "generate.py"], capture_output=True, text=True,
                          cwd="/", env=os.environ | {"NO_COLOR": "1"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert done.stdout.startswith("Judge decoding on the demo pair: target 10.2M")
    table = {line.split()[0]: line.split()
             for line in done.stdout.split("held-out problems (")[1].splitlines()[2:]}
    assert float(table["judge"][3]) > 2 * float(table["standard"][3])
    right = {rule: int(table[rule][4].split("/")[0]) for rule in ("target", "standard", "judge")}
    assert right["standard"] == right["target"] > 0


def test_requirements_name_what_saving_a_judge_needs():
    """safetensors writes PyTorch tensors with NumPy and does not install it; transformers does,
    which hides its absence here.
    """
    names = [re.match("[a-z-]*", line)[0] for line in (ROOT / "requirements.txt").open()]
    without = ("import sys; sys.modules['numpy'] = None; import torch; "
               "from safetensors.torch import save; save({'a': torch.zeros(1)})")
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True)
    assert done.returncode == 0 or "numpy" in names, done.stderr


@pytest.mark.slow
def test_evaluate(tmp_path):
    home = ROOT / "checkpoints" / "demo"
    done = subprocess.run([sys.executable, ROOT / "eval.py", "--task", "demo", "--data",
                           home / "problems.jsonl", "--target", home / "target", "--draft",
                           home / "draft",
                           "--judge", home / "judge.safetensors", "--rules",
                           "target,standard,topk:3,judge", "--limit", "2", "--device", "cpu",
                           "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "standard equals the target token for token on 6 of 6 problems" in done.stdout
    assert "| topk:3 " in done.stdout
