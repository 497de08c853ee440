"""benchmark.py under torchrun, and which all-reduce the ranks take."""
import json

import pytest
import torch

import benchmark as B
from common import UserError
from evaluation import dummy as D
from evaluation import timing
from helpers import ROOT, tiny_config
from ranks import job
from test_tp import torchrun

DEMO = ROOT / "checkpoints" / "demo"
FLAGS = ["--no_compile", "--device", "cpu", "--speculate_k", "3", "--max_new_tokens", "12"]
PAIR = ["--target", str(DEMO / "target"), "--draft", str(DEMO / "draft"), "--judge",
        str(DEMO / "judge.safetensors"), "--prompts", str(DEMO / "problems.jsonl"), "--repeats",
        "1", *FLAGS]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The result of one process, that of two, and what these printed."""
    out = tmp_path_factory.mktemp("out")
    done = torchrun(ROOT / "benchmark.py", *PAIR, "--json", out / "two.json", "--plot",
                    out / "two.png")
    assert done.returncode == 0, done.stderr
    assert (out / "two.png").exists()
    return B.main(PAIR), json.loads((out / "two.json").read_text()), done


def consistent(r: dict):
    """The share of bandwidth is that of all ranks' bytes, and of the bandwidth of all ranks."""
    for e in [*r["passes"]["verify"], *r["passes"]["decode"].values()]:
        assert e["fraction_of_bandwidth"] == pytest.approx(
            e["bytes"] / (e["ms"] / 1e3) / (r["bandwidth_gb_per_sec"] * 1e9))


@pytest.mark.slow
def test_two_processes_print_one_table(both):
    alone, two, done = both
    lines = done.stdout.splitlines()
    assert lines[0].startswith("2 x CPU, ") and (alone["ranks"], two["ranks"]) == (1, 2)
    for once in (f"target {DEMO}", "read bandwidth of all ranks together", "judge, in a pass",
                 "real acceptance, 1 prompts"):
        assert sum(line.startswith(once) for line in lines) == 1, once
    assert "shared: 0.0205 GB a rank" in lines[1] and "whole on each rank" in lines[2]


@pytest.mark.slow
def test_the_bytes_of_all_ranks_count(both):
    alone, two, _ = both
    norms = 4 * (2 * 6 + 1) * 384  # both ranks have these; all other weights are split
    assert two["target"]["bytes"] == alone["target"]["bytes"] + norms
    assert two["target"]["bytes_read"] == alone["target"]["bytes_read"] + norms
    assert two["target"]["bytes_a_rank"] * 2 == two["target"]["bytes"]
    assert two["draft"]["bytes"] == 2 * alone["draft"]["bytes"] == 2 * two["draft"]["bytes_a_rank"]
    assert two["target"]["parameters"] == alone["target"]["parameters"]
    decode, by_one = two["passes"]["decode"], alone["passes"]["decode"]
    assert decode["target"]["bytes"] == by_one["target"]["bytes"] + norms  # KV heads are split
    assert decode["draft"]["bytes"] == 2 * by_one["draft"]["bytes"]
    consistent(two)


@pytest.mark.slow
def test_acceptance_is_that_of_one_process(both):
    alone, two, _ = both
    for a, b in zip(alone["real"]["variants"], two["real"]["variants"], strict=True):
        assert (a["variant"], a["tokens"]) == (b["variant"], b["tokens"])
        assert a["mean_accepted"] == b["mean_accepted"]
    forced = [[(p["rounds"], p["tokens"], p["mean_accepted"]) for p in r["simulated"]["points"]]
              for r in (alone, two)]
    assert forced[0] == forced[1]


@pytest.mark.slow
def test_the_collectives_of_a_pass(both):
    alone, two, done = both
    assert alone["collectives"] is None
    c = two["collectives"]
    assert (c["dim"], c["dtype"], c["all_reduces_a_pass"]) == (384, "float32", 13)
    assert [p["rows"] for p in c["passes"]] == [1, 4]
    ms = {v["rows"]: v["ms"] for v in two["passes"]["verify"]}
    for p in c["passes"]:
        assert p["all_reduce"] == "gloo" and p["all_reduce_ms"] > 0 and p["gather_ms"] > 0
        assert p["share_of_pass"] == pytest.approx(
            (13 * p["all_reduce_ms"] + p["gather_ms"]) / ms[p["rows"]])
    said = [line for line in done.stdout.splitlines() if line.startswith("all-reduce of ")]
    assert len(said) == 2 and "of a decode" in said[0] and "verifying 4 rows" in said[1]
    assert said[1].startswith("all-reduce of [4, 384] float32 over 2 ranks, gloo: ")
    assert "; 13 a pass, " in said[1]


