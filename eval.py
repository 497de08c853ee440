"""Accuracy beside speed: every rule on a benchmark, and what a rule would accept of a given text.

    python eval.py --task gsm8k --data gsm8k_test.jsonl --target DIR --draft DIR --judge FILE \\
        --rules target,draft,standard,topk:3,judge --out results
    python eval.py ... --draft DIR --eagle DIR --drafters llama,eagle,eagle-tree,ngram --out results
    python eval.py --task gsm8k --data gsm8k_test.jsonl --out results --rescore
    python eval.py --replay gsm8k_test.jsonl --target DIR --judge FILE --rules standard,judge

Every answer is appended to OUT/answers.jsonl as it is made, and the same command resumes where it
was cut off, even by kill -9; more rules, drafters or a higher --limit only add answers, other
settings are refused. Greedy, batch size 1; under torchrun the ranks share the models. The rules
take turns on each problem, so that a slow minute hits all of them; a tokens/s still is this
machine's, with whatever else ran on it. Neither prefill nor scoring is timed. On a GPU, or with
bfloat16, passes of one and of K + 1 tokens round differently, so that standard can leave the
target's text at a near tie; in float32 that is an error.
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
from checkpoint import fingerprint
from common import (
    FLAG,
    TEXT,
    Kind,
    Parser,
    UserError,
    check_apart,
    check_writable,
    file_hash,
    list_of,
    make_directory,
    needed,
    number,
    refuse,
    say,
    tell,
    whole,
    write_json,
    write_text,
)
from drafters.choice import (
    CHAIN,
    add_drafter_flags,
    ks_of,
    make_drafter,
    most_drafted,
    resolve_drafters,
)
from drafters.length import Auto, automatic, draft_length
from engine import Engine, Result, generate
from evaluation import report
from evaluation.replay import read_texts, replay
from evaluation.report import PLAIN, row_name, row_parts
from evaluation.tasks import TASKS, Task
from formats.answer_log import AnswerLog, saved_settings
from judge import RULES
from load import (
    Loaded,
    add_device_flags,
    dtype_name,
    eagle_hash,
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
ABOUT = "rules", "target_name", "draft_name", "eagle_name"  # settings that answers do not depend on
OPTIONAL = "draft", "judge", "eagle", "tree"  # compared only where both runs have them
WRITES = ("answers.jsonl", "settings.json", "results.json", "results.md", "accuracy.png",
          "replay.json", "replay.md")  # in --out
QUIET = 60.0  # seconds between progress lines where they cannot be overwritten


# ---------------------------------------------------------------- settings and saved answers

AUTO = Kind("auto", lambda v: v == "auto")
ANSWER = needed(dict(rule=TEXT, id=TEXT, domain=TEXT, right=FLAG, how=TEXT, text=TEXT,
                     tokens=list_of(whole(0), "ids"), seconds=number(0), rounds=whole(0),
                     accepted=whole(0)))
SETTINGS = needed(dict(task=TEXT, data=TEXT, target=TEXT, target_name=TEXT, device=TEXT, dtype=TEXT,
                       speculate_k=whole(1) | AUTO, chat=FLAG, compile=FLAG, processes=whole(1),
                       rules=list_of(TEXT, "texts"))) | dict(
    draft=TEXT, draft_name=TEXT, judge=TEXT, ranks=whole(1), eagle=TEXT, eagle_name=TEXT, tree=TEXT)


def settings_of(args) -> dict:
    """What answers depend on, speeds included, and ABOUT: the content of settings.json."""
    return {
        "task": args.task, "data": file_hash(args.data), "target": fingerprint(args.target),
        "draft": args.draft and fingerprint(args.draft),
        "judge": args.judge and file_hash(args.judge),
        "speculate_k": "auto" if auto(args) else args.speculate_k or CHAIN,
        "chat": args.chat, "compile": args.compile, "processes": args.processes,
        "ranks": job.world() if job.world() > 1 else None,  # None: as before there were ranks
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "dtype": dtype_name(args.dtype), "rules": args.rows,
        "target_name": args.target.resolve().name,
        "draft_name": args.draft and args.draft.resolve().name,
    } | settings_of_eagle(args)


def settings_of_eagle(args) -> dict:
    """Only where they matter, so that files without an EAGLE head stay as they were."""
    found = {}
    if args.eagle:
        found |= {"eagle": eagle_hash(args.eagle), "eagle_name": args.eagle.resolve().name}
    if "eagle-tree" in args.drafters:
        found["tree"] = str(args.tree)
    return found


def k_of(args, drafter: str) -> int:
    """K of a drafter's rounds."""
    return ks_of(drafter, args.tree, given_k(args))[0]


def given_k(args) -> list[int]:
    return [args.speculate_k] if args.speculate_k else []


def auto(args) -> bool:
    return isinstance(args.speculate_k, Auto)


