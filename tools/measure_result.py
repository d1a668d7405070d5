"""
What a student still knows, by text and by speech, and what it hears: all that the result's tables are made of.

  python tools/measure_result.py out/result/R6/last --data data/result --out out/result/results/R6
  python tools/measure_result.py openai/whisper-base+HuggingFaceTB/SmolLM2-135M-Instruct --data data/result --out out/result/results/start

The untrained student is teacher (by text) and cascade (by speech) in one: its LLM is the teacher, its sound is left out.

Retention: share of the questions that the teacher answers right by text which the student answers right, too (qa_match), by text, in a
voice that is trained on (heard), in voices that never are (unheard), and heard in noise. It can only fall: so accuracy by text over all
candidates and by speech over a draw of them stand beside it, and MRR = that by speech / the teacher's by text. KL8 = KL(teacher by
text || student), nats a token over the first 8 tokens of the teacher's answers; F, M = KL(teacher by text || student by text),
KL(student by text || by speech), over all its tokens; agreement: share of tokens that student and teacher both prefer.
Reads   what tools/result_data.sh made
Writes  OUT/measured.json (every question's number), OUT/answers.jsonl. What is measured by the same weights and rows is not done again;
        what is stopped goes on from OUT/parts.json.
"""
import argparse
import collections
import functools
import hashlib
import json
import sys
import time
import zlib
from pathlib import Path

import torch
from torchaudio.functional import edit_distance
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import compare
import eval_voicebench as vb
import losses
import model as m
import synth_speech as synth
import train_kd
from result_data import rank_of

VERSION = 2             # of what is measured: another one measures all students again
NEW_TOKENS = 24         # of an answer
KL_QUESTIONS = 64       # of the retention set, in each condition
SOUND_ROWS = 96         # of each set of sounds; both answers as often
REPEAT_TOKENS = 48      # of a recording that is repeated
ANSWER_BATCH = 128      # answers generated together: a CPU reads the weights once a token for all of them
KL_BATCH = 20           # rows whose hidden states are there together
EARLY = train_kd.EARLY
SOUNDS = {"heard, piper": "piper/sounds-heldout.jsonl", "heard, espeak": "espeak/sounds-heldout.jsonl",
          "unheard": "unheard-sounds/sounds.jsonl", "recordings": "recordings/sounds.jsonl"}
REPEATED = "recordings/repeated.jsonl"


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("student", help="a folder that train_kd.py wrote, or WHISPER+LLM, untrained")
    p.add_argument("--data", required=True, help="folder that tools/result_data.sh wrote")
    p.add_argument("--split", choices=["test", "dev"], default="test", help="dev is for choices; only test is reported")
    p.add_argument("--noise-db", nargs="+", type=m.number(int, -20, 60), default=[10], help="by speech in white noise, so far below the voice")
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id")
    p.add_argument("--start", default=m.DEFAULT_STUDENT, help="the untrained student, whose Whisper hears for all")
    p.add_argument("--cache", help="what Whisper heard, as of train_kd.py; default: DATA/.cache")
    p.add_argument("--limit", type=m.number(int, 0), default=0, help="use at most so many rows of each set; 0: all of them")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    p.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="of noise and bootstrap")
    p.add_argument("--out", required=True, help="output folder")
    args = p.parse_args(argv)
    args.cache = args.cache or str(Path(args.data, ".cache"))
    args.labels, args.max_answer_tokens, args.channels = "response", NEW_TOKENS, ["t2t", "s2t"]  # of train_kd.make_item
    return args


# ---- what is measured already ----

def key_of(args):
    """Changes with the weights, the rows and the options that a number depends on."""
    data, digests = Path(args.data), {}
    for path in sorted([*data.glob("*/*.jsonl"), data / "questions.jsonl"]):
        if path.stem.endswith("-rollouts"):  # which tools/rollouts.py adds
            continue
        if not path.is_file():
            raise ValueError(f"{path}: no such file; expected the folder that `bash tools/result_data.sh` writes")
        digests[str(path.relative_to(data))] = m.digest(path)
    options = [VERSION, args.split, args.noise_db, args.limit, args.device, args.seed]
    weights = [vb.weights_of(name) for name in (args.student, args.teacher, args.start)]
    return hashlib.sha256(json.dumps([digests, options, weights]).encode()).hexdigest()


