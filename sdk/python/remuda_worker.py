"""Worker side of the frames protocol (docs/worker-protocol.md) for Python 3.8
and newer. Standard library only.

    import remuda_worker

    def thumbnail(task):
        ...
        return {"width": w, "height": h}

    remuda_worker.serve({"thumbnail": thumbnail})
"""

import array
import collections
import fcntl
import json
import mmap
import os
import platform
import queue
import socket
import stat
import struct
import threading
import time
import traceback

__all__ = ["serve", "Task", "TaskError"]

VERSION = 1
MAX_FRAME = 64 << 20
HELLO, TASK, RESULT, ERROR, PROGRESS, CHUNK, CANCEL, PING, PONG, STOP, HANDLES, SUBSCRIBE, UNSUBSCRIBE, PUBLISH, SEGMENT, SHARED, RELEASE, FORGET = range(1, 19)
MAX_FILES = 16
_HEADER = struct.Struct("<III")  # length, type and time, id
_KINDS = {socket.SOCK_STREAM: 2, socket.SOCK_DGRAM: 3, socket.SOCK_SEQPACKET: 4}
_ROOM = socket.CMSG_LEN(4 * MAX_FILES)
_TASK = struct.Struct("<IH")
_SHARED = struct.Struct("<IQQ")
SHARE_FROM = 64 << 10
MAX_SHARED = 512 << 20  # of what this side makes
_SHARED_IDLE = 10  # seconds
_ADD_SEALS, _SEALS = 1033, 1 | 2 | 4  # F_ADD_SEALS; SEAL, SHRINK, GROW


class TaskError(Exception):
    """A failure with a code for programs, and data that can be JSON."""

    def __init__(self, message, code="", data=None):
        super().__init__(message)
        self.message, self.code, self.data = message, code, data


class Task:
    """What there is to do.

    name, body (bytes), view (the same as a memoryview: a large body is in memory
    that the pool uses again when the handler has returned, and view spares the
    copy), timeout (seconds, or None), cancelled, an Event that is set when the
    answer is not wanted any more, and files: sockets as socket.socket, others as
    unbuffered binary files. They are closed when the handler has returned; one
    that keeps a file takes it out of the list.
    """

    __slots__ = ("name", "view", "timeout", "cancelled", "files", "_body", "_id", "_channel", "_reply", "_out")

    def __init__(self, channel, id, name, timeout, body, fds=()):
        self._channel, self._id, self._reply, self._out = channel, id, [], None
        self.name, self.view = name, memoryview(body)
        self._body = body if isinstance(body, bytes) else None
        self.files = [_open(fd) for fd in fds]
        self.timeout = timeout / 1000 if timeout else None
        self.cancelled = threading.Event()

    @property
    def body(self):
        if self._body is None:
            self._body = bytes(self.view)
        return self._body

    @property
    def data(self):
        """The task as JSON; None where it is empty."""
        return json.loads(self.body) if self.body else None

    def attach(self, *files):
        """Has files (sockets, open files or descriptors) sent with the result,
        at most 16. They are closed when it is sent or the handler has failed."""
        self._reply.extend(files)

    def result_buffer(self, n):
        """Returns a memoryview of n bytes, not cleared. A handler that returns it
        has its result get to the pool without being copied, if it is large."""
        if self._out is not None:
            self._channel.shelf.put(self._out[0])
            self._out = None
        segment = self._channel.shelf.get(n) if self._channel.shares(n) else None
        if segment is None:
            return memoryview(bytearray(n))
        view = memoryview(segment.memory)[:n]
        self._out = segment, view
        return view

    def publish(self, topic, value):
        """Gives a message to all who have subscribed to topic, and waits for
        none of them."""
        name = topic.encode()
        if not 0 < len(name) < 256 or topic.endswith("*"):
            raise ValueError("not a topic to publish to: %r" % topic)
        self._channel.send(PUBLISH, 0, bytes([len(name)]) + name + _encode(value))

    def progress(self, value):
        """Tells whoever waits how far the task is."""
        self._channel.send(PROGRESS, self._id, _encode(value))

    def chunk(self, value):
        """Sends a piece of the result ahead of the rest."""
        self._channel.send(CHUNK, self._id, _encode(value))


def _open(fd):
    """Makes an object of a descriptor."""
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        return socket.socket(fileno=fd)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return os.fdopen(fd, {os.O_RDONLY: "rb", os.O_WRONLY: "wb"}.get(mode, "r+b"), 0)


