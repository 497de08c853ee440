"""Train an EAGLE head for a target, from the target's own answers to the prompts of a file.

    python train_eagle.py --target DIR --prompts prompts.jsonl --out eagle

The head is EAGLE-1's and EAGLE-2's (arXiv 2401.15077, 2406.16858), and so is the loss over the
answers: smooth L1 of predicted and true hidden states plus 0.1 times the cross-entropy of the
draft's and the target's distributions. A chain of drafts goes on from the head's own predictions,
so it is trained on them too: --unroll steps, each on what the step before predicted (HASS, arXiv
2408.15766; EAGLE-3's training-time test, arXiv 2503.01840). The target's weights stay as they are.

Answers are on disk as they are made, in OUT/answers.jsonl, which make_judge_data.py's mine reads
too, and the state of training is in OUT/train.safetensors: after any kill the same command goes on,
to the same weights as without. The target reads the texts again in every epoch, so no hidden states
are kept. One process.
"""
import contextlib
import hashlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import fingerprint
from common import (
    OBJECT,
    TEXT,
    Parser,
    check_apart,
    check_writable,
    file_hash,
    is_finite,
    json_lines,
    json_values,
    list_of,
    make_directory,
    needed,
    open_weights,
    read_json,
    refuse,
    replacing,
    say,
    whole,
)
from drafters.answering import answer
from drafters.eagle_head import EagleHead
from drafters.eagle_training import (
    DEPTH,
    Text,
    columns,
    embeds_of,
    frequent,
    loss_of,
    order,
    played,
    read_texts,
    runs,
)
from evaluation.report import table
from formats.answer_log import AnswerLog, saved_settings, seed_of
from judge_data.data import split
from load import add_device_flags, dtype_name, load_model, read_vocabulary, resolve_device
from model import ModelConfig, Transformer
from ranks import job
from ranks.memory import Memory, check_memory
from tokenizer import Tokenizer

TOGETHER = 64  # answers that the target writes side by side
SAVE_SECONDS = 60  # between two states of training on disk
NOISE = 0.1  # U(-0.1, 0.1) is added to the target's states that the head reads, as in EAGLE-1
CLIP = 0.5  # of the gradient's norm
WARM_UP = 0.05  # share of the steps
STATE, MOMENTS = "train.safetensors", ("exp_avg", "exp_avg_sq")
FILES = "answers.jsonl", "answers.settings.json", STATE, "config.json", "model.safetensors"
LOGGED = needed(dict(number=whole(0), prompt=TEXT, answer=TEXT,
                     tokens=list_of(whole(0), "token ids")))


# ---------------------------------------------------------------- answers

class Prompt(NamedTuple):
    number: int  # of its line in the file, from 1
    text: str
    ids: list[int]


