"""Accuracy beside speed: every rule on a benchmark, and what a rule would accept of a given text.

    python eval.py --task gsm8k --data gsm8k_test.jsonl --target DIR --draft DIR --judge FILE \\
        --rules target,draft,standard,topk:3,judge --out results
    python eval.py ... --draft DIR --eagle DIR --drafters llama,eagle,eagle-tree,ngram --out results
    python eval.py ... --temperature 0.7 --top_p 0.95 --samples 8 --out sampled
    python eval.py --task gsm8k --data gsm8k_test.jsonl --out results --rescore
    python eval.py --replay gsm8k_test.jsonl --target DIR --judge FILE --rules standard,judge

Every answer is appended to OUT/answers.jsonl as it is made, and the same command resumes where it
was cut off, even by kill -9; more rules, drafters, --samples or a higher --limit only add answers,
other settings are refused. Greedy or sampled, batch size 1; under torchrun the ranks share the
models. A sampled answer has a seed of its own, made of --seed, its problem and its number. The
rules take turns on each problem, so that a slow minute hits all of them; a tokens/s still is this
machine's, with whatever else ran on it. Neither prefill nor scoring is timed. On a GPU, or with
bfloat16, passes of one and of K + 1 tokens round differently, so that standard can leave the
target's text at a near tie; in greedy float32 that is an error.
"""
import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch

import graphs
from common import (
    Parser,
    UserError,
    check_apart,
    check_writable,
    make_directory,
    refuse,
    say,
    tell,
    write_json,
    write_text,
)
from drafters.choice import (
    CHAIN,
    add_drafter_flags,
    check_rules,
    ks_of,
    make_drafter,
    most_drafted,
    resolve_drafters,
)
from drafters.length import Auto, automatic, draft_length
from engine import Engine, Result, generate
from evaluation import report
from evaluation.replay import read_texts, replay, shown
from evaluation.report import PLAIN, row_name, row_parts
from evaluation.saved import (
    SETTINGS,
    answer_kinds,
    length,
    resume,
    sampled,
    saved_answers,
)
from evaluation.task import Task
from evaluation.tasks import TASKS
from evaluation.turns import messages, questions, write_fastchat
from formats.answer_log import AnswerLog, saved_settings, seed_of
from judge import RULES
from load import (
    Loaded,
    add_device_flags,
    engine_rule,
    load_models,
    parse_rule,
    resolve_device,
    rule_forms,
    rule_list,
)
from ranks import job
from tokenizer import cut_at_stop, stop_check

DEFAULT = "standard,topk:3"  # rules, after PLAIN and before those that need the judge
WRITES = ("answers.jsonl", "settings.json", "results.json", "results.md", "accuracy.png",
          "replay.json", "replay.md")  # in --out
QUIET = 60.0  # seconds between progress lines where they cannot be overwritten


# ---------------------------------------------------------------- making answers

def make_task(args) -> Task:
    return TASKS[args.task](allow_code_execution=args.allow_code_execution)


def k_of(args, drafter: str) -> int:
    """K of a drafter's rounds."""
    return ks_of(drafter, args.tree, given_k(args))[0]


def given_k(args) -> list[int]:
    return [args.speculate_k] if args.speculate_k else []


def load_what_rules_need(args, length, caches=1.0, rows=None) -> Loaded:
    judged = any(RULES[name].needs_judge for rule in args.rules
                 if (name := parse_rule(rule, PLAIN)[0]) not in PLAIN)
    drafted = args.replay or "llama" in args.drafters or "draft" in args.rules
    headed = any(name.startswith("eagle") for name in args.drafters)
    return load_models(args.target, args.draft if drafted else None, args.judge if judged else None,
                       args.device, args.dtype, length=length, caches=caches, rows=rows,
                       speculate_k=most_drafted(args.drafters, args.tree, given_k(args)),
                       eagle=args.eagle if headed else None)


