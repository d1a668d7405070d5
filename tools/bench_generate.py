"""
How fast answers are generated, by text as synth_speech.py does and by speech as eval_voicebench.py does, against
transformers' own generate: greedy, the same prompts.

Rival: AutoModelForCausalLM.generate in batches of 48 in input order, in float32 and in bfloat16. By speech, in float32,
it gets what the same student hears, with WhisperEncoder.forward on 30 s of each clip, as `inputs_embeds`.
Ours: the scripts' own functions in batches of the scripts' own sizes, sorted, one process a core on a CPU; and the
same with no more prompts than the rival has at a time.
Tokens count up to and with the end of turn; loading is not counted. Called by bench.py.
"""
import argparse
import functools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import bench_lib as lib
import bench_step
import eval_voicebench
import model as m
import synth_speech

NEW_TOKENS = 40
RIVAL_BATCH = 48
OUR_BATCH = {"text": synth_speech.get_args(["--sample-prompts", "1", "--out", "x"]).batch_size,
             "speech": eval_voicebench.get_args(["--student", "x", "--out", "x"]).batch_size}


def add_arguments(group):
    group.add_argument("--prompts", type=int, help="prompts that are answered, of --data or of tools/questions.jsonl")
    group.add_argument("--spoken", type=int, help="of these, so many are also heard")


@functools.cache
def load(name, dtype, device):
    """LLM -> (llm, tokenizer); ENCODER+LLM -> student, as eval_voicebench.py loads it."""
    if "+" in name:
        return eval_voicebench.load(argparse.Namespace(student=name, dtype=dtype, device=device, seed=0, revision=None,
                                                       trust_remote_code=False), "student")
    llm, tokenizer = m.load_llm(name, getattr(torch, dtype))
    return llm.to(device), tokenizer


def rival(rows, llm, tokenizer):
    """Tokens that transformers' own batched generate gives."""
    tokens, end = 0, m.end_token(tokenizer)
    for start in range(0, len(rows), RIVAL_BATCH):
        chats = [[{"role": "user", "content": r["prompt"]}] for r in rows[start:start + RIVAL_BATCH]]
        texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False,
                           return_token_type_ids=False).to(llm.device)
        ids = llm.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=end)
        for row in ids[:, inputs.input_ids.shape[1]:].tolist():
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens


@torch.inference_mode()
def rival_speech(rows, student):
    """The same by speech: clips of 30 s, then prompts as embeddings."""
    tokens, end = 0, m.end_token(student.tokenizer)
    extractor, encoder = student.processors["extractor"], student.encoder
    for start in range(0, len(rows), RIVAL_BATCH):
        before, after, waveforms = zip(*map(student.prompt, rows[start:start + RIVAL_BATCH]))
        mels = extractor([w.numpy() for w in waveforms], sampling_rate=m.SAMPLE_RATE, return_tensors="pt")
        states = encoder(mels.input_features.to(encoder.conv1.weight)).last_hidden_state              # (B, 1500, D)
        features = [x[:-(-len(w) // 320)] for x, w in zip(states, waveforms)]
        heard = student.read(*student.spell(features))[0]
        prompts = student.splice(before, after, dict(enumerate(heard)))
        embeds = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(p), dtype=torch.long) for p in prompts],
                                               batch_first=True, padding_side="left").to(embeds.device)
        ids = student.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW_TOKENS,
                                   do_sample=False, eos_token_id=end, pad_token_id=end)
        for row in ids.tolist():
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens


def ours(rows, llm, tokenizer):
    """Tokens of one process's share, in batches as synth_speech.py makes them."""
    return sum(record["tokens"] for start in range(0, len(rows), OUR_BATCH["text"])
               for record in synth_speech.answer(llm, tokenizer, rows[start:start + OUR_BATCH["text"]], NEW_TOKENS))


def ours_speech(rows, student):
    """The same by speech, as eval_voicebench.py asks; tokens are counted where they are generated."""
    tokens, generate = [], m.generate

    def counted(*args, **options):
        ids = generate(*args, **options)
        tokens.extend(map(len, ids))
        return ids
    m.generate = counted
    for start in range(0, len(rows), OUR_BATCH["speech"]):
        student.generate(rows[start:start + OUR_BATCH["speech"]], NEW_TOKENS)
    m.generate = generate
    return sum(tokens)


WAYS = {("ours", "text"): ours, ("transformers", "text"): rival,
        ("ours", "speech"): ours_speech, ("transformers", "speech"): rival_speech}


def run(way, by, rows, name, dtype, device):
    """Job of a process -> tokens; without rows it loads."""
    if dtype == "faster":
        dtype = faster_dtype(device)
    loaded = load(name, dtype, device)
    tokens = WAYS[way, by](rows, *(loaded if by == "text" else [loaded])) if rows else 0
    lib.wait(device)
    return {"tokens": tokens, "dtype": dtype}


@functools.cache
def faster_dtype(device):
    return str(synth_speech.measured_dtype(device)).removeprefix("torch.")


