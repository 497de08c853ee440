"""train_eagle.py: the target's answers, what a pair predicts, the chain that is trained, resuming
after any kill, and the command line.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import train_eagle as T
from checkpoint import config_from, fingerprint, load
from common import UserError
from drafters import eagle_training as L
from drafters.eagle_head import EagleHead
from engine import Engine, generate
from helpers import (
    ROOT,
    one_thread,  # noqa: F401
    random_model,
    run_command,
    save_checkpoint,
    tiny_config,
)
from ranks import memory
from tokenizer import Tokenizer

DEMO = ROOT / "checkpoints" / "demo" / "target"
CONFIG = tiny_config(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
LARGE = CONFIG | {"vocab_size": 1024, "max_position_embeddings": 64, "bos_token_id": 1}
QUICK = "--max_new_tokens", 12, "--batch", 64, "--epochs", 3, "--unroll", 2, "--device", "cpu"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny random target with the demo's tokenizer, another target, and prompts."""
    home = tmp_path_factory.mktemp("eagle")
    for name, seed in ("target", 0), ("other", 1):
        save_checkpoint(home / name, random_model(LARGE, seed), LARGE)
        shutil.copy(DEMO / "tokenizer.model", home / name)
    prompts = ["Question:", "Answer: 3", "the", "Ada has 5 apples.", "def f", "A) B) C)", "the"]
    lines = [json.dumps({"prompt": p, "answer": 1, "number": "x"}) for p in prompts]
    (home / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return home


def train(monkeypatch, home, out, *more, target="target", prompts="prompts.jsonl"):
    run_command(monkeypatch, T, "--target", home / target, "--prompts", home / prompts, "--out",
                out, *QUICK, *more)


def tiny_head(seed=0, **kwargs):
    torch.manual_seed(seed)
    head = EagleHead.new(config_from(CONFIG), "t", **kwargs)
    for p in head.parameters():
        p.data.normal_(0, 0.15) if p.dim() == 2 else p.data.uniform_(0.5, 1.5)
    return head.requires_grad_(False)


def texts_of(seed=0, lengths=((4, 9), (2, 7), (6, 3))):
    """Texts of random tokens: (prompt, answer) lengths."""
    rng = torch.Generator().manual_seed(seed)
    return [L.Text(torch.randint(3, 101, (a + b,), generator=rng).tolist(), a) for a, b in lengths]


# ---------------------------------------------------------------- answers

def test_answers_side_by_side_are_those_of_the_engine_alone():
    """Prompts of several lengths, an EOS that some reach and one holds, the context's end."""
    target = random_model(CONFIG | {"max_position_embeddings": 40}, 3)
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 101, (n,), generator=rng).tolist()
               for n in (5, 9, 5, 17, 30, 12, 1)]
    free = [generate(Engine(target), p, 20).tokens for p in prompts]
    eos = [free[1][4], free[3][0]]  # somewhere in the middle of one, at the beginning of another
    prompts[4][20] = eos[0]  # as in a chat, after a turn
    want = [generate(Engine(target), p, 20, eos).tokens for p in prompts]
    assert len({len(a) for a in want}) > 2 and len(want[4]) == 10 and len(want[3]) == 1
    assert T.answer(target, prompts, 20, eos, 0.0, seed=0) == want


def test_sampled_answers_have_the_targets_distribution_and_depend_on_the_seed():
    target, n = random_model(CONFIG), 4000
    draw = lambda seed: [a[0] for a in T.answer(target, [[5, 6]] * n, 1, [], 0.7, seed)]
    tokens = draw(1)
    assert tokens == draw(1) != draw(2)
    hidden = target.features(torch.tensor([[5, 6]]), torch.arange(2), target.new_cache(2))
    p = (target.output(hidden[0, -1]) / 0.7).softmax(-1)
    seen = torch.bincount(torch.tensor(tokens), minlength=101) / n
    assert (seen - p).abs().max() < 5 * math.sqrt(0.25 / n) and p.max() < 0.9


# ---------------------------------------------------------------- the chain that is trained

def read_alone(target, text):
    ids = torch.tensor([text.ids])
    hidden = target.features(ids, torch.arange(ids.shape[1]), target.new_cache(ids.shape[1]))
    return ids[0], hidden[0]


