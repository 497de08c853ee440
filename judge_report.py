"""What train_judge.py shows of a judge on its validation answers: numbers, the worst mistakes as
text, and one HTML page. No model.

The errors are the rare kind, so average precision is that of finding them. Intervals are 95%
bootstrap intervals over whole prompts, since the tokens of one prompt go wrong together; they do
not cover that the settings and the threshold were chosen on these same prompts, which flatters a
little. The page needs no script and nothing from elsewhere.
"""
import html
import math
from typing import NamedTuple

import torch
from torch import Tensor

import judge as rules
from report import table

WORST = 10  # mistakes shown
ANSWERS = 500  # shaded on the page, taken evenly


class Judged(NamedTuple):
    """A validation answer: its data line, and for each labelled token its characters, its label (0:
    error) and its score.
    """
    example: dict
    spans: list[tuple[int, int]]
    labels: list[int]
    scores: list[float]


def tensors(answers: list[Judged]) -> tuple[Tensor, Tensor]:
    """Scores and labels of all tokens, one after the other."""
    return torch.tensor([s for a in answers for s in a.scores]), torch.tensor(
        [y for a in answers for y in a.labels])


# ---------------------------------------------------------------- numbers

def auc_and_ap(rank: Tensor, labels: Tensor, weight: Tensor) -> tuple[float, float]:
    """ROC AUC, ties counting half, and the average precision of finding the errors from the lowest
    score up.

    rank int64 [N] (equal scores share a rank, 0 the lowest), labels [N], weight float64 [N] -> two
    floats, nan without both kinds.
    """
    size = int(rank.max()) + 1
    errors, correct = (torch.bincount(rank, weight * (labels == kind), minlength=size)
                       for kind in (0, 1))
    found, seen = errors.cumsum(0), (errors + correct).cumsum(0)
    auc = (correct * (found - errors / 2)).sum() / (errors.sum() * correct.sum())
    return float(auc), float((errors * found / seen.clamp(min=1)).sum() / errors.sum())


