"""What eval.py shows of saved answers: rates with intervals, tables, the picture. No model.

An answer is a dict with rule, id, domain, right, how, tokens, seconds, rounds and accepted, and
where it was sampled its number. Its rule names a row of the tables: a rule with the Llama draft, or
RULE/DRAFTER, as judge:0.9/eagle. Speed-up, won and lost are over the answers that both the rule and
the target have. With several samples accuracy is the mean over problems of each one's share of
right answers. Intervals and p-values are intervals.py's.
"""
import itertools
import math
import re
import warnings
from collections import Counter
from pathlib import Path

from common import replacing, visible
from evaluation.intervals import mcnemar, of_problems, pass_at, sign_flip

PLAIN = ("target", "draft")  # rules without rounds of drafts
COLORS = dict.fromkeys((*PLAIN, "standard"), "0.25") | {
    "topk": "#e07b39", "typical": "#7a5ba6", "kl": "#3a9188", "judge": "#c2274b",
    "relaxed": "#b8860b", "margin": "#5b7fd4", "fly": "#6b8e23", "thresholds": "#8c6d62"}
PALETTE = ("#2f6db5", "#8f8122", "#c45fa0", "#4f9d3a", "#7a5230", "#2aa5c9")  # for any other rule
SAMPLING = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p"}  # settings, in words
MARKERS = {"target": "s", "draft": "D", "standard": "^"}
OTHERS = {"eagle": "v", "eagle-tree": "P", "ngram": "X"}  # markers of drafters that are no Llama


def row_name(rule: str, drafter: str) -> str:
    """The row of a rule with a drafter; of the Llama draft it is the rule's, as it always was."""
    return rule if drafter == "llama" else f"{rule}/{drafter}"


def row_parts(row: str) -> tuple[str, str | None]:
    """(rule, drafter) of a row; None for the target alone and the draft alone."""
    rule, _, drafter = row.rpartition("/")
    if drafter not in OTHERS:
        rule, drafter = row, "llama"
    return rule, None if rule in PLAIN else drafter


def rule_parts(rule: str) -> tuple[str, str]:
    """(name, the rest) of a rule as it is written: relaxed and 10,0.6@think."""
    name = re.match("[^:@]*", rule)[0]
    return name, rule[len(name):].removeprefix(":")


def speed(rows) -> float | None:
    """tokens/s of decoding, without each answer's first token: the prefill is not timed."""
    seconds = sum(r["seconds"] for r in rows)
    return made(rows) / seconds if seconds else None


def made(rows) -> int:
    """Tokens that the rounds made: all but the first of each answer, or of each turn of it."""
    return sum(len(r["tokens"]) - len(r.get("turns") or [0]) for r in rows)


def accuracy(rows) -> dict:
    """The numbers of right answers; None where the task is not graded. With several samples of a
    problem also how many, and pass@k for 1, 2, 4, ... and the fewest that a problem has.
    """
    n, right = Counter(r["id"] for r in rows), Counter()
    found = {"n": len(rows), "right": None, "accuracy": None, "interval": None}
    if len(n) < len(rows):
        found |= {"problems": len(n), "samples": [min(n.values()), max(n.values())]}
    if not graded(rows):
        return found
    for r in rows:
        right[r["id"]] += r["right"]
    shares = [right[i] / n[i] for i in n]
    found |= {"right": right.total(), "accuracy": sum(shares) / len(shares),
              "interval": of_problems(shares, len(rows))}
    if "samples" in found:
        fewest = min(n.values())
        ks = sorted({fewest, *(2**i for i in range(fewest.bit_length()))})
        found["pass_at"] = {k: sum(pass_at(k, right[i], n[i]) for i in n) / len(n) for k in ks}
    return found


def graded(rows) -> bool:
    return any(r["right"] is not None for r in rows)


