"""Make the judge's training data: answers of several models, their errors found by the target, one
training and one validation file.

    python make_judge_data.py generate --prompts gsm8k_train.jsonl --models DIR DIR --temperatures 0,0.7 --samples 2 --out answers.jsonl
    python make_judge_data.py mine --data answers.jsonl --target DIR --method first_error --out mined.jsonl
    python make_judge_data.py mine --data answers.jsonl --target DIR --draft DIR --method autojudge --out autojudge.jsonl
    python make_judge_data.py merge mined.jsonl autojudge.jsonl --train train.jsonl --val val.jsonl

Every answer is on disk as it is made, and the same command goes on where it was cut off, even by
kill -9. Answers are texts, so models of any tokenizers can give them; the target reads them with
its own. `mine` needs a checker that says whether an answer is right, so prompts of no benchmark
(Alpaca's) are for marking by hand. Batch size 1, one process, no torchrun.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import generate as G
import mining
import tp
from cli import UserError, check_writable, replacing, run
from eval import sha, stopper
from log import Log
from model import DTYPES, ModelConfig, fingerprint, load
from tasks import TASKS, missing, read_lines
from tokenizer import Tokenizer
from train_judge import label_tokens, read_data, split

MAX_NEW_TOKENS = 512  # of an answer to a prompt of no task


# ---------------------------------------------------------------- generate

def read_prompts(args) -> list[dict]:
    """{"where", "task", "example", "text"} of each prompt, the format told by the first line; the
    first --limit of each domain.
    """
    lines = read_lines(args.prompts)
    name = args.task or next((name for name, task in TASKS.items()
                              if not missing(task, lines[0][1])), None)
    if name:
        task = TASKS[name](allow_code_execution=args.allow_code_execution)
        ask = task.chat if args.chat else task.prompt
        prompts = [{"where": where, "task": name, "example": e, "text": ask(e)} for (where, _),
                   e in zip(lines, task.load(args.prompts))]
    else:
        prompts = [plain(where, line) for where, line in lines]
    counts, kept = {}, []
    for p in prompts:
        domain = p["example"]["domain"]
        counts[domain] = counts.get(domain, 0) + 1
        if args.limit is None or counts[domain] <= args.limit:
            kept.append(p)
    return kept


def plain(where: str, line: dict) -> dict:
    """A prompt without a checker: {"prompt"}, {"turns": [first, ...]}, or Alpaca's {"instruction",
    "input"}.
    """
    turns = line.get("turns")
    text, kind = line.get("prompt"), "prompt"
    if text is None and isinstance(turns, list) and turns:
        text, kind = turns[0], "alpaca"
    elif text is None and isinstance(line.get("instruction"), str):
        text, kind = "\n\n".join(filter(None, (line["instruction"], line.get("input")))), "alpaca"
    if not isinstance(text, str) or not text:
        raise UserError(f'{where}: no prompt in it; a line has "prompt", "turns" or '
                        f'"instruction", or is one of {", ".join(TASKS)}')
    domain = line.get("domain") or line.get("category") or kind
    return {"where": where, "task": None, "example": {"id": f"line {where.rsplit(' ', 1)[1]}",
                                                      "domain": str(domain)}, "text": text}


def names_of(directories: list[Path]) -> dict[str, Path]:
    """The shortest ends of the paths that tell the models apart, never a whole path of this
    machine.
    """
    paths = list(dict.fromkeys(d.resolve() for d in directories))
    length = 1
    while len(names := {"/".join(p.parts[-length:]): p for p in paths}) < len(paths):
        length += 1
    return names


def encode(tokenizer, text: str, chat: bool) -> list[int]:
    return tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)


def check_fit(prompts: list[dict], models: dict[str, Path], chat: bool):
    """Refuse a prompt that leaves no room for an answer, before any model is loaded."""
    for name, directory in models.items():
        tokenizer, context = Tokenizer.from_dir(directory), ModelConfig.from_dir(
            directory).max_seq_len
        for p in prompts:
            if (length := len(encode(tokenizer, p["text"], chat))) >= context:
                raise UserError(f"{p['where']}: the prompt has {length} tokens for {name}, whose "
                                f"context is {context}; shorten or drop it")


def generate(args):
    """Every model's answers to every prompt, those that are not there yet."""
    prompts, models = read_prompts(args), names_of(args.models)
    check_fit(prompts, models, args.chat)
    log = Log(args.out, {
        "prompts": sha(args.prompts), "task": prompts[0]["task"], "chat": args.chat,
        "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        "device": args.device, "dtype": str(args.dtype).removeprefix("torch."),
        "models": {name: fingerprint(d) for name, d in models.items()}})
    key = lambda a: (a["source_model"], a["id"], a["temperature"], a["sample"])
    done = {key(a) for a in log.lines()}
    settings = [(t, sample) for t in args.temperatures
                for sample in range(args.samples if t else 1)]
    total = len(models) * len(prompts) * len(settings)
    with tqdm(total=total, unit="answer", disable=None) as bar:
        for name, directory in models.items():
            units = [(p, t, sample) for p in prompts for t, sample in settings
                     if (name, p["example"]["id"], t, sample) not in done]
            bar.update(len(prompts) * len(settings) - len(units))
            bar.set_description(name)
            for line in answers(args, name, directory, units) if units else ():
                log.add(line)
                bar.update()
    lines = log.lines()
    right = [a["right"] for a in lines if "right" in a]
    print(f"{len(lines):,} answers to {len({a['id'] for a in lines}):,} prompts, "
          f"{sum(not a['ended'] for a in lines):,} of them cut off"
          + (f", {sum(right):,} of {len(right):,} right" if right else "") + f" -> {args.out}")


