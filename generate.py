"""Generate text: the target alone, with standard speculative decoding, or with a judge.

    python generate.py                                    # the demo
    python generate.py --target DIR --draft DIR --judge FILE --prompt "..."

Flags and printing; the speculative loop is in engine.py.
"""
import contextlib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import graphs
from common import Parser, check_apart, check_writable, refuse, tell, visible, write_json
from drafters.choice import (
    CHAIN,
    TREE_HELP,
    check_k,
    check_rules,
    kind,
    ks_of,
    make_drafter,
    most_drafted,
    parse_tree,
)
from drafters.length import automatic, draft_length
from engine import Engine, Result, generate
from judge import COLDEST, RULES
from linear import product_path
from load import (
    add_device_flags,
    load_models,
    parse_rule,
    resolve_device,
    rule_help,
    span_ids,
    spell_rule,
)
from ranks import job
from tokenizer import Stream, Tokenizer

COLORS = {"draft": "\033[32m", "target": "\033[33m"}  # by source; any rule's own tokens:
RULE_COLOR, PLAIN = "\033[1;36m", "\033[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end


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

    On a terminal the text is coloured by source, and its control characters are shown escaped: they
    would do there what the model says.
    """
    stream, color, terminal = Stream(tokenizer, prompt), use_color(out), out.isatty()

    def write(text, source):
        if terminal:
            text = CONTROL.sub(lambda m: visible(m[0]), text)
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
    models = {"target": e.target, "draft": getattr(e.drafter, "model", None)}  # a Llama's
    lines = []
    for name, model in models.items():
        if model is None:
            continue
        if compiled and (why := graphs.no_kernel(model)):
            lines.append(f"{name}: attention is PyTorch's: {why}")
        path = product_path(model, 1, model.norm.weight.dtype)
        if model.config.quantization and not path.startswith("Triton"):
            lines.append(f"{name}: slow products of few rows: {path}")
    return lines


# ---------------------------------------------------------------- turns

class Turn(NamedTuple):
    text: str
    answer: str
    ids: list[int]  # both, as they stand in a running text


class Conversation:
    """The turns so far, in a chat template or as one running text, which a base model goes on with.

    One that has outgrown the context goes on without its oldest turns.
    """

    def __init__(self, tokenizer: Tokenizer, chat: bool, context: int, max_new_tokens: int):
        self.tokenizer, self.chat, self.context, self.turns = tokenizer, chat, context, []
        self.room = min(max_new_tokens, context // 2)  # for an answer, where there are old turns

    def ids(self, turns: list[Turn], text: str) -> list[int]:
        if self.chat:
            said = [m for t in turns for m in (("user", t.text), ("assistant", t.answer))]
            return self.tokenizer.chat([{"role": role, "content": content}
                                        for role, content in (*said, ("user", text))])
        before = [i for t in turns for i in t.ids]
        return [*(self.tokenizer.bos if before else ()), *before,
                *self.tokenizer.encode(text, continuation=bool(before))]

    def prompt(self, text: str) -> tuple[list[int], int]:
        """The prompt that `text` makes, and how many of the oldest turns have no place in it.

        It is too long for the context only if `text` alone is.
        """
        alone = self.ids([], text)
        for dropped in range(len(self.turns) if len(alone) < self.context else 0):
            ids = self.ids(self.turns[dropped:], text)
            if len(ids) + self.room <= self.context:
                return ids, dropped
        return alone, len(self.turns)

    def add(self, text: str, prompt: list[int], dropped: int, result: Result):
        del self.turns[:dropped]
        start = len(self.tokenizer.bos) + sum(len(t.ids) for t in self.turns)
        self.turns.append(Turn(text, result.text, prompt[start:] + result.tokens))


def read_line() -> str | None:
    """The user's next line that is text; None at the end of the input."""
    with contextlib.suppress(EOFError):
        while not is_text(line := input("> ")):
            tell("that line is not UTF-8 text, so it is left out")
        return line


def is_text(line: str) -> bool:
    """False for one with bytes that are no characters, which stand in it as lone surrogates."""
    with contextlib.suppress(UnicodeEncodeError):
        line.encode()
        return True
    return False


