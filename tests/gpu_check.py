"""The check of a GPU: what RESULTS.md says of a card, and whether each kernel is right there.

    python tests/gpu_check.py smoke attention kernels --json FILE
    python tests/gpu_check.py passes round --json FILE
    python tests/gpu_check.py smoke attention kernels passes round --device cpu   # as a test does

smoke: the demo pair, logits against float32, recorded rounds against eager ones token for token.
attention, kernels: each way to attend and each kind of layer against float64, and its speed.
passes: single passes of Llama shapes on dummy weights, 70B's extrapolated from 2 and 6 layers.
round: whole rounds of 70B int8 with drafts of 8B, 19.7 of 25 tokens accepted (simulated).

One line a figure, by a name that stays. A check that fails is named and the others go on (exit code
1); what a card lacks, or what a part's 150 seconds leave no time for, is skipped and says so. FILE
is written anew after every check. --device cpu runs all of it on tiny shapes, eager: its times mean
nothing.
"""
import contextlib
import copy
import gc
import importlib
import io
import math
import sys
import tempfile
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import quantize  # noqa: E402
from checkpoint import load  # noqa: E402
from common import (  # noqa: E402
    Parser,
    UserError,
    check_writable,
    json_lines,
    refuse,
    run,
    write_json,
)
from drafters.choice import make_drafter, parse_tree  # noqa: E402
from drafters.length import BestK  # noqa: E402
from engine import Engine, generate, power_of_two  # noqa: E402
from evaluation.dummy import PRESETS, Source, build, describe  # noqa: E402
from evaluation.passes import attention_name, first_token, verification  # noqa: E402
from evaluation.simulated import draw_runs, play, rate_for, simulate  # noqa: E402
from evaluation.timing import bandwidth, compiled, engine_on, interleaved, recorded  # noqa: E402
from graphs import builder, warm_up  # noqa: E402
from judge import JudgeHead  # noqa: E402
from linear import MODES, Linear, Quantization  # noqa: E402
from load import load_eagle, load_judge  # noqa: E402
from ranks.memory import check_memory  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tp import size  # noqa: E402

DEMO = ROOT / "checkpoints" / "demo"
BF = torch.bfloat16
LIMIT = 150  # seconds after which a part begins no further check: the last ends before 180
# Relative errors (of all numbers together) up to which a product or attention in bfloat16 is right:
# rounding once gives 0.002. fp8 rounds the rows of x too.
ERROR = {"fp8": 0.06}
BFLOAT16_ERROR = 0.01
# ... and the demo's logits. On fp8 the reference is the model before quantization: rounding alone
# gives 0.07 to 0.15 there.
LOGITS = {"float32": 1e-3, "fp8": 0.25}
BFLOAT16_LOGITS = 0.1
EXACT = "standard", "eagle", "tree", "ngram", "auto"  # by drafter; the text is the target's
TREE = parse_tree("26:5")
CASES = {"float32": ("alone", *EXACT, "judge", "sampled"), "bf16": ("alone", "judge", "tree"),
         "int8": ("judge",), "int4": ("judge",), "fp8": ("judge",)}


class Sizes(NamedTuple):
    prompts: int  # smoke: prompts of the demo, new tokens for each, K
    tokens: int
    smoke_k: int
    head: tuple  # attention: KV heads, head_dim
    attention: tuple  # (query heads that share a KV head, rows, cache length, first row's position)
    shapes: tuple  # kernels: (inputs, outputs) of layers
    rows: tuple  # ... and their rows
    bytes: float  # weights or keys to go through before any is read again: more than caches hold
    shrink: dict  # what replaces a Llama's shape
    depths: tuple  # layers from which 70B is extrapolated
    prompt: int  # tokens
    k: int  # whole rounds: K, the mean accepted of it, how many
    accepted: float
    rounds: int


ON_GPU = Sizes(6, 80, 25, (8, 128), ((4, 1, 256, 216), (8, 26, 256, 216), (4, 1, 8192, 8150),
               (8, 26, 8192, 8150), (8, 26, 8192, 1000)), ((8192, 57344), (28672, 8192),
               (8192, 10240), (4096, 6144)), (1, 17, 26, 64), 2e8, {}, (2, 6), 1000, 25, 19.7, 7)
