"""Generate text: the target alone, with standard speculative decoding, or with the judge. The only speculative loop here.

Without arguments it shows the demo. The target alone is the same loop with nothing drafted. A round drafts K tokens,
verifies them in one target pass that returns logits and the judge's scores together, keeps the longest accepted run and
adds one token of the target's own. The host waits for the device once a round: to read what came out.
"""
import argparse
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import judge as rules
from cli import UserError, check_writable, replacing, run
from judge import Judge
from model import DTYPES, Cache, ModelConfig, Transformer, fingerprint, load
from tokenizer import Stream, Tokenizer

PREFILL_CHUNK = 1024  # prompt tokens read in one pass; bounds the memory of the attention mask
COLORS = {"draft": "\033[32m", "target": "\033[33m", "judge": "\033[1;36m", "topk": "\033[1;36m"}


@dataclass
class Result:
    """One generation, in the shape of the --json contract."""
    accept: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0  # the rounds: no load, no prefill
    tokens_per_sec: float = 0.0  # of the tokens that the rounds made: all but the first, which the prefill gives
    rounds: int = 0
    accept_counts: list[int] = field(default_factory=list)  # [K + 1]: how many rounds accepted i drafted tokens
    mean_accepted: float = 0.0
    tokens_per_round: float = 0.0
    sources: list[str] = field(default_factory=list)

    def json(self):
        speculation = ("rounds", "accept_counts", "mean_accepted", "tokens_per_round", "sources")
        return {k: v for k, v in asdict(self).items() if self.accept != "target" or k not in speculation}


def verify(target: Transformer, head: Judge | None, tokens: Tensor, pos: Tensor, span: int, cache: Cache) -> tuple[Tensor, Tensor | None]:
    """One target pass over the last token and k drafted ones, tokens [1, k + 1]: logits [k + 1, V] and the drafts' scores [k].

    The judge is part of this pass: a dot product with the hidden states that the LM head reads anyway.
    """
    logits, hidden = target(tokens, pos, span, cache)
    return logits[0], None if head is None else head.scores(hidden[0, 1:])


