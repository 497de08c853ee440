"""The speed story in one command: what a pass costs, and what speculation makes of it.

No download needed.

    python benchmark.py --target llama-3.1-70b --draft llama-3.1-8b --target_quant int8 --plot speed.png
    python benchmark.py --target checkpoints/demo/target --draft checkpoints/demo/draft --judge checkpoints/demo/judge.safetensors \\
        --prompts checkpoints/demo/problems.jsonl --peer hf

A preset or a config.json gets dummy weights of its real shapes, whose speed is real and whose text
is noise: how many drafted tokens a round accepts is then forced, and everything that rests on it is
labelled 'simulated acceptance'. Real checkpoints with --prompts are also compared with real
acceptance, interleaved, with Hugging Face's generate beside ours. Batch size 1 and greedy; nothing
here says how good the text is.
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from benchmark_report import SIMULATED, plot, report
from cli import UserError, check_writable, replacing, run
from generate import Engine, generate, power_of_two
from judge import Judge
from linear import prepare
from model import DTYPES, ModelConfig, Transformer, fingerprint, load, read_json
from tokenizer import Tokenizer

PROMPT = 64  # tokens of the random prompt where acceptance is simulated
ROWS = (1, 2, 4, 8, 16, 32, 64)  # positions of a verification pass
LOOPS = 4  # calls that are timed together
PAIRS = 10  # times as many repeats for the judge's cost, which is small beside a pass
MOST_ROUNDS = 24  # of a simulated run: a round costs the same whatever it accepts


def llama3(dim, n_layer, n_head, ffn_dim, factor=8.0, tied=False):
    """config.json of a Llama 3.1 or 3.2, Hugging Face's keys."""
    return dict(architectures=["LlamaForCausalLM"], vocab_size=128256, hidden_size=dim,
                num_hidden_layers=n_layer, num_attention_heads=n_head,
                num_key_value_heads=8, intermediate_size=ffn_dim, max_position_embeddings=131072,
                rms_norm_eps=1e-5, rope_theta=500000.0,
                rope_scaling=dict(rope_type="llama3", factor=factor, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=8192),
                tie_word_embeddings=tied)


PRESETS = {
    "llama-3.2-1b": llama3(2048, 16, 32, 8192, factor=32.0, tied=True),
    "llama-3.1-8b": llama3(4096, 32, 32, 14336),
    "llama-3.1-70b": llama3(8192, 80, 64, 28672),
    "llama-3.1-405b": llama3(16384, 126, 128, 53248),
}


# ---------------------------------------------------------------- models

@dataclass
class Source:
    """Where a model comes from: its config.json and, unless its weights are to be dummies, its
    checkpoint directory.
    """
    name: str
    config: dict
    directory: Path | None


def find(name: str, quant: str | None, flag: str) -> Source:
    """The model that `--target NAME` or `--draft NAME` means; raises UserError for one that is
    neither preset, file nor directory.
    """
    path = Path(name)
    if path.is_dir() and quant:
        raise UserError(f"--{flag}_quant is for dummy weights; quantize {name} with quantize.py "
                        "and give the directory that it writes")
    if path.is_dir():
        return Source(name, read_json(path / "config.json"), path)
    if name not in PRESETS and not path.is_file():
        raise UserError(f"--{flag} {name} is no preset ({', '.join(PRESETS)}), no checkpoint "
                        "directory and no config.json")
    config = dict(PRESETS[name] if name in PRESETS else read_json(path))
    if quant:
        config["quantization"] = {"mode": quant, "group_size": 128 if quant == "int4" else None}
    return Source(name, config, None)


