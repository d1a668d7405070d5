"""
How fast answers are generated: model.generate against transformers' generate, same prompts, same machine, same run.

  python tools/bench_generate.py --data data/quick/heard/train.jsonl --out results/bench_generate.json

Greedy, 40 new tokens, prompts of the manifest. Rival: AutoModelForCausalLM.generate, float32, batches of 48 in input order.
Ours: as synth_speech.py answers, bfloat16, batches of 384 sorted by length. Tokens count up to and with the end of turn.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as m
import synth_speech


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--teacher", default=m.DEFAULT_LLM, help="text LLM")
    p.add_argument("--data", required=True, help="manifest whose prompts are answered")
    p.add_argument("--rows", type=int, default=384, help="prompts")
    p.add_argument("--repeats", type=int, default=3, help="interleaved repetitions; the median counts")
    p.add_argument("--out", required=True, help="JSON file")
    return p.parse_args(argv)


def rival(llm, tokenizer, rows):
    """Tokens that transformers' own batched generate gives."""
    tokens, end = 0, m.end_token(tokenizer)
    for start in range(0, len(rows), 48):
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": r["prompt"]}], tokenize=False, add_generation_prompt=True)
                 for r in rows[start:start + 48]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        ids = llm.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=end)[:, inputs.input_ids.shape[1]:]
        tokens += sum((row.index(end) + 1 if end in row else len(row)) for row in ids.tolist())
    return tokens


def ours(llm, tokenizer, rows):
    rows = sorted(rows, key=lambda r: len(r["prompt"]))
    return sum(r["tokens"] for i in range(0, len(rows), 384) for r in synth_speech.answer(llm, tokenizer, rows[i:i + 384], 40))


def main(args):
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    rows = [r for r in rows if r["response"]][:args.rows]
    plain, tokenizer = m.load_llm(args.teacher, torch.float32)
    fast, _ = m.load_llm(args.teacher, synth_speech.measured_dtype("cpu"))
    rates = {"transformers": [], "ours": []}
    for _ in range(args.repeats):
        for name, function, llm in (("transformers", rival, plain), ("ours", ours, fast)):
            start = time.perf_counter()
            tokens = function(llm, tokenizer, rows)
            rates[name].append(tokens / (time.perf_counter() - start))
            print(f"{name}: {rates[name][-1]:.0f} tokens/s", flush=True)
    medians = {name: sorted(values)[len(values) // 2] for name, values in rates.items()}
    record = {"rows": len(rows), "tokens_per_s": rates, "medians": medians, "ratio": medians["ours"] / medians["transformers"],
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    Path(args.out).write_text(json.dumps(record, indent=1))
    print(f"ratio {record['ratio']:.2f}")


if __name__ == "__main__":
    main(get_args())
