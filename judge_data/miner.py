"""What `make_judge_data.py mine` asks of target and draft for one line of the answers, by the
searches of mining.py and the tasks' checkers.
"""
from pathlib import Path

from checkpoint import read_config
from common import FLAG, OBJECT, TEXT, json_lines, needed, refuse, whole
from drafters.llama import LlamaDrafter
from engine import Engine
from evaluation.tasks import TASKS, missing
from judge_data import mining
from load import load_models
from ranks import job
from tokenizer import Tokenizer

ANSWER = needed(dict(prompt=TEXT, answer=TEXT, source_model=TEXT, chat=FLAG, ended=FLAG,
                     max_new_tokens=whole(1))) | dict(task=TEXT, right=FLAG, example=OBJECT)


def read_answers(path: Path) -> list[dict]:
    """The lines of `generate`, with "where"; raises UserError naming a line that is not one."""
    answers = []
    for line in json_lines(path, holding="examples", kinds=ANSWER):
        value, where = line.value, line.where
        task = value.get("task")
        refuse((not value["prompt"], f"{where}: 'prompt' is empty"),
               (task and (task not in TASKS or value.get("right") is None
                          or missing(TASKS[task], value.get("example") or {})),
                f"{where}: 'task' is {task!r}, but 'right' is missing or 'example' is none of its "
                "examples"))
        answers.append(value | {"where": where, "task": task})
    return answers


class Miner:
    """Target and draft, and what `mine` asks of them for one line of the answers."""

    def __init__(self, args, lines: list[dict]):
        self.args = args
        self.tasks = {name: task(allow_code_execution=args.allow_code_execution)
                      for name, task in TASKS.items()}
        self.tokenizer = Tokenizer.from_dir(args.target)
        context = read_config(args.target).max_seq_len
        self.prompts, longest = mining.prompts_of(self.tokenizer, lines, context)
        # However late a prefix is, the target gets as much room as a whole answer: running out of
        # room is no error.
        limit = longest + max(line["max_new_tokens"] for line in lines)
        length = max(map(len, self.prompts.values())) + limit
        # Caches grow; in autojudge the draft has a second one.
        models = load_models(args.target, args.draft, device=args.device, dtype=args.dtype,
                             speculate_k=args.speculate_k, length=lambda tokenizer: length,
                             caches=2.5 if args.draft else 1.5)
        self.draft, self.last = models.draft, None
        engine = Engine(models.target, LlamaDrafter(self.draft) if self.draft else None,
                        speculate_k=args.speculate_k)
        self.go_on = mining.Continuations(engine, self.tokenizer, limit)

    def start(self, line) -> list[int]:
        """Turn to the line's prompt, if it is another than before; returns its tokens."""
        key, task = (line["prompt"], line["chat"]), self.tasks[line["task"]]
        if key != self.last:
            self.last = key
            right = lambda text: task.score(line["example"], text).right
            self.go_on.start(self.prompts[key], lambda text: job.from_rank_0(lambda: right(text)),
                             () if line["chat"] else task.stop)
        return self.prompts[key]

    def first_error(self, line) -> list[dict] | str:
        """The judge data of an answer, or why there is none."""
        if not line["ended"] or not line["answer"]:
            return mining.UNFINISHED if line["answer"] else "empty"
        if line["right"]:
            return [mining.about(line) | {"answer": line["answer"], "error": None}]
        prompt = self.start(line)
        tokens, offsets = self.tokenizer.encode_with_offsets(line["answer"], continuation=True)
        if self.tokenizer.decode_new(prompt, tokens) != line["answer"]:
            return "the target's tokenizer gives another text back"
        at = mining.SEARCHES[self.args.search](tokens, self.go_on)
        if isinstance(at, str):
            return at
        start, end = offsets[at]
        if start == end:
            return "the error has no characters"
        return [mining.about(line) | {"answer": line["answer"], "error": [start, end]}]

    def autojudge(self, line) -> list[dict] | str:
        """The judge data of a walk through the target's own answer, or why there is none.

        One line for each swap that mattered, cut after it, and the last answer. A swap that did not
        matter is part of all that follow and counts as correct there, so it has no line of its own.
        """
        prompt, decode_new = self.start(line), self.tokenizer.decode_new
        sizes = [m.config.vocab_size for m in (self.go_on.engine.target, self.draft)]
        # An id that is padding of the draft's alone is passed over as EOS is.
        walk = mining.autojudge(self.go_on, mining.greedy_token(self.draft, prompt),
                                {*self.tokenizer.eos_ids, *range(*sizes)})
        if isinstance(walk, str):
            return walk
        last, swaps = walk
        base = mining.about(line) | {"source_model": "autojudge", "temperature": 0.0}
        lines, unimportant = [], []
        for s in swaps:
            mark = mining.characters(self.tokenizer, prompt, s.tokens, s.at)
            if mark and s.important:
                own = "" if s.instead_of is None else decode_new(prompt, [s.instead_of])
                lines.append(base | {"answer": mark[0], "error": mark[1], "instead_of": own})
            elif mark:
                unimportant.append(mark[1])
        tokens = self.tokenizer.encode(last.text, continuation=True)
        if last.text and decode_new(prompt, tokens) == last.text:
            lines.append(base | {"answer": last.text, "error": None, "unimportant": unimportant})
        return lines or "no label could be placed"

    def report(self) -> str:
        return self.go_on.report()