def compare(rows: dict, target: dict) -> dict | None:
    """The answers of a row beside the target's of the same problem and number: problems with more
    of them right (won), with fewer (lost), and the p-value of no difference.
    """
    both = [key for key in rows if key in target]
    if not both or not graded(rows.values()):
        return None
    more = Counter()
    for key in both:
        more[rows[key]["id"]] += rows[key]["right"] - target[key]["right"]
    won, lost = sum(d > 0 for d in more.values()), sum(d < 0 for d in more.values())
    p = mcnemar(won, lost) if len(more) == len(both) else sign_flip(list(more.values()))
    return {"n": len(more), "won": won, "lost": lost, "p": p}


def measure(row: str, rows: dict, target: dict) -> dict:
    """The numbers of a row from its answers {(id, sample): answer} and the target's."""
    every, both = list(rows.values()), [key for key in rows if key in target]
    rounds = sum(r["rounds"] for r in every)
    fast, base = speed([rows[key] for key in both]), speed([target[key] for key in both])
    rule, drafter = row_parts(row)
    drafts = drafter is not None and rounds > 0
    return {
        "rule": rule, "drafter": drafter, **accuracy(every),
        "tokens_per_sec": speed(every),
        "speed_up": fast / base if fast and base else None,
        "mean_accepted": sum(r["accepted"] for r in every) / rounds if drafts else None,
        "tokens_per_round": made(every) / rounds if drafts else None,
        "against_target": None if rule == "target" else compare(rows, target),
        "how": {how: {"n": count, "right": sum(bool(r["right"]) for r in every if r["how"] == how)}
                for how, count in Counter(r["how"] for r in every).items()},
    }


def summarise(answers: dict, settings: dict, note: str | None = None, left_out=()) -> dict:
    """results.json, from answers {(rule, id, sample): answer}.

    The numbers of every rule with every drafter, in all and by domain, and whether standard gave
    the target's tokens, as it must at temperature 0. note: the task's; left_out: ids of problems.
    """
    by = {rule: {key: a for (r, *key), a in answers.items() if r == rule for key in [tuple(key)]}
          for rule in settings["rules"]}
    by = {rule: rows for rule, rows in by.items() if rows}
    inside = lambda rows, domain: {i: a for i, a in rows.items() if a["domain"] == domain}
    target = by.get("target", {})
    domains = {}
    for d in dict.fromkeys(a["domain"] for a in answers.values()):
        parts = {rule: part for rule, rows in by.items() if (part := inside(rows, d))}
        domains[d] = {rule: measure(rule, part, inside(target, d)) for rule, part in parts.items()}
    standard = [row for row in by if row_parts(row)[0] == "standard" and not sampled(settings)]
    both = [(row, key) for row in standard for key in by[row] if key in target]
    different = [key[0] if row == "standard" else f"{key[0]} ({row_parts(row)[1]})"
                 for row, key in both if by[row][key]["tokens"] != target[key]["tokens"]]
    told = {"note": note, "left_out": list(left_out)} if note or left_out else {}
    return {
        "settings": settings, **told,
        "rules": {rule: measure(rule, rows, target) for rule, rows in by.items()},
        "domains": domains,
        "standard_equals_target": {"same": len(both) - len(different), "of": len(both),
                                   "different": different} if both else None,
    }


# ---------------------------------------------------------------- tables

