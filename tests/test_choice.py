"""Drafters by name in generate.py, eval.py and benchmark.py: the target's text with each of them,
rows, resuming, what is counted of memory, and what is refused.
"""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import benchmark as B
import checkpoint
import eval as E
import generate as G
import load
import test_eagle_head
from checkpoint import config_from, fingerprint
from common import UserError
from drafters import choice as C
from drafters.eagle import EagleDrafter
from drafters.eagle_head import EagleHead
from engine import Engine, generate
from evaluation import report
from helpers import random_model, randomize, run_command, save_checkpoint, tiny_config
from judge import JudgeHead
from ranks import memory
from test_memory import bytes_held
from test_tp import script, torchrun

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
CPU = "--device", "cpu"
ALL = "llama,eagle,eagle-tree,ngram"
DRAFTERS = {"chain": ["{}/eagle"], "static": ["{}/eagle", "--tree", "3,2,1"],
            "dynamic": ["{}/eagle", "--tree", "26"], "ngram": ["ngram"],
            "ngram, K = 3": ["ngram", "--speculate_k", "3"]}
PLOT = report.plot


def put_head(directory, target, config, seed=0):
    """An EAGLE head of random weights for the checkpoint directory `target`."""
    torch.manual_seed(seed)
    head = EagleHead.new(config_from(config), fingerprint(target), ffn_dim=80)
    randomize(head).save(directory, config, torch.float32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tiny random models with the demo's tokenizer, EAGLE heads, a judge, and six problems."""
    home = tmp_path_factory.mktemp("home")
    lines = (DEMO / "problems.jsonl").read_text().splitlines(keepends=True)
    (home / "problems.jsonl").write_text("".join(lines[i] for i in (0, 300, 600)))
    config = tiny_config(vocab_size=1024, max_position_embeddings=512)
    for name, noise in (("target", 0.0), ("draft", 0.01), ("other", 0.05)):
        model = random_model(config, seed=1, scale=0.05)  # so that it repeats itself
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        save_checkpoint(home / name, model, config)
        shutil.copy(DEMO / "target" / "tokenizer.model", home / name)
    put_head(home / "eagle", home / "target", config)
    put_head(home / "retrained", home / "target", config, seed=1)
    put_head(home / "others", home / "other", config)
    narrow = tiny_config(vocab_size=1024, hidden_size=32)
    put_head(home / "narrow", home / "target", narrow)
    put_head(home / "words", home / "target", tiny_config(vocab_size=1000))
    deep = config | {"num_hidden_layers": 7}
    save_checkpoint(home / "deep" / "target", random_model(deep, scale=0.05), deep)
    shutil.copy(DEMO / "target" / "tokenizer.model", home / "deep" / "target")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(test_eagle_head, "V", 1024)
        test_eagle_head.write_head(home / "deep" / "eagle", "EAGLE-3")
    torch.manual_seed(0)
    JudgeHead(torch.randn(1, 64) / 8, torch.zeros(1), 0.5,
              fingerprint(home / "target")).save(home / "judge.safetensors")
    return home


@pytest.fixture(autouse=True)
def short(monkeypatch):
    task = E.TASKS["demo"]
    monkeypatch.setattr(task, "max_new_tokens", 24)
    monkeypatch.setattr(task, "score", lambda self, example, text: SimpleNamespace(
        right=text.count("e") % 2 == 0, how="exact"))
    monkeypatch.setattr(report, "plot", lambda results, path: None)


def filled(home, args):
    return [str(a).replace("{}", str(home)) for a in args]


def flags_of(home, *args):
    return filled(home, ["--task", "demo", "--data", "{}/problems.jsonl", "--target", "{}/target",
                         "--draft", "{}/draft", "--eagle", "{}/eagle", "--judge",
                         "{}/judge.safetensors", "--speculate_k", "5", *CPU, *args])


# ---------------------------------------------------------------- generate.py

BASE = ["--target", "{}/target", "--prompt", "Mira has 3", "--max_new_tokens", "24",
        "--ignore_eos", *CPU]


def written(monkeypatch, home, tmp_path, *more):
    """What generate.py writes."""
    run_command(monkeypatch, G, *filled(home, [*BASE, "--json", tmp_path / "out.json", *more]))
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("name", DRAFTERS)
def test_every_drafter_gives_the_targets_text(home, tmp_path, monkeypatch, name):
    make = lambda *more: written(monkeypatch, home, tmp_path, *more)
    draft, k = ["--draft", *DRAFTERS[name]], {"static": 3, "dynamic": 8, "ngram, K = 3": 3}
    r = make(*draft)
    assert r["tokens"] == make()["tokens"] and r["accept"] == "standard"
    assert len(r["accept_counts"]) == k.get(name, C.CHAIN) + 1
    assert "ngram" not in name or r["mean_accepted"] > 0  # a random model repeats itself
    everything = make(*draft, "--accept", "judge:0", "--judge", "{}/judge.safetensors")
    kept = everything["accept_counts"]
    assert kept[0] == 0 or name.startswith("ngram") and 0 < kept[0] < everything["rounds"]
    draft += ["--temperature", "1", "--top_p", "0.9", "--max_new_tokens", "9", "--seed", "3"]
    assert make(*draft)["tokens"] == make(*draft)["tokens"] != r["tokens"][:9]


@pytest.mark.parametrize("tree", [[], ["--tree", "26"]], ids=" ".join)
def test_an_eagle_3_head_reads_three_layers(home, tmp_path, monkeypatch, tree):
    make = lambda *more: written(monkeypatch, home / "deep", tmp_path, *more)
    assert make("--draft", "{}/eagle", *tree)["tokens"] == make()["tokens"]


def test_a_directory_named_ngram_is_one(home, tmp_path, monkeypatch):
    shutil.copytree(home / "eagle", tmp_path / "ngram")
    monkeypatch.chdir(tmp_path)
    r = written(monkeypatch, home, tmp_path, "--draft", "./ngram", "--tree", "2,2")
    assert len(r["accept_counts"]) == 3


def test_a_chat_keeps_what_an_eagle_tree_has_read(home, tmp_path, monkeypatch):
    """The turns' texts, where the caches grow between them and a prompt goes on from the last."""
    said = {}
    for name, more in (("alone", ()), ("tree", ("--draft", "{}/eagle", "--tree", "4,2"))):
        lines = iter(["Mira has 3 eggs " * 8, "Tom finds 4", "How many"])
        monkeypatch.setattr(G, "read_line", lambda lines=lines: next(lines, None))
        run_command(monkeypatch, G, *filled(home, [
            "--target", "{}/target", "--interactive", "--max_new_tokens", "60", "--ignore_eos",
            "--json", tmp_path / "chat.json", *CPU, *more]))
        said[name] = [t["tokens"] for t in json.loads((tmp_path / "chat.json").read_text())]
    assert said["alone"] == said["tree"] and len(said["tree"]) == 3


EAGLE, LLAMA, NGRAM = (["--draft", d] for d in ("{}/eagle", "{}/draft", "ngram"))
BAD = [
    (["--tree", "4,2"], "--tree needs an EAGLE head as --draft"),
    ([*LLAMA, "--tree", "4,2"], "--tree needs an EAGLE head as --draft; {}/draft holds a Llama"),
    ([*NGRAM, "--tree", "26"], "--tree needs an EAGLE head"),
    *(([*EAGLE, "--tree", tree], f"--tree {tree}: give whole numbers from 1") for tree in
      ("", "0", "4,0", "4,-1", "4,,2", "2.5", "x", "4;2", "nan", "26:", "26:0", "26:x",
                  "4,2:2", "26:3:2")),
    ([*EAGLE, "--tree", "9" * 5000], "--tree 9999"),
    ([*EAGLE, "--tree", "10,10,10"], "--tree 10,10,10 has 1110 tokens; 512 is the most"),
    ([*EAGLE, "--tree", "513"], "--tree 513 has 513 tokens; 512 is the most"),
    ([*EAGLE, "--tree", "512"], "a round of 512 drafted tokens does not fit the context of 512"),
    ([*EAGLE, "--speculate_k", "512"], "a round of 512 drafted tokens does not fit"),
    ([*NGRAM, "--speculate_k", "512"], "a round of 512 drafted tokens does not fit"),
    *(([*EAGLE, "--tree", tree, "--speculate_k", "4"], f"--speculate_k is 4, and --tree {shape} "
       f"has {n} levels; leave out") for tree, shape, n in (("4,2,1", "4,2,1", 3), ("26", "26:8", 8)
                                                           )),
    ([*EAGLE, "--tree", "6:7"], "--tree 6:7 can have at most 6 levels"),
    ([*EAGLE, "--tree", "60:33"], "--tree 60:33 can have at most 32 levels"),
    ([*EAGLE, "--tree", "11:1"], "--tree 11:1: so few levels have room for 10 tokens"),
    ([*NGRAM, "--accept", "kl:0.5"], "rule kl:0.5 compares the draft's distribution"),
    ([*NGRAM, "--draft_dtype", "float32"], "--draft_dtype is of a model's weights"),
    ([*NGRAM, "--speculate_k", "0"], "--speculate_k is 0"),
    (["--draft", "{}/others"], "was trained on target"),
    (["--draft", "{}/narrow"], "is for a target of width 32"),
    (["--draft", "{}/words"], "is for a target of vocabulary 1000"),
    (["--draft", "{}/nowhere"], "nowhere does not exist"),
]


@pytest.mark.parametrize("args, message", BAD, ids=range(len(BAD)))
def test_what_does_not_fit_is_one_line_before_a_models_weights_are_read(
        home, args, message, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("weights were read"))
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, G, *filled(home, ["--target", "{}/target", "--prompt", "x", *CPU,
                                                   *args]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("{}", str(home)) in err


# ---------------------------------------------------------------- trees

def test_the_size_of_a_tree_is_what_is_drafted():
    nothing = SimpleNamespace(taps=())
    size = lambda shape: EagleDrafter(nothing, nothing, shape.tree).size(shape.height)
    for text, height in (("1", 1), ("7", 7), ("10", 8), ("512", 8), ("4,2,1", 3), ("3,1,1,2", 4)):
        shape = C.parse_tree(text)
        assert shape.height == height and C.parse_tree(str(shape)) == shape
        assert size(shape) == shape.tokens
    assert C.parse_tree("4,2,1").tokens == 4 + 8 + 8 and str(C.parse_tree("26")) == "26:8"
    fitting = {}
    for tokens in (1, 5, 10, 11, 60, 110, 111, 400):
        for k in range(1, 34):
            try:
                shape = C.parse_tree(f"{tokens}:{k}")
            except UserError:
                continue
            assert size(shape) == tokens == shape.tokens
            fitting.setdefault(tokens, []).append(k)
    assert {n: (ks[0], ks[-1]) for n, ks in fitting.items()} == {
        1: (1, 1), 5: (1, 5), 10: (1, 10), 11: (2, 11), 60: (2, 32), 110: (2, 32), 111: (3, 32),
        400: (5, 32)}


def test_a_tree_wider_than_the_vocabulary(home):
    target = random_model(tiny_config(vocab_size=9))
    for tree, n in (("11", 10), ("3,12", 12)):
        with pytest.raises(UserError, match=f"has {n} children, the target 9 tokens"):
            C.make_drafter("eagle-tree", target, tree=C.parse_tree(tree))


# ---------------------------------------------------------------- eval.py

def rows_of(out) -> dict:
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {(a["rule"], a["id"]): a for a in lines}


def test_every_rule_with_every_drafter(home, tmp_path, capsys):
    """First with the Llama draft alone, as before there were others; then its answers count."""
    out, rules = tmp_path / "out", ["--rules", "target,draft,standard,judge"]
    plain = [f for f in flags_of(home, *rules, "--out", out)]
    i = plain.index("--eagle")
    del plain[i:i + 2]
    E.main(plain)
    before = (out / "answers.jsonl").read_bytes()
    settings = json.loads((out / "settings.json").read_text())
    assert settings["rules"] == ["target", "draft", "standard", "judge"]
    assert settings.keys() & {"eagle", "eagle_name", "tree"} == set()
    shown = capsys.readouterr().out
    assert "drafter" not in shown and "on 3 of 3 problems (float32)" in shown

    more = flags_of(home, *rules, "--out", out, "--drafters", ALL, "--tree", "12")
    E.main(more)
    assert (out / "answers.jsonl").read_bytes().startswith(before)
    rows = ["target", "draft", "standard", "standard/eagle", "standard/eagle-tree",
            "standard/ngram", "judge", "judge/eagle", "judge/eagle-tree", "judge/ngram"]
    got = rows_of(out)
    assert {row for row, _ in got} == set(rows) and len(got) == 30
    for row, i in got:
        if row.startswith("standard"):
            assert got[row, i]["tokens"] == got["target", i]["tokens"], row
    r = json.loads((out / "results.json").read_text())
    for row in rows:
        m = r["rules"][row]
        assert (m["rule"], m["drafter"]) == (row.split("/")[0], (
            row.split("/") + ["llama"])[1] if row not in ("target", "draft") else None)
        assert (m["mean_accepted"] is None) == (m["drafter"] is None)
    assert r["standard_equals_target"] == {"same": 12, "of": 12, "different": []}
    shown = capsys.readouterr().out
    for line in ("| judge    | eagle-tree |", "| target   |          – |",
                 "demo: target with draft and eagle, K = 5, tree 12:8, greedy",
                 "on 12 of 12 answers with llama, eagle, eagle-tree, ngram (float32)"):
        assert line in shown, shown
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["eagle_name"], settings["tree"]) == ("eagle", "12:8")

    # The same again makes nothing, other heads and trees are refused, --rescore keeps the columns.
    data = (out / "answers.jsonl").read_bytes()
    E.main(more)
    for other, message in ((["--tree", "12:5"], "tree was 12:8, now 12:5"),
                           (["--eagle", str(home / "retrained")], "eagle was [0-9a-f]+, now")):
        with pytest.raises(UserError, match=message):
            E.main([*more, *other])
    E.main(plain)
    assert (out / "answers.jsonl").read_bytes() == data
    capsys.readouterr()
    E.main([*flags_of(home)[:4], "--out", str(out), "--rescore"])
    assert "| judge    | eagle-tree |" in capsys.readouterr().out


def test_rows_are_made_by_the_drafters_they_name(home, tmp_path):
    """With a static tree of another height than K, and without the Llama, which none names."""
    args = E.parse_args(filled(home, [
        "--task", "demo", "--data", "{}/problems.jsonl", "--target", "{}/target", "--eagle",
        "{}/eagle", *CPU, "--rules", "topk:40", "--out", tmp_path, "--drafters", "eagle,eagle-tree",
        "--tree", "3,2", "--speculate_k", "4", "--draft", "{}/draft"]))
    task, eagle = E.TASKS["demo"](), load.load_eagle(home / "eagle", home / "target")
    target = checkpoint.load(home / "target", dtype=torch.float32)
    session = E.Session(args, task.load(home / "problems.jsonl"))
    assert session.models.draft is None and len(session.engines) == 2
    for row, tree, k in (("topk:40/eagle", None, 4), ("topk:40/eagle-tree", (3, 2), 2)):
        e = Engine(target, EagleDrafter(eagle, target, tree), None, "topk", 40, k)
        assert session.engines[row].speculate_k == k
        for i, prompt in enumerate(session.prompts):
            r, a = generate(e, prompt, 24, session.tokenizer.eos_ids), session.answer(row, i)
            assert (a["rule"], a["tokens"], a["rounds"]) == (row, r.tokens, r.rounds)


def test_the_default_drafters_are_what_is_given(home):
    parse = lambda *args: E.parse_args(filled(home, [
        "--task", "demo", "--data", "d", "--target", "t", "--out", "o", *CPU, *args]))
    draft, eagle = ["--draft", "d"], ["--eagle", "e"]
    for args, drafters, tree in ((draft, ["llama"], None), (eagle, ["eagle"], None),
                                 ([*draft, *eagle], ["llama", "eagle"], None),
                                 ([*eagle, "--tree", "4,2"], ["eagle", "eagle-tree"],
                                  C.Shape((4, 2), 2)),
                                 ([*eagle, "--drafters", "ngram, eagle-tree,ngram"],
                                  ["ngram", "eagle-tree"], C.Shape(26, 8))):
        args = parse(*args)
        assert (args.drafters, args.tree) == (drafters, tree)
        assert ("draft" in args.rows) == ("llama" in drafters)
    rows = parse("--drafters", "ngram,eagle", *eagle, "--rules", "target,standard,topk:3").rows
    assert rows == ["target", "standard/ngram", "standard/eagle", "topk:3/ngram", "topk:3/eagle"]
    with pytest.raises(UserError, match="rule topk:3 needs --draft DIR, or another drafter"):
        parse("--rules", "target,topk:3")


@pytest.mark.parametrize("args, message", [
    (["--drafters", "medusa"], "'medusa' is not a drafter; use llama, eagle, eagle-tree, ngram"),
    (["--drafters", "ngram,"], "'' is not a drafter"),
    (["--drafters", "llama"], "drafter llama needs --draft DIR"),
    (["--drafters", "ngram", "--rules", "draft"], "rule draft needs --draft DIR"),
    (["--drafters", "ngram,eagle-tree"], "drafter eagle-tree needs --eagle DIR"),
    (["--drafters", "eagle", "--eagle", "e", "--tree", "4,2"],
     "--tree is the drafter eagle-tree's"),
    (["--drafters", "ngram", "--rules", "standard,kl:0.5"], "rule kl:0.5 compares the draft's"),
    (["--drafters", "eagle-tree", "--eagle", "e", "--tree", "4,2", "--speculate_k", "3"],
     "--speculate_k is 3, and --tree 4,2 has 2 levels"),
    (["--replay", "f", "--drafters", "ngram"], "leave out --drafters, --eagle and --tree"),
    (["--replay", "f", "--eagle", "e"], "leave out --drafters, --eagle and --tree"),
])
def test_what_eval_refuses(home, args, message):
    with pytest.raises(UserError, match=message) as e:
        E.main(filled(home, ["--task", "demo", "--data", "d", "--target", "{}/target", "--out",
                             "o", *CPU, "--rules", "standard", *args]))
    assert "\n" not in str(e.value)


def test_a_head_that_is_refused_leaves_nothing(home, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("weights were read"))
    shutil.copytree(home / "eagle", tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    for head, message in ((home / "others", "was trained on target"),
                          (home / "draft", "draft holds no EAGLE head"),
                          (home / "nowhere", "cannot read .*nowhere/config.json"),
                          (tmp_path / "pickled", "convert_hf_checkpoint.py --checkpoint_dir")):
        with pytest.raises(UserError, match=message):
            E.main([*flags_of(home, "--eagle", head, "--out", tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_the_picture_tells_drafters_by_markers(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt
    seen = []
    monkeypatch.setattr(report, "save_picture", lambda figure, path: seen.extend(
        (c.get_label(), c.lines[0].get_marker(), len(c.lines[0].get_xdata()))
        for c in figure.axes[0].containers))
    row = lambda rule, drafter, x: {"rule": rule, "drafter": drafter, "speed_up": x,
                                    "accuracy": 0.5, "interval": (0.4, 0.6)}
    rows = [row("target", None, 1), row("judge:0.5", "llama", 2), row("judge:0.9", "llama", 3),
            row("judge:0.5", "ngram", 4)]
    settings = {"task": "demo", "speculate_k": 5, "dtype": "float32", "device": "cpu",
                "target_name": "a", "eagle_name": "e"}
    PLOT({"rules": dict(enumerate(rows)), "settings": settings}, tmp_path / "x.png")
    assert seen == [("target", "s", 1), ("judge", "o", 2), ("judge/ngram", "X", 1)]
    plt.close("all")


# ---------------------------------------------------------------- benchmark.py

def test_the_benchmark_compares_drafters_on_prompts(home, capsys, monkeypatch):
    reserve, grown = Engine.reserve, []
    monkeypatch.setattr(Engine, "reserve", lambda e, length: (
        grown.append(-e.capacity), reserve(e, length), grown.append(e.capacity)))
    flags = filled(home, ["--target", "{}/target", "--draft", "{}/draft", "--eagle", "{}/eagle",
                          "--prompts", "{}/problems.jsonl", "--no_compile", "--repeats", "1",
                          "--max_new_tokens", "12", "--accepted", "2", "--rows", "2",
                          "--prompt_tokens", "9", *CPU])
    r = B.main([*flags, "--speculate_k", "3", "--drafters", ALL, "--tree", "300:4",
                "--rules", "standard,topk:9"])
    assert sum(grown) == 0 and -512 in grown  # what was counted is enough for a tree
    made = {v["variant"]: v for v in r["real"]["variants"]}
    assert list(made) == ["target", *(f"{rule}{name} K={k}" for name, k in (
        ("", 3), ("/eagle", 3), ("/eagle-tree", 4), ("/ngram", 3)) for rule in (
        "standard", "topk:9"))]
    assert all(v["same_tokens_as_target"] == 1 for name, v in made.items() if "topk" not in name)
    assert "standard/eagle-tree K=4" in capsys.readouterr().out
    args = B.parse_args([*flags, "--drafters", "eagle-tree,llama"])  # K's are the chains'
    assert args.ks == {"eagle-tree": [8], "llama": [4, 8, 16, 32]} and args.drafted == 32
    args = B.parse_args([*flags, "--drafters", "eagle-tree,llama", "--tree", "60"])
    assert args.drafted == 60


@pytest.mark.parametrize("args, message", [
    (["--drafters", "ngram"], "--drafters, --eagle and --tree are used with --prompts"),
    (["--eagle", "{}/eagle"], "--drafters, --eagle and --tree are used with --prompts"),
    (["--prompts", "{}/problems.jsonl", "--drafters", "eagle"], "drafter eagle needs --eagle DIR"),
    (["--prompts", "{}/problems.jsonl", "--drafters", "ngram", "--rules", "kl:1"],
     "rule kl:1 compares"),
    (["--prompts", "{}/problems.jsonl", "--drafters", "eagle-tree", "--eagle", "{}/eagle", "--tree",
      "26", "--speculate_k", "8,32"], "--speculate_k is 32, and --tree 26:8 has 8 levels"),
    (["--prompts", "{}/problems.jsonl", "--drafters", "eagle-tree", "--eagle", "{}/eagle", "--tree",
      "512"], "a round of 512 drafted tokens does not fit the models' context of 512"),
    (["--prompts", "{}/problems.jsonl", "--eagle", "{}/others"], "was trained on target"),
])
def test_what_the_benchmark_refuses(home, monkeypatch, args, message):
    monkeypatch.setattr(B, "build", lambda *a: pytest.fail("it was built"))
    monkeypatch.setattr(B, "bandwidth", lambda *a: 1.0)
    with pytest.raises(UserError, match=message):
        B.main(filled(home, ["--target", "{}/target", "--draft", "{}/draft", *CPU, *args]))


# ---------------------------------------------------------------- memory

@pytest.mark.parametrize("at, dtype, own", [("{}", torch.float32, torch.float32),
                                            ("{}", torch.bfloat16, torch.float32),
                                            ("{}/deep", torch.float32, torch.bfloat16)])
def test_what_a_head_holds_is_what_was_computed(home, at, dtype, own):
    at = Path(*filled(home, [at]))
    head = load.load_eagle(at / "eagle", at / "target", dtype=own)
    target = checkpoint.load(at / "target", dtype=dtype)
    m = load.eagle_memory(at / "eagle", target.config, own, 1024, "cpu")
    assert m.weights == bytes_held(head)
    for tree in (None, (4, 2, 1), (1,) * 512, 26, 512):
        drafter = EagleDrafter(head, target, tree)
        drafter.new_cache(1024)
        tensors = [*drafter.cache.kv, drafter.cache.rope]
        held = sum(t.nbytes for t in (*tensors, drafter.hidden))
        spare = 1024 + load.GROWING - len(tensors[0])  # slots that other trees take
        assert spare >= 0 and m.cache == held + spare * sum(t[0].nbytes for t in tensors), tree


@pytest.mark.parametrize("command", ["generate", "eval", "benchmark"])
def test_a_head_that_does_not_fit_is_named(home, tmp_path, monkeypatch, command):
    monkeypatch.setattr(memory, "free_memory", lambda device: 3e6)
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("it was loaded"))
    flags = filled(home, ["--target", "{}/target", *CPU])
    flags += filled(home, {
        "generate": ["--draft", "{}/eagle", "--prompt", "x"],
        "eval": ["--eagle", "{}/eagle", "--task", "demo", "--data", "{}/problems.jsonl", "--out",
                 tmp_path / "out"],
        "benchmark": ["--draft", "{}/draft", "--eagle", "{}/eagle", "--prompts",
                      "{}/problems.jsonl"]}[command])
    monkeypatch.setattr(sys, "argv", [command, *flags])
    with pytest.raises(UserError, match=r"target \d MB, .*EAGLE head 0 MB, caches \d MB and "):
        {"generate": G, "eval": E, "benchmark": B}[command].main()


# ---------------------------------------------------------------- several ranks

RANKS = """
import json, os, generate
from drafters import length
def main():
    length.ENOUGH = 100.0 * int(os.environ["RANK"])  # clocks differ; the ranks play on together
    for args in json.load(open(sys.argv[1])):
        sys.argv = ["generate", *args]
        generate.main()
"""


@pytest.mark.slow
def test_ranks_say_what_one_process_says(home, tmp_path, monkeypatch):
    runs, want = [], []
    for i, draft in enumerate(DRAFTERS.values()):
        more = ["--draft", *draft, "--temperature", str(i % 2), "--judge", "{}/judge.safetensors"]
        want.append(written(monkeypatch, home, tmp_path, *more)["tokens"])
        runs.append([*filled(home, BASE), "--json", str(tmp_path / f"{i}.json"),
                     *filled(home, more)])
    for draft in "{}/draft", "{}/eagle":
        more = ["--draft", draft, "--speculate_k", "auto"]
        want.append(written(monkeypatch, home, tmp_path)["tokens"])
        runs.append([*filled(home, BASE), "--json", str(tmp_path / f"{len(runs)}.json"),
                     *filled(home, more)])
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = torchrun(script(tmp_path, RANKS), tmp_path / "runs.json")
    assert done.returncode == 0, done.stderr
    assert want == [json.loads((tmp_path / f"{i}.json").read_text())["tokens"]
                    for i in range(len(runs))]
