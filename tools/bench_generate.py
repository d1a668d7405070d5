"""
How fast answers are generated: synth_speech.py's way against transformers' generate, same prompts, same machine, same run.

  python tools/bench_generate.py --data data/quick/heard/train.jsonl --out results/bench_generate.json

Greedy, 40 new tokens, prompts of the manifest. Rival: AutoModelForCausalLM.generate, float32, batches of 48 in input order.
Ours: as `torchrun --nproc_per_node=CORES synth_speech.py` answers: one process a core, the dtype that is faster, large batches
sorted by length; and the same in one process. Tokens count up to and with the end of turn; loading is not counted.
"""
import argparse
import functools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM")
    p.add_argument("--data", required=True, help="manifest whose prompts are answered")
    p.add_argument("--rows", type=int, default=384, help="prompts")
    p.add_argument("--repeats", type=int, default=3, help="interleaved repetitions; the median counts")
    p.add_argument("--out", required=True, help="JSON file")
    return p.parse_args(argv)


@functools.cache
def load(name, dtype, threads):
    torch.set_num_threads(threads)
    return m.load_llm(name, dtype)


def rival(rows, name, threads):
    """Tokens that transformers' own batched generate gives."""
    llm, tokenizer = load(name, torch.float32, threads)
    tokens, end = 0, m.end_token(tokenizer)
    for start in range(0, len(rows), 48):
        chats = [[{"role": "user", "content": r["prompt"]}] for r in rows[start:start + 48]]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                 for c in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                           add_special_tokens=False)
        ids = llm.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=end)
        for row in ids[:, inputs.input_ids.shape[1]:].tolist():
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens


def ours(rows, name, threads, dtype):
    """Tokens of one process's share, in batches as synth_speech.py makes them."""
    llm, tokenizer = load(name, dtype, threads)
    return sum(record["tokens"] for start in range(0, len(rows), 384)
               for record in synth_speech.answer(llm, tokenizer, rows[start:start + 384], 40))


def main(args):
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    rows = [r for r in rows if r["response"]][:args.rows]
    by_length = sorted(rows, key=lambda r: len(r["prompt"]))
    cores, dtype = len(os.sched_getaffinity(0)), synth_speech.measured_dtype("cpu")
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:

        def in_processes():
            shares = [pool.submit(ours, by_length[i::cores], args.teacher, 1, dtype) for i in range(cores)]
            return sum(share.result() for share in shares)

        ways = {"transformers": lambda: rival(rows, args.teacher, cores),
                "ours, one process": lambda: ours(by_length, args.teacher, cores, dtype),
                "ours": in_processes}
        in_processes()  # loads the models
        rates = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                load(args.teacher, torch.float32, cores), load(args.teacher, dtype, cores)
                start = time.perf_counter()
                tokens = way()
                rates[name].append(tokens / (time.perf_counter() - start))
                print(f"{name}: {rates[name][-1]:.0f} tokens/s", flush=True)
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    record = {"rows": len(rows), "cores": cores, "dtype": str(dtype), "tokens_per_s": rates, "medians": medians,
              "ratio": medians["ours"] / medians["transformers"], "torch": torch.__version__}
    Path(args.out).write_text(json.dumps(record, indent=1))
    print(f"ratio {record['ratio']:.2f}")


if __name__ == "__main__":
    main(get_args())
