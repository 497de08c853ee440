"""Accuracy beside speed: every rule on a benchmark, problem by problem, from saved answers; and
what a rule would accept of a given text.

    python eval.py --task gsm8k --data gsm8k_test.jsonl --target DIR --draft DIR --judge FILE --rules target,draft,standard,topk:3,judge --out results
    python eval.py --task gsm8k --data gsm8k_test.jsonl --out results --rescore
    python eval.py --replay gsm8k_test.jsonl --target DIR --judge FILE --rules standard,topk:3,judge

Every answer is appended to OUT/answers.jsonl as it is made, and the same command goes on where it
was cut off, even by kill -9; more rules or a higher --limit only add answers, other settings are
refused. Greedy, batch size 1, one machine without torchrun. The rules take turns on each problem,
so that a slow minute hits all of them; a tokens/s still is this machine's, with whatever else ran
on it. The prefill is not timed, scoring neither. On a GPU, or with bfloat16, passes of one and of K
+ 1 tokens round differently, so that standard can leave the target's text at a near tie; in float32
that is an error.
"""
import argparse
import functools
import hashlib
import json
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
from types import SimpleNamespace

import torch

import generate as G
import report
import tp
from cli import UserError, check_writable, replacing, run
from judge import FORMS, Judge, parse_rule
from model import DTYPES, fingerprint, read_json
from replay import read_texts, replay
from report import PLAIN
from tasks import TASKS
from tokenizer import Stream

DEFAULT = "target,draft,standard,topk:3"
# in settings.json, but no setting that answers depend on
ABOUT = ("rules", "target_name", "draft_name")
QUIET = 60.0  # seconds between progress lines where they cannot be overwritten


# ---------------------------------------------------------------- rules

def parse_rules(text: str) -> list[str]:
    """The rules of a comma-separated list, each in one spelling and once."""
    parsed = [parse_rule(item.strip(), PLAIN) for item in text.split(",")]
    return list(dict.fromkeys(name if value is None
                              else f"{name}:{int(value) if value % 1 == 0 else value}" for name,
                              value in parsed))


def engine_settings(args, **changes) -> SimpleNamespace:
    """What generate.py's functions want to know beside our own flags."""
    accept = "judge" if args.judge else "standard"
    greedy = dict(accept=accept, threshold=None, temperature=0.0, top_k=None, top_p=None, seed=0,
                  prompt="", interactive=False, max_new_tokens=1, json=None,
                  draft_dtype=args.dtype)
    return SimpleNamespace(**vars(args) | greedy | changes)


# ---------------------------------------------------------------- answers and their files

def read_answers(path: Path) -> dict:
    """{(rule, id): answer} of a file that a killed run may have left with half a line at its end;
    that line is ignored.
    """
    data = path.read_bytes() if path.exists() else b""
    answers = {}
    for i, line in enumerate(data[:data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            answer = json.loads(line)
            answers.setdefault((answer["rule"], answer["id"]), answer)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {i}: not an answer; the file is damaged, remove that "
                            "line") from None
    return answers


def write_json(path: Path, value):
    with replacing(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2) + "\n")


