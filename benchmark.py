"""What a pass costs, and what speculation makes of it, in one command. No download needed.

    python benchmark.py --target llama-3.1-70b --draft llama-3.1-8b --target_quant int8 --plot FILE
    python benchmark.py --target DIR --draft DIR --judge FILE --prompts FILE.jsonl --peer hf
    python benchmark.py ... --eagle DIR --drafters llama,eagle,eagle-tree,ngram --prompts FILE.jsonl
    torchrun --standalone --nproc_per_node=8 benchmark.py --target llama-3.1-405b ...

A preset or a config.json gets dummy weights of its real shapes: real speed, meaningless text. How
many drafted tokens a round accepts is then forced, and what rests on it is labelled 'simulated
acceptance'. Real checkpoints with --prompts are also compared with real acceptance, interleaved,
with Hugging Face's generate, and the same rules around its forward, beside ours. The time to the
first token is that from a prompt's start to its first new token. Under torchrun the ranks share the
target as generate.py's do; times are rank 0's, bytes and bandwidth those of all ranks. Batch size
1, greedy.
"""
import importlib.util
import math
from pathlib import Path

import torch

from common import (
    TEXT,
    Parser,
    UserError,
    check_apart,
    check_writable,
    json_lines,
    refuse,
    say,
    write_json,
)
from drafters.choice import (
    add_drafter_flags,
    ks_of,
    make_drafter,
    most_drafted,
    resolve_drafters,
)
from drafters.length import Auto, draft_length
from engine import power_of_two
from evaluation import collectives
from evaluation.benchmark_report import plot, report
from evaluation.dummy import PRESETS, build, describe, find, shared_by
from evaluation.passes import attention_name, measure_first_token, measure_passes
from evaluation.real import measure_real
from evaluation.simulated import PROMPT, measure_simulated
from evaluation.timing import bandwidth, on_gpu
from judge import RULES, JudgeHead
from linear import MODES, product_path
from load import (
    add_device_flags,
    check_draft,
    eagle_memory,
    engine_rule,
    load_eagle,
    load_judge,
    parse_rule,
    read_vocabulary,
    resolve_device,
    rule_list,
)
from ranks import all_reduce, job
from ranks.memory import Memory, check_memory

ROWS = [1, 2, 4, 8, 16, 32, 64]  # positions of a verification pass
LENGTHS = [64, 512]  # of the prompts whose first token is timed
KS = [4, 8, 16, 32]
PADDING = 1024  # without tokenizers to compare, vocabularies that differ by less count as one
ACCEPTED = (2.0, 4.0, 6.3, 10.0, 15.0, 19.7, 25.0)  # rates to simulate; 6.3 and 19.7: the paper's


