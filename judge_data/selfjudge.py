"""Labels without a checker, after SelfJudge (Yoon et al., arXiv 2510.02329): a drafted token in the
target's own answer is harmless if the target finds the answer about as likely with it.

For a prompt x, the target's greedy answer y, the draft's token d at a place t where y has another,
z = y with that token swapped, and the W tokens after it (fewer at the end, where EOS counts as one
if the target has it there):

    score(t) = mean over t <= j <= t + W of
               log p(z_j | x, z_<j) - log p(y_j | x, y_<j)          [nats a token]

    harmless if score(t) > -bound, else an error

The idea is the paper's; only its abstract and introduction were at hand, so window, mean and bound
are ours, and so is this: a swap gets a label only where it fits, that is where the target itself
goes on with y_t+1 after d. A token that begins a longer or shorter wording than y's is followed by
what no longer fits, however right it is, and its score says nothing. With misfits "error" all of
those count as errors: for a draft so weak that most of what does not fit is wrong. Greedy is an
answer of which every token is within TIE nats of the argmax, since bfloat16 rounds a text read at
once otherwise.

Against the demo's exact labels (RESULTS.md) it errs where another name is taken for what comes
again later, which it calls an error, and where a wrong number is used once and nothing depends on
it.
"""
import time

import torch
from torch import Tensor

from checkpoint import read_config
from drafters.eagle import read_pairs
from drafters.eagle_head import is_eagle
from judge import top1
from judge_data import mining
from judge_data.branches import ROWS, Text
from load import load_models
from model import Transformer
from tokenizer import Tokenizer

LOGITS = 256  # rows of logits at once
TIE = 0.25  # nats below the argmax that still count as greedy: a near tie in bfloat16


class SelfJudge:
    """Target and draft, and the labels of one answer after the other."""

    def __init__(self, args, lines: list[dict]):
        tokenizer = Tokenizer.from_dir(args.target)
        context = read_config(args.target).max_seq_len
        self.prompts, answer = mining.prompts_of(tokenizer, lines, context)
        longest = max(map(len, self.prompts.values())) + answer + ROWS
        kind = "eagle" if is_eagle(args.draft) else "draft"
        self.target, self.draft, _, self.tokenizer, self.eagle = load_models(
            args.target, device=args.device, dtype=args.dtype, rows=LOGITS, caches=1.5,
            length=lambda tokenizer: longest, **{kind: args.draft})
        if self.eagle:
            self.target.taps = self.eagle.taps
        self.window, self.bound, self.misfits = args.window, args.bound, args.misfits
        self.swaps = self.fitting = 0
        self.seconds = 0.0

    def selfjudge(self, line) -> list[dict] | str:
        """The judge data of an answer, or why there is none.

        The answer, all correct, and a line for each swap, cut after it, with its label alone.
        """
        prompt, answer = self.prompts[line["prompt"], line["chat"]], line["answer"]
        tokens = self.tokenizer.encode(answer, continuation=True)
        if not tokens or self.tokenizer.decode_new(prompt, tokens) != answer:
            return "the target's tokenizer gives another text back" if answer else "empty"
        found = self.scores(prompt, tokens)
        if found is None:
            return "not the target's own greedy answer"
        lines = [mining.about(line) | {"answer": answer, "error": None}]
        for at, token, score in found:
            mark = mining.characters(self.tokenizer, prompt, [*tokens[:at], token], at)
            if mark:
                text, span = mark
                lines.append(mining.about(line) | {
                    "answer": text, "labelled_from": span[0],
                    "error": None if score is not None and score > -self.bound else span,
                    "score": None if score is None else round(score, 4),
                    "instead_of": self.tokenizer.decode_new(prompt, [tokens[at]])})
        return lines

    @torch.inference_mode()
    def scores(self, prompt: list[int],
               answer: list[int]) -> list[tuple[int, int, float | None]] | None:
        """(place, drafted token, score) of each swap, no score where it does not fit; None if the
        answer is not greedy.
        """
        begin, target, agree = time.perf_counter(), self.target, self.target.agree
        text, first = Text(target, prompt + answer), len(prompt) - 1
        best, top, own = predict(target, text.hidden[first:], answer)
        if agree((top[:-1] - own > TIE).any().long()):
            return None
        drafted = agree(self.drafted(text, prompt + answer)[-len(answer):]).tolist()
        last = int(agree(best[-1:]))
        answer = answer + [last] * (last in self.tokenizer.eos_ids)
        own = torch.cat((own, top[-1:]))
        rest = lambda at: answer[at + 1:at + 1 + self.window]
        swaps = [(at, d) for at, d in enumerate(drafted) if d != answer[at] and rest(at)
                 and d < target.config.vocab_size and d not in self.tokenizer.eos_ids]
        if not swaps:
            return []
        after = text.branches([(len(prompt) + at, [d]) for at, d in swaps])
        then = agree(predict(target, torch.cat(after), [])[0]).tolist()
        fitting = [swap for swap, token in zip(swaps, then) if token == answer[swap[0] + 1]]
        after = text.branches([(len(prompt) + at, [d, *rest(at)[:-1]]) for at, d in fitting])
        misfits = [swap for swap in swaps if self.misfits == "error" and swap not in fitting]
        found = [(at, d, None) for at, d in misfits]
        for (at, d), hidden in zip(fitting, after):
            here = text.hidden[first + at:first + at + 1]
            _, _, other = predict(target, torch.cat((here, hidden)), [d, *rest(at)])
            found.append((at, d, float((other - own[at:at + len(other)]).mean())))
        self.swaps, self.fitting = self.swaps + len(swaps), self.fitting + len(fitting)
        self.seconds += time.perf_counter() - begin
        return sorted(found)

    def drafted(self, text: Text, ids: list[int]) -> Tensor:
        """The draft's argmax after each token of the text but the last: [N - 1], of an EAGLE head,
        which needs two tokens, [N - 2].
        """
        if not self.eagle:
            last = self.draft.config.vocab_size - 1  # the target's padding can have larger ids
            hidden = Text(self.draft, [min(t, last) for t in ids]).hidden[:-1]
            return predict(self.draft, hidden, [])[0]
        head, states = self.eagle, self.eagle.fuse(text.hidden[:-2])
        slots = torch.arange(len(states), device=states.device)
        hidden = read_pairs(head, head.new_cache(len(states)), self.target,
                            torch.tensor(ids[1:-1], device=states.device), states, slots)
        return torch.cat([top1(head.logits(h, self.target)) for h in hidden.split(LOGITS)])

    def report(self) -> str:
        return (f"{self.fitting:,} of {self.swaps:,} swaps fit and were scored, in "
                f"{self.seconds:.1f} s")


def predict(model: Transformer, hidden: Tensor,
            tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What hidden states [N, D] say of the next token: the argmax [N], its log-probability [N], and
    that of `tokens`, up to N. float32.
    """
    parts, n = [], len(tokens)
    tokens = torch.tensor(tokens + [0] * (len(hidden) - n), device=hidden.device)
    for rows, given in zip(hidden[:, :model.config.dim].split(LOGITS), tokens.split(LOGITS)):
        logits = model.output(rows).float()
        best, norm = top1(logits), logits.logsumexp(-1)
        parts.append((best, *(logits.gather(1, i[:, None])[:, 0] - norm for i in (best, given))))
    best, top, own = map(torch.cat, zip(*parts))
    return best, top, own[:n]
