#!/usr/bin/env bash
# Four languages, one student: what it loses when it is taught to hear, and what distillation repairs, in each. The pair is of the paper's family.
#
#   python tools/offline_models.py --qwen; bash tools/languages.sh          half an hour on two cores with AMX, 12 GiB of memory
#
# The teacher invents questions in each language; clips of which Whisper mishears more than 3 words in 10 are dropped. Stopped anywhere, the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/languages out=out/languages results=results/languages
llm=Qwen/Qwen2.5-Coder-0.5B-Instruct student=openai/whisper-base+Qwen/Qwen2.5-Coder-0.5B-Instruct
dtype=float32
if grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
say() { printf '\n== %4d s  %s\n' $SECONDS "$*"; }

speak() {  # language, voice, what to ask for, topics
    language=$1 voice=$2 ask=$3
    shift 3
    say "$language"
    python tools/sample_prompts.py --teacher $llm --language $language --count 72 --max-words 16 --ask "$ask" --topics "$@" --dtype $dtype --out $data/$language
    python synth_speech.py --teacher $llm --language $language --input $data/$language/prompts.jsonl --voices $voice+{m1,m3,m7,f1,f2,f5} --takes 2 --heldout 16 \
        --max-wer 0.3 --max-new-tokens 12 --dtype $dtype --out $data/$language
    python tools/sound_questions.py $data/$language
}
speak en en-us "Write a short question about {}. Answer with the question alone." animals food London sport music weather school cars books health
speak de de "Schreibe eine kurze Frage über {}. Antworte nur mit der Frage." Tiere Essen Berlin Sport Musik Wetter Schule Autos Bücher Gesundheit
speak fr fr-fr "Écris une question courte sur {}. Réponds seulement par la question." "les animaux" "la cuisine" Paris "le sport" "la musique" "la météo" "l'école" \
    "les voitures" "les livres" "la santé"
speak es es "Escribe una pregunta corta sobre {}. Responde solo con la pregunta." "los animales" "la comida" Madrid "el deporte" "la música" "el tiempo" "la escuela" \
    "los coches" "los libros" "la salud"

train() { python train_kd.py --teacher $llm --cache $data/.cache --dtype $dtype --lr-warmup-steps 4 --save-every 1000 --resume "$@"; }
say "base: taught to repeat and to listen, in all of them"
train --student $student --data $data/{en,de,fr,es}/{transcripts,sounds}.jsonl --channels s2t --lr-llm 1e-4 --sound-batch-size 12 --max-steps 16 --out $out/base
say "distilled, in all of them"
train --student $out/base/last --data $data/{en,de,fr,es}/{train,sounds}.jsonl --ce-weight 0 --kd-weight 1 --temperature 1 --lora-rank 16 --lr-llm 1e-3 \
    --batch-size 8 --sound-batch-size 2 --max-steps 24 --out $out/distilled
say "teacher, cascade, base, distilled in each language"
python tools/compare.py --teacher $llm --start $student --base $out/base/last --distilled $out/distilled/last --cache $data/.cache --out $out --limit 24 \
    --data $data/{en,de,fr,es}/heldout.jsonl
mkdir -p $results && cp $out/report.{md,json,png} $results/
for run in base distilled; do cp $out/$run/log.jsonl $results/log-$run.jsonl; done
