"""Prompt look-up: drafts what followed where the text read before as it ends now. No model.

The longest suffix of prompt and text that occurred before is kept by a suffix automaton (Blumer et
al., 1985), in constant time a token; of several occurrences it knows the first.
"""
import torch

from drafters.drafter import Drafter

LEAST = 2  # tokens that must have recurred: one alone is followed by anything


class SuffixIndex:
    """The suffix automaton of tokens that come one by one. State 0 is the empty text's."""

    def __init__(self):
        self.tokens, self.last = [], 0
        self.edges, self.link = [{}], [-1]  # of each state: by token; its longest other suffix's
        self.length, self.end = [0], [-1]  # its longest text's; where that ended first

    def state(self, edges: dict, link: int, length: int, end: int) -> int:
        for column, value in zip((self.edges, self.link, self.length, self.end),
                                 (edges, link, length, end)):
            column.append(value)
        return len(self.link) - 1

    def add(self, token: int):
        p, edges, link, length = self.last, self.edges, self.link, self.length
        self.last = new = self.state({}, 0, length[p] + 1, len(self.tokens))
        self.tokens.append(token)
        while p >= 0 and token not in edges[p]:
            edges[p][token] = new
            p = link[p]
        if p < 0:
            return
        q = edges[p][token]
        if length[q] > length[p] + 1:  # its shorter suffixes now end in more places: split them off
            q, old = self.state(dict(edges[q]), link[q], length[p] + 1, self.end[q]), q
            link[old] = q
            while p >= 0 and edges[p].get(token) == old:
                edges[p][token] = q
                p = link[p]
        link[new] = q

    def recurring(self) -> tuple[int, int]:
        """The longest suffix that occurred before: its length, and where it ended first."""
        state = self.link[self.last]
        return (self.length[state], self.end[state]) if state > 0 else (0, -1)


class NgramDrafter(Drafter):
    """Where no suffix of LEAST tokens or more recurs, the round is a plain decode step."""
    certain, has_logits, skips = True, False, True

    def __init__(self, device="cpu"):
        self.device, self.text, self.index, self.ahead = device, None, SuffixIndex(), None

    def new_cache(self, length):
        self.ahead = torch.zeros(length, dtype=torch.long, device=self.device)

    def plan(self, text, k):
        known = self.index.tokens
        if text is not self.text:  # a new prompt; within a text the list only grows
            self.text = text
            if text[:len(known)] != known:
                self.index, known = SuffixIndex(), []
        for token in text[len(known):]:
            self.index.add(token)
        length, end = self.index.recurring()
        if length < LEAST:
            return 0
        ahead = text[end + 1:end + 1 + k]
        while len(ahead) < k:  # what recurs has reached the text's end, so it goes round
            ahead += ahead[:k - len(ahead)]
        self.ahead[:k].copy_(torch.tensor(ahead))
        return k

    def propose(self, state, k, span, s, noise):
        return self.ahead[:k], None
