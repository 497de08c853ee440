"""Labels, offsets, the data format, the split and the fit of the judge."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cli import UserError
from helpers import random_model, save_checkpoint, tiny_config
from judge import Judge
from model import fingerprint
from test_tokenizer import every, homes  # noqa: F401 (a fixture)
from tokenizer import Tokenizer
from train_judge import auc, features, fit, label_tokens, read_data, split

ROOT = Path(__file__).parents[1]


def test_labels_by_hand():
    offsets = [(0, 3), (3, 6), (6, 7), (7, 12)]
    assert label_tokens(offsets, None) == [1, 1, 1, 1]
    assert label_tokens(offsets, [3, 6]) == [1, 0]  # from a token's edge to a token's edge
    assert label_tokens(offsets, [4, 5]) == [1, 0]  # inside a token
    assert label_tokens(offsets, [4, 8]) == [1, 0, 0, 0]  # from inside one token to inside another
    assert label_tokens(offsets, [0, 1]) == [0]  # at the start
    assert label_tokens(offsets, [11, 12]) == [1, 1, 1, 0]  # at the end
    assert label_tokens([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], [1, 2]) == [1, 0, 0, 0]  # three tokens share a character


def test_labels_on_real_tokens_agree_with_bytes(homes):  # noqa: F811
    """Brute force: a token is wrong iff one of its bytes is a byte of the marked characters."""
    rng = random.Random(0)
    texts = ["The answer is 52 apples.", "das wäre 日本語 und 👩‍👩‍👧 x", " x = 3*7\n    return é", "🎉", "日本"]
    for t in every(homes):
        for text in texts:
            ids, offsets = t.encode_with_offsets(text, continuation=True)
            for _ in range(40):
                start = rng.randrange(len(text))
                end = rng.randrange(start + 1, len(text) + 1)
                first, last = len(text[:start].encode()), len(text[:end].encode())
                want, at = [], 0
                for i in ids:
                    lo, at = at, at + len(t.token_bytes(i))
                    if lo >= last:
                        # a token that shares its first character with the error holds bytes of it too, by characters
                        break
                    want.append(int(at <= first))
                got = label_tokens(offsets, [start, end])
                assert got == want, (text, start, end)


LINES = [
    ("{", "line 2 is not JSON"), ("[1]", "line 2: 'prompt'"), ('{"prompt": "p", "error": null}', "line 2: 'answer'"),
    ('{"prompt": "p", "answer": "", "error": null}', "line 2: 'answer'"), ('{"prompt": "p", "answer": "abc"}', "line 2: 'error' is missing"),
    *((json.dumps({"prompt": "p", "answer": "abc", "error": e}), "line 2: 'error' is") for e in ([1], [2, 1], [1, 1], [0, 4], [-1, 2], "x", [0.0, 1], True)),
]


@pytest.mark.parametrize("line,message", LINES)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "error": null, "domain": "kept"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_data(path)


def test_split_is_by_prompt_and_seeded():
    examples = [{"prompt": f"p{i % 10}"} for i in range(50)]
    held = split(examples, 0.3, seed=1)
    assert held.sum() == 15 and all(held[i] == held[i % 10] for i in range(50))
    assert torch.equal(held, split(examples, 0.3, seed=1)) and not torch.equal(held, split(examples, 0.3, seed=2))


def test_auc_by_brute_force():
    torch.manual_seed(0)
    scores, labels = torch.randint(0, 12, (200,)).float(), torch.randint(0, 2, (200,))
    pairs = [(0.5 if a == b else float(a > b)) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert auc(scores, labels) == pytest.approx(sum(pairs) / len(pairs))


def test_fit_finds_a_planted_direction_and_scales_back():
    torch.manual_seed(0)
    scale, shift = torch.rand(16) * 10 + 0.1, torch.randn(16) * 5
    direction = torch.randn(16)
    z = torch.randn(6000, 16)
    y = (z @ direction > -3).long()  # few negatives
    x = z * scale + shift
    weight, bias, _, _ = fit(x[:4000], y[:4000], x[4000:], y[4000:], None, 1e-2, 0.01, 200, seed=0)
    scores = x[4000:] @ weight[0] + bias
    assert 0.005 < (y == 0).float().mean() < 0.3 and auc(scores, y[4000:]) > 0.995
    again = fit(x[:4000], y[:4000], x[4000:], y[4000:], None, 1e-2, 0.01, 200, seed=0)
    assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])
    heavy = fit(x[:4000], y[:4000], x[4000:], y[4000:], 1000.0, 1e-2, 0.01, 200, seed=0)
    lets_in = lambda w, b: int(((x[4000:] @ w[0] + b)[y[4000:] == 0] > 0).sum())
    assert lets_in(*heavy[:2]) <= lets_in(weight, bias)


def test_features_are_the_hidden_states_at_the_tokens_own_positions(homes):  # noqa: F811
    t = Tokenizer.from_dir(homes["sp"])
    target = random_model(tiny_config(vocab_size=t.vocab_size))
    examples = [{"prompt": "the cat", "answer": " Hello 12 cats", "error": [7, 9], "where": "x"}, {"prompt": "a", "answer": " cat", "error": None, "where": "y"}]
    x, y, owner = features(target, t, examples)
    prompt, (answer, offsets) = t.encode("the cat"), t.encode_with_offsets(" Hello 12 cats", continuation=True)
    kept = label_tokens(offsets, [7, 9])
    ids = prompt + answer
    hidden = target.features(torch.tensor([ids]), torch.arange(len(ids)), target.new_cache(len(ids)))[0]
    torch.testing.assert_close(x[:len(kept)], hidden[len(prompt):len(prompt) + len(kept)], atol=1e-4, rtol=1e-4)
    assert y.tolist()[:len(kept)] == kept and 0 in kept and owner.tolist() == [0] * len(kept) + [1] * (len(y) - len(kept))
    with pytest.raises(UserError, match="x: prompt and answer have .* the context is 128"):
        features(target, t, [examples[0] | {"answer": "cat " * 200}])


def make_target(home, homes):  # noqa: F811
    t = Tokenizer.from_dir(homes["sp"])
    config = tiny_config(vocab_size=t.vocab_size)
    save_checkpoint(home / "target", random_model(config), config)
    (home / "target" / "tokenizer.model").write_bytes((homes["sp"] / "tokenizer.model").read_bytes())


def train(home, *args):
    return subprocess.run([sys.executable, ROOT / "train_judge.py", "--target", home / "target", "--data", home / "data.jsonl", "--device", "cpu",
                           "--out", home / "judge.safetensors", *args], capture_output=True, text=True)


def test_command_line(tmp_path, homes):  # noqa: F811
    """The wrong word is always the same, so even a random target's hidden state tells it."""
    make_target(tmp_path, homes)
    rng, lines = random.Random(0), []
    for i in range(120):
        words = [rng.choice(["the", "cat", "Hello", "a"]) for _ in range(6)]
        answer, error = " " + " ".join(words), None
        if i % 2:
            at = len(" ".join(words[:3])) + 2
            answer, error = " " + " ".join(words[:3] + ["Z."] + words[3:]), [at, at + 2]
        lines.append(json.dumps({"prompt": f"p {i // 2}", "answer": answer, "error": error, "domain": "ab"[i // 2 % 2]}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("tokens", "negatives", "AUC", "false accepts", "false rejects", "validation"):
        assert word in done.stdout
    first = (tmp_path / "judge.safetensors").read_bytes()
    head = Judge.load(tmp_path / "judge.safetensors", 64, fingerprint(tmp_path / "target"), "t")
    assert head.threshold == 0.5
    assert float(done.stdout.split("validation")[-1].split("AUC ")[1].split()[0]) > 0.95
    assert train(tmp_path).returncode == 0 and (tmp_path / "judge.safetensors").read_bytes() == first  # seeded
    without = train(tmp_path, "--exclude_domain", "a")
    assert without.stdout.startswith("60 answers, 30 prompts;") and (tmp_path / "judge.safetensors").read_bytes() != first
    assert "has the domains a, b; choose" in train(tmp_path, "--exclude_domain", "c").stderr
    quantize = [sys.executable, ROOT / "quantize.py", "--checkpoint_dir", tmp_path / "target", "--mode", "int8", "--out", tmp_path / "int8"]
    subprocess.run(quantize, check=True, capture_output=True)
    done = train(tmp_path, "--target", tmp_path / "int8")  # the later flag counts
    assert done.returncode == 0, done.stderr
    assert Judge.load(tmp_path / "judge.safetensors", 64, fingerprint(tmp_path / "int8"), "t").target != head.target


def test_bad_input_from_the_shell(tmp_path, homes):  # noqa: F811
    make_target(tmp_path, homes)
    good = [{"prompt": f"p {i}", "answer": " the cat", "error": None} for i in range(9)]
    for lines, args, message in (
            (good, (), "no error tokens"), (good[:1], (), "one prompt only"), ([], (), "holds no examples"), (good, ("--threshold", "2"), "--threshold is 2"),
            (good, ("--out", str(tmp_path / "no" / "j")), "is not a directory"), (good, ("--data", "nowhere.jsonl"), "nowhere.jsonl")):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        done = train(tmp_path, *args)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr and not (tmp_path / "judge.safetensors").exists()
