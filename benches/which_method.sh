#!/usr/bin/env bash
# The table of docs/which-method.md: policies at about 2.4, 3.4 and 4.4 bits on one text, first quarter calibrates.
#   bash benches/which_method.sh MODEL TEXT FOLDER [options of both commands, as --device cuda --dtype float32]
set -euo pipefail
model=$1 text=$2 folder=$3
shift 3
mkdir -p "$folder"
kvpack() { "${PYTHON:-python}" -m kvpack "${@}"; }

plain=()
for bits in 4 3 2; do
  for policy in "int$bits" "turbo-$bits"; do plain+=(--policy "$policy" --policy "$policy+sink"); done
  for policy in "int$bits+1%" "nf$bits+1%"; do plain+=(--policy "$policy+sink"); done
done
for policy in kivi-4+sink kivi-2+sink mustafar-50-q2+sink mustafar-50 mustafar-70; do plain+=(--policy "$policy"); done
codebooks=()
for bits in 4 3 2; do
  for policy in "nuq$bits+1%+sink" "nuq$bits+1%+sink+calibrated"; do codebooks+=(--policy "$policy"); done
done

calibrate() {  # NAME WEIGHTS..., -- , options of both commands
  local file=$folder/$1.safetensors weights=()
  shift
  while [ "$1" != -- ]; do weights+=("$1") && shift; done
  shift
  [ -e "$file" ] || kvpack calibrate "$model" -o "$file" --text "$text" --nsamples 16 --seqlen 2048 --sink \
    --weights "${weights[@]}" "$@"
}
calibrate none none --compat -- "$@"
calibrate fisher-compat fisher --compat -- "$@"
calibrate fisher fisher -- "$@"
calibrate query query -- "$@"

measure=(--text "$text" --skip 25% --limit 48 --seqlen 2048 --resume)
kvpack eval "$model" "${plain[@]}" "${measure[@]}" --json "$folder/plain.json" --report "$folder/plain.html" "$@"
for name in none fisher-compat fisher query; do
  kvpack eval "$model" "${codebooks[@]}" "${measure[@]}" --calibration "$folder/$name.safetensors" \
    --json "$folder/$name.json" "$@"
done
