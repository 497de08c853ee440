"""demo/head_inputs.py: the places that heads read, heads with a hidden layer, and the intervals."""
import pytest
import torch

from common import UserError
from demo import head_inputs as H
from drafters.llama import LlamaDrafter
from engine import Engine, generate
from helpers import random_model, run_command, tiny_config
from judge import JudgeHead
from judge_data import report
from judge_data.data import Encoded
from judge_data.features import hidden_states
from model import rope_table

CONFIG = tiny_config(num_hidden_layers=3)


def by_hand(target, ids: list[int]) -> dict:
    """The states of a text at each place, layer by layer, in one pass without the hooks."""
    x, kept, n = target.embed(torch.tensor([ids])), [], len(ids)
    rope, mask = rope_table(target.config, n), torch.ones(n, n, dtype=torch.bool).tril()
    mask = mask.repeat(target.config.n_head // target.config.n_kv_head, 1)
    for layer, kv in zip(target.layers, target.new_cache(n).kv):
        kept.append(x[0])
        x = layer.forward(x, torch.arange(n), kv, rope, mask)
    scale = (x.pow(2).mean(-1, keepdim=True) + target.config.norm_eps).rsqrt()
    return {H.AFTER: (x * scale * target.norm.weight)[0], H.BEFORE: x[0],
            "1 layer earlier": kept[-1], "2 layers earlier": kept[-2]}


def texts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 101, (n,), generator=generator).tolist() for n in lengths]


def test_states_of_every_place_at_the_labelled_tokens():
    target = random_model(CONFIG, seed=1)
    encoded = [Encoded(ids, start, [], [1] * (len(ids) - start), start)
               for ids, start in zip(texts(9, 14, 5), (3, 6, 2))]
    states = H.States(target, [1, 2])
    read = hidden_states(states, encoded)
    assert read.shape == (6 + 8 + 3, 4 * 64)
    want = {name: [] for name in states.names}
    plain = random_model(CONFIG, seed=1)
    for e in encoded:
        for name, hidden in by_hand(plain, e.ids).items():
            want[name].append(hidden[e.start:])
    for name, part in zip(states.names, read.chunk(4, -1)):
        torch.testing.assert_close(part, torch.cat(want[name]), atol=1e-4, rtol=1e-4)
    for wrong in ([0], [4], [1, 9]):
        with pytest.raises(UserError, match="the target has 3 layers"):
            H.States(target, wrong)


@pytest.mark.parametrize("place", (H.AFTER, H.BEFORE, "2 layers earlier"))
def test_a_head_judges_a_drafted_token_by_the_state_at_its_own_position(place):
    """The scores of the engine's rounds are those of the finished text, read again as a whole."""
    target, draft = random_model(CONFIG, seed=1), random_model(CONFIG, seed=1)
    torch.manual_seed(5)
    for p in draft.parameters():
        p.data += 0.05 * p.data.std() * torch.randn_like(p)
    linear = JudgeHead(torch.randn(1, 64) / 8, torch.zeros(1), 0.5, "")
    rounds, prompt = [], texts(6)[0]

    def score(x):
        rounds.append((linear(x), list(engine.tokens)))
        return rounds[-1][0]

    head = H.PlacedHead(H.States(target, [1, 2]), place, score)
    engine = Engine(target, LlamaDrafter(draft), head, "judge", 0.4, speculate_k=4)
    result = generate(engine, prompt, 40)
    assert "judge" in result.sources and result.rounds == len(rounds) > 3
    text, judged = prompt + result.tokens, 0
    want = linear(by_hand(random_model(CONFIG, seed=1), text)[place])
    ends = [len(before) for _, before in rounds[1:]] + [len(text)]
    for (scores, before), end in zip(rounds, ends):
        accepted = end - len(before) - 1
        judged += accepted
        torch.testing.assert_close(scores[:accepted],
                                   want[len(before):len(before) + accepted], atol=1e-3, rtol=1e-3)
    assert judged > 5


