"""The EAGLE head: one decoder layer that drafts from the target's hidden states, and its files.

It reads pairs (state of token i, embedding of token i + 1) and predicts what follows token i + 1.
Version 1 is EAGLE-1's and EAGLE-2's (arXiv 2401.15077, 2406.16858): the state is the target's last
one, the layer predicts the next such state, and the target's LM head reads it, or a copy of its
rows for the most frequent tokens (FR-Spec, arXiv 2502.14856). Version 3 is EAGLE-3's (arXiv
2503.01840): the state is fused from three layers of the target, and the head has an LM head of its
own, often for a part of the vocabulary. Files have the published names.
"""
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from checkpoint import (
    LAYER,
    WRITTEN,
    check_finite,
    check_plain,
    check_shape,
    config_from,
    slices,
    weight_files,
)
from common import (
    OBJECT,
    TEXT,
    list_of,
    make_directory,
    open_weights,
    read_json,
    refuse,
    whole,
    write_json,
    write_tensors,
)
from linear import Linear, linear, prepare
from model import Block, Cache, ModelConfig, Transformer, rope_table


class EagleHead(nn.Module):
    """config: of its one layer. version: 1 or 3. target: checkpoint.fingerprint of its target, ""
    where unknown. taps: the target's layers whose inputs it reads; `load` sets them for version 3.

    bias: of fc. input_norm: version 1 has none as published. embedding: it has its own. columns: of
    its own LM head, 0 for the target's.
    """

    def __init__(self, config: ModelConfig, version=1, target="", bias=True, input_norm=False,
                 embedding=False, columns=0):
        super().__init__()
        c, dim = config, config.dim
        self.config, self.version, self.target, self.taps = c, version, target, ()
        self.fc = linear(None, (3 if version == 3 else 2) * dim, dim, bias)
        self.block = Block(c)
        if version == 1 and not input_norm:
            self.block.attn_norm = nn.Identity()
        if version == 3:
            self.block.attn.wqkv = linear(None, 2 * dim, (c.n_head + 2 * c.n_kv_head) * c.head_dim,
                                          c.qkv_bias)
        self.hidden_norm, self.norm = (
            nn.RMSNorm(dim, eps=c.norm_eps) if version == 3 else nn.Identity() for _ in range(2))
        self.embedding = nn.Embedding(c.vocab_size, dim) if embedding else None
        self.output = linear(None, dim, columns) if columns else None
        self.register_buffer("ids", None, persistent=False)  # [columns]: the target's, if not all

    @property
    def dtype(self) -> torch.dtype:
        return self.block.ffn_norm.weight.dtype

    def new_cache(self, length: int, grown_from: Cache | None = None, batch=1) -> Cache:
        """A cache of `length` pairs in the weights' dtype, with what `grown_from` holds."""
        c, w = self.config, self.block.ffn_norm.weight
        kv = torch.zeros(length, 2, batch, c.n_kv_head, c.head_dim, dtype=w.dtype, device=w.device)
        if grown_from:
            kv[:len(grown_from.kv[0])] = grown_from.kv[0]
        return Cache([kv], rope_table(c, length, w.device))

    def embed(self, tokens: Tensor, target: Transformer) -> Tensor:
        """tokens [...] -> [..., D], by its own embedding or the target's."""
        return (self.embedding or target.embed)(tokens).to(self.dtype)

    def fuse(self, hidden: Tensor) -> Tensor:
        """The target's states [..., D * (1 + len(taps))] -> the ones the layer reads, [..., D]."""
        own, tapped = hidden.to(self.dtype).tensor_split([self.config.dim], -1)
        return self.fc(tapped) if self.version == 3 else own

    def features(self, embeds: Tensor, hidden: Tensor, pos: Tensor, cache: Cache,
                 at: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What `logits` reads, and the next step as its `hidden`: [B, S, D].

        Row i is the pair of embeds [B, S, D], of a token, and hidden [B, S, D], the fused or
        predicted state before it. Keys and values go to the cache's slots pos [S]. at [S]: RoPE's
        positions, by default the slots; published heads count pairs, from 0. mask bool [S, span]:
        slots that a row attends to, by default those up to its own.
        """
        c, kv, rope = self.config, cache.kv[0], cache.rope[pos if at is None else at]
        if mask is None:
            mask = torch.arange(len(kv), device=pos.device) <= pos[:, None]
        mask = mask.repeat(c.n_head // c.n_kv_head, 1)
        if self.version == 1:
            return self.block(self.fc(torch.cat((embeds, hidden), -1)), pos, kv, rope, mask)
        pair = torch.cat((self.block.attn_norm(embeds), self.hidden_norm(hidden)), -1)
        x = hidden + self.block.attn(pair, pos, kv, rope, mask)
        return x + self.block.ffn(self.block.ffn_norm(x))

    def logits(self, features: Tensor, target: Transformer) -> Tensor:
        """features [..., D] -> [..., V]; -inf for tokens that the head cannot draft.

        No gradient flows through a target's LM head that `checkpoint.load` has packed for a CPU.
        """
        x = self.norm(features)
        if self.output is None:
            return target.output(x.to(target.norm.weight.dtype))
        logits = self.output(x)
        if self.ids is None:
            return logits
        every = logits.new_full((*logits.shape[:-1], self.config.vocab_size), -math.inf)
        return every.index_copy(-1, self.ids, logits)

    def narrow(self, ids: Tensor, rows: Tensor):
        """Draft only the tokens `ids` [n], by the target's LM head's rows for them [n, D]."""
        self.output = linear(None, self.config.dim, len(ids)).to(rows.device)
        self.output.weight.data, self.ids = rows, ids

    # ------------------------------------------------------------ files

    @classmethod
    def new(cls, target_config: ModelConfig, fingerprint: str, ffn_dim: int | None = None,
            bias=True) -> "EagleHead":
        """A version 1 head to be trained: float32, random, with the target's attention shape."""
        config = replace(target_config, n_layer=1, ffn_dim=ffn_dim or target_config.ffn_dim,
                         quantization=None, **PLAIN_LAYER)
        return cls(config, target=fingerprint, bias=bias)

    def save(self, directory, source_config: dict, dtype=torch.bfloat16):
        """Write the directory of a version 1 head: config.json, then the weights.

        source_config: the target's config.json, for RoPE and the context. The same head gives the
        same bytes.
        """
        tensors = {}
        for name, parts in published(self, "layers.0").items():
            rows = [shape[0] for shape in parts.values()]
            split = self.get_parameter(name).detach().to("cpu", dtype).split(rows)
            tensors |= dict(zip(parts, split))
        if self.ids is not None:
            ids = self.ids.cpu()
            tensors |= dict(d2t=ids - torch.arange(len(ids)), t2d=torch.isin(
                torch.arange(self.config.vocab_size), ids))
        make_directory(directory)
        write_json(Path(directory, "config.json"), self.hf_config(source_config, dtype))
        write_tensors(Path(directory, "model.safetensors"), tensors, {"format": "pt"})

    def hf_config(self, source: dict, dtype: torch.dtype) -> dict:
        c = self.config
        rope = {key: source[key] for key in ROPE_KEYS if source.get(key) is not None}
        return {"max_position_embeddings": c.max_seq_len} | rope | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": c.vocab_size, "hidden_size": c.dim, "num_hidden_layers": 1,
            "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
            "head_dim": c.head_dim, "intermediate_size": c.ffn_dim, "rms_norm_eps": c.norm_eps,
            "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."),
            "bias": self.fc.bias is not None, "eagle_target": self.target} | (
            {} if self.ids is None else {"draft_vocab_size": len(self.ids)})

    @classmethod
    def load(cls, directory, target_config: ModelConfig, target_name, fingerprint: str,
             parent: str | None = None, device="cpu", dtype=torch.float32) -> "EagleHead":
        """The head in a directory, ready to run, for a target of this config and fingerprint, or of
        the `parent` it was quantized from. Raises UserError for another target's, or a damaged one.
        """
        head, tensors = open_head(directory, target_config, target_name)
        refuse((head.target not in ("", fingerprint, parent), f"EAGLE head {directory} was trained "
                f"on target {head.target}, but {target_name} is {fingerprint}; {ADVICE}"))
        weights = {}
        for ours, names in published(head, layer_of(tensors)).items():
            parts = [tensors[name][:].to(device, dtype) for name in names]
            for name, part in zip(names, parts):
                check_finite(directory, name, part)
            weights[ours] = torch.cat(parts)
        head.load_state_dict(weights, assign=True)
        head.ids = None if head.ids is None else head.ids.to(device)
        weights.clear()  # so that a tensor is freed when `prepare` replaces it
        prepare(head, dtype)
        return head.requires_grad_(False).eval()


