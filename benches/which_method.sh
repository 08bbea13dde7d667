#!/usr/bin/env bash
# The table of docs/which-method.md: policies at about 2.4, 3.4 and 4.4 bits on one text, first quarter calibrates.
#   bash benches/which_method.sh MODEL TEXT FOLDER [further options of kvpack eval, as --device cuda]
set -euo pipefail
model=$1 text=$2 folder=$3
shift 3
mkdir -p "$folder"

plain=()
for bits in 4 3 2; do
  for policy in "int$bits" "int$bits+1%" "nf$bits+1%" "turbo-$bits"; do plain+=(--policy "$policy+sink"); done
done
for policy in kivi-4 kivi-2 mustafar-50-q2 mustafar-50 mustafar-70; do plain+=(--policy "$policy+sink"); done
codebooks=()
for bits in 4 3 2; do
  for policy in "nuq$bits+1%+sink" "nuq$bits+1%+sink+calibrated"; do codebooks+=(--policy "$policy"); done
done

calibrate() {  # NAME, then options
  local file=$folder/$1.safetensors
  shift
  [ -e "$file" ] || kvpack calibrate "$model" -o "$file" --text "$text" --nsamples 16 --seqlen 2048 --sink "$@"
}
calibrate none --weights none --compat
calibrate fisher-compat --weights fisher --compat
calibrate fisher --weights fisher
calibrate query --weights query

measure=(--text "$text" --skip 25% --limit 48 --seqlen 2048 --resume)
kvpack eval "$model" "${plain[@]}" "${measure[@]}" --json "$folder/plain.json" --report "$folder/plain.html" "$@"
for name in none fisher-compat fisher query; do
  kvpack eval "$model" "${codebooks[@]}" "${measure[@]}" --calibration "$folder/$name.safetensors" \
    --json "$folder/$name.json" "$@"
done
