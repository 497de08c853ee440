"""IFEval: prompts and verdicts are the reference implementation's; skips where that is absent."""
import json
from pathlib import Path

import pytest

from common import UserError
from evaluation import ifeval
from evaluation.tasks import TASKS

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def task():
    pytest.importorskip("lm_eval")
    pytest.importorskip("langdetect")
    return TASKS["ifeval"]()


def line(**changed):
    return {"key": 7, "prompt": "Say it without commas.", "kwargs": [{}],
            "instruction_id_list": ["punctuation:no_comma"]} | changed


def test_published_file(task):
    path = DATA / "ifeval_input_data.jsonl"
    if not path.exists():
        pytest.skip("the benchmarks' files are not here")
    examples = task.load(path)
    assert len(examples) + len(task.left_out) == 540
    assert bool(task.left_out) != ifeval.has_sentence_data()
    assert task.drawn == ["1122", "1129"]
    published = [json.loads(s) for s in (DATA / "ifeval_gpt4_responses.jsonl").open()]
    answers = {a["prompt"]: a["response"] for a in published}
    known = [e for e in examples if not set(ifeval.BY_NLTK) & set(e["instruction_id_list"])]
    assert len(known) == 476
    assert sum(task.score(e, answers[e["prompt"]]).right for e in known) == 382
    assert task.load(path, limit=5) == examples[:5]


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    ifeval.reference.cache_clear()
    try:
        with pytest.raises(UserError, match="langdetect is missing; pip install -r"):
            TASKS["ifeval"]().check()
    finally:
        ifeval.reference.cache_clear()
