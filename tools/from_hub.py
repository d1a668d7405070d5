"""
Copy a data set of the hub: prompts for synth_speech.py, VoiceBench or MMAU for the evaluations.

  python tools/from_hub.py Open-Orca/OpenOrca --limit 50000 --out data/hub
  python tools/from_hub.py hlt-lab/voicebench --out data/voicebench-hub
  python tools/from_hub.py gamma-lab-umd/MMAU-test-mini@REVISION --out data/mmau

Reads   a data set of the hub, NAME or NAME@REVISION, for which it needs the package datasets
Writes  OUT/OpenOrca.jsonl, its rows for --input; left out and counted: rows without a prompt, and
        those of several turns or with a history, which would be cut;
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


def usable(rows, name, left_out):
    """Lines of the rows that synth_speech.py can read and would not drop; why it would is counted."""
    for i, raw in enumerate(tqdm(rows, "rows"), 1):
        try:
            why = synth.to_row(raw, f"{name}:{i}").get("drop")
        except ValueError as error:
            why = str(error).removeprefix(f"{name}:{i}: ")
        if why:
            left_out[why] += 1
        else:
            yield json.dumps(raw, default=str) + "\n"


def copy_prompts(args, out):
    """-> how to go on. Rows that cannot be read are left out: nobody can mend them at the hub."""
    name, left_out = args.data.partition("@")[0].rpartition("/")[2], collections.Counter()
    rows = load(args.data, args.config, args.split, streaming=True)
    rows = rows.take(args.limit) if args.limit else rows
    path, lines = out / f"{name}.jsonl", usable(rows, name, left_out)
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
    begun, options = out / "copied.json", json.dumps({"data": args.data, "limit": args.limit})
    if begun.exists() and begun.read_text() != options:
        raise ValueError(f"{out} holds a copy by {begun.read_text()}; repeat that, or choose another --out")
    for subset in args.subsets:
        split = {"mmsu": "+".join(MMSU), "sd-qa": args.region}.get(subset, "test")
        path = out / f"{subset}-{'test' if subset == 'mmsu' else split}.jsonl"
        if path.exists():
            continue
        table, lines = load_sounds(args.data, subset, split, "audio"), ""
        m.write_atomically(begun, options)  # what cannot be loaded begins nothing
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
