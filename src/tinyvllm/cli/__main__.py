"""`python -m tinyvllm.cli` is `tinyvllm`."""

from tinyvllm.cli import main

main()
