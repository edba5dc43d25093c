#!/usr/bin/env bash
# Replays the paper's ablations small (Tables 8b, 8f) and the treatment of equal texts on the demo,
# and prints one table. usage: launch/ablations.sh [FOLDER] [--config.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
folder=runs/ablations
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  folder=$1
  shift
fi
source launch/env.sh ""

run() {
  local name=$1
  shift
  "$VENV/bin/python" -m coca_jax.train --config=configs/demo.py --workdir="$folder/$name" "$@"
}

run both "$@"
run contrastive_only --config.loss.captioning_weight=0.0 "$@"
run captioning_only --config.loss.contrastive_weight=0.0 "$@"
run one_query --config.model.pooler.num_queries=1 "$@"
run equal_texts_negatives --config.loss.duplicate_texts=negatives "$@"

"$VENV/bin/python" - "$folder" <<'PY'
import json
import pathlib
import sys

columns = {
    "zero-shot": "zeroshot/scenes_heldout/top1",
    "R@1 image to text": "retrieval/scenes_heldout/image_to_text_r1",
    "R@1 text to image": "retrieval/scenes_heldout/text_to_image_r1",
    "exact captions": "captioning/scenes_test/exact_match",
    "the same, held out": "captioning/scenes_heldout/exact_match",
    "F1, 2 to 4 objects": "captioning/scenes_heldout_many/attribute_f1",
    "perplexity, 2 to 4": "captioning/scenes_heldout_many/perplexity",
}
print("| run |", " | ".join(columns), "|")
print("|---" * (len(columns) + 1) + "|")
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/eval.json")):
    scores = json.loads(path.read_text())
    cells = [scores.get(key) for key in columns.values()]
    print("|", path.parent.name, "|", " | ".join("-" if c is None else f"{c:.3f}" for c in cells), "|")
PY
