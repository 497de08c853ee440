"""Generate text: the target alone, with standard speculative decoding, or with a judge.

    python generate.py                                    # the demo
    python generate.py --target DIR --draft DIR --judge FILE --prompt "..."

Flags and printing; the speculative loop is in engine.py.
"""
import contextlib
import math
import os
import sys
import time
from pathlib import Path

import graphs
from common import Parser, check_apart, check_writable, refuse, tell, write_json
from engine import Engine, LlamaDrafter, Result, generate
from judge import RULES
from linear import product_path
from load import add_device_flags, load_models, parse_rule, resolve_device, rule_help
from ranks import job
from tokenizer import Stream, Tokenizer

COLORS = {"draft": "\033[32m", "target": "\033[33m"}  # by source; any rule's own tokens:
RULE_COLOR, PLAIN = "\033[1;36m", "\033[0m"


# ---------------------------------------------------------------- printing

def use_color(out) -> bool:
    return out.isatty() and "NO_COLOR" not in os.environ


def painted(text: str, source: str) -> str:
    """`text` in the colour of its source: "draft", "target" or a rule's name."""
    return f"{COLORS.get(source, RULE_COLOR)}{text}{PLAIN}"


def legend() -> str:
    words = {"draft": "the standard test", "judge": "only the judge", "target": "the target's own"}
    return "\nEach token's colour says who let it in: " + ", ".join(
        painted(text, source) for source, text in words.items()) + "."


def printer(tokenizer: Tokenizer, prompt: list[int], eos_ids, out):
    """A callback for `generate` that prints text as it comes, and its closing call.

    On a terminal the text is coloured by source.
    """
    stream, color = Stream(tokenizer, prompt), use_color(out)

    def write(text, source):
        if text:
            out.write(painted(text, source) if color else text)
            out.flush()

    def show(tokens, sources):
        for token, source in zip(tokens, sources):
            if token not in eos_ids:
                write(stream.put(token), source)

    def finish():
        write(stream.flush(), "target")
        out.write("\n")

    return show, finish


def summary(r: Result) -> str:
    line = f"{len(r.tokens)} tokens in {r.seconds:.2f} s: {r.tokens_per_sec:.1f} tokens/s"
    if r.accept == "target":
        return f"target alone: {line}"
    return (f"{r.accept}: {line}, {r.rounds} rounds, {r.mean_accepted:.2f} drafted tokens accepted "
            f"and {r.tokens_per_round:.2f} made per round")


def slower_paths(e: Engine, compiled: bool) -> list[str]:
    """What this GPU or this PyTorch runs in place of the Triton kernels, and why."""
    models = {"target": e.target} | ({"draft": e.drafter.model} if e.drafter else {})
    lines = []
    for name, model in models.items():
        if compiled and (why := graphs.no_kernel(model)):
            lines.append(f"{name}: attention is PyTorch's: {why}")
        path = product_path(model, 1, model.norm.weight.dtype)
        if model.config.quantization and not path.startswith("Triton"):
            lines.append(f"{name}: slow products of few rows: {path}")
    return lines


def read_line() -> str | None:
    """The user's next line; None at the end of the input."""
    with contextlib.suppress(EOFError):
        return input("> ")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Judge decoding. Without arguments: the demo.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--draft", type=Path, help="checkpoint directory of the draft; without it the "
                   "target runs alone")
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--prompt", help="the text to continue, or with --chat the user's message")
    p.add_argument("--accept", metavar="RULE[:PARAMETER]", help=f"acceptance rule: {rule_help()} "
                   "(default: judge with --judge, else standard)")
    p.add_argument("--threshold", type=float, help="the rule's parameter, given apart")
    p.add_argument("--speculate_k", type=int, default=16,
                   help="drafted tokens per round (default 16)")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, help="sample among the top K tokens only")
    p.add_argument("--top_p", type=float, help="sample among the top tokens of this mass only")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    p.add_argument("--interactive", action="store_true",
                   help="read prompts from the terminal; the cache is kept between turns")
    p.add_argument("--ignore_eos", action="store_true", help="go on past EOS")
    p.add_argument("--compile", action="store_true", help="torch.compile, and CUDA graphs on a "
                   "GPU: a wait at the start, then faster")
    add_device_flags(p, draft=True)
    p.add_argument("--json", type=Path, help="write the result here")
    args = p.parse_args(argv)
    check_args(args)
    resolve_device(args)
    return args


