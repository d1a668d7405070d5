"""
The illness and the cure in one table and one picture: teacher, cascade, and students before and after distillation.

  python tools/compare.py --base out/quick/base/last --distilled out/quick/distilled/last --data heard/heldout.jsonl human/train.jsonl \
      --sounds heard/sounds-heldout.jsonl --out out/quick

KL8: KL(teacher by text || student), nats a token over the first 8 tokens of the teacher's answers, mean over questions. The cascade is the
untrained student without its sound: Whisper's words, typed into the LLM. Damage by text = KL8(by text); damage by speech = KL8(by speech) -
KL8(cascade), paired. Topic recall (--topics sets): share of generated answers that name the rarest word of the question. Sounds: share of
questions about the sound that are answered right, word for word. Intervals: 95%, bootstrap over prompts, with all clips of each.
Writes  OUT/report.md, OUT/report.json (every number and answer), OUT/report.png
"""
import argparse
import collections
import contextlib
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

BATCH = 20
COMMON = set("""a about after all also am an and any are as at be because been being best between both but by can could did do does
each explain for from get give had has have having help how i if in into is it its just know like list make many me more most much
my need new of on one or other our out over please provide should so some such tell than that the their them then there these they
this those through to use used using want was way we were what when where which while who why will with would write you your""".split())
TEACHER, CASCADE, SILENT, OTHER = "teacher by text", "cascade", "distilled: audio left out", "distilled: another clip's audio"


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
    p.add_argument("--start", default=m.DEFAULT_STUDENT, help="the untrained student, WHISPER+LLM")
    p.add_argument("--base", required=True, help="student before distillation, a folder that train_kd.py wrote")
    p.add_argument("--distilled", required=True, help="student after it")
    p.add_argument("--data", nargs="+", required=True, help="manifests of spoken questions; a file's folder names the set")
    p.add_argument("--sounds", nargs="+", default=[], help="manifests of questions about the sound")
    p.add_argument("--topics", nargs="+", default=["human"], help="sets on which topic recall is measured")
    p.add_argument("--cache", help="what Whisper heard, as of train_kd.py; default: .cache beside the first manifest")
    p.add_argument("--limit", type=m.number(int, 1), default=64, help="rows of each manifest")
    p.add_argument("--max-new-tokens", type=m.number(int, 1), default=16, help="of the answers for topic recall")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    p.add_argument("--out", required=True, help="folder of the report")
    args = p.parse_args(argv)
    for given in (args.data, args.sounds):
        if len({*map(set_name, given)}) < len(given):
            p.error(f"{' '.join(given)}: two files in folders of one name, which names the set")
    args.cache = args.cache or str(Path(args.data[0]).parent / ".cache")
    args.labels, args.max_answer_tokens, args.channels = "response", train_kd.EARLY, ["t2t", "s2t"]
    return args


# ---- topic recall ----

def stem(word):
    return word if len(word) < 5 else word[:max(4, len(word) - 3)]


def topics(rows):
    """The rarest word of each question; the longest if several are as rare. None if all are common."""
    words = []
    for row in rows:
        words.append([w for w in re.findall(r"[a-z']+", row["prompt"].lower()) if len(w) > 2 and w not in COMMON])
    counts = collections.Counter(stem(w) for ws in words for w in set(ws))
    return [max(ws, key=lambda w: (-counts[stem(w)], len(w))) if ws else None for ws in words]


def names(answer, topic):
    return any(word.startswith(stem(topic)) for word in re.findall(r"[a-z']+", answer.lower()))


# ---- measuring ----

class Question:
    """A row with everything that is asked of it: prompts by condition, and what a pass needs of its item."""

    def __init__(self, item, other=None):
        self.item = {key: item[key] for key in ("answer", "teacher_ids")}
        self.by_text, self.by_speech = item.get("t2t"), item.get("s2t", item.get("sound"))
        self.words = self.by_speech._replace(sound=self.by_speech.sound[:0])
        self.silent = self.words._replace(words=[], states=self.words.states[:0])
        self.other = other and self.by_speech._replace(words=other.words, states=other.states, sound=other.sound)


def questions_of(args, student, tokenizer, paths, heard_of, rows_of):
    """{set: Questions}: prompts are the same for all students, which share Whisper, tokenizer and template."""
    found = {}
    for path in paths:
        items = [train_kd.make_item(row, args, student, tokenizer, heard_of) for row in rows_of[path]]
        prompts = [item.get("s2t", item.get("sound")) for item in items]
        found[set_name(path)] = [Question(item, other) for item, other in zip(items, prompts[1:] + prompts[:1])]
    return found


def set_name(path):
    return Path(path).resolve().parent.name


