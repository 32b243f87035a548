"""A run that ends as a power cut ends it, at the N-th moment at which it gives a file or folder its name.

killed_run.py CONFIG N: or, where N is negative, at the -N-th moment at which near duplicates are written.
"""

import os
import signal
import sys
from pathlib import Path

from data_prep.pipeline.curation import read_config, run
from data_prep.steps import near_duplicates

if __name__ == "__main__":
    left = abs(int(sys.argv[2]))

    def dying(method):
        def call(*arguments, **settings):
            global left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments, **settings)

        return call

    if int(sys.argv[2]) > 0:
        Path.rename, Path.replace = dying(Path.rename), dying(Path.replace)
    else:
        near_duplicates.near_pairs = dying(near_duplicates.near_pairs)
        near_duplicates.pq.write_table = dying(near_duplicates.pq.write_table)
    run(read_config(Path(sys.argv[1])))
