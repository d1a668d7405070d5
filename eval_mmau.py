"""
Ask a speech LLM the questions of MMAU; score by the official rule, and after reading letters.

  python eval_mmau.py --student out/run/last --data mmau-test-mini.json --out out/mmau
  python eval_mmau.py --score-only out/mmau/predictions.json

Reads   the official JSON, a list of {"id", "audio_id", "question", "choices", "answer", ...}; clips
Writes  OUT/predictions.json, that list with "model_output", as the official evaluation.py reads it
        and as the test split is submitted; OUT/report.json with every item's scores; OUT/report.md
"""
import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path
from string import ascii_uppercase

import torch
from transformers.utils import logging

import model as m
from eval_voicebench import answer_all, interval, provenance, start_ranks, stop, write_json

PROMPT = "{question}  Select one option from the provided choices.\n{choices}."  # the authors'
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au")
TABLES = ("total", "task", "difficulty", "category", "sub-category")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--student", default=m.DEFAULT_STUDENT, help="ENCODER+LLM, or a folder of train_kd.py")
    add("--revision", help="revision of hub models")
    add("--data", help="the official JSON; or a hub data set, gamma-lab-umd/MMAU-test-mini "
        "(needs the package datasets; not run here)")
    add("--data-revision", help="revision of the hub data set")
    add("--audio", help="folder of the clips, searched by file name; default: that of --data")
    add("--out", help="output folder; optional with --score-only")
    add("--score-only", metavar="FILE", help="score this predictions.json, ask nothing")
    add("--only-available", action="store_true", help="leave out items without a clip")
    add("--limit", type=int, default=0, help="the first N items; 0 = all")
    add("--prompt-suffix", default="", help="added to the official prompt, as it is")
    add("--official-denominator", action="store_true",
        help="items without model_output are left out, as officially, instead of wrong")
    add("--batch-size", type=int, default=8, help="items per GPU per forward")
    add("--max-new-tokens", type=int, default=64, help="longest answer; decoding is greedy")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16",
        help="of encoder and LLM; the adapter stays float32")
    add("--seed", type=int, default=0, help="of the intervals, and of an untrained adapter")
    args = p.parse_args(argv)
    if not args.score_only and not (args.data and args.out):
        p.error("--data and --out are required (or --score-only FILE)")
    if min(args.batch_size, args.max_new_tokens) <= 0 or args.limit < 0:
        p.error("--batch-size and --max-new-tokens must be positive, --limit not negative")
    return args


# ---- data ----

def from_hub(name, revision, folder):
    """Hub data set -> path of FOLDER/items.json, which is as the official JSON; its clips beside it.

    On the hub the options carry letters, "(A) Man", and most of an item is one string of JSON.
    """
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(f"{name}: no file, and the hub needs: pip install datasets") from error
    table, items = datasets.load_dataset(name, split="test", revision=revision), []
    folder.mkdir(parents=True, exist_ok=True)
    for row in table.cast_column("context", datasets.Audio(decode=False)):
        item = json.loads(row["other_attributes"])
        answer, *choices = (re.sub(r"^\([A-Z]\) ", "", text or "")
                            for text in (row["answer"], *row["choices"]))
        items.append({**item, "audio_id": f"./test-mini-audios/{item['id']}.wav",
                      "question": row["instruction"], "choices": choices, "answer": answer})
        temporary = folder / f"{item['id']}.{os.getpid()}"  # other ranks write the same
        temporary.write_bytes(row["context"]["bytes"])
        os.replace(temporary, folder / f"{item['id']}.wav")
    write_json(folder / "items.json", items)
    return folder / "items.json"


def read_items(path):
    """JSON file -> items that can be asked; all or none of them have an answer. Else ValueError."""
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        raise ValueError(f"{path}: expected a list of objects, as in mmau-test-mini.json")
    ids, answered = set(), sum(bool(item.get("answer")) for item in items)
    for number, item in enumerate(items, 1):
        where, choices = f"{path}: item {number}", item.get("choices")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
            raise ValueError(f"{where}: choices {choices!r}, expected a list of 2 to 26 texts")
        texts = [item.get("id"), item.get("question"), *choices]
        texts += [item[k] for k in ("answer", "audio_id", "model_output") if item.get(k)]
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}: id, question, choices or another text is empty or no text")
        if item["id"] in ids:
            raise ValueError(f"{where}: another item has its id, {item['id']}")
        ids.add(item["id"])
    if 0 < answered < len(items):
        raise ValueError(f"{path}: {answered} of {len(items)} items have an answer, expected all "
                         "or, as in the test split, none")
    return items


