"""From a command line's words to models that fit each other: devices, rules, and loading target,
draft, EAGLE head, tokenizer and judge; under torchrun each rank's shares.
"""
import argparse
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

import checkpoint
import tp
from common import UserError, file_hash, refuse, tell
from drafters.eagle_head import EagleHead, is_eagle, open_head, weight_bytes
from engine import SPAN
from judge import RULES, JudgeHead, Rule
from model import DTYPES, ModelConfig, Transformer
from ranks import all_reduce, job
from ranks.job import world
from ranks.memory import Memory, check_memory, reserved
from tokenizer import Tokenizer

TOKENIZER_FILES = "config.json", "tokenizer.json", "tokenizer.model"
GROWING = 512  # positions of an EAGLE head's cache beside the text's, at most, where trees grow

# ---------------------------------------------------------------- devices

def add_device_flags(p: argparse.ArgumentParser, draft=False):
    """--device, --dtype and with `draft` --draft_dtype; `resolve_device` reads them."""
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    if draft:
        p.add_argument("--draft_dtype", choices=DTYPES,
                       help="default: --dtype; a tiny draft on a CPU is faster in float32")


def resolve_device(args: argparse.Namespace):
    """Turn the dtypes' names into torch's, in place; refuse a device that is not there.

    Under torchrun the ranks meet here, and the device becomes this rank's own.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    given = {f"--{flag}": value for flag, value in vars(args).items() if is_plain(value)}
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    if hasattr(args, "draft_dtype"):
        args.draft_dtype = DTYPES[args.draft_dtype] if args.draft_dtype else args.dtype
    job.check_same(given)
    args.device = job.start(args.device)


def is_plain(value) -> bool:
    """Whether a flag's value is the same on all machines; a path need not be."""
    try:
        return isinstance(json.dumps(value), str)
    except TypeError:
        return False


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as --dtype takes it: bfloat16, float32."""
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- rules

def rule_forms(plain=()) -> list[str]:
    """How each rule is written: standard, topk:K, typical[:E], ...; `plain` names come first."""
    form = lambda r: f":{r.parameter}" if r.default is None and not r.needs_judge else (
        f"[:{r.parameter}]")
    return [*plain, *(name + (form(r) if r.parameter else "") for name, r in RULES.items())]


def rule_help() -> str:
    """Every rule as it is written, and what it accepts; for --help."""
    return "; ".join(f"{form}, {r.about}" for form, r in zip(rule_forms(), RULES.values()))


class Spelled(NamedTuple):
    """A rule as it is written: standard, topk:3, judge:0.9, relaxed:10,0.6@think."""
    name: str
    parameter: float | tuple[float, ...] | None  # None: the rule's own
    span: str | None  # a word: the rule holds between <word> and </word> only


def parse_rule(text: str, plain=(), threshold: float | None = None) -> Spelled:
    """Read a rule. plain: more names, without parameter and span. threshold: the parameter, given
    apart. Raises UserError: what this rule takes, or for no rule's name all of them.
    """
    spelling, at, span = text.partition("@")
    name, colon, value = spelling.partition(":")
    rule = Rule() if name in plain else RULES.get(name)
    refuse((not rule, f"{text!r} is not a rule; use {', '.join(rule_forms(plain))}, and any of "
            "them with @WORD for between <WORD> and </WORD> only"))
    letters = rule.parameter.split(",") if rule.parameter else []
    required = letters and rule.default is None and not rule.needs_judge
    try:
        x = tuple(map(float, value.split(","))) if colon else (
            () if threshold is None else (threshold,))
        wrong = (x or required) and (len(x) != len(letters) or not all(map(math.isfinite, x))
                                     or not rule.valid(*x))
    except ValueError:
        wrong = True
    said = repr(text) + ("" if threshold is None else f" with --threshold {threshold:g}")
    form = rule_forms(plain)[[*plain, *RULES].index(name)]
    refuse((wrong or colon and threshold is not None, f"{said} is not a rule; use {form}"
            + (f", {rule.parameter}: {rule.about}" if letters else ", which has no parameter")),
           (at and (name in plain or name == "standard" or not re.fullmatch(r"[\w-]+", span)),
            f"{said} is not a rule; @ binds one that accepts more than standard to a span, such as "
            "relaxed:10,0.6@think: between <think> and </think>"))
    return Spelled(name, None if not x else x[0] if len(letters) == 1 else x, span or None)


def spell_rule(name: str, parameter=None, span: str | None = None) -> str:
    """The one spelling of a rule: `parse_rule` gives it back."""
    x = () if parameter is None else parameter if isinstance(parameter, tuple) else (parameter,)
    numbers = ",".join(str(int(v) if v % 1 == 0 else v) for v in x)
    return name + (f":{numbers}" if x else "") + (f"@{span}" if span else "")


def rule_list(text: str, plain=()) -> list[str]:
    """The rules of a comma-separated list, each in one spelling and once. What starts as a number
    does is the second parameter of the rule before it.
    """
    items = re.split(r",(?!\s*[\d.+-])", text)
    return list(dict.fromkeys(spell_rule(*parse_rule(item.strip(), plain)) for item in items))


def span_ids(word: str | None, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of <word> and </word>; raises UserError where the tokenizer cuts them up."""
    if word is None:
        return None
    ids = [tokenizer.ids.get(token) for token in (f"<{word}>", f"</{word}>")]
    refuse((None in ids, f"@{word}: <{word}> and </{word}> are no tokens of {tokenizer.path}; a "
            "span needs a token of its own for each"))
    return tuple(ids)