def answers(args, name: str, directory: Path, units):
    """Yield a model's answers to units [(prompt, temperature, number of the sample), ...]; each has
    a seed of its own, so any order gives the same.
    """
    tokenizer, engine = Tokenizer.from_dir(directory), G.Engine(load(directory, args.device,
                                                                     args.dtype))
    for p, temperature, sample in units:
        example, task = p["example"], TASKS[p["task"]](
            allow_code_execution=args.allow_code_execution) if p["task"] else None
        stops, length = () if args.chat or not task else task.stop, args.max_new_tokens or (
            task.max_new_tokens if task else MAX_NEW_TOKENS)
        seed = int.from_bytes(hashlib.sha256(
            f"{args.seed} {example['id']} {temperature} {sample}".encode()).digest()[:7], "big")
        engine.rng.manual_seed(seed)
        engine.settings = dataclasses.replace(engine.settings, temperature=temperature)
        prompt = encode(tokenizer, p["text"], args.chat)
        tokens = G.generate(engine, prompt, length, tokenizer.eos_ids,
                            stop=stopper(tokenizer, prompt, stops)).tokens
        whole = tokenizer.decode_new(prompt, [t for t in tokens if t not in tokenizer.eos_ids])
        text = whole[:min((at for s in stops if (at := whole.find(s)) >= 0), default=None)]
        line = {"prompt": p["text"], "answer": text, "source_model": name,
                "domain": example["domain"], "id": example["id"], "task": p["task"],
                "temperature": temperature, "sample": sample, "seed": seed, "chat": args.chat,
                "max_new_tokens": length,
                "ended": tokens[-1] in tokenizer.eos_ids or len(text) < len(whole)}
        if task:
            score = task.score(example, text)
            line |= {"right": score.right, "how": score.how, "example": example}
        yield line


# ---------------------------------------------------------------- mine

def read_answers(path: Path) -> list[dict]:
    """The lines of `generate`, with "where"; raises UserError naming a line that is not one."""
    kinds = {"prompt": str, "answer": str, "source_model": str, "chat": bool, "ended": bool,
             "max_new_tokens": int}
    lines = []
    for where, line in read_lines(path):
        task = line.get("task")
        kinds_here = kinds | ({"right": bool, "example": dict} if task else {})
        bad = next((key for key, kind in kinds_here.items() if not isinstance(line.get(key), kind)),
                   None)
        if bad or not line["prompt"]:
            raise UserError(f"{where}: {bad or 'prompt'!r} is missing or not what `generate` "
                            "writes there")
        if task and (task not in TASKS or missing(TASKS[task], line["example"])):
            raise UserError(f"{where}: 'task' is {task!r}, but 'example' is none of its examples")
        lines.append(line | {"where": where})
    return lines


