"""What the rules would accept of texts that nobody here drafted: a person's solution, another
model's. Behind eval.py --replay.

Each prompt is read with its text once, and the text is taken for the draft: a round accepts up to K
of its tokens and moves on by one more. In generation that one would be the target's own token; here
the text's stands in its place whatever the target wanted, for it is the text that is asked about.
So this counts the tokens that a rule lets pass in a good text, not the text that it leads to.
Greedy.
"""
import re
from pathlib import Path

import torch
from tqdm import tqdm

import judge
from cli import UserError
from generate import TYPICAL, Engine, Settings, accept_mask
from judge import Judge
from tasks import read_lines


def replay_rounds(mask: list[bool], k: int) -> list[int]:
    """Tokens accepted in each round over a text whose tokens pass as in `mask`: up to k that pass,
    then one that stands whatever the rule says.
    """
    rounds, i = [], 0
    while i < len(mask):
        rounds.append(next((n for n, ok in enumerate(mask[i:i + k]) if not ok), len(mask[i:i + k])))
        i += rounds[-1] + 1
    return rounds


def read_texts(path: Path, gsm8k, chat: bool, limit: int | None) -> list[tuple[str, str, str]]:
    """("file, line N", prompt, text) of a JSON Lines file with `prompt` and `text` (or
    `reference`), or of GSM8K's with `question` and `answer`.

    `gsm8k` is the task that words its prompts; its calculator notes <<...>> are left out. With
    `limit` the first of each domain.
    """
    texts, seen = [], {}
    for where, e in read_lines(path):
        try:
            if "question" in e:
                prompt, text = gsm8k.chat(e) if chat else gsm8k.prompt(e), re.sub(
                    "<<.*?>>", "", e["answer"])
                text = text if chat or prompt[-1].isspace() else " " + text
            else:
                prompt, text = e["prompt"], e["text"] if "text" in e else e["reference"]
            if not (isinstance(prompt, str) and isinstance(text, str) and prompt and text):
                raise TypeError
        except (KeyError, TypeError):
            raise UserError(f'{where}: no "prompt" and "text" (or "reference"), nor "question" '
                            'and "answer"') from None
        domain = e.get("domain", e.get("task"))
        seen[domain] = seen.get(domain, 0) + 1
        if limit is None or seen[domain] <= limit:
            texts.append((where, prompt, text))
    return texts


def read_once(model, ids: list[int], n: int):
    """One pass over a prompt of n tokens and the text after it: the logits before each token of the
    text [m, V], the hidden states at them [m, D].
    """
    device = model.norm.weight.device
    hidden = model.features(torch.tensor([ids], device=device),
                            torch.arange(len(ids), device=device), model.new_cache(len(ids)))[0]
    return model.output(hidden[n - 1:-1]), hidden[n:]


@torch.inference_mode()
def replay(texts: list[tuple[str, list[int], list[int]]], engine: Engine, head: Judge | None,
           rules: list[str], k: int) -> dict:
    """rule -> {rounds, mean_accepted, rejected (share of all tokens)} over texts ("file, line N",
    prompt's ids, text's ids).
    """
    settings = {}
    for rule in rules:
        name, value = judge.parse_rule(rule)
        default = head.threshold if name == "judge" else TYPICAL if name == "typical" else None
        settings[rule] = Settings(name, default if value is None else value, 0.0, None, None)
    rounds, rejected = {rule: [] for rule in rules}, dict.fromkeys(rules, 0)
    for where, before, after in tqdm(texts, unit="text", disable=None):
        if len(before) + len(after) > engine.context:
            raise UserError(f"{where}: prompt and text have {len(before) + len(after)} tokens, "
                            f"the context {engine.context}")
        rows, hidden = read_once(engine.target, before + after, len(before))
        draft_rows = read_once(engine.draft, before + after,
                               len(before))[0] if any(s.compares
                                                      for s in settings.values()) else None
        scores, tokens = head.scores(hidden) if head else None, torch.tensor(
            after, device=engine.device)
        for rule, s in settings.items():
            mask = accept_mask(judge.standard(rows, tokens), rows, scores, tokens, draft_rows,
                               s).tolist()
            rounds[rule] += replay_rounds(mask, k)
            rejected[rule] += mask.count(False)
    total = sum(len(after) for *_, after in texts)
    return {rule: {"mean_accepted": sum(r) / len(r), "rejected": rejected[rule] / total,
                   "rounds": len(r)} for rule, r in rounds.items()}