def is_measured(args):
    path = Path(args.out) / "measured.json"
    return path.exists() and json.loads(path.read_text()).get("key") == key_of(args)


# ---- hearing ----

def noisy(waveform, snr_db, seed):
    """Waveform (S,) with white noise so many dB below it; the same for the same seed."""
    noise = torch.randn(len(waveform), generator=torch.Generator().manual_seed(seed))
    level = waveform.square().mean().sqrt() * 10 ** (-snr_db / 20)
    mixed = waveform + level * noise
    return mixed / max(1.0, float(mixed.abs().max()))


def hear_noisy(args, student, rows, snr_db):
    """As train_kd.hear_all: every clip once, each with noise of its own -> function from a row to what was heard of it."""
    folder, digest = Path(args.cache, train_kd.fingerprint(student.whisper, "noise", args.seed, snr_db)), functools.cache(m.digest)

    def compute(batch):
        waveforms = []
        for row in batch:
            seed = zlib.crc32(f"{args.seed} {digest(row['audio'])}".encode())
            waveforms.append(noisy(m.load_audio(row["audio"]), snr_db, seed))
        for row, heard in zip(batch, student.hear(waveforms, [row.get("language") for row in batch])):
            yield row, {"ids": heard.ids, "states": heard.states.half(), "sound": heard.sound.half()}

    kept_of = train_kd.cached(folder, rows, lambda row: f"{digest(row['audio'])} {row.get('language')}", compute, f"hearing at {snr_db} dB")
    return lambda row: student.whisper.heard(**kept_of(row))


def wrong_words(said, understood):
    """Texts and what was made of them -> share of words that are wrong."""
    wrong, words = 0, 0
    for one, other in zip(said, understood):
        one = synth.units(one, "en", {})
        wrong += edit_distance(one, synth.units(other, "en", {}))
        words += len(one)
    return round(wrong / max(1, words), 4)


# ---- rows ----

def read_known(args):
    """Candidates -> {id: row} of a split."""
    rows = m.json_lines(Path(args.data) / "questions.jsonl", lambda raw, _: raw)
    known = {row["id"]: row for row in rows if row["split"] == args.split}
    if not any(row["right"] for row in known.values()):
        raise ValueError(f"{args.data}/questions.jsonl: the teacher answers none of {args.split} right; expected a retention set; "
                         "see tools/result_data.py")
    return known


def own_id(row):
    """The id within its manifest: train_kd.read_manifest puts the folder before it."""
    return row["id"].partition("/")[2]


def read_spoken(args, folder, known, wanted):
    """Rows of a spoken folder that are in the wanted sets, at most --limit of each; those of the retention set first, in an order
    that mixes the sources."""
    rows = [row for row in train_kd.read_manifest(Path(args.data, folder, "train.jsonl"), {}) if own_id(row) in known]
    rows.sort(key=lambda row: (not known[own_id(row)]["right"], rank_of(row["prompt"])))
    kept, counts = [], collections.Counter()
    for row in rows:
        sets = set(known[own_id(row)]["sets"]) & set(wanted)
        if any(not args.limit or counts[name] < args.limit for name in sets):
            kept.append(row)
            counts.update(sets)
    return kept


class Asked:
    """The rows of one condition, e.g. heard, each with its prompts, in the order of the rows."""

    def __init__(self, args, start, tokenizer, rows, heard_of):
        self.rows, self.ids = rows, [own_id(row) for row in rows]
        self.heard = [heard_of(row).text for row in rows]
        [self.questions] = compare.questions_of(args, start, tokenizer, ["set/rows"], heard_of, {"set/rows": rows}).values()