@contextlib.contextmanager
def made_on(device, dtype):
    """Modules made inside have their tensors on `device`, and in `dtype` where they do not choose
    one themselves.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def size(*many: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in many)


def skeleton(source: Source, dtype) -> Transformer:
    """The model without memory for its weights, to count with: quantized layers may be packed in
    other ways once they have some.
    """
    with made_on("meta", dtype):
        return Transformer(ModelConfig.from_dict(source.config, source.name))


def describe(source: Source, dtype) -> dict:
    """What the model is and the bytes it takes, and reads in a pass: all weights but an embedding
    of its own, of which that is one row a token.
    """
    model, plain = skeleton(source,
                            dtype), skeleton(Source(source.name, source.config
                                                    | {"quantization": None}, None), dtype)
    weights = size(*model.parameters(), *model.buffers())
    return {"name": source.name, "weights": "real" if source.directory else "dummy",
            "quant": (source.config.get("quantization") or {}).get("mode"),
            "dtype": str(dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in plain.parameters()), "bytes": weights,
            "bytes_read": weights - (0 if model.config.tied else size(model.embed.weight))}


def build(source: Source, device, dtype) -> Transformer:
    """The model on `device`: its checkpoint, or random weights made there.

    The one place where models come from.
    """
    if source.directory:
        return load(source.directory, device, dtype)
    with made_on(device, dtype):
        model = Transformer(ModelConfig.from_dict(source.config, source.name))
    # quantized weights; zeros would not do: they take less power, so that a GPU clocks higher
    for name, t in model.named_buffers():
        if t.element_size() == 1:
            t.view(torch.uint8).random_(0, 127)  # as fp8, 127 is not a number
        else:
            t.fill_(0 if name.endswith("zero") else 1e-4)
    prepare(model, dtype)
    return model.requires_grad_(False).eval()


def free_memory(device: str) -> int:
    """Bytes that can still be allocated."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines
                    if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: all memory is the best that is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(models: dict[str, dict], cache: int, device: str):
    """Refuse what will not fit before anything is allocated; `models` as `describe` gives them,
    `cache` in bytes.
    """
    need, free = sum(m["bytes"] for m in models.values()) + cache, free_memory(device)
    if need > free:
        parts = ", ".join(f"{flag} {m['bytes'] / 1e9:.1f} GB" for flag, m in models.items())
        raise UserError(f"this does not fit: {parts} and caches {cache / 1e9:.1f} GB need at "
                        f"least {need / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free; "
                        "take smaller models, --target_quant, --draft_quant or --dtype bfloat16")


# ---------------------------------------------------------------- timing

def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleaved(cases: dict, repeats: int, device) -> dict[str, list[float]]:
    """Seconds a call of each case, [repeats] each; the cases take turns, so that a slow moment of
    the machine hits all of them.
    """
    seconds = {name: [] for name in cases}
    for i in range(repeats + 1):
        for name, call in cases.items():
            sync(device)
            start = time.perf_counter()
            for _ in range(LOOPS):
                call()
            sync(device)
            if i:  # the first turn is the warm-up
                seconds[name].append((time.perf_counter() - start) / LOOPS)
    return seconds


