#!/bin/sh
# Moves what means nothing without torch to a folder of its own, which only the images with torch get: transformers'
# models, of which the other steps use the tokenizers alone, and what only evaluate uses.
# set_aside.sh FROM TO
set -eu
cd "$1"
mkdir -p "$2"
mv nltk nltk-* rouge_score rouge_score-* "$2"
find transformers/models -mindepth 2 -type f \( -name 'modeling_*.py' -o -name 'image_processing_*.py' -o -name 'video_processing_*.py' \) \
    ! -path 'transformers/models/auto/*' | while read -r file; do
    mkdir -p "$2/$(dirname "$file")"
    mv "$file" "$2/$file"
done
chmod -R u=rwX,go=rX "$2"
