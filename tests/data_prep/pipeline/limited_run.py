"""`mm data run` on a disk that takes no file beyond so many bytes: limited_run.py CONFIG BYTES"""

import resource
import signal
import sys

from app.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    main(["data", "run", "--config", sys.argv[1], "--quiet"])