def read_prompts(args, config: ModelConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The distinct prompts of the first --limit lines."""
    prompts = {}
    for line in json_lines(args.prompts, "prompts", kinds=needed(dict(prompt=TEXT)))[:args.limit]:
        text = line.value["prompt"]
        refuse((not text, f"{line.where}: 'prompt' is empty"))
        ids = tokenizer.prompt(text, args.chat)
        refuse((len(ids) + 1 >= config.max_seq_len, f"{line.where}: the prompt has {len(ids)} "
                f"tokens, the target's context is {config.max_seq_len}; shorten or drop it"))
        prompts.setdefault(text, Prompt(line.number, text, ids))
    refuse((len(prompts) < 2, f"{args.prompts} holds one prompt only; some are held out, so give "
            "two or more prompts"))
    return list(prompts.values())


def groups(prompts: list[Prompt]) -> list[list[Prompt]]:
    """The prompts to answer side by side, of similar length; they do not depend on what is done."""
    ordered = sorted(prompts, key=lambda p: len(p.ids))
    return [ordered[i:i + TOGETHER] for i in range(0, len(ordered), TOGETHER)]


def make_answers(args, target: Transformer, tokenizer: Tokenizer, prompts: list[Prompt],
                 log: AnswerLog):
    """Add the answers that the log lacks, and close it."""
    done = {line["number"] for line in log.values}
    eos_ids = sorted(tokenizer.eos_ids)
    with contextlib.closing(log), tqdm(total=len(prompts), desc="target answers", unit="answer",
                                       disable=None) as bar:
        for i, group in enumerate(groups(prompts)):
            if all(p.number in done for p in group):
                bar.update(len(group))
                continue
            answers = answer(target, [p.ids for p in group], args.max_new_tokens, eos_ids,
                             args.temperature, seed_of(args.seed, "answers", i))
            for p, tokens in zip(group, answers):
                if p.number not in done:
                    words = [t for t in tokens if t not in tokenizer.eos_ids]
                    log.append({"number": p.number, "prompt": p.text,
                                "answer": tokenizer.decode_new(p.ids, words), "tokens": tokens,
                                "source_model": args.target.resolve().name, "chat": args.chat,
                                "ended": len(words) < len(tokens),
                                "max_new_tokens": args.max_new_tokens})
                bar.update()
        if log.end() > log.size:
            log.open()  # writes the line end that a kill left out


def hash_of(texts: list[Text]) -> str:
    """16 hex digits of the texts that are trained on and held out."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- training

def train(args, target: Transformer, texts: list[Text], made: dict) -> EagleHead:
    """The head after --epochs over the texts. made: what its weights depend on.

    A step's noise and an epoch's order come from the seed and their number alone, so a run that
    resumes draws what it would have drawn.
    """
    torch.manual_seed(args.seed)
    head = EagleHead.new(target.config, made["target"], args.ffn_dim).to(args.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, betas=(0.9, 0.95))
    taken, target_head = resume(args, head, optimizer, made), columns(target)
    if args.draft_vocab_size:
        ids = frequent(texts, args.draft_vocab_size, target.config.vocab_size).to(args.device)
        target_head = target_head[ids]
    batches = [b for epoch in range(args.epochs)
               for b in order(texts, args.batch, args.seed, epoch)]
    saved, losses = time.monotonic(), []
    with tqdm(total=len(batches), initial=taken, desc="training", unit="step",
              disable=None) as bar:
        for step in range(taken, len(batches)):
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step / len(batches))
            batch = [texts[i] for i in batches[step]]
            losses.append(train_step(args, head, target, target_head, optimizer, batch, step))
            bar.update()
            if time.monotonic() - saved > SAVE_SECONDS:
                save_state(args.out, head, optimizer, step + 1, made)
                saved = time.monotonic()
            if (step + 1) % max(1, len(batches) // 10) == 0:
                say(f"step {step + 1:,} of {len(batches):,}: loss {sum(losses) / len(losses):.4f}")
                losses = []
    refuse((not all(map(is_finite, head.parameters())), "training gave no finite weights; lower "
            f"--lr, and remove {args.out / STATE} if it is there"))
    if args.draft_vocab_size:
        head.narrow(ids, target_head)
    return head


def train_step(args, head: EagleHead, target: Transformer, target_head: Tensor, optimizer,
               batch: list[Text], step: int) -> float:
    """Take one step of the optimizer; returns the loss before it."""
    hidden, ids, learn = read_texts(target, batch)
    rng = torch.Generator(hidden.device).manual_seed(seed_of(args.seed, "noise", step))
    noise = torch.empty(hidden.shape, device=hidden.device).uniform_(-NOISE, NOISE, generator=rng)
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
        loss = loss_of(head, target_head, embeds_of(head, target, ids), hidden.float(), learn,
                       noise, args.unroll)
    loss.backward()
    nn.utils.clip_grad_norm_(head.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def schedule(done: float) -> float:
    """The learning rate's factor after a share of the steps: up, flat, and from half on down."""
    return min(1.0, (done + 1e-3) / WARM_UP, 2 * (1 - done))


# ---------------------------------------------------------------- the state on disk

def save_state(out: Path, head: EagleHead, optimizer, step: int, made: dict):
    """Replace OUT/train.safetensors by the weights, AdamW's moments and the number of steps."""
    tensors = {f"weights.{name}": p.detach() for name, p in head.named_parameters()}
    for name, p in head.named_parameters():
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in MOMENTS}
    with replacing(out / STATE) as tmp:
        save_file(tensors, tmp, {"made": json.dumps(made), "step": str(step)})


def resume(args, head: EagleHead, optimizer, made: dict) -> int:
    """Take in the state that a killed run left, if any; returns the number of steps taken.

    Raises UserError for a run with other settings, or a damaged file.
    """
    path = args.out / STATE
    if not path.exists():
        return 0
    with open_weights(path) as f:
        said = json_values(f.metadata(), needed(dict(made=OBJECT, step=whole(1))), path)
        changed = [f"{key} was {said['made'].get(key)}, now {value}" for key, value in made.items()
                   if said["made"].get(key) != value]
        refuse((changed, f"{path} was made with other settings: {'; '.join(changed)}. Take another "
                "--out, or remove this file"))
        shapes = {f"{kind}.{name}": list(p.shape) for name, p in head.named_parameters()
                  for kind in ("weights", *MOMENTS)}
        found = {key: f.get_tensor(key) for key in f.keys()}
    refuse(({key: list(t.shape) for key, t in found.items()} != shapes
            or not all(map(is_finite, found.values())), f"{path} is damaged; remove it"))
    with torch.no_grad():
        for name, p in head.named_parameters():
            p.copy_(found[f"weights.{name}"])
            optimizer.state[p] = {"step": torch.tensor(float(said["step"]))} | {
                key: found[f"{key}.{name}"].to(p.device) for key in MOMENTS}
    return said["step"]


# ---------------------------------------------------------------- report

def report(head: EagleHead, target: Transformer, texts: list[Text]) -> str:
    """The accept rate of each draft of a chain, on held-out answers."""
    found = runs(head, target, texts)
    every = torch.cat(found)
    share = [float((every >= j).float().mean()) for j in range(DEPTH + 1)]
    rows = [["draft of a chain", "accepted if all before were", "chains that reach it and more"]]
    rows += [[str(j), f"{share[j] / share[j - 1]:.1%}" if share[j - 1] else "-", f"{share[j]:.1%}"]
             for j in range(1, DEPTH + 1)]
    accepted, rounds = map(sum, zip(*(played(run.tolist(), DEPTH) for run in found)))
    return (f"{len(texts):,} held-out answers, {len(every):,} chains of {DEPTH} top-1 drafts, one "
            f"from each token.\n\n{table(rows)}\n\nAccepted of {DEPTH}: {sum(share[1:]):.2f} on "
            f"average over the tokens, {accepted / rounds:.2f} a round when the answers are "
            "generated.")


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = Parser(description="Train an EAGLE head for a target on the target's own answers.")
    p.add_argument("--target", type=Path, required=True, help="checkpoint directory")
    p.add_argument("--prompts", type=Path, required=True,
                   help='JSON Lines of {"prompt": str}, also gzipped')
    p.add_argument("--out", type=Path, required=True, metavar="DIR",
                   help="directory for the head, the answers and the state of training")
    p.add_argument("--limit", type=int, help="lines of --prompts; default all")
    p.add_argument("--chat", action="store_true",
                   help="put the prompts into the checkpoint's chat template")
    p.add_argument("--max_new_tokens", type=int, default=512, help="of an answer (default 512)")
    p.add_argument("--temperature", type=float, default=0.0,
                   help="of the answers (default 0: greedy)")
    p.add_argument("--ffn_dim", type=int, help="of the head's layer; default the target's")
    p.add_argument("--draft_vocab_size", type=int, metavar="N", help="draft only the answers' N "
                   "most frequent tokens: a draft step costs mostly the LM head; default all")
    p.add_argument("--unroll", type=int, default=4,
                   help="drafts in a row that are trained, each on the head's prediction before it "
                   "(default 4; 1: EAGLE-1)")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--batch", type=int, default=2048,
                   help="tokens of a step, padding included (default 2048)")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--val_share", type=float, default=0.05,
                   help="share of the prompts held out for the report (default 0.05)")
    p.add_argument("--seed", type=int, default=0)
    add_device_flags(p)
    args = p.parse_args(argv)
    check_args(args)
    resolve_device(args)
    return args


