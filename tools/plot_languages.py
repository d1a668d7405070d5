"""
Table and picture of what repair in English, and in four languages, does in each of them, from what tools/languages.sh measured.

  python tools/plot_languages.py --results results/beyond/languages

KL8: nats a token over the first 8 tokens of the teacher's answers (tools/compare.py). F = KL(teacher by text || student by text) and
M = KL(student by text || student by speech), over 64 tokens (tools/divergence.py).
Writes  RESULTS/table.md, RESULTS/languages.png. Intervals: 95%, bootstrap over questions; differences are paired.
"""
import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
import eval_voicebench as vb
import model as m
import plot_results as plots

LABELS = {"cascade": "cascade", "base": "base", "english": "repaired in English", "english-more": "in English, four times the questions",
          "all": "in four languages"}
COLOURS = {"cascade": "#555555", "base": "#e07b27", "english": "#dfe6ef", "english-more": "#b7c9e2", "all": "#3b6fb6"}
DISTILLED = ("english", "english-more", "all")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--results", default=str(TOOLS.parent / "results/beyond/languages"), help="folder that tools/languages.sh wrote")
    return p.parse_args(argv)


def read(path):
    if not path.exists():
        raise ValueError(f"{path}: no such file; `bash tools/languages.sh` makes it")
    return json.loads(path.read_text())


def kl8_of(folder):
    """{(run, way): {language: KL8 of each question}}; the untrained student by text is the teacher."""
    found = {}
    for run in DISTILLED:
        for language, of in read(folder / run / "report.json")["results"].items():
            for key, condition in {("cascade", "speech"): "cascade", ("base", "text"): "base by text", ("base", "speech"): "base by speech",
                                   (run, "text"): "distilled by text", (run, "speech"): "distilled by speech"}.items():
                found.setdefault(key, {})[language] = np.array(of[condition]["kl8_rows"])
    return found


def table(folder, found):
    """-> lines: KL8 by text and by speech, what three more languages gain, F and M."""
    languages, lines = list(found["base", "text"]), []
    heads = ["", *languages]
    for way in ("text", "speech"):
        for run in LABELS:
            if (run, way) in found:
                lines.append([f"KL8 by {way}, {LABELS[run]}", *(plots.cell(vb.interval(found[run, way][name])) for name in languages)])
        for less in ("base", "english", "english-more"):
            changes = [vb.interval(found["all", way][name] - found[less, way][name]) for name in languages]
            lines.append([f"by {way}, four languages less {LABELS[less]}", *(plots.signed(change) for change in changes)])
    for measure in "FM":
        for run in ("base", *DISTILLED):
            cells = [f"{measure}, {LABELS[run]}"]
            for name in languages:
                [subset] = read(folder / run / f"divergence-{name}.json")["subsets"].values()
                cells.append(plots.cell(subset[measure]))
            lines.append(cells)
    return plots.to_lines(heads, lines)


def draw(found, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, constrained_layout=True)
    for axis, way in zip(axes, ("text", "speech")):
        runs = [run for run in LABELS if (run, way) in found]
        for k, run in enumerate(runs):
            means, errors = [], []
            for values in found[run, way].values():
                mean, low, high = vb.interval(values)
                means.append(mean)
                errors.append((mean - low, high - mean))
            at = np.arange(len(means)) + (k - (len(runs) - 1) / 2) * 0.17
            axis.bar(at, means, 0.16, yerr=np.array(errors).T, color=COLOURS[run], label=LABELS[run], error_kw={"lw": 0.8})
        axis.set_xticks(range(len(means)), found[runs[0], way])
        axis.set_title(f"KL8 to the teacher by {way} (nats a token, lower is better)", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main(args):
    folder = Path(args.results)
    found = kl8_of(folder)
    text = "\n".join(table(folder, found)) + "\n"
    m.write_atomically(folder / "table.md", text)
    draw(found, folder / "languages.png")
    print(text + f"{folder}/table.md, languages.png")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, OSError) as error:
        print("plot_languages.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
