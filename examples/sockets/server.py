"""A web server that is handed its socket, and that loses no request when it is
replaced."""

import os
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

leaving = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    wbufsize = -1  # an answer is one packet

    def do_GET(self):
        time.sleep(0.02)  # the work
        body = b"%d\n" % os.getpid()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if leaving.is_set():
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = False  # the end waits for the requests being worked on


if os.environ.get("LISTEN_PID") == str(os.getpid()):
    server = Server(("", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=3)
    # Other instances accept from it, too: one that comes too late must not wait.
    server.socket.setblocking(False)
else:  # as from a shell
    server = Server(("127.0.0.1", 8080), Handler)


def leave(*_):
    # No new connections: those wait in the socket for whoever comes next. Those
    # there are get an answer with "Connection: close" to their next request.
    leaving.set()
    threading.Thread(target=server.shutdown).start()


signal.signal(signal.SIGTERM, leave)
server.serve_forever(poll_interval=0.05)
end = time.monotonic() + 5
while threading.active_count() > 1 and time.monotonic() < end:
    time.sleep(0.01)
os._exit(0)  # connections that are still idle by now are cut
