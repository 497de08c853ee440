"""What benchmark.py shows of its result: tables as text, and a picture. No model."""
from pathlib import Path

from common import visible
from evaluation.report import save_picture

PAPER = {"standard": 6.3, "judge": 19.7}  # accepted per round, Llama 3.1 8B / 405B (2501.19309)
SIMULATED = "simulated acceptance"


def grid(rows: list[list[str]]) -> str:
    """Right-aligned columns under a header, the first one left-aligned."""
    first, *rest = (max(map(len, column)) for column in zip(*rows))
    return "\n".join("  ".join([row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest))])
                     .rstrip() for row in rows)


def pass_rows(passes: dict) -> list[list[str]]:
    one = passes["decode"]["target"]["ms"]
    entries = {f"{flag}, decode a token": e for flag, e in passes["decode"].items()}
    entries |= {f"target, verify {v['rows']} rows": v for v in passes["verify"] if v["rows"] > 1}
    rows = [["pass", "ms", "of target's decode", "of bandwidth"]]
    rows += [[name, f"{e['ms']:.3f}", f"{e['ms'] / one:.2f}", f"{e['fraction_of_bandwidth']:.0%}"]
             for name, e in entries.items()]
    return rows + [[f"draft, a token of K = {d['speculate_k']}", f"{d['ms_per_token']:.3f}",
                    f"{d['ms_per_token'] / one:.2f}", ""] for d in passes["draft"]]


def model_line(flag: str, m: dict, ranks: int) -> str:
    line = (f"{flag:6} {m['name']}: {m['parameters'] / 1e9:.3g}B parameters, "
            f"{m['bytes'] / 1e9:.3g} GB, {m['dtype']}, {m['weights']} weights"
            + (f", {m['quant']}" if m["quant"] else ""))
    if ranks == 1:
        return line
    how = "shared" if m["shared_by"] > 1 else "whole on each rank"
    return f"{line}, {how}: {m['bytes_a_rank'] / 1e9:.3g} GB a rank"


def collectives_lines(c: dict, ranks: int) -> list[str]:
    """An all-reduce and the logits' gather of a pass: milliseconds, and the share of them all."""
    return [f"all-reduce of [{p['rows']}, {c['dim']}] {c['dtype']} over {ranks} ranks, "
            f"{p['all_reduce']}: {p['all_reduce_ms']:.3f} ms; {c['all_reduces_a_pass']} a pass, "
            f"{p['share_of_pass']:.0%} of " + ("a decode" if p["rows"] == 1 else
                                               f"verifying {p['rows']} rows")
            + f" with the logits' gather, {p['gather_ms']:.3f} ms" for p in c["passes"]]


def device_name(r: dict) -> str:
    return f"{r['ranks']} x {r['device']}" if r["ranks"] > 1 else r["device"]


def simulated_rows(simulated: dict, ks: list[int]) -> list[list[str]]:
    rows = [["rate", *(f"K = {k}" for k in ks), "best speed-up"]]
    for best in simulated["best"]:
        points = [p for p in simulated["points"] if p["rate"] == best["rate"]]
        cells = [f"{'*' if p == best else ''}{p['tokens_per_sec']:.1f} ({p['mean_accepted']:.1f})"
                 for k in ks for p in points if p["speculate_k"] == k]
        rows.append([f"{best['rate']:.3f}", *cells, f"{best['speed_up']:.2f}x"])
    return rows


def real_rows(real: dict) -> list[list[str]]:
    over_hf = ["over hf target"] if real["variants"][0]["speed_up_over_hf"] else []
    rows = [["variant", "tokens/s", "speed-up", *over_hf, "without prefill", "first token, ms",
             "accepted per round", "same text as target"]]
    shown = lambda x, form: "–" if x is None else form.format(x)
    for v in real["variants"]:
        rows.append([v["variant"], f"{v['tokens_per_sec']:.1f}", f"{v['speed_up']:.2f}x",
                     *(f"{v['speed_up_over_hf']:.2f}x" for _ in over_hf),
                     shown(v["tokens_per_sec_of_rounds"], "{:.1f}"),
                     shown(v["first_token_ms"], "{:.1f}"), shown(v["mean_accepted"], "{:.2f}"),
                     f"{v['same_tokens_as_target']}/{real['prompts']}"])
    return rows


def first_token_rows(first: list[dict]) -> list[list[str]]:
    return [["time to first token, ms", "target alone", "with the draft"],
            *([f"prompt of {f['prompt_tokens']} tokens", f"{f['target_ms']:.1f}",
               f"{f['with_draft_ms']:.1f}"] for f in first)]


