"""What a judge's head should read and what it should be: linear or with a hidden layer, on the
target's states after the final norm, before it, or some layers earlier. One table.

    python demo/make_judge_data.py --target checkpoints/demo/target \\
        --draft checkpoints/demo/draft --out judge_data.jsonl
    python demo/head_inputs.py --target checkpoints/demo/target --data judge_data.jsonl \\
        --draft checkpoints/demo/draft --task demo --problems checkpoints/demo/problems.jsonl

The target reads the answers once, for all heads. Each seed splits the prompts anew: one part trains
the heads, one chooses class weight, weight decay and epoch as train_judge.py does and finds the
thresholds, and the AUC is that of a third part that nothing was chosen on. A head with a hidden
layer takes the class weight of the best linear head at its place: that is not chosen for it.
Intervals are 95%
bootstrap intervals over whole prompts; those of a difference to the first row, the head that
ships, draw the same prompts for both. With --task the engine runs every head on the problems,
greedily, at the thresholds that let through --shares of the errors of the choosing part.
"""
import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import refuse, run, say
from drafters.choice import CHAIN, make_drafter
from drafters.eagle_head import is_eagle
from engine import Engine, generate
from evaluation.report import table
from evaluation.tasks import TASKS
from judge import JudgeHead, above_threshold
from judge_data import report
from judge_data.data import encode, read_data, split
from judge_data.features import hidden_states
from judge_data.fitting import calibrate, fit, grid
from load import add_device_flags, load_models, resolve_device
from tokenizer import cut_at_stop, stop_check

TEST, VAL = 0.25, 0.15  # shares of the prompts
RATE, EPOCHS, PATIENCE = 2e-3, 40, 5  # of a head with a hidden layer
AFTER, BEFORE = "after the norm", "before the norm"


# ---------------------------------------------------------------- what a head reads

class States:
    """The target's states at each place of `names`, of its latest pass: `latest[name]` [B, S, D].

    It stands for the target where answers are read: its `features` are those of all places.
    """

    def __init__(self, target, earlier: list[int]):
        self.target, self.latest, layers = target, {}, target.layers
        refuse((earlier and not 1 <= min(earlier) <= max(earlier) <= len(layers),
                f"--earlier {','.join(map(str, earlier))}: the target has {len(layers)} layers"))

        def keep(name):
            return lambda _, args, *out: self.latest.__setitem__(name, (out or args)[0])

        target.norm.register_forward_hook(keep(AFTER))
        target.norm.register_forward_pre_hook(keep(BEFORE))
        for n in earlier:
            layers[len(layers) - n].register_forward_pre_hook(keep(earlier_name(n)))
        self.names = [AFTER, BEFORE, *map(earlier_name, earlier)]
        self.norm, self.new_cache = target.norm, target.new_cache
        self.config = argparse.Namespace(dim=target.config.dim * len(self.names))

    def features(self, *args) -> Tensor:
        self.target.features(*args)
        return torch.cat([self.latest[name] for name in self.names], -1)


def earlier_name(n: int) -> str:
    return f"{n} layer{'s' * (n > 1)} earlier"


class PlacedHead(nn.Module):
    """A head for the engine that reads the states of a place. Not compiled: the states are what
    the pass before it left.
    """

    def __init__(self, states: States, place: str, score: Callable):
        super().__init__()
        self.states, self.place, self.score = states, place, score

    def forward(self, hidden: Tensor) -> Tensor:
        return self.score(self.states.latest[self.place][0, -len(hidden):].float())


# ---------------------------------------------------------------- heads with a hidden layer

