"""
Ask a speech LLM the questions of MMAU; score by the official rule, and after reading letters.

  python eval_mmau.py --student out/run/last --data mmau-test-mini.json --out out/mmau
  python eval_mmau.py --score-only out/mmau/predictions.json --out out/again

Reads   the official JSON, a list of {"id", "audio_id", "question", "choices", "answer", ...}; clips
Writes  OUT/predictions.json, that list with "model_output", as the official evaluation.py reads it
        and as the test split is submitted; OUT/report.json with every item's scores; OUT/report.md
"""
import argparse
import functools
import json
import re
import signal
import sys
import time
from pathlib import Path
from string import ascii_uppercase

import torch
from transformers.utils import logging

import eval_voicebench as vb
import model as m

PROMPT = "{question}  Select one option from the provided choices.\n{choices}."  # the authors'
TABLES = ("total", "task", "difficulty", "category", "sub-category")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, add_source = p.add_argument, p.add_mutually_exclusive_group(required=True).add_argument
    add_source("--data", help="the official JSON, or gamma-lab-umd/MMAU-test-mini (not run here)")
    add_source("--score-only", metavar="FILE", help="score this predictions.json, ask nothing")
    add("--student", default=m.DEFAULT_STUDENT, help="as of train_kd.py")
    add("--revision", help="revision of hub models")
    add("--trust-remote-code", action="store_true", help="run the code in the student's folder")
    add("--data-revision", help="revision of --data, if it is a hub data set")
    add("--audio", help="folder of the clips, searched by file name; default: that of --data")
    add("--out", required=True, help="output folder")
    add("--only-available", action="store_true", help="leave out items without a clip")
    add("--limit", type=int, default=0, help="the first N items; 0 = all")
    add("--prompt-suffix", default="", help="added to the official prompt, as it is")
    add("--official-denominator", action="store_true", help="skip items without model_output")
    add("--batch-size", type=int, default=8, help="items per GPU per forward")
    add("--max-new-tokens", type=int, default=64, help="longest answer; decoding is greedy")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the student")
    add("--seed", type=int, default=0, help="of the intervals, and of an untrained adapter")
    args = p.parse_args(argv)
    m.check_options(p, args, batch_size=1, max_new_tokens=1, limit=0, seed=(0, 2**32))
    return args


# ---- data ----

