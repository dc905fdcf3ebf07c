"""Models and tokenizers. Every step with a model imports this package first, so transformers' logging is set up here."""

import os

# Logs of steps end up in files and pods, where progress bars and advice of the hub would hide important lines. transformers
# reads these variables when it is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
