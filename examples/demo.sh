#!/bin/sh
# The main job on text that every machine has; `make demo` runs it.
set -e
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
say() { printf '\n── %s\n   $ %s\n' "$1" "$2"; }

rm -rf runs/demo

say "train: 4 processes, a pipeline of 2 stages in 2 copies" "stretto train examples/demo.toml"
stretto train examples/demo.toml

more="plan.pp=1 plan.dp_replicate=1 plan.tp=2 training.steps=810"
say "go on from its checkpoint under another plan: tensor parallel over 2" "stretto train examples/demo.toml --set $more"
# shellcheck disable=SC2086
stretto train examples/demo.toml --set $more

say "text from it, on one process" "stretto generate runs/demo --prompt '    def __init__(self'"
stretto generate runs/demo --prompt '    def __init__(self' --max-tokens 220 --temperature 0.6 --top-k 20 --seed 1

say "export" "stretto convert runs/demo runs/demo/hugging-face"
stretto convert runs/demo runs/demo/hugging-face
ls -l runs/demo/hugging-face
