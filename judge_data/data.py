"""Judge data, JSON Lines of {"prompt", "answer", "error": null | [start, end]}: reading, labels of
tokens, and the split by prompt. The offsets of the first error are characters of the answer. With
"labelled_from": start, only tokens that end after that character have labels.

annotate.py imports this and needs no torch to mark, so only `split` imports it.
"""
from pathlib import Path
from typing import NamedTuple

from common import UserError, json_lines


def check_texts(line: dict, where: str):
    """Refuse a line without a prompt or an answer."""
    for key in ("prompt", "answer"):
        if not isinstance(line.get(key), str) or not line[key]:
            raise UserError(f"{where}: {key!r} must be a text that is not empty")


def is_error(error, answer: str) -> bool:
    """Whether this is a valid "error": null, or [start, end] of at least one character."""
    return error is None or (isinstance(error, list) and len(error) == 2
                             and all(type(x) is int for x in error)
                             and 0 <= error[0] < error[1] <= len(answer))


def read_data(path: Path) -> list[dict]:
    """The lines of a judge data file, each with its place as "where" and its number as "line".

    Raises UserError naming the line that breaks the format.
    """
    examples = []
    for line in json_lines(path, holding="examples"):
        example, where = line.value, line.where
        check_texts(example, where)
        if "error" not in example:
            raise UserError(f"{where}: 'error' is missing; it is null for a correct answer, else "
                            "[start, end]")
        if not is_error(example["error"], example["answer"]):
            raise UserError(f"{where}: 'error' is {example['error']}; it must be null or [start, "
                            f"end] with 0 <= start < end <= {len(example['answer'])}, the "
                            "answer's characters")
        begin, (last, _) = example.get("labelled_from", 0), example["error"] or (
            len(example["answer"]) - 1, None)
        if type(begin) is not int or not 0 <= begin <= last:
            raise UserError(f"{where}: 'labelled_from' is {begin}; it must be from 0 to {last}: a "
                            "character of the answer, not after its error's start")
        examples.append(example | {"where": where, "line": line.number})
    return examples


def label_tokens(offsets: list[tuple[int, int]], error) -> list[int]:
    """1 (correct) for each token before the error, 0 for each that holds a character of it.

    Tokens after the error have no label and are left out.
    """
    if error is None:
        return [1] * len(offsets)
    start, end = error
    return [int(b <= start) for a, b in offsets if a < end]


def labelled(offsets: list[tuple[int, int]], example: dict) -> tuple[int, list[int]]:
    """The index of the first token of an answer that has a label, and the labels from it on."""
    labels, begin = label_tokens(offsets, example["error"]), example.get("labelled_from", 0)
    first = sum(b <= begin for _, b in offsets[:len(labels)]) if begin else 0
    return first, labels[first:]


class Encoded(NamedTuple):
    """An example as the target reads it."""
    ids: list[int]  # the prompt and the answer up to its last labelled token
    start: int  # index of the first labelled token
    spans: list[tuple[int, int]]  # each labelled token's characters of the answer
    labels: list[int]
    prompt: int  # tokens of it


def encode(tokenizer, examples: list[dict], limit: int, chat=False) -> list[Encoded]:
    """Ids and labels of each example; raises UserError for one that exceeds `limit` tokens."""
    encoded = []
    for e in examples:
        prompt = tokenizer.prompt(e["prompt"], chat)
        answer, spans = tokenizer.encode_with_offsets(e["answer"], continuation=True)
        if len(prompt) + len(answer) > limit:
            raise UserError(f"{e['where']}: prompt and answer have {len(prompt) + len(answer)} "
                            f"tokens, the context is {limit}; shorten or drop the line")
        first, labels = labelled(spans, e)
        end = first + len(labels)
        encoded.append(Encoded(prompt + answer[:end], len(prompt) + first, spans[first:end],
                               labels, len(prompt)))
    return encoded


def split(examples: list[dict], share: float, seed: int) -> list[bool]:
    """Whether each example is for validation: a share of the prompts, each wholly on one side."""
    import torch
    prompts = sorted({e["prompt"] for e in examples})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {prompts[i] for i in order[:max(1, round(share * len(prompts)))]}
    return [e["prompt"] in held for e in examples]
