"""
Ask a speech LLM the questions of MMAU; score by the official rule, and after reading letters.

  python eval_mmau.py --student out/run/last --data mmau-test-mini.json --out out/mmau
  python eval_mmau.py --score-only out/mmau/predictions.json --out out/again

Reads   the official JSON, a list of {"id", "audio_id", "question", "choices", "answer", ...}; clips
Writes  OUT/predictions.json, that list with "model_output", for the official evaluation.py or to
        submit the test split; OUT/report.json with every item's scores; OUT/report.md
"""
import argparse
import collections
import functools
import re
import sys
from pathlib import Path
from string import ascii_uppercase

import torch

import eval_voicebench as vb
import model as m

PROMPT = "{question}  Select one option from the provided choices.\n{choices}."  # the authors'
TABLES = ("total", "task", "difficulty", "category", "sub-category")


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, add_source = p.add_argument, p.add_mutually_exclusive_group(required=True).add_argument
    add_source("--data", help="the official JSON; tools/from_hub.py makes it of the hub's data set")
    add_source("--score-only", metavar="FILE", help="score this predictions.json, ask nothing")
    add("--student", default=m.DEFAULT_STUDENT, help="as of train_kd.py")
    add("--audio", help="folder of the clips; default: that of --data")
    add("--out", required=True, help="output folder")
    add("--only-available", action="store_true", help="leave out items without a clip")
    add("--limit", type=m.number(int, 0), default=0, help="items, evenly spaced; 0 = all")
    add("--prompt-suffix", default="", help="added to the official prompt, as it is")
    add("--batch-size", type=m.number(int, 1), default=8, help="items per GPU per forward")
    add("--max-new-tokens", type=m.number(int, 1), default=64, help="longest answer, greedy")
    add("--device", choices=["cpu", "cuda"], help="where the student runs",
        default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the student")
    return p.parse_args(argv)


# ---- data ----
def read_items(path):
    """JSON list -> items that can be asked; all or none of them have an answer. Else ValueError."""
    def parse(item, where):
        choices = item.get("choices")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(ascii_uppercase):
            raise ValueError(f"{where}: choices {choices!r}, expected a list of 2 to 26 texts")
        texts = [item.get("id"), item.get("question"), *choices]
        m.check_texts(item, where, "answer", "audio_id", "model_output")
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"{where}: id, question, choices or another text is empty or no text")
        return item

    items = m.json_lines(path, parse)
    counts = collections.Counter(item["id"] for item in items)
    answered = sum(bool(item.get("answer")) for item in items)
    if len(counts) < len(items):
        raise ValueError(f"{path}: more than one item has the id {counts.most_common(1)[0][0]}")
    if not items or 0 < answered < len(items):
        raise ValueError(f"{path}: {answered} of {len(items)} items have answers, not all or none")
    return items


def find_clips(items, folder, args):
    """-> items to ask, their rows for answer_all; ValueError if a clip is missing or empty."""
    import soundfile
    clips, asked, rows, lost = collections.defaultdict(list), [], [], []
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix[1:].upper() in soundfile.available_formats():
            clips[path.stem].append(path)
    names = [Path(item.get("audio_id") or item["id"] + ".wav") for item in items]
    sharing = collections.Counter(name.stem for name in names)
    for item, name in zip(items, names):
        there = Path(folder, name).with_suffix("")
        found = [clip for clip in clips[name.stem] if clip.with_suffix("") == there]
        if not found and sharing[name.stem] == 1:  # then the folders need not be the same
            found = clips[name.stem]
        if len(found) != 1:
            lost.append(f"{name} ({len(found)} files may be it)")
            continue
        asked.append(item)
        rows.append({"id": item["id"], "instruction": PROMPT.format(**item) + args.prompt_suffix,
                     "audio": str(found[0]), "seconds": m.audio_seconds(found[0]),
                     "digest": m.digest(found[0])})
    if lost and not (args.only_available and rows):
        raise ValueError(f"{len(lost)} of {len(items)} clips are not in {folder}, first {lost[0]}; "
                         "name their folder by --audio, or leave such items out: --only-available")
    return asked, rows


# ---- scoring ----
def string_match(prediction, answer, choices):
    """The official rule: it has all words of the answer, and none that only other options have."""
    said, right, known = (set(re.findall(r"\w+", text.lower()))
                          for text in (prediction, answer, "\n".join(choices)))
    return bool(said) and right <= said and not said & (known - right)