def sha(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def check_same(out: Path, now: dict):
    """The settings saved in `out`, or {}; raises UserError if one that both know differs from
    `now`.
    """
    path = out / "settings.json"
    if not path.exists():
        if (out / "answers.jsonl").exists():
            raise UserError(f"{out} holds answers.jsonl without settings.json, so it is not known "
                            "how they were made; take another --out")
        return {}
    saved = read_json(path)
    changed = [f"{key} was {saved[key]}, now {value}" for key, value in now.items()
               if key not in ABOUT and None not in (value, saved.get(key)) and saved[key] != value]
    if changed:
        raise UserError(f"{out} holds answers made with other settings: {'; '.join(changed)}. "
                        "Take another --out, or remove this one")
    return saved


def settings_of(args) -> dict:
    """What answers depend on, speeds included."""
    return {
        "task": args.task, "data": sha(args.data), "target": fingerprint(args.target),
        "draft": args.draft and fingerprint(args.draft),
        "judge": args.judge and sha(args.judge), "speculate_k": args.speculate_k, "chat": args.chat,
        "compile": args.compile, "processes": args.processes,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": str(args.dtype).removeprefix("torch."),
        "rules": args.rules, "target_name": args.target.resolve().name, "draft_name": args.draft
        and args.draft.resolve().name,
    }


class Log:
    """answers.jsonl, opened with the first answer: a run that is refused before leaves nothing
    behind.
    """

    def __init__(self, out: Path, settings: dict):
        self.out, self.settings, self.file = out, settings, None

    def open(self):
        self.out.mkdir(exist_ok=True)
        write_json(self.out / "settings.json", self.settings)
        self.file = open(self.out / "answers.jsonl", "ab")
        data = (self.out / "answers.jsonl").read_bytes()
        self.file.truncate(data.rfind(b"\n") + 1)  # half a line of a run that was killed

    def add(self, answer: dict):
        if self.file is None:
            self.open()
        self.file.write(json.dumps(answer).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


# ---------------------------------------------------------------- making answers

class Session:
    """The models, an engine for each rule, and the prompts: what makes answers in one process."""

    def __init__(self, args, examples: list[dict]):
        engine, self.tokenizer = G.load_engine(engine_settings(args))
        self.examples, self.task = examples, TASKS[args.task](
            allow_code_execution=args.allow_code_execution)
        self.stop = () if args.chat else self.task.stop
        self.prompts = [self.encode(e, args.chat) for e in examples]
        for e, p in zip(examples, self.prompts):
            if len(p) >= engine.context:
                raise UserError(f"the prompt of {e['id']} has {len(p)} tokens, the context "
                                f"{engine.context}; these models are too small for this task")
        self.engines = {}
        lengths = [len(p) for p in self.prompts]
        for rule in args.rules:
            name, value = parse_rule(rule, PLAIN)
            pair = {"target": (engine.target,),
                    "draft": (engine.draft,)}.get(name, (engine.target, engine.draft, engine.head,
                                                         name, value))
            self.engines[rule] = G.Engine(*pair, speculate_k=args.speculate_k)
            if args.compile:
                self.engines[rule].compile()
            # The first rounds of a process are slow; compiled ones need every span, others one.
            self.engines[rule].warm_up(min(lengths), max(lengths) + self.task.max_new_tokens
                                       if args.compile else min(lengths))

    def encode(self, example, chat: bool) -> list[int]:
        return self.tokenizer.chat([{"role": "user",
                                     "content": self.task.chat(
                                         example)}]) if chat else self.tokenizer.encode(
                                             self.task.prompt(example))

    def answer(self, rule: str, index: int) -> dict:
        """A line of answers.jsonl."""
        example, prompt, eos_ids = self.examples[index], self.prompts[index], self.tokenizer.eos_ids
        r = G.generate(self.engines[rule], prompt, self.task.max_new_tokens, eos_ids,
                       stop=stopper(self.tokenizer, prompt, self.stop))
        text = self.tokenizer.decode_new(prompt, [t for t in r.tokens if t not in eos_ids])
        text = text[:min((at for s in self.stop if (at := text.find(s)) >= 0), default=None)]
        score = self.task.score(example, text)
        return {"rule": rule, "id": example["id"], "domain": example["domain"],
                "right": score.right, "how": score.how, "tokens": r.tokens, "text": text,
                "seconds": r.seconds, "rounds": r.rounds,
                "accepted": sum(i * n for i, n in enumerate(r.accept_counts))}


def stopper(tokenizer, prompt: list[int], strings):
    """`generate`'s stop: whether the token completes one of `strings` in the new text."""
    stream, text = Stream(tokenizer, prompt), ""

    def stop(token):
        nonlocal text
        text += stream.put(token)
        return any(s in text for s in strings)

    return stop


session = None  # in a worker process: a function that gives its Session


def start_worker(args, examples):
    """One thread, which is fastest for models so small that processes help at all; the worker ends
    with its parent, however that ends.
    """
    global session
    # made with the first answer, so that what it refuses is the answer's error
    session = functools.cache(lambda: Session(args, examples))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def work(unit) -> dict:
    return session().answer(*unit)


def make_answers(args, examples, units):
    """Yield the answers to units [(rule, index of the example), ...] as they are made."""
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
    """A line on stderr: running accuracy and tokens/s of each rule, over all that was answered,
    before this run too.
    """

    def __init__(self, rules: list[str], total: int):
        self.total, self.done, self.sums, self.last = total, 0, {rule: [0, 0, 0, 0.0]
                                                                 for rule in rules}, time.monotonic()

    def add(self, answer: dict, show=True):
        s = self.sums[answer["rule"]]
        for i, x in enumerate((1, answer["right"], len(answer["tokens"]) - 1, answer["seconds"])):
            s[i] += x
        self.done += 1
        if show and (sys.stderr.isatty() or time.monotonic() - self.last > QUIET or self.done
                     == self.total):
            self.last = time.monotonic()
            self.show()

    def show(self):
        line = f"{self.done}/{self.total}  " + "  ".join(f"{rule} {right / n:.1%} "
                                                         f"{made / seconds if seconds else 0:.0f}/s"
                                                         for rule,
                                                         (n, right, made,
                                                          seconds) in self.sums.items() if n)
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="\n" if self.done == self.total else "",
                  file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def evaluate(args):
    """Make the answers that are missing, then report on all that are saved."""
    examples = load_examples(args, args.limit)
    now = settings_of(args)
    saved = check_same(args.out, now)
    settings = saved | {k: v for k, v in now.items() if v is not None or k not in saved}
    settings["rules"] = list(dict.fromkeys([*saved.get("rules", ()), *args.rules]))
    done = read_answers(args.out / "answers.jsonl")
    units = [(rule, i) for i, e in enumerate(examples) for rule in args.rules]
    missing = [unit for unit in units if (unit[0], examples[unit[1]]["id"]) not in done]
    progress, log = Progress(args.rules, len(units)), Log(args.out, settings)
    for rule, i in units:
        if answer := done.get((rule, examples[i]["id"])):
            progress.add(answer, show=False)
    if done:
        print(f"{len(units) - len(missing)} of {len(units)} answers are there already",
              file=sys.stderr)
    for answer in make_answers(args, examples, missing) if missing else ():
        log.add(answer)
        progress.add(answer)
    conclude(args.out, settings)


def rescore(args):
    """Score the saved answers anew and report on them; no model is loaded."""
    saved = check_same(args.out, {"task": args.task, "data": sha(args.data)})
    path, task = args.out / "answers.jsonl", TASKS[args.task](
        allow_code_execution=args.allow_code_execution)
    answers, examples = read_answers(path), {e["id"]: e for e in load_examples(args, limit=None)}
    if not answers:
        raise UserError(f"{args.out} holds no answers")
    for answer in answers.values():
        score = task.score(examples[answer["id"]], answer["text"])
        answer["right"], answer["how"] = score.right, score.how
    with replacing(path) as tmp:
        tmp.write_text("".join(json.dumps(a) + "\n" for a in answers.values()))
    conclude(args.out, saved)


def conclude(out: Path, settings: dict):
    """Print and write the results of all saved answers; exit code 1 if standard is not what it must
    be.
    """
    results = report.summarise(read_answers(out / "answers.jsonl"), settings)
    text = report.markdown(results)
    print(text, end="")
    write_json(out / "results.json", results)
    with replacing(out / "results.md") as tmp:
        tmp.write_text(text)
    if note := report.plot(results, out / "accuracy.png"):
        print(note, file=sys.stderr)
    if settings["dtype"] == "float32" and results["standard_equals_target"] and results[
            "standard_equals_target"]["different"]:
        print(f"error: {report.verdict(results)}. In float32 it must not differ: something is "
              "wrong with the models or with this program", file=sys.stderr)
        sys.exit(1)


def load_examples(args, limit: int | None) -> list[dict]:
    examples = TASKS[args.task](allow_code_execution=args.allow_code_execution).load(
        args.data, limit)
    if not examples:
        raise UserError(f"{args.data} holds no examples")
    return examples


def show_replay(args):
    """The rounds that each rule would have taken through the texts of a file, had they been
    drafted; a table.
    """
    texts = read_texts(args.replay, TASKS["gsm8k"](allow_code_execution=False), args.chat,
                       args.limit)
    engine, tokenizer = G.load_engine(engine_settings(args, accept="standard", judge=None))
    config, head = engine.target.config, None
    if args.judge:
        parent = config.quantization and config.quantization.parent
        head = Judge.load(args.judge, config.dim, fingerprint(args.target), str(args.target),
                          parent).to(engine.device)
    read = lambda prompt: tokenizer.chat(
        [{"role": "user", "content": prompt}]) if args.chat else tokenizer.encode(prompt)
    texts = [(where, read(prompt), tokenizer.encode(text, continuation=True)) for where, prompt,
             text in texts]
    results, total = replay(texts, engine, head, args.rules,
                            args.speculate_k), sum(len(text) for *_, text in texts)
    table = [["rule", "accepted per round", "tokens rejected"]]
    table += [[rule, f"{m['mean_accepted']:.2f}", f"{m['rejected']:.1%}"] for rule,
              m in results.items()]
    about = f"{args.replay.name}: {len(texts)} texts, {total} tokens, as drafts for {args.target.resolve().name}, K = {args.speculate_k}, greedy"
    text = f"{about}\n\n{report.table(table)}\n"
    print(text, end="")
    if args.out:
        args.out.mkdir(exist_ok=True)
        write_json(args.out / "replay.json", {"texts": len(texts), "tokens": total,
                                              "speculate_k": args.speculate_k, "rules": results})
        with replacing(args.out / "replay.md") as tmp:
            tmp.write_text(text)


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Evaluate acceptance rules: accuracy beside speed, "
                                "from saved answers.")
    p.add_argument("--task", choices=TASKS)
    p.add_argument("--data", type=Path, help="the benchmark's file, in its official format")
    p.add_argument("--target", type=Path, help="checkpoint directory")
    p.add_argument("--draft", type=Path, help="checkpoint directory of the draft")
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--rules", help="list of "
                   f"{', '.join((*PLAIN, *(r + f for r, f in FORMS.items())))} (default "
                   f"{DEFAULT}, and judge with --judge)")
    p.add_argument("--limit", type=int, help="problems (demo: of each domain); default all")
    p.add_argument("--speculate_k", type=int, default=16, help="drafted tokens per round (default "
                   "16)")
    p.add_argument("--out", type=Path, help="directory of the answers and results")
    p.add_argument("--allow_code_execution", action="store_true", help="humaneval: run what the "
                   "models write")
    p.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    p.add_argument("--compile", action="store_true", help="compile the rounds with torch.compile: "
                   "a wait at the start, then faster")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    p.add_argument("--processes", type=int, default=1, help="with more than one, of one thread "
                   "each: for models as small as the demo's")
    p.add_argument("--rescore", action="store_true", help="score the saved answers anew, without "
                   "a model; needs --task, --data and --out only")
    p.add_argument("--replay", type=Path, help="JSON Lines of prompts and texts: what the rules "
                   "would accept of the texts")
    args = p.parse_args(argv)
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    default = DEFAULT.removeprefix("target,draft,") if args.replay else DEFAULT
    args.rules = parse_rules(args.rules or default + (",judge" if args.judge else ""))
    check_args(args)
    return args


