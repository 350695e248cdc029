"""A program that looks like llama-server to whoever starts it: takes its flags, loads for a while, answers /health.

    python fake_program.py --host 127.0.0.1 --port N [--load SECONDS] [--die STATUS] [--say TEXT] ...

What the tests of the managed server need of it is a flag of its own. Run by path.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("-m", "--model")
    parser.add_argument("--server", action="store_true")
    parser.add_argument("--load", type=float, default=0.0, help="seconds of 503 before it is ready")
    parser.add_argument("--die", type=int, help="end with this status instead of serving")
    parser.add_argument("--say", action="append", default=[], help="a line for stderr")
    parser.add_argument("--pids", help="append our pid, and that of a child which lives as long, to this file")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--taken", help="the first time, when this file is not there, find the port taken")
    options = parser.parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.pids:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(options.pids, "a") as file:
            file.write(f"{os.getpid()} {child.pid}\n")
    for line in options.say:
        print(line, file=sys.stderr, flush=True)
    if options.die is not None:
        sys.exit(options.die)
    if options.taken and not os.path.exists(options.taken):
        # Somebody else got the port first: a process that goes on listening to it.
        code = (
            "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); print(flush=True); "
        )
        holder = subprocess.Popen(
            [sys.executable, "-c", code + "time.sleep(600)", str(options.port)],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        holder.stdout.readline()
        with open(options.taken, "w") as file:
            file.write(str(holder.pid))
        sys.exit(f"couldn't bind to port {options.port}")

    ready_at = time.monotonic() + options.load

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            is_ready = time.monotonic() >= ready_at
            answer = {"status": "ok", "argv": sys.argv[1:]} if is_ready else {"error": "Loading model"}
            body = json.dumps(answer).encode()
            self.send_response(200 if is_ready else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer((options.host, options.port), Handler)
    threading.Thread(target=server.serve_forever).start()


if __name__ == "__main__":
    main()
