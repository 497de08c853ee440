"""make_judge_data.py and judge_data/mining.py: resuming, labels against brute force from scratch,
marks by characters, the split, what is refused.
"""
import json
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch

import checkpoint
import make_judge_data as M
import test_tokenizer
from common import UserError
from engine import Engine, generate
from evaluation.tasks import TASKS, Score
from families import token_bytes
from formats.answer_log import AnswerLog
from helpers import ROOT, random_model, save_checkpoint, strings, tiny_config
from judge_data import mining
from judge_data.data import encode, label_tokens, read_data
from judge_data.mining import ENDS_EARLY, FAILS, Continuations, Outcome, bisect, characters, scan
from tokenizer import Tokenizer

DEMO = ROOT / "checkpoints" / "demo"
DATA = ROOT.parent / "shared" / "data"
BEFORE = ROOT / "tests" / "written_before" / "make_judge_data"
REAL = {name: getattr(TASKS["demo"], name) for name in ("max_new_tokens", "score")}
every, homes = test_tokenizer.every, test_tokenizer.homes


def load(directory):
    """(tokenizer, float32 model) of a checkpoint directory."""
    return Tokenizer.from_dir(directory), checkpoint.load(directory, dtype=torch.float32)


@pytest.fixture(autouse=True, scope="module")
def toy():
    """Another checker, since random models are never right.

    About a third of the answers are wrong, and an outcome often changes with a token.
    """
    task = TASKS["demo"]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(task, "max_new_tokens", 24)
        m.setattr(task, "score", lambda self, example, text: Score(len(text) % 3 > 0, "toy"))
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A target, a draft that often agrees, a model of another tokenizer, and 21 problems.

    Every seventh token ends an answer.
    """
    home = tmp_path_factory.mktemp("pair")
    lines = (DEMO / "problems.jsonl").read_text().splitlines()
    kept = [lines[d + i] for d in (0, 300, 600) for i in range(7)]
    (home / "problems.jsonl").write_text("\n".join(kept) + "\n")
    config = tiny_config(vocab_size=1024, max_position_embeddings=512,
                         eos_token_id=[2, *range(7, 1024, 7)])
    for name, noise in (("target", 0.0), ("draft", 0.05)):
        model = random_model(config, seed=1)
        for p in model.parameters():
            p.data += noise * torch.randn_like(p)
        save_checkpoint(home / name, model, config)
        shutil.copy(DEMO / "target" / "tokenizer.model", home / name)
    return home


def flags(pair, out, *more):
    return ["generate", "--prompts", str(pair / "problems.jsonl"), "--models", str(pair / "target"),
            str(pair / "draft"), "--temperatures", "0,0.8", "--samples", "2", "--device", "cpu",
            "--out", str(out), *more]


@pytest.fixture(scope="module")
def answers(pair):
    """The file of a run of `generate` that nothing disturbed."""
    M.main(flags(pair, pair / "answers.jsonl"))
    return pair / "answers.jsonl"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def unit(answer):
    """What makes an answer one of its own."""
    return tuple(answer[key] for key in ("source_model", "id", "temperature", "sample"))


# ---------------------------------------------------------------- generate

def test_every_model_answers_every_prompt(pair, answers):
    lines = lines_of(answers)
    assert len(lines) == 2 * 21 * 3 == len({unit(a) for a in lines})
    assert {a["source_model"] for a in lines} == {"target", "draft"}
    assert {a["domain"] for a in lines} == {"maths", "code", "facts"}
    assert 0 < sum(a["right"] for a in lines) < len(lines) and 0 < sum(a["ended"] for a in lines)
    assert len({a["answer"] for a in lines if a["temperature"]}) > 20
    assert str(pair) not in answers.read_text()
    tokenizer, model = load(pair / "draft")
    for a in lines:  # alone, each with its own seed, all come out the same
        if a["source_model"] == "draft" and a["domain"] == "code":
            prompt = tokenizer.encode(a["prompt"])
            engine = Engine(model, temperature=a["temperature"], seed=a["seed"])
            tokens = generate(engine, prompt, 24, tokenizer.eos_ids).tokens
            text = [t for t in tokens if t not in tokenizer.eos_ids]
            assert a["answer"] == tokenizer.decode_new(prompt, text)
            assert a["ended"] == (tokens[-1] in tokenizer.eos_ids)


def test_resumes_wherever_the_file_was_cut(pair, answers, tmp_path, monkeypatch):
    data, made = answers.read_bytes(), {unit(a): a for a in lines_of(answers)}
    monkeypatch.setattr(M, "answers", lambda args, i, units: (
        made[list(M.names_of(args.models))[i], p["example"]["id"], t, n] for p, t, n in units))
    monkeypatch.setattr("common.os.fsync", lambda fd: None)
    out, rng = tmp_path / "a.jsonl", random.Random(0)
    shutil.copy(pair / "answers.jsonl.settings.json", tmp_path / "a.jsonl.settings.json")
    ends = [i + 1 for i, b in enumerate(data) if b == 10]
    for size in {0, 1, len(data) - 1, len(data), *(e + d for e in ends[:4] for d in (-2, -1, 0, 1)),
                 *(rng.randrange(len(data)) for _ in range(10))}:
        out.write_bytes(data[:size])
        M.main(flags(pair, out))
        assert out.read_bytes() == data, size
    monkeypatch.undo()
    out.write_bytes(data[:ends[-3] - 5])  # and once with the models themselves
    M.main(flags(pair, out))
    assert out.read_bytes() == data


def test_goes_on_after_a_kill(pair, answers, tmp_path):
    out = tmp_path / "a.jsonl"
    code = ("import make_judge_data as M, sys, torch\n"
            "from evaluation.tasks import TASKS, Score\n"
            "torch.set_num_threads(1)\n"
            "task = TASKS['demo']\n"
            "task.max_new_tokens = 24\n"
            "task.score = lambda self, e, text: Score(len(text) % 3 > 0, 'toy')\n"
            "M.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", code, *flags(pair, out)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    written = lambda: out.read_bytes().count(b"\n") if out.exists() else 0
    while written() < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert written() >= 3
    M.main(flags(pair, out))
    assert out.read_bytes() == answers.read_bytes()


def test_more_is_added_and_other_settings_are_refused_by_name(pair, answers, tmp_path):
    out = tmp_path / "a.jsonl"
    M.main(flags(pair, out, "--limit", "1", "--samples", "1"))
    assert len(lines_of(out)) == 2 * 3 * 2
    M.main(flags(pair, out, "--limit", "2"))  # more prompts, more samples
    assert len(lines_of(out)) == 2 * 6 * 3 and all(a in lines_of(answers) for a in lines_of(out))
    before = out.read_bytes()
    for more, message in ((["--seed", "1"], "seed was 0, now 1"),
                          (["--max_new_tokens", "5"], "max_new_tokens was None, now 5")):
        with pytest.raises(UserError, match=message):
            M.main(flags(pair, out, *more))
    shutil.copytree(pair / "draft", tmp_path / "target")
    # Another model of the same name, and the same model by another name: its answers would be made
    # again.
    for models, message in (([tmp_path / "target"], "model target was .*, now "),
                            ([pair / "target", tmp_path / "target"],
                             "model target is now called .*/target")):
        with pytest.raises(UserError, match=message):
            M.main(["generate", "--prompts", str(pair / "problems.jsonl"), "--models",
                    *map(str, models), "--device", "cpu", "--out", str(out)])
    (tmp_path / "a.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="how it was made is unknown"):
        M.main(flags(pair, out))
    assert out.read_bytes() == before


def test_models_are_told_apart_by_the_shortest_names(tmp_path):
    for d in ("a/target", "b/target", "b/draft"):
        (tmp_path / d).mkdir(parents=True)
    assert list(M.names_of([tmp_path / "b/target", tmp_path / "b/draft"])) == ["target", "draft"]
    assert list(M.names_of([tmp_path / "a/target", tmp_path / "b/target",
                            tmp_path / "b/target"])) == ["a/target", "b/target"]


def prompts_of(tmp_path, path, *more):
    """The prompts that `generate` reads from a file."""
    return M.read_prompts(M.parse_args(["generate", "--prompts", str(path), "--models", "none",
                                        "--out", str(tmp_path / "out"), *map(str, more)]))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize("name,task,count", [
    ("gsm8k_test.jsonl", "gsm8k", 1319), ("gsm8k_train_1000.jsonl", "gsm8k", 1000),
    ("HumanEval.jsonl.gz", "humaneval", 164), ("ARC-Challenge-Test.jsonl", "arc", 1172),
    ("alpaca_80.jsonl", None, 80)])
def test_real_files_are_recognised(tmp_path, name, task, count):
    prompts = prompts_of(tmp_path, DATA / name, "--allow_code_execution")
    assert len(prompts) == count == len({p["example"]["id"] for p in prompts})
    assert {p["task"] for p in prompts} == {task} and all(p["text"] for p in prompts)
    assert prompts[-1]["where"] == f"{DATA / name}, line {count}"
    assert prompts_of(tmp_path, DATA / name, "--allow_code_execution", "--limit", 3) == prompts[:3]
    if task == "humaneval":
        with pytest.raises(UserError, match="--allow_code_execution"):
            prompts_of(tmp_path, DATA / name)


def test_plain_prompts_of_three_kinds(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "domain": "d"}\n\n{"instruction": "b", "input": "c"}\n'
                    '{"turns": ["e", "f"], "category": ""}\n')
    got = [(p["text"], p["example"]["domain"], p["example"]["id"])
           for p in prompts_of(tmp_path, path)]
    assert got == [("a", "d", "line 1"), ("b\n\nc", "alpaca", "line 3"), ("e", "alpaca", "line 4")]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="p.jsonl, line 2: no prompt"):
        prompts_of(tmp_path, path)


IFEVAL = {"key": 7, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"],
          "kwargs": [{}]}


def test_task_none_takes_the_prompts_of_a_benchmark(tmp_path, monkeypatch):
    (path := tmp_path / "p.jsonl").write_text(json.dumps(IFEVAL))
    monkeypatch.setattr(TASKS["ifeval"], "check", lambda self: M.refuse((True, "no lm-eval")))
    with pytest.raises(UserError, match="no lm-eval"):
        prompts_of(tmp_path, path)
    [prompt] = prompts_of(tmp_path, path, "--task", "none")
    assert (prompt["text"], prompt["task"]) == ("Say it.", None)
    assert prompt["where"] == f"{path}, line 1"


def test_prompts_that_are_left_out_are_told(pair, tmp_path, monkeypatch, capsys):
    task = TASKS["demo"]
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] in ("maths/1", "facts/20"))
    monkeypatch.setattr(task, "note", lambda self: "It lacks a thing.")
    path = pair / "problems.jsonl"
    assert len(prompts_of(tmp_path, path)) == 19
    assert capsys.readouterr().err == "2 prompts are left out. It lacks a thing.\n"
    prompts = prompts_of(tmp_path, path, "--limit", 2)
    assert capsys.readouterr().err == "1 prompts are left out. It lacks a thing.\n"
    assert [p["where"] for p in prompts][:3] == [f"{path}, line {n}" for n in (1, 3, 8)]
    assert prompts[1]["example"].keys() == {*lines_of(path)[2], "id", "domain"}  # as it is saved


def test_mmlu_is_known_by_all_its_files(pair, tmp_path, monkeypatch):
    seen, line = [], "q,a,b,c,d,A\n"

    def keep(path, settings, kinds):
        seen.append(settings["prompts"])
        raise UserError("enough")

    monkeypatch.setattr(M, "open_log", keep)
    for folder, count in ("test", 1), ("dev", 5):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"x_{folder}.csv").write_text(count * line)
    for more in "", "\n":
        (tmp_path / "dev" / "x_dev.csv").write_text(5 * line + more)
        with pytest.raises(UserError, match="enough"):
            M.main(["generate", "--prompts", str(tmp_path), "--task", "mmlu", "--models",
                    str(pair / "target"), "--device", "cpu", "--out", str(tmp_path / "out")])
    assert seen[0] != seen[1] == TASKS["mmlu"]().fingerprint(tmp_path)


# ---------------------------------------------------------------- mine

def from_scratch(pair):
    """(asker, tokenizer): `Continuations` without a cache, a new engine for every prefix."""
    tokenizer, model = load(pair / "target")

    def asker(prompt, limit):
        def ask(prefix):
            new, room = [], limit - len(prefix)
            if room > 0:
                new = generate(Engine(model), prompt + prefix, room, tokenizer.eos_ids).tokens
            ended = bool(new) and new[-1] in tokenizer.eos_ids
            tokens = prefix + [t for t in new if t not in tokenizer.eos_ids]
            text = tokenizer.decode_new(prompt, tokens)
            return Outcome(tokens, text, ended, ended and len(text) % 3 > 0)
        return ask
    return asker, tokenizer


def limit_of(answers, tokenizer):
    return max(len(tokenizer.encode(a["answer"], continuation=True)) for a in answers) + 24


@pytest.fixture(scope="module")
def brute_force(pair, answers):
    """([(prompt, answer, error)], number left out): every prefix of every wrong answer tried."""
    asker, tokenizer = from_scratch(pair)
    lines, found = lines_of(answers), []
    prompts = [a["prompt"] for a in lines]
    for a in sorted(lines, key=lambda a: prompts.index(a["prompt"])):
        error = None
        if not a["ended"] or not a["answer"]:
            continue
        if not a["right"]:
            tokens, offsets = tokenizer.encode_with_offsets(a["answer"], continuation=True)
            ask = asker(tokenizer.encode(a["prompt"]), limit_of(lines, tokenizer))
            good = [ask(tokens[:n]).good for n in range(len(tokens) + 1)]
            if not good[0] or all(good):
                continue
            error = list(offsets[good.index(False) - 1])
        found.append((a["prompt"], a["answer"], error))
    return found, len(lines) - len(found)


@pytest.mark.parametrize("draft", [False, True])
def test_first_errors_equal_brute_force_over_all_prefixes(pair, answers, brute_force, tmp_path,
                                                          capsys, draft):
    out, (want, left_out) = tmp_path / "m.jsonl", brute_force
    M.main(["mine", "--data", str(answers), "--target", str(pair / "target"), "--method",
            "first_error", "--device", "cpu", "--out", str(out),
            *(["--draft", str(pair / "draft"), "--speculate_k", "3"] if draft else [])])
    said = capsys.readouterr().out
    assert [(m["prompt"], m["answer"], m["error"]) for m in read_data(out)] == want
    errors = [e for *_, e in want if e]
    assert len(errors) >= 10 and sum(start > 0 for start, _ in errors) >= 3
    reasons = said.split("left out: ")[1].split("; ")
    assert left_out == sum(int(r.split()[0]) for r in reasons) and FAILS in said
    assert "were in the cache already" in said and "so it saved about" in said
    assert not list(tmp_path.glob("*.part*"))


def test_what_cannot_be_graded_is_refused_before_models_are_loaded(pair, answers, tmp_path,
                                                                    monkeypatch):
    monkeypatch.setattr(M, "Miner", lambda *args: pytest.fail("the models are loaded"))
    task, out = TASKS["demo"], tmp_path / "m.jsonl"
    command = ["mine", "--data", str(answers), "--target", str(pair / "target"), "--method",
               "first_error", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(task, "needs", "a thing")
    monkeypatch.setattr(task, "ungradable", lambda self, e: e["id"] == "maths/1")
    with pytest.raises(UserError, match="answers.jsonl, line 4: an answer of demo, whose check "
                       "needs a thing"):
        M.main(command)
    monkeypatch.setattr(task, "check", lambda self: M.refuse((True, "a package is missing")))
    with pytest.raises(UserError, match="a package is missing"):
        M.main(command)
    assert not list(tmp_path.iterdir())


def some(answers, out, count):
    """The answers to the first `count` prompts of each domain."""
    kept = {a["id"] for a in lines_of(answers) if int(a["id"].split("/")[1]) % 7 < count}
    out.write_text("".join(json.dumps(a) + "\n" for a in lines_of(answers) if a["id"] in kept))
    return out


@pytest.mark.parametrize("method", ["first_error", "autojudge"])
def test_mining_resumes_wherever_it_was_cut(pair, answers, tmp_path, monkeypatch, method):
    out, kept = tmp_path / "m.jsonl", []
    part, settings = tmp_path / "m.jsonl.part", tmp_path / "m.jsonl.part.settings.json"
    command = ["mine", "--data", str(some(answers, tmp_path / "a.jsonl", 2)), "--target",
               str(pair / "target"), "--draft", str(pair / "draft"), "--device", "cpu", "--out",
               str(out), "--method"]
    remove, mine_line, results = AnswerLog.remove, getattr(M.Miner, method), {}

    def keep(self):
        kept.extend((self.path.read_bytes(), self.about.read_bytes()))
        remove(self)

    def record(self, line):
        results[line["where"]] = mine_line(self, line)
        return results[line["where"]]

    with monkeypatch.context() as m:
        m.setattr(AnswerLog, "remove", keep)
        m.setattr(M.Miner, method, record)
        M.main([*command, method])
    whole = out.read_bytes()
    monkeypatch.setattr(M.Miner, method, lambda self, line: results[line["where"]])
    for size in {0, 1, *(random.Random(0).randrange(len(kept[0])) for _ in range(8)),
                 len(kept[0]) - 1, len(kept[0])}:
        part.write_bytes(kept[0][:size])
        settings.write_bytes(kept[1])
        out.unlink(missing_ok=True)
        M.main([*command, method])
        assert out.read_bytes() == whole and not part.exists() and not settings.exists()
    part.write_bytes(kept[0])
    settings.write_bytes(kept[1])
    other = "autojudge" if method == "first_error" else "first_error"
    with pytest.raises(UserError, match=f"method was {method}, now {other}"):
        M.main([*command, other])


def test_autojudge_equals_brute_force(pair, answers, tmp_path):
    """The walk written anew, from scratch at every step, against the lines of `mine`."""
    out, answers = tmp_path / "m.jsonl", some(answers, tmp_path / "a.jsonl", 3)
    M.main(["mine", "--data", str(answers), "--target", str(pair / "target"), "--draft",
            str(pair / "draft"), "--method", "autojudge", "--device", "cpu", "--speculate_k", "3",
            "--out", str(out)])
    asker, tokenizer = from_scratch(pair)
    _, draft = load(pair / "draft")
    lines, mined = lines_of(answers), read_data(out)
    important = unimportant = 0
    for text in dict.fromkeys(a["prompt"] for a in lines):
        prompt, labels, final = tokenizer.encode(text), [], None
        ask = asker(prompt, limit_of(lines, tokenizer))
        if (own := ask([])).good:
            answer, i = own.tokens, 0
            while i <= len(answer):
                token = generate(Engine(draft), prompt + answer[:i], 1).tokens[0]
                if token not in tokenizer.eos_ids and answer[i:i + 1] != [token]:
                    other = ask(answer[:i] + [token])
                    labels.append((answer[:i] + [token], not other.good))
                    answer = other.tokens if other.good else answer
                i += 1
            final = tokenizer.decode_new(prompt, answer)
        got = [m for m in mined if m["prompt"] == text]
        whole = {tokenizer.decode_new(prompt, tokens): (tokens, wrong) for tokens, wrong in labels}
        for m in got:
            if m["error"]:
                tokens, wrong = whole[m["answer"]]
                assert wrong and m["error"][1] == len(m["answer"])
                ids, offsets = tokenizer.encode_with_offsets(m["answer"], continuation=True)
                assert label_tokens(offsets, m["error"]) == [1] * (len(ids) - 1) + [0]
                assert ids[-1] == tokens[-1]
                important += 1
            else:
                assert m["answer"] == final
                unimportant += len(m["unimportant"])
        same = [t for t, wrong in labels if wrong
                and tokenizer.encode(tokenizer.decode_new(prompt, t), continuation=True) == t]
        assert sum(m["error"] is not None for m in got) >= len(same)  # all that can be marked are
        assert bool(final) == any(m["error"] is None for m in got)
    assert important >= 5 and unimportant >= 5
    encoded = encode(tokenizer, mined, 10_000)  # train_judge.py reads the lines as they are
    assert sum(e.labels.count(0) for e in encoded) == important


class MadeUp:
    """`go_on` of an answer 0, 1, ... whose prefixes have made-up outcomes.

    path[length]: the run of prefixes that share an outcome, and whether it is good.
    """

    def __init__(self, path):
        self.path, self.asked = path, []

    def __call__(self, prefix):
        self.asked.append(len(prefix))
        run = self.path[len(prefix)]
        end = max(i for i, other in enumerate(self.path) if other == run)
        return Outcome([*range(end), -1], "", True, run[1])


def test_searches_on_made_up_outcomes():
    rng = random.Random(0)
    for _ in range(3000):
        n, path = rng.randrange(1, 20), []
        answer = list(range(n))
        while len(path) <= n:
            path += [(len(path), rng.random() < 0.6)] * rng.randrange(1, 6)
        path = path[:n + 1]
        good = [ok for _, ok in path]
        want = FAILS if not good[0] else ENDS_EARLY if all(good) else good.index(False) - 1
        go_on = MadeUp(path)
        assert scan(answer, go_on) == want
        assert len(go_on.asked) == len(set(go_on.asked)) <= len(set(path))
        go_on = MadeUp(path)
        at = bisect(answer, go_on)
        if isinstance(at, int):
            assert good[at] and not good[at + 1]
        else:
            assert at == FAILS and not good[0] or at == ENDS_EARLY and good[0] and good[n]
        if good == sorted(good, reverse=True):  # changes once
            assert at == want
        assert len(go_on.asked) <= 2 + n.bit_length()


@pytest.mark.parametrize("search", [scan, bisect])
def test_searches_end_where_a_stop_string_begins_in_the_answer(search):
    """The next token completes a stop string, so the outcome has fewer tokens than the prefix."""
    answer, asked = list(range(9)), []
    for last_good in range(len(answer) + 1):
        asked.clear()

        def go_on(prefix, last_good=last_good):
            asked.append(len(prefix))
            assert len(asked) < 20, "it asks again and again"
            return Outcome(prefix[:-1], "", True, len(prefix) <= last_good)

        assert search(answer, go_on) == (ENDS_EARLY if last_good == len(answer) else last_good)


def test_what_the_cache_holds_is_not_read_again(pair):
    """The counts equal what the engine reads, and the seconds saved are real."""
    tokenizer = Tokenizer.from_dir(pair / "target")
    config = tiny_config(vocab_size=1024, max_position_embeddings=2048, hidden_size=128,
                         num_hidden_layers=4)
    engine = Engine(random_model(config, seed=3))
    read, plain = [], engine.read
    engine.read = lambda start: read.append(len(engine.tokens) - start) or plain(start)
    go_on = Continuations(engine, tokenizer, 900)
    prompt, answer = [t % 1000 + 3 for t in range(1200)], [t % 89 + 5 for t in range(600)]
    go_on.start(prompt, lambda text: True)
    go_on.limit = 0
    for n in range(0, 600, 60):
        go_on.limit = n + 2
        go_on(answer[:n])
    assert go_on.asked == len(read) == 10 and go_on.read == sum(read)
    assert go_on.read + go_on.cached == sum(1200 + n for n in range(0, 600, 60))
    assert go_on.read < 1900 and go_on.known == 0 and len(go_on.sample) == mining.SAMPLE
    rest = [(tokens, seconds) for tokens, seconds in go_on.sample if len(tokens) > 1200]
    anew = sum(mining.read_anew(engine, tokens) for tokens, _ in rest)
    assert anew > 2 * sum(seconds for _, seconds in rest), (anew, rest)
    assert "so it saved about" in go_on.report()


# ---------------------------------------------------------------- characters

def test_marks_hold_whole_characters(homes):
    """By bytes: a mark is the characters that hold a byte of the token.

    Training labels these and nothing before them.
    """
    found = 0
    for t in every(homes, but=["unigram"]):  # whose spans of unknown letters are wide
        prompt = t.encode("Q: what?\nA:")
        for text in [*strings(60, seed=5), "a 🎉 b", "日本語", "e\u0301té 👩‍👩‍👧"]:
            tokens = t.encode(text, continuation=True)
            if t.decode_new(prompt, tokens) != text:
                continue
            edges = [len(text[:i].encode()) for i in range(len(text) + 1)]
            for at in random.Random(0).sample(range(len(tokens)), min(6, len(tokens))):
                begin = sum(len(token_bytes(t, i)) for i in tokens[:at])
                end = begin + len(token_bytes(t, tokens[at]))
                a = max(i for i, e in enumerate(edges) if e <= begin)
                b = min(i for i, e in enumerate(edges) if e >= end)
                mark = characters(t, prompt, tokens, at)
                if mark is None:  # cut here, the text has other tokens
                    cut = t.encode(text[:b], continuation=True)
                    assert cut != tokens[:len(cut)]
                    continue
                found += 1
                assert mark == (text[:b], [a, b])
                ids, offsets = t.encode_with_offsets(mark[0], continuation=True)
                first = next(i for i, (_, e) in enumerate(offsets) if e > a)
                assert label_tokens(offsets, mark[1]) == [1] * first + [0] * (len(ids) - first)
                assert tokens[at] in ids[first:]
    assert found > 500


def test_a_text_that_is_cut_otherwise_gets_no_mark(homes):
    t = Tokenizer.from_dir(homes("tt"))
    byte = lambda text: [t.encode(c, continuation=True)[0] for c in text]
    assert characters(t, [], byte("x the"), 4) is None  # "the" is one token
    assert characters(t, [], byte("the x"), 4) == ("the x", [4, 5])  # "the" lies before
    emoji = t.encode("🎉", continuation=True)
    for at in range(2, 6):
        assert characters(t, [], byte("ab") + emoji + byte("c"), at) == ("ab🎉", [2, 3])
    assert characters(t, [], byte("ab") + emoji[:2], 3) is None  # never completed
    assert characters(t, [], byte("ab") + emoji[1:], 2) is None  # never begun


# ---------------------------------------------------------------- files of an earlier version

@pytest.fixture
def before(tmp_path, monkeypatch):
    """What commit 3686f6e wrote on the demo pair: `generate`, and `mine` before its end."""
    for name, value in REAL.items():
        monkeypatch.setattr(TASKS["demo"], name, value)
    return shutil.copytree(BEFORE, tmp_path / "before")


def cut(path, lines):
    """Leave so many lines and half of the next."""
    data = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(data[:lines]) + data[lines][:len(data[lines]) // 2])


def test_answers_written_before_are_resumed(before):
    out, about = before / "answers.jsonl", before / "answers.jsonl.settings.json"
    whole, settings = out.read_bytes(), about.read_bytes()
    command = ["generate", "--prompts", str(DEMO / "problems.jsonl"), "--limit", "1",
               "--temperatures", "0", "--device", "cpu", "--out", str(out), "--models"]
    cut(out, 4)
    M.main([*command, str(DEMO / "draft")])  # the other model's answers and settings stay
    assert out.read_bytes() == whole and about.read_bytes() == settings
    with pytest.raises(UserError, match="seed was 0, now 1"):
        M.main([*command, str(DEMO / "draft"), "--seed", "1"])
    cut(out, 3)
    only = json.loads(settings)
    del only["models"]["draft"]
    about.write_text(json.dumps(only))
    M.main([*command, str(DEMO / "draft")])  # a model is added
    assert out.read_bytes() == whole and about.read_bytes() == settings


def test_mining_written_before_is_resumed(before):
    part, out = before / "mined.jsonl.part", before / "mined.jsonl"
    want = [line for result in lines_of(part) for line in result["lines"]]
    assert len(want) == 6 and sum(line["error"] is not None for line in want) == 2
    cut(part, 4)
    M.main(["mine", "--data", str(before / "answers.jsonl"), "--target", str(DEMO / "target"),
            "--draft", str(DEMO / "draft"), "--method", "first_error", "--device", "cpu", "--out",
            str(out)])
    assert lines_of(out) == want and not list(before.glob("*.part*"))


# ---------------------------------------------------------------- merge

def test_merge_splits_by_prompt(tmp_path, capsys):
    rng, files = random.Random(0), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    lines = [{"prompt": f"p{i % 20}", "answer": f"an answer {i} 🎉",
              "error": [3, 9] if i % 3 else None, "domain": "dg"[i % 2], "source_model": "m"}
             for i in range(60)]
    files[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = rng.sample(lines, 10)
    files[1].write_text("".join(json.dumps(line | {"error": [0, 2]} if i < 4 else line) + "\n"
                                for i, line in enumerate(again)))
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    command = ["merge", *map(str, files), "--train", str(train), "--val", str(val), "--val_share",
               "0.25"]
    M.main([*command, "--target", str(DEMO / "target")])
    said = capsys.readouterr().out
    a, b = lines_of(train), lines_of(val)
    key = lambda e: json.dumps(e, sort_keys=True)
    assert sorted(map(key, a + b)) == sorted(map(key, lines))
    assert len({e["prompt"] for e in b}) == 5
    assert not {e["prompt"] for e in a} & {e["prompt"] for e in b}
    assert "10 answers came twice and were dropped, 4 of them marked otherwise" in said
    assert "tokens" in said and "15 answers" in said
    before = train.read_bytes(), val.read_bytes()
    M.main(command)
    assert (train.read_bytes(), val.read_bytes()) == before
    assert "characters" in capsys.readouterr().out
    M.main([*command, "--seed", "5"])
    assert train.read_bytes() != before[0]


def test_merge_refuses(tmp_path):
    path, train, val = tmp_path / "a.jsonl", tmp_path / "t.jsonl", tmp_path / "v.jsonl"
    command = ["merge", str(path), "--train", str(train), "--val", str(val)]
    line = lambda i, error: json.dumps({"prompt": f"p{i}", "answer": "abc", "error": error}) + "\n"
    for text, message in (("".join(line(i, None) for i in range(9)),
                           "no answer of the train part has an error marked"),
                          (line(0, [0, 1]), "one prompt only"),
                          (line(0, [0, 1]) + line(1, [2, 4]), "a.jsonl, line 2: 'error' is"),
                          (line(0, [0, 1]) + line(1, [2, 1]), "a.jsonl, line 2: 'error' is"),
                          (line(0, [1, 1]), "a.jsonl, line 1: 'error' is")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            M.main(command)
        assert not train.exists() and not val.exists()


# ---------------------------------------------------------------- what is refused

def test_refusals(pair, answers, homes, tmp_path):
    out = tmp_path / "o.jsonl"
    mine = ["mine", "--data", str(answers), "--target", str(pair / "target"), "--out", str(out),
            "--device", "cpu", "--method"]
    config = tiny_config(vocab_size=1024)
    other = save_checkpoint(tmp_path / "other", random_model(config, seed=2), config)
    shutil.copy(homes("tt") / "tokenizer.model", other)
    first, second, *_ = lines_of(answers)
    example = {"task_id": "x/1", "prompt": "def f():\n", "entry_point": "f",
               "test": "def check(f): pass", "domain": "humaneval", "id": "x/1"}
    for name, lines in {
            "long": [{"prompt": "short"}, {"prompt": "long " * 3000}],
            "bad": [first, {k: v for k, v in second.items() if k != "right"}],
            "wordy": [first, second | {"answer": "no " * 3000}],
            "plain": [first | {"task": None}, {k: v for k, v in first.items() if k != "task"}],
            "code": [first | {"task": "humaneval", "example": example}]}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    use = lambda name: [str(tmp_path / name) if x == str(answers) else x for x in mine]
    make = ["generate", "--models", str(pair / "target"), "--device", "cpu", "--out", str(out),
            "--prompts"]
    for command, message in (
            ([*mine, "autojudge"], "--method autojudge needs --draft"),
            ([*mine, "autojudge", "--draft", str(other)],
             "different tokenizers: .*; speculation needs the same"),
            ([*mine, "autojudge", "--draft", str(pair / "draft"), "--search", "bisect"],
             "--search is for --method first_error"),
            ([*use("bad.jsonl"), "first_error"], "bad.jsonl, line 2: .*'right' is missing"),
            ([*use("wordy.jsonl"), "first_error"], "wordy.jsonl, line 2: prompt and answer have"),
            ([*use("plain.jsonl"), "first_error"], "no answers of a task with a checker"),
            ([*use("code.jsonl"), "first_error"], "--allow_code_execution"),
            ([*use("none"), "first_error"], "cannot read"),
            ([*make, str(tmp_path / "long.jsonl")],
             "long.jsonl, line 2: the prompt has .* whose context is 512"),
            ([*make, str(answers), "--temperatures", "0,-1"], "--temperatures is '0,-1'"),
            ([*make, str(answers), "--temperatures", "x"], "--temperatures"),
            ([*make, str(answers), "--samples", "0"], "--samples is 0"),
            ([*make, str(answers), "--limit", "0"], "--limit is 0"),
            ([*make, str(answers), "--task", "gsm8k"], "is a file of demo"),
            ([*make[:-3], "--out", str(tmp_path / "no" / "o"), "--prompts", str(answers)],
             "no is not a directory"),
    ):
        with pytest.raises(UserError, match=message) as e:
            M.main(command)
        assert "\n" not in str(e.value) and not list(tmp_path.glob("o.jsonl*")), message
    done = subprocess.run([sys.executable, ROOT / "make_judge_data.py", *mine, "autojudge"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --method autojudge")


def test_temperatures_that_are_greedy_are_one():
    assert M.temperatures("0,1e-40,0.7,1e-320,-0,0.7") == [0.0, 0.7]


@pytest.mark.parametrize("how, change", [
    ("removed", lambda out: out.unlink()),
    ("changed", lambda out: out.open("a").write('{"foreign": 1}\n'))])
def test_answers_that_another_hand_changed_end_the_run(pair, answers, tmp_path, monkeypatch, how,
                                                       change):
    out, lines = tmp_path / "a.jsonl", lines_of(answers)

    def made(args, i, units):
        yield from lines[:3]
        change(out)
        left.append(out.exists() and out.read_bytes())
        yield from lines[3:]

    left = []
    monkeypatch.setattr(M, "answers", made)
    with pytest.raises(UserError, match=f"{out} was {how}"):
        M.main(flags(pair, out))
    assert (out.exists() and out.read_bytes()) == left[0]
