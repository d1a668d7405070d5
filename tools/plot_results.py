"""
The result's tables and pictures, from what tools/measure_result.py wrote about each run.

  python tools/plot_results.py --results out/result/results
  python tools/plot_results.py                                # of what this repository shows

Reads   RESULTS/RUN/measured.json, or RESULTS/RUN/failed.txt; a run that has neither is "not run"
Writes  RESULTS/table.md, whose first table is the README's, RESULTS/retention.png, RESULTS/repair.png; RESULTS/curves.png of
        runs of other lengths, other lambdas, fewer prompts
Pictures and the first table show the first seed. Intervals: 95%, bootstrap over questions (sounds: over prompts); differences and
repairs are paired, question by question, differences are means of all seeds that both runs have. No repair is shown where the interval
of base's loss holds zero.
"""
import argparse
import re
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
from run_results import LAMBDAS, PROMPTS, STEPS

RUNS = {  # run: how it is trained
    "base": "S2T, reference and transcripts, CE", "R1": "S2T, reference, CE", "R2": "S2T, reference, CE + KL", "R3": "S2T, response, CE",
    "R4": "S2T, response, CE + KL", "R5": "T2T alone, response, CE + KL", "R6": "S2T + T2T, response, CE + KL",
    "R7": "R6 without sounds", "R8": "R6 with KL alone (tau 1), LoRA", "R9": "R6 by LoRA", "R10": "R6 with KL alone (tau 1)"}
CURVE_RUNS = {  # R6 with one thing changed; a table has those that are there
    **{run: f"R6, {steps} steps" for run, steps in STEPS.items()},
    **{run: f"R6, KL {share:g}, CE {1 - share:g}" for run, share in LAMBDAS.items()},
    **{run: f"R8, {count} prompts" for run, count in PROMPTS.items()}}
CURVES = {  # axis of the picture: {run: place on it}
    "steps": STEPS | {"R6": 100}, "lambda: KL by it, CE by 1 - lambda": LAMBDAS | {"R6": 0.5}, "prompts": PROMPTS | {"R8": np.inf}}
PAIRS = [("R1", "R2"), ("R2", "R3"), ("R3", "R4"), ("R4", "R6"), ("R3", "R6"), ("R1", "R6"), ("R5", "R6"), ("R7", "R6"), ("R6", "R8"), ("R6", "R9"),
         ("R6", "R10"), ("base", "R1"), ("base", "R6"), ("base", "R8"), ("lambda0", "R6"), ("R6", "lambda100"), ("lambda100", "R8"), ("R6", "steps200"),
         ("prompts500", "R8")]  # the paper's order, then the rest
SPOKEN = ("heard", "unheard", "10 dB")
SHARES = ("retention", "all")  # measures of which more is better; of KL8 less
WAYS = ("text", *SPOKEN)
PAIRED = [*(("retention", way) for way in WAYS), ("human", "text"), ("human", "speech")]  # measure, way
PAIRED_HEADS = [*WAYS, "KL8, human, text", "KL8, human, speech"]
COLOURS = {"text": "#222222", "heard": "#3b6fb6", "unheard": "#8fb0d9", "10 dB": "#e07b27"}


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--results", default=str(TOOLS.parent / "results/result"), help="folder that tools/run_results.py wrote")
    p.add_argument("--beside", help="another such folder: its runs, over all seeds, from those of the same name here")
    return p.parse_args(argv)


# ---- what there is ----

def read_results(folder):
    """{run: its record, or why there is none}; of other seeds too, as RUN-seedN."""
    names = ["start", *RUNS, *(run for run in CURVE_RUNS if Path(folder, run).is_dir())]
    for path in sorted(Path(folder).glob("*-seed*")):
        names += [path.name] if re.fullmatch(rf"({'|'.join(RUNS)})-seed\d+", path.name) else []
    found = {}
    for name in names:
        measured, failed = Path(folder, name, "measured.json"), Path(folder, name, "failed.txt")
        found[name] = "not run"
        if failed.exists():
            found[name] = "failed: " + failed.read_text().strip()
        elif measured.exists():
            [found[name]] = m.json_lines(measured, lambda row, _: row)
            answers = m.json_lines(measured.with_name("answers.jsonl"), lambda row, _: row)
            found[name]["words"] = [len(row["text"].split()) for row in answers]
    for option in ("split", "limit", "seed", "device", "teacher", "start"):
        values = {str(of["options"][option]) for of in found.values() if isinstance(of, dict)}
        if len(values) > 1:
            raise ValueError(f"{folder}: runs are measured with {option} {' and '.join(sorted(values))}; expected one for all")
    return found