def ranks(scores: Tensor) -> Tensor:
    return scores.unique(return_inverse=True)[1]


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a correct token scores above an error token, ties counting half."""
    return auc_and_ap(ranks(scores), labels, torch.ones(len(scores), dtype=torch.float64))[0]


def rates(yes: Tensor, labels: Tensor, weight: Tensor | None = None) -> tuple[float, float]:
    """(share of the error tokens that are accepted, share of the correct tokens that are rejected);
    nan where there are none.
    """
    weight = torch.ones(len(labels), dtype=torch.float64) if weight is None else weight
    share = lambda wrong, kind: float((weight * wrong * kind).sum() / (weight * kind).sum())
    return share(yes, labels == 0), share(~yes, labels == 1)


def measure(answers: list[Judged], threshold: float, seed: int, samples=1000) -> dict:
    """{name: (value, low, high)} of auc, ap, false_accept and false_reject over all tokens of the
    answers; the seed is of the bootstrap.
    """
    scores, labels = tensors(answers)
    prompts = {p: i for i, p in enumerate(dict.fromkeys(a.example["prompt"] for a in answers))}
    prompt = torch.tensor([prompts[a.example["prompt"]] for a in answers for _ in a.labels])
    rank, yes = ranks(scores), rules.judge(scores, threshold)
    numbers = lambda weight: (*auc_and_ap(rank, labels, weight), *rates(yes, labels, weight))
    generator, n = torch.Generator().manual_seed(seed), len(prompts)
    draws = []
    for _ in range(samples):
        counts = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
        draws.append(numbers(counts[prompt]))
    draws = torch.tensor(draws, dtype=torch.float64)
    draws = draws[~draws.isnan().any(1)]  # a draw of prompts without any error has no such numbers
    bounds = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64),
                            dim=0).T.tolist() if len(draws) else [[math.nan] * 2] * 4
    values = numbers(torch.ones(len(scores), dtype=torch.float64))
    return {name: (value, *bound) for name, value,
            bound in zip(("auc", "ap", "false_accept", "false_reject"), values, bounds)}


def mistakes(answers: list[Judged], threshold: float) -> list[tuple[float, int, int]]:
    """The worst tokens, one an answer, as (how far the score is on the wrong side, answer, token):
    half false accepts, half false rejects, if there are.
    """
    edge = logit(threshold)
    kinds = {0: [], 1: []}
    for i, a in enumerate(answers):
        for kind, found in kinds.items():
            wrong = [(abs(s - edge), i, j) for j, (s, y) in enumerate(zip(a.scores, a.labels))
                     if y == kind and (s > edge) != y]
            found += [max(wrong)] if wrong else []
    accepts, rejects = (sorted(found, key=lambda m: (-m[0], m[1:])) for found in kinds.values())
    accepts = accepts[:max(WORST // 2, WORST - len(rejects))]
    return accepts + rejects[:WORST - len(accepts)]


def logit(p: float) -> float:
    """Rounded to float32, as the rule compares it: the threshold may be one token's score exactly.
    """
    return -math.inf if p <= 0 else math.inf if p >= 1 else float(
        torch.tensor(math.log(p / (1 - p))))


def probability(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


# ---------------------------------------------------------------- text

def percent(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.1%}"


def domain_rows(answers: list[Judged], threshold: float) -> list[list[str]]:
    """A row for each domain and one for all: what there is of it, and how it is judged."""
    rows = [["domain", "answers", "with an error", "tokens", "errors", "AUC", "false accepts",
             "false rejects"]]
    name = lambda a: str(a.example.get("domain", "–"))
    domains = sorted({name(a) for a in answers})
    for domain in [*domains, None] if len(domains) > 1 else [None]:
        part = [a for a in answers if domain in (None, name(a))]
        scores, labels = tensors(part)
        accepted, rejected = rates(rules.judge(scores, threshold), labels)
        area = auc(scores, labels)
        rows.append([clean(domain or "all"), f"{len(part):,}",
                     f"{sum(0 in a.labels for a in part):,}", f"{len(labels):,}",
                     f"{int((labels == 0).sum()):,}",
                     "–" if math.isnan(area) else f"{area:.4f}", percent(accepted),
                     percent(rejected)])
    return rows


def number_rows(m: dict) -> list[list[str]]:
    form = lambda name: percent if name.startswith("false") else "{:.4f}".format
    names = {"auc": "ROC AUC", "ap": "average precision of the errors", "false_accept": "false "
             "accepts, of the errors", "false_reject": "false rejects, of the correct"}
    return [["validation", "value", "95% interval"]] + [
        [text, form(name)(m[name][0]), "{} to {}".format(*map(form(name), m[name][1:]))] for name,
        text in names.items()]


def curve_rows(curve) -> list[list[str]]:
    return [["threshold", "false accepts", "false rejects"]] + [[f"{t:.4f}", percent(a), percent(r)]
                                                                for t, a, r in curve]


def context(a: Judged, token: int, before=70, after=40) -> tuple[str, str, str]:
    """The text before a token, the token, and the text after it."""
    (start, end), answer = a.spans[token], a.example["answer"]
    return ("…" if start > before else "") + answer[max(0, start - before):start], answer[
        start:end], answer[end:end + after] + ("…" if end + after < len(answer) else "")


def clean(text: str) -> str:
    """Safe on a terminal and in one line: what is not printable is written as in a Python string.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def mistake_lines(answers: list[Judged], threshold: float):
    """(kind, where, probability, before, token, after) of each of the worst mistakes."""
    for _, i, j in mistakes(answers, threshold):
        a = answers[i]
        yield "correct, rejected" if a.labels[
            j] else "error, accepted", f"line {a.example['line']}", probability(a.scores[j]), *map(
                clean, context(a, j))


def text(answers: list[Judged], m: dict, threshold: float, curve) -> str:
    """The report as it is printed."""
    lines = [f"  {kind}, p = {p:.3f}, {where}:\n    {before}>>{token}<<{after}" for kind, where, p,
             before, token, after in mistake_lines(answers, threshold)]
    return "\n\n".join([f"validation answers, judged at threshold "
                        f"{threshold:.4f}:\n\n{table(domain_rows(answers, threshold))}",
                        table(number_rows(m)),
                        "the curve, on validation tokens:\n\n" + table(curve_rows(curve)),
                        "\n".join(["the worst mistakes:", *lines]) if lines else "no mistakes on "
                        "the validation answers"])


