"""Make the judge's training data: answers of several models, their errors found by the target, one
training and one validation file.

    python make_judge_data.py generate --prompts gsm8k_train.jsonl --models DIR DIR \\
        --temperatures 0,0.7 --samples 2 --out answers.jsonl
    python make_judge_data.py mine --data answers.jsonl --target DIR --method first_error \\
        --out mined.jsonl
    python make_judge_data.py mine --data answers.jsonl --target DIR --draft DIR \\
        --method autojudge --out autojudge.jsonl
    python make_judge_data.py mine --data open.jsonl --target DIR --draft DIR \\
        --method selfjudge --out selfjudge.jsonl
    python make_judge_data.py merge mined.jsonl autojudge.jsonl --train train.jsonl --val val.jsonl

Every answer is on disk as it is made; after any kill the same command resumes. Answers are texts,
so they can come from models with any tokenizers; the target reads them with its own. first_error
and autojudge need a checker that says whether an answer is right; selfjudge needs none, so prompts
may be open ones (Alpaca's), and takes what the target itself wrote greedily. Batch size 1; under
torchrun the ranks share each model.
"""
import contextlib
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import fingerprint, read_config
from common import (
    OBJECT,
    TEXT,
    Line,
    Parser,
    UserError,
    check_apart,
    check_writable,
    file_hash,
    json_lines,
    list_of,
    needed,
    number,
    refuse,
    replacing,
    say,
    tell,
    visible,
    whole,
)
from drafters.eagle_head import is_eagle
from engine import Engine, generate
from evaluation.tasks import TASKS, missing
from formats.answer_log import AnswerLog, saved_settings, seed_of
from judge import COLDEST
from judge_data import mining
from judge_data.data import labelled, read_data, split
from judge_data.miner import ANSWER, Miner, read_answers
from judge_data.selfjudge import SelfJudge
from load import (
    add_device_flags,
    dtype_name,
    eagle_hash,
    load_model,
    read_vocabulary,
    resolve_device,
    run_whole,
)
from ranks import job
from ranks.memory import check_memory, reserved
from tokenizer import Tokenizer, cut_at_stop, stop_check

PLAIN = "none"  # as --task: prompts without a checker, whatever else a line holds
GRADED = [name for name, task in TASKS.items() if task.graded]
MAX_NEW_TOKENS = 512  # of an answer to a prompt of no task
BOUND, WINDOW = 0.4, 32  # of selfjudge: chosen on 60 prompts of the demo, see RESULTS.md
SAVED = ANSWER | needed(dict(id=TEXT, temperature=number(0), sample=whole(0)))
MINED = dict(left_out=TEXT, lines=list_of(OBJECT, "objects"))


def open_log(path: Path, settings: dict, kinds) -> AnswerLog:
    """The log at `path`; models may join those of earlier runs, other settings must be the same."""
    about = path.with_name(path.name + ".settings.json")
    saved = saved_settings(about, path, settings, ignored=("models",), kinds={"models": OBJECT})
    old, new = saved.get("models", {}), settings["models"]
    changed = [f"model {name} was {old[name]}, now {value}"
               for name, value in new.items() if old.get(name, value) != value]
    changed += [f"model {before} is now called {name}" for name, value in new.items()
                for before in old
                if old[before] == value and before not in new and name not in old]
    if changed:
        raise UserError(f"{path} was made with other settings: {'; '.join(changed)}. Take another "
                        "--out, or remove this one")
    return AnswerLog(path, settings | {"models": old | new}, about, kinds=kinds)


# ---------------------------------------------------------------- generate

def read_prompts(args) -> list[dict]:
    """{"where", "task", "example", "text"} of the first --limit prompts of each domain.

    The first line tells the format.
    """
    lines = json_lines(args.prompts, holding="examples") if args.task in (None, PLAIN) else ()
    name = args.task or next((name for name in GRADED if not missing(TASKS[name], lines[0].value)),
                             PLAIN)
    if name != PLAIN:
        task = TASKS[name](allow_code_execution=args.allow_code_execution)
        task.check()
        ask = task.chat if args.chat else task.prompt
        prompts = [{"where": task.places[e["id"]].where, "task": name, "example": e,
                    "text": ask(e)} for e in task.load(args.prompts, args.limit)]
        if task.left_out:
            tell(f"{len(task.left_out):,} prompts are left out. {task.note()}")
    else:
        prompts = [plain(line) for line in lines]
    counts, kept = Counter(), []
    for p in prompts:
        counts[p["example"]["domain"]] += 1
        if args.limit is None or counts[p["example"]["domain"]] <= args.limit:
            kept.append(p)
    return kept


