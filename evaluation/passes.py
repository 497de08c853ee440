"""Single passes, for benchmark.py: decoding, verification by rows, drafting, the judge's cost, and
the time to the first token.
"""
from statistics import median

import torch

import graphs
from engine import Engine, State, power_of_two
from evaluation.timing import compiled, engine_on, interleaved, random_prompt, recorded
from judge import JudgeHead
from linear import FEW
from model import Transformer
from ranks import job
from tp import size

PAIRS = 10  # times as many repeats for the judge's cost, which is small beside a pass


def attention_name(args, model: Transformer) -> str:
    """Which attention a model's passes run, and why, in words."""
    why = graphs.no_kernel(model) if args.compile else "eager"
    return f"PyTorch's ({why})" if why else f"Triton split-KV up to {FEW} rows, above PyTorch's"


def state_at(length: int, device) -> State:
    n = torch.tensor([length], device=device)
    return State(n.new_zeros(2), n, n.new_zeros(1), n.new_zeros(1))


def verification(e: Engine, context: int, span: int):
    """The target's part of a round after `context` tokens, as a call: K fixed drafted tokens, and
    with K = 0 a decode step.
    """
    state, drafted = state_at(context, e.device), torch.arange(e.speculate_k, device=e.device)
    return lambda: e.verify_and_accept(e.target, e.head, e.cache.first(span), e.settings, state,
                                       drafted, None, None, None)


@torch.inference_mode()
def measure_passes(args, models: dict, target: Transformer, draft: Transformer, head: JudgeHead,
                   caches: dict, context: int, read: float) -> dict:
    """Milliseconds of single passes after `context` tokens, and their share of the bandwidth."""
    most = max(args.speculate_k)
    rows_of_passes = sorted({1, *args.rows, most + 1})
    span = power_of_two(context + rows_of_passes[-1])

    def verify(model, rows, head=None):
        e = engine_on(caches, model, draft if rows > 1 else None, head, rows - 1,
                      accept="judge" if head else "standard")
        compiled(args, e, f"a pass of {rows} rows" + (" with the judge" if head else ""))
        return recorded(args, verification(e, context, span))

    def drafting(k):
        e = compiled(args, engine_on(caches, target, draft, k=k), f"drafts of K = {k}")
        state = state_at(context, args.device)
        return recorded(args, lambda: e.drafter.propose(state, k, span, e.settings, None))

    calls = {("decode", "draft"): verify(draft, 1)}
    calls |= {("verify", r): verify(target, r) for r in rows_of_passes}
    calls |= {("draft", k): drafting(k) for k in args.speculate_k}
    # By themselves: among the others each would follow another pass, and seem to cost more.
    pair = interleaved({"without": calls["verify", most + 1],
                        "with": verify(target, most + 1, head)}, PAIRS * args.repeats, args.device)
    ms = {key: 1e3 * median(s) for key, s in interleaved(calls, args.repeats, args.device).items()}

    def entry(key, model, **more):
        cache_bytes = job.world() * size(*caches[model].first(span).kv)
        read_bytes = models["target" if model is target else "draft"]["bytes_read"] + cache_bytes
        return {**more, "ms": ms[key], "bytes": read_bytes,
                "fraction_of_bandwidth": read_bytes / (ms[key] / 1e3) / read}

    cost = [b - a for a, b in zip(pair["without"], pair["with"])]
    return {
        "context": context, "span": span,
        "decode": {"target": entry(("verify", 1), target),
                   "draft": entry(("decode", "draft"), draft)},
        "verify": [entry(("verify", r), target, rows=r) for r in rows_of_passes],
        "judge": {"rows": most + 1, "ms_without": 1e3 * median(pair["without"]),
                  "ms_with": 1e3 * median(pair["with"]), "ms_cost": 1e3 * median(cost)},
        "draft": [{"speculate_k": k, "ms_per_token": ms["draft", k] / k} for k in args.speculate_k],
    }


def first_token(e: Engine, n: int):
    """Reading a prompt of n tokens in full, up to its first new token, as a call."""
    prompt = random_prompt(n, e.target.config.vocab_size)

    def call():
        e.tokens = []  # no prefix is kept
        return e.prefill(prompt, 2)

    return call


@torch.inference_mode()
def measure_first_token(args, target: Transformer, draft: Transformer, caches: dict) -> list[dict]:
    """Milliseconds from a prompt's start to its first new token: the target alone, and where the
    draft reads the prompt too.
    """
    k = max(args.speculate_k)
    engines = {"target_ms": compiled(args, engine_on(caches, target), "prompts"),
               "with_draft_ms": compiled(args, engine_on(caches, target, draft, k=k),
                                         "prompts of the draft")}
    seconds = {n: interleaved({name: first_token(e, n) for name, e in engines.items()},
                              args.repeats, args.device, loops=1) for n in args.prompt_tokens}
    return [{"prompt_tokens": n} | {name: 1e3 * median(s) for name, s in cases.items()}
            for n, cases in seconds.items()]
