"""Every command that runs a model on several ranks: the results of one process, one speaker, files
by rank 0 alone, an error said once, and no end that hangs.
"""
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import eval as E
import generate
import make_judge_data as M
import train_judge as T
from demo.corpus import first_error, render
from demo.corpus import problems as problems_of
from helpers import random_model, run_command, save_checkpoint, tiny_config
from judge import above_threshold
from judge_data.data import encode, read_data
from judge_data.features import hidden_states
from load import load_judge, read_vocabulary
from test_tp import DEMO, PROMPT, ROOT, SHARED, script, torchrun

pytestmark = pytest.mark.slow
CPU = ("--device", "cpu")
PAIR = ("--target", DEMO / "target", "--draft", DEMO / "draft")
JUDGE = ("--judge", DEMO / "judge.safetensors")
TEMPLATE = ("Question: Mira has 3 eggs. {% for m in messages %}{{ m.content }}\n{% endfor %}"
            "Answer: So")  # an opening that the demo's target goes on with
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path, *ignored) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k not in ignored}
            for line in path.read_text().splitlines()]


def jobs(problems, texts, out) -> list[tuple]:
    """(command, arguments) of each command that reads or makes many answers; results in `out`."""
    answers, mined, auto = (out / f"{name}.jsonl" for name in ("answers", "mined", "auto"))
    mine = ("mine", "--data", answers, *PAIR, *CPU, "--method")
    rules = ("--rules", "target,draft,standard,topk:3,judge")
    return [
        ("eval", "--task", "demo", "--data", problems, *PAIR, *JUDGE, *CPU, *rules, "--out",
         out / "eval"),
        # two turns: each rank words the second one from its own tokens
        ("eval", "--task", "mt_bench", "--data", out.parent / "talk.jsonl", "--target",
         out.parent / "chat", "--chat", "--rules", "target", "--max_new_tokens", "12", *CPU,
         "--out", out / "talk"),
        ("eval", "--replay", texts, *PAIR, *JUDGE, *CPU, "--rules", "standard,kl:0.5,judge",
         "--out", out / "replay"),
        ("make_judge_data", "generate", "--prompts", problems, "--models", DEMO / "draft",
         DEMO / "target", *CPU, "--out", answers),
        ("make_judge_data", *mine, "first_error", "--out", mined),
        ("make_judge_data", *mine, "autojudge", "--out", auto),
        ("train_judge", "--target", DEMO / "target", *CPU, "--data", out.parent / "data.jsonl",
         "--out", out / "judge.safetensors", "--features", out / "features.safetensors",
         "--val_share", "0.4"),
        # from the features that are there now: the other ranks have nothing to do
        ("train_judge", "--target", DEMO / "target", *CPU, "--data", out.parent / "data.jsonl",
         "--out", out / "again.safetensors", "--features", out / "features.safetensors",
         "--val_share", "0.4"),
    ]


