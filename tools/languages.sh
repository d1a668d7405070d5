#!/usr/bin/env bash
# Does repair reach other languages? English breaks a student (base); it is repaired in English, then in four languages, by as many steps.
#
#   bash tools/languages.sh    under two hours on two cores with AMX
#
# Qwen2.5-Coder-0.5B knows them, SVOX Pico speaks them, Whisper-base hears what it says. Trained on questions that the LLM invents in each
# language, measured on 24 that people wrote, the same in all four. Stopped anywhere, the same command goes on; a student that is
# there is not trained again (delete out/languages/NAME).
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_WAIT_POLICY=passive
llm=Qwen/Qwen2.5-Coder-0.5B-Instruct
data=${DATA:-data/languages} out=${STUDENTS:-out/languages}
results=${RESULTS:-$out/results}
dtype=float32
if grep -q amx_bf16 /proc/cpuinfo 2>/dev/null; then dtype=bfloat16; fi
if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then dtype=bfloat16; fi
say() { printf '\n== %4d s  %s\n' $SECONDS "$*"; }
python -c "import ttspico" 2> /dev/null || pip install --quiet ttspico
python tools/offline_models.py --qwen

synth() {  # language, more options
    python synth_speech.py --teacher $llm --dtype $dtype --max-new-tokens 16 --language "$@" \
        --engine command --tts-command python tools/pico_tts.py "$1" {text} {wav}
}
invent() {  # folder, language, how many, what to ask the LLM for, topics: questions that it invents and answers, spoken, heard again
    local folder=$data/invented/$1 language=$2 count=$3 request=$4 && shift 4
    say "$folder: questions, answers, speech"
    python tools/sample_prompts.py --teacher $llm --dtype $dtype --language "$language" --max-words 18 --count "$count" --ask "$request" --topics "$@" \
        --exclude tools/language_questions.jsonl --out "$folder"
    synth "$language" --input "$folder/prompts.jsonl" --max-wer 0.3 --out "$folder"
}
english="animals food London sport music school cars books health weather family travel"
invent en en 80 "Write a short question about {}." $english
invent de de 80 "Schreibe eine kurze Frage über {}." Tiere Essen Berlin Sport Musik Schule Autos Bücher Gesundheit Wetter Familie Reisen
invent es es 80 "Escribe una pregunta corta sobre {}." animales comida Madrid deporte música escuela coches libros salud tiempo familia viajes
invent fr fr 80 "Écris une courte question sur {}." animaux nourriture Paris sport musique école voitures livres santé météo famille voyages
invent more en 298 "Write a short question about {}." $english  # as many as in all four
say "questions that people wrote"
for language in en de es fr; do
    grep "\"language\": \"$language\"" tools/language_questions.jsonl > "$data/$language.jsonl"
    synth "$language" --input "$data/$language.jsonl" --max-wer 10 --out "$data/$language"  # none is left out
done
synth en --input "$data/invented/en/prompts.jsonl" --takes 2 --out "$data/repeat"
python tools/sound_questions.py "$data/repeat"

train() {  # name, options
    [ -f "$out/$1/last/config.json" ] || python train_kd.py --teacher $llm --cache "$data/.cache" --dtype $dtype --lr-warmup-steps 4 --save-every 10 --resume \
        "${@:2}" --out "$out/$1"
}
gaps() {  # name: how far from the teacher by text (F), by speech from itself by text (M), over whole answers
    for language in en de es fr; do
        cp "$data/$language/train.jsonl" "$data/$language/alpacaeval_full-$language.jsonl"  # a subset of VoiceBench that only asks
        python tools/divergence.py --student "$out/$1/last" --teacher $llm --dtype $dtype --data "$data/$language" --max-new-tokens 64 --out "$out/$1/$language"
        cp "$out/$1/$language/divergence.json" "$results/$1/divergence-$language.json"
    done
}
keep() {  # name
    mkdir -p "$results/$1" && cp "$out/$1"/{args.json,log.jsonl} "$results/$1/"
    gaps "$1"
    rm -f "$out/$1"/ckpt-*.pt
}
distil() {  # name, folders
    say "$1: distilled in $2"
    train "$1" --student "$out/base/last" --data $(printf "$data/invented/%s/train.jsonl " $2) --ce-weight 0 --kd-weight 1 --temperature 1 --lora-rank 16 \
        --lr-llm 1e-3 --batch-size 8 --max-steps "${STEPS:-40}"
    say "$1: measured"
    [ -f "$out/$1/report.md" ] || python tools/compare.py --teacher $llm --start openai/whisper-base+$llm --base "$out/base/last" --distilled "$out/$1/last" --cache "$data/.cache" \
        --data "$data"/{en,de,es,fr}/train.jsonl --out "$out/$1"
    keep "$1" && cp "$out/$1"/report.{json,md} "$results/$1/"
}
say "base: taught to repeat and to listen in English"
train base --student openai/whisper-base+$llm --data "$data"/repeat/{transcripts,sounds}.jsonl --channels s2t --lr-llm 5e-5 --sound-batch-size 8 --max-steps 16
keep base
distil english en
distil english-more more
distil all "en de es fr"
for folder in "$data"/invented/*/ "$data"/{en,de,es,fr}/; do
    name=${folder#"$data"/} name=${name%/}
    cp "$folder/summary.json" "$results/speech-${name//\//-}.json"  # hours, word error rate, what was left out
done
python tools/plot_languages.py --results "$results"
