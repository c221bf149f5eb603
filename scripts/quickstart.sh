#!/usr/bin/env bash
# From nothing to a translating model: bash scripts/quickstart.sh [section.key=value ...]. From any folder; installs into .venv first.
# Anew each time; bash scripts/quickstart.sh --resume goes on with a training that was stopped.
# Takes minutes on two CPU cores; the second time it needs no network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install

# The products of a model this small are over before a second thread has started; several threads would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

echo "Training a small translator: about five minutes on an idle core"
model=runs/quickstart
earlier=--overwrite
overrides=()
for argument in "$@"; do
    case $argument in
        --resume) earlier=--resume ;;
        training.output_dir=*) model=${argument#*=} ;;
        *) overrides+=("$argument") ;;
    esac
done
dragoman train configs/quickstart.yaml "${overrides[@]}" training.output_dir="$model" $earlier

echo
echo "This small model knows one kind of text: short phrases from the menus and messages of applications. Some it has not seen:"
echo
dragoman generate "$model" --compare <<'SENTENCES'
Delete the selected files
The password is not valid
Remove this device from the list
Your account was deleted
Open the settings page
SENTENCES
echo
echo "Translate your own with:  .venv/bin/dragoman generate $model < FILE  (from $root), or with the three lines of Python above."
