"""Labels without a human: where a wrong answer left the right track, and which of a draft's tokens
change what comes out.

Both searches let the target go on greedily from a prefix of an answer and ask the task's checker
what became of it. `first_error` finds the first token of a wrong answer after which the target no
longer arrives. `autojudge` is the search of AutoJudge (Garipov et al., arXiv 2504.20039): into the
target's own answer the draft's token is swapped where it differs.

A label says what the target makes of a token, not whether a person would call it wrong: a target
that goes astray after a harmless change of wording blames the wording. In float32 the cache changes
nothing; with bfloat16 a near tie may fall otherwise.
"""
import os
import random
import time
from typing import NamedTuple

import torch

import generate as G
from eval import stopper
from tokenizer import Stream

FAILS, UNFINISHED, ENDS_EARLY = "the target fails from the prompt alone", "not finished", "wrong only in that it ends there"
SAMPLE = 8  # prefixes that are read anew in the end, to see what the cache saves


class Outcome(NamedTuple):
    """What became of a prefix: the answer's tokens without its end token, its text, whether it
    ended, and whether it ended right.
    """
    tokens: list[int]
    text: str
    ended: bool
    good: bool


class Continuations:
    """The target going on from prefixes of answers to one prompt, with what it costs and what is
    saved.

    Successive prefixes share their beginning, so they are read into the engine's cache from where
    they part only. And a prefix that lies on a path which the target took already has the same
    outcome; it is not asked about again.
    """

    def __init__(self, engine: G.Engine, tokenizer, limit: int):
        # limit: tokens of an answer, prefix included
        self.engine, self.tokenizer, self.limit = engine, tokenizer, limit
        self.asked = self.known = self.read = self.cached = self.made = 0
        self.reading = self.making = 0.0  # seconds
        self.rng, self.sample = random.Random(0), []  # of (tokens, seconds of reading them)

    def start(self, prompt: list[int], score, stops=()):
        """Turn to another prompt: `score(text)` says whether an answer is right, a string of
        `stops` ends it.
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
        before, ends = self.prompt + prefix, self.tokenizer.eos_ids
        room = min(self.limit - len(prefix), self.engine.context - len(before))
        new, stop = [], stopper(self.tokenizer, self.prompt, self.stops)
        for token in prefix:  # a stop string may begin in the prefix
            stop(token)
        if room > 0:
            new = self.go_on(before, room, stop)
        tokens = prefix + [t for t in new if t not in ends]
        whole = self.tokenizer.decode_new(self.prompt, tokens)
        text = whole[:min((at for s in self.stops if (at := whole.find(s)) >= 0), default=None)]
        while len(text) < len(whole) and len(self.tokenizer.decode_new(self.prompt, tokens)) > len(
                text):
            tokens = tokens[:-1]  # tokens of the stop string
        ended = bool(new) and new[-1] in ends or len(text) < len(whole)
        return Outcome(tokens, text, ended, ended and bool(self.score(text)))

    def go_on(self, before: list[int], room: int, stop) -> list[int]:
        # prefill's rule
        cached = min(
            len(os.path.commonprefix([before, self.engine.tokens[:self.engine.target_len]])),
            len(before) - 1)
        start = time.perf_counter()
        result = G.generate(self.engine, before, room, self.tokenizer.eos_ids, stop=stop)
        reading = time.perf_counter() - start - result.seconds
        self.asked, self.cached, self.read = self.asked + 1, self.cached + cached, self.read + len(
            before) - cached
        self.made, self.making, self.reading = self.made + len(
            result.tokens), self.making + result.seconds, self.reading + reading
        if len(self.sample) < SAMPLE:
            self.sample.append((before, reading))
        elif (at := self.rng.randrange(self.asked)) < SAMPLE:
            self.sample[at] = before, reading
        return result.tokens

    def report(self) -> str:
        """What was asked and what was spared, the seconds measured by reading a sample of the
        prefixes without the cache.
        """
        if not self.asked:
            return "the target was asked nothing"
        anew = sum(read_anew(self.engine, tokens) for tokens, _ in self.sample) / len(self.sample)
        ours = sum(seconds for _, seconds in self.sample) / len(self.sample)
        return (f"the target went on from {self.asked:,} prefixes; {self.known:,} more lay on a "
                "path that it had taken\n"
                f"it made {self.made:,} tokens in {self.making:.1f} s and read {self.read:,} in "
                f"{self.reading:.1f} s; {self.cached:,} "
                f"({self.cached / (self.read + self.cached):.0%}) were in the cache already\n"
                f"{len(self.sample)} of the prefixes read without it: {1000 * anew:.1f} ms each "
                f"instead of {1000 * ours:.1f} ms, "
                f"so it saved about {self.asked * (anew - ours):.1f} s")


@torch.inference_mode()
def read_anew(engine: G.Engine, tokens: list[int]) -> float:
    """Seconds to read tokens that the cache does not hold."""
    engine.tokens = []
    start = time.perf_counter()
    engine.prefill(tokens, 1)  # ends in reading a number back, so a GPU is done as well
    return time.perf_counter() - start


# ---------------------------------------------------------------- the first error

def scan(answer: list[int], go_on) -> int | str:
    """The token of a wrong answer that starts its error, or why there is none.

    It is the last token of the shortest prefix that `go_on` does not bring to a good end. Only the
    prefixes where the answer leaves the path that `go_on` would take are asked about, for the
    others share an outcome with the one before. So this gives what asking about every prefix would.
    """
    length = 0
    while length <= len(answer):
        outcome = go_on(answer[:length])
        if not outcome.good:
            return length - 1 if length else FAILS
        # a stop string may have cut the prefix itself
        length = max(length, len(os.path.commonprefix([answer, outcome.tokens]))) + 1
    return ENDS_EARLY


def bisect(answer: list[int], go_on) -> int | str:
    """A token of a wrong answer before which `go_on` comes to a good end and after which it does
    not, in few questions.

    Between the prompt alone, known good, and the whole answer, known wrong, it halves what is left.
    Where the outcome changes once, it finds what `scan` finds. It may change more often: a target
    that repeats an error often mends it a few words later, and a good end can follow a bad one.
    Then this may find a later change than the first. On ten wrong answers of the demo's pair both
    found the same tokens, `scan` with 98 questions and `bisect` with 58.
    """
    if not go_on([]).good:
        return FAILS
    good, bad = 0, len(answer) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        outcome = go_on(answer[:middle])
        if outcome.good:
            # as in scan
            good = min(max(middle, len(os.path.commonprefix([answer, outcome.tokens]))), bad - 1)
        else:
            bad = middle
    return good if bad <= len(answer) else ENDS_EARLY


SEARCHES = {"scan": scan, "bisect": bisect}


# ---------------------------------------------------------------- AutoJudge

class Swap(NamedTuple):
    at: int  # which token of the answer
    important: bool
    tokens: list[int]  # the answer with the draft's token and what the target made of it
    instead_of: int | None  # the target's own token; None if it would have ended


def autojudge(go_on, draft, eos_ids) -> tuple[Outcome, list[Swap]] | str:
    """The swaps of a walk through the target's answer and the answer that it ends with; or why
    there is none.

    `draft(prefix)` is the draft's token after a prefix. As in the paper's algorithm, the walk goes
    on in the new answer where a swap did not matter, and in the old one, one token further, where
    it did. Unlike there, an answer counts as changed if it is no longer right, not if its wording
    is another; so the target's own answer has to be right. A draft's end token has no characters to
    be marked and is passed over.
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


def drafter(draft, prompt: list[int]):
    """`autojudge`'s draft: greedy, on a cache of its own that grows with the walk."""
    engine = G.Engine(draft)

    @torch.inference_mode()
    def propose(prefix):
        return engine.prefill(prompt + prefix, 1)

    return propose


def characters(tokenizer, prompt: list[int], tokens: list[int],
               at: int) -> tuple[str, list[int]] | None:
    """The text up to and with the characters that token `at` holds any byte of, and their [start,
    end) in it.

    A token inside a character stands for the whole of it, completed by the tokens that follow. None
    where the text would not be cut into these tokens again, for then the mark would fall on others.
    """
    stream = Stream(tokenizer, prompt)
    text = "".join(stream.put(t) for t in tokens[:at])
    start, end = len(text), at
    while end == at or end < len(tokens) and stream.decoder.getstate()[0]:
        text += stream.put(tokens[end])
        end += 1
    ids, offsets = tokenizer.encode_with_offsets(text, continuation=True)
    marked = sum(b > start for _, b in offsets)
    exact = marked >= end - at and ids[len(ids) - marked:] == tokens[max(0, end - marked):end]
    return (text,
            [start, len(text)]) if exact and len(text) > start and "\ufffd" not in text else None
