"""A run that ends as a power cut ends it, at the N-th moment at which it gives a file or folder its name.

killed_run.py FOLDER N
"""

import os
import signal
import sys
from pathlib import Path

from data_prep.curation import read_config, run

if __name__ == "__main__":
    left = int(sys.argv[2])

    def dying(method):
        def call(*arguments):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments)

        return call

    Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
    run(read_config(Path(sys.argv[1])))