def check_args(args):
    """Everything about the flags that can be refused before a file is read."""
    names, making = {rule: parse_rule(rule, PLAIN)[0]
                     for rule in args.rules}, not (args.rescore or args.replay)
    first = lambda *wanted: next((rule for rule, name in names.items() if name in wanted), None)
    drafting = next((rule for rule, name in names.items() if name != "target"), None)
    for bad, message in (
            (args.rescore and args.replay, "--rescore and --replay exclude each other"),
            (not args.replay and not (args.task and args.data and args.out), "give --task, --data "
             "and --out"),
            (not args.rescore and not args.target, "give --target DIR"),
            (making and drafting and not args.draft, f"rule {drafting} needs --draft DIR"),
            (not args.rescore and first("judge") and not args.judge, f"rule {first('judge')} "
             "needs --judge FILE"),
            (args.replay and first("target", "draft"), "--replay: rule "
             f"{first('target', 'draft')} tests no drafts; leave it out of --rules"),
            (args.replay and first("kl") and not args.draft, f"rule {first('kl')} needs --draft "
             "DIR: it compares the draft's distribution with the target's"),
            (args.limit is not None and args.limit < 1, f"--limit is {args.limit}; it must be at "
             "least 1"),
            (args.processes < 1, f"--processes is {args.processes}; it must be at least 1"),
            (args.processes > 1 and args.device == "cuda", "--processes is for a CPU; on a GPU "
             "they would wait for each other"),
            (tp.world() > 1, "eval.py does not run under torchrun; start it with python"),
    ):
        if bad:
            raise UserError(message)
    if not args.rescore:
        G.check_args(engine_settings(args, **({"judge": None, "accept": "standard"} if args.replay
                                              else {})))
    if args.out and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; name a directory")
    if args.out:
        check_writable(args.out / "answers.jsonl" if args.out.is_dir() else args.out)


def main(argv=None):
    args = parse_args(argv)
    if args.replay:
        show_replay(args)
    elif args.rescore:
        rescore(args)
    else:
        evaluate(args)


if __name__ == "__main__":
    run(main)
