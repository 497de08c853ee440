"""What train_judge.py reports of a judge on its validation answers: numbers, the worst mistakes,
and one HTML page.

Errors are the rare class, so average precision is that of finding them. Intervals are 95% bootstrap
intervals over whole prompts, since the tokens of one prompt go wrong together. Settings and
threshold were chosen on these same prompts, which flatters a little and which no interval covers.
The page needs no script and loads nothing.
"""
import html
import math
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.report import table
from judge import above_threshold
from judge_data.data import Encoded

WORST = 10  # mistakes shown
ANSWERS = 500  # answers shaded on the page, taken evenly


class Judged(NamedTuple):
    """An answer, and for each of its labelled tokens the characters, label and score."""
    example: dict
    spans: list[tuple[int, int]]
    labels: list[int]  # 1 correct, 0 error
    scores: list[float]  # log-odds


def judged(examples: list[dict], encoded: list[Encoded], part: Tensor,
           scores: Tensor) -> list[Judged]:
    """The examples in `part`, bool [examples], with the scores of their tokens in order."""
    rest = iter(scores.tolist())
    return [Judged(e, u.spans, u.labels, [next(rest) for _ in u.labels])
            for e, u, inside in zip(examples, encoded, part) if inside]


def tensors(answers: list[Judged]) -> tuple[Tensor, Tensor]:
    """Scores and labels of all tokens, one answer after the other."""
    return (torch.tensor([s for a in answers for s in a.scores]),
            torch.tensor([y for a in answers for y in a.labels]))


# ---------------------------------------------------------------- numbers

def auc_and_ap(rank: Tensor, labels: Tensor, weight: Tensor) -> tuple[float, float]:
    """ROC AUC, ties counting half, and average precision of finding the errors by rising score.

    rank int64 [N] (equal scores share a rank, 0 the lowest), labels [N], weight float64 [N]. Both
    are nan without both labels.
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
    """(share of errors accepted, share of correct tokens rejected); nan where there are none."""
    weight = torch.ones(len(labels), dtype=torch.float64) if weight is None else weight
    share = lambda wrong, kind: float((weight * wrong * kind).sum() / (weight * kind).sum())
    return share(yes, labels == 0), share(~yes, labels == 1)


def measure(answers: list[Judged], threshold: float, seed: int, samples=1000) -> dict:
    """{name: (value, low, high)} of auc, ap, false_accept and false_reject over all tokens.

    seed: the bootstrap's.
    """
    scores, labels = tensors(answers)
    prompts = {p: i for i, p in enumerate(dict.fromkeys(a.example["prompt"] for a in answers))}
    prompt = torch.tensor([prompts[a.example["prompt"]] for a in answers for _ in a.labels])
    rank, yes = ranks(scores), above_threshold(scores, threshold)
    numbers = lambda weight: (*auc_and_ap(rank, labels, weight), *rates(yes, labels, weight))
    generator, n = torch.Generator().manual_seed(seed), len(prompts)
    draws = []
    for _ in range(samples):
        counts = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
        draws.append(numbers(counts[prompt]))
    draws = torch.tensor(draws, dtype=torch.float64)
    draws = draws[~draws.isnan().any(1)]  # a draw of prompts without any error has no such numbers
    bounds = [[math.nan] * 2] * 4
    if len(draws):
        bounds = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()
    values = numbers(torch.ones(len(scores), dtype=torch.float64))
    names = "auc", "ap", "false_accept", "false_reject"
    return {name: (value, *bound) for name, value, bound in zip(names, values, bounds)}


def mistakes(answers: list[Judged], threshold: float) -> list[tuple[float, int, int]]:
    """The worst tokens: (distance to the threshold in log-odds, index of the answer, of the token).

    At most one of each kind an answer; half false accepts, half false rejects, if there are enough.
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
    """Rounded to float32, as the rule compares it: a threshold can be one token's score exactly."""
    if 0 < p < 1:
        return float(torch.tensor(math.log(p / (1 - p))))
    return -math.inf if p <= 0 else math.inf


def probability(score: float) -> float:
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))


# ---------------------------------------------------------------- text

def percent(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.1%}"


