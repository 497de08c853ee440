"""Whole rounds at a forced acceptance, for benchmark.py: real work, on dummy weights too, whose
count of accepted tokens is then replaced. What rests on it is labelled 'simulated acceptance'.
"""
import random
import time
from itertools import accumulate
from statistics import mean, median

import torch

import graphs
from drafters.length import mean_run
from engine import Engine, next_state, pack, unpack
from evaluation.benchmark_report import SIMULATED
from evaluation.timing import compiled, engine_on, random_prompt, start_together
from judge import JudgeHead
from model import Transformer

PROMPT = 64  # tokens of the random prompt
MOST_ROUNDS = 24  # of a run: a round costs the same whatever it accepts


def rate_for(accepted: float, k: int) -> float:
    """The inverse of `mean_run`: the rate at which `accepted` of k tokens are accepted on average.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_run(middle, k) < accepted else (low, middle)
    return high


def draw_runs(rate: float, k: int, rounds: int, seed=0) -> list[int]:
    """Accepted counts [rounds]: the quantiles of the runs' distribution, shuffled, so that few
    rounds keep its mean.
    """
    runs = [sum((i + 0.5) / rounds < rate ** j for j in range(1, k + 1)) for i in range(rounds)]
    random.Random(seed).shuffle(runs)
    return runs


def simulate(e: Engine):
    """Make e's rounds accept as many drafted tokens as told; returns the function that tells them,
    after a prompt was read.

    A round computes all that a real one does, the judge included; then its count is replaced, on
    the device. The text's length says by which: a round that a warm-up or a recording plays once
    more, and whose state they put back, gets the same count again.
    """
    real = e.verify_and_accept
    counts = torch.zeros(e.capacity + 1, dtype=torch.long, device=e.device)  # [length] -> accepted

    def forced(target, head, cache, s, state, drafted, *rest, **more):
        packed, *others = real(target, head, cache, s, state, drafted, *rest, **more)
        o, a = unpack(packed, len(drafted)), counts.index_select(0, state.length)
        return pack(o._replace(accepted=a, state=next_state(state, drafted, a, o.own))), *others

    def tell(runs: list[int]):
        lengths = accumulate((1 + n for n in runs[:-1]), initial=len(e.tokens))
        counts[torch.tensor(list(lengths), device=e.device)] = torch.tensor(runs, device=e.device)

    e.verify_and_accept = forced
    return tell


@torch.inference_mode()
def play(e: Engine, prompt: list[int], counts: list[int], tell) -> float:
    """Seconds that rounds with these accepted counts take; prefill excluded."""
    e.tokens = []  # nothing in the shared caches is this engine's
    e.prefill(prompt, 1 + sum(counts) + len(counts))
    tell(counts)
    start = start_together(e.device)
    made = [e.round()[0] for _ in counts]
    seconds = time.perf_counter() - start
    assert made == counts, (made, counts)
    return seconds


def measure_simulated(args, target: Transformer, draft: Transformer, head: JudgeHead,
                      caches: dict) -> dict:
    """Tokens/s of whole rounds for every K and rate of acceptance, and of the target, in turns."""
    prompt = random_prompt(PROMPT, target.config.vocab_size)
    alone = compiled(args, engine_on(caches, target), "the target alone")
    points, runs = [], {"target": (alone, [0] * args.max_new_tokens, lambda counts: None)}
    engines = [alone]
    for k in args.speculate_k:
        e = engine_on(caches, target, draft, head, k, accept="judge")
        engines.append(compiled(args, e, f"rounds, K = {k}"))
        tell = simulate(e)
        for accepted in args.accepted:
            rate = rate_for(accepted, max(args.speculate_k))
            rounds = round(args.max_new_tokens / (mean_run(rate, k) + 1))
            counts = draw_runs(rate, k, min(MOST_ROUNDS, max(1, rounds)))
            runs[len(points)] = e, counts, tell
            points.append({"accepted_at_most_k": accepted, "rate": rate, "speculate_k": k,
                           "mean_accepted": mean(counts), "rounds": len(counts),
                           "tokens": sum(counts) + len(counts)})
    for e in engines if args.compile else ():
        graphs.warm_up(e, PROMPT, PROMPT + args.max_new_tokens + e.speculate_k)
    turns = [{name: play(e, prompt, counts, tell) for name, (e, counts, tell) in runs.items()}
             for _ in range(args.repeats + 1)][1:]  # the first turn is the warm-up
    seconds = {name: median(turn[name] for turn in turns) for name in runs}
    base = args.max_new_tokens / seconds["target"]
    for i, p in enumerate(points):
        speed = p["tokens"] / seconds[i]
        p |= {"round_ms": 1e3 * seconds[i] / p["rounds"], "tokens_per_sec": speed,
              "speed_up": speed / base}
    best = [max((p for p in points if p["accepted_at_most_k"] == a),
                key=lambda p: p["tokens_per_sec"]) for a in args.accepted]
    return {"label": SIMULATED, "target_tokens_per_sec": base, "points": points, "best": best}
