"""Malformed inputs for every command, by seed: valid files and command lines, and what is done to
them.

`make_inputs(home, run)` writes small valid inputs of all kinds. `draw(seed, number)` gives a Run: a
command line that works on a copy of them, after one or two mutations of its files, its flags or its
surroundings. Equal seeds and numbers give equal runs.
"""
import base64
import contextlib
import gzip
import json
import math
import os
import random
import shutil
import socket
import stat
import struct
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from annotate import SKIP, Annotation
from checkpoint import config_from, fingerprint, source_shapes
from drafters.eagle_head import EagleHead
from families import FAMILIES
from helpers import random_model, save_checkpoint, shard, tiny_config
from judge import JudgeHead

# ---------------------------------------------------------------- valid inputs

EOS = [2, *range(4, 512, 5)]  # many, so that answers are short
CONFIG = tiny_config(model_type="llama", vocab_size=512, hidden_size=32, intermediate_size=64,
                     num_hidden_layers=1, max_position_embeddings=4096, eos_token_id=EOS,
                     torch_dtype="float32", bos_token_id=1)
DRAFT = CONFIG | dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=1024)
EXAMPLES = {
    "gsm8k": [{"question": f"Ann has {n} cats. Bob has {n + 2}. How many are there?",
               "answer": f"{n} + {n + 2} = <<{n}+{n + 2}={2 * n + 2}>>{2 * n + 2}.\n#### "
               f"{2 * n + 2}"} for n in range(3)],
    "arc": [{"id": f"q{n}", "question": {"stem": "What shines?", "choices": [
        {"text": t, "label": c} for c, t in zip("ABCD", ("sun", "cat", "mud", "salt"))]},
        "answerKey": "A"} for n in range(3)],
    "humaneval": [{"task_id": f"T/{n}", "prompt": "def f(x):\n    \"\"\"x + 1\"\"\"\n",
                   "entry_point": "f", "canonical_solution": "    return x + 1\n",
                   "test": "def check(candidate):\n    assert candidate(1) == 2\n"}
                  for n in range(2)],
    "demo": [{"task": "maths", "prompt": "Question: 1 + 2?\nAnswer:", "answer": 3},
             {"task": "code", "prompt": "def f(x):\n", "answer": [[1, 2], [3, 4]]},
             {"task": "facts", "prompt": "Question: who?\nAnswer:", "answer": "Ann"}],
    "prompts": [{"prompt": "the cat"}, {"turns": ["Hello", "and"], "category": "chat"},
                {"instruction": "Say 12345.", "input": "now", "output": "12345"}],
    "texts": [{"prompt": "the cat", "text": " a cat 12345"},
              {"prompt": "Hello", "reference": " don't", "domain": "x"}],
    "data": [{"prompt": f"Question {n // 2}: the cat?", "answer": f"12345 a cat {n} Hello",
              "error": [6, 11] if n % 2 else None, "domain": ("a", "b")[n % 4 > 1], "id": n}
             for n in range(16)],
}


