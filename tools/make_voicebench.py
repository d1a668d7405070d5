"""
Speak text questions into a folder with VoiceBench's columns: its evaluation then needs no hub.

  python tools/make_voicebench.py --out data/voicebench
  python tools/make_voicebench.py --questions mine.jsonl --out data/mine --engine piper

Reads   JSON lines: subset, split (test if missing), prompt and other columns of the hub's subset
Writes  OUT/SUBSET-SPLIT.jsonl: the columns and audio, a path beside it; OUT/wav/*.flac, 16 kHz mono
Stop it at any moment; the same command goes on.
"""
import argparse
import collections
import json
import random
import re
import sys
from concurrent.futures import ThreadPoolExecutor
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
    p.add_argument("--engine", choices=synth.ENGINES, default="espeak",
                   help="as in synth_speech.py; command: --tts-command")
    p.add_argument("--voices", nargs="+", help="to draw from; None: the engine's own")
    p.add_argument("--workers", type=m.number(int, 1), default=m.cores(),
                   help="threads that speak (piper, command)")
    p.add_argument("--seed", type=int, default=0, help="of voices and speeds")
    p.add_argument("--tts-command", nargs=argparse.REMAINDER, default=[], metavar="WORD",
                   help="LAST option: a program, its arguments, among them {text} {wav} {voice}")
    p.set_defaults(takes=1, noise=0, language="en")  # as of synth_speech.py
    args = p.parse_args(argv)
    if args.engine == "command" and not {"{text}", "{wav}"} < {*args.tts_command}:
        p.error("--engine command needs --tts-command with {text} and {wav}")
    args.voices = args.voices or synth.VOICES[args.engine]
    return args


def read_questions(path):
    """-> {name of the clip: row}, in input order; raises ValueError that names the line."""
    rows, counts = {}, collections.Counter()

    def parse(row, where):
        try:
            row = {"split": "test", **row}
            part = f"{row['subset']}-{row['split']}"
            counts[part] += 1
            name = f"{part}-{row.get('id', row.get('key', counts[part]))}"
            if name in rows or not re.fullmatch(r"[\w-]+", part) or not row["prompt"].strip():
                raise ValueError(f"{name} is there already, has a bad name, or no prompt")
        except (ValueError, LookupError, AttributeError) as error:
            raise ValueError(f"{where}: expected subset, prompt, id: {error}") from error
        rows[name] = row

    m.json_lines(path, parse)
    return rows


def main(args):
    rows, out, files = read_questions(args.questions), Path(args.out), {}
    for voice in args.voices if args.engine in ("espeak", "piper") else []:  # fail before the work
        synth.ENGINES[args.engine](args, "a", voice, 0, random.Random(0))
    options = {k: v for k, v in vars(args).items() if k not in ("workers", "out", "questions")}
    plan = out / ".stages/plan"
    if plan.exists() and plan.read_text() != json.dumps([options, rows]):
        raise ValueError(f"{out} was begun with other questions or options; choose another --out")
    for folder in (plan.parent, out / "wav"):
        folder.mkdir(parents=True, exist_ok=True)
    m.write_atomically(plan, json.dumps([options, rows]))

    def speak(clip):
        record = synth.synthesise(args, clip)
        if "error" in record:
            raise RuntimeError(f"{clip['id']} cannot be spoken ({record['error']})")
        return record

    todo = []
    for name, row in rows.items():
        todo += synth.clips_of(args, {"id": name, "prompt": synth.tidy(row["prompt"])})
    workers = args.workers if args.engine in ("piper", "command") else 1  # the others keep state
    with ThreadPoolExecutor(workers) as pool:
        clips = synth.staged(args, "speech", todo, 4 * workers, lambda some: pool.map(speak, some))
    for name, row in rows.items():
        lines = files.setdefault(f"{row.pop('subset')}-{row.pop('split')}.jsonl", [])
        lines.append(json.dumps({**row, "audio": clips[name]["audio"]}) + "\n")
    for name, lines in files.items():
        m.write_atomically(out / name, "".join(lines))
    seconds = sum(clips[name]["seconds"] for name in rows)
    print(f"{out}: {len(rows)} questions in {len(files)} files, {seconds:.1f} s of speech")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("make_voicebench.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