# ---------------------------------------------------------------- names and shapes

# A layer without the biases and norms that a family can have, or that a file shows.
PLAIN_LAYER = dict(tied=False, qkv_bias=False, wo_bias=False, mlp_bias=False, qk_norm=False)
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
             "original_max_position_embeddings", "max_position_embeddings")
TOP = {"norm.weight": "norm.weight", "output.weight": "lm_head.weight", "fc.weight": "fc.weight",
       "fc.bias": "fc.bias", "embedding.weight": "embed_tokens.weight"}
# d2t [columns]: the target's id less the head's own; t2d [V]: which tokens the head can draft.
MAPS = dict(d2t=torch.int64, t2d=torch.bool)


def published(head: EagleHead, layer: str) -> dict[str, dict[str, list[int]]]:
    """For every parameter the published tensors that make it up, {ours: {theirs: shape}}.

    layer: "layers.0" or "midlayer".
    """
    c, found = head.config, {}
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": c.ffn_dim, "up_proj": c.ffn_dim}
    for ours, p in head.named_parameters():
        module, kind = ours.removeprefix("block.").rsplit(".", 1)
        names = [TOP[ours]] if ours in TOP else [
            f"{layer}.{theirs}.{kind}" for theirs in LAYER.get(module, [module])]
        found[ours] = {theirs: [rows.get(theirs.split(".")[-2], p.shape[0]), *p.shape[1:]]
                       for theirs in names}
    return found