def make_inputs(home: Path, run):
    """Write the valid inputs; run(argv of a Run) makes those that only a command writes."""
    home.mkdir()
    for name, family, config, seed in (("target", "llama3", CONFIG | {"rope_scaling": ROPE}, 1),
                                       ("draft", "llama3", DRAFT, 2),
                                       ("old", "yi-old-files", CONFIG, 3)):
        (home / name).mkdir()
        FAMILIES[family](home / name)
        save_checkpoint(home / name, random_model(config, seed), config)
        (home / name / "generation_config.json").write_text(json.dumps(
            {"eos_token_id": EOS, "temperature": 0.6, "transformers_version": "4.45.0"}))
    shard(home / "old", 3)
    settings = json.loads((home / "target" / "tokenizer_config.json").read_text())
    (home / "target" / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (home / "target" / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, source in (("hf", "target"), ("hf_old", "old")):
        shutil.copytree(home / source, home / name, ignore=shutil.ignore_patterns("model*"))
        torch.manual_seed(4)
        save_file({theirs: 0.1 * torch.randn(shape).to(torch.bfloat16)
                   for part in source_shapes(config_from(CONFIG)).values()
                   for theirs, shape in part.items()}, home / name / "model.safetensors")
    shard(home / "hf_old", 2)
    torch.manual_seed(5)
    curve = ((0.1, 1.0, 0.0), (0.5, 0.2, 0.1), (0.9, 0.0, 0.8))
    JudgeHead(torch.randn(1, 32), torch.zeros(1), 0.5, fingerprint(home / "target"), curve).save(
        home / "judge.safetensors")
    eagle = EagleHead.new(config_from(CONFIG), fingerprint(home / "target"), ffn_dim=16)
    eagle.save(home / "eagle", CONFIG)
    shutil.copytree(home / "eagle", home / "pickled")
    torch.save(load_file(home / "pickled" / "model.safetensors"),
               home / "pickled" / "pytorch_model.bin")
    (home / "pickled" / "model.safetensors").unlink()
    for name, lines in EXAMPLES.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    (home / "data.jsonl.gz").write_bytes(packed((home / "data.jsonl").read_bytes()))
    again = [e | {"prompt": e["prompt"] + " again"} for e in EXAMPLES["data"][:6]]
    (home / "more.jsonl").write_text("".join(json.dumps(e) + "\n" for e in again))
    for name, config in (("big.json", CONFIG), ("small.json", DRAFT)):
        (home / name).write_text(json.dumps(config))
    for argv in MAKE:
        run(argv.split())
    for name in ("config.json", "model.safetensors"):  # as a run leaves it that was cut off
        (home / "answered" / name).unlink()
    lines = [{k: v for k, v in e.items() if k != "error"} for e in EXAMPLES["data"]]
    (home / "mark.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    marked = Annotation(home / "mark.jsonl", home / "marked_before.jsonl")
    for choice in (None, [6, 11], SKIP):
        marked.decide(choice)
    marked.close()


MAKE = (
    "quantize.py --checkpoint_dir target --mode int4 --group_size 32 --out int4",
    "train_judge.py --target target --data data.jsonl --out trained.safetensors --epochs 2 "
    "--features features.safetensors",
    "make_judge_data.py generate --prompts demo.jsonl --models target draft --out answers.jsonl "
    "--temperatures 0,0.7 --max_new_tokens 12",
    "eval.py --task gsm8k --data gsm8k.jsonl --target target --draft draft --judge "
    "judge.safetensors --rules target,judge --out results --limit 2",
    "train_eagle.py --target target --prompts data.jsonl --out trained --val_share 0.3 --epochs 1 "
    "--max_new_tokens 12 --ffn_dim 16 --temperature 1",
    "train_eagle.py --target target --prompts data.jsonl --out answered --val_share 0.3 --epochs 1 "
    "--max_new_tokens 12 --ffn_dim 16 --temperature 1",
)


# ---------------------------------------------------------------- valid command lines

class Base:
    """A command line that works. inputs: paths that it reads; outputs: paths that it writes; logs:
    outputs that it also reads and may add to. numbers, words: flags, with and without a number.
    """

    def __init__(self, line, inputs, outputs="", logs="", numbers="", words="", stdin="",
                 interrupt=None, weight=1):
        self.argv = line.split()
        self.inputs, self.outputs, self.logs = inputs.split(), outputs.split(), logs.split()
        self.numbers, self.words = numbers.split(), words.split()
        self.stdin, self.interrupt, self.weight = stdin, interrupt, weight


NUMBERS = "--speculate_k --max_new_tokens --temperature --top_k --top_p --seed --threshold"
WORDS = "--device --dtype --draft_dtype --accept --tree"
EAGLE = "--limit --max_new_tokens --temperature --ffn_dim --unroll --epochs --batch --lr --seed"
TRAIN = ("--max_false_accept --threshold --negative_weight --weight_decay --val_share --lr "
         "--epochs --seed")
BENCH = ("--repeats 1 --rows 2 --speculate_k 2 --max_new_tokens 4 --prompt_tokens 4 --accepted 1 "
         "--no_compile")
BASES = [
    Base("generate.py --target target --prompt Hello --max_new_tokens 6 --json out.json",
         "target", "out.json", "", NUMBERS, WORDS, weight=3),
    Base("generate.py --target target --draft draft --judge judge.safetensors --prompt Hello "
         "--chat --max_new_tokens 6 --speculate_k 3 --json out.json",
         "target draft judge.safetensors", "out.json", "", NUMBERS, WORDS, weight=6),
    Base("generate.py --target old --draft old --accept kl:1 --prompt 12345 --max_new_tokens 6 "
         "--speculate_k 3 --chat --json out.json", "old", "out.json", "", NUMBERS, WORDS, weight=4),
    Base("generate.py --target int4 --draft draft --accept typical --prompt x --temperature 0.7 "
         "--top_k 9 --top_p 0.9 --max_new_tokens 6 --json out.json", "int4 draft", "out.json", "",
         NUMBERS, WORDS, weight=3),
    Base("generate.py --target target --interactive --chat --max_new_tokens 5 --json out.json",
         "target", "out.json", "", NUMBERS, WORDS, "Hello\nthe cat\n\n12345 a\n", weight=3),
    Base("generate.py --target target --draft eagle --tree 5:2 --judge judge.safetensors --prompt "
         "Hello --max_new_tokens 6 --json out.json", "target eagle judge.safetensors", "out.json",
         "", NUMBERS, WORDS, weight=4),
    Base("generate.py --target target --draft ngram --interactive --max_new_tokens 6 --speculate_k "
         "auto --json out.json", "target", "out.json", "", NUMBERS, WORDS, "Hello\nHello\n",
         weight=2),
    Base("train_eagle.py --target target --prompts data.jsonl --out new --val_share 0.3 --epochs 1 "
         "--max_new_tokens 9 --ffn_dim 16", "target data.jsonl", "new", "", EAGLE,
         "--device --dtype", weight=3),
    Base("train_eagle.py --target target --prompts data.jsonl --out answered --val_share 0.3 "
         "--epochs 1 --max_new_tokens 12 --ffn_dim 16 --temperature 1", "target data.jsonl", "",
         "answered/answers.jsonl answered/answers.settings.json", EAGLE, "--device --dtype",
         weight=3),
    Base("convert_hf_checkpoint.py --checkpoint_dir pickled --out new", "pickled", "new", "", "",
         "--dtype", weight=4),
    Base("eval.py --task demo --data demo.jsonl --target target --eagle eagle --judge "
         "judge.safetensors --drafters eagle,eagle-tree,ngram --tree 4,2 --rules standard,judge "
         "--out new --limit 1", "target eagle judge.safetensors demo.jsonl", "new", "",
         "--limit --speculate_k", "--task --rules --device --dtype --drafters --tree", weight=3),
    Base("train_judge.py --target target --data data.jsonl --out new.safetensors --epochs 2 "
         "--report report.html", "target data.jsonl", "new.safetensors report.html", "", TRAIN,
         "--device --dtype --exclude_domain", weight=3),
    Base("train_judge.py --target target --data data.jsonl.gz --out new.safetensors --epochs 2 "
         "--features features.safetensors", "target data.jsonl.gz features.safetensors",
         "new.safetensors", "", TRAIN, "--features_dtype --dtype", weight=4),
    Base("make_judge_data.py generate --prompts prompts.jsonl --models target old --out new.jsonl "
         "--samples 2 --max_new_tokens 5", "target old prompts.jsonl",
         "new.jsonl new.jsonl.settings.json", "", "--samples --limit --max_new_tokens --seed "
         "--temperatures", "--task --device --dtype", weight=3),
    Base("make_judge_data.py generate --prompts demo.jsonl --models target draft --out "
         "answers.jsonl --temperatures 0,0.7,1 --max_new_tokens 12", "target draft demo.jsonl", "",
         "answers.jsonl answers.jsonl.settings.json", "--samples --limit --seed --temperatures",
         "--task", weight=3),
    Base("make_judge_data.py mine --data answers.jsonl --target target --draft draft --method "
         "first_error --out new.jsonl", "answers.jsonl target draft", "new.jsonl new.jsonl.part "
         "new.jsonl.part.settings.json", "", "--speculate_k", "--method --search --device",
         weight=3),
    Base("make_judge_data.py mine --data answers.jsonl --target target --draft draft --method "
         "autojudge --out new.jsonl", "answers.jsonl target draft", "new.jsonl new.jsonl.part "
         "new.jsonl.part.settings.json", "", "--speculate_k", "--method --search --device",
         weight=2),
    Base("make_judge_data.py mine --data answers.jsonl --target target --draft draft --method "
         "selfjudge --bound 0.3 --out new.jsonl", "answers.jsonl target draft", "new.jsonl "
         "new.jsonl.part new.jsonl.part.settings.json", "", "--bound --window", "--method --device",
         weight=2),
    Base("make_judge_data.py merge data.jsonl more.jsonl data.jsonl.gz --train train.jsonl --val "
         "val.jsonl --target old", "data.jsonl more.jsonl data.jsonl.gz old",
         "train.jsonl val.jsonl", "", "--val_share --seed", "", weight=4),
    *(Base(f"eval.py --task {task} --data {task}.jsonl --target target --draft draft --judge "
           f"judge.safetensors --rules {rules} --out new --limit 1{more}",
           f"target draft judge.safetensors {task}.jsonl", "new", "",
           "--limit --speculate_k --max_new_tokens --temperature --top_k --top_p --seed",
           "--task --rules --device --dtype", weight=weight)
      for task, rules, more, weight in (
          ("gsm8k", "target,judge", "", 2), ("arc", "draft,topk:2 --chat", "", 2),
          ("humaneval", "draft", " --allow_code_execution", 1), ("demo", "standard,judge", "", 2),
          ("demo", "target,judge", " --temperature 0.7 --top_k 9 --samples 2", 2))),
    Base("eval.py --task gsm8k --data gsm8k.jsonl --target target --draft draft --judge "
         "judge.safetensors --rules target,judge --out results --limit 3",
         "target draft judge.safetensors gsm8k.jsonl", "results/results.json results/results.md "
         "results/accuracy.png", "results/answers.jsonl results/settings.json",
         "--limit --processes --speculate_k", "--rules --task", weight=3),
    Base("eval.py --task gsm8k --data gsm8k.jsonl --out results --rescore", "gsm8k.jsonl",
         "results/results.json results/results.md results/accuracy.png",
         "results/answers.jsonl results/settings.json", "--limit", "--task", weight=4),
    Base("eval.py --replay texts.jsonl --target target --draft draft --judge judge.safetensors "
         "--out new", "texts.jsonl target draft judge.safetensors", "new", "",
         "--limit --speculate_k", "--rules", weight=3),
    Base("eval.py --replay gsm8k.jsonl --target old --rules standard,topk:3 --chat",
         "gsm8k.jsonl old", "", "", "--limit --speculate_k", "--rules", weight=2),
    Base(f"benchmark.py --target big.json --draft small.json {BENCH} --json out.json --plot "
         "out.png", "big.json small.json", "out.json out.png", "", "--repeats --rows --speculate_k "
         "--max_new_tokens --prompt_tokens --accepted", "--target_quant --draft_quant --dtype "
         "--device --peer", weight=3),
    Base(f"benchmark.py --target target --draft draft --judge judge.safetensors --prompts "
         f"texts.jsonl {BENCH} --json out.json", "target draft judge.safetensors texts.jsonl",
         "out.json", "", "--repeats --rows --speculate_k --max_new_tokens --prompt_tokens "
         "--accepted", "--rules --dtype", weight=3),
    Base("annotate.py --data data.jsonl --out marked.jsonl --port 0", "data.jsonl",
         "marked.jsonl marked.jsonl.skipped", "", "--port", interrupt="open http", weight=3),
    Base("annotate.py --data data.jsonl --out trained.jsonl --port 0 --target target --judge "
         "judge.safetensors --chat", "data.jsonl target judge.safetensors",
         "trained.jsonl trained.jsonl.skipped", "", "--port", interrupt="open http", weight=2),
    Base("annotate.py --data mark.jsonl --out marked_before.jsonl --port 0", "mark.jsonl", "",
         "marked_before.jsonl marked_before.jsonl.skipped", "--port", interrupt="open http",
         weight=2),
    Base("convert_hf_checkpoint.py --checkpoint_dir hf --out new", "hf", "new", "", "", "--dtype",
         weight=5),
    Base("convert_hf_checkpoint.py --checkpoint_dir hf_old --out new --dtype float32", "hf_old",
         "new", "", "", "--dtype", weight=4),
    Base("quantize.py --checkpoint_dir target --mode int8 --out new", "target", "new", "",
         "--group_size", "--mode", weight=2),
    Base("quantize.py --checkpoint_dir old --mode int4 --group_size 32 --out new", "old", "new",
         "", "--group_size", "--mode", weight=2),
]


# ---------------------------------------------------------------- mutations of JSON

DEEP = 100_000
VALUES = [  # as they stand in the file
    "null", "true", "false", '""', '"x"', "-1", "0", "2", "1.5", "-0.0", "1e-320", "1e308", "1e400",
    "-1e400", "NaN", "Infinity", "-Infinity", "1" + "0" * 30, "1" + "0" * 5000,
    "-9223372036854775809", "9223372036854775808", "4294967296", "[]", "{}", "[[1, 2], [3]]",
    "[null]", '["x"]', '{"x": 1}', '[{"a": {}}]', "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP, '"\\ud800"', '"a\\udfffb"', '{"\\ud800": 1}',
    '["\\udc00"]', '"\\u0000"', '"\\u001b[31mred\\u001b[0m"',
    '"\\u001b]0;title\\u0007"', '"a\\nb\\r\\nc"', '"\\u202e\\u2028"', '"../../x"', '"/dev/zero"',
    '"' + "x" * 100_000 + '"', "[" + "0," * 100_000 + "0]", '"é🎉日本"', '"18446744073709551616"',
    '"nan"', '"inf"', "[1, 2, 3]", "[-1]", "[1e400]", "[true]", "[0.5, 0.5]"]
KEYS = ['"\\ud800"', '""', '"\\u001b[31m"', '"\\u0000"', '"x"', '"' + "k" * 70_000 + '"',
        '"__class__"', '"é"', '"domain"', '"where"', '"line"', '"id"']
VALUE, KEY = "@@value@@", "@@key@@"


def mutated(rng, value, deep=0.75) -> tuple[str, str]:
    """The text of a JSON value after one change somewhere inside it, and what was changed."""
    top = value = json.loads(json.dumps(value))
    where, key = [], None
    while isinstance(value, (dict, list)) and value:
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else
                                        range(len(value)))
        where, value = [*where, key], value[key]
        if rng.random() > deep:
            break
    place, kind = "/".join(map(str, where)) or "the whole", rng.random()
    if not where or kind < 0.62:
        new = rng.choice(VALUES)
        if not where:
            return new, f"{place} = {short(new)}"
        parent[key] = VALUE
        return json.dumps(top).replace(json.dumps(VALUE), new), f"{place} = {short(new)}"
    if kind < 0.78:
        del parent[key]
        return json.dumps(top), f"{place} removed"
    new = rng.choice(VALUES)
    if isinstance(parent, list):
        parent.insert(key, parent[key] if kind < 0.9 else VALUE)
        return (json.dumps(top).replace(json.dumps(VALUE), new),
                f"{place} twice" if kind < 0.9 else f"{place} after {short(new)}")
    name = json.dumps(key) if kind < 0.9 else rng.choice(KEYS)
    parent[KEY] = VALUE
    return (json.dumps(top).replace(json.dumps(KEY), name).replace(json.dumps(VALUE), new),
            f"{place}: beside it {short(name)}: {short(new)}")


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the same bytes at any time


def short(text: str) -> str:
    return text if len(text) < 60 else f"{text[:30]}...({len(text)})"


def json_file(rng, path: Path) -> str:
    text, what = mutated(rng, json.loads(path.read_text()))
    path.write_bytes(text.encode())
    return what


def json_lines_file(rng, path: Path) -> str:
    data = path.read_bytes()
    zipped = data[:2] == b"\x1f\x8b"
    lines = (gzip.decompress(data) if zipped else data).decode().splitlines()
    i, kind = rng.randrange(len(lines)), rng.random()
    what = f"line {i + 1}: "
    if kind < 0.75:
        lines[i], changed = mutated(rng, json.loads(lines[i]))
        what += changed
    elif kind < 0.85:
        lines.insert(rng.randrange(len(lines) + 1), lines[i])
        what += "twice"
    else:
        new = rng.choice(["{", "[1]", "null", "\0", '{"a": 1}{"b": 2}', "{}", "\ufeff{}", "3",
                          "[" * DEEP, lines[i][:len(lines[i]) // 2]])
        lines[i] = new
        what += f"is {short(new)!r}"
    data = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(packed(data) if zipped else data)
    return what


# ---------------------------------------------------------------- of any file

def whole_file(rng, path: Path) -> str:
    """Other bytes in a file's place."""
    data = path.read_bytes()
    half = len(data) // 2
    zipped = packed(data)
    at = rng.randrange(len(data) + 1)
    garbage = rng.randbytes(300)
    made = {
        "empty": b"", "null": b"null", "[]": b"[]", "{}": b"{}", "a number": b"17",
        "cut to half": data[:half], f"cut at {at}": data[:at], "garbage": garbage,
        "UTF-16": data.decode("utf-8", "replace").encode("utf-16"), "BOM": b"\xef\xbb\xbf" + data,
        "CRLF": data.replace(b"\n", b"\r\n"), "NUL bytes": b"\0" * 400,
        "a NUL inside": data[:at] + b"\0" + data[at:], "5 MB of [": b"[" * 5_000_000,
        "5 MB of {": b'{"":' * 1_300_000, "not UTF-8": data[:at] + b"\xff\xfe" + data[at:],
        "gzip": zipped, "half a gzip": zipped[:len(zipped) // 2],
        "gzip with a wrong CRC": zipped[:-8] + b"\1\2\3\4" + zipped[-4:],
        "gzip of garbage": packed(garbage), "two gzips": zipped + zipped,
        "gzip and garbage": zipped + garbage, "gzip broken inside":
        zipped[:len(zipped) // 2] + garbage + zipped[len(zipped) // 2 + 300:],
        "a web page": b"<!DOCTYPE html><html></html>", "gzip's first bytes": b"\x1f\x8b",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n", "twice": data + data,
        "a quoted string": b'"' + b"x" * 1000 + b'"', "an open string": b'{"' + b"x" * 100_000,
        "spaces": b" " * 1000, "lone surrogate as bytes": data[:at] + b"\xed\xa0\x80" + data[at:],
        "bytes changed": bytes(b ^ (rng.random() < 0.02) * rng.randrange(256) for b in data)
        if len(data) < 100_000 else data[:half] + garbage + data[half + 300:]}
    what = rng.choice(list(made))
    path.write_bytes(made[what])
    return what


def file_kind(rng, path: Path) -> str:
    """Something else in a file's or directory's place."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind = rng.choice(["missing", "a directory", "a FIFO", "/dev/zero", "/dev/null",
                       "a loop of links", "a dangling link", "a socket", "/dev/stdin", "/dev/full",
                       "/dev/random", "a link to a directory", "/proc/self/fd/0",
                       "/proc/self/status", "/"])
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a loop of links":
        path.symlink_to(path.name)
    elif kind == "a dangling link":
        path.symlink_to("nowhere")
    elif kind == "a link to a directory":
        path.symlink_to(".")
    elif kind == "a socket":
        before = os.getcwd()
        os.chdir(path.parent)  # a socket's address is short
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
        os.chdir(before)
    elif kind.startswith("/"):
        path.symlink_to(kind)
    return f"is {kind}"


# ---------------------------------------------------------------- of weights

def header_of(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def with_header(text: bytes, rest: bytes, length=None) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + rest


def safetensors_file(rng, path: Path) -> str:
    """Damage in a safetensors file's header or numbers."""
    data = path.read_bytes()
    header, rest = header_of(data)
    text, kind = json.dumps(header).encode(), rng.random()
    if kind < 0.35:
        new, what = mutated(rng, header, 0.9)
        path.write_bytes(with_header(new.encode(), rest))
        return f"header: {what}"
    name = rng.choice([n for n in header if n != "__metadata__"])
    start, end = header[name]["data_offsets"]
    if kind < 0.65:
        number = rng.choice([math.nan, math.inf, -math.inf, 3e38, 0.0, 1e-40])
        kind = torch.bfloat16 if header[name]["dtype"] == "BF16" else torch.float32
        word = bytes(torch.tensor([number], dtype=kind).view(torch.uint8).tolist())
        size = len(word)
        count = (end - start) // size
        at, n = (0, count) if rng.random() < 0.5 else (rng.randrange(count), 1)
        rest = rest[:start + at * size] + word * n + rest[start + (at + n) * size:]
        path.write_bytes(with_header(text, rest))
        return f"{name}: {'all' if n > 1 else 'one'} {number}"
    other = rng.choice(list(header))
    made = {
        "header length huge": struct.pack("<Q", 2**63) + data[8:],
        "header length 100 MB": struct.pack("<Q", 10**8) + data[8:],
        "header length 0": struct.pack("<Q", 0) + data[8:],
        "header length is -1": b"\xff" * 8 + data[8:],
        "header is not JSON": with_header(b"x" * len(text), rest),
        "header is deep": with_header(b'{"a":' * DEEP + b"1" + b"}" * DEEP, rest),
        "header is []": with_header(b"[]", rest), "header is {}": with_header(b"{}", rest),
        "header is {} alone": with_header(b"{}", b""),
        "cut": data[:len(data) - rng.randrange(1, len(rest))], "cut to 7 bytes": data[:7],
        "bytes after the end": data + b"\0" * 100,
        f"{name} takes the offsets of {other}": with_header(json.dumps(
            header | {name: header[name] | {"data_offsets": header[other].get(
                "data_offsets", [0, 0])}}).encode(), rest),
        f"{name} twice": with_header(text[:-1] + b", " + json.dumps(
            {name: header[name]}).encode()[1:], rest)}
    for what, change in (("is empty", {"shape": [0], "data_offsets": [0, 0]}),
                         ("has no rows", {"shape": [0, 32], "data_offsets": [0, 0]}),
                         ("is a number", {"shape": []}), ("is one row", {"shape": [1, -1]}),
                         ("is flat", {"shape": [(end - start) // 4]})):
        made[f"{name} {what}"] = with_header(json.dumps(
            header | {name: header[name] | change}).encode(), rest)
    for dtype in ("F64", "I64", "BOOL", "U8", "F16", "BF16", "F8_E5M2", "C64", "F4", "x"):
        made[f"{name} is {dtype}"] = with_header(json.dumps(
            header | {name: header[name] | {"dtype": dtype}}).encode(), rest)
    what = rng.choice(list(made))
    path.write_bytes(made[what])
    return what


def metadata_of_safetensors(rng, path: Path) -> str:
    """Another text in the metadata of a judge file or a features file."""
    header, rest = header_of(path.read_bytes())
    metadata = header.get("__metadata__", {})
    key = rng.choice([*metadata, "x"])
    new = rng.choice(["", "nan", "inf", "-1", "2", "x", "1e400", "0x10", "1_0", " 0.5 ", "null",
                      "{}", "[]", "[[]]", "[1]", '["x"]', "[[1]]", "[[1, 2]]", '[["a", "b", "c"]]',
                      "[[NaN, 0, 0]]", "[null]", "{", "[" * DEEP, "\u0660", "\x1b[31m", "9" * 5000,
                      '{"target": 1, "data": 2, "dtype": 3}',
                      '{"target": {}, "data": [], "dtype": 0}'])
    if rng.random() < 0.3:
        metadata.pop(key, None)
        what = f"metadata {key} removed"
    else:
        metadata[key], what = new, f"metadata {key} = {short(new)!r}"
    path.write_bytes(with_header(json.dumps(header | {"__metadata__": metadata}).encode(), rest))
    return what


# ---------------------------------------------------------------- of templates and tokenizers

TEMPLATES = [
    "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ undefined.x }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}", "{{ 'x' * 10**7 }}",
    "{% set x = 'x' * 10**8 %}{{ x|upper|lower|length }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% if %}", "{{", "{{ ''.__class__ }}",
    "{% include 'x' %}", "{% extends 'x' %}", "{% import 'x' as y %}", "", " ",
    "{{ raise_exception('\x1b[31m\n\nx') }}", "{{ messages[9].content }}", "{{ messages.x.y }}",
    "{{ raise_exception(messages) }}", "{{ '\\ud800' }}", "{{ '\\x00' }}", "{{ 10**10**6 }}",
    "{{ 10**5000 }}", "{{ messages|tojson(indent=10**9) }}", "{{ strftime_now(1) }}", "{{ x() }}",
    "{{ strftime_now('%' * 1000) }}", "{% for m in messages %}{{ m.content + 1 }}{% endfor %}",
    "{{ ('a' * 99999)|wordwrap(1) }}", "{{ [1]|batch(0)|list }}", "{{ 'x'|indent(10**9) }}",
    "{{ '%1000000000d' % 1 }}", "{{ raise_exception('x' * 10**7) }}", "(" * 9999,
    "{{ " + "(" * 9999, "{{ " + "[" * 2000 + "]" * 2000 + " }}", "{{ range(10**12)|list }}",
    "{{ messages|sort }}", "{{ {}[[]] }}", "{{ raise_exception() }}", "{{ self }}", "{% raw %}",
    "{{ 'a'.encode() }}", "{{ messages[0].content.format(a=1) }}",
    "{{ '{0.__class__}'.format(1) }}", "\ufdd0", "{{ none.x }}", "{{ raise_exception(none) }}",
    "{% set ns = namespace() %}{{ ns.x.y }}", "{{ 'x'|nofilter }}",
    "{{ messages|map(attribute='x.y.z')|list|join(1) }}", "{{ lipsum(n=10**6) }}",
    "{{ 2.0**9999 }}"]


def template(rng, path: Path) -> str:
    new = rng.choice(TEMPLATES)
    path.write_text(new)
    return f"is {short(new)!r}"


def model_file(rng, path: Path) -> str:
    """Another content of a tokenizer.model."""
    data, letter = path.read_bytes(), base64.b64encode
    at = rng.randrange(len(data))
    ranks = b"".join(letter(bytes([i])) + b" %d\n" % i for i in range(256))
    made = {
        "a byte changed": data[:at] + bytes([rng.randrange(256)]) + data[at + 1:],
        "a byte lost": data[:at] + data[at + 1:], "cut": data[:at], "ranks": ranks,
        "ranks, one twice": ranks + letter(b"ab") + b" 7\n" + letter(b"ab") + b" 8\n",
        "ranks, a huge one": ranks + letter(b"ab") + b" 1" + b"0" * 30 + b"\n",
        "ranks, one of 5000 digits": ranks + letter(b"ab") + b" 1" + b"0" * 5000 + b"\n",
        "ranks, a negative one": ranks + letter(b"ab") + b" -1\n",
        "ranks, no number": ranks + letter(b"ab") + b" x\n", "ranks, no base64": ranks + b"! 300\n",
        "ranks, three words": ranks + b"YQ== 300 4\n", "ranks, a few": ranks[:40],
        "ranks, an empty token": ranks + b" 300\n",
        "ranks, rank of two": ranks + letter(b"ab") + b" 5\n", "pieces alone": data[:2000],
        "protobuf of nothing": b"\x0a\x00", "a digit of Arabic": "YQ== \u0663\n".encode(),
        "a superscript": "YQ== \u00b2\n".encode()}
    what = rng.choice(list(made))
    path.write_bytes(made[what])
    return what


# ---------------------------------------------------------------- of a run

class Run:
    """A command line on a copy of the inputs, and what was done to it and to them."""

    def __init__(self, seed: int, number: int, inputs: Path, home: Path, base: Base | None = None):
        """base: to be left as it is; else one is drawn, and its mutations."""
        self.rng, self.seed, self.number = random.Random(f"{seed} {number}"), seed, number
        self.home, self.done, self.env, self.lost = home, [], {}, False
        self.base = base or self.rng.choices(BASES, [b.weight for b in BASES])[0]
        self.argv, self.stdin = list(self.base.argv), self.base.stdin.encode()
        self.closed = {}  # name of a standard file: what it is instead
        self.inputs, self.outputs = list(self.base.inputs), list(self.base.outputs)
        home.mkdir()
        for name in {Path(p).parts[0] for p in (*self.inputs, *self.base.logs)}:
            copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
            copy(inputs / name, home / name)
        for _ in range(0 if base else 1 + (self.rng.random() < 0.3)):
            kinds, weights = zip(*KINDS)
            what = None
            while what is None:  # a mutation that has no place in this run
                kind = self.rng.choices(kinds, weights)[0]
                what = kind(self, self.rng)
            self.done.append(what)

    def __str__(self):
        line = " ".join(shown(short(a)) for a in self.argv)
        return f"{line}   [{'; '.join(map(shown, self.done))}]"


def shown(text: str) -> str:
    return ascii(text)[1:-1] if not text.isascii() or not text.isprintable() else text


def files(run: Run, rng, suffixes=None) -> Path | None:
    """One of the files that a run reads: an input is drawn, then a file in it."""
    found = [[p for p in ([path] if path.is_file() else sorted(path.rglob("*"))) if p.is_file()
              and not p.is_symlink() and (suffixes is None or p.name.endswith(suffixes))]
             for path in map(run.home.joinpath, (*run.inputs, *run.base.logs))
             if not path.is_symlink()]
    found = [f for f in found if f]
    return rng.choice(rng.choice(found)) if found else None


def on_file(change, suffixes=None):
    """A mutation that applies `change(rng, path)` to one of the run's files."""
    def mutation(run, rng):
        if path := files(run, rng, suffixes):
            damaged = ValueError, RecursionError, OSError, EOFError, zlib.error  # before
            with contextlib.suppress(*damaged):
                return f"{path.relative_to(run.home)}: {change(rng, path)}"
    return mutation


def in_place(run, rng):
    """Something else in the place of an input or of a file in one."""
    if rng.random() < 0.4:
        path = run.home / rng.choice([*run.inputs, *run.base.logs])
    else:
        path = files(run, rng)
    if path and os.path.lexists(path):
        return f"{path.relative_to(run.home)} {file_kind(rng, path)}"


NAMES = ["a\x1b[31mb", "a\nb", "b\udcff\udcfe", "🎉", "x" * 255, "-x", " ", "a b", "a\u202eb",
         "%s{}", "*", "[a-z]", "x" * 240, "'\"", "\x07", "a:b", "~", "$HOME", "a\rb", "é"]


def rename(run, rng):
    """An input gets a strange name."""
    name, new = rng.choice(run.inputs or [None]), rng.choice(NAMES)
    if name in run.argv and not os.path.lexists(run.home / new):
        (run.home / name).rename(run.home / new)
        run.argv = [new if a == name else a for a in run.argv]
        run.inputs = [new if a == name else a for a in run.inputs]
        return f"{name} is called {short(new)!r}"


VALUES_OF_FLAGS = ["-1", "0", "1", "1e-320", "1e-45", "1e308", "nan", "inf", "-inf", "1" + "0" * 30,
                   "", "1" + "0" * 5000, "\udcff", "0.5", "x", "1e400", "2147483648",
                   "9223372036854775808", "1,2", ",", "0,0", "1_0", " 3", "\u0663", "99999999",
                   "4096", "\x1b[31m", "1e-3"]
LONG = "4096", "99999999", "2147483648", "9223372036854775808"
WORDS_OF_FLAGS = ["", "x", "cuda", "bfloat16", "float16", "\udcff", "judge:nan", "topk:0",
                  "topk:1e30", "typical:1", "kl:-1", "kl:inf", "judge:1e-320", "standard:1",
                  "judge:", ":", "topk:x", "a,b,,", "\x1b[31m", "fp8", "int8", "int4", "hf",
                  "autojudge", "bisect", "arc", "demo", "x" * 5000, "target", "draft",
                  "topk:9999999", "gsm8k", "humaneval"]


def put_flag(run, flag, value):
    if flag in run.argv[:-1]:
        run.argv[run.argv.index(flag) + 1] = value
    else:
        run.argv += [flag, value]


def number_flag(run, rng):
    if run.base.numbers:
        flag, value = rng.choice(run.base.numbers), rng.choice(VALUES_OF_FLAGS)
        if flag in ("--samples", "--repeats") and value in LONG:  # so much work is no fault
            return None
        put_flag(run, flag, value)
        return f"{flag} {short(value)!r}"


def word_flag(run, rng):
    if run.base.words:
        flag, value = rng.choice(run.base.words), rng.choice(WORDS_OF_FLAGS)
        put_flag(run, flag, value)
        return f"{flag} {short(value)!r}"


def odd_flags(run, rng):
    """A flag without its value, twice, left out, or unknown; a text that is none."""
    flags = [i for i, a in enumerate(run.argv) if a.startswith("--")]
    i, kind = rng.choice(flags), rng.choice(("no value", "twice", "left out", "unknown", "text",
                                             "last"))
    flag, valued = run.argv[i], run.argv[i + 1:i + 2] and not run.argv[i + 1].startswith("--")
    if kind == "no value" and valued:
        del run.argv[i + 1]
    elif kind == "twice":
        run.argv += run.argv[i:i + 1 + bool(valued)]
    elif kind == "left out":
        del run.argv[i:i + 1 + bool(valued)]
    elif kind == "unknown":
        run.argv.append(flag := rng.choice(["--x", "-", "--", "--\x1b[31m", "--\udcff", "x", "--t",
                                            "-h"]))
    elif kind == "text" and "--prompt" in run.argv:
        put_flag(run, flag := "--prompt", rng.choice(
            ["", "\udcff", " ", "x " * 20_000, "\x1b[31m", "\ufdd0<s>\ufdd1", "a\nb",
             "<|eot_id|>"]))
    elif kind == "last" and valued:
        run.argv = run.argv[:i] + run.argv[i + 2:] + [flag]
    else:
        return None
    return f"{kind}: {flag}"


def output(run, rng):
    """An output where it cannot be, or where an input is."""
    places = [p for p in (*run.outputs, *run.base.logs) if p in run.argv]
    if not places:
        return None
    old, new = rng.choice(places), f"other{len(run.done)}"
    kind = rng.choice(["an input", "an input", "a link to an input", "./ of an input",
                       "a hard link to an input", "a hard link to an input", "nowhere/x",
                       "a directory", "a FIFO", "a device", "a link to /dev/full",
                       "a link to /dev/null", "a link to /dev/stdout", "/proc/x", "another output",
                       "a loop of links", "a file/x", ".", "", "name", "a file that is there",
                       "a dangling link"])
    given = files(run, rng)  # also one inside a checkpoint's directory
    given = given and str(given.relative_to(run.home))
    if kind == "an input" and given:
        new = given
    elif kind == "./ of an input" and given:
        new = f"./{given}"
    elif kind == "a link to an input" and given:
        (run.home / new).symlink_to(given)
    elif kind == "a hard link to an input" and (run.home / (given or "/")).is_file():
        os.link(run.home / given, run.home / new)
    elif kind == "a directory":
        (run.home / new).mkdir()
    elif kind == "a FIFO":
        os.mkfifo(run.home / new)
    elif kind == "a loop of links":
        (run.home / new).symlink_to(new)
    elif kind == "a dangling link":
        (run.home / new).symlink_to("nowhere")
    elif kind == "a file that is there":
        (run.home / new).write_text("{}\n")
    elif kind == "a file/x":
        (run.home / "file").write_text("x")
        new = "file/x"
    elif kind == "another output":
        new = next((p for p in places if p != old), None) or "--json"
    elif kind == "name":
        new = rng.choice(NAMES)
    elif kind == "a device":  # never the machine's own: root's rename would replace it
        try:
            os.mknod(run.home / new, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:  # not root
            os.mkfifo(run.home / new)
    elif kind.startswith("a link to /"):
        (run.home / new).symlink_to(kind.removeprefix("a link to "))
    elif kind in ("", ".", "nowhere/x", "/proc/x"):
        new = kind
    else:
        return None
    run.argv = [new if a == old else a for a in run.argv]
    run.outputs = [new if a == old else a for a in run.outputs]
    return f"{old} is {kind}: {short(new)!r}"


def more_output(run, rng):
    """A second flag that writes, at a place that is taken."""
    taken = [p for p in (*run.inputs, *run.outputs, *run.base.logs) if p in run.argv]
    flags = [f for f in ("--json", "--out", "--features", "--report", "--train", "--val", "--plot")
             if any(f in b.argv for b in BASES if b.argv[:1] == run.argv[:1])]
    if flags and taken:
        flag, place = rng.choice(flags), rng.choice(taken)
        put_flag(run, flag, place)
        return f"{flag} {place}"


def surroundings(run, rng):
    """Standard files closed, another language, no home, no place for temporary files."""
    kind = rng.choice(["stdout closed", "stdout gone", "stdout full", "stderr closed",
                       "stderr gone", "stderr full", "stdin closed", "stdin", "LANG", "ascii",
                       "HOME", "cwd", "TMPDIR", "NO_COLOR", "COLUMNS", "no PATH", "WORLD_SIZE",
                       "OMP"])
    name, _, how = kind.partition(" ")
    if how in ("closed", "gone", "full") and not (run.base.interrupt and name == "stdout"):
        run.closed[name] = "/dev/full" if how == "full" else how
    elif kind == "stdin":
        run.stdin = rng.choice([b"\xff\xfe\n", b"\0\0\n", b"x" * 1_000_000, b"a\rb\nc",
                                b"\xed\xa0\x80\n", b"the cat " * 3000 + b"\n", b"\x1b[31m\n", b"a",
                                b"\n" * 1000])
    elif kind in SETTINGS:
        run.env |= SETTINGS[kind]
    elif kind == "cwd":
        run.lost = True
        run.argv = [run.argv[0], *(str(run.home / a) if a in (*run.inputs, *run.outputs,
                                                              *run.base.logs)
                                   else a for a in run.argv[1:])]
    else:
        return None
    return f"surroundings: {kind}"


SETTINGS = {
    "LANG": {"LC_ALL": "C", "PYTHONIOENCODING": None}, "ascii": {"PYTHONIOENCODING": "ascii"},
    "HOME": {"HOME": None}, "TMPDIR": {"TMPDIR": "/proc/nowhere"}, "NO_COLOR": {"NO_COLOR": "1"},
    "COLUMNS": {"COLUMNS": "-5", "LINES": "x"}, "no PATH": {"PATH": ""},
    "WORLD_SIZE": {"WORLD_SIZE": "x", "RANK": "0"}, "OMP": {"OMP_NUM_THREADS": "x"}}
CHECKPOINT = ("config.json", "generation_config.json", "tokenizer_config.json", "settings.json",
              "special_tokens_map.json", "added_tokens.json", "index.json", "big.json",
              "small.json")
KINDS = [
    (on_file(json_file, CHECKPOINT), 20), (on_file(json_file, "tokenizer.json"), 3),
    (on_file(json_lines_file, (".jsonl", ".jsonl.gz", ".skipped")), 14),
    (on_file(whole_file), 9), (on_file(whole_file, (".json", ".jsonl", ".gz")), 5), (in_place, 9),
    (on_file(safetensors_file, ".safetensors"), 8),
    (on_file(metadata_of_safetensors, (".safetensors",)), 3),
    (on_file(template, ".jinja"), 3), (on_file(model_file, "tokenizer.model"), 3), (rename, 4),
    (number_flag, 10), (word_flag, 4), (odd_flags, 4), (output, 12), (more_output, 4),
    (surroundings, 8)]