def find_clips(items, args, folder):
    """-> items to ask, their rows for answer_all; ValueError if a clip is missing or empty."""
    import soundfile
    clips = {p.stem: p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in SOUNDS}
    pairs = [(i, clips.get(Path(i.get("audio_id") or i["id"] + ".wav").stem)) for i in items]
    if args.only_available and any(clip for _, clip in pairs):
        pairs = [(item, clip) for item, clip in pairs if clip]
        print(f"--only-available: {len(items) - len(pairs)} of {len(items)} items are left out, "
              f"their clips are not in {folder}", file=sys.stderr)
    pairs, rows = pairs[:args.limit or None], []
    lost = [item.get("audio_id") or item["id"] for item, clip in pairs if not clip]
    if lost:
        raise ValueError(f"{len(lost)} of {len(pairs)} clips are not in {folder}, first {lost[0]}; "
                         "name their folder by --audio, or leave such items out: --only-available")
    for item, clip in pairs:
        rows.append({"id": item["id"], "instruction": PROMPT.format(**item) + args.prompt_suffix,
                     "audio": str(clip), "seconds": soundfile.info(str(clip)).duration})
        if rows[-1]["seconds"] < 0.02:
            raise ValueError(f"{clip}: {rows[-1]['seconds']:.3f} s long, expected at least 20 ms")
    return [item for item, _ in pairs], rows


# ---- scoring ----

def string_match(prediction, answer, choices):
    """The official rule: it has all words of the answer, and none that only other options have."""
    said, right, known = (set(re.findall(r"\w+", text.lower()))
                          for text in (prediction, answer, "\n".join(choices)))
    return bool(said) and right <= said and not said & (known - right)


# what may follow a stated option or letter; a letter before an option; how a statement begins
END = r"""[*"')\]]*(?:[.!?;]?\s*$|[.!?;]?\s*\n|[.!?;]\s|,?\s+(?:because|since|as)\b)"""
LABEL = rf"""[\s*"'(\[]*([A-Z])(?:[*"']*[)\]:.][*"')\]]*(?=\s|$)|(?={END}))(.*)"""
STATED = (r"\b(?<!not )(?:answer|option|choice|choose|select|pick)\b\W*"
          r"(?:(?:is|would be|should be)\b\W*)?(?:(?:the )?(?:option|choice|letter)\b\W*)?")


def read_start(text, choices, letters=True):
    """The option that a text names, or begins with, in words or as a letter -> str or None."""
    for choice in choices:
        if string_match(text, choice, choices):
            return choice
    label = re.match(LABEL, text, re.I | re.S) if letters else None
    if label:
        letter, rest = label[1].upper(), label[2]
        if set(re.findall(r"(?<!\w)([A-Z])[).:]\s", rest.upper())) - {letter}:
            return None  # the options are listed, none is chosen
        return read_start(rest, choices, False) or dict(zip(ascii_uppercase, choices)).get(letter)
    for choice in sorted(choices, key=len, reverse=True):
        plain = re.escape(choice.strip().rstrip("."))
        if re.match(rf"\W*(?:(?:an?|the)\s+)?{plain}{END}", text, re.I):
            return choice
    return None


def read_option(prediction, choices):
    """The option that an answer states by its words or its letter; else the prediction unchanged.

    Words win: "D" is the option "D", if there is one. Statements that differ are not read.
    """
    if not any(string_match(prediction, choice, choices) for choice in choices):
        tails = [prediction[at.end():] for at in re.finditer(STATED, prediction, re.I)]
        stated = {read_start(tail, choices) for tail in tails} - {None}
        if stated:
            return stated.pop() if len(stated) == 1 else prediction
    return read_start(prediction, choices) or prediction