def layer_of(names: Iterable[str]) -> str:
    """The prefix of the layer's tensors: EAGLE-3 calls it midlayer, some tools layers.0."""
    return "midlayer" if any(name.startswith("midlayer.") for name in names) else "layers.0"


# ---------------------------------------------------------------- reading

ADVICE = "train one for this target with train_eagle.py"
# What changes the forward pass and is not implemented, by a key of config.json that is true.
OTHER_WAYS = "norm_before_residual", "norm_before_fc", "norm_output", "fc_norm", "add_para_norm"
KINDS = dict(eagle_target=TEXT, draft_vocab_size=whole(1, 1 << 24), eagle_config=OBJECT,
             target_hidden_size=whole(1), architectures=TEXT | list_of(TEXT, "texts"))


def is_eagle(directory) -> bool:
    """Whether a checkpoint directory holds an EAGLE head, by its tensors' names.

    One with pickled weights only counts if its config.json describes a head, so that `load` says
    what to do. Raises UserError for what is no checkpoint directory.
    """
    if is_pickled(directory):
        return True
    return names_head(n for path in weight_files(directory) for n in open_weights(path).keys())


def names_head(names: Iterable[str]) -> bool:
    return any(name in ("fc.weight", "model.fc.weight") for name in names)


def is_pickled(directory) -> bool:
    """Whether a directory holds a pickled EAGLE head, told by its config.json: of one layer."""
    path = Path(directory)
    found = (path / "pytorch_model.bin").exists() and (path / "config.json").exists() and not any(
        path.glob("model*.safetensors*"))
    return found and read_json(path / "config.json").get("num_hidden_layers") == 1