class Engine:
    """Target, draft and judge with their caches, and what is in the caches: `tokens`, of which the first `*_len` were read."""

    def __init__(self, target: Transformer, draft: Transformer | None = None, head: Judge | None = None, accept="standard",
                 threshold: float | None = None, speculate_k=16, temperature=0.0, top_k=None, top_p=None, seed=0):
        self.target, self.draft, self.accept = target, draft, accept if draft else "target"
        self.device = target.norm.weight.device
        self.head = head.to(self.device) if accept == "judge" and draft else None
        self.threshold = head.threshold if threshold is None and self.head else threshold
        self.speculate_k = speculate_k if draft else 0
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.context = min(m.config.max_seq_len for m in (target, draft) if m)
        self.caches: dict[Transformer, Cache] = {}
        self.tokens, self.target_len, self.draft_len, self.capacity = [], 0, 0, 0

    def reserve(self, length: int):
        """Room for `length` positions in both caches; what is in them stays. The size is a power of two, up to the context."""
        if length <= self.capacity:
            return
        filled, self.capacity = self.capacity, min(self.context, 1 << (length - 1).bit_length())
        for model in filter(None, (self.target, self.draft)):
            cache = model.new_cache(self.capacity)
            if filled:
                cache.kv[..., :filled, :] = self.caches[model].kv
            self.caches[model] = cache

    def span(self, length: int) -> int:
        """How much of the cache a pass that ends at `length` looks at: the next multiple of 64, so that few shapes occur."""
        return min(self.capacity, -(-length // 64) * 64)

    def read(self, model: Transformer, start: int) -> Tensor:
        """Feed tokens[start:] to a model, chunk by chunk; the hidden state at the last of them, [1, 1, D]."""
        for i in range(start, len(self.tokens), PREFILL_CHUNK):
            ids = torch.tensor([self.tokens[i:i + PREFILL_CHUNK]], device=self.device)
            end = i + ids.shape[1]
            hidden = model.features(ids, torch.arange(i, end, device=self.device), self.span(end), self.caches[model])
        return hidden[:, -1:]

    def prefill(self, prompt: list[int], room: int) -> int:
        """Read the prompt, all but what the caches hold of it already; returns the first new token. `room`: tokens to come."""
        kept = next((i for i, (a, b) in enumerate(zip(prompt, self.tokens)) if a != b), min(len(prompt), len(self.tokens)))
        self.tokens = list(prompt)
        self.reserve(len(prompt) + room)
        hidden = self.read(self.target, min(kept, self.target_len, len(prompt) - 1))
        if self.draft and min(kept, self.draft_len) < len(prompt):
            self.read(self.draft, min(kept, self.draft_len))
        self.target_len = self.draft_len = len(prompt)
        first = int(self.pick(self.target.output(hidden)[0, 0])[0])
        self.tokens.append(first)
        return first

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next token of logits [..., V] and, when sampling, the probabilities it was drawn from."""
        if self.temperature == 0:
            return logits.argmax(-1), None
        p = rules.probabilities(logits, self.temperature, self.top_k, self.top_p)
        return rules.sample(p, self.rng), p

    def draft_tokens(self, k: int) -> tuple[Tensor, Tensor | None]:
        """k >= 1 drafted tokens [k] and, when sampling, their distributions [k, V].

        The first pass reads the last two tokens: after a round in which all was accepted the draft has not read the last
        but one, after any other it reads it again, so every outcome leaves the same work and no branch.
        """
        n = len(self.tokens)
        span = self.span(n + k)
        x = torch.tensor([self.tokens[-2:]], device=self.device)
        pos = torch.arange(n - 2, n, device=self.device)
        drafted, distributions = [], []
        for i in range(k):
            logits, _ = self.draft(x, pos, span, self.caches[self.draft])
            token, q = self.pick(logits[0, -1])
            drafted.append(token)
            distributions.append(q)
            x, pos = token.view(1, 1), pos[-1:] + 1
        return torch.stack(drafted), None if self.temperature == 0 else torch.stack(distributions)

    def accept_tokens(self, logits: Tensor, scores: Tensor | None, drafted: Tensor, q: Tensor | None):
        """How many of the k drafted tokens to keep (scalar), the target's token after them, and which passed the standard test [k]."""
        rows = logits[:-1]
        if self.temperature == 0:
            passed = rules.standard(rows, drafted)
        else:
            p = rules.probabilities(logits, self.temperature, self.top_k, self.top_p)
            q = p.new_zeros(0, p.shape[1]) if q is None else q
            passed = rules.standard_sampled(p[:-1], q, drafted, torch.rand(len(drafted), device=self.device, generator=self.rng))
        mask = passed
        if self.accept == "judge":
            mask = passed | rules.judge(scores, self.threshold)
        elif self.accept == "topk":
            mask = passed | rules.topk(rows, drafted, int(self.threshold))
        a = rules.accepted(mask)
        if self.temperature == 0:
            return a, logits.argmax(-1).index_select(0, a[None]), passed
        q = torch.cat((q, torch.zeros_like(p[:1])))  # nothing was drafted after the last row: its residual is p itself
        return a, rules.sample(rules.residual(p.index_select(0, a[None]), q.index_select(0, a[None])), self.rng), passed

    def round(self, k: int) -> tuple[int, list[int], list[str]]:
        """Draft k, verify, accept: (number accepted, the new tokens, their sources). The tokens join `tokens`."""
        n = len(self.tokens)
        last = torch.tensor(self.tokens[-1:], device=self.device)
        drafted, q = self.draft_tokens(k) if k else (last[:0], None)
        pos = torch.arange(n - 1, n + k, device=self.device)
        logits, scores = verify(self.target, self.head, torch.cat((last, drafted))[None], pos, self.span(n + k), self.caches[self.target])
        a, own, passed = self.accept_tokens(logits, scores, drafted, q)
        a, own, *rest = torch.cat((a[None], own, drafted, passed.long())).tolist()  # the round's one synchronisation
        new = rest[:a] + [own]
        sources = ["draft" if ok else self.accept for ok in rest[k:k + a]] + ["target"]
        self.tokens += new
        self.target_len = n + a
        self.draft_len = min(n + k - 1, n + a) if k else self.draft_len
        return a, new, sources


@torch.inference_mode()
def generate(engine: Engine, prompt: list[int], max_new_tokens: int, eos_ids=(), on_tokens=lambda tokens, sources: None) -> Result:
    """Continue `prompt` by up to `max_new_tokens` tokens, to an end token (which is kept as the last) or the context's end.

    `on_tokens(tokens, sources)` is called with each round's news. Raises UserError for a prompt that leaves no room.
    """
    room = min(max_new_tokens, engine.context - len(prompt))
    if not prompt:
        raise UserError("the prompt has no tokens; give some text")
    if room < 1:
        windowed = engine.target.config.sliding_window == engine.context
        raise UserError(f"the prompt has {len(prompt)} tokens and the context {engine.context}" + (" (the checkpoint's sliding_window; "
                        "attention beyond it is not implemented)" if windowed else "") + "; shorten the prompt")
    result = Result(engine.accept, len(prompt), accept_counts=[0] * (engine.speculate_k + 1))

    def add(tokens, sources):
        result.tokens += tokens
        result.sources += sources
        on_tokens(tokens, sources)

    add([engine.prefill(prompt, room)], ["target"])
    start = time.perf_counter()
    while len(result.tokens) < room and result.tokens[-1] not in eos_ids:
        a, tokens, sources = engine.round(min(engine.speculate_k, room - len(result.tokens) - 1))
        end = next((i + 1 for i, t in enumerate(tokens) if t in eos_ids), len(tokens))
        result.accept_counts[min(a, end)] += 1
        add(tokens[:end], sources[:end])
    result.seconds = time.perf_counter() - start
    result.rounds = sum(result.accept_counts)
    made = len(result.tokens) - 1
    if result.rounds:
        result.tokens_per_sec = made / result.seconds
        result.mean_accepted = sum(i * c for i, c in enumerate(result.accept_counts)) / result.rounds
        result.tokens_per_round = made / result.rounds
    return result


# ---------------------------------------------------------------- command line

def use_color(out) -> bool:
    return out.isatty() and "NO_COLOR" not in os.environ


def printer(tokenizer: Tokenizer, prompt: list[int], eos_ids, out):
    """A callback for `generate` that prints text as it comes, coloured by source on a terminal, and its closing call."""
    stream, color = Stream(tokenizer, prompt), use_color(out)

    def write(text, source):
        if text:
            out.write(f"{COLORS[source]}{text}\033[0m" if color else text)
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
    return f"{r.accept}: {line}, {r.rounds} rounds, {r.mean_accepted:.2f} drafted tokens accepted and {r.tokens_per_round:.2f} made per round"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Judge decoding. Without arguments: the demo.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--draft", type=Path, help="checkpoint directory of the draft; without it the target runs alone")
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--prompt", help="the text to continue, or with --chat the user's message")
    p.add_argument("--accept", choices=rules.RULES, help="acceptance rule (default: judge with --judge, else standard)")
    p.add_argument("--threshold", type=float, help="judge: accept above this probability (default: the judge file's); topk: k")
    p.add_argument("--speculate_k", type=int, default=16, help="drafted tokens per round (default 16)")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, help="sample among the k likeliest only")
    p.add_argument("--top_p", type=float, help="sample among the likeliest that hold this mass only")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    p.add_argument("--interactive", action="store_true", help="read prompts from the terminal; the cache is kept between turns")
    p.add_argument("--ignore_eos", action="store_true", help="go on past end tokens")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    p.add_argument("--json", type=Path, help="write the result here")
    args = p.parse_args(argv)
    args.accept = args.accept or ("judge" if args.judge else "standard")
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    check_args(args)
    return args


def check_args(args):
    """Everything about the flags that can be refused before a weight is read."""
    threshold = args.threshold
    for bad, message in (
            (args.prompt is None and not args.interactive, "nothing to do: give --prompt or --interactive"),
            (args.prompt is not None and args.interactive, "--prompt and --interactive exclude each other"),
            (args.accept == "judge" and args.draft and not args.judge, "--accept judge needs --judge FILE"),
            (args.judge and not args.draft, "--judge needs --draft: the judge says which drafted tokens to accept"),
            (args.judge and args.accept != "judge", f"--judge is not used by --accept {args.accept}; drop one of them"),
            (args.accept != "standard" and not args.draft, f"--accept {args.accept} needs --draft"),
            (args.speculate_k < 1, f"--speculate_k is {args.speculate_k}; it must be at least 1 (for the target alone leave out --draft)"),
            (args.max_new_tokens < 1, f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1"),
            (not 0 <= args.temperature < math.inf, f"--temperature is {args.temperature}; it must be 0 (greedy) or above"),
            (args.top_k is not None and args.top_k < 1, f"--top_k is {args.top_k}; it must be at least 1"),
            (args.top_p is not None and not 0 < args.top_p <= 1, f"--top_p is {args.top_p}; it must be above 0 and at most 1"),
            (args.accept == "standard" and threshold is not None, "--threshold has no meaning for --accept standard"),
            (args.accept == "judge" and threshold is not None and not 0 <= threshold <= 1, f"--threshold is {threshold}; for the judge it must be from 0 to 1"),
            (args.accept == "topk" and (threshold is None or threshold < 1 or threshold % 1), "--accept topk needs --threshold K, a whole number of at least 1"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this PyTorch sees no CUDA device; use --device cpu"),
    ):
        if bad:
            raise UserError(message)
    if args.json:
        check_writable(args.json)


def load_engine(args) -> tuple[Engine, Tokenizer]:
    """Check that target, draft and judge fit each other, then load them."""
    config, tokenizer = ModelConfig.from_dir(args.target), Tokenizer.from_dir(args.target)
    draft = head = None
    if args.draft:
        draft_config = ModelConfig.from_dir(args.draft)
        if draft_config.vocab_size != config.vocab_size:
            raise UserError(f"draft {args.draft} has a vocabulary of {draft_config.vocab_size} tokens, target {args.target} one of {config.vocab_size}; "
                            "speculation needs the same")
        if not tokenizer.same_as(Tokenizer.from_dir(args.draft)):
            raise UserError(f"draft {args.draft} and target {args.target} have different tokenizers; speculation needs the same")
        context = min(config.max_seq_len, draft_config.max_seq_len)
        if args.speculate_k >= context:
            raise UserError(f"--speculate_k is {args.speculate_k}; it must be below the context of {context} tokens")
    if args.judge:
        head = Judge.load(args.judge, config.dim, fingerprint(args.target), str(args.target))
    target = load(args.target, args.device, args.dtype)
    if args.draft:
        draft = load(args.draft, args.device, args.dtype)
    return Engine(target, draft, head, args.accept, args.threshold, args.speculate_k, args.temperature, args.top_k, args.top_p, args.seed), tokenizer


def main():
    if len(sys.argv) == 1:
        from demo.show import show
        return show()
    args = parse_args()
    engine, tokenizer = load_engine(args)
    eos_ids = () if args.ignore_eos else tokenizer.eos_ids
    results, messages, history = [], [], []

    def turn(text):
        nonlocal history
        if args.chat:
            messages.append({"role": "user", "content": text})
            prompt = tokenizer.chat(messages)
        else:  # a base model goes on with the running text
            prompt = history + tokenizer.encode(text, continuation=bool(history))
        show, finish = printer(tokenizer, prompt, eos_ids, sys.stdout)
        result = generate(engine, prompt, args.max_new_tokens, eos_ids, show)
        finish()
        result.text = tokenizer.decode_new(prompt, [t for t in result.tokens if t not in eos_ids])
        messages.append({"role": "assistant", "content": result.text})
        history = prompt + result.tokens
        print(summary(result), file=sys.stderr)
        results.append(result.json())

    if not args.interactive:
        turn(args.prompt)
    while args.interactive:
        try:
            text = input("> ")
        except EOFError:
            break
        if text.strip():
            turn(text)
    if args.json:
        with replacing(args.json) as tmp:
            tmp.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
