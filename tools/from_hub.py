"""
Copy VoiceBench or MMAU from the hub to the files that the evaluations read.

  python tools/from_hub.py hlt-lab/voicebench --out data/voicebench-hub
  python tools/from_hub.py gamma-lab-umd/MMAU-test-mini@REVISION --out data/mmau

Reads   a data set of the hub, NAME or NAME@REVISION; needs the package datasets
Writes  VoiceBench: OUT/SUBSET-SPLIT.jsonl, OUT/audio/*.wav; MMAU: OUT/mmau.json, OUT/ID.wav
Stop it at any moment; the same command goes on with the next subset.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
import model as m

MMSU = ("law engineering other biology business economics health philosophy psychology history "
        "chemistry physics").split()


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("data", help="hlt-lab/voicebench or gamma-lab-umd/MMAU-test-mini")
    p.add_argument("--out", required=True, help="folder of the copy")
    p.add_argument("--subsets", nargs="+", choices=list(vb.SUBSETS), default=vb.NINE,
                   help="of VoiceBench; default: the leaderboard's nine")
    p.add_argument("--region", default="usa", help="split of sd-qa; the leaderboard has usa")
    p.add_argument("--limit", type=m.number(int, 0), default=0,
                   help="rows a subset, evenly spaced; 0 = all")
    return p.parse_args(argv)


def load(data, config, split, audio):
    """-> table whose column `audio` has the bytes of the files, undecoded."""
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError("this needs the package datasets: pip install datasets") from error
    name, _, revision = data.partition("@")
    table = datasets.load_dataset(name, config, split=split, revision=revision or None)
    return table.cast_column(audio, datasets.Audio(decode=False))


def copy_voicebench(args, out):
    for subset in args.subsets:
        split = {"mmsu": "+".join(MMSU), "sd-qa": args.region}.get(subset, "test")
        path = out / f"{subset}-{'test' if subset == 'mmsu' else split}.jsonl"
        if path.exists():
            continue
        table, lines = load(args.data, subset, split, "audio"), ""
        for i in vb.spaced(range(len(table)), args.limit):
            row = table[i]
            sound, row["audio"] = row["audio"]["bytes"], f"audio/{path.stem}-{i:05d}.wav"
            (out / row["audio"]).write_bytes(sound)
            lines += json.dumps(row) + "\n"
        m.write_atomically(path, lines)  # last: it says that the subset is there


def copy_mmau(args, out):
    """As the official JSON has it: choices without "(A) "."""
    table, items = load(args.data, None, "test", "context"), []
    for i in vb.spaced(range(len(table)), args.limit):
        row = table[i]
        item = json.loads(row["other_attributes"])
        answer, *choices = [re.sub(r"^\([A-Z]\) ", "", text or "")
                            for text in (row["answer"], *row["choices"])]
        items.append({**item, "audio_id": f"./test-mini-audios/{item['id']}.wav",
                      "question": row["instruction"], "choices": choices, "answer": answer})
        (out / f"{item['id']}.wav").write_bytes(row["context"]["bytes"])
    vb.write_json(out / "mmau.json", items)


def main(args):
    out = Path(args.out)
    (out / "audio").mkdir(parents=True, exist_ok=True)
    copy = copy_mmau if "mmau" in args.data.lower() else copy_voicebench
    copy(args, out)
    print(f"{out}: now eval_{copy.__name__.removeprefix('copy_')}.py --data "
          f"{out / 'mmau.json' if copy is copy_mmau else out}")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"from_hub.py: {error}", file=sys.stderr)
        sys.exit(2)