def chain(head, target, text, begin, steps, tokens=None):
    """Brute force, with the head's own cache: the features of `steps` drafts from pair `begin`.

    They follow the text's tokens, or where `tokens` is a list their own, which join it.
    """
    ids, hidden = read_alone(target, text)
    cache = head.new_cache(len(ids) + steps)
    pos = torch.arange(begin + 1)
    state = head.features(target.embed(ids[None, 1:begin + 2]), hidden[None, :begin + 1], pos,
                          cache)[:, -1:]
    found = [state[0, 0]]
    for j in range(1, steps):
        if tokens is not None:
            tokens.append(int(target.output(state[0, 0]).argmax()))
        token = torch.tensor(tokens[-1]) if tokens else ids[begin + j + 1]
        state = head.features(target.embed(token)[None, None], state, pos[-1:] + j, cache)
        found.append(state[0, 0])
    return found


@pytest.mark.parametrize("bias", (True, False))
def test_unroll_is_the_chain_that_a_drafter_plays(bias):
    target, head, text = random_model(CONFIG), tiny_head(bias=bias), texts_of()[0]
    ids, hidden = read_alone(target, text)
    got = L.unroll(head, L.embeds_of(head, target, ids[None]), hidden[None], 4)
    for begin in range(len(ids) - 5):
        for j, want in enumerate(chain(head, target, text, begin, 4)):
            torch.testing.assert_close(got[j][0, begin + j], want, atol=1e-4, rtol=1e-4)


def test_the_loss_by_brute_force():
    """Every chain of a draft in the answer, one by one: what it should predict is the state of
    the next token and the distribution of the one after, and nothing beyond the text's end.
    """
    target, head, texts, steps = random_model(CONFIG), tiny_head(), texts_of(), 4
    terms = [[] for _ in range(steps)]
    for text in texts:
        ids, hidden = read_alone(target, text)
        for begin in range(text.start - 1, len(ids) - 2):
            states = chain(head, target, text, begin, min(steps, len(ids) - 2 - begin))
            for j, state in enumerate(states):
                true = hidden[begin + j + 1]
                p, q = (target.output(x).log_softmax(-1) for x in (true, state))
                near = torch.where((d := (state - true).abs()) < 1, d * d / 2, d - 0.5).mean()
                terms[j].append(float(near + 0.1 * (p.exp() * (p - q)).sum()))
    hidden, ids, learn = L.read_texts(target, texts)
    loss = L.loss_of(head, L.columns(target), L.embeds_of(head, target, ids), hidden, learn,
                     torch.zeros_like(hidden), steps)
    want = sum(sum(t) / len(t) for t in terms) / steps
    assert [len(t) for t in terms] == [8 + 6 + 2, 7 + 5 + 1, 6 + 4, 5 + 3]
    assert float(loss) == pytest.approx(want, rel=1e-4)


def test_noise_is_on_what_is_read_and_not_on_what_is_predicted():
    target, head, texts = random_model(CONFIG), tiny_head(), texts_of()
    hidden, ids, learn = L.read_texts(target, texts)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    embeds, columns = L.embeds_of(head, target, ids), L.columns(target)
    got = L.loss_of(head, columns, embeds, hidden, learn, noise, 1)
    (state,) = L.unroll(head, embeds, hidden + noise, 1)
    state, true = state[:, :-1][learn[:, :-1]], hidden[:, 1:][learn[:, :-1]]
    cross = F.kl_div(target.output(state).log_softmax(-1), target.output(true).log_softmax(-1),
                     reduction="batchmean", log_target=True)
    torch.testing.assert_close(got, F.smooth_l1_loss(state, true) + 0.1 * cross)


def test_runs_are_those_of_chains_that_feed_on_their_own_tokens():
    """On texts that the head drafts in part: its own drafts, with some tokens changed."""
    target, head, begin = random_model(CONFIG), tiny_head(), 3
    texts = []
    for i, t in enumerate(texts_of(1, ((4, 20), (4, 14), (5, 9)))):
        own = []
        chain(head, target, t, begin, 12, own)
        ids = t.ids[:begin + 2] + own
        ids[-3 - i] = 7
        texts.append(L.Text(ids, 4))
    for text, run in zip(texts, L.runs(head, target, texts)):
        assert len(run) == len(text.ids) - 1 - text.start
        for n, begin in zip(run.tolist(), range(text.start - 1, len(text.ids) - 2)):
            own = []
            chain(head, target, text, begin, L.DEPTH + 1, own)
            want = [*text.ids[begin + 2:], *[None] * L.DEPTH]
            same = [a == b for a, b in zip(own, want)][:L.DEPTH]
            assert n == (same.index(False) if False in same else L.DEPTH)
    every = torch.cat(L.runs(head, target, texts)).tolist()
    assert max(every) > 4 and min(every) == 0