def from_hub(name, revision, folder, rank):
    """Hub data set -> path of FOLDER/items.json, written as the official JSON, with its clips."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(f"{name}: no file, and the hub needs: pip install datasets") from error
    path, items = folder / "items.json", []
    while rank and not path.exists():
        time.sleep(0.2)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.load_dataset(name, split="test", revision=revision)
    for row in table.cast_column("context", datasets.Audio(decode=False)):
        item = json.loads(row["other_attributes"])
        answer, *choices = (re.sub(r"^\([A-Z]\) ", "", text or "")  # there it is "(A) Man"
                            for text in (row["answer"], *row["choices"]))
        items.append({**item, "audio_id": f"./test-mini-audios/{item['id']}.wav",
                      "question": row["instruction"], "choices": choices, "answer": answer})
        (folder / f"{item['id']}.wav").write_bytes(row["context"]["bytes"])
    vb.write_json(path, items)
    return path


def read_items(path):
    """JSON file -> items that can be asked; all or none of them have an answer. Else ValueError."""
    items = m.read_json(Path(path).read_bytes(), path)
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
        raise ValueError(f"{path}: {answered} of {len(items)} items have answers, not all or none")
    return items


def find_clips(items, folder, args):
    """-> items to ask, their rows for answer_all; ValueError if a clip is missing or empty."""
    import soundfile
    kinds = soundfile.available_formats()
    clips = {p.stem: p for p in sorted(Path(folder).rglob("*")) if p.suffix[1:].upper() in kinds}
    pairs = [(i, clips.get(Path(i.get("audio_id") or i["id"] + ".wav").stem)) for i in items]
    lost = [item.get("audio_id") or item["id"] for item, clip in pairs if not clip]
    if len(lost) > (len(items) - 1 if args.only_available else 0):
        raise ValueError(f"{len(lost)} of {len(items)} clips are not in {folder}, first {lost[0]}; "
                         "name their folder by --audio, or leave such items out: --only-available")
    rows = [{"id": item["id"], "instruction": PROMPT.format(**item) + args.prompt_suffix, "audio":
             str(clip), "seconds": m.audio_seconds(clip)} for item, clip in pairs if clip]
    return [item for item, clip in pairs if clip], rows


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
    named = next((c for c in choices if string_match(text, c, choices)), None)
    label = re.match(LABEL, text, re.I | re.S) if letters and not named else None
    if label:
        letter, rest = label[1].upper(), label[2]
        if set(re.findall(r"(?<!\w)([A-Z])[).:]\s", rest.upper())) - {letter}:
            return None  # the options are listed, none is chosen
        return read_start(rest, choices, False) or dict(zip(ascii_uppercase, choices)).get(letter)
    plain = {c: re.escape(c.strip().rstrip(".")) for c in sorted(choices, key=len, reverse=True)}
    return named or next((c for c in plain if re.match(
        rf"\W*(?:(?:an?|the)\s+)?{plain[c]}{END}", text, re.I)), None)


def read_option(prediction, choices):
    """The option that an answer states by its words or its letter; else the prediction unchanged.

    Words win: "D" is the option "D", if there is one. Statements that differ are not read.
    """
    named = any(string_match(prediction, choice, choices) for choice in choices)
    tails = [] if named else [prediction[at.end():] for at in re.finditer(STATED, prediction, re.I)]
    stated = ({read_start(tail, choices) for tail in tails} - {None}
              or {read_start(prediction, choices)} - {None})
    return stated.pop() if len(stated) == 1 else prediction


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
                     "random option": sum(right) / len(right), "always first option": right[0]})
        for table in TABLES:
            names = {"total": "all", **item}.get(table) or "not given"
            for name in names if isinstance(names, list) else [names]:
                groups.setdefault(table, {}).setdefault(str(name), []).append(rows[-1])
    for guess in ("random option", "always first option"):
        groups["total"][guess] = [dict.fromkeys(("raw", "read"), row[guess]) for row in rows]
    tables = {table: {name: {"n": len(chosen), **{
        kind: vb.interval([float(row[kind]) for row in chosen], seed) for kind in ("raw", "read")}}
        for name, chosen in sorted(of.items(), key=lambda x: (x[0] == "hard", x[0]))}
        for table, of in groups.items()}
    return {"scored": len(rows), "missing": missing, "tables": tables, "items": rows,
            "unread": sum(not row["option"] for row in rows),
            "not_among_choices": sum(item["answer"] not in item["choices"] for item in items)}


def to_text(record):
    """Record of `score` -> Markdown."""
    text = (f"{record['scored']} items are scored; {record['unread']} predictions name no option, "
            f"{record['missing']} are missing; {record['not_among_choices']} right answers are not "
            "among the choices\n\n% right [95%]; raw: the official string match; read: also after "
            "reading letters\n\n| | N | raw | read |\n|---|---:|---:|---:|\n")
    for table, of in record["tables"].items():
        for name, row in of.items():
            text += "| {}: {} | {} | {:.2f} [{:.1f}, {:.1f}] | {:.2f} [{:.1f}, {:.1f}] |\n".format(
                table, name, row["n"], *(100 * x for x in (*row["raw"], *row["read"])))
    return text


def main(args):
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, m.stop_now)
    rank, world = vb.start_ranks(args.device)
    out, data = Path(args.out), args.score_only or args.data
    if not Path(data).exists() and not data.endswith(".json"):
        data = from_hub(data, args.data_revision, out / f".hub-{args.data_revision}", rank)
    everything, record = read_items(data), vb.provenance(args)
    items, answered = everything[:args.limit or None], bool(everything[0].get("answer"))
    if not args.score_only:
        items, rows = find_clips(items, args.audio or Path(data).parent, args)
        if rank == 0:
            print(f"{len(items)} of {len(everything)} items are asked", file=sys.stderr)
        settings = {k: getattr(args, k) for k in ("student", "dtype", "max_new_tokens", "seed")}
        settings["weights"] = record["weights"] = vb.weights_of(args.student, args.revision)
        student = functools.cache(lambda: vb.load(args, "student"))  # loaded when it is asked
        answers = vb.answer_all(out, "mmau", rows, lambda batch: student().generate(
            batch, max_new_tokens=args.max_new_tokens), settings=settings,
            batch_size=args.batch_size, rank=rank, world=world)
        items = [{**item, "model_output": answer} for item, answer in zip(items, answers)]
    if rank:
        return 0
    record |= score(items, args.official_denominator, args.seed) if answered else {}
    out.mkdir(parents=True, exist_ok=True)
    vb.write_json(out / "predictions.json", items)
    text = to_text(record) if answered else (
        f"no right answers, no scores: the submission file is {out / 'predictions.json'}\n")
    vb.write_json(out / "report.json", {**record, "prompt": PROMPT + args.prompt_suffix})
    m.write_atomically(out / "report.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(get_args()))
    except (ValueError, RuntimeError, OSError) as error:
        print("eval_mmau.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
