"""A run that kills itself when it renames a file or folder for the N-th time.

killed_run.py CONFIG N: where N is negative, it kills itself at the -N-th call that searches or writes near duplicates.
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
