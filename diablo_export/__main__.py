"""`python -m diablo_export`: the command line where its program is not on the path."""

from diablo_export.cli import main

if __name__ == "__main__":
    main()
