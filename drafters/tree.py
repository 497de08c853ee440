"""A tree of drafted tokens: what the target's one pass over it needs, and the path that it keeps.

Row 0 of the pass is the text's last token, row i + 1 drafted token i, and a tree is told by the row
that each token follows. Shapes depend on the numbers of tokens and of levels alone, so a round
compiles and records whatever the tree looks like.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from model import Cache


@dataclass
class Tree:
    """parent int64 [N]: the row, of N + 1, that each token follows; height: levels of tokens."""
    parent: Tensor
    height: int
    upto: Tensor  # bool [N + 1, N + 1]: row j stands on the path from the root to row i, i included
    depth: Tensor  # int64 [N + 1]: tokens on that path; row 0 has none

    @classmethod
    def of(cls, parent: Tensor, height: int) -> "Tree":
        """The tree in which no token stands deeper than `height`; children may precede parents."""
        height = min(height, len(parent))
        own = torch.eye(len(parent) + 1, dtype=torch.bool, device=parent.device)
        above = torch.cat((parent.new_zeros(1), parent))
        upto = own
        for _ in range(height):
            upto = own | upto.index_select(0, above)
        return cls(parent, height, upto, upto.sum(-1) - 1)

    def before(self, rows: Tensor) -> Tensor:
        """Of rows [N + 1, ...], the one that each token follows, [N, ...]."""
        return rows.index_select(0, self.parent)

    def by_depth(self, noise: Tensor | None) -> Tensor | None:
        """noise [height + 1, V] for each row, [N + 1, V]; None when greedy.

        Rows of one depth share theirs, so that rows with the same text draw the same token. Of two
        such rows that drew for themselves the luckier would be kept, which is another distribution.
        """
        return None if noise is None else noise.index_select(0, self.depth)

    def where(self, pos: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """RoPE positions [N + 1] of the rows, and what they attend to, bool [N + 1, span]: all of
        the text before, and of the tree the row's own path. pos [N + 1]: their slots in the cache.
        """
        row = torch.arange(len(cache.rope), device=pos.device) - pos[0]
        within = self.upto.index_select(1, row.clamp(0, len(pos) - 1)) & (row < len(pos))
        return pos[0] + self.depth, within | (row < 0)

    def longest(self, mask: Tensor, passed: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The longest path of tokens in mask [N], at most `room` of them: its length [1], its last
        row [1], and its rows [height + 1] from the root, of which those beyond mean nothing.

        Of several, one with the most tokens that `passed` the standard test [N], then the first.
        """
        path = self.upto[1:, 1:]
        whole = (mask | ~path).all(-1) & (self.depth[1:] <= room)
        score = self.depth[1:] * (self.height + 1) + (path & passed).sum(-1)
        best = torch.where(whole, score, 0)
        end = torch.where(best.amax() > 0, best.argmax() + 1, 0)[None]
        levels = torch.arange(self.height + 1, device=mask.device)[:, None] == self.depth
        rows = levels & self.upto.index_select(0, end)
        return self.depth.index_select(0, end), end, rows.long().argmax(-1)

    def keep(self, cache: Cache, path: Tensor, tokens: Tensor, pos: Tensor,
             hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Move the path's keys and values to where a chain's would stand; its tokens [height + 1],
        positions and hidden states [height + 1, D].
        """
        slots, chain = pos.index_select(0, path), pos[:self.height + 1]
        for kv in cache.kv:
            kv.index_copy_(0, chain, kv.index_select(0, slots))
        return tokens.index_select(0, path), chain, hidden.index_select(0, path)
