"""
Ask a student, by speech or by text.

  python tools/ask.py --student out/quick/last question.wav "What is the capital of France?"

What names a file is played to it, and anything else is read to it. What looks like a file's name
and is none, or is a folder, is refused.
"""
import argparse
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--student", required=True, help="as of train_kd.py")
    p.add_argument("--system", help="system message")
    p.add_argument("--language", help="of the speech, ISO code; default: Whisper's guess")
    p.add_argument("--max-new-tokens", type=m.number(int, 1), default=128,
                   help="longest answer in tokens")
    p.add_argument("questions", nargs="+", help="audio files or texts")
    args = p.parse_args(argv)
    for question in args.questions:
        # one word that ends like "x.wav", or words that end in an extension of sound
        named = re.fullmatch(r"(?i)\S+\.[a-z]\w*|.*\.(wav|flac|mp[34]|m4a|ogg|opus|webm)", question)
        if os.path.isdir(question) or named and not os.path.isfile(question):
            what = "a folder" if os.path.isdir(question) else "no such file"
            p.error(f"{question}: {what}; give the path of a clip, or a question in words")
    return args


def main(args):
    student = m.load_student(args.student)
    for question in args.questions:
        row = {"system": args.system, "language": args.language}
        if os.path.isfile(question):
            row["audio"] = m.load_audio(question)
            [heard] = student.hear([row["audio"]], args.language)
            if heard is not None:  # speech LLMs of transformers do not tell
                print(f"heard:  {heard.text}")
        else:
            row["prompt"] = question
        start = time.perf_counter()
        print(f"answer: {student.generate([row], args.max_new_tokens)[0]}")
        print(f"        ({time.perf_counter() - start:.1f} s, hearing included)", flush=True)


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("ask.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
