"""
Table and picture of what goes beyond the paper, from what tools/beyond.sh measured.

  python tools/plot_beyond.py --results results/beyond

Writes  RESULTS/table.md, RESULTS/noise.png: what is still answered right as the noise rises. Intervals: 95%, bootstrap over questions;
        differences to `more`, which went on by as many steps with the same rows, are paired; of own answers also to `kl`, `reverse`, `again-old`.
"""
import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
import eval_voicebench as vb
import model as m
import plot_results as plots

RUNS = {"start": "cascade", "more": "the same rows again", "kl": "their divergence alone", "reverse": "their reverse KL alone", "own": "half own answers, scored by the teacher",
        "own-kl": "the same, divergence alone", "own-reverse": "the same, reverse KL alone", "own-jsd": "the same, JSD alone",
        "again": "a second round of own answers", "again-old": "the same, by the first round's answers",
        "early": "first 8 tokens weigh more", "augment": "half in rooms, noise, over telephones", "captions": "half with captions of their sound"}
SHOWN = ("text", "heard", "unheard", "20 dB", "10 dB", "5 dB", "0 dB")
PLACES = [*(("retention", way) for way in SHOWN), *plots.KL_PLACES]  # measure, way
HEADS = ["", "", *(f"retention, {way}" for way in SHOWN), *(f"KL8, {', '.join(place)}" for place in plots.KL_PLACES)]
COLOURS = {"start": "#555555", "more": "#3b6fb6", "kl": "#7d3c98", "reverse": "#c0392b", "own": "#5fa55a", "own-kl": "#1f6e43", "own-reverse": "#8fbf4d", "own-jsd": "#c9d94d", "again": "#2e7d32", "again-old": "#a5d6a7", "early": "#b7c9e2", "augment": "#e07b27", "captions": "#b08fc7"}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--results", default=str(TOOLS.parent / "results/beyond"), help="folder that tools/beyond.sh wrote")
    return p.parse_args(argv)


def read(folder, suffix=""):
    """{run: its record} of those that are measured; suffix: of another seed, e.g. -seed1."""
    found = {}
    for run in RUNS:
        path = Path(folder, run + suffix * (run != "start"), "measured.json")
        if path.exists():
            [found[run]] = m.json_lines(path, lambda row, _: row)
    if "more" not in found:
        raise ValueError(f"{folder}/more{suffix}/measured.json: no such file; `bash tools/beyond.sh more` measures what the others are compared with")
    return found


def rows_of(found, run, measure, way):
    """{question: number}; none of the untrained student by text, which is the teacher."""
    return {} if (run, way) == ("start", "text") else plots.rows_of(found[run], measure, way)


def gains(found, runs, control):
    """-> lines: what runs have gained over one that went on by as many steps, question by question."""
    lines = []
    for run in runs:
        cells = [run, RUNS[run]]
        for place in PLACES:
            change = plots.change(rows_of(found, run, *place), rows_of(found, control, *place))
            cells.append(plots.signed(change) if place[0] == "retention" else plots.cell(change, "{:+.3f} [{:+.3f}, {:+.3f}]"))
        lines.append(cells)
    return ["", f"Less `{control}`:", "", *plots.to_lines(HEADS, lines)]


def table(found):
    """-> lines: what each run retains, then what it has gained over `more`, and own answers over the teacher's by the same loss."""
    lines = []
    for run in found:
        cells = [run, RUNS[run]]
        for place in PLACES:
            values = list(rows_of(found, run, *place).values())
            mean = vb.interval(values) if values else None
            cells.append(plots.cell(mean) if place[0] == "retention" else plots.cell(mean, "{:.3f}"))
        lines.append(cells)
    lines = [*plots.to_lines(HEADS, lines), *gains(found, [run for run in found if run != "more"], "more")]
    for control in ("kl", "reverse"):
        own = [run for run in found if run in ("own-kl", "own-reverse", "own-jsd")]
        lines += gains(found, own, control) if own and control in found else []
    lines += gains(found, ["again"], "again-old") if {"again", "again-old"} <= set(found) else []
    return lines


def draw(found, path):
    """Retention by the strength of the noise, the clean clips on the left."""
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    ways = ["heard", *(way for way in SHOWN if way.endswith("dB"))]
    for run, record in found.items():
        means, lows, highs = [], [], []
        for way in ways:
            mean, low, high, *_ = vb.interval(list(plots.rows_of(record, "retention", way).values()))
            means.append(mean)
            lows.append(low)
            highs.append(high)
        axis.plot(ways, means, "o-", color=COLOURS[run], label=RUNS[run])
        if run in ("start", "more", "augment"):
            axis.fill_between(ways, lows, highs, color=COLOURS[run], alpha=0.12, lw=0)
    axis.set_title("what the teacher answers right by text, still right by speech, as noise rises", fontsize=10)
    axis.set_ylim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(args):
    found = read(args.results)
    text = "\n".join(table(found)) + "\n"
    for more in sorted(Path(args.results).glob("more-seed*")):
        suffix = more.name.removeprefix("more")
        text += f"\nBegun with R6{suffix}:\n\n" + "\n".join(table(read(args.results, suffix))) + "\n"
    captions = Path(args.results, "captions.md")
    if captions.exists():
        text += "\n" + captions.read_text()
    m.write_atomically(Path(args.results, "table.md"), text)
    draw(found, Path(args.results, "noise.png"))
    print(f"{args.results}/table.md, noise.png: {', '.join(found)}")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, OSError) as error:
        print("plot_beyond.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
