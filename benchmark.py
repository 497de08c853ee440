"""What a pass costs, and what speculation makes of it, in one command. No download needed.

    python benchmark.py --target llama-3.1-70b --draft llama-3.1-8b --target_quant int8 --plot FILE
    python benchmark.py --target DIR --draft DIR --judge FILE --prompts FILE.jsonl --peer hf
    torchrun --standalone --nproc_per_node=8 benchmark.py --target llama-3.1-405b ...

A preset or a config.json gets dummy weights of its real shapes: real speed, meaningless text. How
many drafted tokens a round accepts is then forced, and what rests on it is labelled 'simulated
acceptance'. Real checkpoints with --prompts are also compared with real acceptance, interleaved,
with Hugging Face's generate beside ours. Under torchrun the ranks share the target as generate.py's
do; times are rank 0's, bytes and bandwidth those of all ranks. Batch size 1, greedy.
"""
import importlib.util
import math
import random
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch

import graphs
from common import Parser, UserError, check_writable, json_lines, refuse, write_json
from engine import Engine, LlamaDrafter, State, generate, next_state, pack, power_of_two, unpack
from evaluation import collectives
from evaluation.benchmark_report import SIMULATED, plot, report
from evaluation.dummy import PRESETS, build, describe, find, shared_by
from judge import RULES, JudgeHead
from linear import MODES
from load import (
    add_device_flags,
    check_draft,
    load_judge,
    parse_rule,
    read_vocabulary,
    resolve_device,
    rule_list,
)
from model import Transformer
from ranks import all_reduce, job
from ranks.memory import check_memory
from tp import size

PROMPT = 64  # tokens of the random prompt where acceptance is simulated
ROWS = (1, 2, 4, 8, 16, 32, 64)  # positions of a verification pass
LOOPS = 4  # calls that are timed together
PADDING = 1024  # without tokenizers to compare, vocabularies that differ by less count as one
PAIRS = 10  # times as many repeats for the judge's cost, which is small beside a pass
MOST_ROUNDS = 24  # of a simulated run: a round costs the same whatever it accepts
ACCEPTED = (2.0, 4.0, 6.3, 10.0, 15.0, 19.7, 25.0)  # rates to simulate; 6.3 and 19.7: the paper's


# ---------------------------------------------------------------- timing

def on_gpu(device) -> bool:
    return torch.device(device).type == "cuda"


def sync(device):
    if on_gpu(device):
        torch.cuda.synchronize()


def start_together(device) -> float:
    """The time, once every rank is here and its device idle: none waits for another's last pass."""
    sync(device)
    job.wait_for_all()
    return time.perf_counter()


def interleaved(cases: dict, repeats: int, device) -> dict[str, list[float]]:
    """Seconds a call of each case, [repeats] each; the cases take turns, so a slow moment hits all.
    """
    seconds = {name: [] for name in cases}
    for i in range(repeats + 1):
        for name, call in cases.items():
            start = start_together(device)
            for _ in range(LOOPS):
                call()
            sync(device)
            if i:  # the first turn is the warm-up
                seconds[name].append((time.perf_counter() - start) / LOOPS)
    return seconds


