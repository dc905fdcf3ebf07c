#!/bin/sh
# Moves the files that mean nothing without torch to a folder of their own: transformers' models, of which the steps
# without torch use the tokenizers alone. The images with torch put them back.
# set_aside.sh FROM TO
set -eu
cd "$1"
find transformers -type f \( -name 'modeling_*.py' -o -name 'image_processing_*.py' -o -name 'video_processing_*.py' \) \
    ! -path 'transformers/models/auto/*' | while read -r file; do
    mkdir -p "$2/$(dirname "$file")"
    mv "$file" "$2/$file"
done
chmod -R u=rwX,go=rX "$2"
