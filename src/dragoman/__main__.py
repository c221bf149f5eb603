"""`python -m dragoman` is `dragoman`, where a launcher wants a module."""

from dragoman.cli import main


if __name__ == "__main__":
    main()
