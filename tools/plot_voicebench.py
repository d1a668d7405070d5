"""
Draw a report of eval_voicebench.py: text against speech; teacher and cascade are lines to reach.

  python tools/plot_voicebench.py out/voicebench/report.json out/voicebench/report.png
"""
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


COLOURS = {"teacher text": "#222222", "cascade speech": "#999999", "student text": "#3b6fb6",
           "student speech": "#e07b27"}


def draw(report, path):
    """Scores of subsets and means as 0-100, where there are any."""
    shown = {}
    for name, entry in {**report["subsets"], **report["means"]}.items():
        if entry.keys() & COLOURS.keys():
            shown[name] = entry
    figure, axis = plt.subplots(figsize=(2 + 0.9 * len(shown), 4), constrained_layout=True)
    for system, colour in COLOURS.items():
        at, height = [], []
        for x, entry in enumerate(shown.values()):
            if system in entry:
                at.append(x)
                height.append(100 / entry["scale"] * entry[system][0])
        if not at:
            continue  # not asked: no entry in the legend
        at = np.array(at)
        if system in ("teacher text", "cascade speech"):
            style = "solid" if system == "teacher text" else "dashed"
            axis.hlines(height, at - 0.45, at + 0.45, colour, style, label=system)
        else:
            side = 0.2 if system == "student speech" else -0.2
            axis.bar(at + side, height, 0.4, label=system, color=colour)
    axis.set_xticks(range(len(shown)), shown, rotation=30, ha="right")
    axis.set_ylabel("score, 0-100")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        draw(json.load(file), sys.argv[2])
