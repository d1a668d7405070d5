"""
A page to listen to a manifest's clips, beside what is said and what is answered.

  python tools/preview.py data/quick/heard/train.jsonl

Writes  preview.html beside the manifest
"""
import argparse
import html
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("manifest", help="JSON lines of synth_speech.py")
    p.add_argument("--limit", type=m.number(int, 1), default=40, help="clips on the page")
    return p.parse_args(argv)


def preview(rows):
    """-> the page; every text is escaped."""
    page = "<!doctype html><meta charset=utf-8><title>Rows to listen to</title>\n"
    for row in rows:
        cell = {key: html.escape(str(row.get(key))) for key in ("audio", "voice", "wer", "prompt", "response")}
        page += ("<p><audio controls src='{audio}'></audio> {voice}, word error rate {wer}"
                 "<br><b>{prompt}</b><br>{response}\n").format_map(cell)
    return page


def main(args):
    path = Path(args.manifest).with_name("preview.html")
    m.write_atomically(path, preview(m.json_lines(args.manifest, lambda raw, _: raw)[:args.limit]))
    print(path)


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, OSError) as error:
        print("preview.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
