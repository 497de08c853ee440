"""Train one of the demo's two models on the synthetic corpus; writes a checkpoint directory.

    python demo/train.py --model target --tokenizer checkpoints/demo/target \\
        --out checkpoints/demo/target --minutes 60
    python demo/train.py --model draft --tokenizer checkpoints/demo/target \\
        --out checkpoints/demo/draft --minutes 10

Text is rendered as it is needed, so no document is seen twice. Muon for the matrices, AdamW for the
rest, a schedule that is flat and then falls to zero. `--minutes` bounds the time; the step count
follows from it. `--dtype bfloat16` is five times as fast as float32 on a CPU with instructions for
it (AMX) and seven times slower on one without.
"""
import argparse
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from checkpoint import config_from
from common import replacing, run, write_json
from demo.corpus import LETTERS, problems, render
from model import Transformer, apply_rope, rope_table

SEQ = 256  # row length in training
SIZES = {
    "target": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6,
                   num_key_value_heads=2, intermediate_size=1024, tie_word_embeddings=False),
    "draft": dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=3,
                  num_key_value_heads=1, intermediate_size=256, tie_word_embeddings=True),
}
# Share of the possible mistakes that are made, and corrected at once.
MISTAKES = {"target": 0.025, "draft": 0.0}
WEIGHTS = {  # documents of each task
    "target": {"maths": 2, "code": 1.4, "facts": 1, "drill": 0.3, "lookups": 0.6},
    "draft": {"maths": 2.2, "code": 1.5, "facts": 4, "lookups": 2},
}


def config_json(which, vocab_size):
    size = SIZES[which]
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=vocab_size,
                head_dim=size["hidden_size"] // size["num_attention_heads"],
                max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0,
                hidden_act="silu", bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16", **size)


def documents(which, tokenizer, seed, weights):
    """Endless (inputs, labels) in the model's habit, each from BOS to EOS; label -100 is none."""
    rng = random.Random(f"{which} {seed}")
    streams = {task: problems(task, "train", seed=f"{which} {seed}") for task in weights}
    letters = {tokenizer.piece_to_id(f"\u2581{letter}") for letter in LETTERS}
    while True:
        problem = next(streams[rng.choices(list(weights), list(weights.values()))[0]])
        # Both break at a space or a line, so this is where the answer begins.
        prompt = len(tokenizer.encode(problem.prompt))
        text = problem.prompt + render(problem.solution, rng, which, MISTAKES[which])
        ids = [tokenizer.bos_id(), *tokenizer.encode(text), tokenizer.eos_id()]
        labels = [-100] * prompt + ids[prompt + 1:]
        if problem.task == "lookups":
            # Which things are asked for is chance, and its loss would drown the letters'.
            labels = [label if label in letters else -100 for label in labels]
        yield ids[:-1], labels


def rows(which, tokenizer, seed, weights):
    """Endless (inputs [SEQ], labels [SEQ]): whole documents packed, the padding without labels."""
    source, pool = documents(which, tokenizer, seed, weights), []
    while True:
        inputs, labels = [], []
        pool += [next(source) for _ in range(64 - len(pool))]
        pool.sort(key=lambda d: -len(d[0]))
        while fits := [d for d in pool if len(inputs) + len(d[0]) <= SEQ]:
            pool.remove(fits[0])
            inputs += fits[0][0]
            labels += fits[0][1]
        pool = [d for d in pool if len(d[0]) <= SEQ]
        yield inputs + [0] * (SEQ - len(inputs)), labels + [-100] * (SEQ - len(labels))


def logits(model, tokens, rope):
    """The model without its cache, for training: tokens [B, S] -> logits [B, S, V]."""
    x = model.embed(tokens)
    for layer in model.layers:
        a, (B, S) = layer.attn, tokens.shape
        q, k, v = a.wqkv(layer.attn_norm(x)).view(B, S, -1, a.head_dim).split(
            [a.n_head, a.n_kv_head, a.n_kv_head], dim=2)
        q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + a.wo(y.transpose(1, 2).reshape(B, S, -1))
        x = x + layer.ffn(layer.ffn_norm(x))
    return model.output(model.norm(x))


