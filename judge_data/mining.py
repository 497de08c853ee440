"""Labels without a human: where a wrong answer leaves the right track, and which of the draft's
tokens change the result.

Both searches let the target continue greedily from a prefix of an answer and ask the task's checker
about the outcome. `scan` and `bisect` find the first token of a wrong answer from which the target
no longer arrives at a right one. `autojudge` is the search of AutoJudge (Garipov et al., arXiv
2504.20039): it swaps the draft's token into the target's own answer wherever they differ.

A label says what the target makes of a token, not whether a person would call it wrong: a target
that goes astray after a harmless change of wording blames the wording. In float32 the cache changes
nothing; in bfloat16 a near tie may fall otherwise.
"""
import os
import random
import time
from typing import NamedTuple

import torch

from common import UserError
from engine import Engine, generate
from tokenizer import Stream, cut_at_stop, stop_check

FAILS = "the target fails from the prompt alone"
UNFINISHED = "not finished"
ENDS_EARLY = "wrong only in that it ends there"
SAMPLE = 8  # prefixes that are read anew in the end, to measure what the cache saves


def prompts_of(tokenizer, lines: list[dict], context: int) -> tuple[dict, int]:
    """{(prompt, chat): its ids}, and the tokens of the longest answer; refuses what exceeds the
    context.
    """
    prompts, longest = {}, 0
    for line in lines:
        key = line["prompt"], line["chat"]
        if key not in prompts:
            prompts[key] = tokenizer.prompt(*key)
        answer = len(tokenizer.encode(line["answer"], continuation=True))
        if (length := len(prompts[key]) + answer) >= context:
            raise UserError(f"{line['where']}: prompt and answer have {length} tokens, the "
                            f"target's context is {context}; drop the line")
        longest = max(longest, answer)
    return prompts, longest


def about(line) -> dict:
    """What judge data keeps of an answer's line."""
    return {key: line[key] for key in ("prompt", "source_model", "domain", "id", "task",
                                       "temperature", "chat") if key in line}


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two lists share from the start."""
    return len(os.path.commonprefix([a, b]))


class Outcome(NamedTuple):
    """What the target makes of a prefix."""
    tokens: list[int]  # of the whole answer, without EOS
    text: str
    ended: bool
    good: bool  # ended, and the checker calls the text right


class Continuations:
    """The target continuing prefixes of answers to one prompt, with counts of work and savings.

    Successive prefixes share their beginning, so only what the engine's cache lacks is read. A
    prefix on a path that the target took already has that path's outcome; it is not asked again.
    """

    def __init__(self, engine: Engine, tokenizer, limit: int):
        """limit: tokens of an answer, prefix included."""
        self.engine, self.tokenizer, self.limit = engine, tokenizer, limit
        self.asked = self.known = self.read = self.cached = self.made = 0
        self.reading = self.making = 0.0  # seconds
        self.rng, self.sample = random.Random(0), []  # of (tokens, seconds to read them)

    def start(self, prompt: list[int], score, stops=()):
        """Turn to another prompt.

        score(text): whether the answer is right. stops: strings that end it.
        """
        self.prompt, self.score, self.stops, self.paths = prompt, score, stops, []

    def __call__(self, prefix: list[int]) -> Outcome:
        for begin, outcome in self.paths:
            if begin <= len(prefix) and outcome.tokens[:len(prefix)] == prefix:
                self.known += 1
                return outcome
        self.paths.append((len(prefix), self.ask(prefix)))
        return self.paths[-1][1]

    def ask(self, prefix: list[int]) -> Outcome:
        before, eos_ids = self.prompt + prefix, self.tokenizer.eos_ids
        decode = lambda tokens: self.tokenizer.decode_new(self.prompt, tokens)
        room = min(self.limit - len(prefix), self.engine.context - len(before))
        new, stop = [], stop_check(self.tokenizer, self.prompt, self.stops)
        for token in prefix:  # a stop string may begin in the prefix
            stop(token)
        if room > 0:
            new = self.proceed(before, room, stop)
        tokens = prefix + [t for t in new if t not in eos_ids]
        whole = decode(tokens)
        text = cut_at_stop(whole, self.stops)
        while len(text) < len(whole) and len(decode(tokens)) > len(text):
            tokens = tokens[:-1]  # tokens of the stop string
        ended = bool(new) and new[-1] in eos_ids or len(text) < len(whole)
        return Outcome(tokens, text, ended, ended and bool(self.score(text)))

    def proceed(self, before: list[int], room: int, stop) -> list[int]:
        """The target's tokens after `before`; counts and times them."""
        engine = self.engine
        # as Engine.prefill counts them
        cached = min(common_prefix(before, engine.tokens[:engine.read_len]), len(before) - 1)
        start = time.perf_counter()
        result = generate(engine, before, room, self.tokenizer.eos_ids, stop=stop)
        reading = time.perf_counter() - start - result.seconds
        self.asked += 1
        self.cached += cached
        self.read += len(before) - cached
        self.made += len(result.tokens)
        self.making += result.seconds
        self.reading += reading
        if len(self.sample) < SAMPLE:
            self.sample.append((before, reading))
        elif (at := self.rng.randrange(self.asked)) < SAMPLE:
            self.sample[at] = before, reading
        return result.tokens

    def report(self) -> str:
        """What was asked and what was saved, measured by reading a sample without the cache."""
        if not self.asked:
            return "the target was asked nothing"
        anew = sum(read_anew(self.engine, tokens) for tokens, _ in self.sample) / len(self.sample)
        ours = sum(seconds for _, seconds in self.sample) / len(self.sample)
        share = self.cached / (self.read + self.cached)
        return (f"the target went on from {self.asked:,} prefixes; {self.known:,} more lay on a "
                f"path that it had taken\nit made {self.made:,} tokens in {self.making:.1f} s and "
                f"read {self.read:,} in {self.reading:.1f} s; {self.cached:,} ({share:.0%}) were "
                f"in the cache already\n{len(self.sample)} of the prefixes read without it: "
                f"{1000 * anew:.1f} ms each instead of {1000 * ours:.1f} ms, so it saved about "
                f"{self.asked * (anew - ours):.1f} s")


