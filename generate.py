"""Generate text: the target alone, with standard speculative decoding, or with the judge.

The only speculative loop here.

Without arguments it shows the demo. The target alone is the same loop with nothing drafted. A round
drafts K tokens, verifies them in one target pass that returns logits and the judge's scores
together, keeps the longest accepted run and adds one token of the target's own. The host waits for
the device once a round: to read what came out.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import judge as rules
import tp
from cli import UserError, check_writable, replacing, run
from judge import Judge
from model import DTYPES, Cache, ModelConfig, Transformer, fingerprint, load
from tokenizer import Stream, Tokenizer

PREFILL_CHUNK = 1024  # prompt tokens read in one pass; bounds the memory of the attention mask
# least length of a cache and of what attention looks at: below it costs little, and every size has
# to be compiled
SPAN = 256
UNROLL = 64  # draft steps times draft layers up to which a draft is compiled as one graph
COLORS = dict.fromkeys(rules.RULES, "\033[1;36m") | {"draft": "\033[32m", "target": "\033[33m"}
TYPICAL = 0.09  # epsilon of the typical rule where none is given: Medusa's


def power_of_two(length: int) -> int:
    """The smallest power of two, from SPAN, that is at least `length`."""
    return max(SPAN, 1 << (length - 1).bit_length())


@dataclass
class Result:
    """One generation, in the shape of the --json contract."""
    accept: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0  # the rounds: no load, no prefill
    # of the tokens that the rounds made: all but the first, which the prefill gives
    tokens_per_sec: float = 0.0
    rounds: int = 0
    # [K + 1]: how many rounds accepted i drafted tokens
    accept_counts: list[int] = field(default_factory=list)
    mean_accepted: float = 0.0
    tokens_per_round: float = 0.0
    sources: list[str] = field(default_factory=list)

    def json(self):
        speculation = ("rounds", "accept_counts", "mean_accepted", "tokens_per_round", "sources")
        return {k: v for k, v in asdict(self).items() if self.accept != "target"
                or k not in speculation}


@dataclass(frozen=True)
class Settings:
    """What a round depends on beside tensors; a compiled round is compiled for these values."""
    accept: str
    threshold: float | None
    temperature: float
    top_k: int | None
    top_p: float | None

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is sampled from."""
        return rules.probabilities(logits, self.temperature, self.top_k, self.top_p)

    @property
    def compares(self) -> bool:
        """Whether acceptance looks at the draft's distribution, not at its tokens only."""
        return self.temperature > 0 or self.accept == "kl"


def choose(logits: Tensor, s: Settings, noise: Tensor | None) -> Tensor:
    """The next token of logits [..., V]; noise as `judge.sample` takes it."""
    return logits.argmax(-1) if s.temperature == 0 else rules.sample(s.probabilities(logits), noise)


