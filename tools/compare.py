"""
What distillation changed: one table and one picture, from students before and after and from controls.

  python tools/compare.py --before STUDENT --after out/run/last --data heldout.jsonl unheard.jsonl questions.jsonl --out out/run

KL, KL8, agree8: divergence from the teacher by text on the teacher's answers, in nats a token, all tokens and the first 8,
and the share of the first 8 on which both prefer the same token. Topic recall: the share of generated answers that name
the rarest word of the question. Controls hear nothing, or another question. Intervals: paired bootstrap over questions.
Writes  OUT/report.md, OUT/report.json (every answer), OUT/report.png
"""
import argparse
import collections
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
import model as m
import train_kd

CONDITIONS = [("before", "t2t", "student by text, before"), ("before", "s2t", "student by speech, before"),
              ("after", "t2t", "student by text, after"), ("after", "s2t", "student by speech, after"),
              ("after", "silent", "control: audio left out"), ("after", "other", "control: another question's audio")]
COMMON = set("""a about after all also am an and any are as at be because been being best between both but by can could did do does
each explain for from get give had has have having help how i if in into is it its just know like list make many me more most much
my need new of on one or other our out over please provide should so some such tell than that the their them then there these they
this those through to use used using want was way we were what when where which while who why will with would write you your""".split())


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
    p.add_argument("--before", default=m.DEFAULT_STUDENT, help="student before training: ENCODER+LLM or a folder")
    p.add_argument("--after", required=True, help="folder that train_kd.py wrote")
    p.add_argument("--data", nargs="+", required=True, help="manifests; the name of a file's folder names the set")
    p.add_argument("--limit", type=int, default=64, help="rows of each manifest")
    p.add_argument("--max-new-tokens", type=int, default=40, help="of the answers for topic recall")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--seed", type=int, default=0, help="of the untrained adapter (as in train_kd.py) and of the bootstrap")
    p.add_argument("--out", required=True, help="folder of the report")
    args = p.parse_args(argv)
    m.check_options(p, args, limit=1, max_new_tokens=1, seed=(0, 2**32))
    return args


def stem(word):
    return word if len(word) < 5 else word[:max(4, len(word) - 3)]


def topics(rows):
    """The rarest word of each question, over all questions; the longest if several are as rare. None if all are common."""
    words = [[w for w in re.findall(r"[a-z']+", r["prompt"].lower()) if len(w) > 2 and w not in COMMON] for r in rows]
    counts = collections.Counter(stem(w) for ws in words for w in set(ws))
    return [max(ws, key=lambda w: (-counts[stem(w)], len(w))) if ws else None for ws in words]


def names(answer, topic):
    return any(word.startswith(stem(topic)) for word in re.findall(r"[a-z']+", answer.lower()))


def asked_rows(rows, channel):
    """What the student is asked under one condition."""
    others = [{**r, "audio": other["audio"]} for r, other in zip(rows, rows[1:] + rows[:1])]
    return {"t2t": [{**r, "audio": None} for r in rows], "s2t": rows, "other": others,
            "silent": [{**r, "audio": None, "prompt": ""} for r in rows]}[channel]


def answers_to(student, asked, max_new_tokens, batch_size=160):
    """Generated answers, in large batches of like length; what is asked twice is answered once."""
    keys = [json.dumps([r.get(k) for k in ("system", "instruction", "prompt", "audio")]) for r in asked]
    distinct = sorted(dict(zip(keys, asked)).items(), key=lambda x: (bool(x[1]["audio"]), len(x[1]["prompt"])))
    answers = {}
    for start in tqdm(range(0, len(distinct), batch_size), desc="answering", unit="batch"):
        batch = distinct[start:start + batch_size]
        answers.update(zip([key for key, _ in batch], student.generate([r for _, r in batch], max_new_tokens)))
    return [answers[key] for key in keys]