@torch.inference_mode()
def kl8(student, teacher, prompts, questions, known):
    """-> (B,) mean KL8 of each question. known: {the question's tokens: KL8} of prompts that hear nothing: sets may share them."""
    keys, todo, found = [], {}, []
    for prompt, question in zip(prompts, questions):
        hears = prompt.words or len(prompt.sound)
        keys.append(id(prompt) if hears else tuple(question.item["teacher_ids"]))
        if keys[-1] not in known:
            todo[keys[-1]] = {**question.item, "s2t": prompt}
    items = list(todo.values())
    for start in range(0, len(items), BATCH):
        found += train_kd.measure(student, teacher, items[start:start + BATCH], ["s2t"], contextlib.nullcontext)["s2t"]
    for key, (kl, *_) in zip(todo, found):
        known[key] = float(kl.mean())
    return [known[key] for key in keys]


def answers_to(student, prompts, max_new_tokens, batch_size=2 * BATCH):
    texts = []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start:start + batch_size]
        embeds = student.embed(some, [[]] * len(some))
        ids = m.generate(student.llm, embeds, max_new_tokens=max_new_tokens, eos_id=m.end_token(student.tokenizer))
        texts += student.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


def teach(teacher, items):
    """Give each item the teacher's hidden rows, once for all conditions; what is asked in several voices is read once."""
    same = collections.defaultdict(list)
    for item in items:
        same[tuple(item["teacher_ids"]), tuple(item["answer"])].append(item)
    groups = list(same.values())
    for start in range(0, len(groups), BATCH):
        some = groups[start:start + BATCH]
        for group, rows in zip(some, train_kd.teacher_rows(teacher, [group[0] for group in some])):
            for item in group:
                item["taught"] = rows


@torch.inference_mode()
def measure(args):
    """-> {set: {condition: {kl8_rows, topic_rows, answers}}}, {set: {condition: {kind: right or wrong}}}, the rows of each."""
    start, (teacher, tokenizer) = m.load_student(args.start).to(args.device), m.load_llm(args.teacher)
    teacher.to(args.device)
    rows_of = {}
    for path in args.data + args.sounds:
        rows_of[path] = [row for row in train_kd.read_manifest(path, {}) if row.get("audio") and row["response"]][:args.limit]
    heard_of = train_kd.hear_all(args, start, [row for rows in rows_of.values() for row in rows])
    dialogue, sounds = (questions_of(args, start, tokenizer, paths, heard_of, rows_of) for paths in (args.data, args.sounds))
    teach(teacher, [question.item for questions in dialogue.values() for question in questions])
    plan = [(CASCADE, start, "words")]
    for name in ("base", "distilled"):
        student = m.load_student(getattr(args, name)).to(args.device)
        plan += [(f"{name} by text", student, "by_text"), (f"{name} by speech", student, "by_speech")]
    plan += [(SILENT, student, "silent"), (OTHER, student, "other")]
    results, heard = {name: {TEACHER: {"kl8_rows": [0.0] * len(qs)}} for name, qs in dialogue.items()}, {}
    rows = {set_name(path): rows_of[path] for path in args.data}
    for label, student, way in tqdm(plan, desc="measuring", unit="condition"):
        known = {}
        for name, questions in dialogue.items():
            if way in ("silent", "other") and name not in args.topics:
                continue  # one set shows what the controls show
            prompts = [getattr(q, way) for q in questions]
            results[name][label] = {"kl8_rows": kl8(student, teacher, prompts, questions, known)}
            if name in args.topics:
                results[name][label]["answers"] = answers_to(student, prompts, args.max_new_tokens)
        if way == "by_speech":  # words alone cannot tell
            for path in args.sounds:
                answers = answers_to(student, [getattr(q, way) for q in sounds[set_name(path)]], 6)
                told = []
                for row, text in zip(rows_of[path], answers):
                    told.append((row["kind"], text.strip() == row["response"], text, prompt_of(row)))
                heard.setdefault(set_name(path), {})[label] = told
    for name in set(args.topics) & set(results):
        said = [m.text_ids(tokenizer, row["response"])[:args.max_new_tokens] for row in rows[name]]  # as long as the others'
        results[name][TEACHER]["answers"] = tokenizer.batch_decode(said)
        asked = topics(rows[name])
        for entry in results[name].values():
            entry["topic_rows"] = [names(a, t) if t else None for a, t in zip(entry["answers"], asked)]
    return results, heard, rows


# ---- the report ----

def prompt_of(row):
    """What all clips of a prompt, and the questions about their sound, have in common."""
    return row["prompt"] or re.sub(r"(-take2)?-[a-z]+$", "", row["id"])


def interval(values, prompts, seed):
    """Mean of values and its 95% interval -> (mean, low, high). Prompts are drawn, each with all its values."""
    sums = {}
    for value, prompt in zip(values, prompts):
        total, count = sums.get(prompt, (0.0, 0))
        sums[prompt] = total + value, count + 1
    return tuple(vb.spread(vb.bootstrap([[pair] for pair in sums.values()], seed)))


def mean_of(values):
    return float(np.mean([v for v in values if v is not None]))