def label_of(name):
    return name.replace("-seed", ", seed ")


def base_of(name):
    """What a run began with: base of its own seed."""
    return "-".join(["base", *name.split("-")[1:]])


def rows_of(record, measure, way):
    """{question: number} of one student: measure is retention, all or a set of KL8, way is text or how it is spoken."""
    if measure in SHARES:
        return record["right"][measure].get(way, {})
    of = record["divergences"].get(measure, {})
    return dict(zip(of["ids"], of[way]["kl8"])) if way in of else {}


def paired(*rows):
    """Some {question: number} -> (N, K) of the questions that all have."""
    shared = [own for own in rows[0] if all(own in others for others in rows)]
    columns = []
    for of in rows:
        columns.append([of[own] for own in shared])
    return np.array(columns, float).T


def change(after, before):
    """Paired mean of after - before -> (value, low, high), or None."""
    both = paired(after, before)
    return vb.interval(both[:, 0] - both[:, 1]) if len(both) else None


def repaired(run, base, bound):
    """Share of base's loss against the bound that a run has made good -> (value, low, high); None if base's loss may be zero."""
    three = paired(run, base, bound)
    if not len(three):
        return None
    made_good, lost = three[:, 1] - three[:, 0], three[:, 1] - three[:, 2]  # of one sign, whichever way is better
    _, low, high = vb.interval(lost)
    if low <= 0 <= high:
        return None
    return vb.spread(vb.bootstrap(np.stack([made_good, lost], -1)[:, None]))      # (N, 1, 2)


# ---- tables ----

def cell(found, form="{:.2f} [{:.2f}, {:.2f}]"):
    return form.format(*found[:3]) if found else ""


def signed(found):
    return cell(found, "{:+.2f} [{:+.2f}, {:+.2f}]")


def percent(found):
    return cell([100 * value for value in found] if found else None, "{:.0f}% [{:.0f}, {:.0f}]")


def to_lines(heads, rows):
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cells in rows:
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def sounds_right(record):
    """All sounds of synthetic voices together -> [value, low, high], or None."""
    every = []
    for name, kinds in record["sounds"].items():
        for answers in kinds.values():
            every += answers if name != "recordings" else []
    return vb.interval(every) if every else None


def sounds_change(after, before):
    """Paired mean of two students' difference over all sounds -> (value, low, high), or None. Two rows in turn of a kind are the two
    clips of a prompt: they are drawn together."""
    pairs = []
    for name, kinds in before["sounds"].items():
        for kind, early in kinds.items() if name != "recordings" else []:
            gained = np.array(after["sounds"][name][kind], float) - early
            for first in range(0, len(gained), 2):
                some = gained[first:first + 2]
                pairs.append([(some.sum(), len(some))])
    return vb.spread(vb.bootstrap(pairs)) if pairs else None


MAIN = {  # heading of a column: what measure_result.py calls it
    "of all right by text": "candidates, text", "retention by text": "retention, text",
    **{f"by speech, {way}": f"retention, {way}" for way in SPOKEN}, "gap": "gap, text - heard"}
ANSWERS = {"of all right by text, less the teacher's": "candidates, text - teacher", "of a draw right by text": "all, text", "by speech": "all, heard",
           "KL8 by text": "KL8, human, text", "KL8 by speech": "KL8, human, speech"}
# overall score of VoiceBench by speech, Qwen2.5-Omni-7B (arXiv 2509.14930); its base is the published model
PAPER = {"base": "75.08", "R1": "71.25", "R2": "74.40", "R3": "75.66", "R4": "75.76", "R6": "77.19"}


def students(results, columns):
    """[(name, record, cells)] of all that is measured; teacher and cascade are the untrained student's two sides."""
    rows = []
    for name, record in results.items():
        if isinstance(record, str):
            continue
        cells = []
        for heading, what in columns.items():
            show = signed if " - " in what else cell
            cells.append(show(record["summary"].get(what)))
        if name == "start":
            by_text = [", text" in what and heading != "gap" for heading, what in columns.items()]
            for shown, wanted in (("teacher", True), ("cascade", False)):
                rows.append((shown, record, [value if side == wanted else "" for value, side in zip(cells, by_text)]))
        else:
            rows.append((name, record, cells))
    return rows


