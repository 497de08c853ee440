"""Train the demo's SentencePiece tokenizer: BPE, byte fallback, every digit its own token.

    python demo/make_tokenizer.py --out checkpoints/demo/target
"""
import argparse
import random
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import sentencepiece

from common import run
from demo.corpus import TASKS, problems, render


def texts(per_task=4000):
    """Lines of documents in both habits, mistakes included.

    SentencePiece trains on lines; line ends become byte tokens.
    """
    rng = random.Random(0)
    for task in TASKS:
        for i, p in enumerate(islice(problems(task, "train"), per_task)):
            habit = ("target", "draft")[i % 2]
            yield from (p.prompt + render(p.solution, rng, habit, mistakes=0.03)).split("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True,
                        help="directory that gets tokenizer.model")
    parser.add_argument("--vocab_size", type=int, default=1280)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(), model_prefix=str(args.out / "tokenizer"), model_type="bpe",
        vocab_size=args.vocab_size, byte_fallback=True, split_digits=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=1)
    (args.out / "tokenizer.vocab").unlink()


if __name__ == "__main__":
    run(main)