def plain(line: Line) -> dict:
    """A prompt without a checker, as `read_prompts` gives it.

    From {"prompt"}, {"turns": [first, ...]}, or Alpaca's {"instruction", "input"}.
    """
    value, kind = line.value, "alpaca"
    turns, instruction = value.get("turns"), value.get("instruction")
    if (text := value.get("prompt")) is not None:
        kind = "prompt"
    elif isinstance(turns, list) and turns:
        text = turns[0]
    elif isinstance(instruction, str) and isinstance(more := value.get("input") or "", str):
        text = "\n\n".join(filter(None, (instruction, more)))
    if not isinstance(text, str) or not text:
        raise UserError(f'{line.where}: no prompt in it; a line has "prompt", "turns" or '
                        f'"instruction", or is one of {", ".join(GRADED)}')
    domain = str(value.get("domain") or value.get("category") or kind)
    return {"where": line.where, "task": None, "text": text,
            "example": {"id": f"line {line.number}", "domain": domain}}


def names_of(directories: list[Path]) -> dict[str, Path]:
    """{name: directory}: the shortest ends of the paths that tell the models apart.

    Never a whole path of this machine.
    """
    paths = list(dict.fromkeys(d.resolve() for d in directories))
    length = 1
    while len(names := {"/".join(p.parts[-length:]): p for p in paths}) < len(paths):
        length += 1
    return names


def check_fit(prompts: list[dict], models: dict[str, Path], chat: bool):
    """Refuse a prompt that leaves no room for an answer, before any model is loaded."""
    for name, directory in models.items():
        tokenizer = Tokenizer.from_dir(directory)
        context = read_config(directory).max_seq_len
        for p in prompts:
            if (length := len(tokenizer.prompt(p["text"], chat))) >= context:
                raise UserError(f"{p['where']}: the prompt has {length} tokens for {name}, whose "
                                f"context is {context}; shorten or drop it")


def make_answers(args):
    """Add every model's answers to every prompt, those that are not there yet."""
    if job.rank():
        while work := job.broadcast():  # scoring and saving is rank 0's alone
            for _ in answers(args, *work):
                pass
        return
    prompts, models = read_prompts(args), names_of(args.models)
    check_fit(prompts, models, args.chat)
    name = prompts[0]["task"]
    log = open_log(args.out, {
        "prompts": TASKS[name]().fingerprint(args.prompts) if name else file_hash(args.prompts),
        "task": name, "chat": args.chat,
        "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        "device": torch.device(args.device).type,
        "dtype": dtype_name(args.dtype),
        "models": {name: fingerprint(d) for name, d in models.items()}}, SAVED)
    done = {(a["source_model"], a["id"], a["temperature"], a["sample"]) for a in log.values}
    settings = [(t, sample) for t in args.temperatures
                for sample in range(args.samples if t else 1)]
    each = len(prompts) * len(settings)
    with tqdm(total=len(models) * each, unit="answer", disable=None) as bar:
        for i, name in enumerate(models):
            units = [(p, t, sample) for p in prompts for t, sample in settings
                     if (name, p["example"]["id"], t, sample) not in done]
            bar.update(each - len(units))
            bar.set_description(visible(name))
            if units:
                job.broadcast((i, units))
            for line in answers(args, i, units) if units else ():
                log.append(line)
                bar.update()
    job.broadcast()
    if log.end() > log.size:
        log.open()  # writes the line end that a kill left out
    log.close()
    lines = log.values
    right = [a["right"] for a in lines if a.get("right") is not None]
    say(f"{len(lines):,} answers to {len({a['id'] for a in lines}):,} prompts, "
        f"{sum(not a['ended'] for a in lines):,} of them cut off"
        + (f", {sum(right):,} of {len(right):,} right" if right else "") + f" -> {args.out}")