# ---------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1c1c; --dim: #767676; --line: #ddd; --yes: #e3f4e6; --barely: #f7f3c9; --no1: #fbd9c5; --no2: #f6ae9c; --no3: #ee7d70; --err: #b00020; }
@media (prefers-color-scheme: dark) { :root { --bg: #161719; --fg: #e6e6e6; --dim: #9a9a9a; --line: #3a3c40; --yes: #1c3524; --barely: #45411b; --no1: #57301f; --no2: #7c3328; --no3: #a3352f; --err: #ff8a80; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--dim); } td:first-child, th:first-child { text-align: left; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: 13.5px/1.65 ui-monospace, monospace; margin: .2rem 0 1.2rem; }
.prompt, .rest, .note { color: var(--dim); } .note { font-size: .9rem; }
.prompt { max-height: 9rem; overflow-y: auto; margin-bottom: 0; }
.y { background: var(--yes); } .b { background: var(--barely); } .n1 { background: var(--no1); } .n2 { background: var(--no2); } .n3 { background: var(--no3); }
.e { text-decoration: underline wavy var(--err); text-underline-offset: 3px; } .e.y, .e.b { outline: 2px solid var(--err); }
.legend span { padding: 0 .4rem; margin-right: .3rem; }
"""
LEGEND = (f'<p class="legend"><span class="y">accepted</span><span class="b">barely '
          f'accepted</span><span class="n1">rejected</span><span class="n2">more surely</span>'
          '<span class="n3">most surely</span><span class="n2 e">error, rejected</span><span '
          'class="y e">error, accepted</span><span class="rest">not judged</span></p>'
          '<p class="note">Point at a token to see the probability that it is correct. A red '
          'token without a wavy line is correct, and rejected '
          '(the standard test may still accept it). What follows an error has no label and is not '
          'judged.</p>')


def shade(score: float, edge: float) -> str:
    """A token's class: by how far its log-odds are from the threshold's."""
    margin = score - edge
    return "y" if margin > 1 else "b" if margin > 0 else "n1" if margin > -1.5 else "n2" if margin > -4 else "n3"


def pieces(a: Judged) -> list[tuple[int, int, int, float]]:
    """(start, end, label, score) without overlap: tokens that share a character become one, of the
    lowest label and score.
    """
    found = []
    for (start, end), label, score in zip(a.spans, a.labels, a.scores):
        if found and start < found[-1][1]:
            before = found.pop()
            start, end, label, score = before[0], max(end, before[1]), min(label, before[2]), min(
                score, before[3])
        found.append((start, end, label, score))
    return found


def shaded(a: Judged, threshold: float) -> str:
    """The answer's HTML, each token shaded by its verdict; neighbours that are surely accepted
    share one element.
    """
    answer, edge, at, out, run = a.example["answer"], logit(threshold), 0, [], ""
    for start, end, label, score in pieces(a):
        # from `at`: a character that no token holds goes with the next
        kind, piece = shade(score, edge), html.escape(answer[at:end])
        at = end
        if kind == "y" and label:
            run += piece
            continue
        out.append(f'<span class="y">{run}</span>' if run else "")
        out.append(f'<span class="{kind}{"" if label else " e"}" title="p = '
                   f'{probability(score):.3f}">{piece}</span>')
        run = ""
    out.append(f'<span class="y">{run}</span>' if run else "")
    return "".join(out) + (f'<span class="rest">{html.escape(answer[at:])}</span>'
                           if at < len(answer) else "")


def html_table(rows: list[list[str]]) -> str:
    row = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>"
                                              for c in cells) + "</tr>\n"
    return "<table>\n" + row(rows[0], "th") + "".join(row(r, "td") for r in rows[1:]) + "</table>\n"


def page(title: str, about: str, answers: list[Judged], m: dict, threshold: float, curve) -> str:
    """The whole report as one HTML page; the same input gives the same bytes."""
    worst = "".join(f'<p class="note">{kind}, p = {p:.3f}, {where}</p><div '
                    f'class="text">{html.escape(before)}<span '
                    f'class="n2">{html.escape(token)}</span>'
                    f'{html.escape(after)}</div>\n' for kind, where, p, before, token,
                    after in mistake_lines(answers, threshold))
    shown = answers[::-(-len(answers) // ANSWERS)]
    parts = []
    for a in shown:
        e = a.example
        parts.append(f'<p class="note">line '
                     f'{e["line"]}{", " + html.escape(str(e["domain"])) if "domain" in e else ""}</p>'
                     f'<div class="text prompt">{html.escape(e["prompt"])}</div><div '
                     f'class="text">{shaded(a, threshold)}</div>\n')
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width">'
            f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
            f'\'unsafe-inline\'">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n<p>{html.escape(about)}</p>\n"
            f"{html_table(domain_rows(answers, threshold))}{html_table(number_rows(m))}"
            '<p class="note">On validation prompts. The settings and the threshold were chosen on '
            'these too, so the numbers flatter a little; the intervals are '
            f"over draws of whole prompts and do not cover that.</p>\n<h2>The "
            f"curve</h2>\n{html_table(curve_rows(curve))}"
            f"<h2>The worst mistakes</h2>\n{worst or '<p>None.</p>'}<h2>{len(shown):,} of "
            f"{len(answers):,} validation answers</h2>\n{LEGEND}\n"
            f"{''.join(parts)}</body></html>\n")
