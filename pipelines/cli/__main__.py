"""`python -m mixtune.pipelines.cli` is the command `mixtune`."""

from .main import main

main()