def bandwidth(device, repeats: int) -> float:
    """Bytes a second that sums over arrays far larger than the caches read, on all ranks at once.
    """
    data = torch.ones((1 << 31 if on_gpu(device) else 1 << 28) // 4, device=device)
    own = size(data) / median(interleaved({"sum": data.sum}, repeats, device)["sum"])
    return sum(job.of_all_ranks(own))


# ---------------------------------------------------------------- single passes

def engine_on(caches: dict, target, draft=None, head=None, rule="standard", k=0) -> Engine:
    """An engine on caches that others use too: each overwrites them, so none relies on them."""
    drafter = LlamaDrafter(draft) if draft else None
    e = Engine(target, drafter, head, *parse_rule(rule), speculate_k=k)
    e.cache, e.capacity = caches[target], len(caches[target].rope)
    if drafter:
        drafter.cache = caches[draft]
    return e


def compiled(args, e: Engine, what: str) -> Engine:
    if args.compile:
        print(f"compiling {what}", file=sys.stderr)
        graphs.compile_engine(e)
    return e


@torch.inference_mode()
def measure_passes(args, models: dict, target: Transformer, draft: Transformer, head: JudgeHead,
                   caches: dict, read: float) -> dict:
    """Milliseconds of single passes in the middle of a text, and their share of the bandwidth."""
    context, most = PROMPT + args.max_new_tokens // 2, max(args.speculate_k)
    span, n = power_of_two(context + max(ROWS)), torch.tensor([context], device=args.device)
    state = State(n.new_zeros(2), n, n.new_zeros(1))

    def recorded(call):
        call()
        return graphs.record(call).replay if args.compile and on_gpu(args.device) else call

    def verification(model, rows, head=None):
        """The target's part of a round, on fixed drafted tokens; of one row it is a decode step."""
        e = engine_on(caches, model, draft if rows > 1 else None, head,
                      "judge" if head else "standard", rows - 1)
        compiled(args, e, f"a pass of {rows} rows" + (" with the judge" if head else ""))
        drafted = torch.arange(rows - 1, device=args.device)
        return recorded(lambda: e.verify_and_accept(model, e.head, e.cache.first(span), e.settings,
                                                    state, drafted, None, None, None))

    def drafting(k):
        e = compiled(args, engine_on(caches, target, draft, k=k), f"drafts of K = {k}")
        return recorded(lambda: e.drafter.propose(state, k, span, e.settings, None))

    calls = {("decode", "draft"): verification(draft, 1)}
    calls |= {("verify", r): verification(target, r) for r in sorted({*ROWS, most + 1})}
    calls |= {("draft", k): drafting(k) for k in args.speculate_k}
    # By themselves: among the others each would follow another pass, and seem to cost more.
    pair = interleaved({"without": calls["verify", most + 1],
                        "with": verification(target, most + 1, head)}, PAIRS * args.repeats,
                       args.device)
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
        "verify": [entry(key, target, rows=key[1]) for key in calls if key[0] == "verify"],
        "judge": {"rows": most + 1, "ms_without": 1e3 * median(pair["without"]),
                  "ms_with": 1e3 * median(pair["with"]), "ms_cost": 1e3 * median(cost)},
        "draft": [{"speculate_k": k, "ms_per_token": ms["draft", k] / k} for k in args.speculate_k],
    }


# ---------------------------------------------------------------- simulated acceptance

def mean_run(rate: float, k: int) -> float:
    """Drafted tokens accepted a round, of k, each with probability `rate` up to the first refusal.
    """
    return sum(rate ** i for i in range(1, k + 1))


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
    """Make e's rounds accept as many drafted tokens as told; returns the function that tells them.

    A round computes all that a real one does, the judge included; then its count is replaced by the
    next of `counts`, on the device.
    """
    real = e.verify_and_accept
    counts = torch.zeros(e.capacity, dtype=torch.long, device=e.device)
    at = torch.zeros(1, dtype=torch.long, device=e.device)

    def forced(target, head, cache, s, state, drafted, *rest):
        packed, *others = real(target, head, cache, s, state, drafted, *rest)
        o, a = unpack(packed, len(drafted)), counts.index_select(0, at)
        at.add_(1)
        return pack(o._replace(accepted=a, state=next_state(state, drafted, a, o.own))), *others

    def tell(runs: list[int]):
        counts[:len(runs)] = torch.tensor(runs)
        at.zero_()

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
    prompt = torch.randint(target.config.vocab_size, (PROMPT,),
                           generator=torch.Generator().manual_seed(0)).tolist()
    alone = compiled(args, engine_on(caches, target), "the target alone")
    points, runs = [], {"target": (alone, [0] * args.max_new_tokens, lambda counts: None)}
    engines = [alone]
    for k in args.speculate_k:
        e = compiled(args, engine_on(caches, target, draft, head, "judge", k), f"rounds, K = {k}")
        engines.append(e)
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


# ---------------------------------------------------------------- real acceptance