class Session:
    """The models, an engine for each row, and the prompts: what makes answers in one process."""

    def __init__(self, args, examples: list[dict]):
        self.args, self.examples, self.task = args, examples, make_task(args)
        self.stop, self.room = () if args.chat else self.task.stop, length(args, self.task)
        ask = self.task.chat if args.chat else self.task.prompt
        self.asked = [questions(self.task, ask(e), e) for e in examples]

        def longest(tokenizer):
            self.prompts = [self.prompt(tokenizer, asked[:1], []) for asked in self.asked]
            return max(self.lengths(tokenizer)) + self.room

        # Every row has caches of its own, and one of them may be growing.
        self.models = load_what_rules_need(args, longest, len(args.rows) + 0.5)
        self.tokenizer = self.models.tokenizer
        self.engines = {row: self.engine(row, args) for row in args.rows}
        context = min(e.context for e in self.engines.values())
        most = self.lengths(self.tokenizer)
        for e, n, asked in zip(examples, most, self.asked):
            refuse((n >= context and asked[1:], f"the last prompt of {e['id']} may have {n} tokens "
                    f"with the answers before it, the context {context}; lower --max_new_tokens"),
                   (n >= context, f"the prompt of {e['id']} has {n} tokens, the context "
                    f"{context}; these models are too small for this task"))
        shortest, longest = min(map(len, self.prompts)), max(most) + self.room
        for engine in self.engines.values():
            if args.compile:
                graphs.compile_engine(engine)
            # The first rounds of a process are slow; compiled ones need every span, others one.
            graphs.warm_up(engine, shortest, longest if args.compile else shortest)

    def prompt(self, tokenizer, asked: list[str], answers: list[str]) -> list[int]:
        """Ids of the chat so far, or of the first prompt."""
        return tokenizer.chat(messages(asked, answers)) if answers else tokenizer.prompt(
            asked[0], self.args.chat)

    def lengths(self, tokenizer) -> list[int]:
        """Tokens of each example's last prompt, if the answers before it are as long as may be."""
        last = (self.prompt(tokenizer, asked, [""] * (len(asked) - 1)) if asked[1:] else prompt
                for asked, prompt in zip(self.asked, self.prompts))
        return [len(ids) + self.room * (len(asked) - 1) for ids, asked in zip(last, self.asked)]

    def engine(self, row: str, args) -> Engine:
        (rule, drafter), (target, draft, head, _, eagle) = row_parts(row), self.models
        sampling = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
        if drafter is None:
            return Engine({"target": target, "draft": draft}[rule], **sampling)
        k = k_of(args, drafter)
        drafter, chooser = automatic(make_drafter(drafter, target, draft, eagle, args.tree), k)
        return Engine(target, drafter, head, speculate_k=k, chooser=chooser, **sampling,
                      **engine_rule(rule, self.tokenizer))

    def generate(self, row: str, index: int, sample=0) -> tuple[list[str], list[Result]]:
        """The answer to a problem, and how it was made: of each turn."""
        engine, example, eos_ids = self.engines[row], self.examples[index], self.tokenizer.eos_ids
        engine.rng.manual_seed(seed_of(self.args.seed, example["id"], sample))
        asked, answers, results, prompt = self.asked[index][:1], [], [], self.prompts[index]
        while True:
            r = generate(engine, prompt, self.room, eos_ids,
                         stop=stop_check(self.tokenizer, prompt, self.stop))
            text = self.tokenizer.decode_new(prompt, [t for t in r.tokens if t not in eos_ids])
            answers.append(cut_at_stop(text, self.stop))
            results.append(r)
            if (more := self.task.follow_up(example, answers)) is None:
                return answers, results
            asked = [*asked, more]
            prompt = self.prompt(self.tokenizer, asked, answers)

    def answer(self, row: str, index: int, sample=0) -> dict:
        """A line of answers.jsonl."""
        (texts, results), example = self.generate(row, index, sample), self.examples[index]
        score = self.task.score(example, texts[-1])
        return {"rule": row, "id": example["id"], "domain": example["domain"],
                **({"sample": sample} if sampled(self.args) else {}),
                "right": score.right, "how": score.how,
                "tokens": [t for r in results for t in r.tokens], "text": texts[-1],
                **({"turns": texts} if len(texts) > 1 else {}),
                "seconds": sum(r.seconds for r in results),
                "rounds": sum(r.rounds for r in results),
                "accepted": sum(i * n for r in results for i, n in enumerate(r.accept_counts))}


session = None  # in a worker process: a function that returns its Session


def start_worker(args, examples):
    """Set up a worker process, which ends with its parent, however that ends.

    It runs one thread: fastest for models so small that processes help at all.
    """
    global session
    # Made with the first answer, so that what it refuses becomes the answer's error.
    session = functools.cache(lambda: Session(args, examples))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def work(unit) -> dict:
    return session().answer(*unit)


