"""Worker side of the frames protocol (docs/worker-protocol.md) for Python 3.8
and newer. Standard library only.

    import remuda_worker

    def thumbnail(task):
        ...
        return {"width": w, "height": h}

    remuda_worker.serve({"thumbnail": thumbnail})
"""

import json
import os
import platform
import queue
import socket
import struct
import threading

__all__ = ["serve", "Task", "TaskError"]

VERSION = 1
MAX_FRAME = 64 << 20
HELLO, TASK, RESULT, ERROR, PROGRESS, CHUNK, CANCEL, PING, PONG, STOP = range(1, 11)
_HEADER = struct.Struct("<IB3xI")
_TASK = struct.Struct("<IH")


class TaskError(Exception):
    """A failure with a code for programs, and data that can be JSON."""

    def __init__(self, message, code="", data=None):
        super().__init__(message)
        self.message, self.code, self.data = message, code, data


class Task:
    """What there is to do.

    name, body (bytes), timeout (seconds, or None), and cancelled, an Event
    that is set when the answer is not wanted any more.
    """

    __slots__ = ("name", "body", "timeout", "cancelled", "_id", "_channel")

    def __init__(self, channel, id, name, timeout, body):
        self._channel, self._id = channel, id
        self.name, self.body = name, body
        self.timeout = timeout / 1000 if timeout else None
        self.cancelled = threading.Event()

    @property
    def data(self):
        """The task as JSON; None where it is empty."""
        return json.loads(self.body) if self.body else None

    def progress(self, value):
        """Tells whoever waits how far the task is."""
        self._channel.send(PROGRESS, self._id, _encode(value))

    def chunk(self, value):
        """Sends a piece of the result ahead of the rest."""
        self._channel.send(CHUNK, self._id, _encode(value))


def _encode(value):
    """Bytes stay as they are, everything else becomes JSON."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if value is None:
        return b""
    return json.dumps(value, separators=(",", ":")).encode()


class _Channel:
    def __init__(self, sock):
        self.sock = sock
        self.file = sock.makefile("rb", buffering=65536)
        self.lock = threading.Lock()
        self.peer_max = MAX_FRAME

    def check(self, payload):
        if len(payload) > self.peer_max:
            raise TaskError("%d bytes are more than the %d that the parent takes" % (len(payload), self.peer_max), "too_large")

    def send(self, type, id, payload=b""):
        self.check(payload)
        with self.lock:
            if len(payload) < 65536:
                self.sock.sendall(_HEADER.pack(len(payload), type, id) + payload)
            else:
                self.sock.sendall(_HEADER.pack(len(payload), type, id))
                self.sock.sendall(payload)

    def receive(self):
        """Returns type, id and payload; None at the end."""
        head = self.file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return None
        n, type, id = _HEADER.unpack(head)
        if n > MAX_FRAME + 2048:
            raise ValueError("frame of %d bytes" % n)
        payload = self.file.read(n) if n else b""
        return (type, id, payload) if len(payload) == n else None


class _Worker:
    def __init__(self, channel, handlers):
        self.channel, self.handlers = channel, handlers
        self.todo = queue.SimpleQueue()
        self.tasks, self.lock = {}, threading.Lock()
        self.error = None
        self.concurrency = 1
        self.greeted = threading.Event()

    def read(self):
        """Runs in a thread of its own, so that a cancel or a ping is heard
        while handlers work."""
        try:
            while self._turn():
                pass
        except OSError:
            pass  # the parent is gone
        except Exception as e:
            self.error = e
        if not self.stopped:
            with self.lock:
                for t in self.tasks.values():
                    t.cancelled.set()
        self.greeted.set()
        for _ in range(self.concurrency):
            self.todo.put(None)

    stopped = False

    def _turn(self):
        frame = self.channel.receive()
        if frame is None:
            return False
        type, id, payload = frame
        if not self.greeted.is_set() and type != HELLO:
            raise ValueError("first frame is of type %d, not HELLO" % type)
        if type == TASK:
            timeout, n = _TASK.unpack_from(payload)
            if _TASK.size + n > len(payload):
                raise ValueError("short task")
            name = payload[_TASK.size:_TASK.size + n].decode()
            task = Task(self.channel, id, name, timeout, payload[_TASK.size + n:])
            with self.lock:
                self.tasks[id] = task
            self.todo.put(task)
        elif type == CANCEL:
            with self.lock:
                task = self.tasks.get(id)
            if task is not None:
                task.cancelled.set()
        elif type == PING:
            self.channel.send(PONG, id, payload)
        elif type == HELLO:
            hello = json.loads(payload)
            if hello.get("remuda") != VERSION:
                raise ValueError("the parent speaks version %r of the protocol, this SDK version %d" % (hello.get("remuda"), VERSION))
            self.channel.peer_max = hello.get("max_frame") or MAX_FRAME
            self.concurrency = max(1, hello.get("concurrency") or 1)
            self.greeted.set()
        elif type == STOP:
            self.stopped = True
            return False
        elif type != PONG and type < 128:
            raise ValueError("unexpected frame of type %d" % type)
        return True

    def work(self):
        while True:
            task = self.todo.get()
            if task is None:
                return
            try:
                self._answer(task)
            except OSError:
                pass  # the parent is gone
            finally:
                with self.lock:
                    self.tasks.pop(task._id, None)

    def _answer(self, task):
        try:
            h = self.handlers.get(task.name) or self.handlers.get("")
            if h is None:
                raise TaskError("this worker has no handler for the task %r" % task.name, "unknown_task")
            b = _encode(h(task))
            self.channel.check(b)
        except TaskError as e:
            self._fail(task, e)
        except Exception as e:
            self._fail(task, TaskError(str(e) or repr(e), type(e).__name__))
        else:
            self.channel.send(RESULT, task._id, b)

    def _fail(self, task, e):
        try:
            b = _encode({k: v for k, v in (("message", e.message), ("code", e.code), ("data", e.data)) if v})
        except (TypeError, ValueError):
            b = _encode({"message": e.message})
        if len(b) > self.channel.peer_max:
            b = _encode({"message": "the error is too large to be sent"})
        self.channel.send(ERROR, task._id, b)


def serve(handlers):
    """Takes tasks until the parent says stop or is gone, and returns then.

    handlers are functions by the names of their tasks; the one under "" gets
    all others, and a single function gets everything. A handler gets a Task
    and returns its result: bytes as they are, anything else as JSON. What it
    raises is a failure of the task. With a concurrency above 1 handlers run in
    threads.
    """
    fd = os.environ.pop("REMUDA_FRAMES_FD", "")
    if not fd:
        raise RuntimeError("REMUDA_FRAMES_FD is not set: this program is a worker and is to be started by a pool")
    if callable(handlers):
        handlers = {"": handlers}
    os.set_inheritable(int(fd), False)
    channel = _Channel(socket.socket(fileno=int(fd)))
    hello = {"remuda": VERSION, "max_frame": MAX_FRAME, "pid": os.getpid(), "sdk": "python " + platform.python_version()}
    channel.send(HELLO, 0, _encode(hello))
    w = _Worker(channel, handlers)
    reader = threading.Thread(target=w.read, daemon=True)
    reader.start()
    w.greeted.wait()
    threads = [threading.Thread(target=w.work) for _ in range(w.concurrency - 1)]
    for t in threads:
        t.start()
    w.work()
    for t in threads:
        t.join()
    channel.sock.close()
    if w.error is not None:
        raise w.error