def test_rounds_of_a_text():
    assert L.played([2, 9, 9, 3, 0, 1, 0], 16) == (2 + 3, 2)  # from token 3 on all that is left
    assert L.played([5, 4, 3, 2, 1, 0], 2) == (2 + 2, 2)
    assert L.played([0, 0, 0], 4) == (0, 3)


def test_batches_hold_every_text_once_and_change_with_the_epoch():
    texts = [L.Text([0] * (5 + i % 40), 2) for i in range(100)]
    epochs = [L.order(texts, 128, 0, e) for e in (0, 1)]
    for batches in epochs:
        assert sorted(i for b in batches for i in b) == list(range(100))
        assert all(len(b) * max(len(texts[i].ids) for i in b) <= 128 for b in batches)
    assert epochs[0] != epochs[1] and epochs[0] == L.order(texts, 128, 0, 0)
    assert L.order(texts, 1, 0, 0) != sorted(L.order(texts, 1, 0, 0))
    assert {len(b) for b in L.order(texts, 1, 0, 0)} == {1}


# ---------------------------------------------------------------- the command

def test_a_head_learns_its_targets_answers_and_belongs_to_it(monkeypatch, home, tmp_path, capsys):
    """A target that loops: held-out answers end as the others do, and the chain drafts them."""
    out, before = tmp_path / "eagle", (home / "target" / "model.safetensors").read_bytes()
    train(monkeypatch, home, out, "--epochs", 100, "--lr", 1e-2, "--ffn_dim", 48, "--val_share",
          0.2, "--unroll", 3)
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 10 and losses[-1] < 0.3 * losses[0]
    assert sorted(p.name for p in out.iterdir()) == [
        "answers.jsonl", "answers.settings.json", "config.json", "model.safetensors"]
    assert (home / "target" / "model.safetensors").read_bytes() == before

    target, tokenizer = load(home / "target", "cpu", torch.float32), Tokenizer.from_dir(
        home / "target")
    mark = fingerprint(home / "target")
    head = EagleHead.load(out, target.config, "target", mark)
    assert head.config.ffn_dim == 48 and head.target == mark
    assert not any(t in load_file(out / "model.safetensors")
                   for t in ("embed_tokens.weight", "lm_head.weight"))
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert {(a["source_model"], a["chat"], a["ended"], a["max_new_tokens"]) for a in lines} == {
        ("target", False, False, 12)}  # what make_judge_data.py's mine reads
    texts = []
    for line in lines:
        ids = tokenizer.prompt(line["prompt"])
        want = generate(Engine(target), ids, 12, tokenizer.eos_ids).tokens
        assert line["tokens"] == want and line["answer"] == tokenizer.decode_new(ids, want)
        texts.append(L.Text(ids + want, len(ids)))
    found = torch.cat(L.runs(head, target, texts)).float()
    new = EagleHead.new(target.config, mark).requires_grad_(False)
    assert found.mean() > 2.5 > 0.5 > torch.cat(L.runs(new, target, texts)).float().mean()
    with pytest.raises(UserError, match=f"was trained on target {mark}, but other is"):
        EagleHead.load(out, target.config, "other", fingerprint(home / "other"))

    assert "1 held-out answers, 11 chains of 16" in said
    before = (out / "model.safetensors").read_bytes()
    for name, message in (("target", f"{out / 'model.safetensors'} is there already; remove it"),
                          ("other", f"--out {out} holds another target's head")):
        with pytest.raises(SystemExit):
            train(monkeypatch, home, out, target=name)
        assert message in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == before


def test_a_head_for_the_most_frequent_tokens(monkeypatch, home, tmp_path, capsys):
    """Of the training answers, with the target's own rows for them; the loss is over these."""
    out, seen = tmp_path / "eagle", []
    real = T.loss_of
    monkeypatch.setattr(T, "loss_of", lambda head, columns, *more: (
        seen.append(columns), real(head, columns, *more))[1])
    train(monkeypatch, home, out, "--draft_vocab_size", 5, "--val_share", 0.2)
    target = load(home / "target", "cpu", torch.float32)
    lines = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    lines = sorted(lines, key=lambda line: line["number"])
    held = T.split([{"prompt": line["prompt"]} for line in lines], 0.2, 0)
    counts = Counter(t for line, h in zip(lines, held) if not h for t in line["tokens"])
    want = sorted(sorted(range(1024), key=lambda t: (-counts[t], t))[:5])
    head = EagleHead.load(out, target.config, "target", fingerprint(home / "target"))
    assert head.ids.tolist() == want
    rows = target.output.weight[want]
    assert torch.equal(head.output.weight, rows.bfloat16().float())
    assert all(torch.equal(columns, rows) for columns in seen) and seen


