"""
The rows of tools/run_results.py: what is trained on, what is held out, what the teacher answers right.

  python tools/result_data.py questions --webquestions FILE --nq FILE --speech FOLDER --out data/result
  python tools/result_data.py both --out data/result          # when the rows have been spoken
  cp -r data/result data/qwen; python tools/result_data.py answers --teacher LLM --out data/qwen      # the same clips, another teacher

tools/result_data.sh calls the first two and speaks in between.
Reads   WebQuestions' train file (a JSON list: qText, answers), NQ-open's dev file (JSON lines: question, answer),
        tools/easy_questions.jsonl; a folder of recordings with manifest.jsonl (path, seen from beside the folder; text)
Writes  OUT/train-piper.jsonl, train-espeak.jsonl (prompts to speak), OUT/questions.jsonl (all candidates: references,
        teacher's answer, right or wrong, dev or test), OUT/ask-heard.jsonl, ask-unheard.jsonl (what of them is spoken),
        OUT/recordings/; then OUT/{piper,espeak}/both-train.jsonl, and of a part of the prompts both-train-500.jsonl, -1000, -2000

Retention set: candidates that the teacher answers right by text; what a student still answers right of them is kept.
A candidate whose answer stands in its question is left out: who repeats the question would be right.
"""
import argparse
import collections
import functools
import hashlib
import json
import random
import re
import shutil
import sys
from pathlib import Path

import torch

TOOLS = Path(__file__).resolve().parent
sys.path[:0] = [str(TOOLS.parent), str(TOOLS)]
import eval_voicebench as vb
import model as m
import synth_speech as synth
from sound_questions import QUESTIONS, REPEAT

NQ_TRAIN = 2600         # the first rows may be trained on, the others never
ENGINES = ("piper", "espeak")  # each speaks half of the prompts
SPOKEN = ("heard", "unheard", "human", *ENGINES)  # folders of dialogue
SPARE = 32              # prompts of each engine whose clips are held out: questions about their sound
ALL_TEST, ALL_DEV = 200, 67    # drawn from all candidates, whether the teacher answers them right or wrong
PARTS = (500, 1000, 2000)      # prompts of the curve over the data's size
LEAST = 300             # questions of a retention set that says anything
NEW_TOKENS = 24         # of an answer
SEX, SEX_ANSWERS = QUESTIONS["sex"]
# readers of the recordings, by a part of the file's name; the Harvard clips' are not known
READERS = {"ljspeech/": "woman", "-1088-": "woman", "/2412-": "woman", "/1089_": "man", "/1272-": "man"}
RECORDINGS = ("librispeech", "ljspeech", "harvard")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("step", choices=["questions", "both", "answers"], help="before or after the rows are spoken; another teacher's answers")
    p.add_argument("--webquestions", help="WebQuestions, JSON list")
    p.add_argument("--nq", help="NQ-open, JSON lines")
    p.add_argument("--easy", default=str(TOOLS / "easy_questions.jsonl"), help="more candidates: JSON lines with prompt, reference")
    p.add_argument("--speech", help="folder of recordings with its manifest.jsonl; none: not measured on recordings")
    p.add_argument("--prompts", type=m.number(int, 2), default=800, help="to train on; two clips each")
    p.add_argument("--heldout", type=m.number(int, 1), default=1000, help="rows of WebQuestions that are never trained on")
    p.add_argument("--least", type=m.number(int, 1), default=LEAST, help="questions that the retention set must have")
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
    p.add_argument("--batch-size", type=m.number(int, 1), default=384, help="answers generated together")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--out", required=True, help="output folder")
    args = p.parse_args(argv)
    if args.step == "questions" and not (args.webquestions and args.nq):
        p.error("questions needs --webquestions FILE and --nq FILE")
    args.dtype, args.max_new_tokens = "float32", NEW_TOKENS  # the teacher answers as it is measured
    return args


# ---- questions with answers ----

def as_question(text):
    """The data sets write "who sang it": what is read gets the capital and the mark that Whisper writes."""
    text = synth.tidy(text)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!" else "?")


def read_questions(path, name):
    """JSON list or lines -> [{"id": NAME-LINE, "prompt", "reference": list of texts}]; raises ValueError that names the line."""
    def parse(raw, where):
        prompt = raw.get("qText", raw.get("question", raw.get("prompt")))
        answers = raw.get("answers", raw.get("answer", raw.get("reference")))
        texts = [prompt, *(answers if isinstance(answers, list) else [answers])]
        if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{where}: {json.dumps(raw)[:80]}: expected qText, question or prompt, and a list of texts under "
                             "answers, answer or reference")
        return {"id": f"{name}-{int(where.rpartition(':')[2]):06d}", "prompt": as_question(prompt), "reference": texts[1:]}
    return m.json_lines(Path(path), parse)