def measure_real(args, target: Transformer, draft: Transformer, head: JudgeHead | None,
                 caches: dict, prompts: list[list[int]], eos_ids) -> dict:
    """Real prompts, one a repeat, each rule and K on it in turns, to EOS; prefill is included."""
    engines = {"target": engine_on(caches, target)}
    engines |= {f"{rule} K={k}": engine_on(caches, target, draft, head, rule, k)
                for k in args.speculate_k for rule in args.rules}
    for name, e in engines.items() if args.compile else ():
        graphs.warm_up(compiled(args, e, name), min(map(len, prompts)),
                       max(map(len, prompts)) + args.max_new_tokens)

    def ours(e, prompt):
        e.tokens = []  # no prefix is kept: each prompt is read in full
        r = generate(e, prompt, args.max_new_tokens, eos_ids)
        return r.tokens, r.mean_accepted, r.tokens_per_sec

    calls = {name: lambda prompt, e=e: ours(e, prompt) for name, e in engines.items()}
    if args.peer:
        from evaluation import hf_peer  # needs transformers
        calls |= hf_peer.calls(target, draft, [args.target.config, args.draft.config],
                               args.speculate_k, args.max_new_tokens, eos_ids)
    rows = {name: [] for name in calls}
    for i, prompt in enumerate([prompts[0], *prompts]):
        for name, call in calls.items():
            start = start_together(args.device)
            tokens, accepted, of_rounds = call(prompt)
            sync(args.device)
            if i:  # the first turn is the warm-up
                speed = len(tokens) / (time.perf_counter() - start)
                rows[name].append((speed, accepted, tokens, of_rounds))

    def variant(name, row):
        speeds, accepted, texts, of_rounds = zip(*row)
        base, texts_of_target = [r[0] for r in rows["target"]], [r[2] for r in rows["target"]]
        return {"variant": name, "tokens_per_sec": median(speeds),
                "speed_up": median(a / b for a, b in zip(speeds, base)),
                "mean_accepted": mean(accepted) if "K=" in name and None not in accepted else None,
                "tokens_per_sec_of_rounds": None if None in of_rounds else median(of_rounds),
                "same_tokens_as_target": sum(a == b for a, b in zip(texts, texts_of_target)),
                "tokens": list(texts)}

    return {"label": "real acceptance", "prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "variants": [variant(name, row) for name, row in rows.items()]}


# ---------------------------------------------------------------- command line

def numbers(kind, flag):
    """A parser of a comma-separated list."""
    def parse(text):
        try:
            return sorted({kind(x) for x in text.split(",")})
        except ValueError:
            raise UserError(f"--{flag} {text}: give numbers with commas between, like "
                            "4,8,16") from None
    return parse


def parse_args(argv=None):
    p = Parser(description="Measure decoding, verification and judge decoding.")
    p.add_argument("--target", required=True, help=f"{', '.join(PRESETS)} or a config.json (dummy "
                   "weights), or a checkpoint directory")
    p.add_argument("--draft", required=True, help="the same")
    p.add_argument("--target_quant", choices=MODES, help="quantize the dummy weights")
    p.add_argument("--draft_quant", choices=MODES)
    p.add_argument("--judge", type=Path, help="judge file, for --prompts")
    p.add_argument("--prompts", type=Path, help='JSON Lines with a "prompt" each: compare real '
                   "checkpoints with real acceptance")
    p.add_argument("--rules", help="list of rules to compare on --prompts, such as "
                   "standard,topk:3 (default standard, and judge with --judge)")
    p.add_argument("--peer", choices=("hf",), help="compare with Hugging Face's generate too")
    p.add_argument("--speculate_k", type=numbers(int, "speculate_k"), default=[4, 8, 16, 32],
                   help="list of K (default 4,8,16,32)")
    p.add_argument("--accepted", type=numbers(float, "accepted"), help="list of rates to simulate, "
                   "each as the tokens accepted per round at the largest K")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5, help="of each timing; with --prompts as many "
                   "prompts, evenly spaced in the file")
    # On by default: eager, small models are timed by how fast the host starts their kernels.
    p.add_argument("--compile", action="store_true", default=True,
                   help="torch.compile, and CUDA graphs on a GPU (default)")
    p.add_argument("--no_compile", dest="compile", action="store_false",
                   help="eager: no wait for the compiler, slower passes")
    add_device_flags(p, draft=True)
    p.add_argument("--json", type=Path, help="write the result here")
    p.add_argument("--plot", type=Path, help="draw tokens/s against the accepted length here (PNG)")
    args = p.parse_args(argv)
    args.target = find(args.target, args.target_quant, "target")
    args.draft = find(args.draft, args.draft_quant, "draft")
    most = max(args.speculate_k)
    refuse((args.speculate_k[0] < 1,
            f"--speculate_k {args.speculate_k[0]}: it must be at least 1"))
    args.accepted = args.accepted or [a for a in ACCEPTED if a < most] or [most / 2]
    args.rules = rule_list(args.rules or "standard" + (",judge" if args.judge else ""))
    check_args(args, most)
    resolve_device(args)
    return args


def check_args(args, most: int):
    """Refuse what can be refused before a weight is made."""
    real, lacking = args.target.directory and args.draft.directory, importlib.util.find_spec
    judged = next((r for r in args.rules if RULES[parse_rule(r)[0]].needs_judge), None)
    refuse(
        (not 0 < args.accepted[0] <= args.accepted[-1] <= most,
         f"--accepted must be above 0 and at most the largest K, {most}"),
        (args.max_new_tokens < 2,
         f"--max_new_tokens is {args.max_new_tokens}; it must be at least 2"),
        (args.repeats < 1, f"--repeats is {args.repeats}; it must be at least 1"),
        (args.prompts and not real, "--prompts needs checkpoint directories: with dummy weights "
         "acceptance can only be simulated"),
        (args.peer and not real, "--peer hf needs real checkpoints; give checkpoint directories as "
         "--target and --draft"),
        (args.peer and not args.prompts, "--peer hf needs --prompts FILE.jsonl"),
        (args.judge and not args.prompts,
         "--judge is used with --prompts; elsewhere a judge's weights do not matter"),
        (judged and not args.judge, f"rule {judged} needs --judge FILE"),
        (args.peer and job.world() > 1, "--peer hf runs in one process; leave it out, or torchrun"),
        (args.peer and lacking("transformers") is None,
         "--peer hf needs transformers; pip install transformers"),
        (args.peer and any("quantization" in s.config for s in (args.target, args.draft)),
         "--peer hf needs checkpoints that are not quantized"),
        (args.plot and lacking("matplotlib") is None,
         "--plot needs matplotlib; pip install matplotlib"),
        (args.device == "cpu" and "fp8" in (args.target_quant, args.draft_quant),
         "fp8 needs a GPU; take int8 or int4"))
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)