def test_the_demos_head_drafts_its_target():
    """On evaluation problems, of which it has seen none: far more than the Llama draft's 3.9."""
    directory = DEMO.parent / "eagle"
    target, tokenizer = load(DEMO, "cpu", torch.float32), Tokenizer.from_dir(DEMO)
    head = EagleHead.load(directory, target.config, DEMO, fingerprint(DEMO))
    assert head.target and sum(p.stat().st_size for p in directory.iterdir()) < 5e6
    lines = (DEMO.parent / "problems.jsonl").read_text().splitlines()[::90]
    prompts = [tokenizer.prompt(json.loads(line)["prompt"]) for line in lines]
    answers = T.answer(target, prompts, 160, sorted(tokenizer.eos_ids), 0.0, 0)
    runs = L.runs(head, target, [L.Text(p + a, len(p)) for p, a in zip(prompts, answers)])
    accepted, rounds = map(sum, zip(*(L.played(run.tolist(), 16) for run in runs)))
    assert accepted / rounds > 9


class Killed(Exception):
    pass


def killed_after(monkeypatch, name, calls, of=T):
    """Have the function fail in place of its call number `calls`."""
    real, made = getattr(of, name), []

    def function(*args):
        made.append(1)
        if len(made) > calls:
            raise Killed
        return real(*args)

    monkeypatch.setattr(of, name, function)


