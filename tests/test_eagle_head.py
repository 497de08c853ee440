"""drafters/eagle_head.py: the published heads' forward pass, their files, and their conversion."""
import json
import math
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf_checkpoint
from checkpoint import load, read_config
from common import UserError
from drafters.eagle_head import EagleHead, is_eagle, weight_bytes
from helpers import (
    WRONG,
    edit_json,
    edit_weights,
    put,
    random_model,
    run_command,
    save_checkpoint,
    tiny_config,
)

D, V, HEAD_DIM, FFN, COLUMNS = 64, 101, 16, 80, 40
TARGET = tiny_config(num_hidden_layers=7)
ROPE = 500.0
FAMILY = "LlamaForCausalLM", "LlamaForCausalLMEagle3"
# Each as a published file can be: name, version, KV heads, and what it has beside the least.
CASES = {
    "EAGLE-1": (1, 4, {"fc.bias", "embed_tokens.weight"}),
    "EAGLE-1, grouped": (1, 2, set()),
    "EAGLE-1, exported": (1, 2, {"layers.0.input_layernorm.weight", "lm_head.weight",
                                 "layers.0.self_attn.q_proj.bias"}),
    "EAGLE-1, frequent tokens": (1, 2, {"lm_head.weight", "d2t", "t2d"}),
    "EAGLE-3": (3, 2, {"d2t", "t2d"}),
    "EAGLE-3, every token": (3, 4, {"embed_tokens.weight"}),
}


