"""`python -m jmoe` is the command `jmoe`."""

from jmoe.cli import main

if __name__ == "__main__":
    main()
