"""The drafters as the commands spell them: their names, trees and K's, and what makes one.

A tree is told by the children of its nodes, depth by depth, such as (4, 2, 1); EAGLE-2's dynamic
one by its number of tokens.
"""
import argparse
from itertools import accumulate
from operator import mul
from pathlib import Path

from common import refuse
from drafters.eagle import EXPAND, HEIGHT, EagleDrafter, levels
from drafters.eagle_head import EagleHead, is_eagle
from drafters.llama import LlamaDrafter
from drafters.ngram import NgramDrafter
from engine import Drafter
from judge import RULES
from model import Transformer

NAMES = "llama", "eagle", "eagle-tree", "ngram"
CHAIN, LEVELS, TREE = 16, 8, 26  # by default: K of a chain, and of a dynamic tree; its tokens
NODES = 512  # tokens of a tree at most: its mask and its logits grow with them
TREE_HELP = ("a tree of drafts of an EAGLE head: 4,2,1, the children of each node by depth, or 26, "
             f"the tokens of EAGLE-2's dynamic tree, --speculate_k levels high (default {LEVELS})")


# ---------------------------------------------------------------- trees

def parse_tree(text: str) -> tuple[int, ...] | int:
    """The tree that --tree spells: 4,2,1 -> (4, 2, 1), 26 -> 26. Raises UserError."""
    try:
        tree = tuple(map(int, text.split(",")))
    except ValueError:
        tree = ()
    refuse((not tree or min(tree) < 1, f"--tree {text}: give whole numbers from 1, the children of "
            "each node by depth, such as 4,2,1, or the tokens of a dynamic tree, such as 26"))
    tree = tree if len(tree) > 1 else tree[0]
    refuse((tree_size(tree) > NODES,
            f"--tree {text} has {tree_size(tree)} tokens; {NODES} is the most"))
    return tree


def spell_tree(tree: tuple[int, ...] | int) -> str:
    return str(tree) if isinstance(tree, int) else ",".join(map(str, tree))


def tree_size(tree: tuple[int, ...] | int) -> int:
    """The tokens of a tree."""
    return tree if isinstance(tree, int) else sum(accumulate(tree, mul))


def check_tree(tree: tuple[int, ...] | int, ks: list[int]):
    """Refuse a K that cannot be the height of the tree."""
    for k in ks:
        if isinstance(tree, tuple):
            refuse((k != len(tree), f"--tree {spell_tree(tree)} has {len(tree)} levels and "
                    f"--speculate_k is {k}; leave it out"))
            continue
        most = sum(n * children for n, children in levels(tree, k))
        refuse((k > min(tree, HEIGHT), f"--tree {tree} has at most {min(tree, HEIGHT)} levels and "
                f"--speculate_k is {k}; lower it"),
               (tree > most, f"--tree {tree} has more than the {most} tokens that --speculate_k "
                f"{k} makes room for; raise it, or lower --tree"))


def ks_of(drafter: str, tree: tuple[int, ...] | int | None, given: list[int],
          default=(CHAIN,)) -> list[int]:
    """The K's of a drafter's rounds: those given, or by default; a static tree has but its height.
    """
    if drafter != "eagle-tree":
        return given or list(default)
    return [len(tree)] if isinstance(tree, tuple) else given or [min(LEVELS, tree)]


# ---------------------------------------------------------------- drafters

def make_drafter(name: str, target: Transformer, draft: Transformer | None = None,
                 eagle: EagleHead | None = None, tree=None) -> Drafter:
    """A new drafter of a name in NAMES, with caches of its own. tree: eagle-tree's."""
    if name == "llama":
        return LlamaDrafter(draft)
    if name == "ngram":
        return NgramDrafter(target.norm.weight.device)
    tree = tree if name == "eagle-tree" else None
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


def check_rules(rules: list[str], drafters: list[str]):
    """Refuse a rule that needs the distribution of a draft that has none."""
    rule = next((r for r in rules if RULES[r.partition(":")[0]].needs_draft_logits), None)
    refuse((rule and "ngram" in drafters, f"rule {rule} compares the draft's distribution with the "
            "target's, and an n-gram draft has none; leave one of them out"))


# ---------------------------------------------------------------- flags of eval.py and benchmark.py

def add_drafter_flags(p: argparse.ArgumentParser):
    """--eagle, --drafters and --tree; `resolve_drafters` reads them."""
    p.add_argument("--eagle", type=Path, help="directory of an EAGLE head of the target")
    p.add_argument("--drafters", help=f"list of {', '.join(NAMES)}, each with every rule (default "
                   "llama with --draft, eagle with --eagle, eagle-tree with --tree)")
    p.add_argument("--tree", type=parse_tree, help=f"eagle-tree's: {TREE_HELP}; default {TREE}")


def resolve_drafters(args: argparse.Namespace, rules: list[str], ks: list[int]):
    """Make --drafters a list and fill in --tree; refuse what does not fit.

    rules: those that need a drafter; without any, nothing drafts. ks: what --speculate_k gives.
    """
    if not rules:
        args.drafters = []
        return
    given = {"llama": args.draft, "eagle": args.eagle, "eagle-tree": args.tree}
    named = args.drafters.split(",") if args.drafters else [n for n in NAMES if given.get(n)]
    args.drafters = list(dict.fromkeys(name.strip() for name in named))
    strange = next((name for name in args.drafters if name not in NAMES), None)
    eagle = next((name for name in args.drafters if name.startswith("eagle")), None)
    refuse((strange is not None, f"{strange!r} is not a drafter; use {', '.join(NAMES)}"),
           (not named, f"rule {rules[0]} needs --draft DIR, or another drafter: --eagle DIR, or "
            "--drafters ngram"),
           ("llama" in args.drafters and not args.draft, "drafter llama needs --draft DIR"),
           (eagle and not args.eagle, f"drafter {eagle} needs --eagle DIR"),
           (args.tree and "eagle-tree" not in args.drafters,
            "--tree is the drafter eagle-tree's; add it to --drafters"))
    check_rules(rules, args.drafters)
    if "eagle-tree" in args.drafters:
        args.tree = args.tree or TREE
        alone = args.drafters == ["eagle-tree"]  # else K is the chains' too
        check_tree(args.tree, ks if alone or isinstance(args.tree, int) else [])


def most_drafted(drafters: list[str], tree, given: list[int], default=(CHAIN,)) -> int:
    """The most tokens that a round drafts."""
    return max((tree_size(tree) if name == "eagle-tree" else max(ks_of(name, tree, given, default))
                for name in drafters), default=0)