def test_a_hidden_layer_learns_what_no_linear_head_can():
    torch.manual_seed(0)
    x, x_val = torch.randn(2000, 2) * 3 + 1, torch.randn(500, 2) * 3 + 1
    label = lambda x: ((x[:, 0] > 1) ^ (x[:, 1] > 1)).long()  # XOR, around the mean
    y, y_val = label(x), label(x_val)
    linear = max(f.auc for f in H.fit(x, y, x_val, y_val, [(1.0, 0.01)], 1e-2, 20, 0))
    auc, _ = H.fit_mlp(x, y, x_val, y_val, [(1.0, 0.01), (3.0, 0.1)], 32, 0)
    assert linear < 0.6 and auc > 0.9


def test_the_best_epoch_is_kept():
    """On labels by chance the best one is an early one, not the last."""
    torch.manual_seed(1)
    x, x_val, y, y_val = torch.randn(200, 8), torch.randn(90, 8), *map(torch.randint, (2, 2), (
        (200,), (90,)))
    auc, score = H.fit_mlp(x, y, x_val, y_val, [(1.0, 0.01), (3.0, 0.1)], 16, 0)
    with torch.no_grad():
        assert report.auc(score(x_val), y_val) == auc


def test_intervals_draw_whole_prompts_and_the_same_ones_for_all_heads():
    generator = torch.Generator().manual_seed(3)
    prompt = torch.arange(40).repeat_interleave(5)
    y = (torch.rand(200, generator=generator) < 0.7).long()
    scores = {("a", "linear"): torch.randn(200, generator=generator) + y,
              ("b", "linear"): torch.randn(200, generator=generator) + 3 * y}
    scores["same", "linear"] = 2 * scores["a", "linear"] + 1
    trained = {key: H.Trained(None, s, [0.5]) for key, s in scores.items()}
    half = {key: H.Trained(None, s[:100], [0.5]) for key, s in scores.items()}
    seeds = [H.Seed(trained, prompt, y), H.Seed(half, prompt[:100], y[:100])]
    areas = H.auc_draws(seeds, 40, 30)
    for counts, i in zip(H.draws(40, 30), range(31)):
        for key, s in scores.items():  # drawn rows written out, in place of weights
            times = counts[prompt].long()
            parts = [(s, y, times), (s[:100], y[:100], times[:100])]
            want = sum(report.auc(s.repeat_interleave(t), y.repeat_interleave(t))
                       for s, y, t in parts) / 2
            assert float(areas[key][i]) == pytest.approx(want, abs=1e-9)
    assert torch.equal(areas["same", "linear"], areas["a", "linear"])
    value, low, high = H.interval(areas["b", "linear"] - areas["a", "linear"])
    assert 0 < low < value < high
    assert H.auc_rows(seeds, areas)[3][4:6] == ["+0.0000", "+0.0000 to +0.0000"]


def test_runs_are_counted_over_rounds_and_problems():
    runs = [[(12.0, 2, True), (3.0, 3, False)], [(8.0, 1, True), (4.0, 2, True)]]
    accepted, right = H.run_draws(runs, 50)
    assert (float(accepted[0]), float(right[0])) == (27 / 8, 3 / 4)
    possible = {(20 / 3, 1.0), (27 / 8, 0.75), (7 / 5, 0.5)}  # both the first, one of each, ...
    assert set(zip(accepted.tolist(), right.tolist())) == possible


@pytest.mark.parametrize("flags, why", (
    (["--task", "demo"], "belong together"), (["--seeds", "0"], "--seeds is 0"),
    (["--shares", "0.1,2"], "--shares"), (["--samples", "1"], "--samples is 1")))
def test_bad_flags(flags, why, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(monkeypatch, H, "--target", "no", "--data", "no", *flags)
    assert end.value.code == 2 and why in capsys.readouterr().err
