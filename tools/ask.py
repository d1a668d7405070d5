"""
Ask a student, by speech or by text.

  python tools/ask.py --student out/quick/last question.wav "What is the capital of France?"

An argument that names a file is played to it, anything else is read to it.
"""
import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--student", required=True, help="as of train_kd.py")
    p.add_argument("--system", help="system message")
    p.add_argument("--max-new-tokens", type=int, default=128, help="longest answer in tokens")
    p.add_argument("questions", nargs="+", help="audio files or texts")
    args = p.parse_args(argv)
    m.check_options(p, args, max_new_tokens=1)
    return args


def main(args):
    student = m.load_student(args.student)
    for question in args.questions:
        start, row = time.perf_counter(), {"system": args.system, "prompt": question}
        if Path(question).is_file():
            row["audio"] = m.load_audio(question)
            if isinstance(student, m.SpeechLLM):  # which spells what it hears
                print(f"heard:  {student.hear([row['audio']])[1][0]}")
        print(f"answer: {student.generate([row], args.max_new_tokens)[0]}\n        ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("ask.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