def table(rows: list[list[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well on a terminal too."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    pad = lambda i, cell: cell.rjust(widths[i]) if i else cell.ljust(widths[i])
    lines = [f"| {' | '.join(pad(i, cell) for i, cell in enumerate(row))} |" for row in rows]
    rule = "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def shown(value, form) -> str:
    return "–" if value is None else form.format(value)


def sampled(settings: dict) -> bool:
    return bool(settings.get("temperature"))


def main_table(rules: dict) -> str:
    """A line for each row of results.json; of which drafter, where not all are the Llama draft."""
    several = any(m["drafter"] not in (None, "llama") for m in rules.values())
    first = lambda rule, drafter: [rule, shown(drafter, "{}")] if several else [rule]
    rows = [[*first("rule", "drafter"), "right", "accuracy", "95% interval", "tokens/s", "speed-up",
             "accepted per round", "tokens per round"]]
    for m in rules.values():
        rows.append([*first(m["rule"], m["drafter"]),
                     shown(m["right"], f"{{}}/{m['n']}"), shown(m["accuracy"], "{:.1%}"),
                     shown(m["interval"], "{0[0]:.1%} to {0[1]:.1%}"),
                     shown(m["tokens_per_sec"], "{:.0f}"),
                     shown(m["speed_up"], "{:.2f}x"), shown(m["mean_accepted"], "{:.2f}"),
                     shown(m["tokens_per_round"], "{:.2f}")])
    return table(rows)


def verdict(r: dict) -> str | None:
    """The sentence on whether the standard rule gave the target's tokens.

    At temperature 0 it must, but for rounding.
    """
    if sampled(r["settings"]) and any(m["rule"] == "standard" for m in r["rules"].values()):
        return ("Sampled: standard has the target's distribution, not its tokens, so their texts "
                "are not compared.")
    if not (s := r["standard_equals_target"]):
        return None
    drafters = [m["drafter"] for m in r["rules"].values() if m["rule"] == "standard"]
    what = "problems" if drafters == ["llama"] else f"answers with {', '.join(drafters)}"
    line = (f"standard equals the target token for token on {s['same']} of {s['of']} {what} "
            f"({r['settings']['dtype']})")
    if not s["different"]:
        return line
    more = ", ..." if len(s["different"]) > 5 else ""
    return f"{line}; it differs on {', '.join(s['different'][:5])}{more}"


def models(s: dict) -> str:
    """The target and what drafts for it, by the names of their directories."""
    drafts = " and ".join(filter(None, (s.get("draft_name"), s.get("eagle_name"))))
    return " with ".join(filter(None, (s["target_name"], drafts)))


def setup(r: dict) -> str:
    """How the answers were made, in a line."""
    s = r["settings"]
    several = [m["samples"] for m in r["rules"].values() if "samples" in m]
    low, high = min(map(min, several), default=1), max(map(max, several), default=1)
    drawn = ", ".join([*(f"{name} {s[key]}" for key, name in SAMPLING.items() if s.get(key)),
                       f"seed {s.get('seed', 0)}", "samples of a problem: " + (
                           f"{low}" if low == high else f"{low} to {high}")])
    return ", ".join(filter(None, [
        f"{s['task']}: {models(s)}", f"K = {s['speculate_k']}",
        s.get("tree") and f"tree {s['tree']}",
        drawn if sampled(s) else "greedy",
        s.get("max_new_tokens") and f"at most {s['max_new_tokens']} new tokens", s["dtype"],
        "compiled" if s["compile"] else "eager", s["chat"] and "chat template", s["device"],
        f"{s['ranks']} ranks" if s.get("ranks") else f"processes: {s['processes']}"]))


def pass_table(rules: dict) -> str | None:
    """pass@k of each row that has several samples of every problem."""
    several = {row: m["pass_at"] for row, m in rules.items() if len(m.get("pass_at", ())) > 1}
    if not several:
        return None
    ks = sorted(set().union(*several.values()))
    rows = [["rule", *(f"pass@{k}" for k in ks)], *(
        [row, *(shown(found.get(k), "{:.1%}") for k in ks)] for row, found in several.items())]
    return f"At least one of k answers is right (the unbiased estimate):\n\n{table(rows)}"


def markdown(r: dict) -> str:
    """results.md, and what is printed."""
    rules = r["rules"]
    parts = [setup(r), main_table(rules), r.get("note")]
    if len({m["n"] for m in rules.values()}) > 1:
        parts.append("Not every rule has answered every problem: speed-up and the comparison are "
                     "over those that rule and target share.")
    parts.append(pass_table(rules))
    if len(r["domains"]) > 1:
        parts += [f"{domain}:\n\n{main_table(part)}" for domain, part in r["domains"].items()]
    if paired := {rule: m["against_target"] for rule, m in rules.items() if m["against_target"]}:
        several = any("samples" in m for m in rules.values())
        parts.append("Against the target, problem by problem: " + (
            "more samples right than it has (won), fewer (lost), p-value of the exact sign-flip "
            "permutation test." if several else "right where it is wrong (won), wrong where it is "
            "right (lost), McNemar's exact p-value."))
        parts.append(table([["rule", "won", "lost", "p"], *(
            [rule, str(m["won"]), str(m["lost"]), f"{m['p']:.3g}"] for rule, m in paired.items())]))
    hows = sorted({how for m in rules.values() for how in m["how"]})
    if len(hows) > 1:
        parts.append("How the answers were scored, and how many of these were right:")
        cell = lambda h: f"{h['n']} ({h['right']})" if h else "0"
        parts.append(table([["rule", *hows], *(
            [rule, *(cell(m["how"].get(how)) for how in hows)] for rule, m in rules.items())]))
    return "\n\n".join(filter(None, [*parts, verdict(r)])) + "\n"


# ---------------------------------------------------------------- picture

def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front, from slow to fast: the points that no other beats in both numbers, or in
    one with the other equal.
    """
    best, kept = -math.inf, []
    for x, y in sorted(points, reverse=True):
        if y > best:
            best, kept = y, [(x, y), *kept]
    return kept


def colors(names) -> dict[str, str]:
    """A colour for each rule name: COLORS', and the palette's in turn for rules added later."""
    palette = itertools.cycle(PALETTE)
    return {name: COLORS.get(name) or next(palette) for name in dict.fromkeys(names)}


def plot(r: dict, path: Path) -> str | None:
    """Draw accuracy against speed-up, a curve for each rule and drafter over the rule's parameter,
    the Pareto front behind; returns a sentence instead if that cannot be drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return (f"no {path.name}: it needs matplotlib; pip install matplotlib, then --rescore "
                "draws it")
    points = {rule: m for rule, m in r["rules"].items()
              if m["speed_up"] and m["accuracy"] is not None}
    if not points:
        return f"no {path.name}: " + (
            "speed-up needs the rule target" if graded(r["rules"].values())
            else f"{r['settings']['task']} is not graded here")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, ax = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    xs, ys = zip(*front([(m["speed_up"], m["accuracy"]) for m in points.values()]))
    ax.plot(xs, ys, "o-", color="0.86", lw=7, ms=17, zorder=1, label="Pareto front")
    name = lambda m: rule_parts(m["rule"])[0]
    color = colors(map(name, points.values()))
    for family, drafter in dict.fromkeys((name(m), m["drafter"]) for m in points.values()):
        curve = sorted((m["speed_up"], m["accuracy"], *m["interval"], m["rule"])
                       for m in points.values() if (name(m), m["drafter"]) == (family, drafter))
        x, y, low, high, rules = zip(*curve)  # by speed-up: faster is looser
        bars = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        ax.errorbar(x, y, bars, fmt=f"{OTHERS.get(drafter) or MARKERS.get(family, 'o')}-", ms=6,
                    color=color[family], lw=1.8, elinewidth=0.8, zorder=2,
                    label=row_name(family, drafter or "llama"))
        for at, rule in zip(zip(x, y), rules):
            parameter = rule_parts(rule)[1] or ("default" if len(curve) > 1 else "")
            ax.annotate(parameter, at, xytext=(6, 5), textcoords="offset points", fontsize=8.5,
                        color=color[family])
    ax.set_xlabel("speed-up over the target alone")
    ax.set_ylabel("accuracy, with 95% intervals")
    s = r["settings"]
    ax.set_title(f"{s['task']}: {visible(models(s))}\nK = {s['speculate_k']}, {s['dtype']}, "
                 f"{s['device']}",
                 fontsize=10.5, parse_math=False)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.93")
    figure.legend(frameon=False, fontsize=9, markerscale=0.8, loc="outside right center")
    save_picture(figure, path)
    plt.close(figure)
    return None


def save_picture(figure, path: Path):
    """Write a PNG; a character of a name that no font has becomes a box, without a warning."""
    with replacing(path) as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(tmp, dpi=150, format="png")
