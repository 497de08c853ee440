"""Open prompts without a download: a chat model writes the user's turns itself.

    python demo/open_prompts.py --target DIR --apart ifeval_input_data.jsonl --out prompts.jsonl

After its chat template's opening of a user's turn, a model that was trained on chats goes on with a
question such as it was trained on (Magpie, arXiv 2406.08464). Kept are turns that the model itself
ended within LONGEST tokens, once each, that share no run of EIGHT words with a prompt of the
--apart files (of a shorter prompt: all its words), so that nothing is trained on a table's prompts.
Nothing of an interrupted run is kept.
"""
import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tqdm import tqdm

from common import (
    Parser,
    check_apart,
    check_writable,
    json_lines,
    refuse,
    run,
    say,
    write_text,
)
from drafters.answering import answer
from formats.answer_log import seed_of
from load import add_device_flags, load_model, read_vocabulary, resolve_device

TOGETHER = 64  # turns that are written side by side
SHORTEST, LONGEST = 5, 80  # tokens of a turn, without and with the one that ends it
EIGHT = 8  # words in a row that two prompts do not share by chance
TEXTS = "prompt", "question", "problem"  # keys of a prompt in the benchmarks' files; or turns[0]


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Every run of EIGHT words, or all words of a shorter text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + EIGHT]) for i in range(max(1, len(words) - EIGHT + 1))}


def read(path: Path) -> list[str]:
    """The prompts of a JSON Lines file; raises UserError for a line without one."""
    texts = []
    for line in json_lines(path, holding="prompts"):
        turns = line.value.get("turns") or [None]
        texts.append(next((line.value[key] for key in TEXTS if key in line.value), turns[0]))
        refuse((not isinstance(texts[-1], str) or not texts[-1].strip(), f"{line.where}: no prompt "
                f"in it; a line has {', '.join(TEXTS)} or turns"))
    return texts


def opening(tokenizer) -> list[int]:
    """The chat template's tokens before the text of a first user's turn."""
    one, other = (tokenizer.prompt(text, chat=True) for text in ("A", "7"))
    return one[:next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)]


def reason(text: str, ended: bool, length: int, seen: set[str], apart: set) -> str | None:
    """Why a turn is left out; None: it is kept."""
    if not ended:
        return "not ended"
    if length < SHORTEST:
        return "too short"
    if " ".join(text.lower().split()) in seen:
        return "twice"
    return "shared with --apart" if word_runs(text) & apart else None


def write_turns(args, target, tokenizer, apart: set) -> tuple[list[str], Counter]:
    """--n turns to keep, and how many were left out, by reason."""
    start, eos_ids = opening(tokenizer), tokenizer.eos_ids
    kept, seen, left_out = [], set(), Counter()
    with tqdm(total=args.n, desc="prompts", unit="prompt", disable=None) as bar:
        for group in itertools.count():
            turns = answer(target, [start] * TOGETHER, LONGEST, sorted(eos_ids), args.temperature,
                           seed_of(args.seed, "prompts", group))
            for tokens in turns:
                words = [t for t in tokens if t not in eos_ids]
                text = tokenizer.decode_new(start, words).strip()
                if why := reason(text, tokens[-1] in eos_ids, len(words), seen, apart):
                    left_out[why] += 1
                    continue
                seen.add(" ".join(text.lower().split()))
                kept.append(text)
                if len(kept) == args.n:
                    return kept, left_out
            bar.update(len(kept) - bar.n)
            refuse((sum(left_out.values()) > 20 * (len(kept) + TOGETHER), f"{args.target} wrote "
                    f"{len(kept)} turns to keep beside {spelled(left_out)}; is it a chat model?"))


def spelled(counts: Counter) -> str:
    return ", ".join(f"{n:,} {why}" for why, n in counts.most_common()) or "none"


def parse_args():
    p = Parser(description="Open prompts that a chat model writes itself, as user's turns.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--n", type=int, default=1000, help="prompts to write (default 1000)")
    p.add_argument("--apart", type=Path, nargs="*", default=[], metavar="FILE",
                   help="JSON Lines of benchmarks whose prompts must not come out")
    p.add_argument("--also", type=Path, nargs="*", default=[], metavar="FILE",
                   help="JSON Lines whose first --also_n prompts each are added at the end")
    p.add_argument("--also_n", type=int, default=200, help="default 200")
    p.add_argument("--temperature", type=float, default=0.8, help="default 0.8")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, required=True, help='JSON Lines of {"prompt": str}')
    add_device_flags(p)
    args = p.parse_args()
    refuse(*((getattr(args, flag) < 1, f"--{flag} is {getattr(args, flag)}; it must be at least 1")
             for flag in ("n", "also_n")),
           (not 0 < args.temperature < math.inf,
            f"--temperature is {args.temperature}; it must be above 0"))
    check_writable(args.out)
    check_apart({"--out": args.out}, {"--target": args.target} | {
        str(path): path for path in args.apart + args.also})
    resolve_device(args)
    return args


def main():
    args = parse_args()
    apart = set().union(*(word_runs(text) for path in args.apart for text in read(path)))
    more = [text for path in args.also for text in read(path)[:args.also_n]]
    also = [text for text in more if not word_runs(text) & apart]
    config, tokenizer = read_vocabulary(args.target)
    target = load_model(args.target, config, args.device, args.dtype)
    kept, left_out = write_turns(args, target, tokenizer, apart)
    write_text(args.out, "".join(json.dumps({"prompt": text}) + "\n" for text in kept + also))
    left_out["of --also"] = len(more) - len(also)
    say(f"{len(kept):,} prompts and {len(also):,} of --also -> {args.out}; left out: "
        f"{spelled(left_out)}")


if __name__ == "__main__":
    run(main)