def table(results, heard):
    """All conditions -> lines of one table."""
    topic_sets = [name for name, of in results.items() if "topic_rows" in of[TEACHER]]
    heads = [*(f"KL8, {name}" for name in results), *(f"topic recall, {name}" for name in topic_sets),
             *(f"sounds right, {name}" for name in heard)]
    lines = [f"| {' | '.join(['', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    for label in max(results.values(), key=len):
        cells = []
        for of in results.values():
            cells.append(f"{mean_of(of[label]['kl8_rows']):.2f}" if label in of else "")
        cells += [f"{mean_of(results[name][label]['topic_rows']):.2f}" for name in topic_sets]
        for of in heard.values():
            cells.append(f"{mean_of([right for _, right, *_ in of[label]]):.2f}" if label in of else "")
        lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def damages(results, rows, seed):
    """{set: {what: (mean, low, high)}}: what training by speech broke, and what distillation left of it."""
    found = {}
    for name, of in results.items():
        cascade, prompts = np.array(of[CASCADE]["kl8_rows"]), [prompt_of(row) for row in rows[name]]
        found[name] = {}
        for student in ("base", "distilled"):
            by_text, by_speech = (np.array(of[f"{student} by {way}"]["kl8_rows"]) for way in ("text", "speech"))
            found[name][f"{student}: damage by text"] = interval(by_text, prompts, seed)
            found[name][f"{student}: damage by speech"] = interval(by_speech - cascade, prompts, seed)
        for way in ("text", "speech"):
            before, after = found[name][f"base: damage by {way}"][0], found[name][f"distilled: damage by {way}"][0]
            found[name][f"repaired by {way}"] = 1 - after / before if before else 0.0
    return found


def write_report(args, results, heard, rows, found):
    lines = [*table(results, heard), "", "| damage, nats a token | " + " | ".join(results) + " |", "|---" * (1 + len(results)) + "|"]
    for what in next(iter(found.values())):
        cells = []
        for of in found.values():
            value = of[what]
            cells.append(f"{value:.0%}" if isinstance(value, float) else f"{value[0]:+.2f} [{value[1]:+.2f}, {value[2]:+.2f}]")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    kinds = sorted({kind for of in heard.values() for kind, *_ in next(iter(of.values()))})
    if kinds:
        lines += ["", f"| sounds right (chance 0.50) | {' | '.join(kinds)} | all | n |", "|---" * (3 + len(kinds)) + "|"]
    for name, of in heard.items():
        for label, answers in of.items():
            cells = []
            for kind in kinds:
                some = [right for k, right, *_ in answers if k == kind]
                cells.append(f"{np.mean(some):.2f}" if some else "")
            every = interval([right for _, right, *_ in answers], [prompt for *_, prompt in answers], args.seed)
            lines.append(f"| {label}, {name} | {' | '.join(cells)} | {every[0]:.2f} [{every[1]:.2f}, {every[2]:.2f}] | {len(answers)} |")
    text = "\n".join(lines) + "\n"
    record = {"args": vars(args), "damage": found, "results": results, "sounds": heard,
              "questions": {name: [{"id": r["id"], "prompt": r["prompt"], "voice": r.get("voice")} for r in rs] for name, rs in rows.items()}}
    m.write_atomically(Path(args.out) / "report.md", text)
    m.write_atomically(Path(args.out) / "report.json", json.dumps(record, indent=1))
    return text


def draw(results, heard, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    shown = {"base by text": "#f3c9a5", "distilled by text": "#b7c9e2", CASCADE: "#555555", "base by speech": "#e07b27",
             "distilled by speech": "#3b6fb6"}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 2], constrained_layout=True)
    for k, (label, colour) in enumerate(shown.items()):
        at = np.arange(len(results)) + (k - 2) * 0.16
        axes[0].bar(at, [mean_of(of[label]["kl8_rows"]) for of in results.values()], 0.15, label=label, color=colour)
        spoken = [mean_of([right for _, right, *_ in of[label]]) for of in heard.values() if label in of]
        if spoken:
            axes[1].bar(np.arange(len(heard)) + (k - 3) * 0.25, spoken, 0.24, color=colour)
    axes[0].set_xticks(np.arange(len(results)), list(results))
    axes[1].set_xticks(np.arange(len(heard)), list(heard))
    axes[0].set_title("KL to the teacher, first 8 tokens (nats a token, lower is better)", fontsize=10)
    axes[1].set_title("questions about the sound answered right", fontsize=10)
    axes[1].axhline(0.5, color="#999999", lw=0.8, ls="--")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)


def main(args):
    begun = time.perf_counter()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    results, heard, rows = measure(args)
    found = damages(results, rows, args.seed)
    print(write_report(args, results, heard, rows, found))
    draw(results, heard, Path(args.out) / "report.png")
    print(f"{args.out}/report.md, report.json, report.png in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("compare.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
