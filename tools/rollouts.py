"""
What a student itself answers to what it hears, for the teacher to score: distillation on-policy.

  python tools/rollouts.py out/result/R6/last --data data/result/piper/both-train.jsonl
  python train_kd.py --student out/result/R6/last --data data/result/piper/both-train.jsonl data/result/piper/both-train-rollouts.jsonl ...

Of a row of the result, `response` is what the student said and `source` is "student": train_kd.py gives such a row the divergence
alone, for its words are no label. The teacher reads the question as text, and these words behind it (X-OPD, arXiv 2603.24596, by frozen
roll-outs as in JO-OPD, 2609.15313).
Reads   manifests of synth_speech.py, or your own recordings
Writes  beside each MANIFEST-rollouts.jsonl. Stopped anywhere, the same command goes on. Works under torchrun, too.
"""
import argparse
import functools
import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_voicebench as vb
import model as m
import synth_speech as synth


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    cuda = torch.cuda.is_available()
    p.add_argument("student", help="as of train_kd.py")
    p.add_argument("--data", nargs="+", required=True, help="manifests with prompt and audio")
    p.add_argument("--limit", type=m.number(int, 0), default=0, help="rows of each manifest, its first; 0: all")
    p.add_argument("--temperature", type=m.number(float, 0, 10), default=1.0, help="of the softmax that is drawn from; 0: the likeliest")
    p.add_argument("--max-new-tokens", type=m.number(int, 1), default=32, help="longest answer in tokens; the first tokens teach the most")
    p.add_argument("--batch-size", type=m.number(int, 1), default=64, help="clips answered together")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu", help="of the student")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if cuda else "float32", help="of its LLM")
    p.add_argument("--seed", type=m.number(int, 0, 2**32), default=0, help="other answers for each")
    return p.parse_args(argv)


def read_rows(path, limit):
    """-> rows as they stand there, with the paths of their clips."""
    def parse(row, where):
        m.check_texts(row, where, "prompt", "audio", "system", "instruction", "language")
        if "id" not in row or not row.get("prompt") or not row.get("audio"):
            raise ValueError(f"{where}: no id, prompt or audio; expected rows of synth_speech.py that a teacher can read")
        return row | {"clip": m.file_below(path.parent, row["audio"], where)}

    if not path.is_file():
        raise ValueError(f"{path}: no such manifest; synth_speech.py writes one")
    rows = m.json_lines(path, parse)
    if not rows:
        raise ValueError(f"{path}: no rows; expected some")
    return rows[:limit or None]


@torch.inference_mode()
def answer_batch(student, args, key, rows):
    """Rows that are heard together -> records with response and finish."""
    heard = student.hear([m.load_audio(row["clip"]) for row in rows], [row.get("language") for row in rows])
    prompts = [student.prompt({**row, "audio": row["clip"]}, found) for row, found in zip(rows, heard)]
    seed = int(hashlib.sha256(f"{key} {rows[0]['id']}".encode()).hexdigest()[:15], 16)  # a restart cuts the same batches
    torch.manual_seed(seed)
    outputs = m.generate(student.llm, student.embed(prompts, [[]] * len(rows)), max_new_tokens=args.max_new_tokens,
                         eos_id=m.end_token(student.tokenizer), temperature=args.temperature)
    return synth.answers_of(student.tokenizer, rows, outputs)


def load(args):
    student = m.load_student(args.student).to(args.device)
    m.cast(student.llm, getattr(torch, args.dtype))
    return student


def main(args):
    rank, _ = m.start_processes(args.device)
    student = functools.cache(lambda: load(args))  # loaded when first needed, if ever
    for path in map(Path, args.data):
        rows = read_rows(path, args.limit)
        options = [args.temperature, args.max_new_tokens, args.batch_size, args.dtype, args.seed]
        asked = [[row["id"], m.digest(row["clip"]), *map(row.get, ("system", "instruction", "language"))] for row in rows]
        content = [options, vb.weights_of(args.student), asked]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        args.out = path.parent
        answers = synth.staged(args, f"rollouts-{key}", rows, args.batch_size, lambda batch: answer_batch(student(), args, key, batch))
        kept = []
        for row in rows:
            said = {**row, **answers[row["id"]], "id": f"{row['id']}-own", "source": "student"}
            if said["response"]:  # to say nothing is no answer that could be scored
                kept.append({name: value for name, value in said.items() if name not in ("clip", "reference")})
        if rank == 0:
            target = path.with_name(f"{path.stem}-rollouts.jsonl")
            m.write_atomically(target, "".join(json.dumps(row) + "\n" for row in kept))
            print(f"{target}: {len(kept)} answers; {len(rows) - len(kept)} clips were not answered")


if __name__ == "__main__":
    try:
        main(get_args())
    except (ValueError, RuntimeError, OSError) as error:
        print("rollouts.py:", *str(error).split(), file=sys.stderr)
        sys.exit(2)