class Muon(torch.optim.Optimizer):
    """Momentum whose update has its singular values set to about 1 (Jordan et al., 2024).

    In a dtype of choice: torch.optim.Muon always computes in bfloat16. Sized as AdamW's updates are
    (Liu et al., arXiv 2502.16982).
    """

    def __init__(self, params, lr, dtype, momentum=0.95, weight_decay=0.01):
        super().__init__(params, dict(lr=lr, dtype=dtype, momentum=momentum,
                                      weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"]).to(group["dtype"])
                x = x.T if len(x) > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                x = x.T if x.shape != p.shape else x
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    x, alpha=-0.2 * max(p.shape) ** 0.5 * group["lr"])


def init(model):
    for name, p in model.named_parameters():
        if p.dim() == 2:
            into_residual = name.endswith(("wo.weight", "w2.weight"))
            scale = (2 * len(model.layers)) ** 0.5 if into_residual else 1.0
            torch.nn.init.normal_(p, std=0.02 / scale)


def save(model, config, out: Path, tokenizer_dir: Path):
    """Write the model as an ordinary checkpoint directory."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "model.safetensors") as tmp:
        save_file({n: p.detach().to(torch.bfloat16).contiguous()
                   for n, p in model.named_parameters()}, tmp)
    write_json(out / "config.json", config)
    if tokenizer_dir.resolve() != out.resolve():
        shutil.copy(tokenizer_dir / "tokenizer.model", out)


def train(which, tokenizer, minutes, batch, lr, seed, weights, dtype, start_from=None,
          keep=lambda model: None):
    """Train for `minutes`; returns the model and the number of steps.

    `keep(model)` is called every 100 steps.
    """
    torch.manual_seed(seed)
    model = Transformer(config_from(config_json(which, tokenizer.vocab_size())))
    init(model)
    if start_from:
        weights_before = load_file(start_from / "model.safetensors")
        model.load_state_dict({n: p.float() for n, p in weights_before.items()},
                              strict=not model.config.tied)
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers.")]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [Muon(matrices, lr=lr, dtype=dtype),
                  torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]
    rope = rope_table(model.config, SEQ)

    @torch.compile
    def loss_of(x, y):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = logits(model, x, rope)
        return F.cross_entropy(out.flatten(0, 1).float(), y.flatten())

    data, start, step, done, mean = rows(which, tokenizer, seed, weights), None, 0, 0.0, 0.0
    while done < 1:
        x, y = torch.tensor([next(data) for _ in range(batch)]).unbind(1)
        loss = loss_of(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # warm-up, flat, then linearly to zero
        scale = min(1.0, done / 0.03 + 0.02, max(0.0, (1 - done) / 0.5))
        for o in optimizers:
            for group in o.param_groups:
                group["lr"] = lr * scale
            o.step()
            o.zero_grad()
        start = start or time.time()  # the first step compiles
        step, done = step + 1, (time.time() - start) / (60 * minutes)
        mean += loss.item()
        if step % 50 == 0:
            print(f"step {step}  {done:.0%}  loss {mean / 50:.4f}  "
                  f"{step * batch * SEQ / (time.time() - start + 1e-9):.0f} tokens/s", flush=True)
            mean = 0.0
        if step % 100 == 0:
            keep(model)  # an interrupted run is not lost: --start_from
    return model, step


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True,
                        help="directory with tokenizer.model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=32, help=f"rows of {SEQ} tokens")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the computation")
    parser.add_argument("--weights", metavar="TASK=N,...",
                        help="documents of each task (default: the model's own)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start_from", type=Path,
                        help="continue from this checkpoint, with the schedule from its beginning "
                        "(give another seed)")
    args = parser.parse_args()

    weights = WEIGHTS[args.model]
    if args.weights:
        pairs = (pair.split("=") for pair in args.weights.split(","))
        weights = {task: float(n) for task, n in pairs}
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(args.tokenizer / "tokenizer.model"))
    keep = lambda model: save(model, config_json(args.model, tokenizer.vocab_size()), args.out,
                              args.tokenizer)
    model, steps = train(args.model, tokenizer, args.minutes, args.batch, args.lr, args.seed,
                         weights, getattr(torch, args.dtype), args.start_from, keep)
    keep(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of "
          f"{args.batch * SEQ} tokens -> {args.out}")


if __name__ == "__main__":
    run(main)