def engine_rule(rule: str, tokenizer: Tokenizer) -> dict:
    """A rule as it is written, as the keyword arguments of an Engine."""
    name, parameter, span = parse_rule(rule)
    return {"accept": name, "parameter": parameter, "span": span_ids(span, tokenizer)}


# ---------------------------------------------------------------- models

class Loaded(NamedTuple):
    target: Transformer
    draft: Transformer | None
    head: JudgeHead | None
    tokenizer: Tokenizer
    eagle: EagleHead | None


def load_models(target, draft=None, judge=None, device="cpu", dtype=torch.float32,
                draft_dtype: torch.dtype | None = None, speculate_k=0,
                length=lambda tokenizer: SPAN, caches=1.0, rows: int | None = None,
                eagle=None) -> Loaded:
    """Check that the checkpoint directories and the judge file fit each other and the memory, then
    load them.

    draft_dtype: of draft and EAGLE head, default dtype. speculate_k: the most tokens that a round
    drafts, below the context. length(tokenizer): tokens of the longest text, its prompt included.
    caches: as in `check_memory`. rows: of which logits are made at once, default K + 1, math.inf:
    of a whole text. Raises UserError.
    """
    config, tokenizer = read_vocabulary(target)
    context, models = config.max_seq_len, {"target": (config, dtype, False)}
    if draft:
        draft_config = check_draft(target, draft, tokenizer)
        context = min(context, draft_config.max_seq_len)
    refuse((speculate_k >= context, f"a round of {speculate_k} drafted tokens does not fit the "
            f"context of {context}; lower --speculate_k or --tree"))
    head = load_judge(judge, target) if judge else None
    device, whole, draft_dtype = job.start(device), False, draft_dtype or dtype
    tp.check(config, target)
    if draft:
        whole = run_whole(draft, draft_config, device, draft_dtype)
        models["draft"] = draft_config, draft_dtype, whole
    positions = length(tokenizer) if rows else reserved(length(tokenizer), context, speculate_k)
    if eagle:
        models["EAGLE head"] = eagle_memory(eagle, config, draft_dtype, positions, device)
    check_memory(models, positions, rows or speculate_k + 1, device, caches)
    all_reduce.choose(speculate_k + 1, config.dim, dtype, device)
    eagle_head = load_eagle(eagle, target, device, draft_dtype) if eagle else None
    model = load_model(target, config, device, dtype)
    draft_model = load_model(draft, draft_config, device, draft_dtype, whole) if draft else None
    return Loaded(model, draft_model, head, tokenizer, eagle_head)


