"""Two hosts on which a program sleeps: `python -m tests.faults.idle_hosts DIRECTORY`, in a laboratory."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.support.hosts import Host, Switch, end_with_caller

if __name__ == "__main__":
    end_with_caller()
    switch = Switch(Path(sys.argv[1]), ["host1", "host2"])
    hosts = [Host(name, switch) for name in switch.addresses]
    for host in hosts:
        host.start("sleep", "1000", output=host.files / "log")
    print("two hosts are idle", flush=True)
    time.sleep(1000)