class Miner:
    """Target and draft, and what `mine` asks of them for one line of the answers."""

    def __init__(self, args, lines: list[dict]):
        self.args = args
        self.tasks = {name: task(allow_code_execution=args.allow_code_execution) for name,
                      task in TASKS.items()}
        tokenizer, context = Tokenizer.from_dir(args.target), ModelConfig.from_dir(
            args.target).max_seq_len
        self.prompts, longest = {}, 0
        for line in lines:
            key = line["prompt"], line["chat"]
            if key not in self.prompts:
                self.prompts[key] = encode(tokenizer, *key)
            prompt, answer = len(self.prompts[key]), len(
                tokenizer.encode(line["answer"], continuation=True))
            if prompt + answer >= context:
                raise UserError(f"{line['where']}: prompt and answer have {prompt + answer} "
                                f"tokens, the target's context is {context}; drop the line")
            longest = max(longest, answer)
        engine, self.tokenizer = G.load_engine(SimpleNamespace(
            target=args.target, draft=args.draft, judge=None, accept="standard", threshold=None,
            speculate_k=args.speculate_k,
            temperature=0.0, top_k=None, top_p=None, seed=0, device=args.device, dtype=args.dtype,
            draft_dtype=args.dtype))
        # However late it sets in, the target may go on for as long as a whole answer: running out
        # of room is no error.
        self.go_on = mining.Continuations(engine, self.tokenizer,
                                          longest + max(line["max_new_tokens"] for line in lines))
        self.draft, self.last = engine.draft, None

    def start(self, line) -> list[int]:
        """Turn to the line's prompt, if it is another than before; its tokens."""
        key, task = (line["prompt"], line["chat"]), self.tasks[line["task"]]
        if key != self.last:
            self.last = key
            self.go_on.start(self.prompts[key],
                             lambda text: task.score(line["example"], text).right,
                             () if line["chat"] else task.stop)
        return self.prompts[key]

    def first_error(self, line) -> list[dict] | str:
        """The judge data of an answer, or why there is none."""
        if not line["ended"] or not line["answer"]:
            return mining.UNFINISHED if line["answer"] else "empty"
        if line["right"]:
            return [about(line) | {"answer": line["answer"], "error": None}]
        prompt = self.start(line)
        tokens, offsets = self.tokenizer.encode_with_offsets(line["answer"], continuation=True)
        if self.tokenizer.decode_new(prompt, tokens) != line["answer"]:
            return "the target's tokenizer gives another text back"
        at = mining.SEARCHES[self.args.search](tokens, self.go_on)
        if isinstance(at, str):
            return at
        start, end = offsets[at]
        return [about(line) | {"answer": line["answer"],
                               "error": [start,
                                         end]}] if start < end else "the error has no characters"

    def autojudge(self, line) -> list[dict] | str:
        """The judge data of a walk through the target's own answer: one line for each swap that
        mattered, cut after it, and the last answer.

        A swap that did not matter has no line of its own, for it is part of all that follow, where
        it counts as correct.
        """
        prompt = self.start(line)
        walk = mining.autojudge(self.go_on, mining.drafter(self.draft, prompt),
                                self.tokenizer.eos_ids)
        if isinstance(walk, str):
            return walk
        last, swaps = walk
        base = about(line) | {"source_model": "autojudge", "temperature": 0.0}
        found = [(mining.characters(self.tokenizer, prompt, s.tokens, s.at), s) for s in swaps]
        own = lambda s: "" if s.instead_of is None else self.tokenizer.decode_new(
            prompt, [s.instead_of])
        lines = [base | {"answer": mark[0], "error": mark[1], "instead_of": own(s)} for mark,
                 s in found if mark and s.important]
        unimportant = [mark[1] for mark, s in found if mark and not s.important]
        tokens = self.tokenizer.encode(last.text, continuation=True)
        if last.text and self.tokenizer.decode_new(prompt, tokens) == last.text:
            lines.append(base | {"answer": last.text, "error": None, "unimportant": unimportant})
        return lines or "no label could be placed"


def about(line) -> dict:
    """What judge data keeps of an answer's line."""
    return {key: line[key] for key in ("prompt", "source_model", "domain", "id", "task",
                                       "temperature", "chat") if key in line}