def random_head(version: int, kv_heads: int, extra: set, seed=0) -> tuple[dict, dict]:
    """config.json and tensors of a head in the published layout."""
    layer, wide = ("layers.0", D) if version == 1 else ("midlayer", 2 * D)
    columns = COLUMNS if "d2t" in extra else V
    q, kv = 4 * HEAD_DIM, kv_heads * HEAD_DIM
    shapes = {
        "fc.weight": (D, (2 if version == 1 else 3) * D), "fc.bias": (D,),
        "embed_tokens.weight": (V, D), "lm_head.weight": (columns, D), "norm.weight": (D,),
        f"{layer}.self_attn.q_proj.weight": (q, wide), f"{layer}.self_attn.k_proj.weight": (
            kv, wide), f"{layer}.self_attn.v_proj.weight": (kv, wide),
        f"{layer}.self_attn.o_proj.weight": (D, q), f"{layer}.self_attn.q_proj.bias": (q,),
        f"{layer}.self_attn.k_proj.bias": (kv,), f"{layer}.self_attn.v_proj.bias": (kv,),
        f"{layer}.mlp.gate_proj.weight": (FFN, D), f"{layer}.mlp.up_proj.weight": (FFN, D),
        f"{layer}.mlp.down_proj.weight": (D, FFN), f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.hidden_norm.weight": (D,), f"{layer}.post_attention_layernorm.weight": (D,)}
    least = {"fc.bias", "embed_tokens.weight", "layers.0.input_layernorm.weight"} | (
        {"lm_head.weight", "norm.weight", "layers.0.hidden_norm.weight"} if version == 1 else set())
    g = torch.Generator().manual_seed(seed)
    bias = f"{layer}.self_attn.q_proj.bias" in extra
    tensors = {name: torch.randn(shape, generator=g) * (1 if "norm" in name else 0.15)
               for name, shape in shapes.items() if name not in least - extra
               and (bias or not name.endswith("_proj.bias"))}
    if "d2t" in extra:
        ids = torch.randperm(V, generator=g)[:COLUMNS].sort().values
        tensors["d2t"] = ids - torch.arange(COLUMNS)
        tensors["t2d"] = torch.isin(torch.arange(V), ids)
    config = dict(architectures=[FAMILY[version == 3]], model_type="llama", vocab_size=V,
                  hidden_size=D, intermediate_size=FFN, num_hidden_layers=1, bias=False,
                  num_attention_heads=4, num_key_value_heads=kv_heads, rms_norm_eps=1e-4,
                  rope_theta=ROPE, hidden_act="silu", max_position_embeddings=128)
    return config | (
        dict(draft_vocab_size=columns) if version == 3 or "d2t" in extra else {}), tensors


def write_head(directory, case: str, seed=0):
    config, tensors = random_head(*CASES[case], seed=seed)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def target():
    return random_model(TARGET).double()


def load_head(directory, target, fingerprint="f00d", **more) -> EagleHead:
    return EagleHead.load(directory, target.config, "TARGET", fingerprint,
                          **{"dtype": torch.float64} | more)


# ---------------------------------------------------------------- the published forward pass

def rms(x, weight):
    return x / math.sqrt((x * x).mean() + 1e-4) * weight


def rotated(x, position):
    """One head's query or key [HEAD_DIM]: dimension i turns with i + HEAD_DIM / 2."""
    half = HEAD_DIM // 2
    y = x.clone()
    for i in range(half):
        angle = position * ROPE ** (-2 * i / HEAD_DIM)
        y[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        y[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def reference(w: dict, version: int, embeds, hidden):
    """The layer over a whole chain of pairs, [S, D] each -> [S, D]: row by row, without a cache."""
    layer = "layers.0" if version == 1 else "midlayer"
    get = lambda name, x: w[f"{layer}.{name}.weight"] @ x + w.get(f"{layer}.{name}.bias", 0)
    keys, values, out = [], [], []
    for position, (e, h) in enumerate(zip(embeds, hidden)):
        if version == 1:
            x = w["fc.weight"] @ torch.cat((e, h)) + w.get("fc.bias", 0)
            norm = w.get("layers.0.input_layernorm.weight")
            y = x if norm is None else rms(x, norm)
        else:
            x = h
            y = torch.cat((rms(e, w["midlayer.input_layernorm.weight"]),
                           rms(h, w["midlayer.hidden_norm.weight"])))
        q, k, v = (get(f"self_attn.{n}_proj", y).split(HEAD_DIM) for n in "qkv")
        keys.append([rotated(one, position) for one in k])
        values.append(v)
        heads = []
        for i, one in enumerate(q):
            j = i * len(k) // len(q)
            scores = torch.stack([rotated(one, position) @ key[j] for key in keys])
            p = (scores / math.sqrt(HEAD_DIM)).softmax(0)
            heads.append(sum(p[t] * value[j] for t, value in enumerate(values)))
        x = x + get("self_attn.o_proj", torch.cat(heads))
        y = rms(x, w[f"{layer}.post_attention_layernorm.weight"])
        gate, up = get("mlp.gate_proj", y), get("mlp.up_proj", y)
        out.append(x + get("mlp.down_proj", gate / (1 + (-gate).exp()) * up))
    return torch.stack(out)


def reference_logits(w: dict, version: int, features, target):
    rows = []
    for x in features:
        if version == 3:
            x = rms(x, w["norm.weight"])
        rows.append(w.get("lm_head.weight", target.output.weight) @ x)
    if "d2t" not in w:
        return torch.stack(rows)
    every = torch.full((len(rows), V), -math.inf, dtype=torch.float64)
    for row, some in zip(every, rows):
        for i, logit in enumerate(some):
            row[i + int(w["d2t"][i])] = logit
    return every


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # RoPE's angles are float32


class Chain:
    """A prompt as the reference and as the head see it."""

    def __init__(self, directory, target, length=8):
        self.head, self.target = load_head(directory, target), target
        self.version = self.head.version
        self.w = {name: t.double() if t.is_floating_point() else t
                  for name, t in load_file(directory / "model.safetensors").items()}
        g = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, V, (length,), generator=g)
        states = 1 if self.version == 1 else 4
        hidden = torch.randn(length - 1, states * D, dtype=torch.float64, generator=g)
        self.embeds = self.embed(self.tokens[1:])
        self.hidden = hidden if self.version == 1 else hidden[:, D:] @ self.w["fc.weight"].T + (
            self.w.get("fc.bias", 0))
        self.fused, self.cache = self.head.fuse(hidden), self.head.new_cache(32)

    def embed(self, tokens):
        return self.w.get("embed_tokens.weight", self.target.embed.weight)[tokens]

    def theirs(self, embeds=(), hidden=()):
        """The reference's output for the prompt's pairs and these after them."""
        return reference(self.w, self.version, torch.cat((self.embeds, *embeds)),
                         torch.cat((self.hidden, *hidden)))

    def ours(self, tokens, hidden, slots, **more):
        embeds = self.head.embed(tokens, self.target)
        return self.head.features(embeds[None], hidden[None], torch.tensor(slots), self.cache,
                                  **more)[0]

    def prompt(self):
        return self.ours(self.tokens[1:], self.fused, range(len(self.fused)))


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_and_chained_steps(tmp_path, target, case):
    chain = Chain(write_head(tmp_path / "head", case), target)
    close(chain.fused, chain.hidden)
    got, want = chain.prompt(), chain.theirs()
    close(got, want)
    embeds, hidden, n = [], [], len(want)
    for step in range(3):
        logits = chain.head.logits(got[-1:], target)
        close(logits, reference_logits(chain.w, chain.version, want[-1:], target))
        token = logits.argmax(-1)
        embeds, hidden = [*embeds, chain.embed(token)], [*hidden, want[-1:]]
        got, want = chain.ours(token, got[-1:], [n + step]), chain.theirs(embeds, hidden)
        close(got[-1], want[-1])


@pytest.mark.parametrize("case", ["EAGLE-1, grouped", "EAGLE-3"])
def test_a_tree_is_its_paths(tmp_path, target, case):
    """Slots n.. hold a, b, c; then c's child d and a's child e; then d's child f."""
    chain = Chain(write_head(tmp_path / "head", case), target)
    got, n = chain.prompt(), len(chain.fused)
    parents, tokens = [None, None, None, 2, 0, 3], torch.tensor([3, 50, 7, 3, 99, 21])
    depths = lambda i: 0 if parents[i] is None else 1 + depths(parents[i])
    path = lambda i: [] if i is None else [*path(parents[i]), i]
    mask = torch.zeros(6, 32, dtype=torch.bool)
    mask[:, :n] = True
    for i in range(6):
        mask[i, [n + j for j in path(i)]] = True
    features = {None: got[-1]}
    for rows in ([0, 1, 2], [3, 4], [5]):
        out = chain.ours(tokens[rows], torch.stack([features[parents[i]] for i in rows]),
                         [n + i for i in rows], at=torch.tensor([n + depths(i) for i in rows]),
                         mask=mask[rows])
        features |= dict(zip(rows, out))
    for i in range(6):
        hidden = [features[parents[j]][None] for j in path(i)]
        close(features[i], chain.theirs([chain.embed(tokens[path(i)])], hidden)[-1])


@pytest.mark.parametrize("case", ["EAGLE-1", "EAGLE-3"])
def test_float32_compiled_and_a_longer_cache(tmp_path, target, case):
    directory = write_head(tmp_path / "head", case)
    chain = Chain(directory, target)
    want, small = chain.prompt(), random_model(TARGET)
    head, n = load_head(directory, small, dtype=torch.float32), len(chain.fused)
    graphs = []

    def step(tokens, hidden, pos, cache):
        x = head.features(head.embed(tokens, small)[None], hidden[None], pos, cache)[0]
        return x, head.logits(x, small)

    step = torch.compile(step, fullgraph=True, dynamic=False, backend=lambda graph, inputs: (
        graphs.append(graph), graph)[1])
    cache, got = head.new_cache(n), []
    for i in range(n):
        if i == n // 2:
            cache = head.new_cache(32, cache)
        got.append(step(chain.tokens[i + 1:i + 2], chain.fused[i:i + 1].float(),
                        torch.tensor([i]), cache)[0])
    torch.testing.assert_close(torch.cat(got), want.float(), atol=1e-4, rtol=1e-4)
    assert len(graphs) == 2  # for a cache of either length


def test_a_head_of_another_dtype_than_its_target(tmp_path, target):
    directory = write_head(tmp_path / "head", "EAGLE-1, grouped")
    head, hidden = load_head(directory, target, dtype=torch.bfloat16), torch.randn(3, D).double()
    embeds = head.embed(torch.tensor([1, 2, 3]), target)
    x = head.features(embeds[None], head.fuse(hidden)[None], torch.arange(3), head.new_cache(8))[0]
    assert embeds.dtype == x.dtype == torch.bfloat16
    want = target.output(x.double())
    assert torch.equal(head.logits(x, target), want) and want.dtype == torch.float64


# ---------------------------------------------------------------- its own files

def test_new_save_and_load(tmp_path, target):
    source = tiny_config(num_hidden_layers=7, rope_scaling=dict(type="linear", factor=2.0))
    target = random_model(source)
    torch.manual_seed(3)
    head = EagleHead.new(target.config, "f00d", ffn_dim=48)
    head.save(tmp_path / "out", source, torch.float32)
    head.save(tmp_path / "again", source, torch.float32)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {
        "fc.weight", "fc.bias", "layers.0.post_attention_layernorm.weight",
        *(f"layers.0.self_attn.{x}_proj.weight" for x in "qkvo"),
        *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))}
    same = load_head(tmp_path / "out", target, dtype=torch.float32)
    assert same.config == head.config and same.target == "f00d" and is_eagle(tmp_path / "out")
    for (name, p), q in zip(head.named_parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q), name
    head.save(tmp_path / "out", source)  # over it, in bfloat16
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16}

    x = torch.randn(2, 2, 5, D)  # embeddings and states of two texts
    y = head.features(*x, torch.arange(5), head.new_cache(5, batch=2))
    one = head.features(*x[:, 1:], torch.arange(5), head.new_cache(5))
    torch.testing.assert_close(y[1:], one)
    y.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_a_narrowed_head_drafts_these_tokens_as_the_whole_one(tmp_path, target):
    ids = torch.tensor([0, 7, 99])
    head = EagleHead.new(target.config, "f00d").double()
    x = torch.randn(4, D, dtype=torch.float64)
    whole = head.logits(x, target)
    head.narrow(ids, target.output.weight[ids])
    head.save(tmp_path / "head", TARGET, torch.float32)  # as the target's random weights were
    for narrow in head, load_head(tmp_path / "head", target):
        logits = narrow.logits(x, target)
        torch.testing.assert_close(logits[:, ids], whole[:, ids])
        assert logits.isfinite().sum(-1).tolist() == [3] * 4


