"""
Voice and words together: the teacher reads how a question sounds in front of it, the student hears it.

  python tools/captions.py make data/result/espeak/train.jsonl
  python train_kd.py --student out/result/base/last --data ... data/result/espeak/train-captioned.jsonl ...
  python tools/captions.py measure out/result/R6/last out/beyond/captions/last --data data/result/unheard-sounds/train-captioned.jsonl --out results/beyond/captions

make     MANIFEST of synth_speech.py --takes 2 -> beside it MANIFEST-captioned.jsonl: its prompts begin with a caption, "[A woman speaks fast,
         with rain behind her.]", and its responses are what the teacher answers then. The path through train_kd.py is that of any row.
measure  OUT/captions.md, captions.json. A clip has a twin: the same words in another voice, at another speed, with another background.
         Gain = KL8(teacher with the clip's own caption || student that hears the twin) - the same of a student that hears the clip, mean over
         twins: 0 for whoever hears words alone, since what is badly heard counts once on either side. The most that there is to gain is
         KL8(teacher with its own caption || teacher with the twin's).
"""
import argparse
import functools
import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import compare
import eval_voicebench as vb
import model as m
import synth_speech as synth
import train_kd


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    steps = p.add_subparsers(dest="step", required=True)
    for name, about in (("make", "rows with captions"), ("measure", "does a student answer by the voice, as the teacher by the caption?")):
        step = steps.add_parser(name, help=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        step.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
        step.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
        if name == "make":
            step.add_argument("manifests", nargs="+", metavar="MANIFEST", help="JSON lines of synth_speech.py --takes 2")
            step.add_argument("--max-new-tokens", type=m.number(int, 1), default=24, help="of an answer")
            step.add_argument("--batch-size", type=m.number(int, 1), default=384, help="answers generated together")
        else:
            step.add_argument("students", nargs="+", metavar="STUDENT", help="folders that train_kd.py wrote")
            step.add_argument("--data", nargs="+", required=True, help="what make wrote; clips that no student was trained on")
            step.add_argument("--start", default=m.DEFAULT_STUDENT, help="the untrained student, whose Whisper hears for all")
            step.add_argument("--cache", help="what Whisper heard, as of train_kd.py; default: .cache beside the first manifest")
            step.add_argument("--limit", type=m.number(int, 2), default=96, help="clips of each manifest")
            step.add_argument("--seed", type=int, default=0, help="of the bootstrap")
            step.add_argument("--out", required=True, help="folder of the report")
    args = p.parse_args(argv)
    args.dtype, args.labels, args.max_answer_tokens, args.channels = "float32", "response", train_kd.EARLY, ["t2t", "s2t"]
    if args.step == "measure":
        args.cache = args.cache or str(Path(args.data[0]).parent / ".cache")
    return args


# ---- make ----

def caption_of(row):
    """What a clip's row tells of its sound, as a sentence; None if it tells nothing."""
    who = {"man": "A man", "woman": "A woman"}.get(row.get("sex"), "Someone")
    how = {"fast": "fast", "slow": "slowly"}.get(row.get("rate"))
    behind = row.get("background")
    if not how or not behind:
        return None
    noise = "in a quiet room" if behind == "quiet" else f"with {behind} in the background"
    return f"[{who} speaks {how}, {noise}.]"


def make(args):
    teacher = functools.cache(lambda: synth.load_teacher(args))
    for path in map(Path, args.manifests):
        rows = []
        for row in m.json_lines(path, lambda raw, _: raw):
            caption = row.get("prompt") and caption_of(row)
            if caption:
                clean = {key: value for key, value in row.items() if key not in ("response", "finish", "reference")}
                rows.append({**clean, "id": f"{row['id']}-captioned", "prompt": f"{caption} {row['prompt']}"})
        if not rows:
            raise ValueError(f"{path}: no row has rate and background; expected what synth_speech.py --takes 2 writes")
        args.out = str(path.parent / ".captions")
        answers = vb.answer_all(args, "teacher", [{**row, "audio": None} for row in rows],
                                lambda some: synth.answer(*teacher(), some, args.max_new_tokens), vb.weights_of(args.teacher))
        for row, found in zip(rows, answers):
            row |= {"response": found["response"], "finish": found["finish"]}
        target = path.with_name(f"{path.stem}-captioned.jsonl")
        m.write_atomically(target, "".join(json.dumps(row) + "\n" for row in rows))
        print(f"{target}: {len(rows)} rows, e.g. {rows[0]['prompt']!r}: {rows[0]['response'][:60]!r}")


# ---- measure ----

def read_twins(args):
    """-> rows of clips whose twin is there, each beside its twin, with answers for both."""
    twins = []
    for path in args.data:
        rows = {row["id"]: row for row in train_kd.read_manifest(path, {}) if row["response"]}
        found = []
        for name, row in rows.items():
            other = rows.get(name.replace("-captioned", f"{synth.TAKE2}-captioned"))
            found += [row, other] if other else []
        twins += found[:args.limit // 2 * 2]
    if not twins:
        raise ValueError(f"{' '.join(args.data)}: no clip has a twin; expected what `captions.py make` writes of synth_speech.py --takes 2")
    return twins


@torch.inference_mode()
def measure(args):
    """-> {student: {"own", "twin": KL8 of each row}}, the teacher's with the twin's caption, rows."""
    start, (teacher, tokenizer) = m.load_student(args.start).to(args.device), m.load_llm(args.teacher)
    teacher.to(args.device)
    rows = read_twins(args)
    heard_of = train_kd.hear_all(args, start, rows)
    [questions] = compare.questions_of(args, start, tokenizer, ["twins/rows"], heard_of, {"twins/rows": rows}).values()
    compare.teach(teacher, [question.item for question in questions])
    twins = []  # each question's own twin: k and k + 1 belong together
    for k in range(0, len(questions), 2):
        twins += [questions[k + 1], questions[k]]
    found = {"teacher by text": {"own": [0.0] * len(rows), "twin": compare.kl8(start, teacher, [q.by_text for q in twins], questions, {})}}
    cascade = {"own": [q.words for q in questions], "twin": [q.words for q in twins]}
    found["cascade"] = {way: compare.kl8(start, teacher, prompts, questions, {}) for way, prompts in cascade.items()}
    for name in args.students:
        student = m.load_student(name).to(args.device)
        heard = {"own": [q.by_speech for q in questions], "twin": [q.by_speech for q in twins]}
        found[name] = {way: compare.kl8(student, teacher, prompts, questions, {}) for way, prompts in heard.items()}
    return found, rows


def report(args, found, rows):
    prompts = [row["prompt"].partition("] ")[2] for row in rows]
    most = compare.mean_of(found["teacher by text"]["twin"])
    lines = ["| | KL8, its own clip | KL8, the twin's | gain | of the most |", "|---|---|---|---|---|"]
    for name, ways in found.items():
        gain = compare.interval([b - a for a, b in zip(ways["own"], ways["twin"])], prompts, args.seed)
        cells = [f"{compare.mean_of(ways['own']):.3f}", f"{compare.mean_of(ways['twin']):.3f}",
                 f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]", f"{gain[0] / most:.0%}"]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join([*lines, "", f"{len(rows)} clips, {len(set(prompts))} prompts; nats a token, first {train_kd.EARLY} tokens."]) + "\n"


def main(args):
    if args.step == "make":
        return make(args)
    found, rows = measure(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    text = report(args, found, rows)
    m.write_atomically(Path(args.out, "captions.json"), json.dumps({"ids": [row["id"] for row in rows], "kl8": found}, indent=1))
    m.write_atomically(Path(args.out, "captions.md"), text)
    return print(text)


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("captions.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