def check_args(args):
    """Everything about the flags that can be refused before the target is read."""
    whole_numbers = ("limit", "max_new_tokens", "ffn_dim", "unroll", "epochs", "batch",
                     "draft_vocab_size")
    refuse(
        *((getattr(args, flag) is not None and getattr(args, flag) < 1,
           f"--{flag} is {getattr(args, flag)}; it must be at least 1") for flag in whole_numbers),
        (not 0 < args.val_share < 1,
         f"--val_share is {args.val_share}; it must be between 0 and 1"),
        (not 0 <= args.temperature < math.inf,
         f"--temperature is {args.temperature}; it must be from 0 up"),
        (not 0 < args.lr <= 1, f"--lr is {args.lr}; it must be above 0, up to 1"),
        (job.world() > 1, "train_eagle.py trains in one process; start it with python"),
        (args.out.exists() and not args.out.is_dir(),
         f"--out {args.out} is a file; name a directory"))
    check_apart({f"{name} of --out": args.out / name for name in FILES},
                {"--target": args.target, "--prompts": args.prompts})
    if not args.out.exists():
        check_writable(args.out)


def check_out(out: Path, mark: str):
    """Refuse an --out that holds a checkpoint: a finished head, or anything of another target."""
    config, weights = out / "config.json", next(out.glob("model*.safetensors*"), None)
    other = config.exists() and read_json(config).get("eagle_target") != mark
    refuse((other, f"--out {out} holds another target's head, or another checkpoint; name another "
            "directory"),
           (weights, f"{weights} is there already; remove it to train another head on the same "
            "answers, or name another --out"))


