#!/usr/bin/env bash
# From a fresh clone, with only Python >= 3.11 and pip, to generated text. Run it again at will.
#   bash scripts/quickstart.sh           HYBRIDZOO_TORCH and PYTHON: see scripts/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh

echo "==> hybridzoo list"
.venv/bin/hybridzoo list

prompt="ROMEO:"
echo "==> hybridzoo generate --prompt \"$prompt\" --max-new-tokens 200 --temperature 0.8 --seed 1"
.venv/bin/hybridzoo generate --prompt "$prompt" --max-new-tokens 200 --temperature 0.8 --seed 1