def saved_answers(log: AnswerLog) -> dict:
    """{(rule, id): answer} of answers.jsonl."""
    answers = {}
    for line in log.lines:
        answers.setdefault((line.value["rule"], line.value["id"]), line.value)
    return answers


def make_task(args) -> Task:
    return TASKS[args.task](allow_code_execution=args.allow_code_execution)


# ---------------------------------------------------------------- making answers

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
        self.examples, self.task = examples, make_task(args)
        self.stop = () if args.chat else self.task.stop
        ask = self.task.chat if args.chat else self.task.prompt

        def longest(tokenizer):
            self.prompts = [tokenizer.prompt(ask(e), args.chat) for e in examples]
            return max(map(len, self.prompts)) + self.task.max_new_tokens

        # Every row has caches of its own, and one of them may be growing.
        self.models = load_what_rules_need(args, longest, len(args.rows) + 0.5)
        self.tokenizer = self.models.tokenizer
        self.engines = {row: self.engine(row, args) for row in args.rows}
        context = min(e.context for e in self.engines.values())
        for e, p in zip(examples, self.prompts):
            if len(p) >= context:
                raise UserError(f"the prompt of {e['id']} has {len(p)} tokens, the context "
                                f"{context}; these models are too small for this task")
        lengths = [len(p) for p in self.prompts]
        longest = max(lengths) + self.task.max_new_tokens
        for engine in self.engines.values():
            if args.compile:
                graphs.compile_engine(engine)
            # The first rounds of a process are slow; compiled ones need every span, others one.
            graphs.warm_up(engine, min(lengths), longest if args.compile else min(lengths))

    def engine(self, row: str, args) -> Engine:
        (rule, drafter), (target, draft, head, _, eagle) = row_parts(row), self.models
        if drafter is None:
            return Engine({"target": target, "draft": draft}[rule])
        k = k_of(args, drafter)
        drafter, chooser = automatic(make_drafter(drafter, target, draft, eagle, args.tree), k)
        return Engine(target, drafter, head, speculate_k=k, chooser=chooser,
                      **engine_rule(rule, self.tokenizer))

    def generate(self, row: str, index: int) -> Result:
        prompt = self.prompts[index]
        return generate(self.engines[row], prompt, self.task.max_new_tokens,
                        self.tokenizer.eos_ids, stop=stop_check(self.tokenizer, prompt, self.stop))

    def answer(self, row: str, index: int) -> dict:
        """A line of answers.jsonl."""
        r, example, prompt = self.generate(row, index), self.examples[index], self.prompts[index]
        eos_ids = self.tokenizer.eos_ids
        text = self.tokenizer.decode_new(prompt, [t for t in r.tokens if t not in eos_ids])
        text = cut_at_stop(text, self.stop)
        score = self.task.score(example, text)
        return {"rule": row, "id": example["id"], "domain": example["domain"],
                "right": score.right, "how": score.how, "tokens": r.tokens, "text": text,
                "seconds": r.seconds, "rounds": r.rounds,
                "accepted": sum(i * n for i, n in enumerate(r.accept_counts))}


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
    """Yield the answers to units [(row, index of the example), ...] as they are made."""
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

    def __init__(self, rows: list[str], total: int):
        self.total, self.done, self.last = total, 0, time.monotonic()
        self.sums = {row: [0, 0, 0, 0.0] for row in rows}  # answers, right, tokens, seconds

    def add(self, answer: dict, show=True):
        new = 1, answer["right"], len(answer["tokens"]) - 1, answer["seconds"]
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
                line += f"  {rule} {right / n:.1%} {speed:.0f}/s"
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
    examples, now = make_task(args).load(args.data, args.limit), settings_of(args)
    path, about = args.out / "answers.jsonl", args.out / "settings.json"
    saved = saved_settings(about, path, now, ABOUT, OPTIONAL, SETTINGS)
    settings = saved | {k: v for k, v in now.items() if v is not None or k not in saved}
    settings["rules"] = list(dict.fromkeys([*saved.get("rules", ()), *args.rows]))
    log = AnswerLog(path, settings, about, kinds=ANSWER)
    done = saved_answers(log)
    units = [(row, i) for i, e in enumerate(examples) for row in args.rows]
    progress, missing = Progress(args.rows, len(units)), []
    for row, i in units:
        if answer := done.get((row, examples[i]["id"])):
            progress.add(answer, show=False)
        else:
            missing.append((row, i))
    if done:
        tell(f"{progress.done} of {len(units)} answers are there already")
    job.broadcast((examples, missing))
    for answer in make_answers(args, examples, missing) if missing else ():
        make_directory(args.out)
        log.append(answer)
        progress.add(answer)
    log.close()
    conclude(args.out, saved_answers(log), settings)


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
    saved = saved_settings(args.out / "settings.json", path,
                           {"task": args.task, "data": file_hash(args.data)}, kinds=SETTINGS)
    log = AnswerLog(path, kinds=ANSWER)
    answers, examples = saved_answers(log), {e["id"]: e for e in task.load(args.data)}
    refuse((not answers, f"{args.out} holds no answers"),
           *((i not in examples, f"{path} has an answer to {i}, which {args.data} has not")
             for _, i in answers))
    log.open()  # refused while a run still adds to it
    for answer in answers.values():
        score = task.score(examples[answer["id"]], answer["text"])
        answer["right"], answer["how"] = score.right, score.how
    log.check()  # nobody else's line is written over
    write_text(path, "".join(json.dumps(a) + "\n" for a in answers.values()))
    log.close()
    conclude(args.out, answers, saved)


