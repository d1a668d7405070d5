"""
All that is said about speed and memory, measured: against named rivals, same inputs, same machine, same run.

  python tools/bench.py --out results/bench                    # two cores: under 15 minutes
  python tools/bench.py --out results/gpu --device cuda        # one GPU: larger sizes
  python tools/bench.py --out results/bench --parts loss step  # some of it

Writes  OUT/PART.json, OUT/PART.md, OUT/PART.png for each part, OUT/PART.log (what the libraries print), and
        OUT/README.md, all parts that are there

Times: medians of interleaved repetitions. Memory: of a fresh process, resident (CPU) or the allocator's (GPU).
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_generate
import bench_growth
import bench_lib as lib
import bench_loss
import bench_step
import model as m

PARTS = {"loss": bench_loss, "step": bench_step, "answers": bench_generate, "growth": bench_growth}
SIZES = {  # of each device, where no flag says otherwise
    "cpu": dict(repeats=2, rows=[1024], vocab=151_936, width=896, cases=["frozen head, fp32", "trainable head, bf16"],
                llm=m.DEFAULT_LLM, encoder=m.DEFAULT_STUDENT.partition("+")[0], batch_size=8, answer_tokens=40,
                steps=5, prompts=384, spoken=96),
    "cuda": dict(repeats=3, rows=[4096, 8192], vocab=152_064, width=3584, cases=["frozen head, bf16", "trainable head, bf16"],
                 llm="random:1.5B", encoder="random:large", batch_size=16, answer_tokens=128,
                 steps=8, prompts=384, spoken=384)}


def get_args(argv=None):
    device = argparse.ArgumentParser(add_help=False)  # first, since the sizes depend on it
    device.add_argument("--device", choices=list(SIZES), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where; the sizes below are its own")
    p = argparse.ArgumentParser(parents=[device], description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="what is measured")
    p.add_argument("--out", required=True, help="folder of the results")
    p.add_argument("--repeats", type=int, help="interleaved repetitions of loss and answers")
    for name, part in PARTS.items():
        part.add_arguments(p.add_argument_group(name))
    p.set_defaults(**SIZES[device.parse_known_args(argv)[0].device])
    return p.parse_args(argv)


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    about = lib.environment(args.device)
    for name in args.parts:
        start, part = time.perf_counter(), PARTS[name]
        results = part.measure(args)
        record = {"environment": about, "minutes": (time.perf_counter() - start) / 60, **results}
        (out / f"{name}.json").write_text(json.dumps(record, indent=1))
        (out / f"{name}.md").write_text(text := part.report(results) + "\n")
        part.draw(results, out / f"{name}.png")
        print(f"{text}\n{name}: {record['minutes']:.1f} minutes\n", flush=True)
    head = ", ".join(f"{key} {value}" if key != "device" else value for key, value in about.items() if value)
    texts = [path.read_text() for name in PARTS if (path := out / f"{name}.md").exists()]
    (out / "README.md").write_text(f"{head}\n\n" + "\n".join(texts))


if __name__ == "__main__":
    main(get_args())