def rank_of(prompt):
    """A number that is drawn by the prompt alone: no other question changes it."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16)


def split_of(prompt):
    """A quarter is for choices, the rest is reported."""
    return "dev" if rank_of(prompt) % 4 == 0 else "test"


def draw(args):
    """-> rows to train on, candidates to hold out, what was dropped and why."""
    easy, web, nq = read_questions(args.easy, "easy"), read_questions(args.webquestions, "webq"), read_questions(args.nq, "nq")
    for path, rows, least in ((args.webquestions, web, args.heldout + 1), (args.nq, nq, NQ_TRAIN + 1)):
        if len(rows) < least:
            raise ValueError(f"{path}: {len(rows)} questions, expected {least} or more: some to train on, some to hold out")
    held = set(random.Random(0).sample(range(len(web)), args.heldout))
    candidates, drops = [], []
    for row in easy + [web[k] for k in sorted(held)] + nq[NQ_TRAIN:]:
        if vb.qa_match(row["prompt"], row["reference"]):
            drops.append({"id": row["id"], "reason": "answer stands in the question", "prompt": row["prompt"]})
        else:
            candidates.append(row)
    rest = [row for k, row in enumerate(web) if k not in held] + nq[:NQ_TRAIN]
    random.Random(0).shuffle(rest)
    names = {row["id"] for row in candidates}
    # held out first: of two that are nearly the same, the one to train on is dropped
    options = argparse.Namespace(exclude=[str(TOOLS / "questions.jsonl")], max_words=40, language="en", heldout=0, seed=0)
    kept, more = synth.choose(candidates + rest, options)
    train = [row for row in kept if row["id"] not in names]
    wanted = args.prompts + SPARE * len(ENGINES)
    if len(train) < wanted:
        raise ValueError(f"{len(train)} questions to train on, expected {wanted} for --prompts {args.prompts}; lower it, or give more rows")
    return train[:wanted], [row for row in kept if row["id"] in names], drops + more


# ---- what the teacher answers right ----

def answer_all(args, candidates):
    """Candidates -> the same with the teacher's answer, right or wrong, and its split. Asked once, unless one of them changes."""
    teacher = functools.cache(lambda: synth.load_teacher(args))
    asked = [{**row, "audio": None} for row in candidates]
    answers = vb.answer_all(args, "teacher", asked, lambda rows: synth.answer(*teacher(), rows, NEW_TOKENS), vb.weights_of(args.teacher))
    answered = []
    for row, found in zip(candidates, answers):
        right = vb.qa_match(found["response"], row["reference"])
        answered.append({"id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "response": found["response"],
                         "finish": found["finish"], "right": right, "split": split_of(row["prompt"])})
    return answered


def choose_sets(answered, least):
    """Mark the rows of the retention set, and some of all candidates (that have an answer), the first by rank -> rows of either.

    Raises: ValueError if the teacher answers fewer than `least` right.
    """
    left = {"test": ALL_TEST, "dev": ALL_DEV}
    for row in sorted(answered, key=lambda row: rank_of(row["prompt"])):
        row["sets"] = ["retention"] if row["right"] else []
        if left[row["split"]] and row["response"]:
            left[row["split"]] -= 1
            row["sets"].append("all")
    right = sum(row["right"] for row in answered)
    if right < least:
        raise ValueError(f"the teacher answers {right} of {len(answered)} candidates right, expected {least} or more: hold out more "
                         "(HELDOUT=1500), or add questions to tools/easy_questions.jsonl")
    return [row for row in answered if row["sets"]]


# ---- recordings ----

def copy_recordings(args):
    """Recordings of people -> OUT/recordings: to repeat, and man or woman where the reader is known. Returns the rows."""
    folder, out = Path(args.speech), Path(args.out) / "recordings"
    (out / "wav").mkdir(parents=True, exist_ok=True)
    rows = []

    def parse(raw, where):
        m.check_texts(raw, where, "path", "text")
        if not raw.get("path") or not raw.get("text"):
            raise ValueError(f"{where}: no path or text; expected both")
        if not any(part in raw["path"] for part in RECORDINGS):
            return
        clip = m.file_below(folder.resolve().parent, raw["path"], where)
        m.audio_seconds(clip)
        name = re.sub(r"\W+", "-", raw["path"].rpartition(".")[0])
        shutil.copyfile(clip, out / "wav" / f"{name}{Path(clip).suffix}")
        row = {"prompt": None, "finish": "stop", "audio": f"wav/{name}{Path(clip).suffix}", "language": "en"}
        rows.append({**row, "id": name, "instruction": REPEAT, "response": raw["text"], "kind": "repeated"})
        for part, sex in READERS.items():
            if part in raw["path"]:
                rows.append({**row, "id": f"{name}-sex", "instruction": SEX, "response": SEX_ANSWERS[sex], "kind": sex})

    m.json_lines(folder / "manifest.jsonl", parse)
    for name, kinds in (("repeated", ["repeated"]), ("sounds", ["man", "woman"])):
        write_rows(out / f"{name}.jsonl", [row for row in rows if row["kind"] in kinds])
    return rows