@pytest.mark.long
@pytest.mark.slow
def test_dummy_weights_on_more_ranks_than_kv_heads(tmp_path):
    """Four ranks on 2 KV heads: two hold each, and both copies count. The draft is shared too."""
    target = tiny_config(vocab_size=104, max_position_embeddings=512)
    draft = tiny_config(vocab_size=104, max_position_embeddings=512, num_hidden_layers=1,
                        hidden_size=512, intermediate_size=6144)
    for name, config in (("target", target), ("draft", draft)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    done = torchrun(ROOT / "benchmark.py", "--target", tmp_path / "target.json", "--draft",
                    tmp_path / "draft.json", *FLAGS, "--speculate_k", "1", "--max_new_tokens", "4",
                    "--repeats", "1", "--json", tmp_path / "out.json", n=4)
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / "out.json").read_text())
    assert r["ranks"] == r["target"]["shared_by"] == r["draft"]["shared_by"] == 4
    for name, c in (("target", target), ("draft", draft)):
        dim, kv_heads = c["hidden_size"], 4  # not 2
        head_dim = dim // 4
        layer = dim * (2 * 4 + 2 * kv_heads) * head_dim + 3 * dim * c["intermediate_size"]
        norms = 4 * (2 * c["num_hidden_layers"] + 1) * dim
        weights = c["num_hidden_layers"] * layer + norms + 2 * 104 * dim
        assert r[name]["bytes"] == 4 * weights, name
        assert r[name]["bytes_read"] == 4 * (weights - 104 * dim)
        kv = c["num_hidden_layers"] * 2 * kv_heads * head_dim * r["passes"]["span"]
        assert r["passes"]["decode"][name]["bytes"] == r[name]["bytes_read"] + 4 * kv
    consistent(r)
    assert r["simulated"]["points"][0]["mean_accepted"] > 0