@pytest.mark.parametrize("case", CASES)
def test_the_bytes_that_it_takes(tmp_path, target, case):
    directory = write_head(tmp_path / "head", case)
    head = load_head(directory, target, dtype=torch.bfloat16)
    held = sum(t.nbytes for t in [*head.parameters(), *head.buffers()])
    assert weight_bytes(directory, target.config, torch.bfloat16) == held


def test_the_bytes_of_layers_that_are_held_twice(tmp_path):
    source = tiny_config(hidden_size=256, vocab_size=300)
    target = random_model(source)
    head = EagleHead.new(target.config, "")
    head.save(tmp_path / "head", source)
    head = load_head(tmp_path / "head", target, dtype=torch.float32)
    packed = [m.packed for m in head.modules() if getattr(m, "packed", None) is not None]
    assert packed
    assert weight_bytes(tmp_path / "head", target.config, torch.float32) == 4 * sum(
        t.numel() for t in [*head.parameters(), *packed])


def test_what_is_a_head(tmp_path, target):
    assert is_eagle(write_head(tmp_path / "head", "EAGLE-3"))
    model = save_checkpoint(tmp_path / "llama", random_model(TARGET), TARGET)
    assert not is_eagle(model)
    with pytest.raises(UserError, match="llama holds no EAGLE head"):
        load_head(model, target)
    with pytest.raises(UserError, match="nowhere does not exist"):
        is_eagle(tmp_path / "nowhere")