# ---- the steps ----

def read_rows(path):
    return m.json_lines(path, lambda raw, _: raw)


def write_rows(path, rows):
    m.write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def before_speech(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    recordings = copy_recordings(args) if args.speech else []
    train, candidates, drops = draw(args)
    for k, engine in enumerate(ENGINES):
        rows = []
        for row in train[k::len(ENGINES)]:
            rows.append({"id": row["id"], "prompt": row["prompt"], "reference": row["reference"][0]})
        write_rows(out / f"train-{engine}.jsonl", rows)
    answered = answer_all(args, candidates)
    asked = choose_sets(answered, args.least)
    write_rows(out / "questions.jsonl", answered)
    write_rows(out / "dropped.jsonl", drops)
    spoken = {"heard": [], "unheard": []}
    for row in asked:
        said = {key: row[key] for key in ("id", "prompt", "response", "finish")}
        spoken["heard"].append(said)
        spoken["unheard"] += [said] if row["right"] else []
    for name, rows in spoken.items():
        write_rows(out / f"ask-{name}.jsonl", rows)
    counts = collections.Counter(row["split"] for row in answered if row["right"])
    why = collections.Counter(drop["reason"] for drop in drops)
    print(f"{len(train)} prompts to train on; {len(answered)} candidates, of which the teacher answers {sum(counts.values())} right "
          f"(dev {counts['dev']}, test {counts['test']}); {len(recordings)} rows of recordings; dropped: {dict(why)}")


def after_speech(args):
    """Dialogue rows that have both answers, so that all runs read the same ones; those of fewer prompts are among those of more."""
    for engine in ENGINES:
        source, rows = Path(args.out) / engine / "train.jsonl", []
        for row in read_rows(source):
            rows += [row] if row.get("reference") and row.get("response") else []
        if not rows:
            raise ValueError(f"{source}: no row has reference and response; expected the manifest of tools/result_data.sh")
        write_rows(source.with_name("both-train.jsonl"), rows)
        prompts = sorted({row["prompt"] for row in rows}, key=rank_of)
        for count in PARTS:
            some = set(prompts[:count // len(ENGINES)])
            if len(some) < len(prompts):
                write_rows(source.with_name(f"both-train-{count}.jsonl"), [row for row in rows if row["prompt"] in some])
        print(f"{engine}: {len(rows)} rows with both answers")


def answer_again(args):
    """Another teacher's answers in place of those in a copy of the folder. Of the questions that are spoken, those that it answers
    right are the retention set: fewer of them in unheard voices, which say what the first teacher answered right."""
    out, prompts = Path(args.out), {}
    rows_of = {out / name / "train.jsonl": read_rows(out / name / "train.jsonl") for name in SPOKEN}
    rows_of[out / "questions.jsonl"] = [row for row in read_rows(out / "questions.jsonl") if row.get("sets")]  # these are spoken
    for rows in rows_of.values():
        for row in rows:
            prompts[row["prompt"]] = {"id": row["prompt"], "prompt": row["prompt"], "audio": None}
    teacher = functools.cache(lambda: synth.load_teacher(args))
    records = vb.answer_all(args, "teacher", list(prompts.values()), lambda rows: synth.answer(*teacher(), rows, NEW_TOKENS),
                            vb.weights_of(args.teacher))
    answers = {record.pop("id"): record for record in records}
    for path, rows in rows_of.items():
        rows = [{**row, **answers[row["prompt"]]} for row in rows]
        for row in rows if path.name == "questions.jsonl" else []:
            row["right"] = vb.qa_match(row["response"], row["reference"])
            row["sets"] = ["spoken"] + ["retention"] * row["right"] + ["all"] * ("all" in row["sets"])
        write_rows(path, rows)
    questions = read_rows(out / "questions.jsonl")
    right = collections.Counter(row["split"] for row in questions if row["right"])
    print(f"of {len(questions)} spoken questions the teacher answers {sum(right.values())} right (dev {right['dev']}, test {right['test']})")
    after_speech(args)


if __name__ == "__main__":
    try:
        args = get_args()
        {"questions": before_speech, "both": after_speech, "answers": answer_again}[args.step](args)
    except (ValueError, RuntimeError, OSError) as error:
        print("result_data.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