def open_head(directory, target: ModelConfig, target_name="the target"):
    """The head of a directory without its weights, and {published name: slice}.

    Raises UserError unless config.json, tensors and the target's config fit each other.
    """
    where = Path(directory, "config.json")
    refuse((is_pickled(directory), f"{directory} holds a pickled EAGLE head (pytorch_model.bin); "
            f"convert it first: python convert_hf_checkpoint.py --checkpoint_dir {directory} "
            "--out DIR"))
    tensors = plain_names(directory, slices(directory))
    head = skeleton(directory, tensors)
    for what, own, other in (("width", head.config.dim, target.dim),
                             ("vocabulary", head.config.vocab_size, target.vocab_size)):
        refuse((own != other, f"EAGLE head {directory} is for a target of {what} {own}, but "
                f"{target_name} has {what} {other}; {ADVICE}"))
    head.taps = taps(read_json(where), where, target) if head.version == 3 else ()
    return head, tensors


def plain_names(directory, tensors: dict) -> dict:
    """The tensors without the prefix "model." that some tools write."""
    plain = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    refuse((len(plain) < len(tensors), f"{directory}: a weight is there twice, with and without "
            "the prefix model.; fetch the checkpoint again"),
           ("fc.weight" not in plain, f"{directory} holds no EAGLE head (no weight fc.weight); "
            "give the directory of one, or train one with train_eagle.py"))
    return plain


def skeleton(directory, tensors: dict) -> EagleHead:
    """The head that config.json and the tensors {published name: slice} describe, without weights.

    Raises UserError unless they fit each other.
    """
    where = Path(directory, "config.json")
    hf = read_json(where, KINDS)
    config, layer = head_config(hf, where, tensors), layer_of(tensors)
    version = 3 if f"{layer}.hidden_norm.weight" in tensors else 1
    columns = hf.get("draft_vocab_size") or config.vocab_size
    refuse((columns > config.vocab_size, f"{where}: draft_vocab_size {columns} is more than "
            f"vocab_size {config.vocab_size}"),
           (columns < config.vocab_size and "d2t" not in tensors, f"{directory}: weight d2t is "
            f"missing, and config.json says draft_vocab_size {columns}; fetch it again"))
    with torch.device("meta"):
        head = EagleHead(config, version, hf.get("eagle_target") or "", "fc.bias" in tensors,
                         f"{layer}.input_layernorm.weight" in tensors,
                         "embed_tokens.weight" in tensors,
                         columns if version == 3 or "lm_head.weight" in tensors else 0)
    check_tensors(directory, head, tensors)
    if "d2t" in tensors:
        head.ids = token_ids(directory, tensors, config.vocab_size)
    return head


def head_config(hf: dict, where, names) -> ModelConfig:
    """The config of the head's layer. What it has beside a plain layer's, its file shows."""
    other = next((key for key in OTHER_WAYS if hf.get(key)), None)
    arch = hf.get("architectures")
    plain = {key: value for key, value in hf.items()
             if key != "architectures" or "eagle" not in str(arch).lower()}
    config = config_from({"model_type": "llama"} | plain, where)
    layer = layer_of(names)
    has = {field: f"{layer}.{name}" in names for field, name in (
        ("qkv_bias", "self_attn.q_proj.bias"), ("wo_bias", "self_attn.o_proj.bias"),
        ("mlp_bias", "mlp.gate_proj.bias"), ("qk_norm", "self_attn.q_norm.weight"))}
    width = hf.get("target_hidden_size") or config.dim
    refuse((other, f"{where}: {other} is not implemented for an EAGLE head"),
           (config.n_layer != 1, f"{where}: num_hidden_layers is {config.n_layer}; an EAGLE head "
            "of more than one layer is not implemented"),
           (width != config.dim, f"{where}: target_hidden_size is {width} and hidden_size "
            f"{config.dim}; a head of another width than its target is not implemented"),
           (config.quantization, f"{where}: a quantized EAGLE head is not implemented; take the "
            "one that is not quantized"))
    return replace(config, **PLAIN_LAYER | has)