def read_vocabulary(directory) -> tuple[ModelConfig, Tokenizer]:
    """A checkpoint's config and tokenizer; raises UserError for a token without embedding."""
    path = Path(directory)
    no_tokenizer = not any((path / name).exists() for name in TOKENIZER_FILES[1:])
    refuse((no_tokenizer and (path / "model.safetensors").exists() and is_eagle(path),
            f"{path} holds an EAGLE head, not a model; give it to generate.py as --draft, to "
            "eval.py and benchmark.py as --eagle"))
    config, tokenizer = checkpoint.read_config(directory), Tokenizer.from_dir(directory)
    refuse((tokenizer.vocab_size > config.vocab_size, f"{tokenizer.path} has "
            f"{tokenizer.vocab_size} tokens, {directory}/config.json says vocab_size "
            f"{config.vocab_size}: they do not belong together; fetch both from one revision"))
    return config, tokenizer


def check_draft(target, draft, tokenizer: Tokenizer) -> ModelConfig:
    """The draft's config; raises UserError unless draft and target share their tokens.

    Their vocab_size may differ: checkpoints pad their embeddings in different ways.
    """
    config, other = read_vocabulary(draft)
    why = other.difference(tokenizer)
    refuse((why, f"draft {draft} and target {target} have different tokenizers: {why}; speculation "
            "needs the same"))
    return config


def load_judge(path, target) -> JudgeHead:
    """The judge in a file, for the checkpoint directory `target`; raises UserError for another's.
    """
    config = checkpoint.read_config(target)
    parent = config.quantization and config.quantization.parent
    return JudgeHead.load(path, config.dim, checkpoint.fingerprint(target), str(target), parent)


def load_eagle(directory, target, device="cpu", dtype=torch.float32) -> EagleHead:
    """The EAGLE head in a directory, whole on each rank, for the checkpoint directory `target`;
    raises UserError for another's.
    """
    if world() > 1:
        job.check_same({"the hash of an EAGLE head": eagle_hash(directory)})
    config = checkpoint.read_config(target)
    parent = config.quantization and config.quantization.parent
    return EagleHead.load(directory, config, str(target), checkpoint.fingerprint(target), parent,
                          device, dtype)


def eagle_hash(directory) -> str:
    """What tells one EAGLE head's directory from another's."""
    weights = sorted(Path(directory).glob("*.safetensors"))  # none where they are pickled, still
    return "".join(map(file_hash, (*weights, Path(directory, "config.json"))))


def eagle_memory(directory, target: ModelConfig, dtype: torch.dtype, positions: int,
                 device: str) -> Memory:
    """What an EAGLE head needs: as its cache count its layer's and, at all positions, the target's
    state as it reads it. A pass needs less than the target's.
    """
    head, _ = open_head(directory, target)
    cache = head.to(dtype).new_cache(positions + GROWING)
    states = positions * target.dim * dtype.itemsize
    return Memory(weight_bytes(directory, target, dtype, device),
                  tp.size(*cache.kv, cache.rope) + states, 0)


def load_model(directory, config: ModelConfig, device: str, dtype: torch.dtype,
               whole=False) -> Transformer:
    """A checkpoint's model, under torchrun this rank's share of it unless `whole`.

    `tp.check` comes first, and `check_memory`.
    """
    if world() == 1:
        return checkpoint.load(directory, device, dtype)
    job.check_same(contents(directory))
    share = {} if whole else {"build": tp.share, "read": tp.read_share(config)}
    model = checkpoint.load(directory, device, dtype, **share)
    model.agree = job.same_everywhere
    return model


def contents(directory) -> dict[str, str | None]:
    """What a checkpoint directory holds, told by hashes: all ranks must read the same."""
    files = {name: Path(directory) / name for name in (*TOKENIZER_FILES, *checkpoint.COPIED)}
    return {"the fingerprint of a checkpoint": checkpoint.fingerprint(directory)} | {
        f"the hash of a {name}": file_hash(path) if path.exists() else None
        for name, path in files.items()}


def run_whole(name, config: ModelConfig, device: str, dtype: torch.dtype) -> bool:
    """Whether every rank runs the whole of a model, a draft mostly; says so under torchrun.

    Sharing a small one costs more in all-reduces, two a layer, than it saves in reading weights.
    """
    if world() == 1:
        return False
    n = world()
    whole, why = tp.better_whole(config, device, dtype, n), tp.not_divisible(config, n)
    how = "whole on each rank" if whole else f"shared by {n} ranks"
    layer = f"{tp.layer_bytes(config, dtype) / 1e6:.3g} MB a layer"
    why = f"{why} cannot be shared" if why else layer
    tell(f"{name} runs {how}: {why}")
    return whole
