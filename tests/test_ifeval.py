"""IFEval's verdicts by lm-eval's checkers: each of the 25 kinds, the published answers, bad lines.

Skipped where lm-eval or what its checkers import is missing.
"""
import json
import random
import sys
from pathlib import Path

import pytest

from common import UserError
from evaluation import ifeval
from evaluation.tasks import TASKS

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def task():
    pytest.importorskip("lm_eval")
    for name in ("langdetect", "nltk", "immutabledict"):
        pytest.importorskip(name)
    return TASKS["ifeval"]()


@pytest.fixture
def sentence_data(task, tmp_path, monkeypatch):
    """NLTK's data without what it learnt of abbreviations, which suffices for plain sentences."""
    import nltk
    tables = tmp_path / "tokenizers" / "punkt_tab" / "english"
    tables.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (tables / name).touch()
    with monkeypatch.context() as m:
        m.setattr(nltk.data, "path", [str(tmp_path)])
        ifeval.has_sentence_data.cache_clear()
        yield
    ifeval.has_sentence_data.cache_clear()
    cached = ifeval.reference().instructions_registry.instructions.instructions_util
    cached._get_sentence_tokenizer.cache_clear()


def line(*instructions, key=7, prompt="Say it."):
    names, kwargs = zip(*instructions)
    return {"key": key, "prompt": prompt, "instruction_id_list": [*names], "kwargs": [*kwargs]}


# instruction: (its parameters, a text that follows it, one that does not)
KINDS = {
    "keywords:existence": ({"keywords": ["sun", "sea"]}, "The Sun and the sea.", "The sun."),
    "keywords:frequency": ({"keyword": "sun", "relation": "at least", "frequency": 2},
                           "Sun, sun.", "One sun."),
    "keywords:forbidden_words": ({"forbidden_words": ["sun"]}, "Sunny sea.", "The Sun."),
    "keywords:letter_frequency": ({"letter": "q", "let_relation": "less than", "let_frequency": 2},
                                  "A quay.", "Quick quay."),
    "language:response_language": ({"language": "de"}, "Das ist ein schöner Tag am Meer.",
                                   "This is a beautiful day at the sea."),
    "length_constraints:number_sentences": ({"relation": "at least", "num_sentences": 2},
                                            "One two. Three four.", "One two three."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "One\n***\nTwo", "One\n\nTwo"),
    "length_constraints:number_words": ({"relation": "less than", "num_words": 3}, "Just two",
                                        "These are four words"),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, "One.\n\nThen, two.",
        "Then one.\n\nTwo."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]",
                                               "[name] only"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Hello.\nP.S. Bye.", "Hello."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* one\n* two",
                                              "* one\n* two\n* three"),
    "detectable_format:constrained_response": ({}, "My answer is maybe.", "Perhaps."),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*one* and *two*",
                                                      "*one* and two"),
    "detectable_format:multiple_sections": ({"section_spliter": "Part", "num_sections": 2},
                                            "Part 1\nx\nPart 2\ny", "Part 1\nx"),
    "detectable_format:json_format": ({}, "```json\n{\"a\": 1}\n```", "{a: 1}"),
    "detectable_format:title": ({}, "<<A day>>\nIt rains.", "A day\nIt rains."),
    "combination:two_responses": ({}, "One.\n******\nTwo.", "One.\n***\nOne."),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say it."}, "Say it. It.", "It."),
    "startend:end_checker": ({"end_phrase": "That is all."}, "So. That is all.",
                             "That is all. Or not?"),
    "startend:quotation": ({}, "\"It rains.\"", "It \"rains\"."),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2}, "It is VERY WET.", "It is VERY."),
    "change_case:english_capital": ({}, "IT IS A VERY WET DAY AT THE SEA.",
                                    "IT IS A VERY wet DAY AT THE SEA."),
    "change_case:english_lowercase": ({}, "it is a very wet day at the sea.",
                                      "it is a Very wet day at the sea."),
    "punctuation:no_comma": ({}, "No such sign.", "One, two."),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_instruction(sentence_data, task, tmp_path, name):
    given, right, wrong = KINDS[name]
    (path := tmp_path / "f.jsonl").write_text(json.dumps(line((name, given))))
    [example] = task.load(path)
    assert task.left_out == [] and task.drawn == []
    assert task.score(example, right) == (True, "1 of 1 followed")
    assert task.score(example, wrong) == (False, "0 of 1 followed")
    assert task.score(example, " \n") == (False, "0 of 1 followed")


def test_all_instructions_must_be_followed(task, caplog):
    both = line(("punctuation:no_comma", {}), ("startend:quotation", {}))
    assert task.score(both, "\"Yes.\"") == (True, "2 of 2 followed")
    assert task.score(both, "\"Yes, no.\"") == (False, "1 of 2 followed")
    assert task.score(both, "Yes, no.") == (False, "0 of 2 followed")
    assert {*KINDS} == {*ifeval.reference().instructions_registry.INSTRUCTION_DICT}
    brackets = line(("detectable_format:json_format", {}))
    assert task.score(brackets, "[" * 100_000) == (False, "the grader failed")
    task.score(line(("language:response_language", {"language": "de"})), "{}")
    assert not caplog.records  # of a text without a language the reference logs the whole