def report(r: dict) -> str:
    """The result as text tables."""
    simulated, j = r["simulated"], r["passes"]["judge"]
    lines = [f"{device_name(r)}, torch {r['torch']}, {'compiled' if r['compile'] else 'eager'}; "
             f"medians of {r['repeats']} repeats"]
    lines += [model_line(flag, r[flag], r["ranks"]) for flag in ("target", "draft")]
    where = "the device" if r["ranks"] == 1 else "all ranks together"
    lines += [f"read bandwidth of {where} {r['bandwidth_gb_per_sec']:,.0f} GB/s",
              f"attention: {r['attention']}",
              *(f"products of {flag}: " + "; ".join(f"{n} row{'s' * (n > 1)}: {how}"
                                                    for n, how in r["products"][flag].items())
                for flag in ("target", "draft") if r[flag]["quant"]), "",
              grid(pass_rows(r["passes"])),
              *(collectives_lines(r["collectives"], r["ranks"]) if r["collectives"] else ()),
              f"judge, in a pass of {j['rows']} rows: {j['ms_cost']:+.3f} ms (paired; "
              f"{j['ms_with']:.3f} with, {j['ms_without']:.3f} without)", "",
              grid(first_token_rows(r["first_token"])), "",
              f"tokens/s (drafted tokens accepted per round), {SIMULATED}; * the best K; target "
              f"alone {simulated['target_tokens_per_sec']:.1f}",
              grid(simulated_rows(simulated, r["speculate_k"]))]
    if real := r["real"]:
        lines += ["", f"real acceptance, {real['prompts']} prompts, {real['max_new_tokens']} new "
                  "tokens at most each", grid(real_rows(real))]
    return "\n".join(lines)


def plot(r: dict, path: Path):
    """Tokens/s against the accepted length, a line for each K; dots of one rate are joined."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    simulated, ks = r["simulated"], r["speculate_k"]
    points, best, base = simulated["points"], simulated["best"], simulated["target_tokens_per_sec"]
    figure, ax = plt.subplots(figsize=(9.5, 5.2), layout="constrained")

    def draw(ps, *form, **style):
        ax.plot([p["mean_accepted"] for p in ps], [p["tokens_per_sec"] for p in ps], *form, **style)

    for b in best:
        draw([p for p in points if p["rate"] == b["rate"]], color="0.75", lw=0.8, ls=(0, (3, 2)),
             zorder=1, label="same rate" if b is best[-1] else None)
    for i, k in enumerate(ks):
        draw(sorted((p for p in points if p["speculate_k"] == k), key=lambda p: p["mean_accepted"]),
             "o-", color=plt.cm.viridis(0.85 * i / max(1, len(ks) - 1)), ms=5, lw=1.8,
             label=f"K = {k}", zorder=2)
    draw(best, "o", ms=11, mfc="none", mec="crimson", mew=1.4, label="best K at a rate", zorder=3)
    ax.axhline(base, color="0.35", lw=1, ls=":", label=f"target alone, {base:.1f}")
    ax.set_ylim(0, 1.12 * max(base, *(p["tokens_per_sec"] for p in points)))
    ax.set_xlim(0, max(1.0, *(p["mean_accepted"] for p in points)) * 1.04)
    for name, accepted in PAPER.items():
        if accepted < ax.get_xlim()[1]:
            ax.axvline(accepted, color="0.6", lw=1, zorder=0)
            ax.annotate(f"{accepted} {name}\n(paper)", (accepted, 0.985), va="top", fontsize=8.5,
                        xycoords=ax.get_xaxis_transform(), xytext=(4, 0), color="0.35",
                        textcoords="offset points")
    ax.set_xlabel(f"drafted tokens accepted per round ({SIMULATED})")
    ax.set_ylabel("tokens/s")
    names = [visible(" ".join(filter(None, (Path(m["name"]).name, m["quant"]))))
             for m in (r["draft"], r["target"])]
    dtypes = " and ".join(dict.fromkeys(r[flag]["dtype"] for flag in ("target", "draft")))
    ax.set_title(f"{names[0]} drafts for {names[1]}: {SIMULATED}\n{device_name(r)}, {dtypes}, "
                 f"{'compiled' if r['compile'] else 'eager'}", fontsize=10.5, parse_math=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], frameon=False,
                  fontsize=9, loc="outside right center")
    save_picture(figure, path)
    plt.close(figure)