def mine(args):
    """Label what can be labelled.

    The labels are gathered beside --out, which is written when all are there.
    """
    lines = read_answers(args.data)
    with_checker = [line for line in lines if line["task"]]
    if not with_checker:
        raise UserError(f"{args.data} has no answers of a task with a checker "
                        f"({', '.join(TASKS)}); such answers have to be marked by hand")
    if not args.allow_code_execution and any(line["task"] == "humaneval" for line in with_checker):
        raise UserError(f"{args.data} has answers of humaneval, which runs what the models write: "
                        "read what sandbox.py protects from, "
                        "then give --allow_code_execution")
    left_out = {"no checker": len(lines) - len(with_checker)} if len(lines) > len(
        with_checker) else {}
    group = {}
    for line in with_checker:
        # one prompt's answers together: they share the cache
        group.setdefault((line["prompt"], line["chat"]), []).append(line)
    units = [line for same in group.values()
             for line in (same[:1] if args.method == "autojudge" else same)]
    log = Log(args.out.with_name(args.out.name + ".part"), {
        "data": sha(args.data), "method": args.method, "search": args.search, "device": args.device,
        "dtype": str(args.dtype).removeprefix("torch."),
        "models": {name: fingerprint(d) for name,
                   d in (("target", args.target), ("draft", args.draft)) if d}})
    results = log.lines()
    if len(results) < len(units):
        miner = Miner(args, with_checker)
        with tqdm(units[len(results):], initial=len(results), total=len(units), desc=args.method,
                  disable=None) as bar:
            for line in bar:
                result = getattr(miner, args.method)(line)
                results.append({"left_out": result} if isinstance(result, str)
                               else {"lines": result})
                log.add(results[-1])
        print(miner.go_on.report())
    found = [line for r in results for line in r.get("lines", ())]
    for r in results:
        if reason := r.get("left_out"):
            left_out[reason] = left_out.get(reason, 0) + 1
    write_lines({args.out: found})
    log.remove()
    print(f"{len(found):,} lines of {len(units):,} "
          f"{'prompts' if args.method == 'autojudge' else 'answers'}, "
          f"{sum(line['error'] is not None for line in found):,} with an error -> {args.out}")
    if left_out:
        print("left out: " + "; ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items())))


# ---------------------------------------------------------------- merge

def write_lines(files: dict[Path, list[dict]]):
    """Write files of JSON Lines, each whole; one that cannot be written leaves the others as they
    were.
    """
    with contextlib.ExitStack() as stack:
        for path, lines in files.items():
            stack.enter_context(replacing(path)).write_text(
                "".join(json.dumps(line) + "\n" for line in lines))


def merge(args):
    """One training and one validation file of several, no prompt in both; where the same answer
    comes twice, the first file's mark stands.
    """
    first, again, otherwise = {}, 0, 0
    for path in args.files:
        for e in read_data(path):
            key = e["prompt"], e["answer"]
            again += key in first
            otherwise += key in first and first[key]["error"] != e["error"]
            first.setdefault(key, e)
    examples = list(first.values())
    held = split(examples, args.val_share, args.seed).tolist()
    parts = {"train": [e for e, h in zip(examples, held) if not h],
             "val": [e for e, h in zip(examples, held) if h]}
    for name, part in parts.items():
        if not part:
            raise UserError("there is one prompt only; a split by prompt needs at least two")
        if all(e["error"] is None for e in part):
            raise UserError(f"no answer of the {name} part has an error marked, and a judge "
                            "learns from both kinds: add wrong answers, "
                            "such as a weaker model's or some at a higher temperature, or try "
                            "another --seed or --val_share")
    tokenizer = Tokenizer.from_dir(args.target) if args.target else None
    table = [summary(name, part, tokenizer) for name, part in parts.items()]
    plain = lambda part: [{k: v for k, v in e.items() if k not in ("where", "line")} for e in part]
    write_lines({args.train: plain(parts["train"]), args.val: plain(parts["val"])})
    print("\n".join(table))
    if again:
        print(f"{again:,} answers came twice and were dropped, {otherwise:,} of them marked "
              "otherwise than the first time")


def summary(name: str, part: list[dict], tokenizer) -> str:
    """A line about a file: answers, what they hold by `label_tokens` (without a tokenizer: of
    characters), domains.
    """
    labels, domains = [], {}
    for e in part:
        pieces = tokenizer.encode_with_offsets(e["answer"], continuation=True)[
            1] if tokenizer else [(i, i + 1) for i in range(len(e["answer"]))]
        labels += label_tokens(pieces, e["error"])
        domains[str(e.get("domain"))] = domains.get(str(e.get("domain")), 0) + 1
    return (f"{name:5} {len({e['prompt'] for e in part}):7,} prompts {len(part):8,} answers "
            f"{sum(e['error'] is not None for e in part):7,} with an error "
            f"{len(labels):10,} {'tokens' if tokenizer else 'characters'} {labels.count(0):7,} "
            "negative   "
            + ", ".join(f"{d} {n:,}" for d, n in sorted(domains.items())))


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Make judge data: answers of several models, labels "
                                "mined or merged.")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="answers of several models")
    g.add_argument("--prompts", type=Path, required=True, help='JSON Lines, also gzipped: '
                   f'{", ".join(TASKS)}, Alpaca, or {{"prompt"}}')
    g.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR",
                   help="checkpoint directories")
    g.add_argument("--out", type=Path, required=True)
    g.add_argument("--temperatures", default="0,0.7", help="list; 0 is greedy (default 0,0.7)")
    g.add_argument("--samples", type=int, default=1, help="answers at each temperature above 0 "
                   "(default 1)")
    g.add_argument("--task", choices=TASKS, help="the prompts' benchmark (default: told by the "
                   "first line)")
    g.add_argument("--limit", type=int, help="prompts of each domain; default all")
    g.add_argument("--max_new_tokens", type=int, help="default: the task's, without one "
                   f"{MAX_NEW_TOKENS}")
    g.add_argument("--chat", action="store_true", help="use the checkpoints' chat templates")
    g.add_argument("--seed", type=int, default=0)
    m = commands.add_parser("mine", help="labels from the answers and a checker, without a human")
    m.add_argument("--data", type=Path, required=True, help="the file that generate wrote")
    m.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    m.add_argument("--draft", type=Path, help="checkpoint directory of the draft: autojudge swaps "
                   "its tokens in, and the target goes on faster with it")
    m.add_argument("--method", choices=("first_error", "autojudge"), required=True)
    m.add_argument("--search", choices=mining.SEARCHES, help="first_error: scan finds the first "
                   "error, bisect one of perhaps several "
                   "in fewer questions (default scan)")
    m.add_argument("--speculate_k", type=int, default=8, help="drafted tokens per round (default "
                   "8)")
    m.add_argument("--out", type=Path, required=True, help="judge data")
    for c in (g, m):
        c.add_argument("--allow_code_execution", action="store_true", help="humaneval: run what "
                       "the models write")
        c.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       choices=("cpu", "cuda"))
        c.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    j = commands.add_parser("merge", help="judge data into a training and a validation file")
    j.add_argument("files", type=Path, nargs="+", metavar="FILE")
    j.add_argument("--train", type=Path, required=True)
    j.add_argument("--val", type=Path, required=True)
    j.add_argument("--val_share", type=float, default=0.15, help="share of the prompts for "
                   "validation (default 0.15)")
    j.add_argument("--seed", type=int, default=0)
    j.add_argument("--target", type=Path, help="checkpoint directory whose tokenizer counts the "
                   "tokens; without it characters are counted")
    args = p.parse_args(argv)
    if args.command != "merge":
        args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    if args.command == "generate":
        args.temperatures = temperatures(args.temperatures)
    check_args(args)
    if args.command == "mine" and args.method == "first_error":
        args.search = args.search or "scan"
    return args