def bandwidth(device, repeats: int) -> float:
    """Bytes a second that a sum over an array far larger than the caches reads."""
    data = torch.ones((1 << 31 if device == "cuda" else 1 << 28) // 4, device=device)
    return size(data) / median(interleaved({"sum": data.sum}, repeats, device)["sum"])


class Shared(Engine):
    """An engine on caches that others use too: each overwrites them, so that what they hold is
    never relied on.
    """

    def __init__(self, caches: dict, target, draft=None, head=None, speculate_k=0):
        super().__init__(target, draft, head, "judge" if head else "standard",
                         speculate_k=speculate_k)
        self.caches, self.capacity = caches, len(caches[target].rope)

    def reserve(self, length):
        # to grow would leave the others on the old caches
        assert length + self.speculate_k <= self.capacity, (length, self.capacity)

    def compile(self):
        super().compile()
        # passes of many sizes share the code of one function
        torch._dynamo.config.recompile_limit = 512


class Verify(Shared):
    """The target's half of a round, on fixed drafted tokens, again and again; with nothing drafted
    it is a decode step.
    """

    def device_round(self, span):
        k = self.speculate_k
        cache = self.caches[self.target].first(span)
        return self.verify_and_accept(self.target, self.head, self.state,
                                      torch.arange(k, device=self.device), None, cache,
                                      self.settings, None, None)


class Draft(Shared):
    """The draft's half of a round."""

    def device_round(self, span):
        return self.draft_tokens(self.draft_step, self.draft, self.state, self.speculate_k,
                                 self.caches[self.draft].first(span), self.settings, None)[0]


class Simulated(Shared):
    """Whole rounds, judge included, that accept as many drafted tokens as they are told to:
    'simulated acceptance'.

    A round computes everything that a real one does; then its count is replaced by the next of
    `counts`, on the device.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.counts = torch.zeros(self.capacity, dtype=torch.long, device=self.device)
        self.next = torch.zeros(1, dtype=torch.long, device=self.device)

    def force(self, counts: list[int]):
        """The coming rounds accept these many drafted tokens."""
        self.counts[:len(counts)] = torch.tensor(counts)
        self.next.zero_()

    def device_round(self, span):
        last = self.state[1:2].clone()
        out = super().device_round(span)
        a = self.counts.index_select(0, self.next)
        more, own, tokens = a - out[:1], out[1:2], torch.cat((last, out[2:2 + self.speculate_k]))
        out = torch.cat((a, out[1:-4], tokens.index_select(0, a), own, out[-2:-1] + more,
                         out[-1:] - more))
        self.state.copy_(out[-4:])
        self.next += 1
        return out


# ---------------------------------------------------------------- simulated acceptance

def mean_run(rate: float, k: int) -> float:
    """Drafted tokens accepted a round, of k, when each is accepted with probability `rate` and the
    first refusal ends the run.
    """
    return sum(rate ** i for i in range(1, k + 1))


def rate_for(accepted: float, k: int) -> float:
    """The inverse of `mean_run`: the rate at which `accepted` of k drafted tokens are accepted in
    the mean.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_run(middle, k) < accepted else (low, middle)
    return high


def draw_runs(rate: float, k: int, rounds: int, seed=0) -> list[int]:
    """Accepted counts of `rounds` rounds, [rounds]: the quantiles of the runs' distribution in
    random order, so that few rounds keep its mean.
    """
    runs = [sum((i + 0.5) / rounds < rate ** j for j in range(1, k + 1)) for i in range(rounds)]
    random.Random(seed).shuffle(runs)
    return runs


@torch.inference_mode()
def play(engine: Shared, prompt: list[int], counts: list[int]) -> float:
    """Seconds that the rounds with these accepted counts take; prefill excluded."""
    engine.tokens = []  # nothing in the shared caches is this engine's
    engine.prefill(prompt, 1 + sum(counts) + len(counts))
    if isinstance(engine, Simulated):
        engine.force(counts)
    sync(engine.device)
    start = time.perf_counter()
    made = [engine.round()[0] for _ in counts]
    seconds = time.perf_counter() - start
    assert made == counts, (made, counts)
    return seconds


# ---------------------------------------------------------------- what is measured

@torch.inference_mode()
def measure_passes(args, models: dict, target: Transformer, draft: Transformer, head: Judge,
                   caches: dict, read: float) -> dict:
    """Times of single passes in the middle of the text, in milliseconds, and the share of the read
    bandwidth that they reach.
    """
    context = PROMPT + args.max_new_tokens // 2
    engines, most = {("decode", "draft"): Verify(caches, draft)}, max(args.speculate_k)
    for rows in sorted({*ROWS, most + 1}):
        engines["verify", rows] = Verify(caches, target, draft if rows > 1 else None, None,
                                         rows - 1)
    engines["judge", most + 1] = Verify(caches, target, draft, head, most)
    for k in args.speculate_k:
        engines["draft", k] = Draft(caches, target, draft, head, k)
    span = engines["judge", most + 1].span(context + max(ROWS))
    for key, engine in engines.items():
        if args.compile:
            engine.compile()
            print(f"compiling {key[0]} {key[1]}", file=sys.stderr)
        engine.state.copy_(torch.tensor([0, 0, context, 0]))  # which these rounds leave as it is
        engine.launch(span)
    calls = {key: lambda e=e: e.launch(span) for key, e in engines.items()}
    # By themselves: among the others each would follow another pass, and the demo's judge seemed to
    # cost 2% where it costs 0.5% at most.
    pair = interleaved({"verify": calls["verify", most + 1],
                        "judge": calls.pop(("judge", most + 1))}, PAIRS * args.repeats, args.device)
    ms = {key: 1e3 * median(s) for key, s in interleaved(calls, args.repeats, args.device).items()}

    def entry(key, model, **more):
        read_bytes = models["target" if model is target else "draft"]["bytes_read"] + size(
            *caches[model].first(span).kv)
        return {**more, "ms": ms[key], "bytes": read_bytes, "fraction_of_bandwidth": read_bytes
                / (ms[key] / 1e3) / read}

    return {
        "context": context, "span": span,
        "decode": {"target": entry(("verify", 1), target),
                   "draft": entry(("decode", "draft"), draft)},
        "verify": [entry(key, target, rows=key[1]) for key in engines if key[0] == "verify"],
        "judge": {"rows": most + 1, "ms_without": 1e3 * median(pair["verify"]),
                  "ms_with": 1e3 * median(pair["judge"]),
                  "ms_cost": 1e3 * median(b - a for a, b in zip(pair["verify"], pair["judge"]))},
        "draft": [{"speculate_k": k, "ms_per_token": ms["draft", k] / k} for k in args.speculate_k],
    }


def measure_simulated(args, target: Transformer, draft: Transformer, head: Judge,
                      caches: dict) -> dict:
    """Tokens/s of whole rounds for every K and every rate of acceptance, and of the target alone,
    in turns.
    """
    prompt = torch.randint(target.config.vocab_size, (PROMPT,),
                           generator=torch.Generator().manual_seed(0)).tolist()
    alone = Shared(caches, target)
    engines = {k: Simulated(caches, target, draft, head, speculate_k=k) for k in args.speculate_k}
    points, runs = [], {"target": (alone, [0] * args.max_new_tokens)}
    for accepted in args.accepted:
        rate = rate_for(accepted, max(args.speculate_k))
        for k, engine in engines.items():
            counts = draw_runs(rate, k,
                               min(MOST_ROUNDS,
                                   max(1, round(args.max_new_tokens / (mean_run(rate, k) + 1)))))
            runs[len(points)] = engine, counts
            points.append({"accepted_at_most_k": accepted, "rate": rate, "speculate_k": k,
                           "mean_accepted": mean(counts),
                           "rounds": len(counts), "tokens": sum(counts) + len(counts)})
    for engine in [alone, *engines.values()] if args.compile else ():
        print(f"compiling rounds of K = {engine.speculate_k}", file=sys.stderr)
        engine.compile()
        engine.warm_up(PROMPT, PROMPT + args.max_new_tokens + engine.speculate_k)
    # the first is the warm-up
    turns = [{name: play(engine, prompt, counts) for name, (engine, counts) in runs.items()}
             for _ in range(args.repeats + 1)][1:]
    seconds = {name: median(turn[name] for turn in turns) for name in runs}
    base = args.max_new_tokens / seconds["target"]
    for i, p in enumerate(points):
        p |= {"round_ms": 1e3 * seconds[i] / p["rounds"], "tokens_per_sec": p["tokens"]
              / seconds[i], "speed_up": p["tokens"] / seconds[i] / base}
    best = [max((p for p in points if p["accepted_at_most_k"] == a),
                key=lambda p: p["tokens_per_sec"]) for a in args.accepted]
    return {"label": SIMULATED, "target_tokens_per_sec": base, "points": points, "best": best}


def measure_real(args, target: Transformer, draft: Transformer, head: Judge | None,
                 prompts: list[list[int]], eos_ids) -> dict:
    """Real prompts with real acceptance, one prompt a repeat, all variants on it in turns, each to
    its end token.

    Prefill is included, as Hugging Face's time has it too.
    """
    engines = {"target": Engine(target)}
    for k in args.speculate_k:
        engines[f"standard K={k}"] = Engine(target, draft, speculate_k=k)
        if head:
            engines[f"judge K={k}"] = Engine(target, draft, head, "judge", speculate_k=k)
    for name, engine in engines.items() if args.compile else ():
        print(f"compiling {name}", file=sys.stderr)
        engine.compile()
        engine.warm_up(min(map(len, prompts)), max(map(len, prompts)) + args.max_new_tokens)

    def ours(engine, prompt):
        engine.tokens = []  # no prefix is kept: each prompt is read in full
        r = generate(engine, prompt, args.max_new_tokens, eos_ids)
        return r.tokens, r.mean_accepted, r.tokens_per_sec

    calls = {name: lambda prompt, e=e: ours(e, prompt) for name, e in engines.items()}
    if args.peer:
        import hf_peer  # not needed without
        calls |= hf_peer.calls(target, draft, [args.target.config, args.draft.config],
                               args.speculate_k, args.max_new_tokens, eos_ids)
    rows = {name: [] for name in calls}
    for i, prompt in enumerate([prompts[0], *prompts]):
        for name, call in calls.items():
            sync(args.device)
            start = time.perf_counter()
            tokens, accepted, of_rounds = call(prompt)
            sync(args.device)
            if i:  # the first turn is the warm-up
                rows[name].append((len(tokens) / (time.perf_counter() - start), accepted, tokens,
                                   of_rounds))
    base = rows["target"]
    return {"label": "real acceptance", "prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens, "variants": [{
        "variant": name, "tokens_per_sec": median(r[0] for r in row),
        "speed_up": median(r[0] / b[0] for r, b in zip(row, base)),
        "mean_accepted": mean(r[1] for r in row) if "K=" in name and row[0][1] is not None
        else None,
        "tokens_per_sec_of_rounds": None if row[0][3] is None else median(r[3] for r in row),
        "same_tokens_as_target": sum(r[2] == b[2] for r, b in zip(row, base)),
        "tokens": [r[2] for r in row]} for name, row in rows.items()]}