def main_table(results, trained):
    """The README's, of the runs in `trained`: the first seed of each."""
    rows = []
    for name, record, cells in students(results, MAIN):
        if "-seed" in name or name in (RUNS | CURVE_RUNS) and name not in trained:
            continue
        told = cell(sounds_right(record)) if name in trained else ""
        paper = f"*{PAPER[name]}*" if name in PAPER else ""
        rows.append([name, trained.get(name, ""), *cells, told, paper])
    return to_lines(["", "trained by", *MAIN, "sounds", "*the paper's, 7 B*"], rows)


def seeds_table(results):
    """What the order of rows alone changes: each seed begins with a base of its own."""
    rows = []
    for run in RUNS:
        seeds = seeds_of(results, run)
        if len(seeds) < 2:
            continue
        names, cells = [run + seed for seed in seeds], [shown_seeds(seeds)]
        for way in WAYS:
            values = [results[name]["summary"][f"retention, {way}"][0] for name in names]
            cells.append(", ".join(f"{value:.2f}" for value in values))
        for way in ("text", "heard"):
            repairs = []
            for name in names if run != "base" else []:
                repairs.append(f"{100 * repairs_of(results, name)[f'retention, {way}'][0]:.0f}%")
            cells.append(", ".join(repairs))
        rows.append([run, *cells])
    return to_lines(["retention", "seeds", *WAYS, "repaired by text", "heard"], rows)


def answers_table(results):
    """What else tells how a run answers."""
    rows = []
    for name, record, cells in students(results, ANSWERS):
        words = "" if name == "cascade" else f"{np.mean(record['words']):.0f}"
        rows.append([label_of(name), *cells, words])
    return to_lines(["", *ANSWERS, "words an answer"], rows)


def there(results, *names):
    return all(isinstance(results.get(name), dict) for name in names)


def seeds_of(results, run):
    """What stands behind its name for each seed that is measured: "", "-seed1", ..."""
    return [name.removeprefix(run) for name in results if re.fullmatch(rf"{run}(-seed\d+)?", name) and there(results, name)]


def shown_seeds(seeds):
    return ", ".join(seed.removeprefix("-seed") or "0" for seed in seeds)


def mean_of_seeds(results, run, seeds, measure, way):
    """{question: mean of what some seeds of a run have}."""
    found = [rows_of(results[run + seed], measure, way) for seed in seeds]
    return {own: np.mean([of[own] for of in found]) for own in found[0]}


def pairs_table(results):
    """Which of two runs retains more, and answers more like the teacher, over all seeds that both have."""
    rows = []
    for before, after in PAIRS:
        seeds = [seed for seed in seeds_of(results, after) if there(results, before + seed)]
        cells = []
        for place in PAIRED if seeds else []:
            late, early = (mean_of_seeds(results, run, seeds, *place) for run in (after, before))
            cells.append(signed(change(late, early)))
        rows.append([f"{after} - {before}", shown_seeds(seeds) or "not run", *(cells or [""] * len(PAIRED))])
    return to_lines(["retention, paired", "seeds", *PAIRED_HEADS], rows)


def beside_table(results, others, folder):
    """What was trained by other rows or another computer, less the same run there."""
    rows = []
    for run in results:
        seeds = seeds_of(others, run)
        if there(results, run) and seeds:
            cells = []
            for place in PAIRED:
                cells.append(signed(change(rows_of(results[run], *place), mean_of_seeds(others, run, seeds, *place))))
            rows.append([f"{run} - {folder}", shown_seeds(seeds), *cells])
    return to_lines(["retention, paired", "seeds there", *PAIRED_HEADS], rows)


KL_PLACES = [("heard", "text"), ("heard", "speech"), ("unheard", "speech"), ("10 dB", "speech"), ("human", "text"), ("human", "speech")]


def bounds(results, measure, way):
    """What nothing by this way can be better than: the teacher, or the cascade. KL8 of the teacher is 0."""
    found = rows_of(results["start"], measure, way)
    return dict.fromkeys(found, 0.0) if measure not in SHARES and way == "text" else found


def places():
    """(heading, measure, way) of all that is broken and repaired."""
    found = [(f"retention, {way}", "retention", way) for way in WAYS]
    found += [("of all right, text", "all", "text"), ("of all right, heard", "all", "heard")]
    return found + [(f"KL8, {name}, {way}", name, way) for name, way in [*KL_PLACES, ("0 dB", "speech")]]


