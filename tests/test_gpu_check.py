"""tests/gpu_check.py runs whole on a CPU, so that it is ready when a GPU is at hand, and finds what
is wrong.
"""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpu_check as G
from common import UserError

PARTS = ["smoke", "attention", "kernels", "passes", "round"]


def check(capsys, *flags) -> tuple[int, dict, str]:
    """The exit code, the summary and what was printed, in this process."""
    path = Path(flags[-1])
    with pytest.raises(SystemExit) as e:
        G.main([*map(str, flags[:-1]), "--device", "cpu", "--json", str(path)])
    return e.value.code, json.loads(path.read_text()), capsys.readouterr().out


@pytest.mark.slow
def test_every_part_passes_on_a_cpu(tmp_path):
    out = tmp_path / "out.json"
    done = subprocess.run([sys.executable, Path(G.__file__), *PARTS, "--device", "cpu", "--json",
                           out], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    r = json.loads(out.read_text())
    assert r["card"] == "CPU, tiny shapes" and r["torch"] == torch.__version__
    assert r.keys() >= {"date", "cuda", "triton", "cudnn"} and r["failures"] == {}
    first, *lines, last = done.stdout.splitlines()
    assert last == f"{len(r['figures'])} figures, {len(r['skipped'])} skipped, 0 failed"
    said = dict(line.split(": ", 1) for line in lines)
    assert said.keys() == r["figures"].keys() | r["skipped"].keys()  # one line a figure
    for name, value in r["figures"].items():
        assert said[name] == value if isinstance(value, str) else (
            value >= 0 or "_from_" in name), name  # extrapolated from times that are noise here
    for name in ("smoke.fp8", "kernels.fp8.256x384", "passes.70b_fp8_from_1_and_2_layers"):
        assert "compute capability 8.9 or better, not cpu" in r["skipped"][name]
    assert all(r["seconds"][part] > 0 for part in PARTS)
    f = r["figures"]
    for case in ("alone", *G.EXACT, "judge", "sampled"):
        assert f[f"smoke.float32.{case}.same_as_eager"] == "2/2"
    for case in G.EXACT:
        assert f[f"smoke.float32.{case}_same_as_alone"] == "2/2"
    # What RESULTS.md's table is filled from.
    names = {"passes.read_bandwidth.gb_per_s", "passes.8b_bf16.rows1.ms",
             "passes.8b_bf16.rows1.share_of_bandwidth", "passes.8b_int8.rows1.ms",
             "passes.8b_int4.rows1.ms", "passes.8b_bf16.first_token_of_70.ms",
             "passes.70b_int8_from_1_and_2_layers.rows6_over_rows1", "round.alone.rows6.ms",
             *(f"round.{draft}.{figure}" for draft in ("draft_int8", "draft_bf16", "draft_int4")
               for figure in ("tokens_per_s", "round_ms", "over_alone", "first_token_of_70.ms",
                              "drafting_ms_per_token"))}
    assert names <= f.keys(), names - f.keys()
    bytes_read = 1e9 * f["passes.read_bandwidth.gb_per_s"] * f[
        "passes.8b_bf16.rows1.share_of_bandwidth"] * f["passes.8b_bf16.rows1.ms"] / 1e3
    # 3 layers of q, k, v, o (3 * 256 * 256) and the feed-forward (3 * 256 * 256), 7 norms, LM head
    assert bytes_read == pytest.approx(2 * (3 * 6 * 256 ** 2 + 7 * 256 + 512 * 256))
    assert f["round.draft_int8.over_alone"] == pytest.approx(
        f["round.draft_int8.tokens_per_s"] / f["round.alone.tokens_per_s"])


def test_a_wrong_kernel_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    matmul = G.MODES["int8"].matmul
    monkeypatch.setattr(G.MODES["int8"], "matmul", lambda self, x: 1.02 * matmul(self, x))
    monkeypatch.setattr(G.MODES["int4"], "matmul", lambda self, x: torch.ones(1) @ torch.ones(2))
    code, r, text = check(capsys, "kernels", "attention", tmp_path / "out.json")
    assert code == 1
    assert r["failures"].keys() == {"kernels.int8.256x384", "kernels.int4.256x384"}
    assert re.fullmatch(r"Wrong: kernels.int8.256x384.error is 0.02\d*; up to 0.01 is right",
                        r["failures"]["kernels.int8.256x384"])
    assert r["failures"]["kernels.int4.256x384"].startswith("RuntimeError: ")
    assert r["figures"]["kernels.bf16.256x384.error"] < 0.004
    assert "attention.group4.rows5.cache512.at100.default.us" in r["figures"]
    last = text.splitlines()[-3:]
    assert last[0].endswith("2 failed") and [line.split(":")[0] for line in last[1:]] == [
        "FAILED kernels.int8.256x384", "FAILED kernels.int4.256x384"]


@pytest.mark.parametrize("last", [0, 1])
def test_split_kv_attention_is_held_against_float64(last, tmp_path, monkeypatch, capsys):
    """Another implementation stands in for the op; one that sees a position more is found."""
    def op(c, dim, pos):
        def attend(q, kv):
            k, v = (t.repeat_interleave(q.shape[2] // kv.shape[3], dim=1)
                    for t in kv.transpose(0, 2)[0].float().unbind(0))
            scores = torch.einsum("shd,nhd->hsn", q[0].float(), k) / dim ** 0.5
            scores.masked_fill_(torch.arange(len(kv)) > pos[:, None] + last, -torch.inf)
            return torch.einsum("hsn,nhd->shd", scores.softmax(-1), v).flatten(1)[None].to(q.dtype)
        return attend

    monkeypatch.setattr(G, "triton_attention", op)
    code, r, _ = check(capsys, "attention", tmp_path / "out.json")
    names = {f"attention.group{g}.triton" for g in ("2.rows1.cache256.at200",
                                                    "4.rows5.cache512.at100")}
    assert (code, r["failures"].keys()) == ((1, names) if last else (0, set()))
    assert all(r["failures"].get(name, "Wrong: ").startswith("Wrong: ") for name in names)
    assert all(f"{name}.error" in r["figures"] for name in names)


@pytest.mark.slow
def test_recorded_rounds_that_give_another_text_are_found(tmp_path, monkeypatch, capsys):
    def compiled(c, e, what):
        def other_text():
            accepted, tokens, sources = play_round()
            return accepted, [7] * len(tokens), sources

        play_round, e.round = e.round, other_text
        return e

    monkeypatch.setattr(G, "compiled", compiled)
    code, r, _ = check(capsys, "smoke", tmp_path / "out.json")
    assert code == 1 and r["failures"] == {
        "smoke.float32": "Wrong: smoke.float32.alone.same_as_eager: 0 of 2 texts are the same "
        "token for token",
        "smoke.int8": "Wrong: smoke.int8.judge.same_as_eager: 0 of 2 texts are the same token for "
        "token"}


def test_what_time_or_memory_is_lacking_for_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(G, "check_memory", lambda models, *rest: len(models) > 1 and G.refuse(
        (True, "both do not fit")))
    code, r, text = check(capsys, "round", tmp_path / "out.json")
    assert code == 0 and r["skipped"] == dict.fromkeys(
        ("round.draft_int8", "round.draft_bf16", "round.draft_int4"), "both do not fit")
    assert r["figures"]["round.alone.tokens_per_s"] > 0
    assert "round.draft_int4: skipped: both do not fit" in text
    monkeypatch.setattr(G, "LIMIT", -1)
    code, r, _ = check(capsys, "passes", "round", tmp_path / "out.json")
    assert code == 0 and not r["figures"] and r["skipped"]["round.70b_int8"] == (
        "the -1 s of this part are over")


def test_a_run_that_is_killed_leaves_what_it_found(tmp_path, monkeypatch, capsys):
    def killed(c):
        raise KeyboardInterrupt

    monkeypatch.setitem(G.PARTS, "passes", killed)
    with pytest.raises(KeyboardInterrupt):
        G.main(["kernels", "passes", "--device", "cpu", "--json", str(tmp_path / "out.json")])
    r = json.loads((tmp_path / "out.json").read_text())
    assert r["figures"]["kernels.bf16.256x384.error"] < 0.004 and "kernels.fp8.256x384" in r[
        "skipped"]


@pytest.mark.parametrize("flags, message", [
    (["smoke", "everything"], "invalid choice: 'everything'"),
    ([], "the following arguments are required: parts"),
    (["smoke", "--device", "cpu", "--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
    (["smoke", "--device", "cuda"], "--device cuda: this PyTorch sees no CUDA device"),
])
def test_bad_flags_are_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        G.main(flags)