def draft_step(draft: Transformer, tokens: Tensor, pos: Tensor, cache: Cache, s: Settings,
               noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """One pass of the draft over tokens [S] at pos [S]: the token after them [1] and its logits [1,
    V].
    """
    logits, _ = draft(tokens[None], pos, cache)
    return choose(logits[0, -1:], s, noise), logits[0, -1:]


def draft_tokens(step, draft: Transformer, state: Tensor, k: int, cache: Cache, s: Settings,
                 noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """k drafted tokens [k] and, where acceptance compares them, their logits [k, V]; noise [k, V].

    `step` is `draft_step`, compiled or not.

    The first step reads the last two tokens: after a round in which all was accepted the draft has
    not read the last but one, after any other it reads it again, so every outcome leaves the same
    work and no branch.
    """
    tokens, pos = state[:2], state[2] + torch.arange(-2, 0, device=state.device)
    drafted, logits = [], []
    for i in range(k):
        tokens, row = step(draft, tokens, pos, cache, s, None if noise is None else noise[i:i + 1])
        pos = pos[-1:] + 1
        drafted.append(tokens)
        logits.append(row)
    return torch.cat(drafted), torch.cat(logits) if s.compares else None


def verify(target: Transformer, head: Judge | None, tokens: Tensor, pos: Tensor,
           cache: Cache) -> tuple[Tensor, Tensor | None]:
    """One target pass over the last token and k drafted ones, tokens [k + 1]: logits [k + 1, V] and
    the drafts' scores [k].

    The judge is part of this pass: a dot product with the hidden states that the LM head reads
    anyway.
    """
    logits, hidden = target(tokens[None], pos, cache)
    return logits[0], None if head is None else head.scores(hidden[0, 1:])


def accept_mask(passed: Tensor, logits: Tensor, scores: Tensor | None, drafted: Tensor,
                draft_logits: Tensor | None, s: Settings) -> Tensor:
    """Which of k drafted tokens the rule lets in, bool [k], given which `passed` the standard test;
    logits, draft_logits [k, V], scores [k].
    """
    if s.accept == "judge":
        return passed | rules.judge(scores, s.threshold)
    if s.accept == "topk":
        return passed | rules.topk(logits, drafted, int(s.threshold))
    if s.accept == "typical":
        return passed | rules.typical(logits, drafted, s.threshold)
    if s.accept == "kl":
        return passed | rules.kl(logits, draft_logits, s.threshold)
    return passed


def accept_tokens(logits: Tensor, scores: Tensor | None, drafted: Tensor,
                  draft_logits: Tensor | None, left: Tensor, s: Settings,
                  noise: Tensor | None, uniform: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """How many of the k drafted tokens to keep [1], at most left [1]; the target's token after them
    [1]; which passed the standard test [k].

    logits [k + 1, V], scores [k], draft_logits [k, V]; noise [1, V] and uniform [k] when sampling.
    """
    rows = logits[:-1]
    if s.temperature == 0:
        passed = rules.standard(rows, drafted)
    else:
        p, q = s.probabilities(logits), s.probabilities(draft_logits)
        passed = rules.standard_sampled(p[:-1], q, drafted, uniform)
    mask = accept_mask(passed, rows, scores, drafted, draft_logits, s)
    a = torch.minimum(rules.accepted(mask)[None], left)
    if s.temperature == 0:
        return a, logits.index_select(0, a).argmax(-1), passed
    # Nothing was tested after the last kept token when all that may be kept was: then the residual
    # is p itself.
    q = torch.cat((q, torch.zeros_like(p[:1]))).index_select(0, a) * (a < left)[:, None]
    return a, rules.sample(rules.residual(p.index_select(0, a), q), noise), passed


def verify_and_accept(target: Transformer, head: Judge | None, state: Tensor, drafted: Tensor,
                      draft_logits: Tensor | None, cache: Cache, s: Settings,
                      noise: Tensor | None, uniform: Tensor | None) -> Tensor:
    """The target's half of a round, int64 [2k + 6]: number accepted, the target's token, drafted
    [k], passed [k], and the new state [4].

    A state is the last two tokens, how many there are, and how many drafted tokens the next round
    may keep.
    """
    k, (last, n, left) = len(drafted), state[1:].split(1)
    tokens = torch.cat((last, drafted))
    logits, scores = verify(target, head, tokens, n - 1 + torch.arange(k + 1, device=n.device),
                            cache)
    if k == 0:
        a, own, passed = torch.zeros_like(n), choose(logits, s, noise), drafted
    else:
        a, own, passed = accept_tokens(logits, scores, drafted, draft_logits, left, s, noise,
                                       uniform)
    return torch.cat((a, own, drafted, passed.long(), tokens.index_select(0, a), own, n + a + 1,
                      left - a - 1))


class Engine:
    """Target, draft and judge with their caches, and what is in the caches: `tokens`, of which the
    first `*_len` were read.
    """

    def __init__(self, target: Transformer, draft: Transformer | None = None,
                 head: Judge | None = None, accept="standard",
                 threshold: float | None = None, speculate_k=16, temperature=0.0, top_k=None,
                 top_p=None, seed=0):
        self.target, self.draft, self.accept = target, draft, accept if draft else "target"
        self.device = target.norm.weight.device
        self.head = head.to(self.device) if accept == "judge" and draft else None
        if threshold is None:
            threshold = head.threshold if self.head else TYPICAL if accept == "typical" else None
        self.settings = Settings(self.accept, threshold, temperature, top_k, top_p)
        self.speculate_k = speculate_k if draft else 0
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.context = min(m.config.max_seq_len for m in (target, draft) if m)
        self.caches: dict[Transformer, Cache] = {}
        self.tokens, self.target_len, self.draft_len, self.capacity = [], 0, 0, 0
        # what a round needs of `tokens`, kept on the device
        self.state = torch.zeros(4, dtype=torch.long, device=self.device)
        self.draft_step, self.draft_tokens, self.verify_and_accept = draft_step, draft_tokens, verify_and_accept
        self.agree = lambda t: t  # with tensor parallelism: rank 0's t for all ranks
        # span -> a recorded round; None where rounds are not recorded
        self.graphs: dict[int, tuple] | None = None

    def reserve(self, length: int):
        """Room for `length` tokens in both caches and for a round's drafts after them; what is in
        them stays.
        """
        length += self.speculate_k
        if length <= self.capacity:
            return
        filled, self.capacity = self.capacity, min(self.context + self.speculate_k,
                                                   power_of_two(length))
        for model in filter(None, (self.target, self.draft)):
            cache = model.new_cache(self.capacity)
            for new, old in zip(cache.kv, self.caches[model].kv if filled else ()):
                new[:filled] = old
            self.caches[model] = cache
        if self.graphs:
            self.graphs.clear()  # they point into the old caches

    def span(self, length: int) -> int:
        """How much of the cache a pass that ends at `length` looks at: a power of two, so that few
        shapes occur.
        """
        return min(self.capacity, power_of_two(length))

    def read(self, model: Transformer, start: int) -> Tensor:
        """Feed tokens[start:] to a model, chunk by chunk; the hidden state at the last of them, [1,
        1, D].
        """
        for i in range(start, len(self.tokens), PREFILL_CHUNK):
            ids = torch.tensor([self.tokens[i:i + PREFILL_CHUNK]], device=self.device)
            end = i + ids.shape[1]
            hidden = model.features(ids, torch.arange(i, end, device=self.device),
                                    self.caches[model].first(self.span(end)))
        return hidden[:, -1:]

    def prefill(self, prompt: list[int], room: int) -> int:
        """Read the prompt, all but what the caches hold of it already; returns the first new token.

        `room`: tokens to come.
        """
        kept = next((i for i, (a, b) in enumerate(zip(prompt, self.tokens)) if a != b),
                    min(len(prompt), len(self.tokens)))
        self.tokens = list(prompt)
        self.reserve(len(prompt) + room)
        hidden = self.read(self.target, min(kept, self.target_len, len(prompt) - 1))
        if self.draft and min(kept, self.draft_len) < len(prompt):
            self.read(self.draft, min(kept, self.draft_len))
        self.target_len = self.draft_len = len(prompt)
        logits = self.target.output(hidden)[0]
        self.tokens.append(
            int(self.agree(choose(logits, self.settings, self.noise(1, logits.shape[-1])))))
        self.set_state(room - 2)
        return self.tokens[-1]

    def set_state(self, left: int):
        """Tell the device of `tokens`, and that the next round may keep `left` drafted ones."""
        self.state.copy_(torch.tensor([*self.tokens[-2:], len(self.tokens), left]))

    def noise(self, rows: int, columns: int) -> Tensor | None:
        """What `judge.sample` draws with, float32 [rows, columns]; drawn outside of what is
        compiled, so that both draw the same.
        """
        return torch.empty(rows, columns, device=self.device).exponential_(
            generator=self.rng) if self.settings.temperature else None

    def compile(self):
        """Compile what a round consists of; on a GPU whole rounds are recorded as CUDA graphs as
        well.

        Without those, a draft that is small enough is compiled with all its k steps in one graph,
        which saves their start; the time that takes to compile grows with k times its layers.
        """
        # On a CPU a graph's calls are C++ too: Python between them takes a good part of a small
        # model's pass. Sums over ranks it cannot call.
        build = functools.partial(torch.compile, fullgraph=True, dynamic=False,
                                  options={"cpp_wrapper": self.device.type == "cpu" and tp.world()
                                           == 1})
        torch._dynamo.config.recompile_limit = 64  # spans times the engines of a process
        self.graphs = {} if self.device.type == "cuda" else None
        self.verify_and_accept = build(verify_and_accept)
        if self.draft and self.graphs is None and self.speculate_k * self.draft.config.n_layer <= UNROLL:
            self.draft_tokens = build(draft_tokens)
        else:
            self.draft_step = build(draft_step)

    @torch.inference_mode()
    def warm_up(self, shortest: int, longest: int):
        """Run a round at every span that texts of these lengths meet, so that nothing is left to
        compile or to record.

        What the caches held is lost, so this comes before the first prompt.
        """
        self.reserve(min(longest, self.context))
        random, k = self.rng.get_state(), self.speculate_k
        self.tokens, self.target_len, self.draft_len = [0, 0], 0, 0
        self.read(self.target, 0)  # the first calls of a process are slow
        for span in sorted({self.span(n + k)
                            for n in range(shortest, min(longest, self.context) + 1)}):
            for _ in range(2):
                self.set_state(k)
                self.launch(span)
        self.tokens = []
        self.rng.set_state(random)

    def launch(self, span: int) -> Tensor:
        """`device_round`, on a GPU that it was compiled for as one CUDA graph."""
        if self.graphs is None:
            return self.device_round(span)
        if span not in self.graphs:
            self.graphs[span] = self.record(span)
        graph, out = self.graphs[span]
        graph.replay()
        return out

    def record(self, span: int):
        """The CUDA graph of a round and the tensor in which each of its replays leaves what the
        round tells.
        """
        state, side = self.state.clone(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # compiles, and lets libraries take their memory, which a recording must not do
        with torch.cuda.stream(side):
            for _ in range(2):
                self.device_round(span)
                self.state.copy_(state)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.rng)
        with torch.cuda.graph(graph):
            out = self.device_round(span)
        return graph, out

    def device_round(self, span: int) -> Tensor:
        """Draft, verify, accept, and the next round's state, all on the device: what
        `verify_and_accept` tells, [2k + 6].
        """
        k, s, V = self.speculate_k, self.settings, self.target.config.vocab_size
        drafted, draft_logits, uniform = self.state[:0], None, None
        if k:
            drafted, draft_logits = self.draft_tokens(self.draft_step, self.draft, self.state, k,
                                                      self.caches[self.draft].first(span), s,
                                                      self.noise(k, V))
            drafted = self.agree(drafted)
            uniform = torch.rand(k, device=self.device,
                                 generator=self.rng) if s.temperature else None
        cache = self.caches[self.target].first(span)
        out = self.agree(self.verify_and_accept(self.target, self.head, self.state, drafted,
                                                draft_logits, cache, s, self.noise(1, V), uniform))
        self.state.copy_(out[-4:])
        return out

    def round(self) -> tuple[int, list[int], list[str]]:
        """One round: (number of drafted tokens accepted, the new tokens, their sources).

        The tokens join `tokens`.
        """
        n, k = len(self.tokens), self.speculate_k
        a, own, *rest = self.launch(self.span(n + k)).tolist()  # the round's one synchronisation
        new = rest[:a] + [own]
        sources = ["draft" if ok else self.accept for ok in rest[k:k + a]] + ["target"]
        self.tokens += new
        self.target_len = n + a
        self.draft_len = min(n + k - 1, n + a) if k else self.draft_len
        return a, new, sources


@torch.inference_mode()
def generate(engine: Engine, prompt: list[int], max_new_tokens: int, eos_ids=(),
             on_tokens=lambda tokens, sources: None,
             stop=lambda token: False) -> Result:
    """Continue `prompt` by up to `max_new_tokens` tokens, to an end token (which is kept as the
    last) or the context's end.

    `on_tokens(tokens, sources)` is called with each round's news. `stop(token)` is asked of every
    new token in turn: True ends the text with it, as an end token does. Raises UserError for a
    prompt that leaves no room.
    """
    room = min(max_new_tokens, engine.context - len(prompt))
    if not prompt:
        raise UserError("the prompt has no tokens; give some text")
    if room < 1:
        windowed = engine.target.config.sliding_window == engine.context
        raise UserError(f"the prompt has {len(prompt)} tokens and the context {engine.context}"
                        + (" (the checkpoint's sliding_window; "
                        "attention beyond it is not implemented)" if windowed else "")
                        + "; shorten the prompt")
    result = Result(engine.accept, len(prompt), accept_counts=[0] * (engine.speculate_k + 1))

    def add(tokens, sources):
        result.tokens += tokens
        result.sources += sources
        on_tokens(tokens, sources)

    ends = lambda token: stop(token) or token in eos_ids
    add([engine.prefill(prompt, room)], ["target"])
    ended = ends(result.tokens[0])
    start = time.perf_counter()
    while len(result.tokens) < room and not ended:
        a, tokens, sources = engine.round()
        last = next((i for i, t in enumerate(tokens) if ends(t)), None)
        ended, end = last is not None, len(tokens) if last is None else last + 1
        result.accept_counts[min(a, end)] += 1
        add(tokens[:end], sources[:end])
    result.seconds = time.perf_counter() - start
    result.rounds = sum(result.accept_counts)
    made = len(result.tokens) - 1
    if result.rounds:
        result.tokens_per_sec = made / result.seconds
        result.mean_accepted = sum(i * c for i,
                                   c in enumerate(result.accept_counts)) / result.rounds
        result.tokens_per_round = made / result.rounds
    return result


# ---------------------------------------------------------------- command line

def use_color(out) -> bool:
    return out.isatty() and "NO_COLOR" not in os.environ


def printer(tokenizer: Tokenizer, prompt: list[int], eos_ids, out):
    """A callback for `generate` that prints text as it comes, coloured by source on a terminal, and
    its closing call.
    """
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


def tell(line: str):
    if tp.rank() == 0:
        print(line, file=sys.stderr)


def read_line() -> str | None:
    """The user's next line, on every rank; None at the end of the input."""
    text = None
    if tp.rank() == 0:
        with contextlib.suppress(EOFError):
            text = input("> ")
    return tp.from_rank_0(text) if tp.world() > 1 else text


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Judge decoding. Without arguments: the demo.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--draft", type=Path, help="checkpoint directory of the draft; without it the "
                   "target runs alone")
    p.add_argument("--judge", type=Path, help="judge file, from train_judge.py")
    p.add_argument("--prompt", help="the text to continue, or with --chat the user's message")
    p.add_argument("--accept", choices=rules.RULES, help="acceptance rule (default: judge with "
                   "--judge, else standard)")
    p.add_argument("--threshold", type=float, help="judge: accept above this probability "
                   "(default: the judge file's); topk: k; typical: epsilon "
                   f"(default {TYPICAL}); kl: the divergence")
    p.add_argument("--speculate_k", type=int, default=16, help="drafted tokens per round (default "
                   "16)")
    p.add_argument("--max_new_tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top_k", type=int, help="sample among the k likeliest only")
    p.add_argument("--top_p", type=float, help="sample among the likeliest that hold this mass "
                   "only")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--chat", action="store_true", help="use the checkpoint's chat template")
    p.add_argument("--interactive", action="store_true", help="read prompts from the terminal; "
                   "the cache is kept between turns")
    p.add_argument("--ignore_eos", action="store_true", help="go on past end tokens")
    p.add_argument("--compile", action="store_true", help="compile the rounds with torch.compile: "
                   "a wait at the start, then faster")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    p.add_argument("--draft_dtype", choices=DTYPES, help="default: --dtype; a tiny draft on a CPU "
                   "is faster in float32")
    p.add_argument("--json", type=Path, help="write the result here")
    args = p.parse_args(argv)
    args.accept = args.accept or ("judge" if args.judge else "standard")
    if args.draft_dtype and not args.draft:
        raise UserError("--draft_dtype is of the --draft; name one")
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    args.draft_dtype = DTYPES[args.draft_dtype] if args.draft_dtype else args.dtype
    check_args(args)
    return args


def check_args(args):
    """Everything about the flags that can be refused before a weight is read."""
    threshold = args.threshold
    for bad, message in (
            (args.prompt is None and not args.interactive, "nothing to do: give --prompt or "
             "--interactive"),
            (args.prompt is not None and args.interactive, "--prompt and --interactive exclude "
             "each other"),
            (args.accept == "judge" and args.draft and not args.judge, "--accept judge needs "
             "--judge FILE"),
            (args.judge and not args.draft, "--judge needs --draft: the judge says which drafted "
             "tokens to accept"),
            (args.judge and args.accept != "judge", "--judge is not used by --accept "
             f"{args.accept}; drop one of them"),
            (args.accept != "standard" and not args.draft, f"--accept {args.accept} needs --draft"),
            (args.speculate_k < 1, f"--speculate_k is {args.speculate_k}; it must be at least 1 "
             "(for the target alone leave out --draft)"),
            (args.max_new_tokens < 1, f"--max_new_tokens is {args.max_new_tokens}; it must be at "
             "least 1"),
            (not 0 <= args.temperature < math.inf, f"--temperature is {args.temperature}; it must "
             "be 0 (greedy) or above"),
            (args.top_k is not None and args.top_k < 1, f"--top_k is {args.top_k}; it must be at "
             "least 1"),
            (args.top_p is not None and not 0 < args.top_p <= 1, f"--top_p is {args.top_p}; it "
             "must be above 0 and at most 1"),
            (args.accept == "standard" and threshold is not None, "--threshold has no meaning for "
             "--accept standard"),
            (args.accept == "judge" and threshold is not None and not 0 <= threshold <= 1,
             f"--threshold is {threshold}; for the judge it must be from 0 to 1"),
            (args.accept == "topk" and (threshold is None or threshold < 1 or threshold % 1),
             "--accept topk needs --threshold K, a whole number of at least 1"),
            (args.accept == "typical" and threshold is not None and not 0 < threshold < 1,
             f"--threshold is {threshold}; for typical it must be between 0 and 1"),
            (args.accept == "kl" and (threshold is None or not threshold >= 0), "--accept kl "
             "needs --threshold D, the divergence below which to accept, at least 0"),
            (args.compile and args.device == "cpu"
             and not any(map(shutil.which, (*os.environ.get("CXX", "g++").split()[:1], "clang++",
                                            "c++", "cl"))),
             "--compile on a CPU needs a C++ compiler, and none is on the PATH; install g++ or "
             "leave --compile out"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this "
             "PyTorch sees no CUDA device; use --device cpu"),
    ):
        if bad:
            raise UserError(message)
    if args.json:
        check_writable(args.json)


def load_engine(args) -> tuple[Engine, Tokenizer]:
    """Check that target, draft and judge fit each other, then load them; under torchrun this rank's
    shares.
    """
    config, tokenizer = ModelConfig.from_dir(args.target), Tokenizer.from_dir(args.target)
    draft = head = None
    if args.draft:
        draft_config = ModelConfig.from_dir(args.draft)
        if draft_config.vocab_size != config.vocab_size:
            raise UserError(f"draft {args.draft} has a vocabulary of {draft_config.vocab_size} "
                            f"tokens, target {args.target} one of {config.vocab_size}; "
                            "speculation needs the same")
        if not tokenizer.same_as(Tokenizer.from_dir(args.draft)):
            raise UserError(f"draft {args.draft} and target {args.target} have different "
                            "tokenizers; speculation needs the same")
        context = min(config.max_seq_len, draft_config.max_seq_len)
        if args.speculate_k >= context:
            raise UserError(f"--speculate_k is {args.speculate_k}; it must be below the context "
                            f"of {context} tokens")
    if args.judge:
        parent = config.quantization and config.quantization.parent
        head = Judge.load(args.judge, config.dim, fingerprint(args.target), str(args.target),
                          parent)
    if tp.world() > 1:
        tp.check(config, args.target)
        args.device = tp.start(args.device)
    read = tp.load_share if tp.world() > 1 else load
    target = read(args.target, args.device, args.dtype)
    # one whose heads the ranks cannot share is small: each rank runs the whole of it
    if args.draft:
        read = load if tp.undividable(draft_config, tp.world()) else read
        draft = read(args.draft, args.device, args.draft_dtype)
    engine = Engine(target, draft, head, args.accept, args.threshold, args.speculate_k,
                    args.temperature, args.top_k, args.top_p, args.seed)
    if tp.world() > 1:
        engine.agree = tp.same_everywhere
    return engine, tokenizer


def main():
    if len(sys.argv) == 1:
        from demo.show import show
        return show()
    args = parse_args()
    engine, tokenizer = load_engine(args)
    if args.compile:
        engine.compile()
    eos_ids = () if args.ignore_eos else tokenizer.eos_ids
    if tp.rank():  # every rank does the same, one speaks
        sys.stdout, args.json = open(os.devnull, "w"), None
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
            engine.warm_up(1 if args.interactive else len(prompt), length)
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
        text = read_line()
        if text is None:
            break
        if text.strip():
            turn(text)
    if args.json:
        with replacing(args.json) as tmp:
            tmp.write_text(json.dumps(results[0] if len(results) == 1 else results, indent=2)
                           + "\n")
    if tp.world() > 1:
        tp.leave()


if __name__ == "__main__":
    run(main)