@pytest.mark.parametrize("case", CASES)
def test_the_prefix_that_some_tools_write(tmp_path, target, case):
    plain = load_head(write_head(tmp_path / "head", case), target)

    def prefixed(weights):
        for name in list(weights):
            if name not in ("lm_head.weight", "d2t", "t2d"):
                weights[f"model.{name.replace('midlayer', 'layers.0')}"] = weights.pop(name)
    edit_weights(tmp_path / "head", prefixed)
    assert is_eagle(tmp_path / "head")
    same = load_head(tmp_path / "head", target)
    assert same.version == plain.version
    for p, q in zip(plain.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_layers_of_the_target(tmp_path, target):
    directory = write_head(tmp_path / "head", "EAGLE-3")
    key = "eagle_aux_hidden_state_layer_ids"
    for said in ({}, {key: [2, 3, 4]}, {"eagle_config": {key: [1, 2, 3]}}):  # inputs, or outputs
        edit_json(directory / "config.json", **said)
        assert load_head(directory, target).taps == (2, 3, 4)
    llama = read_config(save_checkpoint(tmp_path / "llama", random_model(TARGET), TARGET))
    llama.n_layer = 32
    edit_json(directory / "config.json", eagle_config=None, **{key: None})
    head = EagleHead.load(directory, llama, "TARGET", "")
    assert head.taps == (2, 16, 29)  # before which the published code keeps the states
    assert load_head(write_head(tmp_path / "one", "EAGLE-1"), target).taps == ()


def test_the_target_by_its_fingerprint(tmp_path, target):
    directory = write_head(tmp_path / "head", "EAGLE-1")
    assert load_head(directory, target, "f00d").target == ""
    edit_json(directory / "config.json", eagle_target="f00d")
    assert load_head(directory, target, "f00d").target == "f00d"
    load_head(directory, target, "0ther", parent="f00d")  # a quantized copy of it
    with pytest.raises(UserError, match=r"trained on target f00d, but TARGET is 0ther; train one"):
        load_head(directory, target, "0ther", parent="third")


# ---------------------------------------------------------------- refusals

def d2t(change):
    """A function that changes d2t in place."""
    return lambda directory: edit_weights(directory, lambda w: change(w["d2t"]))


def drop(name):
    return lambda directory: edit_weights(directory, lambda w: w.pop(name))


def say(**keys):
    return lambda directory: edit_json(directory / "config.json", **keys)


ONE, THREE = "EAGLE-1", "EAGLE-3"
NO_PLACE = "has no place in an EAGLE-"


@pytest.mark.parametrize("case,damage,message", [
    (ONE, lambda d: (d / "config.json").unlink(), "config.json does not exist"),
    (ONE, lambda d: (d / "config.json").write_text("{"), "config.json"),
    (ONE, lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    (ONE, lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "damaged or truncated"),
    (ONE, lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
     "holds a pickled EAGLE head (pytorch_model.bin); convert it first: python "
     "convert_hf_checkpoint.py --checkpoint_dir"),
    (ONE, drop("fc.weight"), "holds no EAGLE head (no weight fc.weight)"),
    (ONE, say(num_hidden_layers=2), "num_hidden_layers is 2; an EAGLE head of more than one layer"),
    (ONE, put({"layers.1.mlp.up_proj.weight": torch.ones(FFN, D)}),
     f"weight layers.1.mlp.up_proj.weight {NO_PLACE}1"),
    (ONE, put({"d2t": torch.zeros(V, dtype=torch.long)}), f"weight d2t {NO_PLACE}1"),
    (ONE, put({"norm.weight": torch.ones(D)}), f"weight norm.weight {NO_PLACE}1"),
    (ONE, put({"embedding_layernorm.weight": torch.ones(D)}),
     f"weight embedding_layernorm.weight {NO_PLACE}1"),
    (ONE, put({"model.fc.weight": torch.ones(D, 2 * D)}), "a weight is there twice"),
    (ONE, drop("layers.0.self_attn.k_proj.weight"), "k_proj.weight is missing"),
    (ONE, put({"layers.0.self_attn.k_proj.bias": torch.ones(D)}), "k_proj.bias has no place"),
    (ONE, put({"layers.0.mlp.down_proj.weight": torch.full((D, FFN), math.nan)}),
     "weight layers.0.mlp.down_proj.weight holds NaN"),
    (ONE, put({"fc.weight": torch.ones(D, 3 * D)}), "fc.weight has shape [64, 192], config.json"),
    # Right together, wrong apart.
    (ONE, put({"layers.0.mlp.gate_proj.weight": torch.ones(FFN - 5, D),
               "layers.0.mlp.up_proj.weight": torch.ones(FFN + 5, D)}), "gate_proj.weight has sh"),
    (ONE, put({"layers.0.mlp.up_proj.weight": torch.ones(FFN, D, dtype=torch.int8)}), "is I8"),
    (ONE, put({"fc.bias": torch.ones(D, dtype=torch.float64)}), "fc.bias is float64"),
    (ONE, say(architectures=["GemmaForCausalLM"]), "'GemmaForCausalLM' is not supported"),
    (ONE, say(hidden_act="gelu"), "hidden_act"),
    (ONE, say(quantization=dict(mode="int8", parent="x")), "a quantized EAGLE head"),
    (ONE, say(norm_before_residual=True), "norm_before_residual is not implemented for an EAGLE"),
    (ONE, say(eagle_target=5), "eagle_target is 5; it must be a text"),
    (THREE, drop("d2t"), "weight d2t is missing, and config.json says draft_vocab_size 40"),
    (THREE, drop("lm_head.weight"), "weight lm_head.weight is missing"),
    (THREE, drop("midlayer.input_layernorm.weight"), "input_layernorm.weight is missing"),
    (THREE, d2t(lambda t: t[-1].add_(V)), "d2t maps to tokens beyond the target's 101"),
    (THREE, d2t(lambda t: t[0].sub_(V)), "d2t maps to tokens beyond the target's 101"),
    (THREE, d2t(lambda t: t[-1].fill_(2**63 - 1)), "d2t maps to tokens beyond the target's 101"),
    (THREE, d2t(lambda t: t[1].copy_(t[0] - 1)), "or twice to one"),
    (THREE, lambda d: edit_weights(d, lambda w: w["t2d"].logical_not_()), "d2t and t2d tell of"),
    (THREE, put({"d2t": torch.zeros(COLUMNS)}), "weight d2t is F32, not I64"),
    (THREE, put({"d2t": torch.zeros(V, dtype=torch.long)}), "weight d2t has shape [101]"),
    (THREE, put({"t2d": torch.ones(V + 1, dtype=torch.bool)}), "weight t2d has shape [102]"),
    (THREE, say(target_hidden_size=96), "another width than its target is not implemented"),
    (THREE, say(draft_vocab_size=V + 1), "draft_vocab_size 102 is more than vocab_size 101"),
    (THREE, say(eagle_aux_hidden_state_layer_ids=[1, 3, 5]), "other layers than [2, 3, 4]"),
    (THREE, say(eagle_config=dict(use_aux_hidden_state=False)), "other layers than [2, 3, 4]"),
])
def test_refusals(tmp_path, target, case, damage, message):
    directory = write_head(tmp_path / "head", case)
    load_head(directory, target)
    damage(directory)
    with pytest.raises(UserError) as error:
        load_head(directory, target)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("config,message", [
    (dict(hidden_size=32), "head is for a target of width 64, but TARGET has width 32; train one"),
    (dict(vocab_size=107), "for a target of vocabulary 101, but TARGET has vocabulary 107; train"),
    (dict(num_hidden_layers=6), "for a target of 7 layers or more"),
])
def test_another_target_is_refused(tmp_path, config, message):
    other = random_model(TARGET | config)
    with pytest.raises(UserError, match=message):
        load_head(write_head(tmp_path / "head", "EAGLE-3"), other)


@pytest.mark.parametrize("key", ["eagle_target", "draft_vocab_size", "eagle_config",
                                 "eagle_aux_hidden_state_layer_ids", "architectures",
                                 "num_hidden_layers", "target_hidden_size"])
def test_no_value_in_config_json_is_a_traceback(tmp_path, target, key):
    directory = write_head(tmp_path / "head", "EAGLE-3")
    for value in WRONG:
        edit_json(directory / "config.json", **{key: value})
        try:
            assert load_head(directory, target).fc.weight.shape == (D, 3 * D)
        except UserError as error:
            assert "config.json" in str(error) or "TARGET" in str(error), error


# ---------------------------------------------------------------- conversion

def pickled(directory, change=lambda state: state):
    """Put a directory's weights into pytorch_model.bin instead, as published."""
    state = load_file(directory / "model.safetensors")
    torch.save(change(state), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return directory


def convert(monkeypatch, directory, *more):
    out = directory.parent / "out"
    run_command(monkeypatch, convert_hf_checkpoint, "--checkpoint_dir", directory, "--out", out,
                *more)
    return out


@pytest.mark.parametrize("from_pickle", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_conversion_keeps_everything(tmp_path, monkeypatch, target, case, from_pickle, capsys):
    directory = write_head(tmp_path / "head", case)
    edit_json(directory / "config.json", some_key=5, torch_dtype="float16")
    before, tensors = load_head(directory, target), load_file(directory / "model.safetensors")
    if from_pickle:
        pickled(directory, lambda state: {f"model.{name}": t for name, t in state.items()})
    out = convert(monkeypatch, directory, "--dtype", "float32")
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    after = load_file(out / "model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], t) and after[name].dtype == t.dtype
               for name, t in tensors.items())
    config = json.loads((out / "config.json").read_text())
    assert config["some_key"] == 5 and config["torch_dtype"] == "float32"
    same = load_head(out, target)
    for p, q in zip(before.parameters(), same.parameters(), strict=True):
        assert torch.equal(p, q)
    said = capsys.readouterr()
    assert "parameters in float32" in said.out and not said.err.count("rounded")


def test_conversion_rounds_and_says_so(tmp_path, monkeypatch, capsys):
    directory = pickled(write_head(tmp_path / "head", "EAGLE-3"))
    out = convert(monkeypatch, directory)
    assert "weights of float32 are rounded to bfloat16" in capsys.readouterr().err
    kinds = {name: t.dtype for name, t in load_file(out / "model.safetensors").items()}
    assert kinds.pop("d2t") == torch.long and kinds.pop("t2d") == torch.bool
    assert set(kinds.values()) == {torch.bfloat16}


class Evil:
    """A pickle that makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_such_a_pickle_acts_when_it_is_loaded(tmp_path):
    pickle.loads(pickle.dumps(Evil(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def poisoned(directory):
    pickled(directory, lambda state: state | {"fc.bias": Evil(directory.parent / "made")})


def plain_pickle(directory):
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(directory.parent / "made")))
    (directory / "model.safetensors").unlink()


def pickled_llama(directory, layers=1):
    shutil.rmtree(directory, ignore_errors=True)
    config = tiny_config(num_hidden_layers=layers)
    pickled(save_checkpoint(directory, random_model(config), config))


NOT_TENSORS = "is not a pickled dict of tensors alone, or it is damaged; nothing of it was run"


@pytest.mark.parametrize("damage,message", [
    (poisoned, NOT_TENSORS),
    (plain_pickle, NOT_TENSORS),
    (lambda d: pickled(d, lambda state: [*state.values()]), NOT_TENSORS),
    (lambda d: pickled(d, lambda state: {"state_dict": state}), NOT_TENSORS),
    (lambda d: pickled(d, lambda state: state | {"fc.bias": torch.ones(D).to_sparse()}),
     NOT_TENSORS),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), NOT_TENSORS),
    (lambda d: (pickled(d), os.truncate(d / "pytorch_model.bin", 9999)), NOT_TENSORS),
    (pickled_llama, "only pytorch_model.bin: pickled weights, which are never loaded"),
    (lambda d: pickled_llama(d, 2), "only pytorch_model.bin: pickled weights, which are never"),
    (lambda d: pickled(d, lambda state: state | {"x": torch.ones(3)}), "weight x has no place"),
    (lambda d: pickled(d, lambda state: state | {"fc.bias": torch.ones(D).expand(9999, D)}),
     "fc.bias has shape [9999, 64]"),
    (lambda d: pickled(d, lambda state: state | {"fc.bias": torch.ones(D).double()}), "is float64"),
    (lambda d: pickled(d, lambda state: state | {"fc.bias": torch.ones(D).cfloat()}), "complex64"),
    (lambda d: pickled(d, lambda state: state | {"fc.bias": torch.full((D,), math.inf)}),
     "weight fc.bias holds NaN or an infinity"),
    (lambda d: say(num_hidden_layers=3)(d), "num_hidden_layers is 3"),
])
def test_what_is_not_converted(tmp_path, monkeypatch, capsys, damage, message):
    directory = write_head(tmp_path / "head", "EAGLE-1")
    damage(directory)
    with pytest.raises(SystemExit) as stop:
        convert(monkeypatch, directory)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err, err
    assert [line for line in err.splitlines() if "rounded" not in line] == [err.splitlines()[-1]]
    assert [p.name for p in tmp_path.iterdir()] == ["head"]  # nothing written, nothing run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_no_other_pickle_is_opened(tmp_path, monkeypatch, capsys, name):
    pickled_llama(tmp_path / "head", 2)
    (tmp_path / "head" / "pytorch_model.bin").rename(tmp_path / "head" / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    with pytest.raises(SystemExit):
        convert(monkeypatch, tmp_path / "head")
    assert "pickled weights, which are never loaded" in capsys.readouterr().err


def test_a_pickle_of_before_pytorch_1_6_is_read_too(tmp_path):
    head = write_head(tmp_path / "head", "EAGLE-1")
    state = load_file(head / "model.safetensors")
    (head / "model.safetensors").unlink()
    torch.save(state, head / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    got = convert_hf_checkpoint.pickled_tensors(head / "pytorch_model.bin")
    assert {name: t[:].tolist() for name, t in got.items()} == {
        name: t.tolist() for name, t in state.items()}


def test_a_head_is_no_model(tmp_path):
    with pytest.raises(UserError, match="holds a weight fc.weight: it is an EAGLE head"):
        load(write_head(tmp_path / "head", "EAGLE-1"))