def conditions_of(args, start, tokenizer, known):
    """{heard, unheard, 10 dB, ..., human: Asked}: Whisper hears each clip once, whichever student is measured."""
    heard, unheard = read_spoken(args, "heard", known, ["retention", "all"]), read_spoken(args, "unheard", known, ["retention"])
    human = [row for row in train_kd.read_manifest(Path(args.data, "human/train.jsonl"), {}) if row["response"]][:args.limit or None]
    for folder, rows in (("heard", heard), ("unheard", unheard), ("human", human)):
        if not rows:
            raise ValueError(f"{args.data}/{folder}/train.jsonl: no row of {args.split}; expected what tools/result_data.sh speaks")
    heard_of = train_kd.hear_all(args, start, heard + unheard + human)
    found = {"heard": Asked(args, start, tokenizer, heard, heard_of), "unheard": Asked(args, start, tokenizer, unheard, heard_of)}
    right = [row for row in heard if known[own_id(row)]["right"]]
    for snr_db in args.noise_db:
        found[f"{snr_db} dB"] = Asked(args, start, tokenizer, right, hear_noisy(args, start, right, snr_db))
    return {**found, "human": Asked(args, start, tokenizer, human, heard_of)}


# ---- measuring ----

def answers_to(student, prompts, max_new_tokens=NEW_TOKENS):
    return compare.answers_to(student, prompts, max_new_tokens, ANSWER_BATCH)


@torch.inference_mode()
def follow(student, questions, way):
    """Hidden states that predict the teacher's answers, (N, H): the student hears, or reads, each question."""
    found = []
    for first in range(0, len(questions), KL_BATCH):
        some = questions[first:first + KL_BATCH]
        prompts = [getattr(q, way) for q in some]
        found.append(student(prompts, [q.item["answer"] for q in some]))
    return torch.cat(found)


@torch.inference_mode()
def compared(student_side, teacher_side, questions):
    """(LLM, hidden states (N, H)) of both sides -> what each question's tokens say: {"kl8": means over the first 8, "kl": sums,
    "agreement": sums, "tokens"}, lists in the order of the questions."""
    (llm, hidden), (teacher, taught) = student_side, teacher_side
    kl, agree, _ = losses.token_kl(
        student_hidden=hidden, student_weight=llm.get_output_embeddings().weight, student_logit_scale=m.logit_scale(llm),
        teacher_hidden=taught, teacher_weight=teacher.get_output_embeddings().weight, teacher_logit_scale=m.logit_scale(teacher))
    lengths = [len(q.item["answer"]) for q in questions]
    record = {"kl8": [], "kl": [], "agreement": [], "tokens": lengths}
    for kls, agreed in zip(kl.split(lengths), agree.split(lengths)):
        record["kl8"].append(round(float(kls[:EARLY].mean()), 5))
        record["kl"].append(round(float(kls.sum()), 4))
        record["agreement"].append(int(agreed.sum()))
    return record


def divergences(student, teacher, conditions):
    """{set: {text, speech, M: what `compared` gives}}; by text each question once, M where the questions are heard and human."""
    found, items = {}, []
    for asked in conditions.values():
        items += [question.item for question in asked.questions[:KL_QUESTIONS]]
    with torch.inference_mode():
        compare.teach(teacher, items)
    for name, asked in tqdm(conditions.items(), desc="divergences", unit="condition"):
        questions = asked.questions[:KL_QUESTIONS]
        taught = teacher, torch.cat([q.item["taught"] for q in questions])
        by_speech = student.llm, follow(student, questions, "by_speech")
        found[name] = {"ids": asked.ids[:KL_QUESTIONS], "speech": compared(by_speech, taught, questions)}
        if name in ("heard", "human"):
            by_text = student.llm, follow(student, questions, "by_text")
            found[name] |= {"text": compared(by_text, taught, questions), "M": compared(by_speech, by_text, questions)}
    return found


def answers_by_text(student, known):
    """-> {id: answer}, as answers_by_speech."""
    return dict(zip(known, answers_to(student, [student.prompt({"prompt": row["prompt"]}) for row in known.values()])))


def answers_by_speech(student, asked):
    return dict(zip(asked.ids, answers_to(student, [q.by_speech for q in asked.questions])))


def grade(answers, known):
    """Answers -> {retention, all: {condition: {id: 1 = right}}}, "teacher" beside these of all; candidates: {"questions": how many,
    "teacher", "text": ids of those that are right}."""
    retention, every = {}, {"teacher": {}, "text": {}, "heard": {}}
    candidates = {"questions": len(answers["text"]), "teacher": [], "text": []}
    for condition, texts in answers.items():
        for own, text in texts.items():
            row, right = known[own], int(vb.qa_match(text, known[own]["reference"]))
            if row["right"]:
                retention.setdefault(condition, {})[own] = right
            if "all" in row["sets"] and condition in every:
                every[condition][own], every["teacher"][own] = right, int(row["right"])
            if condition == "text":
                candidates["teacher"] += [own] if row["right"] else []
                candidates["text"] += [own] if right else []
    return {"retention": retention, "all": every}, candidates


