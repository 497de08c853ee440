"""Short checks for a GPU at hand; each prints lines, and an error in one does not stop the rest.

    python tests/gpu_check.py smoke attn kernels passes round      # one H100: all but round
    BLOCKS=1 python tests/gpu_check.py passes round                # compiled block by block
    DEV=cpu MODES=bf16 python tests/gpu_check.py smoke             # what a test runs without a GPU

smoke: the demo pair, eager against float32 and recorded rounds against eager ones, in each of
MODES. attn, kernels: attention backends, and quantized products in GB/s of weights. passes: single
passes of real Llama shapes (70B from 2 and 6 layers, extrapolated to 80). round: 70B with 8B, whole
rounds at a forced 19.7 accepted tokens (an H200's memory). With BLOCKS=1 passes and rounds compile
one block for all layers and leave the rest of a pass eager: seconds of compiling, not minutes.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch._dynamo  # noqa: E402

import benchmark as B  # noqa: E402
import linear  # noqa: E402
from checkpoint import load  # noqa: E402
from common import json_lines  # noqa: E402
from engine import Engine, LlamaDrafter, State, generate  # noqa: E402
from evaluation.dummy import PRESETS, Source, build, describe  # noqa: E402
from graphs import RECOMPILE_LIMIT, RecordedRounds, compile_engine, record, warm_up  # noqa: E402
from judge import JudgeHead  # noqa: E402
from load import load_judge  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from tp import size  # noqa: E402

DEV = os.environ.get("DEV", "cuda")
MODES = os.environ.get("MODES", "bf16,int8,int4,fp8").split(",")
GPU, BF, BLOCKS = DEV == "cuda", torch.bfloat16, bool(os.environ.get("BLOCKS"))
DEMO = ROOT / "checkpoints" / "demo"
torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
failed = 0


def attempt(name, check, *args):
    global failed
    start = time.perf_counter()
    try:
        print(f"{name}: {check(*args)}  [{time.perf_counter() - start:.0f} s]", flush=True)
    except Exception as e:
        failed += 1
        traceback.print_exc()
        print(f"{name}: FAILED {type(e).__name__}: {str(e)[:300]}", flush=True)


def ms(call, n=20) -> float:
    """Milliseconds of a call, by the device's clock."""
    for _ in range(3):
        call()
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(5):
        a.record()
        for _ in range(n):
            call()
        b.record()
        b.synchronize()
        times.append(a.elapsed_time(b) / n)
    return sorted(times)[2]


def recorded(call):
    return record(call).replay


# ---------------------------------------------------------------- smoke

def relative_errors(model, reference) -> dict:
    """Of the logits of some rows, few (kernels) and many (a prompt), against a float32 model."""
    ids, errors = torch.randint(3, 1000, (1, 200), generator=torch.Generator().manual_seed(0)), {}
    with torch.inference_mode():
        for rows in (1, 26, 33, 64, 65, 200):
            x, pos = ids[:, :rows], torch.arange(rows)
            want = reference(x, pos, reference.new_cache(256))[0].double()
            got = model(x.to(DEV), pos.to(DEV), model.new_cache(256))[0].cpu().double()
            errors[rows] = round(float((got - want).norm() / want.norm()), 4)
    return errors


def smoke(mode):
    where = DEMO / "target"
    if mode != "bf16":
        where = Path(tempfile.mkdtemp()) / mode
        subprocess.run([sys.executable, ROOT / "quantize.py", "--checkpoint_dir", DEMO / "target",
                        "--mode", mode, "--out", where], check=True, capture_output=True)
    tokenizer = Tokenizer.from_dir(where)
    lines = json_lines(DEMO / "problems.jsonl")[:900:150]
    prompts = [tokenizer.encode(line.value["prompt"]) for line in lines]
    target, draft = load(where, DEV, BF), load(DEMO / "draft", DEV, BF)
    reference = load(DEMO / "target" if mode == "fp8" else where, "cpu", torch.float32)
    out = {"error": relative_errors(target, reference)}
    # A CPU does not run fp8, so that is compared with the weights before quantization; the same
    # rounding done in float32 there gives 0.07 to 0.15.
    assert max(out["error"].values()) < (0.25 if mode == "fp8" else 0.1), out
    head = load_judge(DEMO / "judge.safetensors", where)
    cases = {"alone": {}, "standard": dict(draft=draft),
             "judge": dict(draft=draft, head=head, accept="judge")}
    if mode == "bf16":
        cases["sampled"] = dict(draft=draft, temperature=0.8, top_p=0.9, seed=3)

    def engine(draft=None, **settings):
        drafter = LlamaDrafter(draft) if draft else None
        return Engine(target, drafter, speculate_k=25, **settings)

    eager = {}
    for name, settings in cases.items():
        e = engine(**settings)
        eager[name] = [generate(e, p, 80, tokenizer.eos_ids).tokens for p in prompts]
        assert all(eager[name])
        if GPU and (mode == "bf16" or name == "judge"):
            e = engine(**settings)
            compile_engine(e)
            warm_up(e, min(map(len, prompts)), max(map(len, prompts)) + 80)
            fast = [generate(e, p, 80, tokenizer.eos_ids) for p in prompts]
            same = sum(f.tokens == w for f, w in zip(fast, eager[name]))
            out[name] = (f"graph==eager {same}/{len(prompts)}, accepted "
                         f"{sum(f.mean_accepted for f in fast) / len(fast):.1f}, "
                         f"{fast[-1].tokens_per_sec:.0f} tok/s")
    same = sum(a == b for a, b in zip(eager["standard"], eager["alone"]))
    out["standard==alone"] = f"{same}/{len(prompts)}"  # bfloat16: near ties may turn
    return json.dumps(out)