ON_CPU = Sizes(2, 24, 4, (2, 32), ((2, 1, 256, 200), (4, 5, 512, 100)), ((256, 384),), (1, 17), 0,
               dict(hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, intermediate_size=256, vocab_size=512), (1, 2), 70, 5,
               3.0, 3)


class Skipped(Exception):
    """What this card cannot do, and why."""


class Wrong(Exception):
    """A result that is not what it should be."""


class Check:
    """One run of the check, and its summary; `device` and `compile` are benchmark.py's flags."""

    def __init__(self, device: str, path: Path | None):
        gpu, started = device == "cuda", datetime.now(timezone.utc)
        self.device, self.compile, self.path = device, gpu, path
        self.sizes, self.start = ON_GPU if gpu else ON_CPU, time.perf_counter()
        triton = importlib.util.find_spec("triton")
        self.figures, self.skipped, self.failures, self.seconds = {}, {}, {}, {}
        self.about = {
            "date": started.isoformat(timespec="seconds"),
            "card": torch.cuda.get_device_name() if gpu else "CPU, tiny shapes",
            "capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
            "torch": torch.__version__, "cuda": torch.version.cuda,
            "triton": importlib.import_module("triton").__version__ if triton else None,
            "cudnn": torch.backends.cudnn.version() if gpu else None}
        print(", ".join(f"{k} {v}" for k, v in self.about.items()), flush=True)

    def figure(self, name: str, value: float | str):
        """A number, its unit in its name, or a share like 6/6."""
        self.figures[name] = value
        print(f"{name}: {value if isinstance(value, str) else format(value, '.4g')}", flush=True)

    def attempt(self, name: str, check, *args):
        """check(self, *args); what goes wrong there is named, and the next check can go on."""
        begun = time.perf_counter()
        try:
            if begun - self.start > LIMIT:
                raise Skipped(f"the {LIMIT} s of this part are over")
            return check(self, *args)
        except Skipped as e:
            self.skipped[name] = str(e)
            print(f"{name}: skipped: {e}", flush=True)
        except Exception as e:
            if not isinstance(e, Wrong):
                traceback.print_exc()
            self.failures[name] = f"{type(e).__name__}: {str(e)[:300]}"
            print(f"{name}: FAILED {self.failures[name]}", flush=True)
        finally:
            self.seconds[name] = round(time.perf_counter() - begun, 1)
            self.save()
            torch._dynamo.reset()
            gc.collect()
            if self.compile:
                with contextlib.suppress(RuntimeError):  # of a card that an error has stopped
                    torch.cuda.empty_cache()

    def save(self):
        if self.path:
            write_json(self.path, self.about | {
                key: getattr(self, key) for key in ("figures", "skipped", "failures", "seconds")})

    def expect(self, name: str, value: float, limit: float):
        """An error as a figure; raises Wrong above the limit, and for NaN."""
        self.figure(name, value)
        if not value <= limit:
            raise Wrong(f"{name} is {value:.4g}; up to {limit:g} is right")

    def time(self, call, loops=4, repeats=5) -> float:
        """Median seconds of a call."""
        return median(interleaved({"it": call}, repeats, self.device, loops)["it"])


def or_skip(check, *args):
    """A refusal, for what a card lacks, is no failure."""
    try:
        check(*args)
    except UserError as e:
        raise Skipped(str(e)) from None


def needs_fp8(device: str, mode: str | None):
    if mode == "fp8":
        or_skip(Quantization("fp8", None, "").check_device, device, "the model")


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# ---------------------------------------------------------------- smoke

def smoke(c: Check, mode: str):
    needs_fp8(c.device, mode)
    with tempfile.TemporaryDirectory() as made:
        where = DEMO / "target"
        if mode in MODES:
            where = Path(made) / mode
            flags = ["--checkpoint_dir", str(DEMO / "target"), "--mode", mode, "--out", str(where)]
            with (mock.patch("sys.argv", ["quantize.py", *flags]),
                  contextlib.redirect_stdout(io.StringIO())):
                quantize.main()
        dtype = torch.float32 if mode == "float32" else BF
        target, draft = load(where, c.device, dtype), load(DEMO / "draft", c.device, dtype)
        reference = load(DEMO / "target" if mode == "fp8" else where, "cpu", torch.float32)
        tokenizer, head = Tokenizer.from_dir(where), load_judge(DEMO / "judge.safetensors", where)
        eagle = load_eagle(DEMO / "eagle", where, c.device, dtype)
    texts = {}
    for case in CASES[mode]:
        texts[case] = eager_and_recorded(c, f"smoke.{mode}.{case}", target, draft, head, eagle,
                                         tokenizer, case)
    for case in EXACT if mode == "float32" else ():
        agree(c, f"smoke.{mode}.{case}_same_as_alone", texts[case], texts["alone"], 1.0)
    limit = LOGITS.get(mode, BFLOAT16_LOGITS)
    c.expect(f"smoke.{mode}.logits_error", logits_error(c, target, reference), limit)