def temperatures(text: str) -> list[float]:
    try:
        values = list(dict.fromkeys(float(t) for t in text.split(",")))
        if all(0 <= t < math.inf for t in values):
            return values
    except ValueError:
        pass
    raise UserError(f"--temperatures is {text!r}; give numbers from 0 (greedy) up, separated by "
                    "commas")


def check_args(args):
    """Everything about the flags that can be refused before a file is read."""
    a = SimpleNamespace(**{"samples": 1, "limit": None, "max_new_tokens": None, "speculate_k": 1,
                           "method": None, "draft": 1, "search": None,
                           "val_share": 0.5, "train": 0, "val": 1, "device": "cpu"} | vars(args))
    for bad, message in (
            (a.samples < 1, f"--samples is {a.samples}; it must be at least 1"),
            (a.limit is not None and a.limit < 1, f"--limit is {a.limit}; it must be at least 1"),
            (a.max_new_tokens is not None and a.max_new_tokens < 1, "--max_new_tokens is "
             f"{a.max_new_tokens}; it must be at least 1"),
            (a.speculate_k < 1, f"--speculate_k is {a.speculate_k}; it must be at least 1"),
            (a.method == "autojudge" and not a.draft, "--method autojudge needs --draft DIR: its "
             "tokens are swapped in"),
            (a.method == "autojudge" and a.search, "--search is for --method first_error; leave "
             "it out"),
            (not 0 < a.val_share < 1, f"--val_share is {a.val_share}; it must be between 0 and 1"),
            (a.train == a.val, "--train and --val are the same file"),
            (a.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this PyTorch "
             "sees no CUDA device; use --device cpu"),
            (tp.world() > 1, "make_judge_data.py does not run under torchrun; start it with "
             "python"),
    ):
        if bad:
            raise UserError(message)
    for path in (args.train, args.val) if args.command == "merge" else (args.out,):
        check_writable(path)


def main(argv=None):
    args = parse_args(argv)
    {"generate": generate, "mine": mine, "merge": merge}[args.command](args)


if __name__ == "__main__":
    run(main)