def answers(args, i: int, units):
    """Yield the answers of model i to units [(prompt, temperature, number of the sample), ...].

    Each has its own seed, so the order changes nothing. Ranks above 0 generate and yield nothing.
    """
    name, directory = list(names_of(args.models).items())[i]
    config, tokenizer = read_vocabulary(directory)
    whole = run_whole(name, config, args.device, args.dtype)
    longest = max(len(tokenizer.prompt(p["text"], args.chat)) + room(args, p) for p, *_ in units)
    check_memory({name: (config, args.dtype, whole)}, reserved(longest, config.max_seq_len), 1,
                 args.device, caches=1.5)
    engine = Engine(load_model(directory, config, args.device, args.dtype, whole))
    for p, temperature, sample in units:
        example, task, stops, length = p["example"], None, (), room(args, p)
        if p["task"]:
            task = TASKS[p["task"]](allow_code_execution=args.allow_code_execution)
            stops = () if args.chat else task.stop
        seed = seed_of(args.seed, example["id"], temperature, sample)
        engine.rng.manual_seed(seed)
        engine.settings = dataclasses.replace(engine.settings, temperature=temperature)
        prompt = tokenizer.prompt(p["text"], args.chat)
        tokens = generate(engine, prompt, length, tokenizer.eos_ids,
                          stop=stop_check(tokenizer, prompt, stops)).tokens
        if job.rank():
            continue
        whole = tokenizer.decode_new(prompt, [t for t in tokens if t not in tokenizer.eos_ids])
        text = cut_at_stop(whole, stops)
        line = {"prompt": p["text"], "answer": text, "source_model": name,
                "domain": example["domain"], "id": example["id"], "task": p["task"],
                "temperature": temperature, "sample": sample, "seed": seed, "chat": args.chat,
                "max_new_tokens": length,
                "ended": tokens[-1] in tokenizer.eos_ids or len(text) < len(whole)}
        if task:
            score = task.score(example, text)
            line |= {"right": score.right, "how": score.how, "example": example}
        yield line


def room(args, prompt: dict) -> int:
    """Tokens that an answer may have."""
    default = TASKS[prompt["task"]].max_new_tokens if prompt["task"] else MAX_NEW_TOKENS
    return args.max_new_tokens or default


# ---------------------------------------------------------------- mine

def labels(args, lines: list[dict], todo: list[dict]):
    """Yield the judge data of the answers `todo` one by one, or why there is none; then report."""
    miner = (SelfJudge if args.method == "selfjudge" else Miner)(args, lines)
    for line in todo:
        yield getattr(miner, args.method)(line)
    print(miner.report())


def check_tasks(args, lines: list[dict]):
    """Refuse answers that cannot be graded here, before any model is loaded."""
    tasks = {name: TASKS[name](allow_code_execution=args.allow_code_execution)
             for name in dict.fromkeys(line["task"] for line in lines)}
    for task in tasks.values():
        task.check()
    for line in lines:
        task = tasks[line["task"]]
        refuse((task.ungradable(line["example"]), f"{line['where']}: an answer of {task.name}, "
                f"whose check needs {task.needs}"))


def mine(args):
    """Label what can be labelled.

    The labels are gathered beside --out, which is written when all are there.
    """
    if job.rank():
        if work := job.broadcast():
            for _ in labels(args, *work):
                pass
        return
    lines = read_answers(args.data)
    usable = lines if args.method == "selfjudge" else [a for a in lines if a["task"]]
    refuse(
        (not usable, f"{args.data} has no answers of a task with a checker ({', '.join(GRADED)}); "
         "such answers have to be marked by hand, or by --method selfjudge"),
        (args.method != "selfjudge" and not args.allow_code_execution
         and any(a["task"] == "humaneval" for a in usable),
         f"{args.data} has answers of humaneval, which runs what the models write: read what "
         "evaluation/sandbox.py protects from, then give --allow_code_execution"))
    if args.method != "selfjudge":
        check_tasks(args, usable)
    group = {}
    for line in usable:  # one prompt's answers together: they share the cache
        group.setdefault((line["prompt"], line["chat"]), []).append(line)
    units = [line for same in group.values()
             for line in (same[:1] if args.method == "autojudge" else same)]
    log = open_log(args.out.with_name(args.out.name + ".part"), {
        "data": file_hash(args.data), "method": args.method, "search": args.search,
        "bound": args.bound, "window": args.window, "misfits": args.misfits,
        "device": torch.device(args.device).type, "dtype": dtype_name(args.dtype),
        "models": {name: (eagle_hash if is_eagle(d) else fingerprint)(d)
                   for name, d in (("target", args.target), ("draft", args.draft)) if d}}, MINED)
    results = log.values
    todo = units[len(results):]
    job.broadcast(todo and (usable, todo))
    if todo:
        with tqdm(labels(args, usable, todo), initial=len(results), total=len(units),
                  desc=args.method, disable=None) as bar:
            for result in bar:
                key = "left_out" if isinstance(result, str) else "lines"
                results.append({key: result})
                log.append(results[-1])
    found = [line for r in results for line in r.get("lines", ())]
    write_lines({args.out: found})
    log.remove()
    say(f"{len(found):,} lines of {len(units):,} "
        f"{'prompts' if args.method == 'autojudge' else 'answers'}, "
        f"{sum(line.get('error') is not None for line in found):,} with an error -> {args.out}")
    left_out = Counter(r["left_out"] for r in results if "left_out" in r)
    if without := len(lines) - len(usable):
        left_out["no checker"] = without
    if left_out:
        say("left out: " + "; ".join(f"{n:,} {reason}" for reason, n in sorted(left_out.items())))


