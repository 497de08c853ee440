"""The drafters as the commands spell them: their names and trees, and what makes one."""
import argparse
import math
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import NamedTuple

from common import UserError, refuse
from drafters.drafter import Drafter
from drafters.eagle import EXPAND, HEIGHT, EagleDrafter, levels
from drafters.eagle_head import EagleHead, is_eagle
from drafters.llama import LlamaDrafter
from drafters.ngram import NgramDrafter
from judge import RULES
from model import Transformer

NAMES = "llama", "eagle", "eagle-tree", "ngram"
CHAIN, LEVELS, TREE = 25, 8, "26"  # by default: K of a chain, levels of a dynamic tree, the tree
NODES = 512  # tokens of a tree at most: its mask and its logits grow with them
TREE_HELP = ("a tree of drafts of an EAGLE head: 4,2,1, the children of each node by depth; or 26, "
             f"the tokens of EAGLE-2's dynamic tree of {LEVELS} levels (26:5 of 5)")


# ---------------------------------------------------------------- trees

class Shape(NamedTuple):
    """A tree as EagleDrafter takes it: of each depth the children of a node, or a dynamic one's
    number of tokens; and its height, which is its rounds' K.
    """
    tree: tuple[int, ...] | int
    height: int

    @property
    def tokens(self) -> int:
        return self.tree if isinstance(self.tree, int) else sum(accumulate(self.tree, mul))

    def __str__(self):
        return f"{self.tree}:{self.height}" if isinstance(self.tree, int) else ",".join(
            map(str, self.tree))


def parse_tree(text: str) -> Shape:
    """The tree that --tree spells: 4,2,1 or 26 or 26:5. Raises UserError."""
    children, colon, height = text.partition(":")
    try:
        tree = tuple(map(int, children.split(",")))
        shape = Shape(tree, len(tree)) if len(tree) > 1 else Shape(
            tree[0], int(height) if colon else min(LEVELS, tree[0]))
        if min(*tree, shape.height) < 1 or len(tree) > 1 and colon:
            raise ValueError
    except ValueError:
        raise UserError(f"--tree {text}: give whole numbers from 1, the children of each node by "
                        "depth, such as 4,2,1, or a dynamic tree's tokens and levels, such as 26 "
                        "or 26:5") from None
    most = min(HEIGHT, shape.tokens) if isinstance(shape.tree, int) else shape.height
    refuse((shape.tokens > NODES, f"--tree {text} has {shape.tokens} tokens; {NODES} is the most"),
           (shape.height > most, f"--tree {text} can have at most {most} levels"))
    room = sum(n * children for n, children in levels(*shape))
    refuse((shape.tokens > room, f"--tree {text}: so few levels have room for {room} tokens only, "
            f"{EXPAND} after each of {EXPAND} nodes; give more levels, or fewer tokens"))
    return shape


def check_k(tree: Shape, given: list[int]):
    """Refuse another K than a tree's where nothing else is drafted."""
    for k in given:
        refuse((k != tree.height, f"--speculate_k is {k}, and --tree {tree} has {tree.height} "
                "levels; leave out --speculate_k"))


def ks_of(drafter: str, tree: Shape | None, given: list[int], default=(CHAIN,)) -> list[int]:
    """The K's of a drafter's rounds: a tree's height, else those given, or by default."""
    return [tree.height] if drafter == "eagle-tree" else given or list(default)


def most_drafted(drafters: list[str], tree: Shape | None, given: list[int],
                 default=(CHAIN,)) -> int:
    """The most tokens that a round drafts; 0 where nothing drafts."""
    return max((tree.tokens if name == "eagle-tree" else max(ks_of(name, tree, given, default))
                for name in drafters), default=0)


# ---------------------------------------------------------------- drafters

def make_drafter(name: str, target: Transformer, draft: Transformer | None = None,
                 eagle: EagleHead | None = None, tree: Shape | None = None) -> Drafter:
    """A new drafter of a name in NAMES, with caches of its own. tree: eagle-tree's."""
    if name == "llama":
        return LlamaDrafter(draft)
    if name == "ngram":
        return NgramDrafter(target.norm.weight.device)
    tree = tree.tree if name == "eagle-tree" else None
    widest = 0 if tree is None else EXPAND if isinstance(tree, int) else max(tree)
    refuse((widest > target.config.vocab_size, f"a node of --tree has {widest} children, the "
            f"target {target.config.vocab_size} tokens; take a narrower tree"))
    return EagleDrafter(eagle, target, tree)


