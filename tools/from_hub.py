"""
Copy a data set of the hub: prompts for synth_speech.py, VoiceBench or MMAU for the evaluations.

  python tools/from_hub.py Open-Orca/OpenOrca --limit 50000 --out data/hub

  python tools/from_hub.py my-chats.json --out data/hub         # no data set, a file
  python tools/from_hub.py hlt-lab/voicebench --out data/voicebench-hub
  python tools/from_hub.py gamma-lab-umd/MMAU-test-mini@REVISION --out data/mmau

Reads   a data set of the hub, NAME or NAME@REVISION, for which it needs the package datasets;
        or a file, JSON lines or a JSON list. Rows of prompts may be conversations: OpenAI's
        [{"role", "content"}] or ShareGPT's [{"from", "value"}] under any key
Writes  OUT/OpenOrca.jsonl, prompts as rows for --input; left out and counted: rows without a
        prompt, and those of several turns or with a history, which would be cut;
        VoiceBench: OUT/SUBSET-SPLIT.jsonl, OUT/audio/*.wav; MMAU: OUT/mmau.json, OUT/ID.wav
Stop it at any moment; the same command goes on with VoiceBench's next subset.
"""
import argparse
import collections
import json
import os
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
import model as m
import synth_speech as synth

# who speaks in a conversation -> key of a row
ROLES = {"system": "system", "user": "prompt", "human": "prompt", "assistant": "reference",
         "gpt": "reference", "bot": "reference", "model": "reference"}
MMSU = ("law engineering other biology business economics health philosophy psychology history "
        "chemistry physics").split()


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("data", help="hlt-lab/voicebench, gamma-lab-umd/MMAU-test-mini, or prompts")
    p.add_argument("--out", required=True, help="folder of the copy")
    p.add_argument("--subsets", nargs="+", choices=list(vb.SUBSETS), default=vb.NINE,
                   help="of VoiceBench; default: the leaderboard's nine")
    p.add_argument("--region", default="usa", help="split of sd-qa; the leaderboard has usa")
    p.add_argument("--config", help="of a data set of prompts that has more than one")
    p.add_argument("--split", default="train", help="of a data set of prompts")
    p.add_argument("--limit", type=m.number(int, 0), default=0,
                   help="rows a subset, evenly spaced, or the first prompts; 0 = all")
    return p.parse_args(argv)


def load(data, config, split, **options):
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError("this needs the package datasets: pip install datasets") from error
    name, _, revision = data.partition("@")
    return datasets.load_dataset(name, config, split=split, revision=revision or None, **options)


def load_sounds(data, config, split, audio):
    """-> table whose column `audio` has the bytes of the files, undecoded."""
    table = load(data, config, split)
    import datasets
    return table.cast_column(audio, datasets.Audio(decode=False))