def domain_rows(answers: list[Judged], threshold: float) -> list[list[str]]:
    """A row for each domain and one for all: how much there is, and how it is judged."""
    rows = [["domain", "answers", "with an error", "tokens", "errors", "AUC", "false accepts",
             "false rejects"]]
    name = lambda a: str(a.example.get("domain", "–"))
    domains = sorted({name(a) for a in answers})
    for domain in [*domains, None] if len(domains) > 1 else [None]:
        part = [a for a in answers if domain in (None, name(a))]
        scores, labels = tensors(part)
        accepted, rejected = rates(above_threshold(scores, threshold), labels)
        area = auc(scores, labels)
        rows.append([
            clean(domain or "all"), f"{len(part):,}", f"{sum(0 in a.labels for a in part):,}",
            f"{len(labels):,}", f"{int((labels == 0).sum()):,}",
            "–" if math.isnan(area) else f"{area:.4f}", percent(accepted), percent(rejected)])
    return rows


def number_rows(m: dict) -> list[list[str]]:
    rows = [["validation", "value", "95% interval"]]
    for name, text in (("auc", "ROC AUC"), ("ap", "average precision of the errors"),
                       ("false_accept", "false accepts, of the errors"),
                       ("false_reject", "false rejects, of the correct")):
        form = percent if name.startswith("false") else "{:.4f}".format
        value, low, high = map(form, m[name])
        rows.append([text, value, f"{low} to {high}"])
    return rows


def curve_rows(curve) -> list[list[str]]:
    return [["threshold", "false accepts", "false rejects"]] + [
        [f"{t:.4f}", percent(a), percent(r)] for t, a, r in curve]


def context(a: Judged, token: int, before=70, after=40) -> tuple[str, str, str]:
    """The text before a token, the token, and the text after it."""
    (start, end), answer = a.spans[token], a.example["answer"]
    return (("…" if start > before else "") + answer[max(0, start - before):start],
            answer[start:end],
            answer[end:end + after] + ("…" if end + after < len(answer) else ""))


def clean(text: str) -> str:
    """Safe on a terminal and on one line: unprintable characters escaped as in a Python string."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def mistake_lines(answers: list[Judged], threshold: float):
    """(kind, where, probability, before, token, after) of each of the worst mistakes."""
    for _, i, j in mistakes(answers, threshold):
        a = answers[i]
        kind = "correct, rejected" if a.labels[j] else "error, accepted"
        yield (kind, f"line {a.example['line']}", probability(a.scores[j]),
               *map(clean, context(a, j)))


def text(answers: list[Judged], m: dict, threshold: float, curve) -> str:
    """The report as it is printed."""
    lines = [f"  {kind}, p = {p:.3f}, {where}:\n    {before}>>{token}<<{after}"
             for kind, where, p, before, token, after in mistake_lines(answers, threshold)]
    return "\n\n".join([
        f"validation answers, judged at threshold {threshold:.4f}:",
        table(domain_rows(answers, threshold)), table(number_rows(m)),
        "the curve, on validation tokens:", table(curve_rows(curve)),
        "\n".join(["the worst mistakes:", *lines]) if lines
        else "no mistakes on the validation answers"])


# ---------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1c1c; --dim: #767676; --line: #ddd;
  --yes: #e3f4e6; --barely: #f7f3c9; --no1: #fbd9c5; --no2: #f6ae9c; --no3: #ee7d70;
  --err: #b00020; }
@media (prefers-color-scheme: dark) { :root { --bg: #161719; --fg: #e6e6e6; --dim: #9a9a9a;
  --line: #3a3c40; --yes: #1c3524; --barely: #45411b; --no1: #57301f; --no2: #7c3328;
  --no3: #a3352f; --err: #ff8a80; } }
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, sans-serif;
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums;
  display: block; overflow-x: auto; }
td, th { padding: .15rem .8rem .15rem 0; text-align: right; border-bottom: 1px solid var(--line);
  font-weight: normal; }
th { color: var(--dim); } td:first-child, th:first-child { text-align: left; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: 13.5px/1.65 ui-monospace, monospace; margin: .2rem 0 1.2rem; }
.prompt, .rest, .note { color: var(--dim); } .note { font-size: .9rem; }
.prompt { max-height: 9rem; overflow-y: auto; margin-bottom: 0; }
.y { background: var(--yes); } .b { background: var(--barely); }
.n1 { background: var(--no1); } .n2 { background: var(--no2); } .n3 { background: var(--no3); }
.e { text-decoration: underline wavy var(--err); text-underline-offset: 3px; }
.e.y, .e.b { outline: 2px solid var(--err); }
.legend span { padding: 0 .4rem; margin-right: .3rem; }
"""
LEGEND = (
    '<p class="legend"><span class="y">accepted</span><span class="b">barely accepted</span>'
    '<span class="n1">rejected</span><span class="n2">more surely</span>'
    '<span class="n3">most surely</span><span class="n2 e">error, rejected</span>'
    '<span class="y e">error, accepted</span><span class="rest">not judged</span></p>'
    '<p class="note">Point at a token to see the probability that it is correct. A red token '
    'without a wavy line is correct, and rejected (the standard test may still accept it). What '
    'follows an error has no label and is not judged.</p>')