def controls_of(student, asked, known):
    """Retention questions by another clip, and without any sound: {control: {id: 1 = right}}."""
    questions, found = asked.questions[:KL_QUESTIONS], {}
    for label, way in (("audio left out", "silent"), ("another clip", "other")):
        texts = answers_to(student, [getattr(q, way) for q in questions])
        found[label] = {}
        for own, text in zip(asked.ids, texts):
            found[label][own] = int(vb.qa_match(text, known[own]["reference"]))
    return found


def topic_recall(student, asked):
    """Human-written questions: does the answer name the question's rarest word? {text, speech: [1, 0 or None]}"""
    wanted, found = compare.topics(asked.rows), {}
    answers = {"teacher": [row["response"] for row in asked.rows]}
    for label, way in (("text", "by_text"), ("speech", "by_speech")):
        answers[label] = answers_to(student, [getattr(q, way) for q in asked.questions])
    for label, texts in answers.items():
        found[label] = [int(compare.names(text, topic)) if topic else None for text, topic in zip(texts, wanted)]
    return found


def sounds_of(args, student, start, tokenizer):
    """{set: {kind: [1 = right, word for word]}}; words alone cannot tell, so the untrained student is not asked."""
    found = {}
    if not student.adapter.listens:
        return found
    for name, file in SOUNDS.items():
        path = Path(args.data, file)
        rows = train_kd.read_manifest(path, {})[:args.limit or SOUND_ROWS] if path.exists() else []
        if rows:
            asked = Asked(args, start, tokenizer, rows, train_kd.hear_all(args, start, rows))
            found[name] = {}
            for row, text in zip(rows, answers_to(student, [q.by_speech for q in asked.questions], 6)):
                found[name].setdefault(row["kind"], []).append(int(text.strip() == row["response"]))
    return found


def repeated_of(args, student, start, tokenizer):
    """Recordings of people, to repeat: {"rows", "whisper", "student": share of words that are wrong}; None if there are none."""
    path = Path(args.data, REPEATED)
    if not path.exists():
        return None
    rows = train_kd.read_manifest(path, {})[:args.limit or None]
    asked = Asked(args, start, tokenizer, rows, train_kd.hear_all(args, start, rows))
    said = [row["response"] for row in rows]
    texts = answers_to(student, [q.by_speech for q in asked.questions], REPEAT_TOKENS)
    return {"rows": len(rows), "whisper": wrong_words(said, asked.heard), "student": wrong_words(said, texts)}


# ---- the record ----

def ratio(sums, counts, seed):
    """[value, low, high] of sum / sum over questions."""
    return vb.spread(vb.bootstrap([[pair] for pair in zip(sums, counts)], seed))


