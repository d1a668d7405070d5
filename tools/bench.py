"""
All that is said about speed and memory, measured: against named rivals, same inputs, same machine, same run.

  python tools/bench.py --out out/bench                        # CPU
  python tools/bench.py --out out/bench-gpu --device cuda      # one GPU: larger sizes
  python tools/bench.py --out out/bench --parts hearing --data data/quick/heldout.jsonl

Writes  OUT/PART.json, OUT/bench_SCRIPT.log (what the libraries print), and OUT/README.md, the tables of all parts that are there
Times: medians of interleaved repetitions. Memory: of a process of its own, resident (CPU) or the allocator's (GPU).
"""
import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_generate
import bench_lib as lib
import bench_loss
import bench_step
import model as m

PARTS = {"loss": bench_loss.measure, "step": bench_step.measure, "hearing": bench_generate.measure_hearing}  # -> results, title, table
WHISPER, _, LLM = m.DEFAULT_STUDENT.partition("+")
SIZES = {  # of each device, where no flag says otherwise
    "cpu": dict(repeats=2, rows=1024, vocab=151_936, width=896, cases=["frozen head, fp32", "trainable head, bf16"],
                batch_size=8, answer_tokens=40, steps=5, clips=24),
    "cuda": dict(repeats=3, rows=4096, vocab=152_064, width=3584, cases=["frozen head, bf16", "trainable head, bf16"],
                 batch_size=16, answer_tokens=128, steps=8, clips=32)}


def get_args(argv=None):
    device = argparse.ArgumentParser(add_help=False)  # first, since the sizes depend on it
    device.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda; the sizes below are its own")
    one, shown = m.number(int, 1), argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(parents=[device], description=__doc__.splitlines()[1], formatter_class=shown)
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--repeats", type=one, help="interleaved repetitions of loss and hearing")
    p.add_argument("--data", help="manifest of the step's rows and of the clips; default: questions that espeak-ng speaks")
    p.add_argument("--llm", default=LLM, help="of teacher and student; random weights take as long")
    p.add_argument("--whisper", default=WHISPER, help="of the student, and who hears")
    p.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of step and hearing; auto: in which matrices multiply faster")
    p.add_argument("--rows", type=one, help="loss: answer tokens N")
    p.add_argument("--vocab", type=one, help="loss: V")
    p.add_argument("--width", type=one, help="loss: H of student and teacher")
    p.add_argument("--cases", nargs="+", choices=list(bench_loss.CASES), help="loss: what is compared")
    p.add_argument("--batch-size", type=one, help="step: rows")
    p.add_argument("--answer-tokens", type=one, help="step: longer answers are cut there")
    p.add_argument("--steps", type=one, help="step: how many are timed")
    p.add_argument("--clips", type=one, help="hearing: how many")
    p.set_defaults(**SIZES[device.parse_known_args(argv)[0].device])
    args = p.parse_args(argv)
    args.dtype = faster_dtype(args.device) if args.dtype == "auto" else args.dtype
    return args


def faster_dtype(device):
    """The one in which matrices multiply faster: bfloat16 on a GPU and on CPUs made for it."""
    flags = Path("/proc/cpuinfo")
    able = flags.exists() and re.search("amx_bf16|avx512_bf16|bf16mm", flags.read_text())
    return "bfloat16" if device == "cuda" or able else "float32"


def main(args):
    out, about = Path(args.out), lib.environment(args.device)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        start = time.perf_counter()
        results, title, table = PARTS[name](args)
        record = {"environment": about, "minutes": (time.perf_counter() - start) / 60, "args": vars(args), "results": results,
                  "table": f"{title}\n\n{table}"}
        (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{record['table']}\n{name}: {record['minutes']:.1f} minutes\n", flush=True)
    texts = []
    for path in filter(Path.exists, (out / f"{name}.json" for name in PARTS)):
        record = json.loads(path.read_text())  # perhaps of another machine
        texts.append(", ".join(f"{key} {value}" for key, value in record["environment"].items()).removeprefix("device "))
        texts.append(record["table"])
    (out / "README.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main(get_args())