def conclude(out: Path, answers: dict, settings: dict):
    """Print and write the results of all saved answers {(rule, id): answer}.

    Exit code 1 if standard left the target's text in float32.
    """
    results = report.summarise(answers, settings)
    text = report.markdown(results)
    write_json(out / "results.json", results)
    write_text(out / "results.md", text)
    note = report.plot(results, out / "accuracy.png")
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
    """Print and write the rounds that each rule would take through a file's texts as drafts."""
    texts = job.from_rank_0(
        lambda: read_texts(args.replay, TASKS["gsm8k"](), args.chat, args.limit))

    def longest(tokenizer):
        texts[:] = [(where, tokenizer.prompt(prompt, args.chat),
                     tokenizer.encode(text, continuation=True)) for where, prompt, text in texts]
        return max(len(prompt) + len(text) for _, prompt, text in texts)

    k = args.speculate_k or CHAIN
    models = load_what_rules_need(args, longest, rows=math.inf)
    results = replay(texts, models, args.rules, k)
    if job.rank():
        return
    total = sum(len(text) for *_, text in texts)
    table = report.table([["rule", "accepted per round", "tokens rejected"], *(
        [rule, f"{m['mean_accepted']:.2f}", f"{m['rejected']:.1%}"]
        for rule, m in results.items())])
    text = (f"{args.replay.name}: {len(texts)} texts, {total} tokens, as drafts for "
            f"{args.target.resolve().name}, K = {k}, greedy\n\n{table}\n")
    if args.out:
        make_directory(args.out)
        write_json(args.out / "replay.json", {"texts": len(texts), "tokens": total,
                                              "speculate_k": k, "rules": results})
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
    p.add_argument("--replay", type=Path, help="JSON Lines of prompts and texts: what the rules "
                   "would accept of the texts")
    args = p.parse_args(argv)
    plain = () if args.replay else PLAIN if args.draft else PLAIN[:1]
    default = [*plain, DEFAULT, *(judged if args.judge else ())]
    args.rules = rule_list(args.rules or ",".join(default), PLAIN)
    check_args(args)
    return args


def check_args(args):
    """Refuse what can be refused before a file is read; resolves the device."""
    table = {rule: RULES.get(parse_rule(rule, PLAIN)[0]) for rule in args.rules}  # None: PLAIN
    first = lambda holds: next((rule for rule, row in table.items() if holds(row)), None)
    plain, making = first(lambda row: row is None), not (args.rescore or args.replay)
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
        (args.limit is not None and args.limit < 1,
         f"--limit is {args.limit}; it must be at least 1"),
        (args.processes < 1, f"--processes is {args.processes}; it must be at least 1"),
        (args.processes > 1 and args.device == "cuda",
         "--processes is for a CPU; on a GPU they would wait for each other"),
        (args.processes > 1 and job.world() > 1,
         "--processes and torchrun exclude each other; leave one of them out"),
        (args.rescore and job.world() > 1, "--rescore runs no model; start it with python"),
        (making and args.judge and not (args.draft or args.eagle or args.drafters),
         "--judge needs --draft: the judge says which drafted tokens to accept"),
        (args.replay and (args.drafters or args.eagle or args.tree), "--replay takes its texts for "
         "the drafts; leave out --drafters, --eagle and --tree"),
        (args.replay and auto(args), "--speculate_k auto chooses how much is drafted, and --replay "
         "drafts nothing; give a number"),
        (args.speculate_k is not None and args.speculate_k < 1,
         f"--speculate_k is {args.speculate_k}; it must be at least 1"),
        (args.out and args.out.exists() and not args.out.is_dir(),
         f"--out {args.out} is a file; name a directory"))
    resolve_drafters(args, speculating if making else [], given_k(args))
    args.rows = [row for rule in args.rules for row in (
        [row_name(rule, name) for name in args.drafters] if rule in speculating else [rule])]
    if not args.rescore:
        resolve_device(args)
        if args.compile:
            graphs.check_compiler(args.device)
    if args.out:
        check_writable(args.out / "answers.jsonl" if args.out.is_dir() else args.out)
        check_apart({f"--out's {name}:": args.out / name for name in WRITES}, {
            "--data": args.data, "--replay": args.replay, "--target": args.target,
            "--draft": args.draft, "--judge": args.judge, "--eagle": args.eagle})


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