# ---------------------------------------------------------------- command line

def numbers(kind, flag):
    """A parser of a comma-separated list."""
    def parse(text):
        try:
            return sorted({kind(x) for x in text.split(",")})
        except ValueError:
            raise UserError(
                f"--{flag} {text}: give numbers with commas between, like 4,8,16") from None
    return parse


def parse_args(argv=None):
    p = argparse.ArgumentParser(description="Measure decoding, verification and judge decoding.")
    p.add_argument("--target", required=True, help=f"{', '.join(PRESETS)} or a config.json (dummy "
                   "weights), or a checkpoint directory")
    p.add_argument("--draft", required=True, help="the same")
    p.add_argument("--target_quant", choices=("int8", "int4", "fp8"), help="quantize the dummy "
                   "weights")
    p.add_argument("--draft_quant", choices=("int8", "int4", "fp8"))
    p.add_argument("--judge", type=Path, help="judge file, for --prompts")
    p.add_argument("--prompts", type=Path, help='JSON Lines with a "prompt" each: compare real '
                   'checkpoints with real acceptance')
    p.add_argument("--peer", choices=("hf",), help="compare with Hugging Face's generate too")
    p.add_argument("--speculate_k", type=numbers(int, "speculate_k"), default=[4, 8, 16, 32],
                   help="list of K (default 4,8,16,32)")
    p.add_argument("--accepted", type=numbers(float, "accepted"), help="list of rates to "
                   "simulate, each as the tokens accepted per round at the largest K")
    p.add_argument("--max_new_tokens", type=int, default=128)
    p.add_argument("--repeats", type=int, default=5, help="of each timing; with --prompts as many "
                   "prompts, evenly spaced in the file")
    # On by default: eager, small models are timed by how fast the host can start their kernels.
    p.add_argument("--compile", action="store_true", default=True, help="torch.compile, and CUDA "
                   "graphs on a GPU (default)")
    p.add_argument("--no_compile", dest="compile", action="store_false", help="eager: no wait for "
                   "the compiler, slower passes")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    p.add_argument("--draft_dtype", choices=DTYPES, help="default: --dtype; a tiny draft on a CPU "
                   "is faster in float32")
    p.add_argument("--json", type=Path, help="write the result here")
    p.add_argument("--plot", type=Path, help="draw tokens/s against the accepted length here (PNG)")
    args = p.parse_args(argv)
    args.dtype = DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]
    args.draft_dtype = DTYPES[args.draft_dtype] if args.draft_dtype else args.dtype
    most = max(args.speculate_k)
    if args.accepted is None:
        args.accepted = [a for a in (2.0, 4.0, 6.3, 10.0, 15.0, 19.7, 25.0) if a < most]
    args.target, args.draft = find(args.target, args.target_quant,
                                   "target"), find(args.draft, args.draft_quant, "draft")
    check_args(args, most)
    return args


