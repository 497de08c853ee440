"""Our weights as a transformers model, to run Hugging Face's `generate` as it ships (eager, dynamic
cache) beside ours. For benchmark.py and tests; needs transformers.
"""
import contextlib

import torch
import transformers

from checkpoint import source_shapes
from linear import dense
from model import Transformer


def to_hf(model: Transformer, config: dict, vocab_size: int | None = None):
    """transformers' model of the same architecture on the same weights.

    They are views of ours where these are not packed for the CPU, else copies. vocab_size: a draft
    gets its target's, for transformers takes two paddings for two tokenizers. Rows that it lacks
    are its last one, as which ours reads such ids too.
    """
    own, size = model.config.vocab_size, vocab_size or model.config.vocab_size
    kind = getattr(transformers, config["architectures"][0])
    hf_config = kind.config_class(**config | {"eos_token_id": None, "pad_token_id": 0,
                                              "vocab_size": size})
    with torch.device("meta"):
        theirs = kind(hf_config)
    state, ours = {}, model.state_dict()
    for name, shapes in source_shapes(model.config).items():
        parts = dense(ours[name]).split([rows for rows, *_ in shapes.values()])
        state |= dict(zip(shapes, parts))
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


def calls(target: Transformer, draft: Transformer, configs: list[dict], speculate_k: list[int],
          max_new_tokens: int, eos_ids) -> dict:
    """Variant -> a function of a prompt's ids that gives the new tokens.

    Alone, and assisted with the same constant K; a text ends where ours does.
    """
    theirs, assistant = (to_hf(model, config, target.config.vocab_size)
                         for model, config in zip((target, draft), configs))

    def call(prompt, k):
        ids, more = torch.tensor([prompt], device=theirs.device), {}
        if k:
            settings = assistant.generation_config
            settings.num_assistant_tokens, settings.assistant_confidence_threshold = k, 0.0
            settings.num_assistant_tokens_schedule = "constant"
            more = {"assistant_model": assistant}
        more |= {"eos_token_id": list(eos_ids)} if eos_ids else {}
        with without_cudnn_attention():
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                  max_new_tokens=max_new_tokens, pad_token_id=0, **more)
        return out[0, len(prompt):].tolist()

    return {"hf target": lambda prompt: call(prompt, 0)} | {
        f"hf assisted K={k}": lambda prompt, k=k: call(prompt, k) for k in speculate_k}
