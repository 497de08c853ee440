"""Real acceptance on real prompts, for benchmark.py: every rule, drafter and K, and Hugging Face's
generate, in turns.
"""
import time
from statistics import mean, median
from typing import NamedTuple

import graphs
from drafters.length import automatic
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from evaluation.report import row_name
from evaluation.timing import compiled, engine_on, start_together, sync
from judge import JudgeHead
from model import Transformer


class Run(NamedTuple):
    """One text, and what only our own engine says of it."""
    tokens: list[int]
    mean_accepted: float | None = None
    tokens_per_sec_of_rounds: float | None = None
    first_token_ms: float | None = None  # from the call to the first new token, on the host


def ours(e: Engine, prompt: list[int], max_new_tokens: int, eos_ids) -> Run:
    """A text of an engine that reads the prompt in full."""
    e.tokens, came = [], []
    start = time.perf_counter()
    r = generate(e, prompt, max_new_tokens, eos_ids,
                 on_tokens=lambda tokens, sources: came.append(time.perf_counter()))
    return Run(r.tokens, r.mean_accepted if e.drafter else None, r.tokens_per_sec,
               1e3 * (came[0] - start))


def in_turns(calls: dict, prompts: list, device) -> dict[str, list[tuple[float, Run]]]:
    """(seconds, what it gave) of each call on each prompt.

    On each prompt all calls have an untimed turn first. What a new length costs once in a process
    (a plan of cuDNN's, a compilation, memory) would else be paid by the call that comes first, the
    target alone, and flatter those after it. Rotating the order would only spread it over all.
    """
    rows = {name: [] for name in calls}
    for prompt in prompts:
        for timed in (False, True):
            for name, call in calls.items():
                start = start_together(device)
                run = call(prompt)
                sync(device)
                if timed:
                    rows[name].append((time.perf_counter() - start, run))
    return rows


def measure_real(args, target: Transformer, draft: Transformer, head: JudgeHead | None,
                 caches: dict, prompts: list[list[int]], eos_ids, make=None) -> dict:
    """Real prompts, one a repeat, each rule, drafter and K on it in turns, to EOS; prefill is
    included. args.ks: {drafter: its K's}; args.rules: {rule: as an Engine takes it}. make(drafter):
    one that is no Llama.
    """
    engines = {"target": engine_on(caches, target)}
    for name, k, rule in ((n, k, r) for n, ks in args.ks.items() for k in ks for r in args.rules):
        drafter, chooser = automatic(LlamaDrafter(draft) if name == "llama" else make(name), k)
        engines[f"{row_name(rule, name)} K={k}"] = engine_on(
            caches, target, drafter, head, k, chooser, **args.rules[rule])
    for name, e in engines.items() if args.compile else ():
        graphs.warm_up(compiled(args, e, name), min(map(len, prompts)),
                       max(map(len, prompts)) + args.max_new_tokens)
    calls = {name: lambda prompt, e=e: ours(e, prompt, args.max_new_tokens, eos_ids)
             for name, e in engines.items()}
    if args.peer:
        from evaluation import hf_peer  # needs transformers
        theirs = hf_peer.calls(target, draft, [args.target.config, args.draft.config],
                               args.speculate_k, args.max_new_tokens, eos_ids)
        calls |= {name: lambda prompt, f=f: Run(f(prompt)) for name, f in theirs.items()}
    rows = in_turns(calls, prompts, args.device)
    return {"label": "real acceptance", "prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "variants": [variant(name, row, rows["target"]) for name, row in rows.items()]}


def variant(name: str, row: list[tuple[float, Run]], base: list[tuple[float, Run]]) -> dict:
    """The medians of a variant's turns, beside the target's on the same prompts, `base`."""
    speeds, of_target = ([len(run.tokens) / seconds for seconds, run in rows]
                         for rows in (row, base))
    texts = [run.tokens for _, run in row]

    def of_all(key, average=median):
        values = [getattr(run, key) for _, run in row]
        return None if None in values else average(values)

    return {"variant": name, "tokens_per_sec": median(speeds),
            "speed_up": median(a / b for a, b in zip(speeds, of_target)),
            "mean_accepted": of_all("mean_accepted", mean),
            "tokens_per_sec_of_rounds": of_all("tokens_per_sec_of_rounds"),
            "first_token_ms": of_all("first_token_ms"),
            "same_tokens_as_target": sum(a == run.tokens for a, (_, run) in zip(texts, base)),
            "tokens": texts}
