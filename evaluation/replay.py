"""What the rules would accept of texts not drafted here: a person's solution, another model's.

Behind eval.py --replay. Each prompt is read with its text once, and the text is taken for the
draft: a round accepts up to K of its tokens and moves on by one more. In generation that one would
be the target's own token; here the text's stands in its place whatever the target wanted, for it is
the text that is asked about. So this counts the tokens that a rule lets pass in a good text, not
the text that it leads to. Greedy.
"""
import re
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, json_lines
from evaluation.intervals import of_ratio
from evaluation.report import shown as number
from evaluation.report import table
from judge import RULES, Verified, accept_mask, top1
from load import Loaded, parse_rule, span_ids
from rules import within

TEXTS = "text", "reference", "response"  # keys under which a line may have its text


def replay_rounds(mask_of, length: int, k: int) -> list[int]:
    """Tokens accepted in each round over a text; mask_of(slice): which of that round's pass.

    A round takes up to k that pass, then one that stands whatever the rule says.
    """
    rounds, i = [], 0
    while i < length:
        mask = mask_of(slice(i, min(i + k, length)))
        rounds.append(next((n for n, ok in enumerate(mask) if not ok), len(mask)))
        i += rounds[-1] + 1
    return rounds


def read_texts(path: Path, gsm8k, chat: bool, limit: int | None) -> list[tuple[str, str, str]]:
    """("FILE, line N", prompt, text) of a JSON Lines file; with `limit` the first of each domain.

    Its lines have `prompt` and `text` (or `reference`, or `response` as IFEval's), or GSM8K's
    `question` and `answer`. `gsm8k` is the task that words those prompts; the calculator notes
    <<...>> are left out.
    """
    texts, seen = [], Counter()
    for where, e, *_ in json_lines(path, holding="examples"):
        try:
            if "question" in e:
                prompt = gsm8k.chat(e) if chat else gsm8k.prompt(e)
                text = re.sub("<<.*?>>", "", e["answer"])
                text = text if chat or prompt[-1].isspace() else " " + text
            else:
                prompt, text = e["prompt"], e[next(key for key in TEXTS if key in e)]
            if not (isinstance(prompt, str) and isinstance(text, str) and prompt and text):
                raise TypeError
        except (KeyError, StopIteration, TypeError):
            raise UserError(f'{where}: no "prompt" and "text" (or "reference" or "response"), nor '
                            '"question" and "answer"') from None
        domain = str(e.get("domain", e.get("task")))
        seen[domain] += 1
        if limit is None or seen[domain] <= limit:
            texts.append((where, prompt, text))
    return texts


def read_once(model, ids: list[int], n: int):
    """One pass over a prompt of n tokens and the text after it, in ids [n + M].

    Returns the logits before each token of the text [M, V] and the hidden states at them [M, D].
    """
    device = model.norm.weight.device
    hidden = model.features(torch.tensor([ids], device=device),
                            torch.arange(len(ids), device=device), model.new_cache(len(ids)))[0]
    return model.output(hidden[n - 1:-1]), hidden[n:]


def mask_in(v: Verified, inside: Tensor, name: str, parameter, part: slice) -> list[bool]:
    """Which tokens of a part of a text a rule accepts."""
    seen = Verified(*(x if x is None else x[part] for x in v))
    return accept_mask(seen, name, parameter, inside[part]).tolist()


def looks_ahead(name: str) -> bool:
    """Whether a rule's verdict on a token depends on those that follow it in the same round. Rules
    that ask chances need a chain as well, but are greedy here.
    """
    return RULES[name].needs_chain and not RULES[name].needs_coin


@torch.inference_mode()
def replay(texts: list[tuple[str, list[int], list[int]]], models: Loaded, rules: list[str],
           k: int) -> dict:
    """How many texts and tokens, K, and rules: rule -> {mean_accepted, its 95% interval, rejected
    (share of all tokens; None for a rule that looks ahead, no further than its round's drafts, so
    that a token by itself is neither), rounds}.

    texts: ("FILE, line N", prompt's ids, text's ids).
    """
    device = models.target.norm.weight.device
    head = models.head and models.head.to(device)
    context = min(m.config.max_seq_len for m in (models.target, models.draft) if m)
    parsed = {rule: (name, RULES[name].parameter_for(given, head),
                     span_ids(span, models.tokenizer))
              for rule in rules for name, given, span in [parse_rule(rule)]}
    columns = models.target.config.vocab_size  # a draft's padding may have more
    comparing = any(RULES[name].needs_draft_logits for name, *_ in parsed.values())
    rounds, rejected = {rule: [] for rule in rules}, dict.fromkeys(rules, 0)
    for where, before, after in tqdm(texts, unit="text", disable=None):
        ids, n = before + after, len(before)
        if len(ids) > context:
            raise UserError(f"{where}: prompt and text have {len(ids)} tokens, the context "
                            f"{context}")
        logits, hidden = read_once(models.target, ids, n)
        drafted = torch.tensor(after, device=device)
        v = Verified(logits, hidden, drafted,
                     read_once(models.draft, ids, n)[0][:, :columns] if comparing else None,
                     head(hidden) if head else None, passed=top1(logits) == drafted)
        for rule, (name, parameter, span) in parsed.items():
            mask_of = partial(mask_in, v, within(span, before, drafted), name, parameter)
            if not looks_ahead(name):
                mask = mask_of(slice(None))
                rejected[rule] += mask.count(False)
                mask_of = mask.__getitem__
            rounds[rule].append(replay_rounds(mask_of, len(after), k))
    total = sum(len(after) for *_, after in texts)
    found = {}
    for rule, of_texts in rounds.items():
        parts = [(sum(accepted), len(accepted)) for accepted in of_texts]
        accepted, n = map(sum, zip(*parts))
        found[rule] = {"mean_accepted": accepted / n, "interval": of_ratio(parts),
                       "rejected": None if looks_ahead(parsed[rule][0]) else rejected[rule] / total,
                       "rounds": n}
    return {"texts": len(texts), "tokens": total, "speculate_k": k, "rules": found}


def shown(results: dict, target: str) -> str:
    """replay.md, of one file."""
    rows = [["rule", "accepted per round", "95% interval", "tokens rejected"], *(
        [rule, f"{m['mean_accepted']:.2f}", number(m["interval"], "{0[0]:.2f} to {0[1]:.2f}"),
         number(m["rejected"], "{:.1%}")]
        for rule, m in results["rules"].items())]
    return (f"{results['file']}: {results['texts']} texts, {results['tokens']} tokens, as drafts "
            f"for {target}, K = {results['speculate_k']}, greedy\n\n{table(rows)}\n")
