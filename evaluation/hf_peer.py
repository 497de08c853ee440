"""Hugging Face beside ours, on our weights: its `generate` as it ships, alone and assisted (eager,
dynamic cache), and any acceptance rule in a plain loop around its forward. For benchmark.py and
tests; needs transformers.
"""
import contextlib
from dataclasses import replace
from functools import partial

import torch
import transformers
from torch import Tensor

from checkpoint import source_shapes
from judge import RULES, JudgeHead, Verified, accept_mask, top1
from linear import QuantizedLinear, dense
from model import Transformer
from rules import within


def plain_weight(model: Transformer, name: str, shape: list[int]) -> Tensor:
    """A parameter as PyTorch's own operations take it. A quantized one, [out, in], is widened to
    the model's dtype: its products with the unit vectors, the same in every layout.
    """
    module, _, kind = name.rpartition(".")
    layer = model.get_submodule(module)
    if kind == "weight" and isinstance(layer, QuantizedLinear):
        return layer.matmul(torch.eye(shape[1]).to(model.norm.weight)).T.contiguous()
    return dense(getattr(layer, kind))


def to_hf(model: Transformer, config: dict, vocab_size: int | None = None):
    """transformers' model of the same architecture on the same weights.

    They are views of ours where these are neither quantized nor packed for the CPU, else copies.
    vocab_size: a draft gets its target's, for transformers takes two paddings for two tokenizers.
    Rows that it lacks are its last one, as which ours reads such ids too.
    """
    own, size = model.config.vocab_size, vocab_size or model.config.vocab_size
    kind = getattr(transformers, config["architectures"][0])
    hf_config = kind.config_class(**config | {"eos_token_id": None, "pad_token_id": 0,
                                              "vocab_size": size})
    with torch.device("meta"):
        theirs = kind(hf_config)
    state = {}
    for name, shapes in source_shapes(replace(model.config, quantization=None)).items():
        rows, (shape, *_) = [rows for rows, *_ in shapes.values()], shapes.values()
        state |= dict(zip(shapes, plain_weight(model, name, shape).split(rows)))
    for name in ("model.embed_tokens.weight", "lm_head.weight") if size != own else ():
        if name in state:
            state[name] = state[name][torch.arange(size).clamp(max=own - 1)]
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])  # where it is tied
    theirs.load_state_dict(state, assign=True)
    with model.norm.weight.device:  # its table is no weight, so it was still on meta
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(hf_config)
    return theirs.requires_grad_(False).eval()


@contextlib.contextmanager
def without_cudnn_attention():
    """PyTorch's attention without cuDNN's, which makes a plan for every length, tens of
    milliseconds each, and transformers' cache grows by a position a token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def read(model, tokens: Tensor, cache) -> Tensor:
    """transformers' hidden states [S, D], after its final norm, of tokens [S] after the cache's."""
    # The cache by position: its name, past_key_values, has become cache.
    return model.model(tokens[None], None, None, cache, use_cache=True).last_hidden_state[0]


@torch.inference_mode()
@without_cudnn_attention()
def speculate(target, draft, draft_rows: int, head: JudgeHead | None, rule: dict, k: int,
              max_new_tokens: int, eos_ids, prompt: list[int]) -> tuple[list[int], float]:
    """Greedy speculation around transformers' forward: the new tokens and those accepted a round.

    rule: as an Engine takes it. draft_rows: the draft's, before padding. The text is our engine's.
    """
    row, ids = RULES[rule["accept"]], lambda tokens: torch.tensor(tokens, device=target.device)
    parameter = row.parameter_for(rule["parameter"], head)
    caches = of_target, of_draft = transformers.DynamicCache(), transformers.DynamicCache()
    first = top1(target.lm_head(read(target, ids(prompt), of_target)[-1]))
    text, end, accepted = [*prompt, int(first)], len(prompt) + max_new_tokens, []
    while len(text) < end and text[-1] not in eos_ids:
        # 1. draft
        tokens, drafted, draft_logits = ids(text[of_draft.get_seq_length():]), [], []
        for _ in range(k):
            draft_logits += draft.lm_head(read(draft, tokens, of_draft)[-1:])[:, :draft_rows]
            drafted.append(tokens := top1(draft_logits[-1])[None])
        drafted = torch.cat(drafted)
        # 2. verify and judge
        hidden = read(target, torch.cat((ids(text[-1:]), drafted)), of_target)
        own = top1(logits := target.lm_head(hidden))
        v = Verified(logits=logits[:-1], hidden=hidden[1:], drafted=drafted,
                     draft_logits=torch.stack(draft_logits) if row.needs_draft_logits else None,
                     scores=head(hidden[1:]) if row.needs_judge else None,
                     passed=own[:-1] == drafted)
        # 3. accept
        mask = accept_mask(v, rule["accept"], parameter, within(rule["span"], text, drafted))
        n, *made = torch.cat((mask.long().cumprod(0).sum()[None], drafted, own)).tolist()
        n = min(n, end - len(text) - 1)
        new = made[:n] + made[k + n:k + n + 1]
        new = new[:next((i for i, token in enumerate(new, 1) if token in eos_ids), None)]
        accepted.append(min(n, len(new)))
        # 4. next state
        for cache in caches:
            if (beyond := cache.get_seq_length() - len(text) - n) > 0:
                cache.crop(-beyond)  # not 0, which older versions take for the length to keep
        text += new
    return text[len(prompt):], sum(accepted) / max(1, len(accepted))


def calls(target: Transformer, draft: Transformer, configs: list[dict], speculate_k: list[int],
          max_new_tokens: int, eos_ids, rules: dict, head: JudgeHead | None = None) -> dict:
    """Variant -> a function of a prompt's ids that gives the new tokens and those accepted a round.

    `generate` alone and, with the same constant K, assisted, which does not say what it accepted;
    and the rules, {name: as an Engine takes it}. A text ends where ours does.
    """
    theirs, assistant = (to_hf(model, config, target.config.vocab_size)
                         for model, config in zip((target, draft), configs))
    head = head and head.to(theirs.device)

    @without_cudnn_attention()
    def call(k, prompt):
        ids, more = torch.tensor([prompt], device=theirs.device), {}
        if k:
            settings = assistant.generation_config
            settings.num_assistant_tokens, settings.assistant_confidence_threshold = k, 0.0
            settings.num_assistant_tokens_schedule = "constant"
            more = {"assistant_model": assistant}
        more |= {"eos_token_id": list(eos_ids)} if eos_ids else {}
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=max_new_tokens, pad_token_id=0, **more)
        return out[0, len(prompt):].tolist(), None

    names = {"hf target": 0} | {f"hf assisted K={k}": k for k in speculate_k}
    return {name: partial(call, k) for name, k in names.items()} | {
        f"hf {name} K={k}": partial(speculate, theirs, assistant, draft.config.vocab_size, head,
                                    rule, k, max_new_tokens, eos_ids)
        for k in speculate_k for name, rule in rules.items()}
