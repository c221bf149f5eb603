"""`dragoman train` in several processes: accelerate launch scripts/train.py FILE [section.key=value ...] [--resume]"""

import sys

from dragoman.cli import main


if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