def _kind(fd):
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return 1
    s = socket.socket(fileno=fd)
    try:
        return _KINDS.get(s.type, 0)
    finally:
        s.detach()


def _close(files):
    for f in files:
        try:
            os.close(f) if isinstance(f, int) else f.close()
        except OSError:
            pass


def _encode(value):
    """Bytes stay as they are, everything else becomes JSON."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, (bytearray, memoryview)):
        view = memoryview(value)
        return view.cast("B") if view.c_contiguous and view.nbytes >= SHARE_FROM else bytes(view)
    if value is None:
        return b""
    return json.dumps(value, separators=(",", ":")).encode()


class _Segment:
    __slots__ = ("id", "memory", "used")

    def __init__(self, id, memory):
        self.id, self.memory, self.used = id, memory, 0

    def close(self):
        try:
            self.memory.close()
        except BufferError:
            pass  # a handler has kept a view: with the last one it is gone


class _Shelf:
    """The shared memory that this side has made: free, or sent and not yet
    released."""

    def __init__(self, channel):
        self.channel = channel
        self.lock = threading.Lock()
        self.free, self.sent = [], {}
        self.bytes = self.last = 0
        self.timer = None

    def get(self, n):
        """Returns memory for n bytes; None where there is none to be had."""
        with self.lock:
            fit = min((s for s in self.free if len(s.memory) >= n), key=lambda s: len(s.memory), default=None)
            if fit is not None:
                self.free.remove(fit)
                return fit
            step = max(65536, 1 << max(n.bit_length() - 3, 0))
            size = -(-n // step) * step
            if self.bytes + size > MAX_SHARED:
                self._trim(0)
            if n <= 0 or self.bytes + size > MAX_SHARED or len(self.free) + len(self.sent) >= 128:
                return None
            fd = os.memfd_create("remuda-shared", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, _ADD_SEALS, _SEALS)
                self.last += 1
                segment = _Segment(self.last, mmap.mmap(fd, size))
                self.channel.send(SEGMENT, segment.id, struct.pack("<Q", size), fds=[fd])
            finally:
                os.close(fd)
            self.bytes += size
            return segment

    def put(self, segment):
        with self.lock:
            self._put(segment)

    def _put(self, segment):
        segment.used = time.monotonic()
        self.free.append(segment)
        if self.timer is None:
            self._arm()

    def _arm(self):
        self.timer = threading.Timer(_SHARED_IDLE, self._tidy)
        self.timer.daemon = True
        self.timer.start()

    def _tidy(self):
        """Gives back what was not used for some time."""
        with self.lock:
            self.timer = None
            try:
                self._trim(_SHARED_IDLE / 2)
            except OSError:
                return  # the parent is gone
            if self.free:
                self._arm()

    def _trim(self, idle):
        before = time.monotonic() - idle
        for s in [s for s in self.free if s.used <= before]:
            self.free.remove(s)
            self.bytes -= len(s.memory)
            self.channel.send(FORGET, s.id)
            s.close()

    def sending(self, segment):
        with self.lock:
            self.sent[segment.id] = segment

    def released(self, id):
        with self.lock:
            segment = self.sent.pop(id, None)
            if segment is None:
                raise ValueError("segment %d is not in use" % id)
            self._put(segment)


class _Channel:
    def __init__(self, sock):
        self.sock = sock
        self.buf, self.at = b"", 0
        self.fds = []
        self.lock = threading.Lock()
        self.peer_max, self.peer_files, self.peer_shares = MAX_FRAME, False, 0
        self.shelf = _Shelf(self)

    def check(self, payload):
        if len(payload) > self.peer_max:
            raise TaskError("%d bytes are more than the %d that the parent takes" % (len(payload), self.peer_max), "too_large")

    def shares(self, n):
        return self.peer_shares > 0 and n >= self.peer_shares and hasattr(os, "memfd_create")

    def result(self, id, payload, took, files, out):
        """Sends a result, in shared memory if it is large. out is the memory that
        it lies in, and the view of it; or None."""
        segment = None
        if out is not None:
            if out[1] is payload:
                segment = out[0]
            else:
                self.shelf.put(out[0])
        n = len(payload)
        self.check(payload)
        if segment is None and self.shares(n):
            segment = self.shelf.get(n)
            if segment is not None:
                segment.memory[:n] = payload
        if segment is None:
            return self.send(RESULT, id, payload, took, files)
        self.shelf.sending(segment)
        try:
            self.send(RESULT, id, b"", took, files, _HEADER.pack(_SHARED.size, SHARED, id) + _SHARED.pack(segment.id, 0, n))
        except TaskError:
            self.shelf.released(segment.id)
            raise

    def send(self, type, id, payload=b"", took=0, files=(), before=b"", fds=()):
        """took is in seconds. before is a frame that precedes this one; fds go
        with the first byte, unannounced."""
        self.check(payload)
        if took:
            type |= min(max(int(took * 1e6), 1), 0xFFFFFF) << 8
        head = before + _HEADER.pack(len(payload), type, id)
        if files:
            fds = [f if isinstance(f, int) else f.fileno() for f in files]
            if len(fds) > MAX_FILES or not self.peer_files:
                raise TaskError("%d files with a result, where the parent takes %d" % (len(fds), MAX_FILES if self.peer_files else 0), "files")
            head = _HEADER.pack(len(fds), HANDLES, id) + bytes(map(_kind, fds)) + head
        with self.lock:
            if fds:
                rights = array.array("i", fds)
                sent = self.sock.sendmsg([head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                head = head[sent:]
            if len(payload) < 65536:
                self.sock.sendall(head + bytes(payload))
            else:
                self.sock.sendall(head)
                self.sock.sendall(payload)

    def receive(self):
        """Returns type, id and payload; None at the end."""
        head = self._read(_HEADER.size)
        if head is None:
            return None
        n, type, id = _HEADER.unpack(head)
        if type > 255:
            raise ValueError("reserved bytes in use")
        if n > MAX_FRAME + 2048:
            raise ValueError("frame of %d bytes" % n)
        payload = self._read(n)
        return None if payload is None else (type, id, payload)

    def take(self, n):
        """Returns the n descriptors that came first."""
        if n > len(self.fds):
            raise ValueError("%d descriptors announced, %d came" % (n, len(self.fds)))
        fds, self.fds = self.fds[:n], self.fds[n:]
        return fds

    def _read(self, n):
        have = len(self.buf) - self.at
        if have >= n:
            self.at += n
            return self.buf[self.at - n:self.at]
        parts = [self.buf[self.at:]]
        while have < n:
            # What is large is read to its end and no further, so that it is
            # put together once.
            data = self._receive(min(n - have, 1 << 20) if n > 65536 else 65536)
            if not data:
                return None
            parts.append(data)
            have += len(data)
        whole = b"".join(parts)
        if have == n:
            self.buf, self.at = b"", 0
            return whole
        self.buf, self.at = whole, n
        return whole[:n]

    def _receive(self, n):
        data, control, flags, _ = self.sock.recvmsg(n, _ROOM, socket.MSG_CMSG_CLOEXEC)
        for level, kind, b in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(b[:len(b) - len(b) % fds.itemsize])
                self.fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise ValueError("more descriptors came than there is room for")
        return data


class _Ear:
    """Calls those who have subscribed, in a thread of its own. What they are
    too slow for is dropped, the oldest first."""

    WAITING = 1024

    def __init__(self, subscribers):
        self.subscribers = subscribers
        self.waiting = collections.deque(maxlen=self.WAITING)
        self.event = threading.Event()

    def hear(self, payload):
        end = 1 + payload[0]
        if end > len(payload):
            raise ValueError("short message")
        self.waiting.append((payload[1:end].decode(), payload[end:]))
        self.event.set()

    def run(self):
        while True:
            self.event.wait()
            self.event.clear()
            while self.waiting:
                topic, body = self.waiting.popleft()
                for name, call in self.subscribers.items():
                    if name == topic or name.endswith("*") and topic.startswith(name[:-1]):
                        try:
                            call(topic, body)
                        except Exception:
                            traceback.print_exc()


class _Worker:
    def __init__(self, channel, handlers, ear):
        self.channel, self.handlers, self.ear = channel, handlers, ear
        self.todo = queue.SimpleQueue()
        self.tasks, self.lock = {}, threading.Lock()
        self.segments = {}  # the pool's
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
    coming = ()  # descriptors for the next frame
    shared = None  # its body

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
            body = payload[_TASK.size + n:] if self.shared is None else self.shared
            task = Task(self.channel, id, name, timeout, body, self.coming)
            self.coming, self.shared = (), None
            with self.lock:
                self.tasks[id] = task
            self.todo.put(task)
        elif type == CANCEL:
            with self.lock:
                task = self.tasks.get(id)
            if task is not None:
                task.cancelled.set()
        elif type == HANDLES:
            self.coming = self.channel.take(len(payload))
        elif type == PING:
            self.channel.send(PONG, id, payload)
        elif type == HELLO:
            hello = json.loads(payload)
            if hello.get("remuda") != VERSION:
                raise ValueError("the parent speaks version %r of the protocol, this SDK version %d" % (hello.get("remuda"), VERSION))
            self.channel.peer_max = hello.get("max_frame") or MAX_FRAME
            self.channel.peer_files = bool(hello.get("files"))
            self.channel.peer_shares = hello.get("shm") or 0
            self.concurrency = max(1, hello.get("concurrency") or 1)
            self.greeted.set()
        elif type == SHARED:
            segment, at, n = _SHARED.unpack(payload)
            self.shared = memoryview(self.segments[segment].memory)[at:at + n]
        elif type == SEGMENT:
            (fd,) = self.channel.take(1)
            try:
                self.segments[id] = _Segment(id, mmap.mmap(fd, *struct.unpack("<Q", payload)))
            finally:
                os.close(fd)
        elif type == FORGET:
            self.segments.pop(id).close()
        elif type == RELEASE:
            self.channel.shelf.released(id)
        elif type == PUBLISH:
            self.ear.hear(payload)
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
                try:
                    task.view.release()
                except BufferError:
                    pass  # the handler has kept a part
                _close(task.files)
                _close(task._reply)

    def _answer(self, task):
        began = time.monotonic()
        try:
            h = self.handlers.get(task.name) or self.handlers.get("")
            if h is None:
                raise TaskError("this worker has no handler for the task %r" % task.name, "unknown_task")
            value = h(task)
            b = value if task._out is not None and task._out[1] is value else _encode(value)
            out, task._out = task._out, None
            self.channel.result(task._id, b, time.monotonic() - began, task._reply, out)
        except TaskError as e:
            self._fail(task, e, began)
        except Exception as e:
            self._fail(task, TaskError(str(e) or repr(e), type(e).__name__), began)

    def _fail(self, task, e, began):
        if task._out is not None:
            self.channel.shelf.put(task._out[0])
            task._out = None
        try:
            b = _encode({k: v for k, v in (("message", e.message), ("code", e.code), ("data", e.data)) if v})
        except (TypeError, ValueError):
            b = _encode({"message": e.message})
        if len(b) > self.channel.peer_max:
            b = _encode({"message": "the error is too large to be sent"})
        self.channel.send(ERROR, task._id, b, time.monotonic() - began)


def serve(handlers, subscribe=None):
    """Takes tasks until the parent says stop or is gone, and returns then.

    handlers are functions by the names of their tasks; the one under "" gets
    all others, and a single function gets everything. A handler gets a Task
    and returns its result: bytes as they are, anything else as JSON. What it
    raises is a failure of the task. With a concurrency above 1 handlers run in
    threads.

    subscribe are functions by topics; a topic that ends in "*" stands for all
    that begin with what precedes it. They are called with the topic and the
    message (bytes), one after the other, in a thread of their own.
    """
    fd = os.environ.pop("REMUDA_FRAMES_FD", "")
    if not fd:
        raise RuntimeError("REMUDA_FRAMES_FD is not set: this program is a worker and is to be started by a pool")
    if callable(handlers):
        handlers = {"": handlers}
    os.set_inheritable(int(fd), False)
    channel = _Channel(socket.socket(fileno=int(fd)))
    hello = {"remuda": VERSION, "max_frame": MAX_FRAME, "pid": os.getpid(), "files": True, "shm": SHARE_FROM, "sdk": "python " + platform.python_version()}
    channel.send(HELLO, 0, _encode(hello))
    ear = _Ear(dict(subscribe or {}))
    for topic in ear.subscribers:
        channel.send(SUBSCRIBE, 0, b"\0" + topic.encode())
    if ear.subscribers:
        threading.Thread(target=ear.run, daemon=True).start()
    w = _Worker(channel, handlers, ear)
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