def check_args(args, most: int):
    """Everything that can be refused before a weight is made."""
    real = args.target.directory and args.draft.directory
    for bad, message in (
            (args.speculate_k[0] < 1, f"--speculate_k {args.speculate_k[0]}: it must be at least "
             "1"),
            (not 0 < args.accepted[0] <= args.accepted[-1] <= most, "--accepted must be above 0 "
             f"and at most the largest K, {most}"),
            (args.max_new_tokens < 2, f"--max_new_tokens is {args.max_new_tokens}; it must be at "
             "least 2"),
            (args.repeats < 1, f"--repeats is {args.repeats}; it must be at least 1"),
            (args.prompts and not real, "--prompts needs checkpoint directories: with dummy "
             "weights acceptance can only be simulated"),
            (args.peer and not real, "--peer hf needs real checkpoints; give checkpoint "
             "directories as --target and --draft"),
            (args.peer and not args.prompts, "--peer hf needs --prompts FILE.jsonl"),
            (args.judge and not args.prompts, "--judge is used with --prompts; elsewhere a "
             "judge's weights do not matter"),
            (args.peer and importlib.util.find_spec("transformers") is None, "--peer hf needs "
             "transformers; pip install transformers"),
            (args.peer and any("quantization" in s.config for s in (args.target, args.draft)),
             "--peer hf needs checkpoints that are not quantized"),
            (args.plot and importlib.util.find_spec("matplotlib") is None, "--plot needs "
             "matplotlib; pip install matplotlib"),
            (args.device == "cpu" and "fp8" in (args.target_quant, args.draft_quant), "fp8 needs "
             "a GPU; take int8 or int4"),
            (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this "
             "PyTorch sees no CUDA device; use --device cpu"),
    ):
        if bad:
            raise UserError(message)
    for path in filter(None, (args.json, args.plot)):
        check_writable(path)