def summary_of(record, seed):
    """{what: [value, low, high, n]}: what the tables show of one student by itself."""
    found = {}
    for name, of in record["right"].items():
        for condition, right in of.items():
            found[f"{name}, {condition}"] = [*vb.interval(list(right.values()), seed), len(right)]
    both = record["right"]["retention"]
    gap = [both["text"][own] - both["heard"][own] for own in both["heard"]]
    found["gap, text - heard"] = [*vb.interval(gap, seed), len(gap)]
    every = record["right"]["all"]
    found["MRR"] = [*ratio(every["heard"].values(), [every["teacher"][own] for own in every["heard"]], seed), len(every["heard"])]
    count, teacher, text = (record["candidates"][key] for key in ("questions", "teacher", "text"))
    more = [(own in text) - (own in teacher) for own in sorted({*teacher, *text})]
    found["candidates, text"] = [*vb.interval([1] * len(text) + [0] * (count - len(text)), seed), count]
    found["candidates, text - teacher"] = [*vb.interval(more + [0] * (count - len(more)), seed), count]
    for name, of in record["divergences"].items():
        for side in set(of) & {"text", "speech"}:
            found[f"KL8, {name}, {side}"] = [*vb.interval(of[side]["kl8"], seed), len(of[side]["kl8"])]
            found[f"agreement, {name}, {side}"] = [*ratio(of[side]["agreement"], of[side]["tokens"], seed), len(of[side]["kl8"])]
        for letter, side in (("F", "text"), ("M", "M")):
            if side in of:
                found[f"{letter}, {name}"] = [*ratio(of[side]["kl"], of[side]["tokens"], seed), len(of[side]["kl8"])]
    for label, right in record["controls"].items():
        found[f"retention, {label}"] = [*vb.interval(list(right.values()), seed), len(right)]
    for side, named in record["topics"].items():
        some = [value for value in named if value is not None]
        found[f"topic recall, {side}"] = [*vb.interval(some, seed), len(some)]
    for name, kinds in record["sounds"].items():
        every = [right for answers in kinds.values() for right in answers]
        found[f"sounds, {name}"] = [*vb.interval(every, seed), len(every)]
    rounded = {}
    for what, (*values, count) in sorted(found.items()):
        rounded[what] = [*(round(float(value), 4) for value in values), count]
    return rounded


def kept(args, key, parts):
    """{name: what its function gives}; each is written as soon as it is there, and not asked for again by the same key."""
    path, found = Path(args.out, "parts.json"), {}
    if path.exists():
        found = json.loads(path.read_text())
    if found.get("key") != key:
        found = {"key": key}
    for name, work in tqdm(parts.items(), unit="part"):
        if name not in found:
            found[name] = work()
            m.write_atomically(path, json.dumps(found))
    return {name: found[name] for name in parts}


@torch.inference_mode()
def measure(args, key):
    """-> the record of measured.json, {condition: {id: answer}}; all candidates are read."""
    known = read_known(args)
    start, (teacher, tokenizer) = m.load_student(args.start).to(args.device), m.load_llm(args.teacher)
    teacher.to(args.device)
    student = start if args.student == args.start else m.load_student(args.student).to(args.device)
    conditions = conditions_of(args, start, tokenizer, known)
    read = {own: known[own] for own in conditions["heard"].ids} if args.limit else known
    asked_of = {"text": functools.partial(answers_by_text, student, read)}
    for name, asked in conditions.items():
        if name != "human":
            asked_of[name] = functools.partial(answers_by_speech, student, asked)
    rest = {"divergences": lambda: divergences(student, teacher, conditions),
            "controls": lambda: controls_of(student, conditions["heard"], known),
            "topics": lambda: topic_recall(student, conditions["human"]),
            "sounds": lambda: sounds_of(args, student, start, tokenizer),
            "repeated": lambda: repeated_of(args, student, start, tokenizer)}
    found = kept(args, key, asked_of | rest)
    answers = {name: found[name] for name in asked_of}
    right, candidates = grade(answers, known)
    record = {"right": right, "candidates": candidates, **{name: found[name] for name in rest}, "misheard": {}}
    for name, asked in conditions.items():
        record["misheard"][name] = wrong_words([row["prompt"] for row in asked.rows], asked.heard)
    return record, answers


def main(args):
    key = key_of(args)  # also tells what is missing, before the work
    if is_measured(args):
        print(f"{args.out}/measured.json: the same student was measured on the same rows")
        return
    begun, out = time.perf_counter(), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    record, answers = measure(args, key)
    summary = summary_of(record, args.seed)
    whole = {"key": key, "split": args.split, "seconds": round(time.perf_counter() - begun), "summary": summary, **record,
             **vb.provenance(args)}
    lines = ""
    for own in answers["heard"]:
        lines += json.dumps({"id": own, **{condition: texts[own] for condition, texts in answers.items() if own in texts}}) + "\n"
    m.write_atomically(out / "answers.jsonl", lines)
    m.write_atomically(out / "measured.json", json.dumps(whole) + "\n")
    (out / "parts.json").unlink()
    for what, (value, low, high, count) in summary.items():
        print(f"{what:32} {value:6.3f} [{low:.3f}, {high:.3f}]  n {count}")
    print(f"{out}/measured.json in {whole['seconds']} s")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("measure_result.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
