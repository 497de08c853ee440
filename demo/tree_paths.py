"""How often the judge's path in a tree of drafts is not the standard one, on the demo's problems.

    python demo/tree_paths.py --limit 20
"""
import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import run, say
from demo.pair import HOME, MAX_NEW_TOKENS, load_pair, read_problems
from drafters.eagle import EagleDrafter
from drafters.tree import Tree
from engine import Engine, generate
from load import load_eagle


@dataclass
class CountedTree(Tree):
    counts: Counter = None

    def longest(self, mask, passed, room):
        n, end, path = super().longest(mask, passed, room)
        above, depth, kept = self.upto[1:, 1:], self.depth[1:], path[1:int(n) + 1] - 1
        lengths = lambda ok: (ok | ~above).all(-1) * (depth <= room) * depth
        standard = int(lengths(passed).max())
        self.counts.update({
            "rounds": 1,
            "tokens accepted": int(n),
            "tokens that the standard test alone accepts": standard,
            "rounds with several paths of the greatest length":
                int((lengths(mask) == n).sum() > 1 and n > 0),
            "rounds whose path leaves the standard one before its end":
                int(passed[kept].long().cumprod(0).sum() < standard)})
        return n, end, path


class CountingDrafter(EagleDrafter):
    counts = Counter()

    def propose(self, *args):
        tokens, logits, tree = super().propose(*args)
        return tokens, logits, CountedTree(**vars(tree), counts=self.counts)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--limit", type=int, default=20, help="problems of each task")
    p.add_argument("--tree", type=int, default=26, help="tokens of the dynamic tree")
    p.add_argument("--speculate_k", type=int, default=8, help="its height")
    args = p.parse_args()
    target, _, judge, tokenizer, _ = load_pair()
    drafter = CountingDrafter(load_eagle(HOME / "eagle", HOME / "target"), target, args.tree)
    engine = Engine(target, drafter, judge, "judge", speculate_k=args.speculate_k)
    for problem in read_problems(args.limit):
        generate(engine, tokenizer.encode(problem["prompt"]), MAX_NEW_TOKENS, tokenizer.eos_ids)
    for what, n in drafter.counts.items():
        say(f"{n:7,}  {what}")


if __name__ == "__main__":
    run(main)