@torch.inference_mode()
def read_anew(engine: Engine, tokens: list[int]) -> float:
    """Seconds to read tokens that the cache does not hold."""
    engine.tokens = []
    start = time.perf_counter()
    engine.prefill(tokens, 1)  # ends in reading a number back, so a GPU is done as well
    return time.perf_counter() - start


# ---------------------------------------------------------------- the first error

def scan(answer: list[int], go_on) -> int | str:
    """The token of a wrong answer that starts its error, or why there is none.

    It is the last token of the shortest prefix that `go_on` does not bring to a good end. Only
    prefixes where the answer leaves the path that `go_on` would take are asked about, since the
    others share an outcome with the one before: the result is that of asking about every prefix.
    """
    length = 0
    while length <= len(answer):
        outcome = go_on(answer[:length])
        if not outcome.good:
            return length - 1 if length else FAILS
        # max: a stop string may have cut the prefix itself
        length = max(length, common_prefix(answer, outcome.tokens)) + 1
    return ENDS_EARLY


def bisect(answer: list[int], go_on) -> int | str:
    """A token of a wrong answer before which `go_on` comes to a good end and after which not.

    Between the prompt alone, known good, and the whole answer, known wrong, it halves what is left.
    Where the outcome changes once, it finds what `scan` finds, with fewer questions. It may change
    more often, since a target often mends an error a few words later; then this may find a later
    change than the first. On ten wrong answers of the demo's pair both found the same tokens,
    `scan` with 98 questions and `bisect` with 58.
    """
    if not go_on([]).good:
        return FAILS
    good, bad = 0, len(answer) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        outcome = go_on(answer[:middle])
        if outcome.good:  # max: as in scan
            good = min(max(middle, common_prefix(answer, outcome.tokens)), bad - 1)
        else:
            bad = middle
    return good if bad <= len(answer) else ENDS_EARLY


SEARCHES = {"scan": scan, "bisect": bisect}


# ---------------------------------------------------------------- AutoJudge

class Swap(NamedTuple):
    """The draft's token in place of the target's own."""
    at: int  # index of the token in the answer
    important: bool  # it makes the answer wrong
    tokens: list[int]  # the answer with the draft's token and what the target made of it
    instead_of: int | None  # the target's own token; None for EOS


def autojudge(go_on, draft, eos_ids) -> tuple[Outcome, list[Swap]] | str:
    """The answer that a walk through the target's answer ends with, and its swaps; or why none.

    `draft(prefix)` is the draft's token after a prefix. As in the paper's algorithm, the walk
    continues in the new answer where a swap did not matter, and in the old one, one token further,
    where it did. Unlike there, an answer counts as changed if it is no longer right, not if its
    wording differs; so the target's own answer has to be right. A draft's EOS has no characters to
    mark and is passed over.
    """
    current = go_on([])
    if not current.good:
        return FAILS if current.ended else UNFINISHED
    swaps, at = [], 0
    while at <= len(current.tokens):
        own = current.tokens[at] if at < len(current.tokens) else None
        token = draft(current.tokens[:at])
        if token not in eos_ids and token != own:
            other = go_on(current.tokens[:at] + [token])
            swaps.append(Swap(at, not other.good, other.tokens, own))
            current = other if other.good else current
        at += 1
    return current, swaps


def greedy_token(model, prompt: list[int]):
    """The `draft` of autojudge: the model's argmax, from a cache that grows with the walk."""
    engine, last = Engine(model), model.config.vocab_size - 1

    @torch.inference_mode()
    def draft(prefix):
        # the target's padding can have larger ids
        return engine.prefill([min(token, last) for token in prompt + prefix], 1)

    return draft


def characters(tokenizer, prompt: list[int], tokens: list[int],
               at: int) -> tuple[str, list[int]] | None:
    """The text up to and with the characters of token `at`, and their [start, end) in it.

    A token inside a character stands for the whole of it, completed by the tokens that follow. None
    where the tokenizer would cut the text into other tokens: then the mark would fall on those.
    """
    stream = Stream(tokenizer, prompt)
    text = "".join(stream.put(t) for t in tokens[:at])
    begun = tokenizer.text_after(stream.context, stream.pending)  # with half a character at its end
    start, end = len(text + begun.rstrip("\ufffd")), at
    while end == at or end < len(tokens) and stream.pending:
        text += stream.put(tokens[end])
        end += 1
    ids, offsets = tokenizer.encode_with_offsets(text, continuation=True)
    marked = sum(b > start for _, b in offsets)
    exact = marked >= end - at and ids[len(ids) - marked:] == tokens[max(0, end - marked):end]
    if not exact or len(text) == start or "\ufffd" in text:
        return None
    return text, [start, len(text)]
