"""Says that one of several processes has ended, where it could not say so itself.

    python last_words.py INDEX COORDINATOR ADVICE

runs beside process INDEX as a process of its own, with a pipe from it as standard input, which closes when that process
is gone, however it went. JAX's runtime aborts a process the moment the coordinator dies, from a thread that knows
nothing of Python, and a killed process says nothing at all. Whoever ends in an orderly way writes to the pipe first.
"""

import signal
import socket
import sys


def main(index: str, coordinator: str, advice: str) -> None:
    # Whoever stops a group of processes means the one beside this, which may take its time to save.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.stdin.buffer.read():
        return
    reason = "it was killed, or aborted for what stands above"
    if index != "0":
        host, _, port = coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError:
            reason += f"; process 0, the coordinator, has ended or can't be reached at {coordinator}"
    print(f"\nerror: process {index}: {reason}. {advice}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
