"""
Prompts that a teacher invents: in its chat template it goes on where the user begins, or answers --ask. No data is needed.

  python tools/sample_prompts.py --count 1000 --out data/quick
  python synth_speech.py --input data/quick/prompts.jsonl --out data/quick
  python tools/sample_prompts.py --count 60 --language de --ask "Schreibe eine kurze Frage über {}." --topics Tiere Musik Berlin --out data/de

Writes  OUT/prompts.jsonl: prompts that can be read out loud, no two nearly the same
Stop it at any moment; the same command goes on. Works under torchrun, too.
"""
import argparse
import collections
import functools
import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech as synth


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--count", type=m.number(int, 1), required=True, help="prompts")
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM, local folder or hub id")
    p.add_argument("--max-words", type=m.number(int, 1), default=40, help="of a prompt; 40 are about 16 s of speech")
    p.add_argument("--language", default="en", help="of the prompts (ISO 639-1)")
    p.add_argument("--ask", help="what to ask the teacher for, {} being one of --topics, in turn; what does not end as a question is dropped")
    p.add_argument("--topics", nargs="+", default=[], help="words for --ask")
    p.add_argument("--exclude", nargs="+", default=[], help="files of prompts to keep out, and all that share 8 words with them")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu", help="of the teacher")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32",
                   help="of the teacher")
    p.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="other prompts for each")
    p.add_argument("--out", required=True, help="output folder")
    p.set_defaults(heldout=0, max_new_tokens=32)  # as of synth_speech.py
    args = p.parse_args(argv)
    if bool(args.ask) != bool(args.topics) or args.ask and "{}" not in args.ask:
        p.error("--ask and --topics go together: --ask 'Write a short question about {}.' --topics cats rain")
    return args


def sample(teacher, tokenizer, args, chunk):
    """256 samples -> those that end, as one record."""
    (before, after), end, starts = m.chat_parts(tokenizer), m.end_token(tokenizer), []
    for topic in args.topics or [None]:
        ids = before if topic is None else before + m.text_ids(tokenizer, args.ask.format(topic)) + after
        starts.append(teacher.get_input_embeddings()(torch.tensor(ids, device=teacher.device)))
    torch.manual_seed(1_000_003 * args.seed + chunk)
    starts = list(itertools.islice(itertools.cycle(starts), 256))
    outputs = m.generate(teacher, starts, eos_id=end, temperature=1.0, max_new_tokens=min(args.max_new_tokens, 8 + args.max_words))
    rows = []
    for i, ids in enumerate(outputs):
        text = tokenizer.decode(ids[:-1])
        if ids[-1] == end and text and (not args.ask or text.endswith("?")):
            rows.append({"id": f"sampled-{chunk:04d}-{i:03d}", "prompt": text, "source": "sampled"})
    return {"id": chunk, "rows": rows}


def main(args):
    rank, world = m.start_processes(args.device)
    teacher, sampled = functools.cache(lambda: synth.load_teacher(args)), []  # loaded when first needed, if ever
    options = json.dumps([args.teacher, args.max_words, args.dtype, args.seed, args.ask, args.topics])  # what the samples depend on
    stage = f"prompts-{hashlib.sha1(options.encode()).hexdigest()[:12]}"
    for first in range(0, 40 + args.count // 6, world):
        todo = [{"id": chunk} for chunk in range(first, first + world)]
        chunks = synth.staged(args, stage, todo, 1, lambda batch: [sample(*teacher(), args, batch[0]["id"])])
        for row in todo:
            sampled += chunks[row["id"]]["rows"]
        rows, drops = synth.choose(sampled, args)
        if len(rows) >= args.count:
            break
    else:
        raise RuntimeError(f"{len(rows)} usable prompts of {len(sampled)}; raise --max-words, or use another teacher")
    if rank == 0:
        lines = [json.dumps({key: row[key] for key in ("id", "prompt", "source")}) + "\n" for row in rows[:args.count]]
        m.write_atomically(Path(args.out) / "prompts.jsonl", "".join(lines))
        print(f"{args.out}/prompts.jsonl: {len(lines)} prompts; dropped: {dict(collections.Counter(drop['reason'] for drop in drops))}")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("sample_prompts.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