def training_memory(args, config: ModelConfig, longest: int) -> Memory:
    """What training takes beside the target, about: the head's weights, their gradient, AdamW's
    moments, the LM head's columns; and for each draft of a chain the states of its layer, with
    texts of `longest` tokens, and logits, all in float32.
    """
    with torch.device("meta"):
        head = EagleHead.new(config, "", args.ffn_dim)
    c, weights = head.config, sum(p.numel() for p in head.parameters())
    columns = args.draft_vocab_size or c.vocab_size
    token = 16 * c.dim + 6 * c.ffn_dim + 4 * c.n_head * longest + 4 * columns
    states = max(args.batch, longest) * args.unroll * token
    return Memory(4 * (4 * weights + c.vocab_size * c.dim), 0, 4 * states)


def main():
    args = parse_args()
    config, tokenizer = read_vocabulary(args.target)
    refuse(((args.draft_vocab_size or 0) > config.vocab_size, "--draft_vocab_size is "
            f"{args.draft_vocab_size}, the target's vocabulary {config.vocab_size}"))
    prompts = read_prompts(args, config, tokenizer)
    made = {"target": fingerprint(args.target), "seed": args.seed}
    check_out(args.out, made["target"])
    settings = made | {"prompts": file_hash(args.prompts), "chat": args.chat,
                       "max_new_tokens": args.max_new_tokens, "temperature": args.temperature}
    path, about = args.out / "answers.jsonl", args.out / "answers.settings.json"
    if args.out.exists():
        saved_settings(about, path, settings)
    longest = min(config.max_seq_len, max(len(p.ids) for p in prompts) + args.max_new_tokens)
    check_memory({"target": (config, args.dtype, False),
                  "head in training": training_memory(args, config, longest)}, longest, TOGETHER,
                 args.device, batch=TOGETHER, advice="take a smaller --batch, --unroll or target")
    target = load_model(args.target, config, args.device, args.dtype)
    make_directory(args.out)
    log = AnswerLog(path, settings, about, kinds=LOGGED)
    make_answers(args, target, tokenizer, prompts, log)

    answers = {line["number"]: line["tokens"] for line in log.values}
    held = split([{"prompt": p.text} for p in prompts], args.val_share, args.seed)
    texts = [Text(p.ids + answers[p.number], len(p.ids)) for p in prompts]
    parts = [[t for t, h in zip(texts, held) if h == part and len(t.ids) > t.start + 1]
             for part in (False, True)]
    refuse((not all(parts), f"{args.prompts}: both a training and a held-out part need a prompt "
            "with an answer of two tokens or more; give more prompts"))
    made |= {"device": torch.device(args.device).type, "dtype": dtype_name(args.dtype),
             "texts": hash_of(texts), **{key: getattr(args, key) for key in (
        "ffn_dim", "draft_vocab_size", "unroll", "epochs", "batch", "lr", "val_share")}}
    say(f"{len(parts[0]):,} answers of {sum(len(t.ids) - t.start for t in parts[0]):,} tokens to "
        f"train on, {len(parts[1]):,} held out")
    head = train(args, target, parts[0], made)
    say(report(head, target, parts[1]))
    head.save(args.out, read_json(args.target / "config.json"))
    (args.out / STATE).unlink(missing_ok=True)
    size = sum(p.numel() for p in head.parameters())
    say(f"EAGLE head of {size:,} parameters -> {args.out}")


if __name__ == "__main__":
    job.run(main)
