"Are processes there still? For the tests that kill, leave and abandon them."
import time
from pathlib import Path


def gone(pids, seconds=4.):
    "Are all these processes gone within so many seconds?"
    end = time.monotonic() + seconds
    while alive := [p for p in pids if running(p)]:
        if time.monotonic() > end: return False
        time.sleep(.02)
    return not alive


def running(pid):
    "Is there such a process that is no zombie?"
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError: return False