def text_of(value, where):
    """A text, null or a list of text parts -> str; all else is refused, not cut away."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        text = part.get("text", part) if isinstance(part, dict) else part
        if not isinstance(text, str | int | float | None):
            raise ValueError(f"{where}: {str(text)[:60]!r}, expected text")
        texts.append("" if text is None else str(text).strip())
    return "\n".join(texts)


def is_chat(value):
    """Messages of OpenAI's or ShareGPT's kind?"""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool(first.keys() & {"role", "from"})


def of_chat(messages, where):
    """Messages -> texts by the keys of a row; ValueError unless they are one turn."""
    texts, order = {}, ""
    for message in messages:
        name = message.get("role", message.get("from")) if isinstance(message, dict) else message
        key = ROLES.get(str(name).lower())
        if key is None:
            raise ValueError(f"{where}: a message of {name!r}, expected of {', '.join(ROLES)}")
        texts.setdefault(key, text_of(message.get("content", message.get("value")), where))
        order += key[0]
    if not re.fullmatch("s?pr?", order):
        raise ValueError(f"{where}: several turns, or no question")
    return texts


def flat(raw, where):
    """A row as it is there -> the same with the one turn of its conversation as texts; ValueError
    if synth_speech.py cannot read it."""
    row, said = {}, {}
    for key, value in raw.items():
        if is_chat(value):
            said = of_chat(value, where) | said
        else:
            row[key] = value
    for key, text in said.items():
        if not str(row.get(key) or "").strip():
            row[key] = text
    synth.to_row(row, where)
    return row


def usable(rows, name, left_out):
    """Lines of the rows that synth_speech.py can read; why it cannot read others is counted."""
    for i, raw in enumerate(tqdm(rows, "rows"), 1):
        try:
            yield json.dumps(flat(raw, f"{name}:{i}"), default=str) + "\n"
        except ValueError as error:
            left_out[str(error).removeprefix(f"{name}:{i}: ")] += 1


def copy_prompts(args, out):
    """-> how to go on. Rows that cannot be read are left out: nobody can mend them at the hub."""
    name, left_out = args.data.partition("@")[0].rpartition("/")[2], collections.Counter()
    if Path(args.data).is_file():
        name, rows = Path(args.data).stem, m.json_lines(args.data, lambda raw, _: raw)
        rows = rows[:args.limit or None]
    else:
        rows = load(args.data, args.config, args.split, streaming=True)
        rows = rows.take(args.limit) if args.limit else rows
    path, lines = out / f"{name}.jsonl", usable(rows, name, left_out)
    if path.exists() and Path(args.data).exists() and path.samefile(args.data):
        raise ValueError(f"{path} would be written over itself; choose another --out")
    first = next(lines, None)
    if first is None:  # before OUT is there
        raise ValueError(f"no row is left of {left_out.total()}: {dict(left_out.most_common(3))}")
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        file.write(first)
        file.writelines(lines)
    os.replace(temporary, path)
    if left_out:
        print(f"{left_out.total()} rows are left out: {dict(left_out.most_common(9))}")
    return f"synth_speech.py --input {path}"


def copy_voicebench(args, out):
    (out / "audio").mkdir(parents=True, exist_ok=True)
    for subset in args.subsets:
        split = {"mmsu": "+".join(MMSU), "sd-qa": args.region}.get(subset, "test")
        path = out / f"{subset}-{'test' if subset == 'mmsu' else split}.jsonl"
        if path.exists():
            continue
        table, lines = load_sounds(args.data, subset, split, "audio"), ""
        for i in vb.spaced(range(len(table)), args.limit):
            row = table[i]
            sound, row["audio"] = row["audio"]["bytes"], f"audio/{path.stem}-{i:05d}.wav"
            (out / row["audio"]).write_bytes(sound)
            lines += json.dumps(row) + "\n"
        m.write_atomically(path, lines)  # last: it says that the subset is there
    return f"eval_voicebench.py --data {out}"


def copy_mmau(args, out):
    """As the official JSON has it: choices without "(A) "."""
    out.mkdir(parents=True, exist_ok=True)
    table, items = load_sounds(args.data, None, "test", "context"), []
    for i in vb.spaced(range(len(table)), args.limit):
        row = table[i]
        item = json.loads(row["other_attributes"])
        answer, *choices = [re.sub(r"^\([A-Z]\) ", "", text or "")
                            for text in (row["answer"], *row["choices"])]
        items.append({**item, "audio_id": f"./test-mini-audios/{item['id']}.wav",
                      "question": row["instruction"], "choices": choices, "answer": answer})
        (out / f"{item['id']}.wav").write_bytes(row["context"]["bytes"])
    vb.write_json(out / "mmau.json", items)
    return f"eval_mmau.py --data {out / 'mmau.json'}"


def main(args):
    kinds = {"voicebench": copy_voicebench, "mmau": copy_mmau}
    copy = next((kinds[kind] for kind in kinds if kind in args.data.lower()), copy_prompts)
    print(f"{args.out}: now {copy(args, Path(args.out))}")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"from_hub.py: {error}", file=sys.stderr)
        sys.exit(2)