# ---------------------------------------------------------------- merge

def write_lines(files: dict[Path, list[dict]]):
    """Write files of JSON Lines, each whole.

    One that cannot be written leaves the others as they were.
    """
    with contextlib.ExitStack() as stack:
        for path, lines in files.items():
            stack.enter_context(replacing(path)).write_text(
                "".join(json.dumps(line) + "\n" for line in lines))


def merge(args):
    """One training and one validation file of several, no prompt in both.

    Where the same answer comes twice, the first file's mark stands.
    """
    first, again, otherwise = {}, 0, 0
    for path in args.files:
        for e in read_data(path):
            key = e["prompt"], e["answer"]
            again += key in first
            otherwise += key in first and first[key]["error"] != e["error"]
            first.setdefault(key, e)
    examples = list(first.values())
    held = split(examples, args.val_share, args.seed)
    parts = {"train": [e for e, h in zip(examples, held) if not h],
             "val": [e for e, h in zip(examples, held) if h]}
    for name, part in parts.items():
        if not part:
            raise UserError("there is one prompt only; a split by prompt needs at least two")
        if all(e["error"] is None for e in part):
            raise UserError(f"no answer of the {name} part has an error marked, and a judge "
                            "learns from both kinds: add wrong answers, such as a weaker model's "
                            "or some at a higher temperature, or try another --seed or "
                            "--val_share")
    tokenizer = Tokenizer.from_dir(args.target) if args.target else None
    rows = [summary(name, part, tokenizer) for name, part in parts.items()]
    plain = lambda part: [{k: v for k, v in e.items() if k not in ("where", "line")} for e in part]
    write_lines({args.train: plain(parts["train"]), args.val: plain(parts["val"])})
    say("\n".join(rows))
    if again:
        say(f"{again:,} answers came twice and were dropped, {otherwise:,} of them marked "
            "otherwise than the first time")