def shade(score: float, edge: float) -> str:
    """A token's CSS class, by the distance of its log-odds from the threshold's."""
    margin = score - edge
    return next((name for name, least in (("y", 1), ("b", 0), ("n1", -1.5), ("n2", -4))
                 if margin > least), "n3")


def pieces(a: Judged) -> list[tuple[int, int, int, float]]:
    """(start, end, label, score) without overlap.

    Tokens that share a character become one piece, of the lowest label and score.
    """
    found = []
    for span, label, score in zip(a.spans, a.labels, a.scores):
        start, end = span
        if found and start < found[-1][1]:
            start, last, y, s = found.pop()
            end, label, score = max(end, last), min(label, y), min(score, s)
        found.append((start, end, label, score))
    return found


def shaded(a: Judged, threshold: float) -> str:
    """The answer's HTML, each token shaded by its verdict.

    Neighbours that are surely accepted share one element.
    """
    answer, edge, run = a.example["answer"], logit(threshold), ""
    at = min(a.example.get("labelled_from", 0), *(start for start, _ in a.spans), len(answer))
    out = [f'<span class="rest">{html.escape(answer[:at])}</span>'] if at else []
    for _, end, label, score in pieces(a):
        # from `at`: a character that no token holds goes with the next
        kind, piece = shade(score, edge), html.escape(answer[at:end])
        at = end
        if kind == "y" and label:
            run += piece
            continue
        out.append(f'<span class="y">{run}</span>' if run else "")
        out.append(f'<span class="{kind}{"" if label else " e"}" '
                   f'title="p = {probability(score):.3f}">{piece}</span>')
        run = ""
    out.append(f'<span class="y">{run}</span>' if run else "")
    out.append(f'<span class="rest">{html.escape(answer[at:])}</span>' if at < len(answer) else "")
    return "".join(out)


def html_table(rows: list[list[str]]) -> str:
    row = lambda cells, tag: "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
    lines = [row(cells, "td" if i else "th") for i, cells in enumerate(rows)]
    return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>\n"


def page(title: str, about: str, answers: list[Judged], m: dict, threshold: float, curve) -> str:
    """The whole report as one HTML page; the same input gives the same bytes."""
    esc = html.escape
    worst = "".join(
        f'<p class="note">{kind}, p = {p:.3f}, {where}</p><div class="text">{esc(before)}'
        f'<span class="n2">{esc(token)}</span>{esc(after)}</div>\n'
        for kind, where, p, before, token, after in mistake_lines(answers, threshold))
    shown = answers[::-(-len(answers) // ANSWERS)]
    parts = []
    for a in shown:
        e = a.example
        domain = f", {esc(str(e['domain']))}" if "domain" in e else ""
        parts.append(f'<p class="note">line {e["line"]}{domain}</p>'
                     f'<div class="text prompt">{esc(e["prompt"])}</div>'
                     f'<div class="text">{shaded(a, threshold)}</div>\n')
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-'
        'Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">'
        f"<title>{esc(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{esc(title)}</h1>\n<p>{esc(about)}</p>\n"
        f"{html_table(domain_rows(answers, threshold))}{html_table(number_rows(m))}"
        '<p class="note">On validation prompts. The settings and the threshold were chosen on '
        'these too, so the numbers flatter a little; the intervals are over draws of whole '
        'prompts and do not cover that.</p>\n'
        f"<h2>The curve</h2>\n{html_table(curve_rows(curve))}"
        f"<h2>The worst mistakes</h2>\n{worst or '<p>None.</p>'}"
        f"<h2>{len(shown):,} of {len(answers):,} validation answers</h2>\n{LEGEND}\n"
        f"{''.join(parts)}</body></html>\n")
