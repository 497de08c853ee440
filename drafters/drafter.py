"""What the engine asks of whatever proposes tokens: the interface that every drafter subclasses.

`read` takes in what the text got, `propose` drafts what may follow. Start from llama.py.
"""
import math

from torch import Tensor


class Drafter:
    """What proposes tokens, on the device and in shapes that no value changes; subclass it."""
    context = math.inf  # positions that it can read
    wants_hidden = False  # True: `read` is called after every round too, not for the prompt only
    certain = False  # True: what it drafts does not depend on the noise
    has_logits = True  # False: `propose` never has any, so rules that need them are refused
    skips = False  # True: `plan` may say 0

    def new_cache(self, length: int):
        """Make room for `length` positions; what was read stays."""

    def read(self, tokens: Tensor, pos: Tensor, hidden: Tensor, span: int):
        """Take in tokens [S] at pos [S], with the target's states at them, hidden [S, D].

        A prompt, padded; after a round the token it began with and all K drafted, not the target's
        new one, which is the state's last. Positions that the text does not keep come again.
        """

    def plan(self, text: list[int], k: int) -> int:
        """How many tokens the next round drafts, of k, decided on the host; 0: it only decodes."""
        return k

    def size(self, k: int) -> int:
        """The tokens that `propose` gives: k in a chain, in a tree of height k its nodes."""
        return k

    def propose(self, state, k: int, span: int, s, noise: Tensor | None):
        """Tokens [k] to follow the text, and the logits [k, V or fewer] they were chosen from.

        state and s are engine.py's State and Settings; state.last is the text's end. Without
        s.needs_draft_logits the logits may be None; those of a token chosen without chance are 0
        there and -inf elsewhere. noise [k, V] when sampling, unless `certain`. A third value, a
        drafters.tree.Tree, says how the tokens follow others.
        """
        raise NotImplementedError  # every drafter has its own

    def compile(self, build, by_block, whole):
        """graphs.py: compile what `propose` consists of; see LlamaDrafter's."""