def summary(name: str, part: list[dict], tokenizer: Tokenizer | None) -> str:
    """A line about a file: answers, labels by `labelled`, domains.

    Without a tokenizer the labels are those of single characters.
    """
    labels = []
    for e in part:
        spans = [(i, i + 1) for i in range(len(e["answer"]))]
        if tokenizer:
            _, spans = tokenizer.encode_with_offsets(e["answer"], continuation=True)
        labels += labelled(spans, e)[1]
    domains = sorted(Counter(str(e.get("domain")) for e in part).items())
    return (f"{name:5} {len({e['prompt'] for e in part}):7,} prompts {len(part):8,} answers "
            f"{sum(e['error'] is not None for e in part):7,} with an error "
            f"{len(labels):10,} {'tokens' if tokenizer else 'characters'} "
            f"{labels.count(0):7,} negative   " + ", ".join(f"{d} {n:,}" for d, n in domains))


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Make judge data: answers of several models, labels "
                                "mined or merged.")
    commands = p.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="answers of several models")
    g.add_argument("--prompts", type=Path, required=True,
                   help=f'JSON Lines, also gzipped: {", ".join(GRADED)}, Alpaca, or {{"prompt"}}')
    g.add_argument("--models", type=Path, nargs="+", required=True, metavar="DIR",
                   help="checkpoint directories")
    g.add_argument("--out", type=Path, required=True)
    g.add_argument("--temperatures", default="0,0.7", help="list; 0 is greedy (default 0,0.7)")
    g.add_argument("--samples", type=int, default=1,
                   help="answers at each temperature above 0 (default 1)")
    g.add_argument("--task", choices=[*GRADED, PLAIN],
                   help=f"the prompts' benchmark, or {PLAIN}, which grades no answer (default: "
                   "told by the first line)")
    g.add_argument("--limit", type=int, help="prompts of each domain; default all")
    g.add_argument("--max_new_tokens", type=int,
                   help=f"default: the task's, without one {MAX_NEW_TOKENS}")
    g.add_argument("--chat", action="store_true", help="use the checkpoints' chat templates")
    g.add_argument("--seed", type=int, default=0)
    m = commands.add_parser("mine", help="labels from the answers and a checker, without a human")
    m.add_argument("--data", type=Path, required=True, help="the file that generate wrote")
    m.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    m.add_argument("--draft", type=Path,
                   help="checkpoint directory of the draft, for selfjudge also of an EAGLE head: "
                   "autojudge and selfjudge swap in its tokens; the target writes faster with it")
    m.add_argument("--method", choices=("first_error", "autojudge", "selfjudge"), required=True,
                   help="the first two need answers with a checker, the last only the target's "
                   "own greedy ones")
    m.add_argument("--search", choices=mining.SEARCHES,
                   help="first_error: scan finds the first error, bisect one of perhaps several "
                   "in fewer questions (default scan)")
    m.add_argument("--bound", type=float,
                   help="selfjudge: a swapped token is an error if it and what follows are less "
                   f"likely by this much on the mean, in nats a token (default {BOUND})")
    m.add_argument("--window", type=int,
                   help=f"selfjudge: tokens after the swap that count (default {WINDOW})")
    m.add_argument("--misfits", choices=("skip", "error"),
                   help="selfjudge: a swapped token after which the target would not go on as "
                   "before has no label (skip, the default) or is an error")
    m.add_argument("--speculate_k", type=int,
                   help="the first two: drafted tokens per round of the target (default 8)")
    m.add_argument("--out", type=Path, required=True, help="judge data")
    for c in (g, m):
        c.add_argument("--allow_code_execution", action="store_true",
                       help="humaneval: run what the models write")
        add_device_flags(c)
    j = commands.add_parser("merge", help="judge data into a training and a validation file")
    j.add_argument("files", type=Path, nargs="+", metavar="FILE")
    j.add_argument("--train", type=Path, required=True)
    j.add_argument("--val", type=Path, required=True)
    j.add_argument("--val_share", type=float, default=0.15,
                   help="share of the prompts for validation (default 0.15)")
    j.add_argument("--seed", type=int, default=0)
    j.add_argument("--target", type=Path,
                   help="checkpoint directory whose tokenizer counts the tokens; without it "
                   "characters are counted")
    args = p.parse_args(argv)
    check_args(args)
    if args.command != "merge":
        resolve_device(args)
    if args.command == "generate":
        args.temperatures = temperatures(args.temperatures)
    if args.command == "mine" and args.method == "first_error":
        args.search = args.search or "scan"
    if args.command == "mine":
        args.speculate_k = args.speculate_k or 8
        if args.method == "selfjudge":
            args.bound, args.window = args.bound or BOUND, args.window or WINDOW
            args.misfits = args.misfits or "skip"
    return args


def temperatures(text: str) -> list[float]:
    with contextlib.suppress(ValueError):
        values = [float(t) for t in text.split(",")]
        if all(0 <= t < math.inf for t in values):
            return list(dict.fromkeys(t if t > COLDEST else 0.0 for t in values))
    raise UserError(f"--temperatures is {text!r}; give numbers from 0 (greedy) up, separated by "
                    "commas")


def check_args(args):
    """Everything about the flags that can be refused before a file is read."""
    given = vars(args).get
    method, merging = given("method"), args.command == "merge"
    refuse(
        *((given(flag) is not None and given(flag) < 1,
           f"--{flag} is {given(flag)}; it must be at least 1")
          for flag in ("samples", "limit", "max_new_tokens", "speculate_k", "window")),
        (method in ("autojudge", "selfjudge") and not given("draft"),
         f"--method {method} needs --draft DIR: its tokens are swapped in"),
        *((method not in (None, owner) and given(flag) is not None,
           f"--{flag} is for --method {owner}; leave it out") for flag, owner in (
               ("search", "first_error"), ("bound", "selfjudge"), ("window", "selfjudge"),
               ("misfits", "selfjudge"))),
        (given("bound") is not None and not 0 < given("bound") < math.inf,
         f"--bound is {given('bound')}; it must be a number above 0"),
        (method == "selfjudge" and given("speculate_k"),
         "--speculate_k is of the target's continuations, and selfjudge asks for none"),
        (merging and not 0 < given("val_share") < 1,
         f"--val_share is {given('val_share')}; it must be between 0 and 1"),
        (merging and job.world() > 1, "merge runs no model; start it with python"))
    writes = ("train", "val") if merging else ("out",)
    for flag in writes:
        check_writable(given(flag))
    named = lambda flags: {f"--{flag}": given(flag) for flag in flags}
    lists = {f"{path}": path for path in [*(given("models") or ()), *(given("files") or ())]}
    check_apart(named(writes), lists | named(("prompts", "data", "target", "draft")))


def main(argv=None):
    args = parse_args(argv)
    {"generate": make_answers, "mine": mine, "merge": merge}[args.command](args)


if __name__ == "__main__":
    job.run(main)