def damage_table(results):
    """What is lost: by text against the teacher (forgetting), by speech against the cascade (damage)."""
    rows = []
    for name, record in results.items():
        if name == "start" or not there(results, "start", name):
            continue
        cells = []
        for _, measure, way in places():
            of, bound = rows_of(record, measure, way), bounds(results, measure, way)
            cells.append(signed(change(bound, of) if measure in SHARES else change(of, bound)))
        before = results.get(base_of(name))
        told = sounds_change(record, before) if isinstance(before, dict) and name != base_of(name) else None
        rows.append([label_of(name), *cells, signed(told)])
    return to_lines(["lost", *(heading for heading, *_ in places()), "sounds, less base's"], rows)


def repairs_of(results, name):
    """{heading: (value, low, high) or None} of one run."""
    base, found = base_of(name), {}
    for heading, measure, way in places():
        run, before = (rows_of(results[each], measure, way) for each in (name, base))
        found[heading] = repaired(run, before, bounds(results, measure, way))
    return found


def repair_table(results):
    rows = []
    for name in results:
        if name != "start" and name != base_of(name) and there(results, "start", base_of(name), name):
            rows.append([label_of(name), *(percent(found) for found in repairs_of(results, name).values())])
    return to_lines(["repaired", *(heading for heading, *_ in places())], rows)


def more_table(results):
    """Everything else that is measured of a student by itself, one line for each number."""
    shown = [name for name, record in results.items() if isinstance(record, dict)]
    wanted = []
    for name in shown:
        wanted += [what for what in results[name]["summary"] if what not in wanted and what != "sounds, recordings"]  # one is a man's
    rows = []
    for what in sorted(wanted):
        counts = {results[name]["summary"][what][3] for name in shown if what in results[name]["summary"]}
        cells = [cell(results[name]["summary"].get(what)) for name in shown]
        rows.append([what, ", ".join(map(str, sorted(counts))), *cells])
    return to_lines(["measured", "n", *map(label_of, shown)], rows)


def hearing_table(results):
    """Sounds by kind and set, recordings repeated, and what Whisper mishears."""
    rows, shown = [], {name: record for name, record in results.items() if isinstance(record, dict)}
    kinds = []
    for record in shown.values():
        for name, of in record["sounds"].items():
            kinds += [(name, kind) for kind in of if (name, kind) not in kinds]
    for name, kind in kinds:
        cells, counts = [], set()
        for record in shown.values():
            right = record["sounds"].get(name, {}).get(kind)
            cells.append(f"{np.mean(right):.2f}" if right else "")
            counts |= {len(right)} if right else set()
        rows.append([f"{kind}, {name}", ", ".join(map(str, sorted(counts))), *cells])
    for who in ("whisper", "student"):
        cells, counts = [], set()
        for record in shown.values():
            repeated = record["repeated"]
            cells.append(f"{repeated[who]:.2f}" if repeated else "")
            counts |= {repeated["rows"]} if repeated else set()
        rows.append([f"recordings, words wrong, {who}", ", ".join(map(str, sorted(counts))), *cells])
    mishearings = {}  # of each condition: of all students the same
    for record in shown.values():
        mishearings |= record["misheard"]
    for name, share in mishearings.items():
        rows.append([f"Whisper mishears, {name}", "", f"{share:.3f}", *[""] * (len(shown) - 1)])
    return to_lines(["sounds right (chance 0.50)", "n", *map(label_of, shown)], rows)


def missing_line(results):
    """Which runs the table lacks, and why."""
    missing = []
    for name, record in results.items():
        if isinstance(record, str):
            missing.append(f"{label_of(name)} ({RUNS.get(name.split('-')[0], 'the untrained student')}) {record}")
    return "; ".join(missing) + "." if missing else "All runs are there."


def counts_line(results):
    """How many questions each column has."""
    for record in results.values():
        if isinstance(record, dict):
            counts = {}
            for what, of in record["summary"].items():
                if what.startswith("retention, ") or what == "candidates, text" or "human, text" in what:
                    counts[what] = of[3]
            return f"Split {record['split']}; n: " + "; ".join(f"{what} {count}" for what, count in counts.items()) + (
                ". *Of all right by text*: of all candidates, also those that the teacher answers wrong. The teacher's "
                "retention is 1 by definition, so that of others can only fall. *Of a draw*: of all candidates, also spoken. M and the "
                "gap count only where the text side has not collapsed. KL8 below: human-written questions. *The paper's, 7 B*: VoiceBench by speech, its own scores. Longer "
                "answers are more often right, by themselves. Whisper mishears: heard is of more questions than the noisy ones.")
    return "Nothing is measured yet."