class Mlp(NamedTuple):
    """n heads side by side: w1 [n, D, H], b1 [n, 1, H], w2 [n, H, 1], b2 [n, 1, 1]; an input is
    standardised by mean and std [D] first.
    """
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, D] -> log-odds [n, N]."""
        return (F.gelu(x @ self.w1 + self.b1) @ self.w2 + self.b2)[..., 0]


def fit_mlp(x, y, x_val, y_val, settings: list[tuple[float, float]], width: int, seed: int):
    """(AUC on the validation tokens, scoring function) of the best of the settings, each at its
    best epoch; the loss, the class weights and the decay of a step are judge_data.fitting.fit's.
    """
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, x_val, n = (x - mean) / std, (x_val - mean) / std, len(settings)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=generator) / shape[-2] ** 0.5
    mlp = Mlp(draw(n, x.shape[1], width), torch.zeros(n, 1, width), draw(n, width, 1),
              torch.zeros(n, 1, 1))
    optimizer = torch.optim.Adam([p.requires_grad_() for p in mlp], lr=RATE)
    negative, decay = torch.tensor(settings).T[:, :, None]
    best, at = [(-1.0, None)] * n, 0
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(x), generator=generator).split(1024):
            optimizer.zero_grad()
            labels = y[batch].float().expand(n, -1)
            cost = torch.where(labels == 0, negative, 1.0)
            loss = F.binary_cross_entropy_with_logits(mlp(x[batch]), labels, cost, reduction="none")
            (loss.sum(1) / cost.sum(1)).sum().backward()
            with torch.no_grad():
                for w in (mlp.w1, mlp.w2):
                    w.mul_(1 - 0.01 * decay[..., None])  # as fit's at its rate of 0.01
            optimizer.step()
        with torch.no_grad():
            for i, scores in enumerate(mlp(x_val)):
                if (auc := report.auc(scores, y_val)) > best[i][0]:
                    best[i], at = (auc, Mlp(*(p[i:i + 1].clone() for p in mlp))), epoch
        if epoch - at == PATIENCE:
            break
    auc, chosen = max(best, key=lambda b: b[0])
    return auc, lambda hidden: chosen((hidden - mean) / std)[0]


# ---------------------------------------------------------------- one seed

class Trained(NamedTuple):
    """A head of one seed: its log-odds of the test tokens, and its thresholds for --shares."""
    score: Callable
    scores: Tensor
    thresholds: list[float]


class Seed(NamedTuple):
    """What one split of the prompts gave. prompt, y: of the test tokens."""
    heads: dict[tuple[str, str], Trained]  # by (place, kind)
    prompt: Tensor
    y: Tensor


def train(seed: int, examples, encoded, hidden: Tensor, names: list[str], args) -> Seed:
    """All heads on one split. hidden: [N, places * D]."""
    prompts = {p: i for i, p in enumerate(dict.fromkeys(e["prompt"] for e in examples))}
    token = lambda per_answer: torch.tensor([v for v, e in zip(per_answer, encoded)
                                             for _ in e.labels])
    test = split(examples, TEST, seed)
    rest = [e for e, t in zip(examples, test) if not t]
    held = iter(split(rest, VAL / (1 - TEST), seed))
    part = token([2 if t else int(next(held)) for t in test])  # 0 trains, 1 chooses, 2 tests
    y = torch.tensor([label for e in encoded for label in e.labels])
    labels = [y[part == i] for i in range(3)]
    refuse(*((len(set(part_y.tolist())) < 2, f"{args.data}: seed {seed} leaves a part of its "
              "prompts without an error or without a correct token; give more answers")
             for part_y in labels))
    heads = {}
    for place, x in zip(names, hidden.chunk(len(names), -1)):
        x = [x[part == i] for i in range(3)]
        settings = grid(labels[0], None, None)
        found = max(fit(x[0], labels[0], x[1], labels[1], settings, 1e-2, 100, seed),
                    key=lambda f: f.auc)
        scoring = {"linear": JudgeHead(found.weight, found.bias, 0.5, "")}
        if args.width:  # with the class weight of the best linear head: a ninth of the cost, thrice
            settings = [s for s in settings if s[0] == found.negative_weight]
            scoring[f"{args.width} hidden units"] = fit_mlp(
                x[0], labels[0], x[1], labels[1], settings, args.width, seed)[1]
        for kind, score in scoring.items():
            with torch.no_grad():
                thresholds = [calibrate(score(x[1]), labels[1], share) for share in args.shares]
                heads[place, kind] = Trained(score, score(x[2]), thresholds)
            say(f"seed {seed}, {place}, {kind}: AUC "
                f"{report.auc(heads[place, kind].scores, labels[2]):.4f}")
    return Seed(heads, token([prompts[e["prompt"]] for e in examples])[part == 2], labels[2])


# ---------------------------------------------------------------- intervals

def draws(units: int, samples: int):
    """How often each unit is drawn, float64 [units], in each bootstrap sample; first: once each."""
    generator = torch.Generator().manual_seed(0)
    yield torch.ones(units, dtype=torch.float64)
    for _ in range(samples):
        drawn = torch.randint(units, (units,), generator=generator)
        yield torch.bincount(drawn, minlength=units).double()


def interval(values: Tensor) -> tuple[float, float, float]:
    """(value, low, high) of [1 + samples], the value of the data itself first."""
    low, high = values[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(values[0]), low, high


def auc_draws(seeds: list[Seed], prompts: int, samples: int) -> dict:
    """(place, kind) -> AUC [1 + samples], the mean of the seeds; the same prompts are drawn for
    all heads.
    """
    ranks = [{key: report.ranks(h.scores) for key, h in s.heads.items()} for s in seeds]
    rows = [[sum(report.auc_and_ap(r[key], s.y, counts[s.prompt])[0]
                 for s, r in zip(seeds, ranks)) / len(seeds) for key in seeds[0].heads]
            for counts in draws(prompts, samples)]
    return dict(zip(seeds[0].heads, torch.tensor(rows, dtype=torch.float64).T))


def run_draws(runs: list[list[tuple]], samples: int) -> tuple[Tensor, Tensor]:
    """Accepted per round and share right, both [1 + samples], of runs over the same problems (a
    list a seed of (accepted, rounds, right)), drawn by problem.
    """
    accepted, rounds, right = torch.tensor(runs, dtype=torch.float64).unbind(-1)  # [seeds, N]
    rows = [((c * accepted).sum() / (c * rounds).sum(), (c * right).sum() / (len(runs) * c.sum()))
            for c in draws(accepted.shape[1], samples)]
    return tuple(torch.tensor(rows, dtype=torch.float64).T)


# ---------------------------------------------------------------- the engine

def play(engine: Engine, tokenizer, problems: list, task, args) -> list[tuple]:
    """(tokens accepted, rounds, right) of each problem."""
    rows, stops = [], () if args.chat else task.stop
    for example, prompt in problems:
        r = generate(engine, prompt, args.max_new_tokens or task.max_new_tokens,
                     tokenizer.eos_ids, stop=stop_check(tokenizer, prompt, stops))
        new = [t for t in r.tokens if t not in tokenizer.eos_ids]
        text = cut_at_stop(tokenizer.decode_new(prompt, new), stops)
        rows.append((r.mean_accepted * r.rounds, r.rounds, bool(task.score(example, text).right)))
    return rows


def play_all(states: States, models, seeds: list[Seed], args) -> dict:
    """(place, kind, index of the share) -> runs, a list a seed; "target" and "standard" too."""
    task, tokenizer = TASKS[args.task](), models.tokenizer
    problems = [(e, tokenizer.prompt(task.chat(e) if args.chat else task.prompt(e), args.chat))
                for e in task.load(args.problems, args.limit)]
    drafter = make_drafter("eagle" if models.eagle else "llama", models.target, models.draft,
                           models.eagle)
    one = lambda *rule, using=drafter: play(
        Engine(models.target, using, *rule, speculate_k=args.speculate_k), tokenizer, problems,
        task, args)
    runs = {"target": [one(using=None)], "standard": [one()]}
    for (place, kind), i in tqdm([*product(seeds[0].heads, range(len(args.shares)))], disable=None):
        trained = [s.heads[place, kind] for s in seeds]
        runs[place, kind, i] = [one(PlacedHead(states, place, t.score), "judge", t.thresholds[i])
                                for t in trained]
    return runs


# ---------------------------------------------------------------- the tables

def auc_rows(seeds: list[Seed], areas: dict) -> list[list[str]]:
    """The first table, of the test tokens."""
    default = next(iter(areas.values()))
    rows = [["reads", "head", "AUC", "95% interval", "difference", "95% interval", "of the seeds"]]
    for (place, kind), values in areas.items():
        value, low, high = interval(values)
        more = interval(values - default)
        each = [report.auc(s.heads[place, kind].scores, s.y) for s in seeds]
        rows.append([place, kind, f"{value:.4f}", f"{low:.4f} to {high:.4f}", f"{more[0]:+.4f}",
                     f"{more[1]:+.4f} to {more[2]:+.4f}", " ".join(f"{a:.4f}" for a in each)])
    return rows


def run_rows(seeds: list[Seed], runs: dict, args) -> list[list[str]]:
    """The second table: the engine's runs, and what the same thresholds do on the test tokens."""
    rows = [["errors let through", "reads", "head", "on test prompts", "correct rejected",
             "accepted per round", "difference", "right", "difference"]]
    for name in ("target", "standard"):
        accepted, right = run_draws(runs[name], 0)
        rows.append(["–", name, "–", "–", "–", "–" if name == "target" else f"{accepted[0]:.2f}",
                     "–", f"{right[0]:.1%}", "–"])
    for i, share in enumerate(args.shares):
        default = None
        for place, kind in seeds[0].heads:
            found = run_draws(runs[place, kind, i], args.samples)
            default = default or found
            rates = [report.rates(above_threshold(h.scores, h.thresholds[i]), s.y)
                     for s in seeds for h in [s.heads[place, kind]]]
            passed, rejected = (sum(r) / len(rates) for r in zip(*rates))
            accepted, right = (interval(f - d) for f, d in zip(found, default))
            rows.append([f"{share:.0%}", place, kind, f"{passed:.1%}", f"{rejected:.1%}",
                         f"{found[0][0]:.2f}",
                         f"{accepted[0]:+.2f} ({accepted[1]:+.2f} to {accepted[2]:+.2f})",
                         f"{found[1][0]:.1%}",
                         f"{right[0]:+.1%} ({right[1]:+.1%} to {right[2]:+.1%})"])
    return rows


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True, help="judge data, JSON Lines")
    p.add_argument("--draft", type=Path, help="a checkpoint or an EAGLE head; requires --task")
    p.add_argument("--task", choices=[name for name, task in TASKS.items() if task.graded
                                      and name != "humaneval"], help="run the heads on this task")
    p.add_argument("--problems", type=Path, help="its file")
    p.add_argument("--limit", type=int, default=40, help="problems of each domain (default 40)")
    p.add_argument("--max_new_tokens", type=int, help="default: the task's")
    p.add_argument("--speculate_k", type=int, default=CHAIN,
                   help=f"drafted tokens per round (default {CHAIN})")
    p.add_argument("--chat", action="store_true", help="prompts in the chat template")
    p.add_argument("--earlier", type=lambda t: [int(n) for n in t.split(",")], default=[1, 2, 4],
                   help="how many layers before the last one's output to read (default 1,2,4)")
    p.add_argument("--width", type=int, default=256,
                   help="hidden units (default 256); 0: linear heads only")
    p.add_argument("--shares", type=lambda t: [float(s) for s in t.split(",")],
                   default=[0.01, 0.05], help="errors let through (default 0.01,0.05)")
    p.add_argument("--seeds", type=int, default=3, help="splits of the prompts (default 3)")
    p.add_argument("--samples", type=int, default=1000, help="of the bootstrap (default 1000)")
    add_device_flags(p)
    args = p.parse_args(argv)
    refuse((bool(args.task) != bool(args.draft) or bool(args.task) != bool(args.problems),
            "--task, --problems and --draft belong together"),
           (args.seeds < 1, f"--seeds is {args.seeds}; it must be at least 1"),
           (args.samples < 2, f"--samples is {args.samples}; it must be at least 2"),
           (not all(0 <= s <= 1 for s in args.shares), "--shares must be from 0 to 1"))
    resolve_device(args)
    return args


def main():
    args = parse_args()
    if args.task:
        TASKS[args.task]().check()
    eagle = args.draft if args.draft and is_eagle(args.draft) else None
    models = load_models(args.target, None if eagle else args.draft, device=args.device,
                         dtype=args.dtype, speculate_k=args.speculate_k if args.draft else 0,
                         eagle=eagle)
    examples = read_data(args.data)
    encoded = encode(models.tokenizer, examples, models.target.config.max_seq_len, args.chat)
    states = States(models.target, args.earlier)
    hidden = hidden_states(states, encoded)
    seeds = [train(i, examples, encoded, hidden, states.names, args) for i in range(args.seeds)]
    prompts = len({e["prompt"] for e in examples})
    say(f"\n{len(examples):,} answers to {prompts:,} prompts, {len(hidden):,} tokens, "
        f"{sum(e.labels.count(0) for e in encoded):,} of them errors\n")
    say(table(auc_rows(seeds, auc_draws(seeds, prompts, args.samples))))
    if args.task:
        with torch.inference_mode():
            runs = play_all(states, models, seeds, args)
        say("\n" + table(run_rows(seeds, runs, args)))


if __name__ == "__main__":
    run(main)
