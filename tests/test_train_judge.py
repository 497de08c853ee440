"""train_judge.py and what it stands on: labels, offsets, the data format, the split, the features
and their file, the fit, the calibration and the command line.
"""
import json
import math
import random
import shutil
import subprocess
import sys

import pytest
import torch

import quantize
import test_tokenizer
import train_judge
from checkpoint import fingerprint
from common import UserError, write_tensors
from families import token_bytes
from helpers import ROOT, random_model, run_command, save_checkpoint, tiny_config
from judge import JudgeHead, above_threshold
from judge_data import features
from judge_data.data import encode, label_tokens, read_data, split
from judge_data.features import batches, hidden_states, made_of, read_features, save_features
from judge_data.report import auc
from tokenizer import Tokenizer
from train_judge import calibrate, curve_of, fit, grid

every, homes = test_tokenizer.every, test_tokenizer.homes


def test_labels_by_hand():
    offsets = [(0, 3), (3, 6), (6, 7), (7, 12)]
    assert label_tokens(offsets, None) == [1, 1, 1, 1]
    assert label_tokens(offsets, [3, 6]) == [1, 0]  # from a token's edge to a token's edge
    assert label_tokens(offsets, [4, 5]) == [1, 0]  # inside a token
    assert label_tokens(offsets, [4, 8]) == [1, 0, 0, 0]  # from inside one token to inside another
    assert label_tokens(offsets, [0, 1]) == [0]  # at the start
    assert label_tokens(offsets, [11, 12]) == [1, 1, 1, 0]  # at the end
    # three tokens share a character
    assert label_tokens([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [1, 2]) == [1, 0, 0, 0]


def test_labels_on_real_tokens_agree_with_bytes(homes):
    """Brute force: a token is wrong iff one of its bytes is a byte of the marked characters."""
    rng = random.Random(0)
    texts = ["The answer is 52 apples.", "das wäre 日本語 und 👩‍👩‍👧 x",
             " x = 3*7\n    return é", "🎉", "日本"]
    for t in every(homes, but=["unigram"]):  # whose spans of unknown letters are wide
        for text in texts:
            ids, offsets = t.encode_with_offsets(text, continuation=True)
            for _ in range(40):
                start = rng.randrange(len(text))
                end = rng.randrange(start + 1, len(text) + 1)
                first, last = len(text[:start].encode()), len(text[:end].encode())
                want, at = [], 0
                for i in ids:
                    lo, at = at, at + len(token_bytes(t, i))
                    if lo >= last:
                        break
                    want.append(int(at <= first))
                got = label_tokens(offsets, [start, end])
                assert got == want, (text, start, end)


LINES = [
    ("{", "not JSON"), ("[1]", "not a JSON object"),
    ('{"prompt": "p", "error": null}', "'answer' must be a text"),
    ('{"prompt": "p", "answer": "", "error": null}', "'answer' must be a text"),
    ('{"prompt": "p", "answer": "abc"}', "'error' is missing"),
    ('{"prompt": "p", "answer": "a\\ud83d", "error": null}', "it holds half a character"),
    *((json.dumps({"prompt": "p", "answer": "abc", "error": e}), "'error' is")
      for e in ([1], [2, 1], [1, 1], [0, 4], [-1, 2], "x", [0.0, 1], True)),
]


@pytest.mark.parametrize("line,message", LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "error": null, "domain": "kept"}\n' + line
                    + "\n")
    with pytest.raises(UserError, match=f"d.jsonl, line 2: {message}"):
        read_data(path)


def test_split_is_by_prompt_and_seeded():
    examples = [{"prompt": f"p{i % 10}"} for i in range(50)]
    held = split(examples, 0.3, seed=1)
    assert sum(held) == 15 and all(held[i] == held[i % 10] for i in range(50))
    assert held == split(examples, 0.3, seed=1) != split(examples, 0.3, seed=2)


def test_a_line_separator_in_a_text_is_no_line_end(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "answer": "a\u2028b", "error": null}\r\n\n{"prompt": "p", '
                    '"answer": "c", "error": [0, 1]}', encoding="utf-8")
    assert [(e["answer"], e["line"]) for e in read_data(path)] == [("a\u2028b", 1), ("c", 3)]


