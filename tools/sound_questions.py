"""
Ask how the clips of synth_speech.py --takes 2 sound, and what is said in them: rows without a teacher.

  python tools/sound_questions.py data/quick/heard data/quick/unheard

Reads   FOLDER/train.jsonl, FOLDER/heldout.jsonl if it is there: manifests of synth_speech.py
Writes  FOLDER/sounds.jsonl, sounds-heldout.jsonl: fast or slow, quiet or noisy, man or woman;
        FOLDER/transcripts.jsonl: repeat what you hear
"""
import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech as synth

QUESTIONS = {  # key of a clip -> what is asked about it, the answer to each value
    "rate": ("Does the speaker talk fast or slowly?", {"fast": "Fast.", "slow": "Slowly."}),
    "background": ("Is there a noise behind the voice?", {"quiet": "No.", **dict.fromkeys(synth.BACKGROUNDS, "Yes.")}),
    "sex": ("Is the speaker a man or a woman?", {"man": "Man.", "woman": "Woman."})}
REPEAT = "Repeat what you hear."


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("folders", nargs="+", metavar="FOLDER", help="--out of synth_speech.py --takes 2")
    return p.parse_args(argv)


def about(row, kind, question, reply):
    """A row of the manifest -> a row about its sound: no text stands for what it asks."""
    return {"id": f"{row['id']}-{kind}", "prompt": None, "instruction": question, "response": reply, "finish": "stop",
            "kind": kind, "source": "sounds", **{key: row[key] for key in ("audio", "voice", "seconds", "language")}}


def sound_rows(rows):
    """Questions that the two takes of a prompt answer differently: each answer as often."""
    takes, sounds = {row["id"]: row for row in rows}, []
    for row in rows:
        pair = [row, takes.get(row["id"] + synth.TAKE2, {})]
        for kind, (question, replies) in QUESTIONS.items():
            given = [replies.get(take.get(kind)) for take in pair]
            if {*given} == {*replies.values()}:
                for take, reply in zip(pair, given):
                    sounds.append(about(take, kind, question, reply))
    return sounds


def main(args):
    for folder in map(Path, args.folders):
        rows = {"train": m.json_lines(folder / "train.jsonl", lambda raw, _: raw), "heldout": []}
        if (folder / "heldout.jsonl").exists():
            rows["heldout"] = m.json_lines(folder / "heldout.jsonl", lambda raw, _: raw)
        files = {"sounds": sound_rows(rows["train"]), "sounds-heldout": sound_rows(rows["heldout"]),
                 "transcripts": [about(row, "transcript", REPEAT, row["prompt"]) for row in rows["train"]]}
        if not files["sounds"]:
            raise ValueError(f"{folder}/train.jsonl: no prompt has two clips that differ; expected what synth_speech.py --takes 2 writes")
        for name, content in files.items():
            if content:
                m.write_atomically(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in content))
        print(f"{folder}:", ", ".join(f"{len(content)} {name}" for name, content in files.items()))


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, OSError) as error:
        print("sound_questions.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
