"""Start a program in isolation, watch it, and print how it came out as one line of JSON.

Run by the sandbox as ``python -I -S launcher.py CONFIG``. Who is who:

- this process leaves the system's namespaces and waits for the supervisor;
- the supervisor is the first process of the jail: when it ends, the kernel ends all others. It has the clock;
- the judge has the tests, if there are any;
- the warden is the first process of a process namespace inside of the jail's; its child is the program.

The program and the tests lie in two files without a name, which only the two that need them read. So no secret is ever
in the memory of the process from which the program is forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
from nanochat_pl.tools.sandbox import isolation, supervisor  # without site-packages, it is found here alone

del sys.path[0]


def main() -> None:
    """One line on stdout: ``reason``, ``message``, ``seconds``, ``output``.

    Or ``missing``: [[layer, text], …]; or ``failed``: why no process could be started.
    """
    config = json.loads(sys.argv[1])
    config["first"] = isolation.first_free_id()
    os.environ.clear()
    with contextlib.suppress(OSError):  # where memory gets short, these are ended first
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")
    if config["probe"]:
        return supervisor.report({"missing": missing_walls()})
    try:
        if config["strict"]:
            os.chdir(config["prefix"])
            isolation.enter_namespaces(config["first"])
        elif config["first"] is not None:
            os.chown(config["folder"], config["first"] + 2, config["first"] + 2)
    except isolation.LayerMissing as missing:
        return supervisor.report({"missing": [["", str(missing)]]})
    try:
        pid = supervisor.fork()
    except supervisor.Failed as failed:
        return supervisor.report({"failed": str(failed)})
    if pid == 0:
        supervisor.supervise(config)
    os.waitpid(pid, 0)


def missing_walls() -> list[list[str]]:
    """Name and reason of what this system does not give, each tried in a process of its own."""
    missing = []
    for name in (*isolation.NAMESPACES, "system call filter", "Landlock"):
        read_end, write_end = os.pipe()
        if supervisor.fork() == 0:
            try:
                if name in isolation.NAMESPACES:
                    isolation.try_namespace(name)
                elif name == "Landlock":
                    isolation.restrict_files([], [])
                else:
                    isolation.filter_system_calls(strict=True)
            except isolation.LayerMissing as absent:
                os.write(write_end, json.dumps([name, str(absent)]).encode())
            os._exit(0)
        os.close(write_end)
        os.wait()
        if problem := os.read(read_end, 1000):
            missing.append(json.loads(problem))
        os.close(read_end)
    return missing


if __name__ == "__main__":
    main()