def test_published_file_and_gpt4s_answers(task):
    if not (path := DATA / "ifeval_input_data.jsonl").exists():
        pytest.skip("the benchmarks' files are not here")
    state = random.getstate()
    examples = task.load(path)
    assert len(examples) + len(task.left_out) == 540
    assert bool(task.left_out) != ifeval.has_sentence_data()
    assert task.drawn == ["ifeval/1122", "ifeval/1129"]
    assert "For 1122 and 1129 the reference" in task.note()
    assert all(i in task.note() for i in ("lm-eval 0.4", *(i[7:] for i in task.left_out)))
    assert task.load(path, limit=5) == examples[:5]
    known = [e for e in examples if not {*ifeval.BY_NLTK} & {*e["instruction_id_list"]}]
    published = [json.loads(s) for s in (DATA / "ifeval_gpt4_responses.jsonl").open()]
    answers = {a["prompt"]: a["response"] for a in published}
    scores = [task.score(e, answers[e["prompt"]]) for e in known]
    assert len(known) == 476 and sum(s.right for s in scores) == 382
    assert [task.score(e, answers[e["prompt"]]) for e in known[:100]] == scores[:100]
    assert random.getstate() == state


def test_without_sentence_data_those_prompts_are_left_out_by_name(task, tmp_path, monkeypatch):
    plain, cut = ("punctuation:no_comma", {}), KINDS["length_constraints:number_sentences"][0]
    lines = line(plain, key=1), line(("length_constraints:number_sentences", cut), plain, key=2)
    (path := tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(ifeval, "has_sentence_data", lambda: False)
    assert [e["id"] for e in task.load(path)] == ["ifeval/1"] and task.left_out == ["ifeval/2"]
    assert "Left out, since" in task.note() and task.note().endswith("brings it): 2.")


def test_the_note_names_only_prompts_that_a_run_came_by(task, tmp_path, monkeypatch):
    plain, cut = ("punctuation:no_comma", {}), KINDS["length_constraints:number_sentences"][0]
    drawn = ("keywords:letter_frequency", {"letter": "!", "let_relation": "less than",
                                           "let_frequency": 4})  # no letter: one is drawn
    sentences = ("length_constraints:number_sentences", cut)
    lines = [line(kind, key=i) for i, kind in enumerate((plain, sentences, drawn, sentences, drawn,
                                                        sentences))]
    (path := tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(ifeval, "has_sentence_data", lambda: False)
    ids = lambda text: {f"ifeval/{i}" for i in text}
    for limit, run, left_out, draws in ((1, "0", "", ""), (2, "02", "1", "2"),
                                        (None, "024", "135", "24"), (9, "024", "135", "24")):
        assert {e["id"] for e in task.load(path, limit)} == ids(run)
        assert ({*task.left_out}, {*task.drawn}) == (ids(left_out), ids(draws))
        note = task.note()
        task.load(path)  # as --rescore, which has the answers alone
        task.narrow(ids(run))
        assert ({*task.left_out}, {*task.drawn}, task.note()) == (ids(left_out), ids(draws), note)
    task.narrow(ids("01"))  # 1 was answered where it can be graded
    assert task.left_out == []


@pytest.mark.parametrize("changed, message", [
    ({"kwargs": []}, "'kwargs' is missing"), ({"key": "7"}, "'key' is missing"),
    ({"kwargs": [{}, {}]}, "it has 1 instructions but 2 kwargs"),
    ({"kwargs": [None]}, "the kwargs of punctuation:no_comma are not those"),
    ({"kwargs": [{"num_words": 3}]}, "the kwargs of punctuation:no_comma are not those"),
    ({"instruction_id_list": ["length_constraints:number_words"]},
     "the kwargs of length_constraints:number_words are not those"),
    ({"instruction_id_list": ["no_comma"]}, "IFEval has no instruction 'no_comma'"),
    ({"instruction_id_list": [["x"]]}, "IFEval has no instruction \\['x'\\]"),
])
def test_bad_lines_are_named(task, tmp_path, changed, message):
    good = line(("punctuation:no_comma", {}))
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"key": 8} | changed))
    with pytest.raises(UserError, match=f"{path}, line 2: {message}"):
        task.load(path)


@pytest.mark.parametrize("name, way_out", [
    ("langdetect", "pip install -r requirements-eval.txt"),
    ("lm_eval", "pip install --no-deps lm_eval==0.4.13")])
def test_missing_packages_are_one_line(monkeypatch, name, way_out):
    monkeypatch.setitem(sys.modules, name, None)
    ifeval.reference.cache_clear()
    try:
        with pytest.raises(UserError, match=f"{name} is missing; {way_out}"):
            TASKS["ifeval"]().check()
    finally:
        ifeval.reference.cache_clear()
