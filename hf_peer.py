"""Our models as Hugging Face's, to run `generate` as transformers ships it (eager, dynamic cache)
beside ours. For benchmark.py and tests.
"""
import torch
import transformers

from linear import dense
from model import Transformer


def to_hf(model: Transformer, config: dict):
    """transformers' model of the same architecture on the same weights: views of ours where these
    are not packed for the CPU, else copies.
    """
    c, kind = model.config, getattr(transformers, config["architectures"][0])
    hf_config = kind.config_class(**config | {"eos_token_id": None, "pad_token_id": 0})
    with torch.device("meta"):
        theirs = kind(hf_config)
    ours, state = {name: dense(t) for name, t in model.state_dict().items()}, {}
    split = {"attn.wqkv": ([f"self_attn.{x}_proj" for x in "qkv"],
                           [c.n_head * c.head_dim, *[c.n_kv_head * c.head_dim] * 2]),
             "ffn.w13": (["mlp.gate_proj", "mlp.up_proj"], [c.ffn_dim] * 2),
             "attn.wo": (["self_attn.o_proj"], [c.dim]), "ffn.w2": (["mlp.down_proj"], [c.dim]),
             "attn_norm": (["input_layernorm"], [c.dim]),
             "ffn_norm": (["post_attention_layernorm"], [c.dim])}
    for name, tensor in ours.items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            module, what = rest.rsplit(".", 1)
            names, rows = split[module]
            state |= {f"model.layers.{i}.{n}.{what}": part for n,
                      part in zip(names, tensor.split(rows))}
    state |= {"model.embed_tokens.weight": ours["embed.weight"],
              "model.norm.weight": ours["norm.weight"], "lm_head.weight": ours["output.weight"]}
    theirs.load_state_dict(state, assign=True)
    with model.norm.weight.device:
        # its table is no weight, so it was still on meta
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(hf_config)
    return theirs.requires_grad_(False).eval()


def calls(target: Transformer, draft: Transformer, configs: list[dict], speculate_k: list[int],
          max_new_tokens: int, eos_ids) -> dict:
    """Variant -> a function of a prompt's ids that gives (new tokens, None, None): alone, and
    assisted with the same constant K. Ends where ours does.
    """
    theirs, assistant = (to_hf(model, config) for model, config in zip((target, draft), configs))

    def call(prompt, k):
        ids, more = torch.tensor([prompt], device=theirs.device), {}
        if k:
            settings = assistant.generation_config
            settings.num_assistant_tokens, settings.num_assistant_tokens_schedule, settings.assistant_confidence_threshold = k, "constant", 0.0
            more = {"assistant_model": assistant}
        more |= {"eos_token_id": list(eos_ids)} if eos_ids else {}
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                              max_new_tokens=max_new_tokens, pad_token_id=0, **more)
        return out[0, len(prompt):].tolist(), None, None

    return {"hf target": lambda prompt: call(prompt, 0)} | {f"hf assisted K={k}": lambda prompt,
                                                            k=k: call(prompt, k)
                                                            for k in speculate_k}