# ---------------------------------------------------------------- the head

def planted(seed=0):
    """Features of very different sizes, and few negatives, which one direction separates."""
    torch.manual_seed(seed)
    scale, shift = torch.rand(16) * 10 + 0.1, torch.randn(16) * 5
    direction, z = torch.randn(16), torch.randn(6000, 16)
    x, y = z * scale + shift, (z @ direction > -5).long()
    return x[:4000], y[:4000], x[4000:], y[4000:]


def test_fit_finds_a_planted_direction_and_scales_back():
    x, y, x_val, y_val = planted()
    settings = grid(y, None, None)
    fits = fit(x, y, x_val, y_val, settings, 1e-2, 60, seed=0)
    assert len(settings) == 9 and [(f.negative_weight, f.weight_decay) for f in fits] == settings
    assert 0.005 < (y_val == 0).float().mean() < 0.3
    best = max(fits, key=lambda f: f.auc)
    for f in fits:
        assert f.weight.shape == (1, 16) and f.bias.shape == (1,) and f.epochs >= 1
        scores = JudgeHead(f.weight, f.bias, 0.5, "")(x_val)
        assert auc(scores, y_val) == pytest.approx(f.auc, abs=1e-5)
    assert best.auc > 0.995
    again = fit(x, y, x_val, y_val, settings, 1e-2, 60, seed=0)
    for a, b in zip(fits, again):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
        assert a.epochs == b.epochs
    lets_in = lambda f: int((x_val @ f.weight[0] + f.bias > 0).sum())
    light, heavy = fit(x, y, x_val, y_val, [(1.0, 0.01), (1000.0, 0.01)], 1e-2, 20, seed=0)
    assert lets_in(heavy) < lets_in(light)