def check_args(args):
    """Refuse what can be refused before a weight is read; sets accept and parameter."""
    args.accept, args.parameter = parse_rule(
        args.accept or ("judge" if args.judge else "standard"), threshold=args.threshold)
    judged = RULES[args.accept].needs_judge
    refuse(
        (args.prompt is None and not args.interactive,
         "nothing to do: give --prompt or --interactive"),
        (args.prompt is not None and args.interactive,
         "--prompt and --interactive exclude each other"),
        (args.draft_dtype and not args.draft, "--draft_dtype requires --draft"),
        (judged and args.draft and not args.judge, f"--accept {args.accept} needs --judge FILE"),
        (args.judge and not args.draft,
         "--judge needs --draft: the judge says which drafted tokens to accept"),
        (args.judge and not judged,
         f"--judge is not used by --accept {args.accept}; drop one of them"),
        (args.accept != "standard" and not args.draft, f"--accept {args.accept} needs --draft"),
        (args.speculate_k < 1, f"--speculate_k is {args.speculate_k}; it must be at least 1 (for "
         "the target alone leave out --draft)"),
        (args.max_new_tokens < 1,
         f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1"),
        (not 0 <= args.temperature < math.inf,
         f"--temperature is {args.temperature}; it must be 0 (greedy) or above"),
        (args.top_k is not None and args.top_k < 1,
         f"--top_k is {args.top_k}; it must be at least 1"),
        (args.top_p is not None and not 0 < args.top_p <= 1,
         f"--top_p is {args.top_p}; it must be above 0 and at most 1"))
    if args.compile:
        graphs.check_compiler(args.device)
    if args.json:
        check_writable(args.json)
        check_apart({"--json": args.json}, {"--target": args.target, "--draft": args.draft,
                                            "--judge": args.judge})


def main():
    if len(sys.argv) == 1:
        from demo.pair import show
        return show(printer, summary, legend() if use_color(sys.stdout) else "")
    args = parse_args()
    target, draft, head, tokenizer = load_models(
        args.target, args.draft, args.judge, args.device, args.dtype, args.draft_dtype,
        args.speculate_k, lambda tokenizer: args.max_new_tokens + (
            len(tokenizer.prompt(args.prompt, args.chat)) if args.prompt else 0),
        caches=1.5 if args.interactive else 1)
    engine = Engine(target, LlamaDrafter(draft) if draft else None, head, args.accept,
                    args.parameter, args.speculate_k, args.temperature, args.top_k, args.top_p,
                    args.seed)
    if args.compile:
        graphs.compile_engine(engine)
    for line in slower_paths(engine, args.compile) if engine.device.type == "cuda" else ():
        tell(line)
    eos_ids = () if args.ignore_eos else tokenizer.eos_ids
    results, messages, history = [], [], []

    def turn(text):
        nonlocal history
        if args.chat:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.chat(messages)
        else:  # a base model goes on with the running text
            prompt = history + tokenizer.encode(text, continuation=bool(history))
        length = len(prompt) + args.max_new_tokens
        if args.compile and length + engine.speculate_k > engine.capacity < engine.context:
            start = time.perf_counter()
            graphs.warm_up(engine, 1 if args.interactive else len(prompt), length)
            tell(f"warm-up: {time.perf_counter() - start:.1f} s")
        show, finish = printer(tokenizer, prompt, eos_ids, sys.stdout)
        result = generate(engine, prompt, args.max_new_tokens, eos_ids, show)
        finish()
        result.text = tokenizer.decode_new(prompt, [t for t in result.tokens if t not in eos_ids])
        messages.append({"role": "assistant", "content": result.text})
        history = prompt + result.tokens
        tell(summary(result))
        results.append(result.json())

    if not args.interactive:
        turn(args.prompt)
    while args.interactive:
        text = job.from_rank_0(read_line)
        if text is None:
            break
        if text.strip():
            turn(text)
    if args.json and not job.rank():
        write_json(args.json, results[0] if len(results) == 1 else results)


if __name__ == "__main__":
    job.run(main)