def logits_error(c: Check, model, reference) -> float:
    """The largest relative error of the logits of some rows, few (kernels) and many (a prompt)."""
    ids, errors = torch.randint(3, 1000, (1, 200), generator=torch.Generator().manual_seed(0)), []
    with torch.inference_mode():
        for rows in (1, 26, 33, 64, 65, 200):
            x, pos = ids[:, :rows], torch.arange(rows)
            want = reference(x, pos, reference.new_cache(256))[0].double()
            got = model(x.to(c.device), pos.to(c.device), model.new_cache(256))[0]
            errors.append(relative_error(got.cpu(), want))
    return max(errors)


def engine_of(c: Check, case: str, target, draft, head, eagle) -> Engine:
    if case == "alone":
        return Engine(target)
    name = {"eagle": "eagle", "tree": "eagle-tree", "ngram": "ngram"}.get(case, "llama")
    settings = {"judge": dict(head=head, accept="judge"), "tree": dict(speculate_k=TREE.height),
                "sampled": dict(temperature=0.8, top_p=0.9, seed=3)}.get(case, {})
    if case == "auto":
        best = BestK((2, 4))
        settings = dict(chooser=best, speculate_k=best.ks[-1])
    return Engine(target, make_drafter(name, target, draft, eagle, TREE),
                  **{"speculate_k": c.sizes.smoke_k} | settings)


def eager_and_recorded(c: Check, name: str, target, draft, head, eagle, tokenizer,
                       case: str) -> list:
    """The eager texts, which the recorded rounds must give again."""
    lines = json_lines(DEMO / "problems.jsonl")[:900:900 // c.sizes.prompts]
    prompts = [tokenizer.encode(line.value["prompt"]) for line in lines]
    new = c.sizes.tokens
    texts = lambda e: [generate(e, p, new, tokenizer.eos_ids) for p in prompts]
    make = lambda: engine_of(c, case, target, draft, head, eagle)
    eager = [r.tokens for r in texts(make())]
    fast = compiled(c, make(), name)
    warm_up(fast, min(map(len, prompts)), max(map(len, prompts)) + new)
    results = texts(fast)
    c.figure(f"{name}.tokens_per_s", median(r.tokens_per_sec for r in results))
    if case != "alone":
        c.figure(f"{name}.accepted", sum(r.mean_accepted for r in results) / len(results))
    # Compiled and eager bfloat16 differ in the last bit, so that near ties may turn.
    agree(c, f"{name}.same_as_eager", [r.tokens for r in results], eager,
          1.0 if target.norm.weight.dtype == torch.float32 else 0.3)
    return eager


def agree(c: Check, name: str, texts: list, wanted: list, least: float):
    """How many texts are the same, token for token; raises Wrong below a share of them."""
    same = sum(a == b for a, b in zip(texts, wanted))
    c.figure(name, f"{same}/{len(wanted)}")
    if same < least * len(wanted) or not all(wanted):
        raise Wrong(f"{name}: {same} of {len(wanted)} texts are the same token for token")


# ---------------------------------------------------------------- attention

WAYS = {"default": contextlib.nullcontext, "triton": contextlib.nullcontext,
        "cudnn": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "efficient": lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION),
        "math": lambda: sdpa_kernel(SDPBackend.MATH)}


