"""The speculative loop, for one text at a time. The target alone is the same loop with K = 0.

`play_round` is a round: K drafted tokens, one target pass that returns logits and the judge's
scores together, the longest accepted prefix and one token of the target's own. State stays on the
device and shapes never change; the host waits for the device once a round, to read the outcome.
"""
import math
import time
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import judge
from common import refuse
from judge import RULES, JudgeHead, Verified
from model import Cache, Transformer

PREFILL_CHUNK = 1024  # prompt tokens read in one pass; bounds the memory of the attention mask
SPAN = 256  # shortest cache and attention span: below it costs little, and each size is compiled


def power_of_two(length: int) -> int:
    """The smallest power of two, from SPAN, that is at least `length`."""
    return max(SPAN, 1 << (length - 1).bit_length())


def padded(rows: int) -> int:
    """The next of 16, 24, 32, ..., 64, 80, ...: four sizes an octave, so few shapes of prompts."""
    step = 1 << max(3, (rows - 1).bit_length() - 3)
    return max(16, -(-rows // step) * step)


class State(NamedTuple):
    """Where the text stands, int64 on the device: what a round starts from."""
    last: Tensor  # [2]: the last two tokens; the target has not read the last one yet
    length: Tensor  # [1]: tokens so far
    room: Tensor  # [1]: drafted tokens that the next round may keep
    inside: Tensor  # [1]: 1 where the text is within the span that the rule is bound to


class Outcome(NamedTuple):
    """What a round made of K drafted tokens, and the state it left."""
    accepted: Tensor  # [1]: how many were accepted
    own: Tensor  # [1]: the target's own token after them
    drafted: Tensor  # [K]
    passed: Tensor  # [K]: which of them passed the standard test
    state: State


def pack(o: Outcome) -> Tensor:
    """An outcome as one int64 tensor [2K + 7], for the host to read in one synchronisation."""
    return torch.cat((o.accepted, o.own, o.drafted, o.passed.long(), *o.state))


def unpack(packed, k: int) -> Outcome:
    """The inverse of `pack`, for a tensor (giving views) or its list."""
    return Outcome(packed[:1], packed[1:2], packed[2:2 + k], packed[2 + k:-5],
                   State(packed[-5:-3], packed[-3:-2], packed[-2:-1], packed[-1:]))


@dataclass(frozen=True)
class Settings:
    """What a round depends on beside tensors; a compiled round is compiled for these values."""
    accept: str  # a key of RULES, or "target"
    parameter: float | tuple | None
    temperature: float
    top_k: int | None
    top_p: float | None
    vocab_size: int  # the target's; a draft may have more or fewer, by padding
    certain: bool = False  # the drafter's
    span: tuple[int, int] | None = None  # ids between which alone the rule holds; outside, standard

    def probabilities(self, logits: Tensor) -> Tensor:
        return judge.probabilities(logits, self.temperature, self.top_k, self.top_p)

    @property
    def greedy(self) -> bool:
        return self.temperature <= judge.COLDEST

    @property
    def rule(self) -> judge.Rule:
        return RULES.get(self.accept, judge.Rule())

    @property
    def needs_draft_logits(self) -> bool:
        return self.rule.needs_draft_logits or not (self.greedy or self.certain)


def choose(logits: Tensor, s: Settings, noise: Tensor | None) -> Tensor:
    """The next token of logits [..., V], int64 [...]; noise [..., V] as `judge.sample` takes it."""
    return judge.top1(logits) if s.greedy else judge.sample(s.probabilities(logits), noise)


def play_round(e: "Engine", span: int, k: int) -> int:
    """One round, from e.outcome to e.outcome, over `span` positions; the K drafted, k at most."""
    s, state = e.settings, e.state

    # 1. draft: K tokens, and the logits they come from where acceptance compares them
    drafted, logits, tree = state.last[:0], None, ()
    if k:
        drafted, logits, *tree = e.drafter.propose(state, k, span, s, e.noise(k * (not s.certain)))
        drafted, k = e.agree(drafted), tree[0].height if tree else len(drafted)
    draws = k + 1 if s.certain or tree else 1  # of the target: each token, or what follows them
    uniform = e.coins(k) if draws <= k or s.rule.needs_coin else None
    outcome, *read = e.verify_and_accept(
        e.target, e.head, e.cache.first(span), s, state, drafted, logits, uniform, e.noise(draws),
        tree=tree[0] if tree else None)
    e.outcome[-len(outcome):].copy_(e.agree(outcome))
    if e.drafter and e.drafter.wants_hidden:
        e.drafter.read(*read, span)
    return k


def verify_and_accept(target: Transformer, head: JudgeHead | None, cache: Cache, s: Settings,
                      state: State, drafted: Tensor, *more, tree=None, decided=None):
    """The target's part of a round: what `decide` makes of it (`decided`: compiled apart), and the
    tokens [K + 1] the target read, their positions and its hidden states at them [K + 1, D].
    """
    # 2. verify and judge: one pass over the last token and the drafted ones
    tokens = torch.cat((state.last[1:], drafted))
    pos = state.length - 1 + torch.arange(len(tokens), device=tokens.device)
    hidden = target.features(tokens[None], pos, cache, *(tree.where(pos, cache) if tree else ()))[0]
    outcome, path = (decided or decide)(target, head, s, state, hidden, drafted, *more, tree)
    read = tokens, pos, hidden
    return outcome, *(tree.keep(cache, target.agree(path), *read) if tree else read)


def decide(target: Transformer, head: JudgeHead | None, s: Settings, state: State, hidden: Tensor,
           drafted: Tensor, draft_logits: Tensor, uniform: Tensor, noise: Tensor, tree=None):
    """The packed outcome of the target's hidden states [K + 1, D], which LM head and judge read,
    and of a tree (N tokens, K levels) the path it keeps, rows [K + 1]. drafted [K], draft_logits
    [K, V or fewer]; uniform [K] and noise [1, V], or noise [K + 1, V].
    """
    hidden = hidden[:, :target.config.dim]  # without the taps
    logits, scores = target.output(hidden), None if head is None else head(hidden[1:])

    # 3. accept: the longest prefix, or path of a tree, that the standard test or the rule lets in
    before = tree.before(logits) if tree else logits[:-1]
    v = Verified(before, hidden[1:], drafted, draft_logits, scores)
    v, token_after = standard_test(v, logits, s, uniform, noise, tree)
    inside, inside_at = bounds(s, state, drafted, tree)
    mask = judge.accept_mask(v, s.accept, s.parameter, inside) if len(drafted) else v.passed
    n, end, path = (tree.longest if tree else longest_prefix)(mask, v.passed, state.room)
    own = token_after(end, n < state.room)
    drafted, passed = (t if path is None else t[path[1:] - 1] for t in (drafted, v.passed))

    # 4. next state: the text ends with the accepted tokens and the target's own
    state = state._replace(inside=inside_at(end, own))
    return pack(Outcome(n, own, drafted, passed, next_state(state, drafted, n, own))), path


def bounds(s: Settings, state: State, drafted: Tensor, tree=None):
    """Where the rule holds, bool [K] or True; and a function: State.inside of the text that ends
    with row end [1] and the target's own token [1]. What closes the span is not inside it.
    """
    if not s.span:
        return True, lambda end, own: state.inside
    after = judge.inside_after(state.inside, drafted, s.span, tree)
    before = tree.before(after) if tree else after[:-1]
    return before.bool() & (drafted != s.span[1]), lambda end, own: judge.inside_after(
        after.index_select(0, end), own, s.span)[1:]


def longest_prefix(mask: Tensor, passed: Tensor, room: Tensor) -> tuple[Tensor, Tensor, None]:
    """The run of True from the front of mask [K], at most `room`: its length and last row, [1]."""
    n = torch.minimum(mask.long().cumprod(0).sum()[None], room)
    return n, n, None


def standard_test(v: Verified, logits: Tensor, s: Settings, uniform: Tensor | None,
                  noise: Tensor | None, tree=None):
    """v with what passed, which the target may have written itself; and a function: its token [1]
    after the last accepted row, end [1], of logits [K + 1, V], where tested [1] says if the next
    one was.
    """
    at = v.drafted[:, None]
    if s.greedy or s.certain or tree or not len(at):
        # Drafted for certain, q = 1, a token passes with probability p, and one of siblings at most
        # (recursive rejection): as likely as the target drawing it. So it draws first.
        own = choose(logits, s, tree.by_depth(noise) if tree else noise)
        v = v._replace(passed=(tree.before(own) if tree else own[:-1]) == v.drafted)
        if uniform is not None:  # a coin that says the same: below p where it passed
            p = s.probabilities(v.logits).gather(1, at)[:, 0]
            v = v._replace(p=p, coin=torch.where(v.passed, p * uniform, p + (1 - p) * uniform))
        return v, lambda end, tested: own.index_select(0, end)
    p, q = s.probabilities(logits), s.probabilities(v.draft_logits)

    def after(end, tested):
        # Where all that may be kept was kept, the next token was never tested: the residual is p.
        rest = F.pad(q, (0, p.shape[-1] - q.shape[-1], 0, 1)).index_select(0, end) * tested[:, None]
        return judge.sample(judge.residual(p.index_select(0, end), rest), noise)

    passed = judge.rejection_test(p[:-1], q, v.drafted, uniform)
    return v._replace(passed=passed, p=p[:-1].gather(1, at)[:, 0], coin=uniform), after


def next_state(state: State, drafted: Tensor, accepted: Tensor, own: Tensor) -> State:
    """The state after a round that kept `accepted` [1] of the drafted tokens and added `own`."""
    last = torch.cat((state.last[1:], drafted)).index_select(0, accepted)
    return State(torch.cat((last, own)), state.length + accepted + 1, state.room - accepted - 1,
                 state.inside)


def next_token(model: Transformer, hidden: Tensor, s: Settings,
               noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The token [1] after hidden [1, D or more] and, where needed, its logits [1, V or fewer]."""
    logits = model.output(hidden[:, :model.config.dim])[:, :s.vocab_size]
    return choose(logits, s, noise), logits if s.needs_draft_logits else None


class Engine:
    """Target, drafter and judge with their caches; all have read `read_len` of the text `tokens`.

    drafter: a drafters.drafter.Drafter. accept: a key of RULES; parameter: the rule's, by default
    the table's or the head's; span: ids of the tokens between which alone it holds. chooser: of
    each round's K, speculate_k at most (drafters/length.py). ks: those a round may have.
    """

    def __init__(self, target: Transformer, drafter=None, head: JudgeHead | None = None,
                 accept="standard", parameter=None, speculate_k=16, temperature=0.0, top_k=None,
                 top_p=None, seed=0, chooser=None, span: tuple[int, int] | None = None):
        self.target, self.drafter, self.device = target, drafter, target.norm.weight.device
        self.accept, self.speculate_k = (accept, speculate_k) if drafter else ("target", 0)
        rule = RULES[accept]
        refuse((rule.needs_judge and drafter and not head, f"rule {accept} needs head=JudgeHead"),
               (rule.needs_draft_logits and drafter and not drafter.has_logits,
                f"rule {accept} needs a draft's logits; {type(drafter).__name__} has none"),
               (rule.needs_chain and drafter and drafter.size(speculate_k) != speculate_k,
                f"rule {accept} needs a chain of drafts; leave out --tree"))
        self.head = head.to(self.device) if rule.needs_judge and drafter else None
        parameter = rule.parameter_for(parameter, self.head) if drafter else None
        self.settings = Settings(self.accept, parameter, temperature, top_k, top_p,
                                 target.config.vocab_size, bool(drafter and drafter.certain), span)
        self.rng = torch.Generator(self.device).manual_seed(seed)
        self.context = min(target.config.max_seq_len, drafter.context if drafter else math.inf)
        self.cache, self.tokens, self.read_len, self.capacity = None, [], 0, 0
        ks = chooser.ks if chooser else (self.speculate_k,)
        self.chooser, self.ks = chooser, sorted({*ks, 0} if drafter and drafter.skips else ks)
        self.drafted = drafter.size(self.speculate_k) if drafter else 0  # tokens of a round at most
        self.outcome = torch.zeros(2 * self.speculate_k + 7, dtype=torch.long, device=self.device)
        self.state = unpack(self.outcome, self.speculate_k).state  # views of the packed outcome
        self.play, self.verify_and_accept = play_round, verify_and_accept  # graphs.py wraps these
        self.next_token, self.agree = next_token, target.agree
        self.rows = padded if self.device.type == "cuda" else lambda n: n  # of a pass of n tokens

    def reserve(self, length: int):
        """Room for `length` tokens and a round's drafts after them; what was read stays."""
        length += self.drafted
        if length > self.capacity:
            self.capacity = min(self.context + self.drafted, power_of_two(length))
            self.cache = self.target.new_cache(self.capacity, grown_from=self.cache)
            if self.drafter:
                self.drafter.new_cache(self.capacity)

    def span(self, length: int) -> int:
        """Positions that a pass up to `length` attends to: a power of two, so few shapes occur."""
        return min(self.capacity, power_of_two(length))

    def read(self, start: int) -> Tensor:
        """Feed tokens[start:] to target and drafter; the last hidden state [1, D]. Chunks may be
        padded, or begin earlier where the cache ends; padding is overwritten later.
        """
        for i in range(start, len(self.tokens), PREFILL_CHUNK):
            end = min(i + PREFILL_CHUNK, len(self.tokens))
            rows = min(self.rows(end - i), self.capacity)
            first = min(i, self.capacity - rows)
            ids = self.tokens[first:end] + [0] * (first + rows - end)
            ids, span = torch.tensor(ids, device=self.device), self.span(first + rows)
            pos = torch.arange(first, first + rows, device=self.device)
            hidden = self.target.features(ids[None], pos, self.cache.first(span))[0]
            if self.drafter:
                self.drafter.read(ids, pos, hidden, span)
        return hidden[end - first - 1:end - first]

    def prefill(self, prompt: list[int], room: int) -> int:
        """Read what the caches lack of the prompt; the first new token. room: tokens to come."""
        same = (i for i, (a, b) in enumerate(zip(prompt, self.tokens)) if a != b)
        kept = next(same, min(len(prompt), len(self.tokens)))
        self.tokens = list(prompt)
        self.reserve(len(prompt) + room)
        hidden = self.read(min(kept, self.read_len, len(prompt) - 1))
        self.read_len = len(prompt)
        token, _ = self.next_token(self.target, hidden, self.settings, self.noise(1))
        self.tokens.append(int(self.agree(token)))
        self.set_state(max(room - 2, 0))
        if self.chooser:
            self.chooser.begin(self)
        return self.tokens[-1]

    def set_state(self, room: int):
        """Copy the last tokens and the position to the device; the next round may keep `room`."""
        marks = [t == self.settings.span[0] for t in self.tokens if t in (self.settings.span or ())]
        values = self.tokens[-2:], [len(self.tokens)], [room], [marks[-1] if marks else False]
        for part, value in zip(self.state, values):
            part.copy_(torch.tensor(value))

    def noise(self, rows: int) -> Tensor | None:
        """What `judge.sample` draws with, float32 [rows, V]; None when greedy."""
        if not self.settings.greedy:  # not inside what is compiled, which would draw otherwise
            x = torch.empty(rows, self.target.config.vocab_size, device=self.device)
            return x.exponential_(generator=self.rng)

    def coins(self, n: int) -> Tensor | None:
        """What acceptance is drawn with, uniform in [0, 1), [n]; None when greedy."""
        if not self.settings.greedy:
            return torch.rand(n, device=self.device, generator=self.rng)

    def round(self) -> tuple[int, list[int], list[str]]:
        """One round: (drafted tokens accepted, new tokens, their sources); they join `tokens`."""
        n, k = len(self.tokens), self.speculate_k
        if self.drafter:
            k = self.drafter.plan(self.tokens, self.chooser.choose(self) if self.chooser else k)
        k = self.play(self, self.span(n + (k and self.drafter.size(k))), k)
        o = unpack(self.outcome[-2 * k - 7:].tolist(), k)  # the round's one synchronisation
        a = o.accepted[0]
        if self.chooser:
            self.chooser.saw(a, k)
        sources = ["draft" if ok else self.accept for ok in o.passed[:a]] + ["target"]
        self.tokens += o.drafted[:a] + o.own
        self.read_len = n + min(a, max(k - 1, 0))  # a Llama draft has not read its last token
        return a, o.drafted[:a] + o.own, sources


@dataclass
class Result:
    """One generation, in the shape of the --json contract."""
    accept: str
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0  # of the rounds: no load, no prefill
    tokens_per_sec: float = 0.0  # of the rounds' tokens: all but the first, the prefill's
    rounds: int = 0
    accept_counts: list[int] = field(default_factory=list)  # [K + 1]: rounds that accepted i tokens
    mean_accepted: float = 0.0
    tokens_per_round: float = 0.0
    sources: list[str] = field(default_factory=list)

    def json(self):
        of_drafts = "rounds", "accept_counts", "mean_accepted", "tokens_per_round", "sources"
        omitted = of_drafts if self.accept == "target" else ()
        return {k: v for k, v in asdict(self).items() if k not in omitted}


@torch.inference_mode()
def generate(engine: Engine, prompt: list[int], max_new_tokens: int, eos_ids=(),
             on_tokens=lambda tokens, sources: None, stop=lambda token: False) -> Result:
    """Continue `prompt` by up to `max_new_tokens` tokens, to EOS (kept) or the context's end.

    `on_tokens(tokens, sources)` is called after each round. `stop(token)` is asked of every new
    token: True ends the text with it, as EOS does. Raises UserError for a prompt without room.
    """
    context, window = engine.context, engine.target.config.sliding_window
    room = min(max_new_tokens, context - len(prompt))
    refuse((not prompt, "the prompt has no tokens; give some text"),
           (room < 1, f"the prompt has {len(prompt)} tokens and the context {context}"
            + " (its sliding_window; attention beyond it is not implemented)" * (window == context)
            + "; shorten the prompt"))
    result = Result(engine.accept, len(prompt), accept_counts=[0] * (engine.speculate_k + 1))
    accepted, tokens, sources = None, [engine.prefill(prompt, room)], ["target"]
    start = time.perf_counter()
    while True:
        end = next((i for i, t in enumerate(tokens, 1) if stop(t) or t in eos_ids), None)
        result.tokens += tokens[:end]
        result.sources += sources[:end]
        on_tokens(tokens[:end], sources[:end])
        if accepted is not None:
            result.accept_counts[min(accepted, end or accepted)] += 1
        if end or len(result.tokens) >= room:
            break
        accepted, tokens, sources = engine.round()
    result.seconds = time.perf_counter() - start
    result.rounds, made = sum(counts := result.accept_counts), len(result.tokens) - 1
    if result.rounds:
        result.tokens_per_round, result.tokens_per_sec = made / result.rounds, made / result.seconds
        result.mean_accepted = sum(i * n for i, n in enumerate(counts)) / result.rounds
    return result