def read_prompts(args) -> tuple[list[list[int]], tuple]:
    """`repeats` prompts as token ids, evenly spaced in the file, over again if it holds fewer; and
    the end tokens.
    """
    tokenizer, texts = Tokenizer.from_dir(args.target.directory), []
    if not tokenizer.same_as(Tokenizer.from_dir(args.draft.directory)):
        raise UserError(f"draft {args.draft.name} and target {args.target.name} have different "
                        "tokenizers; speculation needs the same")
    try:
        for i, line in enumerate(args.prompts.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                texts.append(json.loads(line)["prompt"])
    except OSError as e:
        raise UserError(f"cannot read {args.prompts}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{args.prompts}, line {i}: no JSON object with a "prompt"') from None
    if not texts:
        raise UserError(f"{args.prompts} holds no prompts")
    chosen = [texts[i * len(texts) // args.repeats if args.repeats <= len(texts)
                    else i % len(texts)] for i in range(args.repeats)]
    return [tokenizer.encode(text) for text in chosen], tokenizer.eos_ids


def main(argv=None):
    args = parse_args(argv)
    sources = {"target": (args.target, args.dtype), "draft": (args.draft, args.draft_dtype)}
    models = {flag: describe(*source) for flag, source in sources.items()}
    skeletons = [skeleton(*source) for source in sources.values()]
    configs = [m.config for m in skeletons]
    if configs[0].vocab_size != configs[1].vocab_size:
        raise UserError(f"draft {args.draft.name} has a vocabulary of {configs[1].vocab_size} "
                        f"tokens, target {args.target.name} one of "
                        f"{configs[0].vocab_size}; speculation needs the same")
    prompts, eos_ids = read_prompts(args) if args.prompts else ([], ())
    # Forced rounds make max_new_tokens up to one round, and the last of them drafts K more.
    length = max([PROMPT + args.max_new_tokens + 2 * max(args.speculate_k) + max(ROWS),
                  *(len(p) + args.max_new_tokens for p in prompts)])
    context = min(c.max_seq_len for c in configs)
    if length > context:
        raise UserError(f"the models' context of {context} tokens is too short for {length}; "
                        "lower --max_new_tokens or --speculate_k")
    capacity = power_of_two(length)
    copies = 2 + (1 + bool(args.judge)) * len(args.speculate_k) if prompts else 1
    check_memory(models, (copies + bool(args.peer))
                 * sum(size(*m.new_cache(capacity).kv) for m in skeletons), args.device)
    head = None
    if args.judge:
        head = Judge.load(args.judge, configs[0].dim, fingerprint(args.target.directory),
                          args.target.name)
    read = bandwidth(args.device, args.repeats)
    if args.device == "cuda":
        torch.cuda.empty_cache()  # the array's memory is for the models now
    target, draft = (build(source, args.device, dtype) for source, dtype in sources.values())
    # it costs what any judge costs
    dummy = Judge(torch.randn(1, target.config.dim) / math.sqrt(target.config.dim), torch.zeros(1),
                  0.5, "")
    caches = {m: m.new_cache(capacity) for m in (target, draft)}
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU, "
        f"{torch.get_num_threads()} threads", "torch": torch.__version__,
        "compile": args.compile, "repeats": args.repeats, "speculate_k": args.speculate_k,
        **models, "bandwidth_gb_per_sec": read / 1e9,
        "passes": measure_passes(args, models, target, draft, dummy, caches, read),
        "simulated": measure_simulated(args, target, draft, dummy, caches),
        "real": measure_real(args, target, draft, head, prompts, eos_ids) if prompts else None,
    }
    print(report(result))
    if args.json:
        with replacing(args.json) as tmp:
            tmp.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, args.plot)
    return result


if __name__ == "__main__":
    run(main)