# what may follow a stated option or letter; a letter before an option; how a statement begins
END = r"""[*"')\]}$\\]*(?:[.!?;]?\s*$|[.!?;]?\s*\n|[.!?;]\s|,?\s+(?:(?:because|since|as)\b|因))"""
LABEL = rf"""[\s*"'(\[{{$\\]*([A-Z])(?:选?项)?(?:[*"']*[)\]:.][*"')\]]*(?=\s|$)|(?={END}))(.*)"""
STATED = (r"(?:答案|(?<!不)选)[是为选择项应该\W]*|\b(?<!not )(?:answer|option|choice|choose|select|pick"
          r"|boxed|(?:text|math)\w*(?={))\b\W*(?:(?:is|would|should|be|the|option|choice)\b\W*)*")
PLAIN = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
PLAIN |= str.maketrans({"：": ": ", "，": ", ", "；": "; ", "。": ". ", "【": "(", "】": ")"})


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
    """The one option that an answer states, in words or else by its letter; else unchanged."""
    named = any(string_match(prediction, choice, choices) for choice in choices)
    text = prediction if named else prediction.translate(PLAIN)
    tails = [] if named else [text[at.end():] for at in re.finditer(STATED, text, re.I)]
    stated = ({read_start(tail, choices) for tail in tails} - {None}
              or {read_start(text, choices)} - {None})
    return stated.pop() if len(stated) == 1 else prediction


def score(items):
    """Items with answers and model_output -> what is reported, intervals of the hits by group."""
    rows, groups, tables = [], {}, {}
    record = {"tables": tables, "items": rows, "unread": 0, "missing": 0, "not_among_choices": 0}
    for item in items:
        said, answer, choices = item.get("model_output") or "", item["answer"], item["choices"]
        option = read_option(vb.spoken(said), choices)
        hits = string_match(said, answer, choices), string_match(option, answer, choices)
        rows.append({"id": item["id"], "option": option if option in choices else None,
                     "raw": hits[0], "read": hits[1]})
        record["unread"] += option not in choices
        record["missing"] += item.get("model_output") is None
        record["not_among_choices"] += answer not in choices
        right = [string_match(choice, answer, choices) for choice in choices]
        groups.setdefault("total: always first option", []).append((right[0], right[0]))
        groups.setdefault("total: random option", []).append((sum(right) / len(right),) * 2)
        for table in TABLES:
            names = {"total": "all", **item}.get(table) or "not given"
            for name in names if isinstance(names, list) else [names]:
                groups.setdefault(f"{table}: {name}", []).append(hits)
    for name in sorted(groups, key=lambda x: (TABLES.index(x.split(":")[0]), "hard" in x, x)):
        raw, read = zip(*groups[name])
        tables[name] = {"n": len(raw), "raw": vb.interval(raw), "read": vb.interval(read)}
    return record


def to_text(record):
    """Record of `score` -> Markdown."""
    text = ("{unread} answers name no option; {missing} are missing (wrong; officially left out); "
            "{not_among_choices} right answers are not among the choices\n\n% right [95%]; raw: "
            "the official string match; read: also after reading letters\n\n"
            "| | N | raw | read |\n|---|---:|---:|---:|\n").format(**record)
    for name, row in record["tables"].items():
        text += "| {} | {} | {:.2f} [{:.1f}, {:.1f}] | {:.2f} [{:.1f}, {:.1f}] |\n".format(
            name, row["n"], *(100 * x for x in (*row["raw"], *row["read"])))
    return text


def main(args):
    rank, _ = m.start_processes(args.device)
    out, data = Path(args.out), args.score_only or args.data
    items, record = vb.spaced(read_items(data), args.limit), vb.provenance(args)
    if args.score_only and not any("model_output" in item for item in items):
        raise ValueError(f"{data}: no item has the key model_output, which holds the prediction")
    out.mkdir(parents=True, exist_ok=True)
    if not args.score_only:
        items, rows = find_clips(items, args.audio or Path(data).parent, args)
        print(f"{len(items)} items are asked", file=sys.stderr)
        record["weights"] = vb.weights_of(args.student)
        student = functools.cache(functools.partial(vb.load_model, args, "student"))  # when asked
        ask = functools.partial(vb.ask, args, "student", student)
        for item, answer in zip(items, vb.answer_all(args, "mmau", rows, ask, record["weights"])):
            item["model_output"] = answer["response"]
    if rank:
        return 0
    text = f"no right answers, no scores: the submission file is {out / 'predictions.json'}\n"
    if items[0].get("answer"):
        record |= score(items)
        text = to_text(record)
    vb.write_json(out / "predictions.json", items)
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