def attention(c: Check, way: str, name: str, group: int, rows: int, length: int, at: int):
    """`rows` queries from position `at` on, on a cache of `length` positions. SDPA is given as many
    as a round gives it, the power of two; Triton all of them.
    """
    heads, dim = c.sizes.head
    random = lambda *shape: torch.randn(shape, device=c.device, dtype=BF)
    q, kv = random(1, rows, heads * group, dim), random(length, 2, 1, heads, dim)
    pos = at + torch.arange(rows, device=c.device)
    kvs = [kv, *(kv.clone() for _ in range(min(200, int(c.sizes.bytes // size(kv)))))]
    span = min(length, power_of_two(at + rows))
    mask = (torch.arange(span, device=c.device) <= pos[:, None]).repeat(group, 1)

    def sdpa(q, kv):
        k, v = kv[:span].permute(1, 2, 3, 0, 4)
        packed = q.transpose(1, 2).reshape(1, heads, -1, dim)
        y = F.scaled_dot_product_attention(packed, k, v, attn_mask=mask)
        return y.reshape(1, heads * group, rows, dim).transpose(1, 2)

    call = triton_attention(c, dim, pos) if way == "triton" else sdpa
    with torch.inference_mode():
        want = sdpa(q.double(), kv.double())
        try:
            with WAYS[way]():
                got = call(q, kv).reshape(want.shape)
                seconds = c.time(recorded(c, lambda: [call(q, kv) for kv in kvs])) / len(kvs)
        except RuntimeError as e:
            if not any(no in str(e) for no in ("No available kernel", "No viable backend")):
                raise
            raise Skipped("PyTorch has no such kernel here") from None
    c.figure(f"{name}.us", 1e6 * seconds)
    c.expect(f"{name}.error", relative_error(got, want), BFLOAT16_ERROR)


def triton_attention(c: Check, dim: int, pos: Tensor):
    """The split-KV op, a function of q [B, S, n_head, head_dim] and a layer's cache."""
    try:
        kernels = importlib.import_module("gpu_kernels.attention")
    except ImportError as e:
        raise Skipped(f"no Triton kernel: {e}") from None
    if why := kernels.unavailable(c.device, dim, BF):
        raise Skipped(why)
    return lambda q, kv: torch.ops.judge.attention(q, kv, pos)


# ---------------------------------------------------------------- kernels

def layer_of(mode: str, n_in: int, n_out: int, device: str):
    """A layer of random weights before `prepare`, and the weights that it stands for."""
    w = torch.randn(n_out, n_in, device=device, dtype=BF) / n_in ** 0.5
    if mode == "bf16":
        layer = Linear(n_in, n_out, bias=False).to(device, BF).requires_grad_(False)
        layer.weight.copy_(w)
        return layer, w
    layer = MODES[mode](n_in, n_out, False, 128 if mode == "int4" else None).to(device)
    for name, t in layer.quantize(w).items():
        getattr(layer, name).copy_(t)
    if mode == "int4":
        return layer, layer.widen().flatten(1)
    return layer, layer.weight.float() * layer.scale[:, None]


def kernels(c: Check, mode: str, name: str, n_in: int, n_out: int):
    """GB/s of weights at each number of rows, and the largest error."""
    needs_fp8(c.device, mode)
    layer, dense = layer_of(mode, n_in, n_out, c.device)
    each, errors = size(*layer.parameters(), *layer.buffers()), []
    layers = [layer, *(copy.deepcopy(layer) for _ in range(min(16, int(c.sizes.bytes // each))))]
    for one in layers:
        one.prepare(BF)
    for rows in c.sizes.rows:
        x = torch.randn(rows, n_in, device=c.device, dtype=BF)
        want = torch.cat([x.double() @ part.double().T for part in dense.split(4096)], dim=1)
        product = lambda layer, x: layer(x)
        if c.compile:
            product = builder(torch.device(c.device))(product)
        with torch.inference_mode():
            errors.append(relative_error(product(layer, x), want))
            call = recorded(c, lambda f=product, x=x: [f(one, x) for one in layers])
            seconds = c.time(call, loops=10) / len(layers)
        c.figure(f"{name}.rows{rows}.gb_per_s", each / seconds / 1e9)
    c.expect(f"{name}.error", max(errors), ERROR.get(mode, BFLOAT16_ERROR))


# ---------------------------------------------------------------- passes and rounds

def source(c: Check, preset: str, quant: str | None, layers: int | None = None) -> Source:
    config = PRESETS[preset] | c.sizes.shrink
    if layers:
        config["num_hidden_layers"] = layers
    if quant:
        config["quantization"] = {"mode": quant, "group_size": 128 if quant == "int4" else None}
    return Source(preset, config, None)


def fits(c: Check, **sources: Source):
    models = {flag: (s.model_config, BF, True) for flag, s in sources.items()}
    or_skip(check_memory, models, positions(c), c.sizes.k + 1, c.device)


def positions(c: Check) -> int:
    """Of the caches: room for the longest prompt, and for whole rounds."""
    return power_of_two(c.sizes.prompt + c.sizes.k + 2)


@torch.inference_mode()
def one_pass(c: Check, model, rows: int) -> float:
    """Milliseconds of a verification of `rows` rows, at a span of 256; one row is a decode step."""
    e = engine_on({model: model.new_cache(256)}, model, model if rows > 1 else None, k=rows - 1)
    return 1e3 * c.time(recorded(c, verification(compiled(c, e, f"{rows} rows"), 128, 256)))


@torch.inference_mode()
def first_token_ms(c: Check, name: str, e: Engine):
    n = c.sizes.prompt
    c.figure(f"{name}.first_token_of_{n}.ms", 1e3 * c.time(first_token(e, n), loops=1, repeats=3))


def whole(c: Check, preset: str, quant: str | None, name: str, read: float):
    """A decode step of all layers; in bfloat16 also the time to the first token."""
    needs_fp8(c.device, quant)
    s = source(c, preset, quant)
    fits(c, target=s)
    model = build(s, c.device, BF)
    report_pass(c, f"{name}.rows1", one_pass(c, model, 1), describe(s, BF)["bytes_read"], read)
    if quant is None:
        e = engine_on({model: model.new_cache(positions(c))}, model)
        first_token_ms(c, name, compiled(c, e, "prompts"))
        c.figure(f"{name}.attention", attention_name(c, model))


def report_pass(c: Check, name: str, ms: float, bytes_read: float, read: float):
    c.figure(f"{name}.ms", ms)
    c.figure(f"{name}.share_of_bandwidth", bytes_read / (ms / 1e3) / read)


def extrapolated(c: Check, preset: str, quant: str, name: str, read: float):
    """One row and K + 1 of all layers, as two depths say."""
    needs_fp8(c.device, quant)
    full, found, read_bytes, rows = source(c, preset, quant), {}, [], (1, c.sizes.k + 1)
    few, more = c.sizes.depths
    for layers in (few, more):
        s = source(c, preset, quant, layers)
        fits(c, target=s)
        model = build(s, c.device, BF)
        read_bytes.append(describe(s, BF)["bytes_read"])
        for r in rows:
            found[layers, r] = one_pass(c, model, r)
        del model
    times = (full.config["num_hidden_layers"] - more) / (more - few)
    to_all = lambda a, b: b + times * (b - a)
    ms = [to_all(found[few, r], found[more, r]) for r in rows]
    for r, value in zip(rows, ms):
        report_pass(c, f"{name}.rows{r}", value, to_all(*read_bytes), read)
    c.figure(f"{name}.rows{rows[1]}_over_rows1", ms[1] / ms[0])


def whole_rounds(c: Check, target, draft_source: Source | None, name: str):
    """tokens/s of the target alone, or of rounds with its judge and a draft."""
    if c.compile:
        torch.cuda.reset_peak_memory_stats()
    draft = build(draft_source, c.device, BF) if draft_source else None
    caches = {model: model.new_cache(positions(c)) for model in (target, draft) if model}
    if draft:
        k, weight = c.sizes.k, torch.randn(1, target.config.dim) / target.config.dim ** 0.5
        e = engine_on(caches, target, draft, JudgeHead(weight, torch.zeros(1), 0.5, ""),
                      k, accept="judge")
        tell = simulate(compiled(c, e, name))
        counts = draw_runs(rate_for(c.sizes.accepted, k), k, c.sizes.rounds)
    else:
        e, tell, counts = engine_on(caches, target), lambda counts: None, [0] * 30
        compiled(c, e, name)
    made, prompt = sum(counts) + len(counts), list(range(5, 69))
    warm_up(e, len(prompt), len(prompt) + 1 + made)  # one span of 256
    seconds = median([play(e, prompt, counts, tell) for _ in range(4)][1:])
    round_ms = 1e3 * seconds / len(counts)
    c.figure(f"{name}.tokens_per_s", made / seconds)
    c.figure(f"{name}.round_ms", round_ms)
    if draft and (alone := c.figures.get("round.alone.tokens_per_s")):
        c.figure(f"{name}.over_alone", made / seconds / alone)
    if draft and (verify := c.figures.get(f"round.alone.rows{k + 1}.ms")):
        c.figure(f"{name}.drafting_ms_per_token", (round_ms - verify) / k)
    first_token_ms(c, name, e)
    if c.compile:
        c.figure(f"{name}.memory_gb", torch.cuda.max_memory_reserved() / 1e9)


def passes_of_all_layers(c: Check, target, name: str):
    rows = 1, c.sizes.k + 1
    ms = [one_pass(c, target, r) for r in rows]
    for r, value in zip(rows, ms):
        c.figure(f"{name}.rows{r}.ms", value)
    c.figure(f"{name}.rows{rows[1]}_over_rows1", ms[1] / ms[0])


# ---------------------------------------------------------------- parts

def smoke_part(c: Check):
    for mode in CASES if c.compile else ("float32", "int8", "fp8"):
        c.attempt(f"smoke.{mode}", smoke, mode)


def attention_part(c: Check):
    for way in WAYS:
        for group, rows, length, at in c.sizes.attention:
            name = f"attention.group{group}.rows{rows}.cache{length}.at{at}.{way}"
            c.attempt(name, attention, way, name, group, rows, length, at)


def kernels_part(c: Check):
    for n_in, n_out in c.sizes.shapes:
        for mode in ("int8", "int4", "bf16", "fp8"):
            name = f"kernels.{mode}.{n_in}x{n_out}"
            c.attempt(name, kernels, mode, name, n_in, n_out)


def passes_part(c: Check):
    def read_bandwidth(c):
        read = bandwidth(c.device, 5)
        c.figure("passes.read_bandwidth.gb_per_s", read / 1e9)
        return read

    read = c.attempt("passes.read_bandwidth", read_bandwidth) or math.nan
    c.attempt("passes.8b_bf16", whole, "llama-3.1-8b", None, "passes.8b_bf16", read)
    depths = "_and_".join(map(str, c.sizes.depths))
    for quant in ("int8", "fp8"):
        name = f"passes.70b_{quant}_from_{depths}_layers"
        c.attempt(name, extrapolated, "llama-3.1-70b", quant, name, read)
    for quant in ("int8", "int4"):
        c.attempt(f"passes.8b_{quant}", whole, "llama-3.1-8b", quant, f"passes.8b_{quant}", read)


def round_part(c: Check):
    def with_draft(c, why, s, name):
        if why:
            raise Skipped(why)
        whole_rounds(c, target, s, name)

    def build_target(c):
        fits(c, target=big)
        return build(big, c.device, BF)

    big, drafts = source(c, "llama-3.1-70b", "int8"), {}
    for quant in ("int8", None, "int4"):  # whether both fit is known before either is built
        s, why = source(c, "llama-3.1-8b", quant), None
        try:
            fits(c, target=big, draft=s)
        except Skipped as e:
            why = str(e)
        drafts[f"round.draft_{quant or 'bf16'}"] = why, s
    if (target := c.attempt("round.70b_int8", build_target)) is None:
        return
    c.attempt("round.alone.passes", passes_of_all_layers, target, "round.alone")
    c.attempt("round.alone", whole_rounds, target, None, "round.alone")
    for name, (why, s) in drafts.items():
        c.attempt(name, with_draft, why, s, name)


PARTS = {"smoke": smoke_part, "attention": attention_part, "kernels": kernels_part,
         "passes": passes_part, "round": round_part}


def main(argv=None):
    p = Parser(description="Check a GPU: kernels against float64, recorded rounds against eager "
               "ones, and the figures of RESULTS.md's table.")
    p.add_argument("parts", nargs="+", choices=PARTS)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                   help="cpu: all of it on tiny shapes, eager")
    p.add_argument("--json", type=Path, help="write the summary here, anew after every check")
    args = p.parse_args(argv)
    refuse((args.device == "cuda" and not torch.cuda.is_available(),
            "--device cuda: this PyTorch sees no CUDA device; use --device cpu"))
    if args.json:
        check_writable(args.json)
    c = Check(args.device, args.json)
    for part in args.parts:
        c.start = time.perf_counter()
        PARTS[part](c)
        c.seconds[part] = round(time.perf_counter() - c.start, 1)
    c.save()
    print(f"{len(c.figures)} figures, {len(c.skipped)} skipped, {len(c.failures)} failed"
          + "".join(f"\nFAILED {name}: {why}" for name, why in c.failures.items()))
    sys.exit(1 if c.failures else 0)


if __name__ == "__main__":
    run(main)