def kind(draft: Path | str | None, tree) -> str | None:
    """The drafter that generate.py's --draft names: a directory's, told by its tensors, or ngram.
    """
    if draft is None or draft == "ngram":
        return draft
    return ("eagle-tree" if tree else "eagle") if is_eagle(draft) else "llama"


def check_rules(rules: dict[str, tuple], drafters: list[str], ks: list[int], greedy: bool):
    """Refuse a rule, {spelling: (name, parameter, ...)}, that needs the distribution of a draft
    that has none, no tree, or can never accept anything: sampled chances when greedy, more drafted
    tokens ahead than the shortest round has.
    """
    first = lambda holds: next((r for r, (name, *more) in rules.items()
                                if holds(RULES[name], *more)), None)
    comparing = first(lambda row, *_: row.needs_draft_logits)
    chain, coin = first(lambda row, *_: row.needs_chain), first(lambda row, *_: row.needs_coin)
    most = min((k for k in ks if type(k) is int), default=math.inf)  # not auto
    far = first(lambda row, given, *_: row.ahead(
        given if given is not None else row.default) >= most)
    refuse((coin and greedy, f"rule {coin} is for sampling: greedy it accepts nothing of its own; "
            "give --temperature, or leave it out"),
           (far, f"rule {far} looks at more drafted tokens than a round of {most} has after any; "
            "raise --speculate_k or lower its second parameter"),
           (comparing and "ngram" in drafters, f"rule {comparing} compares the draft's "
            "distribution with the target's, and an n-gram draft has none; leave one of them out"),
           (chain and "eagle-tree" in drafters, f"rule {chain} needs a chain of drafts, and "
            "eagle-tree drafts a tree; leave one of them out"))


# ---------------------------------------------------------------- flags of eval.py and benchmark.py

def add_drafter_flags(p: argparse.ArgumentParser):
    """--eagle, --drafters and --tree; `resolve_drafters` reads them."""
    p.add_argument("--eagle", type=Path, help="directory of an EAGLE head of the target")
    p.add_argument("--drafters", help=f"list of {', '.join(NAMES)}, each with every rule (default "
                   "llama with --draft, eagle with --eagle, eagle-tree with --tree)")
    p.add_argument("--tree", type=parse_tree, help=f"eagle-tree's: {TREE_HELP}; default {TREE}")


def resolve_drafters(args: argparse.Namespace, rules: dict[str, tuple], ks: list[int], greedy=True,
                     default=(CHAIN,)):
    """Make --drafters a list and fill in --tree; refuse what does not fit.

    rules: those that need a drafter, as `check_rules` takes them; without any, nothing drafts. ks:
    what --speculate_k gives, else `default`.
    """
    given = {"llama": args.draft, "eagle": args.eagle, "eagle-tree": args.tree}
    named = args.drafters.split(",") if args.drafters else [n for n in NAMES if given.get(n)]
    args.drafters = list(dict.fromkeys(name.strip() for name in named))
    unknown = next((name for name in args.drafters if name not in NAMES), None)
    refuse((unknown is not None, f"{unknown!r} is not a drafter; use {', '.join(NAMES)}"))
    if not rules:
        args.drafters = []
        return
    eagle = next((name for name in args.drafters if name.startswith("eagle")), None)
    refuse((not named, f"rule {next(iter(rules))} needs --draft DIR, or another drafter: "
            "--eagle DIR, or --drafters ngram"),
           ("llama" in args.drafters and not args.draft, "drafter llama needs --draft DIR"),
           (eagle and not args.eagle, f"drafter {eagle} needs --eagle DIR"),
           (args.tree and "eagle-tree" not in args.drafters,
            "--tree is the drafter eagle-tree's; add it to --drafters"))
    check_rules(rules, args.drafters, ks or default, greedy)
    if "eagle-tree" in args.drafters:
        args.tree = args.tree or parse_tree(TREE)
        check_k(args.tree, ks if args.drafters == ["eagle-tree"] else [])