def measure(args):
    """-> {set: {condition: {metrics, per-row lists, answers}}} and the names of the sets."""
    teacher, tokenizer = m.load_llm(args.teacher, torch.bfloat16)
    teacher.to(args.device)
    sets = {Path(path).parent.name if Path(path).stem in ("train", "heldout") else Path(path).stem:
            [r for r in train_kd.read_manifest(path) if r["response"] and r.get("audio")][:args.limit] for path in args.data}
    sets = {name: sorted(rows, key=lambda r: len(r["prompt"])) for name, rows in sets.items()}  # little padding
    asked = dict(zip(sets, np.split(np.array(topics([r for rows in sets.values() for r in rows]), object),
                                    np.cumsum([len(rows) for rows in sets.values()])[:-1])))
    results = {name: {"teacher by text": {"kl": 0.0, "kl8": 0.0, "agree8": 1.0, "answers": [r["response"] for r in rows]}}
               for name, rows in sets.items()}
    for which in ("before", "after"):
        torch.manual_seed(args.seed)
        student = m.load_student(getattr(args, which)).to(args.device, torch.bfloat16)
        if isinstance(student, m.SpeechLLM):
            student.adapter.float()
        channels = {channel: label for when, channel, label in CONDITIONS if when == which}
        asked_all = [r for rows in sets.values() for channel in channels for r in asked_rows(rows, channel)]
        answers = iter(answers_to(student, asked_all, args.max_new_tokens))
        options = argparse.Namespace(train=[], feature_cache=None, workers=1, labels="response", max_answer_tokens=256)
        cache, _ = train_kd.feature_cache(options, student, [r for rows in sets.values() for r in rows], 0, 1, torch.bfloat16)
        for name, rows in sets.items():
            dataset = train_kd.Rows(rows, student, tokenizer, options, cache)
            sums = train_kd.evaluate(student, teacher, dataset, range(len(rows)), list(channels), progress=True)
            for channel, label in channels.items():
                kl, agree, n, kl8, agree8, n8 = sums[channel].T.numpy()
                results[name][label] = {"kl": kl.sum() / n.sum(), "kl8": kl8.sum() / n8.sum(), "agree8": agree8.sum() / n8.sum(),
                                        "kl8_rows": (kl8 / n8).tolist(), "answers": [next(answers) for _ in rows]}
            if not isinstance(student, m.SpeechLLM):  # others do not spell what they hear
                continue
            features = [dataset[i]["features"] for i in range(len(rows))]
            with torch.no_grad():
                heard = [t for i in range(0, len(rows), 16) for t in student.read(*student.spell(features[i:i + 16]))[1]]
            pairs = [[re.findall(r"[\w']+", t.lower()) for t in (r["prompt"], h)] for r, h in zip(rows, heard)]
            results[name][f"student by speech, {which}"] |= {
                "wer": sum(m.edit_distance(*p) for p in pairs) / sum(len(p[0]) for p in pairs), "heard": heard}
    for name, rows in sets.items():
        for condition in results[name].values():
            hits = [names(a, t) if t else None for a, t in zip(condition["answers"], asked[name])]
            condition["topic_rows"] = hits
            condition["topic"] = float(np.mean([h for h in hits if h is not None]))
    return results, sets


def compare(results, seed):
    """Paired differences of the trained student by speech to both controls and to itself before."""
    differences = {}
    for name, conditions in results.items():
        mine = conditions["student by speech, after"]
        for label in ("control: audio left out", "control: another question's audio", "student by speech, before"):
            other = conditions[label]
            differences[name, label] = {
                "kl8": vb.interval(np.subtract(mine["kl8_rows"], other["kl8_rows"]), seed),
                "topic": vb.interval([float(a) - float(b) for a, b in zip(mine["topic_rows"], other["topic_rows"]) if a is not None], seed)}
    return differences


def summary(results):
    """All conditions on all sets -> lines of one table."""
    keys = {"kl8": "KL8", "topic": "topic recall", "wer": "words misheard"}
    header = [f"{title}, {name}" for title in keys.values() for name in results]
    lines = [f"| {' | '.join(['', *header])} |", "|---" * (1 + len(header)) + "|"]
    for label in next(iter(results.values())):
        cells = [f"{of[label][key]:.2f}" if key in of[label] else "" for key in keys for of in results.values()]
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def write_report(args, results, sets, differences):
    lines = [*summary(results), ""]
    for name, conditions in results.items():
        lines += [f"**{name}** ({len(sets[name])} questions)", "", "| | KL | KL8 | agree8 | topic recall | words misheard |", "|---|---|---|---|---|---|"]
        for label, c in conditions.items():
            lines.append(f"| {label} | {c['kl']:.3f} | {c['kl8']:.3f} | {c['agree8']:.2f} | {c['topic']:.2f} | "
                         + (f"{c['wer']:.2f} |" if "wer" in c else "|"))
        lines += ["", "| by speech, after, minus | KL8 | topic recall |", "|---|---|---|"]
        for (of, label), d in differences.items():
            if of == name:
                cells = [f"{d[k][0]:+.2f} [{d[k][1]:+.2f}, {d[k][2]:+.2f}]" for k in ("kl8", "topic")]
                lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    text = "\n".join(lines)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    (Path(args.out) / "report.md").write_text(text)
    record = {"args": vars(args), "differences": {f"{a}: {b}": d for (a, b), d in differences.items()}, "results": results,
              "questions": {name: [{k: r[k] for k in ("id", "prompt", "voice")} for r in rows] for name, rows in sets.items()}}
    (Path(args.out) / "report.json").write_text(json.dumps(record, indent=1))
    return text


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = list(next(iter(results.values())))
    colours = ["#444444", "#b7c9e2", "#f3c9a5", "#3b6fb6", "#e07b27", "#bbbbbb", "#dddddd"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, key, title in zip(axes, ("kl8", "topic"), ("KL to the teacher, first 8 answer tokens (nats, lower is better)",
                                                         "answers that name the topic (share, higher is better)")):
        for k, label in enumerate(labels):
            positions = np.arange(len(results)) + (k - len(labels) / 2) * 0.12
            axis.bar(positions, [c[label][key] for c in results.values()], 0.12, label=label, color=colours[k])
        axis.set_xticks(np.arange(len(results)), list(results))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main(args):
    start = time.perf_counter()
    results, sets = measure(args)
    differences = compare(results, args.seed)
    print(write_report(args, results, sets, differences))
    draw(results, Path(args.out) / "report.png")
    print(f"{args.out}/report.md, report.json, report.png in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("compare.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
