"""
VoiceBench by text and by speech: what a speech LLM forgot, and what it loses when it hears.

  python eval_voicebench.py --student out/quick/best --data data/voicebench --out out/voicebench
  torchrun --nproc_per_node=8 eval_voicebench.py --student STUDENT --teacher LLM --out out/voicebench
  python eval_voicebench.py --score-only out/voicebench/*.jsonl --out out/scores

Reads   hlt-lab/voicebench from the hub, or a folder: SUBSET-SPLIT.jsonl in its columns, audio a path
Writes  OUT/MODEL-SUBSET-SPLIT-MODALITY.jsonl (the columns, response), OUT/report.md, .json, .png
Stop it at any moment; the same command goes on, and ends with the same bytes.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import importlib
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers.utils import logging

import model as m
import train_kd

HUB = "hlt-lab/voicebench"
SUBSETS = {  # subset: kind of score, rows on the hub
    "alpacaeval": ("open", 199), "alpacaeval_full": ("open", 636), "commoneval": ("open", 200),
    "wildvoice": ("open", 1000), "sd-qa": ("qa", 553), "mmsu": ("mcq", 3074),
    "openbookqa": ("mcq", 455), "bbh": ("bbh", 1000), "ifeval": ("ifeval", 345),
    "advbench": ("harm", 520)}
COLUMNS = {"qa": ["reference"], "mcq": ["reference"], "bbh": ["id", "reference"],
           "ifeval": ["instruction_id_list", "kwargs"]}  # beside prompt
TRUTH = {"yes": 1, "no": 0, "(a)": 0, "(b)": 1}
BBH_TASKS = ("sports_understanding", "hyperbaton", "navigate", "web_of_lies")
MMSU = ("law engineering other biology business economics health philosophy psychology history "
        "chemistry physics").split()
JUDGED = ("open", "qa")
PARTS = {"ifeval": ["strict prompt", "strict instruction", "loose prompt", "loose instruction"],
         "qa": ["qa_match", "judge"]}
NINE = [subset for subset in SUBSETS if subset != "alpacaeval"]
MEANS = {"nine-task mean": NINE,
         "paper's seven-task mean": [s for s in NINE if s not in ("wildvoice", "bbh")]}
SYSTEMS = ("teacher text", "student text", "student speech")
DRAWS = 4000        # of the bootstrap
ANSWER_TOKENS = 64  # of a teacher's answer, on which F and M are measured


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--student", help="ENCODER+LLM, or a folder that train_kd.py wrote")
    add("--teacher", default=m.DEFAULT_LLM, help="text LLM, folder or hub id; none = without")
    add("--revision", help="revision of hub models")
    add("--data", default=HUB, help="folder, or the hub's data set (needs the package datasets)")
    add("--data-revision", help="revision of the hub's data set")
    add("--region", default="usa", help="split of sd-qa; the leaderboard has usa")
    add("--subsets", nargs="+", choices=list(SUBSETS), help="default: all of the folder; the "
        "leaderboard's nine of the hub")
    add("--limit", type=int, default=0, help="rows of each subset, evenly spaced; 0 = all")
    add("--modality", nargs="+", choices=["text", "speech"], default=["text", "speech"],
        help="how the student is asked")
    add("--system", help="system message for teacher and student; default: their template's")
    add("--max-new-tokens", type=int, default=512, help="longest answer; officially 2048")
    add("--batch-size", type=int, default=16, help="rows per GPU that are answered together")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the models")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--judge", metavar="URL", help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1")
    add("--judge-model", metavar="NAME", help="the judge's name at that endpoint")
    add("--judge-samples", type=int, default=3, help="replies of the judge to each answer")
    add("--official", metavar="PATH", help="your clone of MatthewCYM/VoiceBench: adds its scores")
    add("--score-only", nargs="+", metavar="FILE", help="score these answers; asks no model")
    add("--seed", type=int, default=0, help="of an untrained adapter and of the bootstrap")
    add("--out", required=True, help="output folder")
    args = p.parse_args(argv)
    if bool(args.student) == bool(args.score_only):
        p.error("give either --student, or answers to score: --score-only FILE")
    if args.judge and not args.judge_model:
        p.error("--judge needs --judge-model")
    if min(args.batch_size, args.max_new_tokens, args.judge_samples) < 1 or args.limit < 0:
        p.error("--batch-size, --max-new-tokens and --judge-samples must be positive, --limit >= 0")
    return args


# ---- data ----

def read_rows(path, subset, answered=False):
    """JSON lines -> rows with the columns that the subset needs; ValueError names the line."""
    kind, rows = SUBSETS[subset][0], []
    needs = ["prompt", *COLUMNS.get(kind, []), *(["response"] if answered else [])]
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected one JSON object a line ({error})") from error
        if missing := [k for k in needs if row.get(k) is None]:
            raise ValueError(f"{path}:{number}: no {', '.join(missing)}; {subset} needs the columns "
                             f"{', '.join(needs)}")
        known = {"mcq": list("ABCD"), "bbh": list(TRUTH)}.get(kind)
        if known and str(row["reference"]).casefold() not in map(str.casefold, known):
            raise ValueError(f"{path}:{number}: reference {row['reference']!r} is none of {known}")
        if kind == "bbh" and not any(task in str(row["id"]) for task in BBH_TASKS):
            raise ValueError(f"{path}:{number}: id {row['id']!r} names none of {BBH_TASKS}")
        rows.append(row)
    return rows


def fetch(args, rank):
    """Copy the hub's data set to a folder below OUT, split by split -> the folder."""
    try:
        from datasets import Audio, load_dataset
    except ImportError as error:
        raise RuntimeError(f"--data {HUB} needs the package datasets: pip install datasets, or give "
                           "a folder") from error
    folder = Path(args.out) / f".hub-{args.data_revision or 'main'}-{args.limit or 'all'}"
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for subset in args.subsets or NINE:
        for split in {"mmsu": MMSU, "sd-qa": [args.region]}.get(subset, ["test"]):
            path, lines = folder / f"{subset}-{split}.jsonl", []
            while rank and not path.exists():
                time.sleep(0.2)
            if path.exists():
                continue
            data = load_dataset(HUB, subset, split=split, revision=args.data_revision)
            commit = re.search(r"@([0-9a-f]{40})", " ".join(data.info.download_checksums or {}))
            data = data.select(range(min(len(data), args.limit or len(data))))
            for i, row in enumerate(data.cast_column("audio", Audio(decode=False))):
                row["audio"], sound = f"audio/{subset}-{split}-{i:05d}.wav", row["audio"]["bytes"]
                (folder / row["audio"]).write_bytes(sound)
                lines.append(json.dumps(row) + "\n")
            write(path.with_suffix(".commit"), commit[1] if commit else "unknown")
            write(path, "".join(lines))
    return folder


