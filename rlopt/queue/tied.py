"""``python tied.py PID COMMAND…`` becomes COMMAND, which is told to save and end when process PID, its parent, dies.

Without this a training would run on alone where a cluster lost or killed what attended to it, while the queue starts it
again elsewhere. The signals by which Slurm announces a time limit go to whoever attends, not to the command.
"""

import ctypes
import os
import signal
import sys

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(sys.argv[1]):  # it died before this was set
            sys.exit(128 + signal.SIGTERM)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.execvp(sys.argv[2], sys.argv[2:])