def numbers(kind, flag):
    """A parser of a comma-separated list."""
    def parse(text):
        try:
            return sorted({kind(x) for x in text.split(",")})
        except (ValueError, UserError):
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
    add_drafter_flags(p)
    p.add_argument("--peer", choices=("hf",), help="compare with Hugging Face too: generate alone "
                   "and assisted, and --rules around its forward")
    p.add_argument("--speculate_k", type=numbers(draft_length, "speculate_k"), default=None,
                   help="list of K (default 4,8,16,32; a tree brings its own); with --prompts auto "
                   "may be among them: as many as pay, measured")
    p.add_argument("--rows", type=numbers(int, "rows"), default=ROWS, help="list of rows of the "
                   "verification passes (default 1,2,4,8,16,32,64; 1 and the largest K + 1 are "
                   "always among them); above 64 rows a GPU widens quantized weights first")
    p.add_argument("--prompt_tokens", type=numbers(int, "prompt_tokens"), help="list of prompt "
                   "lengths whose time to the first token is measured (default 64,512)")
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
    given = args.speculate_k or []
    args.speculate_k = [k for k in given if not isinstance(k, Auto)] or KS
    refuse((any(isinstance(k, Auto) for k in given) and not args.prompts, "--speculate_k auto is "
            "used with --prompts: simulated acceptance says nothing of it"))
    most = max(args.speculate_k)
    for flag in ("speculate_k", "rows", "prompt_tokens"):
        least = min(getattr(args, flag) or [1])
        refuse((least < 1, f"--{flag} {least}: it must be at least 1"))
    args.accepted = args.accepted or [a for a in ACCEPTED if a < most] or [most / 2]
    args.rules = rule_list(args.rules or "standard" + (",judge" if args.judge else ""))
    check_args(args, most)
    resolve_drafters(args, {r: parse_rule(r) for r in args.rules} if args.prompts else {}, given,
                     default=KS)
    refuse((args.peer and "llama" not in args.drafters, "--peer hf drafts with --draft alone, no "
            "head, no tree; add llama to --drafters"))
    args.ks = {name: ks_of(name, args.tree, given, KS) for name in args.drafters}
    args.drafted = max(most, most_drafted(args.drafters, args.tree, given, KS))
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
        ((args.drafters or args.eagle or args.tree) and not args.prompts, "--drafters, --eagle and "
         "--tree are used with --prompts: without, acceptance is simulated, of a Llama draft"),
        (args.peer and job.world() > 1, "--peer hf runs in one process; leave it out, or torchrun"),
        (args.peer and lacking("transformers") is None,
         "--peer hf needs transformers; pip install transformers"),
        (args.plot and lacking("matplotlib") is None,
         "--plot needs matplotlib; pip install matplotlib"),
        (args.device == "cpu" and "fp8" in (args.target_quant, args.draft_quant),
         "fp8 needs a GPU; take int8 or int4"))
    writes = {"--json": args.json, "--plot": args.plot}
    for path in filter(None, writes.values()):
        check_writable(path)
    check_apart(writes, {"--target": Path(args.target.name), "--draft": Path(args.draft.name),
                         "--judge": args.judge, "--prompts": args.prompts,
                         "--eagle": args.eagle})


