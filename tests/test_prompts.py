"""Prompts, stop strings and lengths are lm-evaluation-harness 0.4.13's, rendered from its files."""
import ast
import csv
import functools
from importlib.util import find_spec
from pathlib import Path

import jinja2
import pytest

from evaluation.mathematics import BOX
from evaluation.tasks import TASKS

yaml = pytest.importorskip("yaml")
if not find_spec("lm_eval"):
    pytest.skip("lm_eval is not installed", allow_module_level=True)

DATA = Path(__file__).parents[2] / "shared" / "data"
HARNESS = Path(find_spec("lm_eval").origin).with_name("tasks")
JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class Loader(yaml.SafeLoader):
    """For the harness's files: a function stays its name."""


Loader.add_constructor("!function", lambda loader, node: node.value)


@functools.cache
def settings(file: str) -> dict:
    """What a task's file says, and below it the file that it includes."""
    found = yaml.load((HARNESS / file).read_text(), Loader)
    folder, include = file.rpartition("/")[0], found.pop("include", None)
    return (settings(f"{folder}/{include}") if include else {}) | found


def function(file: str, name: str):
    """A function of a task's utils.py, without what that file imports."""
    tree = ast.parse((HARNESS / file).read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    exec(compile(tree, file, "exec"), scope := {})
    return scope[name]


def asked(file: str, doc: dict) -> str:
    """The user's message of a task with doc_to_text in Jinja."""
    text = settings(file)["doc_to_text"]
    return template(text).render(doc) if "{" in text else doc[text]


template = functools.cache(JINJA.from_string)


def published(name: str, file: str):
    """(the task, its examples)."""
    if not (DATA / file).exists():
        pytest.skip("the benchmarks' files are not here")
    task = TASKS[name](allow_code_execution=True)
    return task, task.load(DATA / file)


def same_limits(task, file: str, length=True):
    """The harness's stop strings, of which those for control tokens are tokens here."""
    limits = settings(file)["generation_kwargs"]
    until = [s for s in limits["until"] if not s.startswith("<")]
    assert {*until} <= {*task.stop} and (until or not task.stop)
    assert not length or task.max_new_tokens == limits["max_gen_toks"]


def test_math500():
    task, examples = published("math500", "math500_test.jsonl")
    ask = function("minerva_math/utils.py", "doc_to_text")
    shots = function("minerva_math/utils.py", "list_fewshot_samples")()
    assert settings("minerva_math/minerva_math500.yaml")["num_fewshot"] == len(shots) == 4
    before = "".join(f"{ask(doc)} {doc['solution']}\n\n" for doc in shots)
    assert all(task.prompt(e) == before + ask(e) for e in examples)
    same_limits(task, "minerva_math/minerva_math500.yaml", length=False)
    assert task.stop == ("Problem:",)


def test_aime24():
    task, examples = published("aime24", "aime24_test.jsonl")
    for e in examples:
        problem, ending = e["problem"].rsplit("\n", 1)  # as published for chat models
        assert task.chat(e) == e["problem"] and ending == BOX
        assert task.prompt(e) == asked("aime/aime24.yaml", {"Problem": problem})
        assert task.chat(e | {"problem": problem}) == e["problem"]
    same_limits(task, "aime/aime24.yaml")


def test_mmlu(tmp_path):
    """Of all 57 subjects, each with questions of its own."""
    files = sorted((HARNESS / "mmlu/generative").glob("mmlu_*.yaml"))
    data, names = {}, [settings(f"mmlu/generative/{f.name}")["dataset_name"] for f in files]
    assert len(names) == 57
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        for n in names:
            data[n, split] = [(f' What is "{n}", {split} {i}?\nThink. ', *f"wx{i}z", "ABCDA"[i])
                              for i in range(5)]
            with (tmp_path / split / f"{n}_{split}.csv").open("w", newline="") as f:
                csv.writer(f).writerows(data[n, split])
    task = TASKS["mmlu"]()
    examples = task.load(tmp_path, limit=2)
    assert [e["domain"] for e in examples] == [n for n in sorted(names) for _ in range(2)]
    for file, e in zip(files, examples[::2]):
        name = f"mmlu/generative/{file.name}"
        ask = lambda row, name=name: asked(name, {"question": row[0], "choices": row[1:5]})
        n = e["domain"]
        shots = "".join(f"{ask(row)} {row[5]}\n\n" for row in data[n, "dev"])
        want = settings(name)["description"] + shots + ask(data[n, "test"][0])
        assert task.prompt(e) == task.chat(e) == want
    same_limits(task, name, length=False)
    assert task.load(tmp_path / "test" / f"{n}_test.csv", limit=2) == examples[-2:]


def test_ifeval():
    pytest.importorskip("langdetect")
    task, examples = published("ifeval", "ifeval_input_data.jsonl")
    assert all(task.prompt(e) == task.chat(e) == asked("ifeval/ifeval.yaml", e) for e in examples)
    same_limits(task, "ifeval/ifeval.yaml")


def test_humaneval():
    task, examples = published("humaneval", "HumanEval.jsonl.gz")
    for e in examples:
        assert task.prompt(e) == asked("humaneval/humaneval.yaml", e)
        assert task.chat(e) == asked("humaneval/humaneval_instruct.yaml", e)
    same_limits(task, "humaneval/humaneval.yaml")


def test_gsm8k_form():
    """The few-shot examples are our own: the harness draws them from the training file."""
    task, examples = published("gsm8k", "gsm8k_test.jsonl")
    ask = lambda question: asked("gsm8k/gsm8k.yaml", {"question": question})
    before = "".join(f"{ask(q)} {a}\n\n" for q, a in task.EXAMPLES)
    for e in examples:
        assert task.prompt(e) == before + ask(e["question"])
        assert task.chat(e) == asked("gsm8k/gsm8k-cot-llama.yaml", e)


def test_arc_chat():
    """The harness's has four choices; of 1,172 questions a few have three or five."""
    task, examples = published("arc", "ARC-Challenge-Test.jsonl")
    others = {}
    for e in examples:
        choices = [c["text"] for c in e["question"]["choices"]]
        if len(choices) == 4:
            assert task.chat(e) == asked("llama3/instruct/arc_challenge/arc_challenge_llama.yaml", {
                "question": e["question"]["stem"], "choices": {"text": choices}})
        else:
            others[len(choices)] = task.chat(e), choices
    assert {*others} == {3, 5}
    for chat, choices in others.values():
        letters = "ABCDE"[:len(choices)]
        assert all(f"\n{x}. {text}\n" in chat for x, text in zip(letters, choices))
        assert chat.endswith(f"one of {', '.join(letters[:-1])} or {letters[-1]}.")