def to_text(results):
    parts = [main_table(results, RUNS), [missing_line(results)], [counts_line(results)]]
    parts += [main_table(results, CURVE_RUNS)] if set(results) & set(CURVE_RUNS) else []
    parts += [seeds_table(results), answers_table(results), pairs_table(results), damage_table(results), repair_table(results),
              more_table(results), hearing_table(results)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


# ---- pictures ----

def bars(axis, shown, series, scale=1.0):
    """shown: {name: {label: (value, low, high) or None}}, series: {label: colour}."""
    for k, (label, colour) in enumerate(series.items()):
        at, values, errors = [], [], []
        for x, of in enumerate(shown.values()):
            if of.get(label):
                value, low, high = (scale * v for v in of[label][:3])
                at.append(x + (k - (len(series) - 1) / 2) * 0.8 / len(series))
                values.append(value)
                errors.append((max(0, value - low), max(0, high - value)))
        if at:
            axis.bar(at, values, 0.75 / len(series), yerr=np.array(errors).T, label=label, color=colour,
                     error_kw=dict(lw=0.8, ecolor="#777777"))
    axis.set_xticks(range(len(shown)), list(shown))
    axis.spines[["top", "right"]].set_visible(False)


def draw_retention(results, path):
    shown = {}
    for name, record in results.items():
        if isinstance(record, dict) and name in ("start", *RUNS):  # the table says why a run is not there
            label = "teacher,\ncascade" if name == "start" else label_of(name)
            shown[label] = {way: record["summary"].get(f"retention, {way}") for way in WAYS}
    figure, axis = plt.subplots(figsize=(11, 4), constrained_layout=True)
    bars(axis, shown, COLOURS)
    axis.set_ylabel("share still answered right")
    axis.set_title("retention of what the teacher answers right: by text, and by speech (heard, unheard, at 10 dB)", fontsize=10)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_repair(results, path):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), constrained_layout=True, sharey=True)
    for axis, title, places_of in (
            (axes[0], "retention", {way: f"retention, {way}" for way in WAYS}),
            (axes[1], "KL8", {"text": "KL8, heard, text", "heard": "KL8, heard, speech", "unheard": "KL8, unheard, speech",
                              "10 dB": "KL8, 10 dB, speech"})):
        shown = {}
        for name in results:
            if name in RUNS and name != "base" and there(results, "start", "base", name):
                found = repairs_of(results, name)
                shown[label_of(name)] = {way: found[heading] for way, heading in places_of.items()}
        bars(axis, shown, COLOURS, 100)
        axis.axhline(100, color="#999999", lw=0.8, ls="--")
        axis.set_ylim(top=130)
        axis.set_ylabel("% of base's loss repaired")
        axis.set_title(f"{title}: forgetting by text, damage by speech", fontsize=10)
    if axes[0].get_legend_handles_labels()[0]:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(results, path):
    """Retention of R6 with more or fewer steps, other lambdas, of R8 with fewer prompts, where there is more than one run of these;
    base stands beside."""
    curves = {}
    for title, place_of in CURVES.items():
        runs = sorted((run for run in place_of if there(results, run)), key=place_of.get)
        if len(runs) > 1:
            curves[title] = {run: "all" if place_of[run] == np.inf else f"{place_of[run]:g}" for run in runs}
    if not curves:
        return
    figure, axes = plt.subplots(1, len(curves), figsize=(1 + 5 * len(curves), 4), constrained_layout=True, sharey=True, squeeze=False)
    for axis, (title, label_of_run) in zip(axes[0], curves.items()):
        axis.set_xticks(range(len(label_of_run)), label_of_run.values())
        for way in WAYS:
            found = [results[run]["summary"][f"retention, {way}"] for run in label_of_run]
            low, high = ([abs(of[0] - of[k]) for of in found] for k in (1, 2))
            axis.errorbar(range(len(found)), [of[0] for of in found], yerr=[low, high], fmt="o-", color=COLOURS[way], label=way, lw=1.2, capsize=2)
            if there(results, "base"):
                axis.axhline(results["base"]["summary"][f"retention, {way}"][0], color=COLOURS[way], lw=0.8, ls=":")
        axis.set_xlabel(title)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("share still answered right; dotted: base")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(args):
    folder = Path(args.results)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected the one that tools/run_results.py writes")
    results = read_results(folder)
    text = to_text(results)
    if args.beside:
        text += "\n" + "\n".join(beside_table(results, read_results(args.beside), args.beside)) + "\n"
    m.write_atomically(folder / "table.md", text)
    draw_retention(results, folder / "retention.png")
    draw_repair(results, folder / "repair.png")
    if set(results) & set(CURVE_RUNS):
        draw_curves(results, folder / "curves.png")
    print(text)


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("plot_results.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