def score(items, official_denominator=False, seed=0):
    """Items with answers and model_output -> record; tables: (mean, low, high) of the hits."""
    rows, groups, missing = [], {}, sum(item.get("model_output") is None for item in items)
    if missing == len(items):
        raise ValueError("no item has the key model_output, which holds the prediction")
    for item in items:
        said, answer, choices = item.get("model_output"), item["answer"], item["choices"]
        if said is None and official_denominator:
            continue
        raw, option = string_match(said or "", answer, choices), read_option(said or "", choices)
        right = [string_match(choice, answer, choices) for choice in choices]
        rows.append({"id": item["id"], "option": option if option in choices else None, "raw": raw,
                     "read": raw or string_match(option, answer, choices),
                     "random option": sum(right) / len(right), "first option": right[0]})
        for table in TABLES:
            names = {"total": "all", **item}.get(table) or "not given"
            for name in names if isinstance(names, list) else [names]:
                groups.setdefault(table, {}).setdefault(str(name), []).append(rows[-1])
    tables = {table: {name: {"n": len(chosen), **{
        kind: interval([float(row[kind]) for row in chosen], seed) for kind in ("raw", "read")}}
        for name, chosen in sorted(of.items(), key=lambda x: (x[0] == "hard", x[0]))}
        for table, of in groups.items()}
    guesses = {k: sum(r[k] for r in rows) / len(rows) for k in ("random option", "first option")}
    return {"scored": len(rows), "unread": sum(not row["option"] for row in rows), "tables": tables,
            "missing": missing, "guesses": guesses, "items": rows}


def to_text(record):
    """Record of `score` -> Markdown."""
    text = (f"{record['scored']} items are scored, {record['unread']} answers name no option; "
            f"{record['missing']} predictions are missing\n\n% right [95%]; raw: the official "
            "string match; read: also after reading letters\n")
    for table, of in record["tables"].items():
        text += f"\n| {table} | N | raw | read |\n|---|---:|---:|---:|\n"
        for name, row in of.items():
            cells = ["{:.2f} [{:.1f}, {:.1f}]".format(*(100 * x for x in row[kind]))
                     for kind in ("raw", "read")]
            text += f"| {name} | {row['n']} | {' | '.join(cells)} |\n"
        for name, share in record["guesses"].items() if table == "total" else ():
            text += f"| always a {name} | {record['scored']} |" + f" {100 * share:.2f} |" * 2 + "\n"
    return text


# ---- main ----

def main(args):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, stop)
    rank, world = start_ranks(args.device)
    out, data, loaded = args.out and Path(args.out), args.score_only or args.data, []
    if not Path(data).exists() and not data.endswith(".json"):
        data = from_hub(data, args.data_revision, out / "hub")
    items = read_items(data)
    answered = bool(items[0].get("answer"))
    strange = sum(item["answer"] not in item["choices"] for item in items) if answered else 0
    if strange and rank == 0:
        print(f"{strange} of {len(items)} answers are not among their choices", file=sys.stderr)

    def ask(batch):
        if not loaded:
            torch.manual_seed(args.seed)  # an untrained adapter is the same on every rank
            loaded.append(m.load_student(args.student, args.revision))
            loaded[0].to(args.device, getattr(torch, args.dtype)).adapter.float()
        return loaded[0].generate(batch, max_new_tokens=args.max_new_tokens)

    if not args.score_only:
        items, rows = find_clips(items, args, args.audio or Path(data).parent)
        names = ("student", "revision", "data_revision", "dtype", "max_new_tokens", "seed")
        answers = answer_all(out, "mmau", rows, ask, settings={k: getattr(args, k) for k in names},
                             batch_size=args.batch_size, rank=rank, world=world)
        items = [{**item, "model_output": answer} for item, answer in zip(items, answers)]
    elif not answered:
        raise ValueError(f"{data}: its items have no answers to score by")
    if rank:
        return 0
    record = {**provenance(args), "prompt": PROMPT + args.prompt_suffix, "strange": strange}
    if answered:
        record |= score(items, args.official_denominator, args.seed)
    text = to_text(record) if answered else (
        f"{len(items)} questions are answered, not scored: the data has no right answers; the "
        f"submission file is {out}/predictions.json\n")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", record)
        (out / "report.md").write_text(text)
    if not args.score_only:
        write_json(out / "predictions.json", items)
    print(text, end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"eval_mmau.py: {error}", file=sys.stderr)
        sys.exit(2)