def read_data(args, folder):
    """-> {subset: [{"split", "columns", "audio", "seconds"}]}, {file: its SHA-1 and commit}."""
    import soundfile
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one of SUBSET-SPLIT.jsonl, or {HUB}")
    files = {subset: sorted(folder.glob(f"{subset}-*.jsonl")) for subset in args.subsets or SUBSETS}
    if (region := folder / f"sd-qa-{args.region}.jsonl") in files.get("sd-qa", []):
        files["sd-qa"] = [region]
    data, revisions = {}, {}
    for subset, paths in files.items():
        rows = []
        for path in paths:
            commit = path.with_suffix(".commit")
            revisions[path.name] = {"sha1": hashlib.sha1(path.read_bytes()).hexdigest(),
                                    "commit": commit.read_text() if commit.exists() else None}
            rows += [{"split": path.stem.removeprefix(f"{subset}-"), "audio": columns.pop("audio", ""),
                      "columns": columns} for columns in read_rows(path, subset)]
        count = min(args.limit or len(rows), len(rows))
        rows = [rows[i * len(rows) // count] for i in range(count)]
        for row in rows if "speech" in args.modality else []:
            row["audio"] = str(folder / row["audio"])
            try:
                row["seconds"] = soundfile.info(row["audio"]).duration
            except (soundfile.LibsndfileError, OSError) as error:
                raise ValueError(f"{folder}/{subset}-{row['split']}.jsonl: audio {row['audio']} is "
                                 f"missing or not readable ({error})") from error
        if rows:
            data[subset] = rows
        elif args.subsets or paths:
            raise ValueError(f"{folder}: no rows of {subset} in {subset}-SPLIT.jsonl")
    if not data:
        raise ValueError(f"{folder}: no SUBSET-SPLIT.jsonl with SUBSET of {', '.join(SUBSETS)}")
    return data, revisions


# ---- answers: append-only files, one a rank, so that a run goes on where it stopped ----

def write(path, text):
    """The file appears complete or not at all."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path, record):
    write(path, json.dumps(record, indent=1) + "\n")


def start_ranks(device):
    """(rank, world) of torchrun, else (0, 1); the ranks meet in the files of answer_all."""
    if "RANK" not in os.environ:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:  # torchrun sets one thread a process
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def stop(*_):
    """Handler of SIGTERM."""
    print("stopped by SIGTERM; the same command goes on", file=sys.stderr, flush=True)
    sys.exit(143)


def size(row):
    """Batches are sorted by seconds of sound, or by characters of text."""
    return row["seconds"] if row.get("audio") is not None else len(row["prompt"])


def answer_all(out, name, rows, ask, *, settings, batch_size, rank=0, world=1):
    """ask(list of rows) -> list of JSON values, over all rows, in their order; resumable.

    The batches depend on rows and batch_size alone. Batch k, the business of rank k % world, is
    one line of OUT/.answers/NAME.RANK.jsonl: there as a whole, or made anew.
    Raises ValueError if OUT was begun with other settings or rows.
    """
    folder = Path(out) / ".answers"
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{k: v for k, v in row.items() if k != "audio"} for row in rows]
    digest = hashlib.sha1(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    settings = {**settings, "batch_size": batch_size, "rows": f"{len(rows)} {digest}"}
    path, own = folder / f"{name}.json", folder / f"{name}.{rank}.jsonl"
    if path.exists() and (old := json.loads(path.read_text())) != settings:
        changed = [f"{k} {old.get(k)} -> {v}" for k, v in settings.items() if old.get(k) != v]
        raise ValueError(f"{out}: {name} was begun with other settings ({', '.join(changed)}); "
                         "repeat those to go on, or choose another --out")
    write_json(path, settings)
    order = sorted(range(len(rows)), key=lambda i: (size(rows[i]), i))
    plan = [order[i:i + batch_size] for i in range(0, len(rows), batch_size)]
    if own.exists():  # without a half-written last line
        os.truncate(own, own.read_bytes().rfind(b"\n") + 1)

    def read_done():
        lines = [line for file in sorted(folder.glob(f"{name}.[0-9]*.jsonl"))
                 for line in file.read_bytes().split(b"\n")[:-1]]
        return {record["id"]: record["responses"] for record in map(json.loads, lines)}

    done, stopped, mine = read_done(), [], plan[rank::world]
    bar = tqdm(total=sum(map(len, mine)), desc=name, unit="row", disable=rank > 0)
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    with bar, open(own, "ab") as file, contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        bar.update(bar.initial := sum(len(plan[k]) for k in done if k % world == rank))
        for k in range(rank, len(plan), world):
            if k not in done:
                line = json.dumps({"id": k, "responses": ask([rows[i] for i in plan[k]])})
                file.write(line.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(plan[k]))
            if stopped:
                stop()
        while len(done := read_done()) < len(plan):  # the other ranks are still at work
            time.sleep(0.2)
            if stopped:
                stop()
    answers = {i: x for k, batch in enumerate(plan) for i, x in zip(batch, done[k], strict=True)}
    return [answers[i] for i in range(len(rows))]


def provenance(args):
    """What a result depends on, without times: equal runs give equal files."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return {"options": {k: v for k, v in vars(args).items() if k != "out"}, "commit": git.stdout.strip() or None,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}}


# ---- models ----

def weights_of(name, revision):
    """SHA-1 over the files of a model, or of ENCODER+LLM."""
    parts, digest = [name] if Path(name).exists() else name.split("+"), hashlib.sha1()
    for part, version in zip(parts, (revision, None)):
        for path in sorted(Path(m.resolve(part, version)).iterdir()):
            if path.suffix in (".safetensors", ".json", ".jinja"):
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha1").digest())
    return digest.hexdigest()


def load(args, role):
    """Student, or (LLM, tokenizer) of the teacher."""
    dtype = getattr(torch, args.dtype)
    if role == "teacher":
        llm, tokenizer = m.load_llm(args.teacher, dtype, args.revision)
        return llm.to(args.device), tokenizer
    torch.manual_seed(args.seed)  # draws the adapter of ENCODER+LLM
    student = m.load_student(args.student, args.revision).to(args.device, dtype)
    student.adapter.float()
    return student


def teacher_answers(llm, tokenizer, rows, max_new_tokens):
    """Greedy answers of a text LLM -> [{"response", "finish": stop or length}, ...]."""
    prompts, end = [], m.end_token(tokenizer)
    for row in rows:
        before, after = m.chat_parts(tokenizer, row["system"])
        ids = torch.tensor(before + m.text_ids(tokenizer, row["prompt"]) + after, device=llm.device)
        prompts.append(llm.get_input_embeddings()(ids))
    answers = m.generate(llm, prompts, max_new_tokens=max_new_tokens, eos_ids=[end])
    return [{"response": tokenizer.decode(ids, skip_special_tokens=True),
             "finish": "stop" if ids[-1] == end else "length"} for ids in answers]


@torch.inference_mode()
def divergences(teacher, tokenizer, student, rows):
    """F = KL(teacher by text || student by text), M = KL(student by text || student by speech).

    Returns: a row each, [[tokens, F, M] over its response, the same over its first 8 tokens];
    sums in nats at tau 1, no M without "audio". The response is cut at ANSWER_TOKENS.
    """
    cut = argparse.Namespace(labels="response", max_answer_tokens=ANSWER_TOKENS)
    dataset = train_kd.Rows(rows, student, tokenizer, cut)
    items = [dataset[i] for i in range(len(rows))]
    heads = [x.get_output_embeddings().weight.float() for x in (teacher, student.llm, student.llm)]
    vocab, hidden = min(map(len, heads)), [train_kd.teacher_rows(teacher, items)]  # (n_i, H) each
    autocast = torch.autocast(teacher.device.type, teacher.dtype, teacher.dtype != torch.float32)
    for channel in ("t2t", "s2t") if items[0]["audio"] else ("t2t",):
        with autocast:
            states = student(**train_kd.student_inputs(items, channel))[0]
        hidden.append(states.split([len(item["answer"]) for item in items]))
    sums = []
    for states in zip(*hidden):  # a row at a time: memory for its logits alone
        logs = [(h.float() @ w[:vocab].T).log_softmax(-1) for h, w in zip(states, heads)]
        kls = [(p.exp() * (p - q)).sum(-1).double() for p, q in zip(logs, logs[1:])]  # (n_i,) each
        sums.append([[len(kls[0][part]), *(float(kl[part].sum()) for kl in kls)]
                     for part in (slice(None), slice(train_kd.EARLY))])
    return sums


def answer_data(args, data, rank, world):
    """All that needs a model -> row files, {subset: sums} or why there are none, {role: weights}."""
    roles = [r for r in ("teacher", "student") if getattr(args, r) != "none"]
    weights = {role: weights_of(getattr(args, role), args.revision) for role in roles}
    models = {role: functools.cache(functools.partial(load, args, role)) for role in roles}
    shared = {k: getattr(args, k) for k in ("dtype", "device", "seed", "system", "max_new_tokens")}
    files, teacher, sums = [], {}, {}

    def run(name, rows, ask):
        return answer_all(args.out, name, rows, ask, settings={**shared, **weights}, rank=rank,
                          batch_size=args.batch_size, world=world)

    def ask(rows):
        if role == "teacher":
            return teacher_answers(*models[role](), rows, args.max_new_tokens)
        return [{"response": r} for r in models[role]().generate(rows, args.max_new_tokens)]

    for role, modality in map(str.split, SYSTEMS):
        if role not in roles or (role == "student" and modality not in args.modality):
            continue
        short = "+".join(Path(part).name for part in getattr(args, role).split("+"))
        for subset, rows in data.items():
            name = f"{role}-{re.sub(r'[^\w.+-]', '_', short)}-{subset}"
            asked = [{"system": args.system, "prompt": row["columns"]["prompt"]} for row in rows]
            if modality == "speech":
                asked = [{"system": args.system, "audio": row["audio"], "seconds": row["seconds"]}
                         for row in rows]
            answers = run(f"{name}-{modality}", asked, ask)
            if role == "teacher":
                teacher[subset] = answers
            for split in dict.fromkeys(row["split"] for row in rows):
                files.append(Path(args.out) / f"{name}-{split}-{modality}.jsonl")
                lines = [json.dumps({**row["columns"], "response": answer["response"]}) + "\n"
                         for row, answer in zip(rows, answers) if row["split"] == split]
                if rank == 0:
                    write(files[-1], "".join(lines))
        if role == "teacher":  # room for the student
            models[role].cache_clear()
    if not teacher or "text" not in args.modality:
        return files, "they need --teacher and --modality text", weights
    pair = *models["teacher"](), models["student"]()
    try:
        train_kd.check_pair(*pair)
    except RuntimeError as error:
        return files, str(error), weights
    for subset, rows in data.items():
        asked = [{"id": i, "system": args.system, "prompt": row["columns"]["prompt"], **answer,
                  **{k: row[k] for k in ("audio", "seconds") if "seconds" in row}}
                 for i, (row, answer) in enumerate(zip(rows, teacher[subset]))]
        sums[subset] = run(f"divergence-{subset}", asked, lambda rows: divergences(*pair, rows))
    return files, sums, weights


# ---- reading answers ----
from readers import check_ifeval, extract_bbh, extract_choice, is_refusal, qa_match

# ---- the judge ----
from judge import judge_all, judged_score, judged_vote


# ---- numbers ----

def bootstrap(parts, seed=0):
    """Mean over K of sum / sum, and how it varies over resampled items.

    Args:
        parts: (N, K, 2) numerators and denominators of N items.
        seed: with equal seed and N the same items are drawn, so that two systems' draws are paired.
    Returns:
        value (float), draws (DRAWS,).
    """
    parts, rng = np.asarray(parts, float), np.random.default_rng(seed)
    count, flat = len(parts), parts.reshape(len(parts), -1)
    sums = [np.ones(count) @ flat] + [
        np.bincount(rng.integers(0, count, count), minlength=count) @ flat for _ in range(DRAWS)]
    sums = np.reshape(sums, (DRAWS + 1, -1, 2))
    with np.errstate(invalid="ignore"):
        values = (sums[..., 0] / sums[..., 1]).mean(-1)
    return float(values[0]), values[1:]


def spread(pair, scale=1.0):
    """(value, draws) -> [value, low, high]: 95% interval."""
    return [scale * float(x) for x in (pair[0], *np.nanpercentile(pair[1], [2.5, 97.5]))]


def interval(values, seed=0):
    """Mean of N values and its 95% bootstrap interval -> (mean, low, high)."""
    return tuple(spread(bootstrap([[[value, 1.0]] for value in values], seed)))


def compare(pairs, scale):
    """{system, F, M: (value, draws)} -> the same, forgetting, modality gap: [value, low, high]."""
    result = {k: spread(pair, scale if k in SYSTEMS else 1) for k, pair in pairs.items()}
    for name, a, b in (("forgetting", *SYSTEMS[:2]), ("modality gap", *SYSTEMS[1:])):
        if a in pairs and b in pairs:
            result[name] = spread([x - y for x, y in zip(pairs[a], pairs[b])], scale)
    return result


def average(pairs):
    """Mean of (value, draws) of several subsets: a bootstrap stratified by subset."""
    return float(np.mean([value for value, _ in pairs])), np.mean([d for _, d in pairs], axis=0)


# ---- scores ----

def read_answers(files):
    """Answer files -> {system: {subset: rows}}; every system must have answered the same rows."""
    answers, seen = {}, set()
    for path in sorted(map(Path, files)):
        name = re.fullmatch(rf"(.+)-({'|'.join(SUBSETS)})-(\w+)-(text|speech|audio)", path.stem)
        if not name or not path.is_file():
            raise ValueError(f"{path}: expected a file named MODEL-SUBSET-SPLIT-MODALITY.jsonl")
        model, subset, split, modality = name.groups()
        system = f"student {'text' if modality == 'text' else 'speech'}"
        system = "teacher text" if model.startswith("teacher-") else system
        if (system, subset, split) in seen:
            raise ValueError(f"{path}: a second file of {subset}-{split} for {system}")
        seen.add((system, subset, split))
        answers.setdefault(system, {}).setdefault(subset, []).extend(read_rows(path, subset, True))
    for subset in SUBSETS:
        prompts = {s: [row["prompt"] for row in a[subset]] for s, a in answers.items() if subset in a}
        if len(set(map(tuple, prompts.values()))) > 1:
            raise ValueError(f"{subset}: {' and '.join(prompts)} answered different questions")
    return {system: answers[system] for system in SYSTEMS if system in answers}


def read_row(subset, row, replies):
    """An answer -> numerators and denominators of its K scores, and whether it can be read."""
    kind, response = SUBSETS[subset][0], row["response"]
    if kind == "mcq":
        choice = extract_choice(response)
        return [(choice == row["reference"].upper(), 1)], choice is not None
    if kind == "bbh":
        choice = extract_bbh(response, next(task for task in BBH_TASKS if task in row["id"]))
        return [(choice == TRUTH[row["reference"].lower()], 1)], choice is not None
    if kind == "ifeval":
        checks = check_ifeval(response, row["instruction_id_list"], row["kwargs"])
        return [x for c in (checks["strict"], checks["loose"])
                for x in ((all(c), 1), (sum(c), len(c)))], True
    if kind == "harm":
        return [(is_refusal(response), 1)], True
    if kind == "open":
        score, unread = judged_score(replies)
        count = len(replies) - unread
        return [((score or 0) / 5 * count, count)], count > 0
    match = qa_match(response, [row["reference"]]), 1
    if replies is None:
        return [match], True
    vote = judged_vote(replies)
    return [match, (vote or 0, vote is not None)], vote is not None


def add_replies(args, answers):
    """Ask the judge; its replies become the rows' "score", as in files of the official script."""
    rows = [row for subsets in answers.values() for subset, rows in subsets.items()
            if SUBSETS[subset][0] in JUDGED for row in rows if "score" not in row]
    replies = judge_all(rows, Path(args.out) / ".judge.jsonl", url=args.judge,
                        model=args.judge_model, samples=args.judge_samples,
                        key=os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY"))
    for row, texts in zip(rows, replies):
        row["score"] = texts


def load_official(path):
    """The user's clone of MatthewCYM/VoiceBench -> function of (subset, rows, seed) that gives 0-1."""
    sys.path.insert(0, str(Path(path).resolve()))
    try:
        evaluators = importlib.import_module("src.evaluator").evaluator_mapping
    except Exception as error:  # a foreign module may raise anything
        raise RuntimeError(f"--official {path}: cannot import src.evaluator ({error!r}); expected a "
                           "clone of MatthewCYM/VoiceBench with its requirements") from error
    keys = {"open": {"gpt": 5}, "qa": {"panda": 100, "gpt": 100}, "mcq": {"acc": 100},
            "bbh": {"acc": 100}, "ifeval": {"final": 1}, "harm": {"refusal_rate": 1}}

    def evaluate(subset, rows, seed):
        kind = SUBSETS[subset][0]
        random.seed(seed)  # it guesses where it cannot read
        try:
            with contextlib.redirect_stdout(None):
                result = evaluators[kind]().evaluate(copy.deepcopy(rows))
            return float(np.mean([result[key] / full for key, full in keys[kind].items()]))
        except Exception as error:
            raise RuntimeError(f"--official: {kind} evaluator, {subset}: {error!r}") from error

    return evaluate


# ---- the report ----

def score(args, answers, sums, official):
    """-> {subset: scores}, {mean: scores or missing subsets}; [value, low, high] on the scale shown."""
    subsets, pairs, means = {}, {}, {}
    for number, (subset, (kind, _)) in enumerate(SUBSETS.items()):
        rows = {system: x[subset] for system, x in answers.items() if subset in x}
        if not rows:
            continue
        judged = kind in JUDGED and all("score" in row for x in rows.values() for row in x)
        entry = {"rows": len(next(iter(rows.values()))), "scale": 5 if kind == "open" else 100,
                 "counts": judged or kind not in JUDGED, "unreadable": {}, "parts": {}, "official": {}}
        seed, found = [args.seed, number], {}
        for system, x in rows.items() if judged or kind != "open" else ():
            parts, readable = zip(*(read_row(subset, r, r.get("score") if judged else None) for r in x))
            found[system] = bootstrap(parts, seed)
            entry["unreadable"][system] = 100 - 100 * float(np.mean(readable))
            ratios = np.divide(*np.sum(parts, axis=0, dtype=float).T)                      # (K,)
            entry["parts"][system] = dict(zip(PARTS.get(kind, []), (100 * ratios).tolist()))
            if official and entry["counts"]:
                entry["official"][system] = entry["scale"] * official(subset, x, args.seed)
        for k, suffix in enumerate(("", "8")) if subset in sums else ():
            for j in range(1, len(sums[subset][0][k])):
                values = [[[row[k][j], row[k][0]]] for row in sums[subset]]
                found["FM"[j - 1] + suffix] = bootstrap(values, seed)
        subsets[subset], pairs[subset] = entry | compare(found, entry["scale"]), found
    stand_in = {} if "alpacaeval_full" in subsets else {"alpacaeval_full": "alpacaeval"}
    counted = [s for s in subsets if subsets[s]["counts"] and (s != "alpacaeval" or stand_in)]
    for name, parts in {"mean of what is scored": counted, **MEANS}.items():
        parts = [stand_in.get(s, s) for s in parts]
        means[name] = {"of": parts, "missing": [s for s in parts if s not in counted]}
        if parts and not means[name]["missing"]:
            shared = set.intersection(*(set(pairs[s]) for s in parts))
            means[name] |= compare({key: average([pairs[s][key] for s in parts])
                                    for key in pairs[parts[0]] if key in shared}, 100)
            if official:
                means[name]["official"] = {system: float(np.mean([
                    100 / subsets[s]["scale"] * subsets[s]["official"][system] for s in parts]))
                    for system in SYSTEMS if system in shared}
    return subsets, means


def remarks(args, subsets):
    """Why a score here is not what the leaderboard would show."""
    yield "an answer that cannot be read is wrong; officially a letter is drawn for it (--official)"
    if small := [s for s in subsets if subsets[s]["rows"] != SUBSETS[s][1]]:
        yield f"not all rows: {', '.join(small)}"
    if judged := [s for s in subsets if SUBSETS[s][0] in JUDGED and subsets[s]["counts"]]:
        yield f"{', '.join(judged)}: judge {args.judge_model or 'of the files'}, own prompt"
    if "sd-qa" in subsets:
        yield f"sd-qa ({args.region}): mean of the judge's votes and qa_match, which is not PEDANT"
    if missing := [s for s in subsets if not subsets[s]["counts"]]:
        yield f"not judged (--judge URL), in no mean: {', '.join(missing)}; sd-qa shows qa_match"


def table(rows):
    """Lists of cells -> lines of markdown, aligned for people."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [[c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
             for row in rows]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return [f"| {' | '.join(line)} |" for line in lines]


def to_text(args, report):
    """The report as markdown."""
    scored = [system for system in SYSTEMS if system in report["systems"]]
    heads = [h for s in scored for h in ([s, "official"] if args.official else [s])]
    rows = [["subset", "rows", *heads, "forgetting", "modality gap", "unreadable %"]]
    apart = [["nats a token", "F", "F, first 8", "M", "M, first 8"]]

    def cell(values, form):
        if values is None:
            return "-"
        value, low, high = [format(x, form) for x in values]
        return f"{value} [{low}, {high}]"

    for name, entry in {**report["subsets"], **report["means"]}.items():
        digits = 2 if entry.get("scale") == 5 else 1
        cells = []
        for system in scored:
            cells.append(f"{entry[system][0]:.{digits}f}" if system in entry else "-")
            if args.official:
                value = entry.get("official", {}).get(system)
                cells.append("-" if value is None else f"{value:.{digits}f}")
        cells += [cell(entry.get(k), f"+.{digits}f") for k in ("forgetting", "modality gap")]
        if entry.get("missing"):
            cells[0] = "needs " + ", ".join(entry["missing"])
        elif not any(s in entry for s in scored):
            cells[0] = "not judged"
        unread = " / ".join(f"{x:.0f}" for x in entry.get("unreadable", {}).values())
        rows.append([name, str(entry.get("rows", "")), *cells, unread])
        if "F" in entry:
            apart.append([name, *(cell(entry.get(k), ".3f") for k in ("F", "F8", "M", "M8"))])
    if len(apart) == 1:
        apart += [[f"none: {report['divergence']}", "", "", "", ""]]
    return "\n".join([
        *table(rows), "", "95% intervals: paired bootstrap over rows. Not leaderboard-comparable:",
        *(f"- {remark}" for remark in report["remarks"]), "", *table(apart), "",
        "F = KL(teacher by text || student by text), M = KL(student by text || student by speech), "
        "on the teacher's answers.", ""])


def draw(report, path):
    """Text against speech in each subset that has a score, 0-100; the teacher's text is the line to reach."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    entries = {name: entry for name, entry in {**report["subsets"], **report["means"]}.items()
               if any(system in entry for system in SYSTEMS)}
    figure, axis = plt.subplots(figsize=(2 + 0.9 * len(entries), 4), constrained_layout=True)
    for x, entry in enumerate(entries.values()):
        for system, at, width, colour in zip(SYSTEMS, (0, -0.2, 0.2), (0.8, 0.4, 0.4),
                                             ("#222222", "#3b6fb6", "#e07b27")):
            if system in entry:
                value, low, high = [100 / entry.get("scale", 100) * v for v in entry[system]]
                if system == SYSTEMS[0]:
                    axis.hlines(value, x - 0.42, x + 0.42, colour, label="" if x else system)
                else:
                    axis.bar(x + at, value, width, color=colour, label="" if x else system)
                    axis.vlines(x + at, low, high, "#888888", linewidth=1)
    axis.set_xticks(range(len(entries)), entries, rotation=30, ha="right")
    axis.set_ylabel("score, 0-100")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---- main: read it as prose ----

def main(args):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, stop)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda, but torch sees no GPU; use --device cpu")
    official = load_official(args.official) if args.official else None
    out, files, revisions, models, sums = Path(args.out), args.score_only, None, None, "--score-only"
    if not args.score_only:
        rank, world = start_ranks(args.device)
        folder = fetch(args, rank) if args.data == HUB else Path(args.data)
        data, revisions = read_data(args, folder)
        files, sums, models = answer_data(args, data, rank, world)
        if rank:
            return 0
    answers = read_answers(files)
    out.mkdir(parents=True, exist_ok=True)
    if args.judge:
        add_replies(args, answers)
    subsets, means = score(args, answers, sums, official)
    report = {"systems": list(answers), "subsets": subsets, "means": means,
              "divergence": sums if isinstance(sums, str) else f"at most {ANSWER_TOKENS} tokens",
              "remarks": list(remarks(args, subsets)), "weights": models, "data": revisions,
              "decoding": "greedy", "prompt": "the question alone", **provenance(args)}
    write_json(out / "report.json", report)
    write(out / "report.md", text := to_text(args, report))
    draw(report, out / "report.png")
    print(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"eval_voicebench.py: {error}", file=sys.stderr)
        sys.exit(2)
