"""What benchmark.py shows of its result: tables as text, and tokens/s against the accepted length
as a picture. No model.
"""
from pathlib import Path

from cli import replacing

# accepted per round, Llama 3.1 8B / 405B (arXiv 2501.19309)
PAPER = {"standard": 6.3, "judge": 19.7}
SIMULATED = "simulated acceptance"


def grid(rows: list[list[str]]) -> str:
    """Right-aligned columns under a header, the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(w) if i else cell.ljust(w) for i,
                               (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def report(r: dict) -> str:
    """The result as text tables."""
    passes, simulated = r["passes"], r["simulated"]
    lines = [f"{r['device']}, torch {r['torch']}, {'compiled' if r['compile'] else 'eager'}; "
             f"medians of {r['repeats']} repeats"]
    lines += [f"{flag:6} {m['name']}: {m['parameters'] / 1e9:.3g}B parameters, "
              f"{m['bytes'] / 1e9:.3g} GB, {m['dtype']}, {m['weights']} weights"
              + (f", {m['quant']}" if m["quant"] else "") for flag,
              m in (("target", r["target"]), ("draft", r["draft"]))]
    lines += [f"read bandwidth of the device {r['bandwidth_gb_per_sec']:,.0f} GB/s", ""]
    table = [["pass", "ms", "of target's decode", "of bandwidth"]]
    one = passes["decode"]["target"]["ms"]
    for name, e in [(f"{flag}, decode a token", passes["decode"][flag])
                    for flag in ("target", "draft")] + [
            (f"target, verify {v['rows']} rows", v) for v in passes["verify"] if v["rows"] > 1]:
        table.append([name, f"{e['ms']:.3f}", f"{e['ms'] / one:.2f}",
                      f"{e['fraction_of_bandwidth']:.0%}"])
    table += [[f"draft, a token of K = {d['speculate_k']}", f"{d['ms_per_token']:.3f}",
               f"{d['ms_per_token'] / one:.2f}", ""] for d in passes["draft"]]
    j = passes["judge"]
    lines += [grid(table), f"judge, in a pass of {j['rows']} rows: {j['ms_cost']:+.3f} ms "
              f"(paired; {j['ms_with']:.3f} with, {j['ms_without']:.3f} without)", ""]
    ks = r["speculate_k"]
    lines.append(f"tokens/s (drafted tokens accepted per round), {SIMULATED}; * the best K; "
                 f"target alone {simulated['target_tokens_per_sec']:.1f}")
    table = [["rate", *(f"K = {k}" for k in ks), "best speed-up"]]
    for best in simulated["best"]:
        row = [p for p in simulated["points"] if p["rate"] == best["rate"]]
        table.append([f"{best['rate']:.3f}",
                      *(f"{'*' if p is best else ''}{p['tokens_per_sec']:.1f} "
                        f"({p['mean_accepted']:.1f})" for p in row),
                      f"{best['speed_up']:.2f}x"])
    lines.append(grid(table))
    if real := r["real"]:
        lines += ["", f"real acceptance, {real['prompts']} prompts, {real['max_new_tokens']} new "
                  "tokens at most each"]
        lines.append(grid([["variant", "tokens/s", "speed-up", "without prefill", "accepted per "
                            "round", "same text as target"]] + [
            [v["variant"], f"{v['tokens_per_sec']:.1f}", f"{v['speed_up']:.2f}x",
             f"{v['tokens_per_sec_of_rounds']:.1f}" if v["tokens_per_sec_of_rounds"] else "–",
             "–" if v["mean_accepted"] is None else f"{v['mean_accepted']:.2f}",
             f"{v['same_tokens_as_target']}/{real['prompts']}"] for v in real["variants"]]))
    return "\n".join(lines)


def plot(r: dict, path: Path):
    """tokens/s against the accepted length, a line for each K; dots of one rate are joined, its
    best K is ringed.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    simulated, ks = r["simulated"], r["speculate_k"]
    figure, ax = plt.subplots(figsize=(9.5, 5.2), layout="constrained")
    base = simulated["target_tokens_per_sec"]
    for best in simulated["best"]:
        row = [p for p in simulated["points"] if p["rate"] == best["rate"]]
        ax.plot([p["mean_accepted"] for p in row], [p["tokens_per_sec"] for p in row], color="0.75",
                lw=0.8, ls=(0, (3, 2)), zorder=1,
                label="same rate" if best is simulated["best"][-1] else None)
    for k, color in zip(ks,
                        plt.cm.viridis([0.85 * i / max(1, len(ks) - 1) for i in range(len(ks))])):
        row = sorted((p for p in simulated["points"] if p["speculate_k"] == k),
                     key=lambda p: p["mean_accepted"])
        ax.plot([p["mean_accepted"] for p in row], [p["tokens_per_sec"] for p in row], "o-",
                color=color, ms=5, lw=1.8, label=f"K = {k}", zorder=2)
    ax.plot([p["mean_accepted"] for p in simulated["best"]],
            [p["tokens_per_sec"] for p in simulated["best"]], "o", ms=11, mfc="none", mec="crimson",
            mew=1.4,
            label="best K at a rate", zorder=3)
    ax.axhline(base, color="0.35", lw=1, ls=":", label=f"target alone, {base:.1f}")
    ax.set_ylim(0, 1.12 * max(base, *(p["tokens_per_sec"] for p in simulated["points"])))
    ax.set_xlim(0, max(1.0, *(p["mean_accepted"] for p in simulated["points"])) * 1.04)
    for name, accepted in PAPER.items():
        if accepted < ax.get_xlim()[1]:
            ax.axvline(accepted, color="0.6", lw=1, zorder=0)
            ax.annotate(f"{accepted} {name}\n(paper)", (accepted, 0.985),
                        xycoords=ax.get_xaxis_transform(), xytext=(4, 0), textcoords="offset "
                        "points",
                        va="top", fontsize=8.5, color="0.35")
    ax.set_xlabel(f"drafted tokens accepted per round ({SIMULATED})")
    ax.set_ylabel("tokens/s")
    names = [f"{Path(m['name']).name}{' ' + m['quant'] if m['quant'] else ''}"
             for m in (r["draft"], r["target"])]
    dtypes = " and ".join(dict.fromkeys(r[flag]["dtype"] for flag in ("target", "draft")))
    ax.set_title(f"{names[0]} drafts for {names[1]}: {SIMULATED}\n{r['device']}, {dtypes}, "
                 f"{'compiled' if r['compile'] else 'eager'}", fontsize=10.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.92")
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], frameon=False, fontsize=9,
                  loc="outside right center")
    with replacing(path) as tmp:
        figure.savefig(tmp, dpi=150, format="png")
    plt.close(figure)