def test_what_ranks_cannot_share_is_refused_before_anything_is_made(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(job, "start", lambda device: device)
    monkeypatch.setattr(job, "check_same", lambda values: None)
    for module, name in ((D, "skeleton"), (B, "bandwidth"), (B, "build")):
        monkeypatch.setattr(module, name, lambda *args, **more: pytest.fail("it was made"))
    with pytest.raises(UserError, match="^llama-3.1-8b has 8 key-value heads, which 3 processes "
                       "cannot share; these numbers can: 1, 2, 4, 8, 16, 32$"):
        B.main(["--target", "llama-3.1-8b", "--draft", "llama-3.2-1b", *FLAGS])
    assert not "".join(capsys.readouterr())


def test_the_hugging_face_peer_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^--peer hf runs in one process; leave it out, or torchr"):
        B.parse_args([*PAIR, "--peer", "hf"])


def test_dummy_weights_take_rank_0s_decisions(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = D.Source("tiny", tiny_config(vocab_size=104), None)
    for n in (1, 2):
        assert D.build(source, "cpu", torch.float32, n).agree is job.same_everywhere


def test_ranks_start_each_block_together_and_add_up_their_bandwidth(monkeypatch):
    events, own = [], []
    monkeypatch.setattr(job, "wait_for_all", lambda: events.append("meet"))
    timing.interleaved({name: lambda name=name: events.append(name) for name in "ab"}, 2, "cpu")
    assert events == 3 * ["meet", *timing.LOOPS * "a", "meet", *timing.LOOPS * "b"]
    monkeypatch.setattr(job, "of_all_ranks", lambda x: own.append(x) or [x, 2 * x])
    assert timing.bandwidth("cpu", 1) == 3 * own[0] > 0


# ---------------------------------------------------------------- which all-reduce

SCRIPT = f"""
import json, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
""" + """
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
import tp
from checkpoint import config_from
from helpers import randomize, tiny_config
from ranks import all_reduce, job

all_reduce.CALLS["cpu"], all_reduce.TURNS, DIM = 4, 3, 8
way = None  # of this case: what stands for the kernel
all_reduce.ops.impl("one_shot_sum", lambda x: way(x), "CPU")
all_reduce.one_shot_offered = lambda device: True
symmetric.empty = lambda count, **made: torch.empty(count, **made)
symmetric.rendezvous = lambda buffer, group: None


def slow_if(is_slow):
    def sum_of_ones(x):
        time.sleep(0.02 * is_slow(x))
        return x * job.world()
    return sum_of_ones


def chosen(kernel, rows=5):
    global way
    way = kernel
    all_reduce.choose(rows, DIM, torch.float32, "cpu")
    rooms = job.of_all_ranks(all_reduce.one_shot and all_reduce.one_shot.room)
    total = all_reduce.sum_over_ranks(torch.ones(1, DIM))
    assert type(total) is torch.Tensor  # waited for: compiled code may read it at once
    assert (total == job.world()).all() and len(set(rooms)) == 1, rooms
    return rooms[0]


def refused(buffer, group):
    if job.rank() == 1:
        raise RuntimeError("no such memory here\\nwith details")


def choices():
    said = {
        "fast": chosen(slow_if(lambda x: job.rank() == 1)),  # rank 0 counts: elsewhere it is slow
        "slow": chosen(slow_if(lambda x: job.rank() == 0)),
        "fast for few rows": chosen(slow_if(lambda x: len(x) > 2)),
        "fast for one row": chosen(slow_if(lambda x: len(x) > 1)),
        "wrong": chosen(lambda x: x * (job.world() - job.rank())),  # on rank 1 only
    }
    symmetric.rendezvous = refused
    said["refused"] = chosen(slow_if(lambda x: False))
    return said


calls = 0


def real(x):
    global calls
    calls += 1
    y = x.clone()
    dist.all_reduce(y)
    return y


def compiled():
    # How often the op is called in passes of 3 and of 5 float32 rows, with room for 3 rows; and
    # of 3 when it takes bfloat16.
    global way, calls
    way = real
    torch.manual_seed(job.rank())
    model = randomize(tp.share(config_from(tiny_config(vocab_size=104, num_hidden_layers=1))))
    cache, ids = model.new_cache(8), torch.arange(8)

    def logits(rows, model=model):
        with torch.inference_mode():
            return model(ids[None, :rows], ids[:rows], cache)[0]

    want = [logits(rows) for rows in (3, 5)]
    assert calls == 0
    all_reduce.one_shot = all_reduce.OneShot(torch.empty(0), torch.float32, 3 * 64)
    counts, fast = [], torch.compile(model, fullgraph=True, dynamic=False)
    for rows, expected in zip((3, 5), want):
        calls = 0
        torch.testing.assert_close(logits(rows, fast), expected, atol=1e-5, rtol=1e-5)
        counts.append(calls)
    all_reduce.one_shot, calls = all_reduce.one_shot._replace(dtype=torch.bfloat16), 0
    logits(3)
    return [*counts, calls]


def main():
    job.start("cpu")
    print(json.dumps({"choices": choices(), "compiled": compiled()}))


job.run(main)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    script = tmp_path_factory.mktemp("ranks") / "script.py"
    script.write_text(SCRIPT)
    done = torchrun(script)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.slow
def test_the_faster_all_reduce_is_taken_by_all_ranks_alike(ranks):
    found, stderr = ranks
    assert found["choices"] == {"fast": 40, "slow": None, "fast for few rows": 16,
                                       "fast for one row": 8, "wrong": None, "refused": None}
    said = [line for line in stderr.splitlines() if line.startswith("all-reduce: ")]
    assert said[0].startswith("all-reduce: one-shot up to 5 rows; of [5, 8] one-shot takes 0.")
    assert said[1].startswith("all-reduce: GLOO; of [1, 8] one-shot takes 2")
    assert said[4:] == ["all-reduce: GLOO; one-shot gives wrong sums here",
                        "all-reduce: GLOO; one-shot failed: no such memory here"]


@pytest.mark.slow
def test_a_kernel_that_fails_on_one_rank_ends_the_run(tmp_path):
    """Not caught: the other rank, here like in a kernel, waits for it."""
    fails = SCRIPT.split("def main()")[0] + """
def kernel(x):
    if job.rank() == 1:
        raise RuntimeError("a fault in the kernel")
    time.sleep(1000)


def main():
    job.start("cpu")
    chosen(kernel)


job.run(main)
"""
    (tmp_path / "script.py").write_text(fails)
    done = torchrun(tmp_path / "script.py")
    assert done.returncode != 0 and "RuntimeError: a fault in the kernel" in done.stderr


@pytest.mark.slow
def test_compiled_passes_sum_in_one_shot_up_to_its_room(ranks):
    assert ranks[0]["compiled"] == [3, 0, 0]  # embedding, attention, feed-forward