def test_any_kill_and_the_same_command_give_the_same_bytes(monkeypatch, home, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setattr(T, "TOGETHER", 2)
    sampled = "--temperature", 0.9
    train(monkeypatch, home, whole, *sampled)
    for name, calls, of in (("append", 1, T.AnswerLog), ("append", 2, T.AnswerLog),
                            ("train_step", 0, T), ("train_step", 3, T), ("train_step", 2, T),
                            ("report", 0, T)):
        with monkeypatch.context() as m, pytest.raises(Killed):
            m.setattr(T, "SAVE_SECONDS", -1)
            killed_after(m, name, calls, of)
            train(m, home, broken, *sampled)
        if name == "train_step" and calls == 2:  # two more after the three before
            assert json.loads(metadata(broken / T.STATE)["step"]) == 5
    train(monkeypatch, home, broken, *sampled)
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())
    for name in ("answers.jsonl", "config.json", "model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    another = tmp_path / "another"
    train(monkeypatch, home, another, "--seed", 1, *sampled)
    for name in ("answers.jsonl", "model.safetensors"):
        assert (another / name).read_bytes() != (whole / name).read_bytes()


def metadata(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        return f.metadata()


def test_a_run_with_other_settings_or_a_damaged_state_is_refused(monkeypatch, home, tmp_path,
                                                                 capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(T, "SAVE_SECONDS", -1)
        killed_after(m, "train_step", 2)
        train(m, home, out)
    state = (out / T.STATE).read_bytes()
    for more, message in (
            (("--lr", 0.5), "train.safetensors was made with other settings: lr was 0.002, now "
             "0.5."), (("--unroll", 1), "unroll was 2, now 1"),
            (("--ffn_dim", 8), "ffn_dim was None, now 8"), (("--limit", 5), "texts was"),
            (("--seed", 7), "answers.jsonl was made with other settings: seed was 0, now 7"),
            (("--temperature", 1), "temperature was 0.0, now 1.0"),
            (("--max_new_tokens", 3), "max_new_tokens was 12, now 3")):
        with pytest.raises(SystemExit) as e:
            train(monkeypatch, home, out, *more)
        said = capsys.readouterr().err
        assert e.value.code == 2 and message in said and said.count("\n") == 1
    with pytest.raises(SystemExit):
        train(monkeypatch, home, out, target="other")
    assert "target was" in capsys.readouterr().err
    for damaged in state[:-9], state[:-4] + b"\x00\x00\xc0\x7f":  # cut off; a NaN
        (out / T.STATE).write_bytes(damaged)
        with pytest.raises(SystemExit) as e:
            train(monkeypatch, home, out)
        assert e.value.code == 2 and "train.safetensors is damaged" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()


BAD = (
    (('{"prompt": "a"}\n{"text": "b"}',), (), "p.jsonl, line 2: 'prompt' is missing"),
    (('{"prompt": 1}',), (), "p.jsonl, line 1: prompt is 1; it must be a text"),
    (('{"prompt": ""}',), (), "p.jsonl, line 1: 'prompt' is empty"),
    (("",), (), "p.jsonl holds no prompts"),
    (('{"prompt": "a"}',), (), "give two or more prompts"),
    (('{"prompt": "%s"}' % ("the " * 70),), (), "line 1: the prompt has 72 tokens, the target's "
     "context is 64"),
    (("x", "file"), ("--out", "file"), "file is a file; name a directory"),
    (("x",), ("--out", "no/where"), "no is not a directory"),
    (("x",), ("--out", "target"), "is also a file of --target"),
    (("x",), ("--out", "another"), "--out another holds another target's head, or another"),
    (("x",), ("--draft_vocab_size", 0), "--draft_vocab_size is 0; it must be at least 1"),
    (("x",), ("--draft_vocab_size", 1025), "--draft_vocab_size is 1025, the target's vocabulary"),
    (("x",), ("--epochs", 0), "--epochs is 0; it must be at least 1"),
    (("x",), ("--unroll", 0), "--unroll is 0; it must be at least 1"),
    (("x",), ("--lr", 0), "--lr is 0.0; it must be above 0, up to 1"),
    (("x",), ("--lr", "nan"), "--lr is nan"),
    (("x",), ("--temperature", -1), "--temperature is -1.0; it must be from 0 up"),
    (("x",), ("--val_share", 1), "--val_share is 1.0; it must be between 0 and 1"),
    (("x",), ("--chat",), "has no chat template"),
)


@pytest.mark.parametrize("content,more,message", BAD, ids=range(len(BAD)))
def test_bad_input_is_one_line_and_leaves_nothing(monkeypatch, home, tmp_path, capsys, content,
                                                  more, message):
    monkeypatch.chdir(tmp_path)
    for name in ("target", "another"):
        shutil.copytree(home / "target", tmp_path / name)
    lines = '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}' if content[0] == "x" else content[0]
    (tmp_path / "p.jsonl").write_text(lines)
    if content[1:]:
        (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as e:
        run_command(monkeypatch, T, "--target", "target", "--prompts", "p.jsonl", "--out", "out",
                    *QUICK, *more)
    said = capsys.readouterr().err
    assert e.value.code == 2 and message in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_does_not_fit_the_memory_is_refused_with_its_figures(monkeypatch, home, tmp_path,
                                                                  capsys):
    """The head: four float32 numbers for each of its weights, and the target's LM head."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1e6)
    with pytest.raises(SystemExit) as e:
        train(monkeypatch, home, tmp_path / "out", "--batch", 10**7)
    said = capsys.readouterr().err
    weights = sum(p.numel() for p in EagleHead.new(config_from(LARGE), "").parameters())
    figure = round(4 * (4 * weights + 1024 * 32) / 1e6)
    assert e.value.code == 2 and f"head in training {figure} MB" in said
    assert "take a smaller --batch, --unroll or target" in said and not any(tmp_path.iterdir())


def test_several_ranks_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(T.job, "world", lambda: 2)
    with pytest.raises(UserError, match="trains in one process; start it with python"):
        T.parse_args(["--target", "t", "--prompts", "p", "--out", "o"])


KILLS = """
import os, signal, sys, time
import torch._dynamo  # which the optimizer imports
import train_eagle as T
from pathlib import Path

T.SAVE_SECONDS, T.TOGETHER = 0, 2
whole, broken, *flags = sys.argv[1:]

def start(out):
    pid = os.fork()
    if not pid:
        sys.argv = ["train_eagle.py", "--out", out, *flags]
        T.job.run(T.main)
        os._exit(0)
    return pid

def changed(path, before):
    return path.exists() and path.stat().st_mtime_ns > before

for name in "answers.jsonl", T.STATE, T.STATE:
    path = Path(broken, name)
    before = path.stat().st_mtime_ns if path.exists() else 0
    pid = start(broken)
    while not changed(path, before):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
assert not Path(broken, "model.safetensors").exists()
for out in whole, broken:
    assert os.waitpid(start(out), 0)[1] == 0
"""


@pytest.mark.slow
def test_kill_9_at_any_time_gives_the_same_bytes(home, tmp_path):
    """Processes of their own, killed once while they answer and twice while they train."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([sys.executable, "-c", KILLS, whole, broken, "--target", home / "target",
                    "--prompts", home / "prompts.jsonl", *map(str, QUICK), "--epochs", "20"],
                   cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
                   stdout=subprocess.DEVNULL)
    for name in ("answers.jsonl", "config.json", "model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(p.name for p in broken.iterdir()) == sorted(p.name for p in whole.iterdir())
