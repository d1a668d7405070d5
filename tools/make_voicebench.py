"""
Speak text questions into a folder with VoiceBench's columns: its evaluation then needs no hub.

  python tools/make_voicebench.py --out data/voicebench
  python tools/make_voicebench.py --questions mine.jsonl --out data/mine --engine hf --tts-model ID

Reads   JSON lines: subset, split (test if missing), prompt and other columns of the hub's subset
Writes  OUT/SUBSET-SPLIT.jsonl: the columns and audio, a path beside it; OUT/wav/*.flac, 16 kHz mono
Stop it at any moment; the same command goes on.
"""
import argparse
import collections
import json
import os
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech as synth


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--questions", default=Path(__file__).with_name("voicebench_questions.jsonl"),
                   help="JSON lines")
    p.add_argument("--out", required=True, help="output folder")
    p.add_argument("--engine", choices=["espeak", "hf", "command"], default="espeak",
                   help="as in synth_speech.py; hf: --tts-model, command: --tts-command")
    p.add_argument("--voices", nargs="+", default=synth.VOICES, help="espeak's names, to draw from")
    p.add_argument("--tts-model", help="text-to-speech model of transformers, folder or hub id")
    p.add_argument("--revision", help="of the model on the hub")
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    p.add_argument("--seed", type=int, default=0, help="of voices, rates and pitches")
    p.add_argument("--tts-command", nargs=argparse.REMAINDER, default=[], metavar="WORD",
                   help="LAST option: a program, its arguments, among them {text} {wav} {voice}")
    args = p.parse_args(argv)
    needed = {"espeak": set(), "hf": {args.tts_model}, "command": {"{text}", "{wav}"}}[args.engine]
    if not needed <= {args.tts_model or "", *args.tts_command}:
        p.error("--engine hf needs --tts-model; command needs --tts-command with {text} and {wav}")
    return args


def read_questions(path):
    """-> {name of the clip: row}, in input order; raises ValueError that names the line."""
    rows, counts = {}, collections.Counter()
    lines = enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1)
    for number, line in ((number, line) for number, line in lines if line.strip()):
        try:
            row = {"split": "test", **json.loads(line)}
            part = f"{row['subset']}-{row['split']}"
            counts[part] += 1
            name = f"{part}-{row.get('id', row.get('key', counts[part]))}"
            if name in rows or not re.fullmatch(r"[\w-]+", part) or not row["prompt"].strip():
                raise ValueError(f"{name} is there already, has a bad name, or no prompt")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: expected subset, prompt, id: {error}") from error
        rows[name] = row
    return rows


def main(args):
    rows, out, files = read_questions(args.questions), Path(args.out), {}
    for voice in args.voices if args.engine == "espeak" else []:  # fail before the work
        synth.espeak_engine()("a", voice, random.Random(0))
    options = {k: v for k, v in vars(args).items() if k not in ("workers", "out", "questions")}
    stage, plan = synth.Stage(out, "speech", 0), out / ".stages/plan"
    if plan.exists() and plan.read_text() != json.dumps([options, rows]):
        raise ValueError(f"{out} was begun with other questions or options; choose another --out")
    m.write_atomically(plan, json.dumps([options, rows]))
    stage.done = {name: clip for name, clip in stage.load().items()
                  if "audio" in clip and (out / clip["audio"]).exists()}
    jobs = [{"id": name, "prompt": synth.tidy(row["prompt"])} for name, row in rows.items()]
    synth.speak_all(args, stage, jobs, out, 0, 1)
    clips = [stage.load()[name] for name in rows]
    for clip, row in zip(clips, rows.values()):
        if "error" in clip:
            raise RuntimeError(f"{clip['id']} cannot be spoken ({clip['error']})")
        lines = files.setdefault(f"{row.pop('subset')}-{row.pop('split')}.jsonl", [])
        lines.append(json.dumps({**row, "audio": clip["audio"]}) + "\n")
    for name, lines in files.items():
        m.write_atomically(out / name, "".join(lines))
    seconds = sum(clip["seconds"] for clip in clips)
    print(f"{out}: {len(clips)} questions in {len(files)} files, {seconds:.1f} s of speech")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print(f"make_voicebench.py: {error}", file=sys.stderr)
        sys.exit(2)
