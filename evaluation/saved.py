"""What eval.py saves in --out: the answers, and in settings.json what they depend on.

An answer has a `sample`, its number, only where it was sampled, and `turns`, the texts of all, only
where the task asks more than one; its text is the last one's, the rest sums over the turns.
"""
import torch

from checkpoint import fingerprint
from common import FLAG, TEXT, Kind, file_hash, list_of, needed, number, whole
from evaluation.task import Task
from formats.answer_log import AnswerLog, saved_settings
from load import dtype_name, eagle_hash
from ranks import job

ABOUT = "rules", "target_name", "draft_name", "eagle_name"  # settings that answers do not depend on
OPTIONAL = "draft", "judge", "eagle", "tree"  # compared only where both runs have them

AUTO = Kind("auto", lambda v: v == "auto")
ANSWER = needed(dict(rule=TEXT, id=TEXT, domain=TEXT, right=FLAG, how=TEXT, text=TEXT,
                     tokens=list_of(whole(0), "ids"), seconds=number(0), rounds=whole(0),
                     accepted=whole(0))) | dict(sample=whole(0), turns=list_of(TEXT, "texts"))
NOT_GRADED = {"right": Kind("null: this task is not graded", lambda v: False)}
SETTINGS = needed(dict(task=TEXT, data=TEXT, target=TEXT, target_name=TEXT, device=TEXT, dtype=TEXT,
                       speculate_k=whole(1) | AUTO, chat=FLAG, compile=FLAG, processes=whole(1),
                       rules=list_of(TEXT, "texts"))) | dict(
    draft=TEXT, draft_name=TEXT, judge=TEXT, ranks=whole(1), eagle=TEXT, eagle_name=TEXT, tree=TEXT,
    max_new_tokens=whole(1), temperature=number(0), top_k=whole(1), top_p=number(0, 1, above=True),
    seed=whole(0))


def length(args, task: Task) -> int:
    """Tokens that an answer, or each turn of it, may have."""
    return args.max_new_tokens or task.max_new_tokens


def defaults(task: Task) -> dict:
    """Settings that are saved only where they differ from these."""
    return {"max_new_tokens": task.max_new_tokens, "temperature": 0.0, "top_k": None,
            "top_p": None, "seed": 0}


def settings_of(args, task: Task) -> dict:
    """What answers depend on, speeds included, and ABOUT."""
    found = {
        "task": args.task, "data": task.fingerprint(args.data), "target": fingerprint(args.target),
        "draft": args.draft and fingerprint(args.draft),
        "judge": args.judge and file_hash(args.judge),
        "speculate_k": args.k,
        "chat": args.chat, "compile": args.compile, "processes": args.processes,
        "ranks": job.world() if job.world() > 1 else None,  # None: as before there were ranks
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "dtype": dtype_name(args.dtype), "rules": args.rows,
        "target_name": args.target.resolve().name,
        "draft_name": args.draft and args.draft.resolve().name,
    } | defaults(task) | {"max_new_tokens": length(args, task)}
    if args.temperature:
        found |= {key: getattr(args, key) for key in ("temperature", "top_k", "top_p", "seed")}
    if args.eagle:  # only where they matter, so that files without an EAGLE head stay as they were
        found |= {"eagle": eagle_hash(args.eagle), "eagle_name": args.eagle.resolve().name}
    if "eagle-tree" in args.drafters:
        found["tree"] = str(args.tree)
    return found


def resume(args, task: Task) -> tuple[AnswerLog, dict]:
    """The log of --out and its settings, with this run's; refuses those of another run."""
    path, about = args.out / "answers.jsonl", args.out / "settings.json"
    now, usual = settings_of(args, task), defaults(task)
    saved = saved_settings(about, path, now, ABOUT, OPTIONAL, SETTINGS, usual)
    settings = saved | {key: value for key, value in now.items()
                        if value is not None and (key not in usual or value != usual[key])}
    settings["rules"] = list(dict.fromkeys([*saved.get("rules", ()), *args.rows]))
    return AnswerLog(path, settings, about, kinds=answer_kinds(task)), settings


def answer_kinds(task: Task) -> dict:
    """What the values of an answer must be."""
    return ANSWER if task.graded else ANSWER | NOT_GRADED


def key_of(answer: dict) -> tuple[str, str, int]:
    """(rule, id, sample): no two answers have the same."""
    return answer["rule"], answer["id"], answer.get("sample") or 0


def saved_answers(log: AnswerLog) -> dict:
    """{(rule, id, sample): answer} of answers.jsonl."""
    answers = {}
    for line in log.lines:
        answers.setdefault(key_of(line.value), line.value)
    return answers