# ---------------------------------------------------------------- kernels

def kernels(shape, mode):
    """GB/s of weight bytes at each number of rows; weights rotate through > 200 MB."""
    n_in, n_out = shape

    def make():
        if mode == "bf16":
            return linear.Linear(n_in, n_out).to(DEV, BF)
        return linear.MODES[mode](n_in, n_out, False, 128 if mode == "int4" else None).to(DEV)

    layers = [make()]
    bytes_each = size(*layers[0].parameters(), *layers[0].buffers())
    layers += [make() for _ in range(min(16, int(2e8 // bytes_each)))]
    for layer in layers:
        for t in layer.buffers():
            t.view(torch.uint8).random_(0, 127) if t.element_size() == 1 else t.fill_(1e-3)
        layer.prepare(BF)
    out = {}
    with torch.inference_mode():
        for rows in (1, 2, 17, 26, 33, 64):
            x = torch.randn(rows, n_in, device=DEV, dtype=BF)
            product = torch.compile(lambda layer, x: layer(x), fullgraph=True, dynamic=False)
            call = recorded(lambda f=product, x=x: [f(layer, x) for layer in layers])
            out[rows] = round(bytes_each * len(layers) / (ms(call, 10) / 1e3) / 1e9)
    torch._dynamo.reset()
    return out


def attention(group, rows, span):
    """Each backend on `rows` queries of `group` heads that share a KV head."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    lines = [""]
    with torch.inference_mode():
        q = torch.randn(1, 8, group * rows, 128, device=DEV, dtype=BF)
        kv = torch.randn(span, 2, 1, 8, 128, device=DEV, dtype=BF)
        k, v = kv.permute(1, 2, 3, 0, 4)
        at = span - 40 + torch.arange(rows, device=DEV)[:, None]
        mask = (torch.arange(span, device=DEV) <= at).repeat(group, 1)
        call = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
        backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        for name, kinds in (("default", backends), *((b.name, [b]) for b in backends)):
            try:
                start = time.perf_counter()
                with sdpa_kernel(kinds):
                    y = call()
                    torch.cuda.synchronize()
                    first = time.perf_counter() - start
                    us = 1e3 * ms(recorded(call))
                error = float((y.double() - want).norm() / want.norm())
                lines.append(f"{name}: {us:.0f} us, first call {1e3 * first:.0f} ms, error "
                             f"{error:.4f}, strides {tuple(y.stride())}")
            except RuntimeError as e:
                lines.append(f"{name}: {str(e)[:80]}")
    return "\n   ".join(lines)


# ---------------------------------------------------------------- passes and rounds

def compile_rounds(e):
    """`graphs.compile_engine`, or with BLOCKS one compiled block for all layers, then recorded."""
    if not BLOCKS:
        return compile_engine(e)
    for model in (e.target, *([e.drafter.model] if e.drafter else [])):
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    e.play = RecordedRounds(e.play)


def dummy(preset, quant=None, layers=None):
    config = PRESETS[preset] | ({"num_hidden_layers": layers} if layers else {})
    if quant:
        config["quantization"] = {"mode": quant, "group_size": 128 if quant == "int4" else None}
    source = Source(preset, config, None)
    return build(source, DEV, BF), describe(source, BF)["bytes_read"]


@torch.inference_mode()
def one_pass(model, rows, span=256, profile=False) -> float:
    """Milliseconds of a verification of `rows` rows; one row is a decode step."""
    e = B.engine_on({model: model.new_cache(512)}, model, model if rows > 1 else None, k=rows - 1)
    compile_rounds(e)
    n = torch.tensor([128], device=DEV)
    state, drafted = State(n.new_zeros(2), n, n.new_zeros(1)), torch.arange(rows - 1, device=DEV)
    call = recorded(lambda: e.verify_and_accept(model, None, e.cache.first(span), e.settings, state,
                                                drafted, None, None, None))
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as p:
            call()
            torch.cuda.synchronize()
        table = p.key_averages()
        print(table.table(sort_by="self_device_time_total", row_limit=14,
                          max_name_column_width=70)[:4000],
              f"\nkernels: {sum(a.count for a in table)}", flush=True)
    return ms(call, 8)


def passes(preset, quant, read, depths, rows):
    """Full depth, or slopes over two depths, extrapolated to the preset's own."""
    got = {}
    for n in depths:
        model, bytes_read = dummy(preset, quant, n)
        for r in rows:
            profile = n == depths[-1] and r == rows[0]
            got[n, r] = one_pass(model, r, profile=profile), bytes_read
        del model
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    full, out, last = PRESETS[preset]["num_hidden_layers"], {}, depths[-1]
    for r in rows:
        (t1, b1), (t2, b2) = got[depths[0], r], got[last, r]
        x = (full - last) / (last - depths[0]) if len(depths) > 1 else 0
        t, b = t2 + x * (t2 - t1), b2 + x * (b2 - b1)
        out[r] = f"{t:.2f} ms = {b / t / 1e6 / (read / 1e9):.2f} of read bandwidth"
    return out


def whole_rounds(target_quant, drafts=("int8", "int4", None), k=25, accepted=19.7, rounds=7):
    """70B with its judge alone and with 8B drafts, each quantized in a way, in one process."""
    target = dummy("llama-3.1-70b", target_quant)[0]
    head = JudgeHead(torch.randn(1, target.config.dim) / 90, torch.zeros(1), 0.5, "")
    runs, out = B.draw_runs(B.rate_for(accepted, k), k, rounds), {}
    for name in ("alone", *drafts):
        draft = None if name == "alone" else dummy("llama-3.1-8b", name)[0]
        caches = {m: m.new_cache(1024) for m in (target, draft) if m}
        counts = runs if draft else [0] * 100
        e = B.engine_on(caches, target, draft, head, *(("judge", k) if draft else ()))
        compile_rounds(e)
        tell = B.simulate(e) if draft else lambda counts: None
        made = sum(counts) + len(counts)
        warm_up(e, 64, 65 + made)  # one span of 256: few graphs to compile
        seconds = sorted(B.play(e, list(range(5, 69)), counts, tell) for _ in range(4))[1]
        name = name if name == "alone" else f"draft {name or 'bf16'}"
        out[name] = f"{made / seconds:.1f} tok/s, {1e3 * seconds / len(counts):.1f} ms a round"
        print(name, out[name], *([f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB"] * GPU),
              flush=True)
        del e, draft, caches, tell
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return out


def main(what):
    if GPU:
        print(torch.__version__, torch.cuda.get_device_name(), "cuDNN",
              torch.backends.cudnn.version())
    if "smoke" in what:
        for mode in MODES:
            attempt(f"smoke {mode}", smoke, mode)
    if "kernels" in what:
        for mode in ("bf16", "int8", "fp8", "int4"):
            for shape in ((8192, 57344), (28672, 8192), (8192, 10240), (4096, 6144)):
                attempt(f"GB/s {mode} {shape}", kernels, shape, mode)
    if "attn" in what:
        for group, rows, span in ((4, 1, 256), (8, 26, 256), (4, 1, 8192), (8, 26, 8192)):
            attempt(f"attention {group} x {rows} rows, span {span}", attention, group, rows, span)
    if "passes" in what:
        read = B.bandwidth(DEV, 5)
        print(f"read {read / 1e9:.0f} GB/s")
        torch.cuda.empty_cache()
        attempt("8B bf16 alone", passes, "llama-3.1-8b", None, read, [32], [1])
        for quant in ("int8", "fp8"):
            attempt(f"70B {quant}, rows 1 and 26", passes, "llama-3.1-70b", quant, read, [2, 6],
                    [1, 26])
        attempt("8B int8 alone", passes, "llama-3.1-8b", "int8", read, [2, 6], [1])
    if "round" in what:
        attempt("70B int8 with 8B", whole_rounds, "int8")
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main(sys.argv[1:])