def read_prompts(args) -> tuple[list[list[int]], tuple]:
    """`repeats` prompts as ids, evenly spaced in the file or repeated, and the EOS ids."""
    _, tokenizer = read_vocabulary(args.target.directory)
    check_draft(args.target.directory, args.draft.directory, tokenizer)
    lines, n = json_lines(args.prompts, "prompts"), args.repeats
    for line in lines:
        refuse((not isinstance(line.value.get("prompt"), str), f'{line.where}: no "prompt" in it'))
    chosen = [lines[i * len(lines) // n if n <= len(lines) else i % len(lines)] for i in range(n)]
    return [tokenizer.encode(line.value["prompt"]) for line in chosen], tokenizer.eos_ids


def main(argv=None):
    args = parse_args(argv)
    sources = {"target": (args.target, args.dtype), "draft": (args.draft, args.draft_dtype)}
    shared = shared_by(args.device, *sources.values())
    models = {flag: describe(*source, n) for (flag, source), n in zip(sources.items(), shared)}
    configs = [source.model_config for source, _ in sources.values()]
    most = max(args.speculate_k)
    prompts, eos_ids = job.from_rank_0(lambda: read_prompts(args)) if args.prompts else ([], ())
    # Simulated rounds make max_new_tokens and up to one round more, the last of which drafts K.
    length = max([PROMPT + args.max_new_tokens + 2 * most + max(ROWS),
                  *(len(p) + args.max_new_tokens for p in prompts)])
    context, sizes = min(c.max_seq_len for c in configs), [c.vocab_size for c in configs]
    refuse(
        (not prompts and abs(sizes[0] - sizes[1]) >= PADDING,
         f"draft {args.draft.name} has a vocabulary of {sizes[1]} tokens, target "
         f"{args.target.name} one of {sizes[0]}: more than padding explains; take a pair with one "
         "tokenizer"),
        (length > context, f"the models' context of {context} tokens is too short for {length}; "
         "lower --max_new_tokens or --speculate_k"))
    capacity = power_of_two(length + most)
    check_memory({flag: (config, dtype, n == 1)
                  for (flag, (_, dtype)), config, n in zip(sources.items(), configs, shared)},
                 capacity, max(*ROWS, most + 1), args.device, 1 + bool(args.peer),
                 "take smaller models, --target_quant, --draft_quant or --dtype bfloat16")
    judge = load_judge(args.judge, args.target.directory) if args.judge else None
    read = bandwidth(args.device, args.repeats)
    if on_gpu(args.device):
        torch.cuda.empty_cache()  # the array's memory is for the models now
    all_reduce.choose(most + 1, configs[0].dim, args.dtype, args.device)
    target, draft = (build(source, args.device, dtype, n)
                     for (source, dtype), n in zip(sources.values(), shared))
    weight = torch.randn(1, target.config.dim) / math.sqrt(target.config.dim)
    dummy = JudgeHead(weight, torch.zeros(1), 0.5, "")  # it costs what any judge costs
    caches = {m: m.new_cache(capacity) for m in (target, draft)}
    passes = measure_passes(args, models, target, draft, dummy, caches, read)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu(args.device) else
        f"CPU, {torch.get_num_threads()} threads", "ranks": job.world(),
        "torch": torch.__version__, "compile": args.compile, "repeats": args.repeats,
        "speculate_k": args.speculate_k, **models, "bandwidth_gb_per_sec": read / 1e9,
        "passes": passes,
        "collectives": collectives.measure(args, configs[0], passes["verify"]),
        "simulated": measure_simulated(args, target, draft, dummy, caches),
        "real": measure_real(args, target, draft, judge, caches, prompts, eos_ids)
        if prompts else None,
    }
    print(report(result))
    if args.json and not job.rank():
        write_json(args.json, result)
    if args.plot and not job.rank():
        plot(result, args.plot)
    return result


if __name__ == "__main__":
    job.run(main)