def read_prompts(args, folder):
    """-> rows with prompt and audio; few are repeated."""
    bench_step.prepare_data(args, folder, args.prompts)
    rows = [json.loads(line) for line in (folder / "dual.jsonl").read_text().splitlines()]
    return [{"prompt": r["prompt"], "id": r["id"], "audio": str(folder / r["audio"]), "seconds": r["seconds"]}
            for r in rows]


def ways_of(args, rows, llm, encoder):
    """-> {by: {name: (way, model, dtype, shares of the rows)}}"""
    cores, by_text = lib.cores() if args.device == "cpu" else 1, [{k: r[k] for k in ("id", "prompt")} for r in rows]
    spoken = [{"audio": r["audio"]} for r in sorted(rows[:args.spoken], key=lambda r: r["seconds"])]
    few, student = by_text[:RIVAL_BATCH], f"{encoder}+{llm}"
    sorted_few, by_length = (sorted(x, key=lambda r: len(r["prompt"])) for x in (few, by_text))
    rival_spoken = [{"audio": r["audio"]} for r in rows[:RIVAL_BATCH]]
    return {"text": {"transformers, float32": ("transformers", llm, "float32", [few]),
                     "transformers, bfloat16": ("transformers", llm, "bfloat16", [few]),
                     f"ours, {len(few)} prompts": ("ours", llm, "faster", [sorted_few[i::cores] for i in range(cores)]),
                     "ours": ("ours", llm, "faster", [by_length[i::cores] for i in range(cores)])},
            "speech": {"transformers, float32": ("transformers", student, "float32", [rival_spoken]),
                       "ours": ("ours", student, "faster", [spoken[i::cores] for i in range(cores)])}}


def measure(args):
    """-> {"by": {text, speech: {name: tokens_per_s, all, dtype, prompts}}, ...}"""
    log, cores, results = Path(args.out) / "answers.log", lib.cores(), {}
    with tempfile.TemporaryDirectory() as folder:
        llm, encoder = bench_step.prepare_models(args, Path(folder))
        rows = read_prompts(args, Path(folder) / "data")
        for by, ways in ways_of(args, rows, llm, encoder).items():
            results[by] = measure_ways(args, by, ways, log)
    return {"by": results, "new_tokens": NEW_TOKENS, "cores": cores, "llm": args.llm, "encoder": args.encoder,
            "device": args.device}


def measure_ways(args, by, ways, log):
    rates, dtypes, cores = {name: [] for name in ways}, {}, lib.cores()
    workers = {name: [lib.Worker(__file__, log, OMP_NUM_THREADS=str(max(1, cores // len(shares)))) for _ in shares]
               for name, (*_, shares) in ways.items()}
    for name, (way, model, dtype, shares) in ways.items():
        for worker in workers[name]:  # loads, and a GPU's kernels
            dtypes[name] = worker.ask(way=way, by=by, rows=shares[0][:4] if args.device == "cuda" else [], dtype=dtype,
                                      name=model, device=args.device)["dtype"]
    for _ in range(args.repeats):
        for name, (way, model, _, shares) in ways.items():
            start = time.perf_counter()
            for worker, share in zip(workers[name], shares):
                worker.send(way=way, by=by, rows=share, dtype=dtypes[name], name=model, device=args.device)
            tokens = sum(worker.receive()["tokens"] for worker in workers[name])
            rates[name].append(tokens / (time.perf_counter() - start))
            print(f"answers by {by}: {name} {rates[name][-1]:.0f} tokens/s", flush=True)
    for worker in [worker for some in workers.values() for worker in some]:
        worker.close()
    return {name: {"tokens_per_s": lib.median(values), "all": values, "dtype": dtypes[name],
                   "prompts": sum(map(len, ways[name][-1]))} for name, values in rates.items()}


def report(results):
    lines = []
    for by, ways in results["by"].items():
        own = ways["ours"]["tokens_per_s"]
        models = results["llm"] if by == "text" else f"{results['encoder']}+{results['llm']}"
        lines += [f"**Answers by {by}**: at most {results['new_tokens']} tokens, greedy, {models}, {results['device']}"
                  + (f", {results['cores']} cores" if results["device"] == "cpu" else ""), "",
                  lib.table(["", "prompts", "dtype", "tokens/s", "ours / it, speed"],
                            [[name, r["prompts"], r["dtype"], f"{r['tokens_per_s']:.0f}",
                              f"{own / r['tokens_per_s']:.2f}"] for name, r in ways.items()]), ""]
    return "\n".join(lines)


def draw(results, path):
    figure, axes = lib.figure(len(results["by"]))
    for axis, (by, ways) in zip(axes, results["by"].items()):
        for place, (name, r) in enumerate(ways.items()):
            axis.barh(place, r["tokens_per_s"], color=lib.colour(name))
        axis.set(title=f"answers by {by}", xlabel="tokens/s", yticks=range(len(ways)), yticklabels=list(ways))
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    lib.serve(run)