ALL = """
import importlib, json
import common
def not_here(*args, **kwargs):
    raise AssertionError("reading data, scoring and writing is rank 0's alone")
def main():
    if job.rank():
        for name in ("json_lines", "replacing", "make_directory", "AnswerLog"):
            setattr(common, name, not_here)
        from evaluation.tasks import TASKS
        TASKS["demo"].score = not_here
    for module, *args in json.load(open(sys.argv[1])):
        sys.argv = [module, *args]
        importlib.import_module(module).main()
        print(f"{module} is done", flush=True)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What each command makes of the same input, alone and as two ranks."""
    home = tmp_path_factory.mktemp("ranks")
    problems, texts = home / "problems.jsonl", home / "texts.jsonl"
    rows = [json.loads(line) for line in (DEMO / "problems.jsonl").read_text().splitlines()]
    write(problems, rows[600:601])
    answers = [(p, render(p.solution, random.Random(i), "draft")) for task in ("maths", "facts")
               for i, p in enumerate(islice(problems_of(task, "judge"), 12))]
    write(texts, ({"prompt": p.prompt, "text": text} for p, text in answers[:4]))
    # Every second answer with some letters exchanged.
    answers = [(p, text.translate({ord("2"): "7", ord("k"): "g"}) if i % 2 else text)
               for i, (p, text) in enumerate(answers)]
    write(home / "data.jsonl", ({"prompt": p.prompt, "answer": text, "error": first_error(p, text)}
                                for p, text in answers))
    shutil.copytree(DEMO / "target", home / "chat")
    (home / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    write(home / "talk.jsonl", [{"question_id": 8, "category": "c", "turns": ["Count.", "Again!"]}])
    for name in ("one", "two"):
        (home / name).mkdir()
    with pytest.MonkeyPatch.context() as m:
        for module, *args in jobs(problems, texts, home / "one"):
            run_command(m, {"eval": E, "make_judge_data": M, "train_judge": T}[module], *args)
    work = [list(map(str, job)) for job in jobs(problems, texts, home / "two")]
    (home / "jobs.json").write_text(json.dumps(work))
    done = torchrun(script(home, ALL), home / "jobs.json")
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(home=home, one=home / "one", two=home / "two", done=done)


def test_one_rank_speaks(made):
    assert made.done.stdout.count("is done") == 8
    assert made.done.stderr.count("2 processes on CPUs, joined by gloo") == 1
    assert "target runs whole on each rank: 6.29 MB a layer" in made.done.stderr
    assert "Traceback" not in made.done.stderr


def test_both_make_the_same_files(made):
    files = [sorted(p.relative_to(d) for d in [d] for p in d.rglob("*") if p.is_file())
             for d in (made.one, made.two)]
    assert files[0] == files[1] and len(files[0]) > 10


def test_eval_gives_the_same_answers_and_says_how_many_ranks(made):
    answers = [lines(d / "eval/answers.jsonl", "seconds") for d in (made.one, made.two)]
    assert answers[0] == answers[1] and len(answers[0]) == 5
    assert {a["rule"] for a in answers[0] if a["accepted"]} == {"standard", "topk:3", "judge"}
    assert "float32, eager, cpu, 2 ranks" in (made.two / "eval/results.md").read_text()
    assert (made.one / "replay/replay.json").read_bytes() == (
        made.two / "replay/replay.json").read_bytes()


def test_the_second_turn_is_the_same(made):
    [one], [two] = (lines(d / "talk/answers.jsonl", "seconds") for d in (made.one, made.two))
    assert one == two and len(one["turns"]) == 2 and all(one["turns"])


def test_judge_data_is_the_same_byte_for_byte(made):
    for name in ("answers", "mined", "auto"):
        one, two = ((d / f"{name}.jsonl").read_bytes() for d in (made.one, made.two))
        assert one == two, name
    errors = [line["error"] for name in ("mined", "auto")
              for line in lines(made.two / f"{name}.jsonl")]
    assert None in errors and any(errors)


def test_features_and_the_judge_made_of_them(made):
    one, two = (load_file(d / "features.safetensors")["hidden"] for d in (made.one, made.two))
    assert one.shape == two.shape and len(one) > 500
    assert (one - two).abs().max() < 1e-5 * one.abs().max()
    # Two ranks are as near to what float64 gives as one process is.
    config, tokenizer = read_vocabulary(DEMO / "target")
    encoded = encode(tokenizer, read_data(made.home / "data.jsonl"), config.max_seq_len, False)
    exact = hidden_states(checkpoint.load(DEMO / "target", "cpu", torch.float64), encoded,
                          torch.float64)
    far = [(x - exact).abs().max() for x in (one, two)]
    assert far[1] < 2 * far[0] < 1e-4
    accepted = []
    for d, hidden in ((made.one, one), (made.two, two)):
        head = load_judge(d / "judge.safetensors", DEMO / "target")
        accepted.append(above_threshold(head(hidden), head.threshold))
        assert (d / "again.safetensors").read_bytes() == (d / "judge.safetensors").read_bytes()
    assert torch.equal(*accepted) and 0 < accepted[0].sum() < len(one)


def test_a_run_with_other_ranks_is_not_resumed(made, monkeypatch, capsys):
    (made.home / "problems.jsonl").touch()
    job = jobs(made.home / "problems.jsonl", made.home / "texts.jsonl", made.two)[0]
    with pytest.raises(Exception, match="ranks was 2, now None"):
        E.main(list(map(str, job[1:])))


def test_two_ranks_resume_what_a_kill_cut_off(made, tmp_path):
    """The answers of one process, the last of them torn, go on as two ranks' work."""
    whole = (made.one / "answers.jsonl").read_bytes()
    cut = tmp_path / "answers.jsonl"
    cut.write_bytes(whole[:len(whole) * 2 // 3])
    shutil.copy(made.one / "answers.jsonl.settings.json", tmp_path)
    job = next(j for j in jobs(made.home / "problems.jsonl", None, made.two) if "generate" in j)
    done = torchrun(ROOT / "make_judge_data.py", *job[1:-1], cut)
    assert done.returncode == 0, done.stderr
    assert cut.read_bytes() == whole


# ---------------------------------------------------------------- more ranks than KV heads

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A random pair with the demo's tokenizer: 4 heads and 2 KV heads, of which 4 ranks hold each
    twice.
    """
    home = tmp_path_factory.mktemp("pair")
    config = tiny_config(vocab_size=1024, max_position_embeddings=256)
    model = random_model(config)
    for name in ("target", "draft"):
        save_checkpoint(home / name, model, config)
        for p in model.parameters():  # the draft differs a little
            p.data += 0.02 * torch.randn_like(p)
        shutil.copy(DEMO / "target/tokenizer.model", home / name)
    return home


def command(home, out):
    return ("--target", home / "target", "--draft", home / "draft", "--prompt", PROMPT, *CPU,
            "--speculate_k", "4", "--max_new_tokens", "40", "--ignore_eos", "--temperature", "0.7",
            "--json", out)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_two_machines(home, checkpoints, text=SHARED) -> list:
    """A script as 2 x 2 ranks, each machine in a directory of its own where `checkpoints` links to
    the pair; the first alone has a place for results. [(exit code, stdout, stderr)].
    """
    port, machines = free_port(), []
    for machine, pair in enumerate(checkpoints):
        here = home / f"machine{machine}"
        here.mkdir()
        (here / "checkpoints").symlink_to(pair)
        if machine == 0:
            (here / "results").mkdir()
        args = [*TORCHRUN, "--nnodes=2", f"--node_rank={machine}", "--nproc_per_node=2",
                "--master_addr=127.0.0.1", f"--master_port={port}", script(here, text),
                *command(here / "checkpoints", "results/two.json")]
        machines.append(subprocess.Popen(
            list(map(str, args)), cwd=here, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    said = [m.communicate(timeout=300) for m in machines]
    return [(m.returncode, *s) for m, s in zip(machines, said)]


def said_by_ranks(stderr: str) -> str:
    """stderr of a machine up to torchrun's own log, which begins when its ranks have ended: the
    machine without torchrun's store may see that store go before it hears that all have ended.
    """
    return re.split(r"^\[?[EW]\d{4} ", stderr, maxsplit=1, flags=re.M)[0]


def test_two_machines_of_two_ranks_hold_each_kv_head_twice(pair, tmp_path):
    one = tmp_path / "one.json"
    done = subprocess.run([sys.executable, ROOT / "generate.py", *map(str, command(pair, one))],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (code, out, err), second = on_two_machines(tmp_path, (pair, pair))
    assert code == 0 and second[:2] == (0, "") and not said_by_ranks(second[2]), (err, second)
    two = json.loads((tmp_path / "machine0/results/two.json").read_text())
    one = json.loads(one.read_text())
    assert (two["tokens"], two["sources"]) == (one["tokens"], one["sources"])
    assert one["mean_accepted"] > 0.5 and out == done.stdout
    assert "4 processes on CPUs" in err and "draft runs shared by 4 ranks" in err


WAITS = """
def main():
    job.start("cpu")
    if job.rank() == 3:
        raise RuntimeError("had enough")
    time.sleep(1000)  # like a recorded round that waits for rank 3
"""


@pytest.mark.parametrize("text, other, message", [
    (SHARED, "nothing", "error: checkpoint directory .* does not exist"),
    (SHARED, "tokenizer", "error: the hash of a tokenizer.model is .* on rank [23], .* on rank 0"),
    (WAITS, "pair", "RuntimeError: had enough")])
def test_what_is_wrong_on_one_machine_ends_both(text, other, message, pair, tmp_path):
    places = {"pair": pair, "nothing": tmp_path / "nothing", "tokenizer": tmp_path / "tokenizer"}
    shutil.copytree(pair, places["tokenizer"])
    for name in ("target", "draft"):  # another at its end, where no token is
        with open(places["tokenizer"] / name / "tokenizer.model", "ab") as f:
            f.write(b"\x12\x00")
    start = time.time()
    (code, _, err), (second, _, why) = on_two_machines(tmp_path, (pair, places[other]), text)
    assert code and second and time.time() - start < 100
    assert len(re.findall(message, why)) == 1, why
    assert "error: " not in err and "Error: " not in said_by_ranks(err), err


WRONG = """
import engine, generate, judge
def main():
    if job.rank():
        judge.accept_mask = lambda v, *_: ~v.passed
        engine.choose = lambda logits, *_: logits.argmin(-1)
    generate.main()
"""


def test_rank_0_decides_for_all(tmp_path):
    """Another rank's decisions, here all wrong, change nothing."""
    args = (*PAIR, *JUDGE, "--prompt", PROMPT, "--max_new_tokens", "40", *CPU, "--json")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    with pytest.MonkeyPatch.context() as m:
        run_command(m, generate, *args, one)
    done = torchrun(script(tmp_path, WRONG), *args, two)
    assert done.returncode == 0, done.stderr
    one, two = json.loads(one.read_text()), json.loads(two.read_text())
    speeds = dict.fromkeys(("seconds", "tokens_per_sec"))
    assert one | speeds == two | speeds and "judge" in one["sources"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_tokens_of_one(tmp_path):
    """NCCL inside recorded rounds, and an end that does not wait for the graphs that hold it."""
    args = (*PAIR, *JUDGE, "--prompt", PROMPT, "--max_new_tokens", "60", "--device", "cuda",
            "--dtype", "float32", "--compile", "--json")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    subprocess.run([sys.executable, ROOT / "generate.py", *map(str, args), one], check=True,
                   env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    done = torchrun(ROOT / "generate.py", *args, two)
    assert done.returncode == 0, done.stderr
    assert json.loads(one.read_text())["tokens"] == json.loads(two.read_text())["tokens"]


# ---------------------------------------------------------------- how a run ends

FAILS = """
import engine, generate
from common import UserError
class Out(Exception): pass
original = engine.Engine.round
def round(self):
    if job.rank() == 1 and len(self.tokens) > 60:
        raise Out("this rank has had enough")
    return original(self)
def main():
    engine.Engine.round = round
    generate.main()
"""
ALONE = ("--target", DEMO / "target", "--prompt", PROMPT, "--max_new_tokens", "40", *CPU)


def test_a_rank_that_fails_ends_the_run_and_it_alone_says_why(tmp_path):
    start = time.time()
    done = torchrun(script(tmp_path, FAILS), *ALONE, "--json", tmp_path / "out.json")
    assert done.returncode != 0 and time.time() - start < 60
    assert done.stderr.count("Out: this rank has had enough") == 1
    said = [line for line in done.stderr.splitlines() if "Error" in line or "Traceback" in line]
    assert len([s for s in said if "torch.distributed" not in s and "ChildFailed" not in s]) == 2, (
        "its own traceback and torchrun's", said)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("args, error", [
    ((*ALONE, "--nonsense"), "unrecognized arguments: --nonsense"),
    (("--target", "nowhere", *ALONE[2:]), "checkpoint directory nowhere does not exist"),
    ((*ALONE, "--json", "no/such/place.json"), "no/such is not a directory"),
])
def test_a_mistake_is_said_once(args, error, tmp_path):
    done = torchrun(ROOT / "generate.py", *args)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(said) == 1 and error in said[0], done.stderr
    assert not done.stdout


ENDS = """
import torch.distributed as dist
def main():
    job.start("cpu")
    # as NCCL's does while a recorded graph holds the communicator
    dist.destroy_process_group = lambda *a: time.sleep(1000)
    print("done", flush=True)
"""


def test_the_end_does_not_wait_for_the_communicator(tmp_path):
    done = torchrun(script(tmp_path, ENDS))
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


DIFFERENT = """
import generate
def main():
    if job.rank():
        sys.argv += ["--draft", sys.argv[2], "--speculate_k", "3"]
    generate.main()
"""


def test_ranks_with_different_flags_are_refused(tmp_path):
    done = torchrun(script(tmp_path, DIFFERENT), *ALONE)
    assert "error: --speculate_k is 3 on rank 1, 25 on rank 0; start the same" in done.stderr
    assert done.returncode != 0 and done.stderr.count("error: ") == 1


IDLES = """
from datetime import timedelta
import generate
def main():
    job.PASS = timedelta(seconds=3)
    generate.main()
"""


def test_a_chat_may_idle_longer_than_a_pass_may_take(tmp_path):
    args = [*TORCHRUN, "--standalone", "--nproc_per_node=2", script(tmp_path, IDLES), "--target",
            DEMO / "target", "--interactive", "--max_new_tokens", "5", *CPU]
    chat = subprocess.Popen(list(map(str, args)), text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    chat.stdin.write("Question: Mira\n")
    chat.stdin.flush()
    while "tokens in" not in (line := chat.stderr.readline()):
        assert line, "it ended"
    time.sleep(5)
    chat.stdin.write("Question: Tom\n")
    chat.stdin.close()
    assert chat.wait(60) == 0
    assert chat.stderr.read().count("tokens in") == 1
    assert chat.stdout.read().count("> ") == 3