def read_prompts(args) -> tuple[list[list[int]], tuple, dict[str, dict]]:
    """`repeats` prompts as ids, evenly spaced in the file or repeated; the EOS ids; the rules as an
    engine takes them.
    """
    _, tokenizer = read_vocabulary(args.target.directory)
    check_draft(args.target.directory, args.draft.directory, tokenizer)
    lines, n = json_lines(args.prompts, "prompts", kinds={"prompt": TEXT}), args.repeats
    for line in lines:
        refuse((line.value.get("prompt") is None, f'{line.where}: no "prompt" in it'))
    chosen = [lines[i * len(lines) // n if n <= len(lines) else i % len(lines)] for i in range(n)]
    return ([tokenizer.encode(line.value["prompt"]) for line in chosen], tokenizer.eos_ids,
            {rule: engine_rule(rule, tokenizer) for rule in args.rules})


def main(argv=None):
    args = parse_args(argv)
    sources = {"target": (args.target, args.dtype), "draft": (args.draft, args.draft_dtype)}
    shared = shared_by(args.device, *sources.values())
    models = {flag: describe(*source, n) for (flag, source), n in zip(sources.items(), shared)}
    configs = [source.model_config for source, _ in sources.values()]
    most = max(args.speculate_k)
    prompts, eos_ids = [], ()
    if args.prompts:
        prompts, eos_ids, args.rules = job.from_rank_0(lambda: read_prompts(args))
    context, sizes = min(c.max_seq_len for c in configs), [c.vocab_size for c in configs]
    args.prompt_tokens = args.prompt_tokens or [n for n in LENGTHS if n + 2 <= context]
    # Simulated rounds make max_new_tokens and up to one round more, the last of which drafts K.
    middle = PROMPT + args.max_new_tokens // 2  # of a text, where single passes are
    length = max([PROMPT + args.max_new_tokens + 2 * most, middle + max(*args.rows, most + 1),
                  *(n + 2 for n in args.prompt_tokens),
                  *(len(p) + args.max_new_tokens for p in prompts)])
    refuse(
        (not prompts and abs(sizes[0] - sizes[1]) >= PADDING,
         f"draft {args.draft.name} has a vocabulary of {sizes[1]} tokens, target "
         f"{args.target.name} one of {sizes[0]}: more than padding explains; take a pair with one "
         "tokenizer"),
        (length > context, f"the models' context of {context} tokens is too short for {length}; "
         "lower --max_new_tokens, --speculate_k, --rows or --prompt_tokens"))
    refuse((args.drafted >= context, f"a round of {args.drafted} drafted tokens does not fit the "
            f"models' context of {context}; lower --tree"))
    capacity = power_of_two(length + args.drafted)
    headed = [name for name in args.drafters if name.startswith("eagle")]
    needs = {flag: (config, dtype, n == 1)
             for (flag, (_, dtype)), config, n in zip(sources.items(), configs, shared)}
    if headed:  # each of its engines has caches of its own
        own = eagle_memory(args.eagle, configs[0], args.draft_dtype, capacity, args.device)
        engines = len(args.rules) * sum(len(args.ks[name]) for name in headed)
        needs["EAGLE head"] = own._replace(cache=engines * own.cache)
    # Hugging Face's forward has no kernels for quantized weights: it gets a widened copy.
    needs |= {f"{flag} in Hugging Face": Memory(models[flag]["parameters"] * dtype.itemsize, 0, 0)
              for flag, (_, dtype) in sources.items() if args.peer and models[flag]["quant"]}
    check_memory(needs, capacity, max(*args.rows, args.drafted + 1), args.device,
                 1 + bool(args.peer),
                 "take smaller models, --target_quant, --draft_quant or --dtype bfloat16")
    judge = load_judge(args.judge, args.target.directory) if args.judge else None
    eagle = load_eagle(args.eagle, args.target.directory, args.device,
                       args.draft_dtype) if headed else None
    read = bandwidth(args.device, args.repeats)
    if on_gpu(args.device):
        torch.cuda.empty_cache()  # the array's memory is for the models now
    all_reduce.choose(args.drafted + 1, configs[0].dim, args.dtype, args.device)
    target, draft = (build(source, args.device, dtype, n)
                     for (source, dtype), n in zip(sources.values(), shared))
    make = lambda name: make_drafter(name, target, draft, eagle, args.tree)
    weight = torch.randn(1, target.config.dim) / math.sqrt(target.config.dim)
    dummy = JudgeHead(weight, torch.zeros(1), 0.5, "")  # it costs what any judge costs
    caches = {m: m.new_cache(capacity) for m in (target, draft)}
    passes = measure_passes(args, models, target, draft, dummy, caches, middle, read)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu(args.device) else
        f"CPU, {torch.get_num_threads()} threads", "ranks": job.world(),
        "torch": torch.__version__, "compile": args.compile, "repeats": args.repeats,
        "speculate_k": args.speculate_k, **models, "bandwidth_gb_per_sec": read / 1e9,
        "attention": "; draft: ".join(dict.fromkeys(
            attention_name(args, model) for model in (target, draft))),
        "products": {flag: {rows: product_path(model, rows, dtype) for rows in (1, most + 1)}
                     for (flag, (_, dtype)), model in zip(sources.items(), (target, draft))},
        "passes": passes,
        "first_token": measure_first_token(args, target, draft, caches),
        "collectives": collectives.measure(args, configs[0], passes["verify"]),
        "simulated": measure_simulated(args, target, draft, dummy, caches),
        "real": measure_real(args, target, draft, judge, caches, prompts, eos_ids, make)
        if prompts else None,
    }
    if args.json and not job.rank():
        write_json(args.json, result)
    if args.plot and not job.rank():
        plot(result, args.plot)
    say(report(result))
    return result


if __name__ == "__main__":
    job.run(main)