def make_answers(args, examples, units):
    """Yield the answers to units [(row, index of the example, sample), ...] as they are made."""
    if args.processes == 1:
        here = Session(args, examples)
        yield from (here.answer(*unit) for unit in units)
        return
    pool = ProcessPoolExecutor(args.processes, get_context("spawn"), start_worker, (args, examples))
    try:
        for future in as_completed([pool.submit(work, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool:
        raise UserError("a process died, perhaps of too little memory; its siblings' answers are "
                        "kept: run again with fewer --processes") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Progress:
    """A line on stderr: accuracy and tokens/s of each row over all answers, saved ones too."""

    def __init__(self, rows: list[str], total: int, graded: bool):
        self.total, self.graded, self.done, self.last = total, graded, 0, time.monotonic()
        self.sums = {row: [0, 0, 0, 0.0] for row in rows}  # answers, right, tokens, seconds

    def add(self, answer: dict, show=True):
        new = 1, bool(answer["right"]), len(answer["tokens"]) - 1, answer["seconds"]
        self.sums[answer["rule"]] = [a + b for a, b in zip(self.sums[answer["rule"]], new)]
        self.done += 1
        due = time.monotonic() - self.last > QUIET or self.done == self.total
        if show and (due or sys.stderr.isatty()):
            self.last = time.monotonic()
            self.show()

    def show(self):
        line = f"{self.done}/{self.total}"
        for rule, (n, right, tokens, seconds) in self.sums.items():
            if n:
                speed = tokens / seconds if seconds else 0
                line += f"  {rule}" + f" {right / n:.1%}" * self.graded + f" {speed:.0f}/s"
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="\n" if self.done == self.total else "",
                  file=sys.stderr, flush=True)
        else:
            tell(line)


def evaluate(args):
    """Make the answers that are missing, then report on all that are saved."""
    if job.rank():
        return generate_along(args)
    task = make_task(args)
    task.check()
    examples = task.load(args.data, args.limit)
    two = next((e["id"] for e in examples if task.follow_up(e, [""]) is not None), None)
    refuse((two and not args.chat, f"{two} asks again after the first answer, which a base model "
            "cannot tell from more text; give --chat"))
    known = examples if task.graded else task.load(args.data)  # read now: a bad line is no surprise
    log, settings = resume(args, task)
    done = saved_answers(log)
    units = [(row, i, sample) for i, e in enumerate(examples) for sample in range(args.samples)
             for row in args.rows]
    progress, missing = Progress(args.rows, len(units), task.graded), []
    for row, i, sample in units:
        if answer := done.get((row, examples[i]["id"], sample)):
            progress.add(answer, show=False)
        else:
            missing.append((row, i, sample))
    if done:
        tell(f"{progress.done} of {len(units)} answers are there already")
    job.broadcast((examples, missing))
    for answer in make_answers(args, examples, missing) if missing else ():
        make_directory(args.out)
        log.append(answer)
        progress.add(answer)
    log.close()
    conclude(args, task, {e["id"]: e for e in known}, saved_answers(log), settings)


def generate_along(args):
    """What the other ranks do: rank 0 alone scores the answers and saves them."""
    examples, units = job.broadcast()
    if units:
        session = Session(args, examples)
        for unit in units:
            session.generate(*unit)


def rescore(args):
    """Score the saved answers anew and report on them; no model is loaded."""
    path, task = args.out / "answers.jsonl", make_task(args)
    task.check()
    saved = saved_settings(args.out / "settings.json", path,
                           {"task": args.task, "data": task.fingerprint(args.data)},
                           kinds=SETTINGS)
    log = AnswerLog(path, kinds=answer_kinds(task))
    answers, examples = saved_answers(log), {e["id"]: e for e in task.load(args.data)}
    refuse((not answers, f"{args.out} holds no answers"),
           *((i not in examples, f"{path} has an answer to {i}, which {args.data} has not")
             for _, i, _ in answers))
    log.open()  # refused while a run still adds to it
    for answer in answers.values():
        score = task.score(examples[answer["id"]], answer["text"])
        answer["right"], answer["how"] = score.right, score.how
    log.check()  # nobody else's line is written over
    write_text(path, "".join(json.dumps(a) + "\n" for a in answers.values()))
    log.close()
    conclude(args, task, examples, answers, saved)


def conclude(args, task: Task, examples: dict, answers: dict, settings: dict):
    """Print and write the results of all saved answers {(rule, id, sample): answer}.

    Exit code 1 if greedy standard left the target's text in float32.
    """
    results = report.summarise(answers, settings, task.note(), task.left_out)
    text = report.markdown(results)
    write_json(args.out / "results.json", results)
    write_text(args.out / "results.md", text)
    if not task.graded:
        write_fastchat(args.out / "model_answer", answers, examples, settings["target"])
    note = report.plot(results, args.out / "accuracy.png")
    say(text.removesuffix("\n"))
    if note:
        tell(note)
    same = results["standard_equals_target"]
    if settings["dtype"] == "float32" and same and same["different"]:
        tell(f"error: {report.verdict(results)}. In float32 it must not differ: something is "
             "wrong with the models or with this program")
        sys.exit(1)


# ---------------------------------------------------------------- replay

def show_replay(args):
    """Print and write the rounds that each rule would take through files' texts as drafts."""
    files = job.from_rank_0(lambda: [
        read_texts(path, TASKS["gsm8k"](), args.chat, args.limit) for path in args.replay])

    def longest(tokenizer):
        for texts in files:
            texts[:] = [(where, tokenizer.prompt(prompt, args.chat),
                         tokenizer.encode(text, continuation=True))
                        for where, prompt, text in texts]
        return max(len(prompt) + len(text) for texts in files for _, prompt, text in texts)

    models = load_what_rules_need(args, longest, rows=math.inf)
    results = [{"file": path.name} | replay(texts, models, args.rules, args.k)
               for path, texts in zip(args.replay, files)]
    if job.rank():
        return
    text = "\n".join(shown(r, args.target.resolve().name) for r in results)
    if args.out:
        make_directory(args.out)
        write_json(args.out / "replay.json", results[0] if len(results) == 1 else results)
        write_text(args.out / "replay.md", text)
    say(text.removesuffix("\n"))


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    judged = [name for name, rule in RULES.items() if rule.needs_judge]
    p = Parser(
        description="Evaluate acceptance rules: accuracy beside speed, from saved answers.")
    p.add_argument("--task", choices=TASKS)
    p.add_argument("--data", type=Path, help="the benchmark's file, in its official format")
    p.add_argument("--target", type=Path, help="checkpoint directory")
    p.add_argument("--draft", type=Path, help="checkpoint directory of the draft")
    add_drafter_flags(p)
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--rules", help=f"list of {', '.join(rule_forms(PLAIN))} (default "
                   f"{','.join(PLAIN)},{DEFAULT}, without draft where there is no --draft, and "
                   f"{' and '.join(judged)} with --judge)")
    p.add_argument("--limit", type=int, help="problems (demo: of each domain); default all")
    p.add_argument("--speculate_k", type=draft_length, help=f"drafted tokens per round (default "
                   f"{CHAIN}; a tree brings its own), or auto: as many as pay, measured")
    p.add_argument("--max_new_tokens", type=int, help="of an answer, or of each turn of it "
                   "(default the task's)")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, help="sample among the top K tokens only")
    p.add_argument("--top_p", type=float, help="sample among the top tokens of this mass only")
    p.add_argument("--seed", type=int, default=0, help="of the samples")
    p.add_argument("--samples", type=int, default=1, help="answers to each problem, of each row: "
                   "accuracy is their mean, and pass@k is reported")
    p.add_argument("--out", type=Path, help="directory of the answers and results")
    p.add_argument("--allow_code_execution", action="store_true",
                   help="humaneval: run what the models write")
    p.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    p.add_argument("--compile", action="store_true", help="compile the rounds with torch.compile: "
                   "a wait at the start, then faster")
    add_device_flags(p)
    p.add_argument("--processes", type=int, default=1,
                   help="with more than one, of one thread each: for models as small as the demo's")
    p.add_argument("--rescore", action="store_true", help="score the saved answers anew, without "
                   "a model; needs --task, --data and --out only")
    p.add_argument("--replay", type=Path, nargs="+", help="JSON Lines files of prompts and texts: "
                   "what the rules would accept of the texts")
    args = p.parse_args(argv)
    plain = () if args.replay else PLAIN if args.draft else PLAIN[:1]
    default = [*plain, DEFAULT, *(judged if args.judge else ())]
    args.rules = rule_list(args.rules or ",".join(default), PLAIN)
    check_args(args)
    return args


def check_args(args):
    """Refuse what can be refused before a file is read; resolves the device, K and the rows."""
    table = {rule: RULES.get(parse_rule(rule, PLAIN)[0]) for rule in args.rules}  # None: PLAIN
    first = lambda holds: next((rule for rule, row in table.items() if holds(row)), None)
    plain, making = first(lambda row: row is None), not (args.rescore or args.replay)
    args.k = "auto" if isinstance(args.speculate_k, Auto) else args.speculate_k or CHAIN
    judged = first(lambda row: row and row.needs_judge)
    comparing = first(lambda row: row and row.needs_draft_logits)
    speculating = [rule for rule, row in table.items() if row]
    refuse(
        (args.rescore and args.replay, "--rescore and --replay exclude each other"),
        (not args.replay and not (args.task and args.data and args.out),
         "give --task, --data and --out"),
        (not args.rescore and not args.target, "give --target DIR"),
        (making and "draft" in table and not args.draft, "rule draft needs --draft DIR"),
        (not args.rescore and judged and not args.judge, f"rule {judged} needs --judge FILE"),
        (args.replay and plain,
         f"--replay: rule {plain} tests no drafts; leave it out of --rules"),
        (args.replay and comparing and not args.draft, f"rule {comparing} needs --draft DIR: it "
         "compares the draft's distribution with the target's"),
        *((value is not None and value < 1, f"--{flag} is {value}; it must be at least 1")
          for flag in ("limit", "processes", "max_new_tokens", "samples", "top_k")
          for value in [getattr(args, flag)]),
        (not 0 <= args.temperature < math.inf,
         f"--temperature is {args.temperature}; it must be 0 (greedy) or above"),
        (args.top_p is not None and not 0 < args.top_p <= 1,
         f"--top_p is {args.top_p}; it must be above 0 and at most 1"),
        (args.seed < 0, f"--seed is {args.seed}; it must be 0 or above"),
        *((value and not sampled(args), f"--{flag} {value} needs --temperature above 0: greedy "
           "answers are all the same") for flag, value in (
               ("samples", args.samples > 1 and args.samples), ("top_k", args.top_k),
               ("top_p", args.top_p))),
        (args.processes > 1 and args.device == "cuda",
         "--processes is for a CPU; on a GPU they would wait for each other"),
        (args.processes > 1 and job.world() > 1,
         "--processes and torchrun exclude each other; leave one of them out"),
        (args.rescore and job.world() > 1, "--rescore runs no model; start it with python"),
        (making and args.judge and not (args.draft or args.eagle or args.drafters),
         "--judge needs --draft: the judge says which drafted tokens to accept"),
        (args.replay and (args.drafters or args.eagle or args.tree), "--replay takes its texts for "
         "the drafts; leave out --drafters, --eagle and --tree"),
        (args.replay and sampled(args), "--replay is greedy; leave out --temperature"),
        (args.replay and args.k == "auto", "--speculate_k auto chooses how much is drafted, and "
         "--replay drafts nothing; give a number"),
        (args.speculate_k is not None and args.speculate_k < 1,
         f"--speculate_k is {args.speculate_k}; it must be at least 1"),
        (args.out and args.out.exists() and not args.out.is_dir(),
         f"--out {args.out} is a file; name a directory"))
    rules = {rule: parse_rule(rule) for rule in speculating}
    if args.replay:
        check_rules(rules, [], [args.speculate_k or CHAIN], greedy=True)
    resolve_drafters(args, rules if making else {}, given_k(args), not sampled(args))
    args.rows = [row for rule in args.rules for row in (
        [row_name(rule, name) for name in args.drafters] if rule in speculating else [rule])]
    if not args.rescore:
        resolve_device(args)
        if args.compile:
            graphs.check_compiler(args.device)
    if args.out:
        check_writable(args.out / "answers.jsonl" if args.out.is_dir() else args.out)
        check_apart({f"--out's {name}:": args.out / name for name in WRITES}, {
            "--data": args.data, "--target": args.target, "--draft": args.draft,
            "--judge": args.judge, "--eagle": args.eagle,
            **{f"--replay {path}": path for path in args.replay or ()}})


def main(argv=None):
    args = parse_args(argv)
    if args.replay:
        show_replay(args)
    elif args.rescore:
        rescore(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    job.run(main)
