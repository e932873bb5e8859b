"""`python -m minitron_megatron`, so that torchrun can start the command line."""

from minitron_megatron.cli import main

if __name__ == "__main__":
    main()
