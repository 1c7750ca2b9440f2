"""`python -m ssimkd COMMAND` is `ssimkd COMMAND`; torchrun starts it as `-m ssimkd`, too."""

from ssimkd_cli import main

if __name__ == "__main__":  # processes that are started by others import this file
    main()
