"""IFEval (Zhou et al., arXiv 2311.07911): instructions that a program can check.

Graded by the reference implementation as lm-evaluation-harness carries it. Only its IFEval modules
are imported, which needs neither datasets nor the rest of that package's dependencies.
"""
import contextlib
import functools
import importlib
import logging
import os
import random
import sys
from importlib.metadata import version
from types import ModuleType

from common import UserError
from evaluation.task import Score, Task

# Whose checkers cut sentences or words by the data that NLTK calls punkt_tab
BY_NLTK = "length_constraints:number_sentences", "change_case:capital_word_frequency"


class IFEval(Task):
    """Right if all of a prompt's instructions are followed: prompt-level strict accuracy.

    `how` counts the instructions followed, from which the instruction-level accuracy adds up.
    """
    name, max_new_tokens = "ifeval", 1280
    fields = (("key", int), ("prompt", str), ("instruction_id_list", list), ("kwargs", list))

    needs = ("NLTK's sentence data, which is not here (python -m nltk.downloader punkt_tab brings "
             "it)")

    def check(self):
        reference()

    def load(self, path, limit=None):
        self.drawn = []  # ids of prompts for which the reference draws a parameter at random
        return super().load(path, limit)

    def narrow(self, ids):
        super().narrow(ids)
        self.drawn = [i for i in self.drawn if i in ids]

    def id(self, i, line):
        return f"ifeval/{line['key']}"

    def problem(self, example):
        names, kwargs = example["instruction_id_list"], example["kwargs"]
        checkers = reference().instructions_registry.INSTRUCTION_DICT
        if len(names) != len(kwargs):
            return f"it has {len(names)} instructions but {len(kwargs)} kwargs"
        with seeded(example["key"]):
            before = random.getstate()
            for name, given in zip(names, kwargs):
                if not isinstance(name, str) or name not in checkers:
                    return f"IFEval has no instruction {name!r}"
                if not isinstance(given, dict) or not complete(checkers[name](name), given):
                    return f"the kwargs of {name} are not those that its checker needs"
            if random.getstate() != before:
                self.drawn.append(example["id"])

    def ungradable(self, example):
        return not has_sentence_data() and not set(BY_NLTK).isdisjoint(
            name for name in example["instruction_id_list"] if isinstance(name, str))

    def note(self) -> str:
        text = f"Graded by lm-eval {version('lm_eval')}: prompt-level strict accuracy."
        keys = lambda ids: [i.removeprefix("ifeval/") for i in ids]
        if self.drawn:
            text += (f" For {' and '.join(keys(self.drawn))} the reference draws a parameter at "
                     "random, since it does not take the one given; here each draw is always the "
                     "same.")
        if self.left_out:
            text += (f" Left out, since their check needs {self.needs}: "
                     f"{', '.join(keys(self.left_out))}.")
        return text

    def prompt(self, example) -> str:
        return example["prompt"]

    def chat(self, example) -> str:
        return example["prompt"]

    def score(self, example, completion: str) -> Score:
        grader = reference()
        asked = grader.InputExample(example["key"], example["instruction_id_list"],
                                    example["prompt"], example["kwargs"])
        try:
            with seeded(example["key"]):
                followed = grader.test_instruction_following_strict(
                    asked, completion).follow_instruction_list
        except RecursionError:  # its JSON check on thousands of brackets
            return Score(False, "the grader failed")
        return Score(all(followed), f"{sum(followed)} of {len(followed)} followed")


@contextlib.contextmanager
def seeded(seed: int):
    """Python's random numbers from `seed` on; behind it as they were before."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


def complete(checker, given: dict) -> bool:
    """Whether these are all of a checker's parameters: it draws those that it is not given."""
    given = {k: v for k, v in given.items() if v}  # as the grader calls it
    try:
        checker.build_description(**given)
        return set(given) == set(checker.get_instruction_args_keys())
    except (TypeError, ValueError, AttributeError):
        return False


@functools.cache
def reference() -> ModuleType:
    """lm_eval.tasks.ifeval.utils, imported without what lm_eval.tasks itself imports.

    Raises UserError where a package is missing.
    """
    name, rank = "lm_eval.tasks", os.environ.get("LOCAL_RANK")
    stub, before = ModuleType(name), sys.modules.get(name)
    try:
        stub.__path__ = [os.path.join(*importlib.import_module("lm_eval").__path__, "tasks")]
        import langdetect
        os.environ["LOCAL_RANK"] = "1"  # else its import may download NLTK's data
        sys.modules[name] = before or stub
        module = importlib.import_module(f"{name}.ifeval.utils")
    except ImportError as e:
        way = "--no-deps lm_eval==0.4.13" if e.name == "lm_eval" else "-r requirements-eval.txt"
        raise UserError(f"ifeval is graded by lm-eval, and the package {e.name} is missing; pip "
                        f"install {way}") from None
    finally:
        if sys.modules.get(name) is stub:
            del sys.modules[name]  # whoever imports lm_eval after this gets the whole
        os.environ.pop("LOCAL_RANK", None)
        if rank is not None:
            os.environ["LOCAL_RANK"] = rank
    logging.getLogger(f"{name}.ifeval.instructions").disabled = True  # it prints whole answers
    langdetect.DetectorFactory.seed = 0  # it samples: without a seed a short text's language varies
    return module


@functools.cache
def has_sentence_data() -> bool:
    """Whether NLTK finds the data that the checkers BY_NLTK need."""
    util = reference().instructions_registry.instructions.instructions_util
    try:
        util.count_sentences("One. Two.")
        util.nltk.word_tokenize("One. Two.")
    except LookupError:
        return False
    return True