def taps(hf: dict, where, target: ModelConfig) -> tuple[int, ...]:
    """Which of the target's layers' inputs an EAGLE-3 head reads: as published, an early, a middle
    and a late one.
    """
    n, more = target.n_layer, hf.get("eagle_config") or {}
    usual = (2, n // 2, n - 3)
    key = "eagle_aux_hidden_state_layer_ids"
    said = hf.get(key) or more.get(key)
    # Some tools count the outputs of layers, others their inputs.
    known = said in (None, [*usual], [i - 1 for i in usual])
    refuse((n < 7, f"{where} is an EAGLE-3 head's, for a target of 7 layers or more, of which it "
            f"reads three; this one has {n}"),
           (not known or more.get("use_aux_hidden_state") is False, f"{where}: an EAGLE-3 head "
            f"that reads other layers than {list(usual)} is not implemented"))
    return usual


def check_tensors(directory, head: EagleHead, tensors: dict):
    """Refuse a file that lacks a tensor of the head, has another, or one of another shape."""
    parts = published(head, layer_of(tensors))
    expected = {name: shape for part in parts.values() for name, shape in part.items()}
    if head.output is not None and "d2t" in tensors:
        maps = dict(d2t=[head.output.weight.shape[0]], t2d=[head.config.vocab_size])
        expected |= {name: shape for name, shape in maps.items() if name in tensors}
    missing = next((name for name in expected if name not in tensors), None)
    strange = min((name for name in tensors if name not in expected), default=None)
    refuse((missing, f"{directory}: weight {missing} is missing; fetch the checkpoint again"),
           (strange, f"{directory}: weight {strange} has no place in an EAGLE-{head.version} head"))
    for name, shape in expected.items():
        kind = tensors[name].get_dtype()
        if name in MAPS:
            refuse((kind != WRITTEN[MAPS[name]], f"{directory}: weight {name} is {kind}, not "
                    f"{WRITTEN[MAPS[name]]}; fetch the checkpoint again"))
        else:
            check_plain(directory, name, kind)
        check_shape(directory, name, tensors[name].get_shape(), shape)


def token_ids(directory, tensors: dict, vocab_size: int) -> Tensor:
    """The target's ids of the tokens that a head with a part of the vocabulary can draft."""
    d2t = tensors["d2t"][:].long()
    ids = d2t + torch.arange(len(d2t))  # wraps around where d2t is huge, and is refused then too
    refuse((not (0 <= ids.min() and ids.max() < vocab_size) or len(ids.unique()) < len(ids),
            f"{directory}: weight d2t maps to tokens beyond the target's {vocab_size}, or twice to "
            "one; fetch the checkpoint again"))
    if "t2d" in tensors:
        marked = tensors["t2d"][:].nonzero()[:, 0]
        refuse((not torch.equal(marked, ids.sort().values), f"{directory}: weights d2t and t2d "
                "tell of different tokens; fetch the checkpoint again"))
    return ids


def weight_bytes(directory, target: ModelConfig, dtype: torch.dtype, device="cpu") -> int:
    """Bytes of a directory's head as `load` leaves it; raises UserError as `load` does."""
    head, _ = open_head(directory, target)
    copies = (m.added(dtype, device) for m in head.modules() if isinstance(m, Linear))
    weights = sum(p.numel() for p in head.parameters()) * dtype.itemsize
    return weights + sum(copies) + (0 if head.ids is None else head.ids.nbytes)