@contextlib.contextmanager
def held_back_signals():
    """Yields generate's `stop`: a signal that ends the process ends the turn first, with its round.

    It acts on leaving the block, so what was said can be saved. Before the first token, and if it
    comes again, it acts at once.
    """
    came, before, said = [], {}, False

    def stop(token):
        nonlocal said
        said = True
        return bool(came)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number, _):
        restore()
        came.append(number)
        if not said:
            signal.raise_signal(number)

    for name in "SIGINT", "SIGTERM", "SIGHUP":
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, hold)
    try:
        yield stop
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Judge decoding. Without arguments: the demo.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--draft", type=lambda text: text if text == "ngram" else Path(text),
                   help="checkpoint directory of the draft, directory of an EAGLE head, or ngram: "
                   "what followed where the text read like this before (a directory of that name "
                   "is ./ngram); without it the target runs alone")
    p.add_argument("--tree", type=parse_tree, help=TREE_HELP)
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--prompt", help="the text to continue, or with --chat the user's message")
    p.add_argument("--accept", metavar="RULE[:PARAMETER]", help=f"acceptance rule: {rule_help()} "
                   "(default: judge with --judge, else standard)")
    p.add_argument("--threshold", type=float, help="the rule's parameter, given apart")
    p.add_argument("--speculate_k", type=draft_length, help=f"drafted tokens per round (default "
                   f"{CHAIN}; a tree brings its own), or auto: as many as pay, measured")
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
    args.accept, args.parameter, args.span = parse_rule(
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
        (args.speculate_k is not None and args.speculate_k < 1, f"--speculate_k is "
         f"{args.speculate_k}; it must be at least 1 (for the target alone leave out --draft)"),
        (args.max_new_tokens < 1,
         f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1"),
        (not 0 <= args.temperature < math.inf,
         f"--temperature is {args.temperature}; it must be 0 (greedy) or above"),
        (args.top_k is not None and args.top_k < 1,
         f"--top_k is {args.top_k}; it must be at least 1"),
        (args.top_p is not None and not 0 < args.top_p <= 1,
         f"--top_p is {args.top_p}; it must be above 0 and at most 1"))
    check_drafter(args)
    if args.compile:
        graphs.check_compiler(args.device)
    if args.json:
        check_writable(args.json)
        check_apart({"--json": args.json}, {
            "--target": args.target, "--judge": args.judge,
            "--draft": None if args.draft == "ngram" else args.draft})


def check_drafter(args):
    """Refuse what does not fit --draft; sets drafter, its name, and speculate_k."""
    given = [args.speculate_k] if args.speculate_k else []
    args.drafter = kind(args.draft, args.tree)
    refuse(
        (args.tree and args.drafter != "eagle-tree", "--tree needs an EAGLE head as --draft" + (
            f"; {args.draft} holds a Llama" if args.drafter == "llama" else "")),
        (args.draft_dtype and args.drafter == "ngram",
         "--draft_dtype is of a model's weights; --draft ngram has none"))
    if args.draft:
        spelling = spell_rule(args.accept, args.parameter, args.span)
        check_rules({spelling: (args.accept, args.parameter)}, [args.drafter], given or [CHAIN],
                    args.temperature <= COLDEST)
    if args.tree:
        check_k(args.tree, given)
    args.speculate_k, = ks_of(args.drafter, args.tree, given)


def main():
    if len(sys.argv) == 1:
        from demo.pair import show
        return show(printer, summary, legend() if use_color(sys.stdout) else "")
    args = parse_args()
    of_kind = lambda *names: args.draft if args.drafter in names else None
    drafted = most_drafted([args.drafter] * bool(args.draft), args.tree, [args.speculate_k])
    target, draft, head, tokenizer, eagle = load_models(
        args.target, of_kind("llama"), args.judge, args.device, args.dtype,
        args.draft_dtype, drafted, lambda tokenizer: args.max_new_tokens + (
            len(tokenizer.prompt(args.prompt, args.chat)) if args.prompt else 0),
        caches=1.5 if args.interactive else 1, eagle=of_kind("eagle", "eagle-tree"))
    drafter = make_drafter(args.drafter, target, draft, eagle, args.tree) if args.draft else None
    drafter, chooser = automatic(drafter, args.speculate_k)
    engine = Engine(target, drafter, head, args.accept, args.parameter, args.speculate_k,
                    args.temperature, args.top_k, args.top_p, args.seed, chooser,
                    span_ids(args.span, tokenizer))
    if args.compile:
        graphs.compile_engine(engine)
    for line in slower_paths(engine, args.compile) if engine.device.type == "cuda" else ():
        tell(line)
    if args.interactive:
        converse(args, engine, tokenizer)
    else:
        respond(args, engine, tokenizer, tokenizer.prompt(args.prompt, args.chat),
                lambda result: save(args, [result]))


def converse(args, engine: Engine, tokenizer: Tokenizer):
    """Answer the lines of standard input, to its end; --json holds every turn as soon as it ends.
    """
    talk = Conversation(tokenizer, args.chat, engine.context, args.max_new_tokens)
    results = []

    def keep(result):
        results.append(result)
        save(args, results)

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad byte would take lines with it
    save(args, results)
    while (text := job.from_rank_0(read_line)) is not None:
        if not text.strip():
            continue
        prompt, dropped = talk.prompt(text)
        if not 0 < len(prompt) < engine.context:
            tell(f"that message has {len(prompt)} tokens and the context {engine.context}, so it "
                 "is left out; write a shorter one")
            continue
        if dropped:
            tell(f"the chat has outgrown the context of {engine.context} tokens; it goes on "
                 f"without its oldest {dropped} turn{'s' * (dropped > 1)}")
        with held_back_signals() as stop:
            respond(args, engine, tokenizer, prompt, keep, stop)
        talk.add(text, prompt, dropped, results[-1])


def respond(args, engine: Engine, tokenizer: Tokenizer, prompt: list[int], keep,
            stop=lambda token: False):
    """Print what follows the prompt as it comes. `keep(result)` is called before the last words,
    whose reader may be gone; `stop` is generate's.
    """
    length = len(prompt) + args.max_new_tokens
    if args.compile and length + engine.drafted > engine.capacity < engine.context:
        start = time.perf_counter()
        graphs.warm_up(engine, 1 if args.interactive else len(prompt), length)
        tell(f"warm-up: {time.perf_counter() - start:.1f} s")
    eos_ids = () if args.ignore_eos else tokenizer.eos_ids
    show, finish = printer(tokenizer, prompt, eos_ids, sys.stdout)
    result = generate(engine, prompt, args.max_new_tokens, eos_ids, show, stop)
    result.text = tokenizer.decode_new(prompt, [t for t in result.tokens if t not in eos_ids])
    keep(result)
    finish()
    tell(summary(result))


def save(args, results: list[Result]):
    """Write --json: one object, or for a chat of several turns (or of none) a list."""
    if args.json and not job.rank():
        write_json(args.json, results[0].json() if len(results) == 1
                   else [r.json() for r in results])


if __name__ == "__main__":
    job.run(main)