def test_settings_trained_at_once_do_not_touch_each_other_and_are_adamw():
    """A column of the grid is what torch's AdamW makes of that setting alone."""
    x, y, x_val, y_val = planted(1)
    settings = [(1.0, 0.5), (7.0, 0.0), (3.0, 0.1)]
    fits = fit(x, y, x_val, y_val, settings, 1e-2, 1, seed=3)
    mean, std = x.mean(0), x.std(0)
    for (negative_weight, weight_decay), f in zip(settings, fits):
        w, b = torch.zeros(16, requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.AdamW([{"params": [w], "weight_decay": weight_decay},
                                       {"params": [b], "weight_decay": 0.0}], lr=1e-2)
        for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(3)).split(1024):
            optimizer.zero_grad()
            cost = torch.where(y[batch] == 0, negative_weight, 1.0)
            scores = (x[batch] - mean) / std @ w + b
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                scores, y[batch].float(), cost, reduction="sum")
            (loss / cost.sum()).backward()
            optimizer.step()
        torch.testing.assert_close(f.weight[0] * std, w.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(f.bias + f.weight @ mean, b.detach(), atol=1e-4, rtol=1e-3)


def test_epochs_are_chosen_on_validation_tokens():
    """Inverted validation labels: training makes it worse, so an early epoch is kept."""
    x, y, x_val, y_val = planted(2)
    noisy = torch.where(torch.rand(len(y)) < 0.2, 1 - y, y)
    found = fit(x, noisy, x_val, 1 - y_val, [(1.0, 0.01)], 1e-3, 60, seed=0)[0]
    assert found.epochs < 5 and found.auc < 0.5


@pytest.mark.parametrize("seed", range(8))
def test_calibration_by_brute_force(seed):
    """No lower threshold that separates two tokens keeps the promise.

    With ties, extreme scores and few errors.
    """
    torch.manual_seed(seed)
    n = int(torch.randint(2, 120, ()))
    scores = (torch.randn(n) * [1, 4, 30, 300][seed % 4]).round(decimals=[1, 4][seed // 4])
    labels = torch.randint(0, 2, (n,))
    labels[0] = 0
    errors = scores[labels == 0]
    for share in (0, 0.01, 0.05, 0.29, 0.5, 0.999, 1):
        t = calibrate(scores, labels, share)
        accepted = lambda t: above_threshold(errors, t).sum().item()
        assert 0 <= t <= 1 and accepted(t) / len(errors) <= share
        candidates = [math.nextafter(1 / (1 + math.exp(min(-s, 700))), 0) for s in errors.tolist()]
        below = [c for c in candidates if c < t - 1e-12] + [0.0] * (t > 0)
        assert all(accepted(c) / len(errors) > share for c in below)
    curve = curve_of(scores, labels, 0.31)
    assert 0.31 in [t for t, _, _ in curve] and curve[0][:2] == (0.0, 1.0)
    assert list(curve) == sorted(curve)
    assert all(a[1] >= b[1] for a, b in zip(curve, curve[1:]))
    for t, accepted, rejected in curve:
        pairs = [(above_threshold(s, t).item(), y) for s, y in zip(scores, labels.tolist())]
        wrong = sum(yes and not y for yes, y in pairs)
        assert accepted == pytest.approx(wrong / len(errors), abs=1e-6)
        if (labels == 1).any():
            wrong = sum(y and not yes for yes, y in pairs)
            assert rejected == pytest.approx(wrong / int(labels.sum()), abs=1e-6)


def test_judge_file_keeps_its_curve_and_one_without_still_loads(tmp_path):
    curve = ((0.0, 1.0, 0.0), (0.25, 0.05, 0.125))
    head = JudgeHead(torch.randn(1, 8), torch.randn(1), 0.25, "abc", curve)
    head.save(tmp_path / "j")
    assert JudgeHead.load(tmp_path / "j", 8, "abc", "t").to("cpu").curve == curve
    write_tensors(tmp_path / "old", head.state_dict(),
                  {"format": "1", "dim": "8", "threshold": "0.25", "target": "abc"})
    assert JudgeHead.load(tmp_path / "old", 8, "abc", "t").curve == ()


def test_a_damaged_judge_file_is_one_line(tmp_path):
    """Every value of its metadata and its tensors replaced by what they cannot be."""
    path, weight, bias = tmp_path / "j", torch.randn(1, 8), torch.randn(1)
    meta = {"format": "1", "dim": "8", "threshold": "0.25", "target": "abc",
            "curve": "[[0.0, 1.0, 0.0]]"}
    deep = "[" * 100_000
    cases = [({"threshold": t}, {}, "threshold") for t in (
        "nan", "NaN", "inf", "-1", "1.5", "x", "", "null", "[]", '"0.5"', "1e999", "9" * 5000,
        deep, '0.5, "x": 1')]
    cases += [({"curve": c}, {}, "curve") for c in (
        "x", "", "1", '"a"', "[1]", "[[null]]", "[[NaN]]", '[["0.5"]]', "{}", deep, "[[2]]",
        '0}, "a')]
    cases += [({"format": "2"}, {}, "format 1"), ({"target": "other"}, {}, "was trained on")]
    cases += [({}, {"bias": b}, "is damaged") for b in (torch.zeros(2), torch.zeros(()))]
    cases += [({}, {"weight": w}, "width") for w in (
        torch.zeros(1, 7), torch.zeros(8, 1), torch.zeros(()), torch.zeros(1, 0))]
    cases += [({}, {"weight": w}, "damaged") for w in (torch.zeros(8), torch.zeros(1, 1, 8))]
    cases += [({}, {key: torch.full(shape, x)}, "damaged") for x in (math.nan, math.inf, -math.inf)
              for key, shape in (("weight", (1, 8)), ("bias", (1,)))]
    for changed, tensors, message in [({}, {}, None), *cases]:
        write_tensors(path, {"weight": weight, "bias": bias} | tensors, meta | changed)
        if message is None:
            assert JudgeHead.load(path, 8, "abc", "t").threshold == 0.25
            continue
        with pytest.raises(UserError, match=message) as e:
            JudgeHead.load(path, 8, "abc", "t")
        assert str(path) in str(e.value) and len(str(e.value)) < 400, (changed, tensors)
    for key in "threshold", "target", "format":
        write_tensors(path, {"weight": weight, "bias": bias},
                      {k: v for k, v in meta.items() if k != key})
        with pytest.raises(UserError, match=key):
            JudgeHead.load(path, 8, "abc", "t")


# ---------------------------------------------------------------- features

EXAMPLES = [{"prompt": "the cat", "answer": " Hello 12 cats", "error": [7, 9]},
            {"prompt": "a", "answer": " cat", "error": None},
            {"prompt": "the the the cat", "answer": " Hello" * 9, "error": None},
            {"prompt": "Z", "answer": " 12345 the cat 🎉", "error": [15, 16]}]
EXAMPLES = [e | {"where": f"d, line {i}", "line": i} for i, e in enumerate(EXAMPLES, 1)]


def test_batched_features_are_the_hidden_states_at_the_tokens_own_positions(homes, monkeypatch):
    """In any batches: as each answer read alone, in order."""
    for t in (Tokenizer.from_dir(homes(name)) for name in ("sp", "tt")):
        target = random_model(tiny_config(vocab_size=t.vocab_size))
        encoded, want = encode(t, EXAMPLES, 128), []
        _, offsets = t.encode_with_offsets(" Hello 12 cats", continuation=True)
        assert encoded[0].labels == label_tokens(offsets, [7, 9]) and 0 in encoded[0].labels
        for e, example in zip(encoded, EXAMPLES):
            prompt = t.encode(example["prompt"])
            ids = prompt + t.encode(example["answer"], continuation=True)
            end = len(prompt) + len(e.labels)
            assert e.ids == ids[:end] and len(e.spans) == len(e.labels)
            hidden = target.features(torch.tensor([ids]), torch.arange(len(ids)),
                                     target.new_cache(len(ids)))[0]
            want.append(hidden[len(prompt):end])
        want = torch.cat(want)
        for size in (1, 40, 90, 4096):
            monkeypatch.setattr(features, "BATCH", size)
            torch.testing.assert_close(hidden_states(target, encoded), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden_states(target, encoded, torch.bfloat16),
                                   want.bfloat16(), atol=0.05, rtol=0.02)
    with pytest.raises(UserError, match="d, line 1: prompt and answer have .* the context is 128"):
        encode(t, [EXAMPLES[0] | {"answer": "cat " * 200}], 128)


def test_batches_hold_every_answer_once_within_the_size(monkeypatch):
    monkeypatch.setattr(features, "BATCH", 100)
    lengths = [random.Random(0).randrange(1, 130) for _ in range(50)] + [1] * 30
    groups = batches(lengths)
    assert sorted(i for g in groups for i in g) == list(range(80)) and len(groups) < 60
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 100 for g in groups)
    assert max(lengths) == lengths[groups[0][0]]


def test_features_file_is_refused_for_another_target_or_other_data(tmp_path, homes):
    t = Tokenizer.from_dir(homes("sp"))
    config, path, data = tiny_config(vocab_size=t.vocab_size), tmp_path / "f", tmp_path / "d.jsonl"
    one, two = (save_checkpoint(tmp_path / f"target{seed}", random_model(config, seed), config)
                for seed in (1, 2))
    encoded, hidden = encode(t, EXAMPLES, 128), torch.randn(30, 64)
    save_features(path, hidden, made_of(encoded, one, "float32"))
    made = made_of(encoded, one, "float32")
    assert torch.equal(read_features(path, made, one, data, None, (30, 64)), hidden)
    other = encode(t, [*EXAMPLES[:3], EXAMPLES[3] | {"prompt": "z"}], 128)
    for made, target, message in (
            (made_of(encoded, two, "float32"), two, "another target: the target .*target2"),
            (made_of(other, one, "float32"), one, "another data: the data .*d.jsonl"),
            (made_of(encoded[::-1], one, "float32"), one, "another data"),
            (made_of(encoded, one, "bfloat16"), one, "another dtype")):
        with pytest.raises(UserError, match=f"--features {path} was made with {message}"):
            read_features(path, made, target, data, None, (30, 64))
    with pytest.raises(UserError, match="holds float32, --features_dtype is bfloat16"):
        read_features(path, made_of(encoded, one, "float32"), one, data, "bfloat16", (30, 64))
    with pytest.raises(UserError, match="is not a file of hidden states"):
        read_features(one / "model.safetensors", made, one, data, None, (30, 64))
    made = made_of(encoded, one, "float32")
    for tensors, meta in (
            ({"hidden": torch.full((30, 64), math.nan)}, made), ({"hidden": torch.zeros(30)}, made),
            ({"hidden": hidden[1:]}, made), ({"hidden": hidden[:, 1:]}, made),
            ({"hidden": torch.zeros(30, 64, dtype=torch.int8)}, made), ({"other": hidden}, made),
            ({"hidden": hidden}, []), ({"hidden": hidden}, "x"), ({"hidden": hidden}, {})):
        write_tensors(path, tensors, {"features_of": json.dumps(meta)})
        with pytest.raises(UserError, match=f"{path}"):
            read_features(path, made, one, data, None, (30, 64))


# ---------------------------------------------------------------- command line

def make_target(home, homes):
    t = Tokenizer.from_dir(homes("sp"))
    config = tiny_config(vocab_size=t.vocab_size)
    save_checkpoint(home / "target", random_model(config), config)
    shutil.copy(homes("sp") / "tokenizer.model", home / "target")


def write_data(home):
    """The wrong word is always the same, so even a random target's hidden state tells it."""
    rng, lines = random.Random(0), []
    for i in range(120):
        words = [rng.choice(["the", "cat", "Hello", "a"]) for _ in range(6)]
        answer, error = " " + " ".join(words), None
        if i % 2:
            at = len(" ".join(words[:3])) + 2
            answer, error = " " + " ".join(words[:3] + ["Z."] + words[3:]), [at, at + 2]
        lines.append(json.dumps({"prompt": f"p {i // 2}", "answer": answer, "error": error,
                                 "domain": "ab"[i // 2 % 2]}))
    (home / "data.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run the command line in this process and return its output; a flag may be given again."""
    def call(*args):
        flags = ["--target", tmp_path / "target", "--data", tmp_path / "data.jsonl", "--device",
                 "cpu", "--epochs", "12", "--out", tmp_path / "judge.safetensors", *args]
        monkeypatch.setattr(sys, "argv", ["train_judge.py", *map(str, flags)])
        train_judge.main()
        return capsys.readouterr().out
    return call


def test_command_line(tmp_path, homes, train):
    make_target(tmp_path, homes), write_data(tmp_path)
    out, page = tmp_path / "judge.safetensors", tmp_path / "report.html"
    load = lambda: JudgeHead.load(out, 64, fingerprint(tmp_path / "target"), "t")
    printed = train("--report", page)
    for words in ("120 answers, 60 prompts", "negative_weight", "chosen", "ROC AUC",
                  "average precision", "false accepts",
                  "the worst mistakes" if ">>" in printed else "no mistakes"):
        assert words in printed
    assert float(printed.split("ROC AUC")[1].split("|")[1]) > 0.95
    first, first_page = out.read_bytes(), page.read_bytes()
    assert "p 1" in first_page.decode() and str(tmp_path) not in first_page.decode()
    head = load()
    accepted = {t: a for t, a, _ in head.curve}[head.threshold]
    assert accepted <= 0.05
    assert f"Threshold {head.threshold:.4f}, the lowest that accepts at most 0.05" in printed
    # The same input gives the same bytes.
    assert train("--report", page) == printed
    assert (out.read_bytes(), page.read_bytes()) == (first, first_page)

    strict, loose = (load().threshold for share in ("0", "0.9")
                     if train("--max_false_accept", share))
    assert strict >= head.threshold > loose
    assert "set by hand" in train("--threshold", "0.7", "--negative_weight", "2",
                                  "--weight_decay", "0")
    assert load().threshold == 0.7 and 0.7 in [t for t, _, _ in load().curve]
    assert train("--exclude_domain", "a").startswith("60 answers, 30 prompts.")
    with pytest.raises(UserError, match="has the domains a, b; choose"):
        train("--exclude_domain", "c")


def test_a_quantized_target_gets_a_judge_of_its_own(tmp_path, homes, train, monkeypatch):
    make_target(tmp_path, homes), write_data(tmp_path)
    run_command(monkeypatch, quantize, "--checkpoint_dir", tmp_path / "target", "--mode", "int8",
                "--out", tmp_path / "int8")
    train("--target", tmp_path / "int8")
    name = fingerprint(tmp_path / "int8")
    assert JudgeHead.load(tmp_path / "judge.safetensors", 64, name, "t").target == name
    assert name != fingerprint(tmp_path / "target")


def test_features_file_spares_the_target_and_changes_no_byte(tmp_path, homes, train, monkeypatch):
    make_target(tmp_path, homes), write_data(tmp_path)
    out, page = tmp_path / "judge.safetensors", tmp_path / "report.html"
    runs = {}
    with monkeypatch.context() as m:
        for dtype in ("float32", "bfloat16"):
            train("--features", tmp_path / dtype, "--features_dtype", dtype, "--report", page)
            runs[dtype] = out.read_bytes(), page.read_bytes()
        train()
        assert out.read_bytes() == runs["float32"][0] != runs["bfloat16"][0]
        small, large = ((tmp_path / dtype).stat().st_size for dtype in ("bfloat16", "float32"))
        assert small < 0.6 * large
        train("--exclude_domain", "a")
        without_a = out.read_bytes()
        m.setattr(train_judge, "hidden_states", lambda *args: pytest.fail("the target ran again"))
        for dtype in runs:
            train("--features", tmp_path / dtype, "--report", page)
            assert (out.read_bytes(), page.read_bytes()) == runs[dtype]
        train("--features", tmp_path / "float32", "--exclude_domain", "a")
        assert out.read_bytes() == without_a
    lines = (tmp_path / "data.jsonl").read_text().splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match="float32 was made with another data"):
        train("--features", tmp_path / "float32")


def test_bad_input(tmp_path, homes, train):
    make_target(tmp_path, homes)
    good = [{"prompt": f"p {i}", "answer": " the cat", "error": None} for i in range(9)]
    for lines, args, message in (
            (good, (), "has no error tokens: every answer is marked correct, so there is nothing "
             "to learn to reject"),
            (good + [{"prompt": "p 1", "answer": " a", "error": [0, 2]}], (),
             "part of .*data.jsonl has no error tokens; a judge needs both there"),
            ([g | {"error": [0, 4]} for g in good], (),
             "the training part of .* has no correct tokens"),
            (good[:1], (), "one prompt only"), ([], (), "holds no examples"),
            (good, ("--threshold", "2"), "--threshold is 2"),
            (good, ("--threshold", "0.5", "--max_false_accept", "0.1"), "give one of them"),
            (good, ("--max_false_accept", "-1"), "--max_false_accept is -1"),
            (good, ("--features_dtype", "float32"), "--features_dtype requires --features"),
            (good, ("--weight_decay", "-1"), "--weight_decay is -1"),
            (good, ("--weight_decay", "1e308"), "--weight_decay is 1e.308"),
            (good, ("--negative_weight", "1e300"), "--negative_weight is 1e.300"),
            (good, ("--lr", "1e300"), "--lr is 1e.300"),
            (good, ("--report", tmp_path / "judge.safetensors"), "is also --"),
            (good, ("--features", tmp_path / "no" / "f"), "is not a directory"),
            (good, ("--out", tmp_path / "no" / "j"), "is not a directory"),
            (good, ("--data", "nowhere.jsonl"), "nowhere.jsonl")):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        with pytest.raises(UserError, match=message):
            train(*args)
        assert not (tmp_path / "judge.safetensors").exists()


def test_bad_input_from_the_shell(tmp_path, homes):
    make_target(tmp_path, homes)
    (tmp_path / "data.jsonl").write_text('{"prompt": "p", "answer": "abc", "error": [2, 1]}\n')
    done = subprocess.run([sys.executable, ROOT / "train_judge.py", "--target", tmp_path / "target",
                           "--data", tmp_path / "data.jsonl", "--out", tmp_path / "j"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path / 'data.jsonl'}, line 1: 'error' is [2, 1]")
